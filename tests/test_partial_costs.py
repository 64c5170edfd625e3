"""What a partial backward pass costs: operations and saved bytes, to the last one.

Expected operations come from the model's dimensions. A linear layer with ``T`` tokens costs
``2·T·in·out`` forward, as much again for its input's gradient where something below is trained,
and ``2·T`` per selected weight. Expected bytes are those that PyTorch itself saves if the selected
parameters alone require a gradient as wholes: no selection within them may save more.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastgrad as fg
from fastgrad.blocks import BlockGrid
from fastgrad.identity import model_parameters
from fastgrad.partial import make_partial
from tests.models import MODELS, VOCAB, batch_of, randomised
from tests.test_sparse_experts import mixtral

BATCH, TOKENS, WIDTH, INNER, HEADS, HEAD = 3, 9, 32, 48, 4, 8
T = BATCH * TOKENS
ATTENTION = 2 * BATCH * HEADS * TOKENS * TOKENS * HEAD  # queries by keys, or weights by values


def select(model, spec, chosen):
    """Blocks by name: a share of them, from the first on."""
    shapes = {n: tuple(p.shape) for n, p in model_parameters(model).items()}
    blocks = {}
    for name, share in chosen.items():
        n = BlockGrid.of(shapes[name], spec).n_blocks
        blocks[name] = np.arange(max(1, int(share * n)))
    return fg.Selection(shapes, spec, blocks)


def flops(model, batch):
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return counter.get_total_flops()


def saved_bytes(model, run):
    """Bytes that the graph holds on to: each storage once, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run(model)
    total = sum(s.nbytes() for s in storages.values())
    del loss
    return total


def of(name, build=None):
    model = randomised(build or MODELS[name])
    model.set_attn_implementation("eager")
    return model


LLAMA = {"q": 32 * 32, "k": 16 * 32, "v": 16 * 32, "o": 32 * 32, "mlp": 3 * 32 * 48}


def llama_forward():
    layer = 2 * T * sum(LLAMA.values()) + 2 * ATTENTION
    return 2 * layer + 2 * T * WIDTH * VOCAB


def test_llama_above_its_lowest_layer():
    model, batch = of("llama"), batch_of()
    full = flops(model, batch)
    linear = 2 * 2 * T * sum(LLAMA.values()) + 2 * T * WIDTH * VOCAB
    assert full == 3 * linear + 2 * (2 + 4) * ATTENTION
    o, down = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"
    make_partial(model, select(model, "8x*", {o: 0.25, down: 0.5}))
    # Nothing in layer 0 or in the attention of layer 1 has a backward pass.
    upward = 2 * T * (LLAMA["mlp"] + WIDTH * VOCAB)
    selected = 2 * T * (8 * 32 + 16 * 48)
    assert flops(model, batch) == llama_forward() + upward + selected


def test_llama_with_queries_alone():
    model, batch = of("llama"), batch_of()
    q = "model.layers.1.self_attn.q_proj.weight"
    make_partial(model, select(model, "row", {q: 0.25}))
    # scores to queries and weights to scores; keys and values need none
    upward = 2 * T * (LLAMA["o"] + LLAMA["mlp"] + WIDTH * VOCAB) + 2 * ATTENTION
    assert flops(model, batch) == llama_forward() + upward + 2 * T * 8 * 32


@pytest.mark.parametrize("spec", ["row", "16x16"])
def test_gpt2_with_a_tied_output(spec):
    """Tiles below 16x16 would cost whole block rows; these have products of their own."""
    model, batch = of("gpt2"), batch_of()
    layer = 12 * WIDTH * WIDTH
    linear = 2 * 2 * T * layer + 2 * T * WIDTH * VOCAB
    assert flops(model, batch) == 3 * linear + 2 * (2 + 4) * ATTENTION
    fc, tied = "transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"
    partial = make_partial(model, select(model, spec, {fc: 0.25}))
    forward = linear + 2 * 2 * ATTENTION
    up = 2 * T * (WIDTH * 4 * WIDTH + WIDTH * VOCAB)
    assert flops(model, batch) == forward + up + 2 * T * WIDTH * WIDTH
    partial.remove()
    make_partial(model, select(model, spec, {tied: 0.25}))
    # The embedding is the lowest layer of all: every input's gradient is needed.
    rows = 15 if spec == "row" else 16  # a quarter of 61 rows; of 4 x 2 tiles, one stripe
    back = 2 * 2 * T * layer + 2 * T * WIDTH * VOCAB + 2 * 4 * ATTENTION
    assert flops(model, batch) == forward + back + 2 * T * rows * WIDTH


def test_bert_by_columns():
    model, batch = of("bert"), batch_of()
    layer = 4 * WIDTH * WIDTH + 2 * WIDTH * INNER
    linear = 2 * T * (2 * layer + WIDTH * WIDTH + WIDTH * VOCAB)
    assert flops(model, batch) == 3 * linear + 2 * (2 + 4) * ATTENTION
    out = "bert.encoder.layer.1.output.dense.weight"
    make_partial(model, select(model, "column", {out: 0.25}))
    up = 2 * T * (WIDTH * WIDTH + WIDTH * VOCAB)
    assert flops(model, batch) == linear + 4 * ATTENTION + up + 2 * T * WIDTH * INNER // 4


def counted(model):
    """How many tokens each expert of the last layer gets."""
    counts = []
    router = model.model.layers[1].mlp.gate
    hook = router.register_forward_hook(
        lambda m, i, out: counts.append(torch.bincount(out[-1].flatten(), minlength=6))
    )
    with torch.no_grad():
        model(**batch_of())
    hook.remove()
    return counts[0]


def test_mixtral_by_experts():
    model, batch = of("mixtral", mixtral), batch_of()
    model.set_experts_implementation("eager")
    tokens = counted(model)
    assert tokens.sum() == 2 * T
    full = flops(model, batch)
    linear = 2 * (T * (2 * 32 * 32 + 2 * 16 * 32 + 6 * 32) + 2 * T * 3 * 32 * 48) * 2
    linear += 2 * T * WIDTH * VOCAB
    assert full == 3 * linear + 2 * (2 + 4) * ATTENTION
    name = "model.layers.1.mlp.experts.gate_up_proj"
    make_partial(model, select(model, "expert", {name: 0.5}))
    mine = int(tokens[:3].sum())
    # up to experts 0 to 2 of the last layer: from the output through their down projections
    upward = 2 * mine * 32 * 48 + 2 * T * WIDTH * VOCAB
    forward = linear + 4 * ATTENTION
    assert flops(model, batch) == forward + upward + 2 * mine * 32 * 96


CHOSEN = {
    "llama": ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"],
    "llama-tied": ["model.embed_tokens.weight"],
    "gpt2": ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.attn.c_proj.weight"],
    "bert": ["bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"],
}


@pytest.mark.parametrize("spec", ["row", "8x*", "column", "8x8"])
@pytest.mark.parametrize("name", list(CHOSEN))
def test_no_byte_more_is_saved_than_for_the_same_parameters_as_wholes(name, spec):
    model, batch = of(name), batch_of()
    run = lambda m: m(**batch).loss  # noqa: E731
    everything = saved_bytes(model, run)
    for n, p in model_parameters(model).items():
        p.requires_grad_(n in CHOSEN[name])
    wholes = saved_bytes(model, run)
    make_partial(model, select(model, spec, dict.fromkeys(CHOSEN[name], 0.25)))
    assert saved_bytes(model, run) == wholes
    assert wholes < everything or name == "llama-tied"


def test_saved_bytes_of_a_stack_in_closed_form():
    """Embedding, three linear layers with ``tanh`` between: what is kept is known one by one."""
    model = nn.Sequential(
        nn.Embedding(50, 16), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 40), nn.Tanh(),
        nn.Linear(40, 8),
    )  # fmt: skip
    ids = torch.arange(20)
    run = lambda m: m(ids).sum()  # noqa: E731
    n = ids.numel()
    outputs = {"e": 16, "t1": 24, "t2": 40}  # of the embedding and both tanh
    # each linear layer saves its input, each tanh its output, the embedding the ids (int64)
    assert saved_bytes(model, run) == 4 * n * sum(outputs.values()) + 8 * n

    def partial_bytes(chosen):
        partial = make_partial(model, select(model, "row", dict.fromkeys(chosen, 0.25)))
        found = saved_bytes(model, run)
        partial.remove()
        return found

    assert partial_bytes(["5.weight"]) == 4 * n * 40  # its input, which is also tanh's output
    assert partial_bytes(["3.weight"]) == 4 * n * (24 + 40)
    assert partial_bytes(["1.weight"]) == 4 * n * (16 + 24 + 40)  # tanh needs its outputs
    assert partial_bytes(["0.weight"]) == 8 * n + 4 * n * (24 + 40)  # ids, no linear input of it
    assert partial_bytes(["1.bias"]) == 4 * n * (24 + 40)


def test_unselected_experts_save_no_input():
    model, batch = of("mixtral", mixtral), batch_of()
    model.set_experts_implementation("eager")
    tokens = counted(model)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for n, p in model_parameters(model).items():
        p.requires_grad_(n == name)
    run = lambda m: m(**batch).loss  # noqa: E731
    wholes = saved_bytes(model, run)
    make_partial(model, select(model, "expert", {name: 0.5}))
    # For each token an expert saves its input (32), both halves of its first product in one tensor
    # (96), the activated half (48), the router's weight (1) and what index_add_ adds (32), all
    # float32, and the token's number and place, two int64 of one tensor.
    per_token = 4 * (32 + 96 + 48 + 1 + 32) + 16
    assert wholes - saved_bytes(model, run) == int(tokens[3:].sum()) * per_token
