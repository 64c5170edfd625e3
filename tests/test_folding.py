"""Plans that are put together from a few layers, against those of the whole model."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fastgrad import dry_run
from fastgrad.flops import FlopPlanner
from fastgrad.folding import find_repeats
from fastgrad.planner import MemoryPlanner
from tests.test_partial import selection_of

BF16, FP32 = torch.bfloat16, torch.float32
VOCAB, SHAPE = 300, (2, 12)
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 80}
GROUPED: dict[str, Any] = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(**kwargs: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**GROUPED, num_hidden_layers=8, **kwargs))


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def checkpointed() -> nn.Module:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**SMALL, num_hidden_layers=6, num_attention_heads=4))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=6, n_head=4, n_positions=64)
    )


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**GROUPED, num_hidden_layers=6, num_local_experts=4))


def gemma3() -> nn.Module:
    """Two kinds of layers by turns: every third one sees all tokens."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **GROUPED, num_hidden_layers=12, head_dim=8, sliding_window=4, sliding_window_pattern=3
        )
    )


def t5() -> nn.Module:
    """The first layer makes what all others use."""
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_ff=48, num_layers=6, num_heads=4, d_kv=8,
                 decoder_start_token_id=0)
    )


FOLDED = [llama, tied, bert, gpt2, mixtral]


def on_meta(make: Any, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return make().to(dtype)


def chosen(model: nn.Module, seed: int, specs: Any = ("module", "row", "8x8")) -> list[Any]:
    """None, and selections at random: few parameters, many, all, and those near the output."""
    names = [name for name, _ in model.named_parameters()]
    rng = random.Random(seed)
    parts = [3, len(names) // 4, len(names) // 2, len(names)]
    found: list[Any] = [None]
    for spec in specs:
        n = rng.choice(parts)
        some = sorted(rng.sample(names, n), key=names.index)
        found.append(selection_of(model, spec, names=some, share=0.3))
        upper = names[rng.randrange(len(names) // 5, len(names) - 2) :]
        found.append(selection_of(model, spec, names=upper, share=0.5))
    return found


def same_memory(make, dtype, master, seed, specs=("module", "row", "8x8")):
    """To the byte, phase by phase and term by term."""
    model = on_meta(make, dtype)
    quick = MemoryPlanner(model, batch_shape=SHAPE, master_dtype=master)
    whole = MemoryPlanner(model, batch_shape=SHAPE, master_dtype=master)
    whole._folded = None
    for selection in chosen(model, seed, specs):
        assert quick.plan(selection) == whole.plan(selection)
    return quick


@pytest.mark.parametrize(
    ("make", "master", "spec"),
    [
        (llama, FP32, "module"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (llama, FP32, "8x8"),
                (tied, FP32, "row"),
                (bert, FP32, "module"),
                (bert, None, "8x8"),
                (gpt2, None, "row"),
                (mixtral, FP32, "module"),
                (mixtral, FP32, "row"),
            )
        ),
    ],
)
def test_memory_is_that_of_the_whole_model(make, master, spec):
    quick = same_memory(make, BF16 if master else FP32, master, 0, [spec])
    assert quick._folded is not None
    assert not quick.not_folded


@pytest.mark.slow
def test_memory_with_checkpointing_is_that_of_the_whole_model():
    same_memory(checkpointed, BF16, FP32, 2, ["row"])


@pytest.mark.parametrize("make", [gemma3, t5])
def test_layers_of_two_kinds_are_all_run(make):
    """One path for both planners then."""
    model = on_meta(make, FP32)
    assert find_repeats(model) is None
    assert MemoryPlanner(model, batch_shape=SHAPE)._folded is None


@pytest.mark.parametrize(
    "optimizer", ["torch-adamw", pytest.param("sgd-momentum", marks=pytest.mark.slow)]
)
def test_other_optimizers(optimizer):
    model = on_meta(bert, FP32)
    quick = MemoryPlanner(model, batch_shape=(1, 2), optimizer=optimizer)
    whole = MemoryPlanner(model, batch_shape=(1, 2), optimizer=optimizer)
    whole._folded = None
    names = [name for name, _ in model.named_parameters()][9:60]
    for selection in (None, selection_of(model, "module", names=names)):
        assert quick.plan(selection) == whole.plan(selection)
    assert quick._folded is not None


@pytest.mark.parametrize(
    "make",
    [m if m is llama else pytest.param(m, marks=pytest.mark.slow) for m in FOLDED],
)
def test_operations_are_those_of_the_whole_model(make, monkeypatch):
    model = on_meta(make, FP32)
    quick = FlopPlanner(model, SHAPE)
    assert quick._repeats is not None
    monkeypatch.setattr("fastgrad.flops.find_repeats", lambda model: None)
    whole = FlopPlanner(model, SHAPE)
    for selection in chosen(model, FOLDED.index(make)):
        assert quick.plan(selection) == whole.plan(selection)


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx, self.up = number, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(x)


class Stack(nn.Module):
    """Layers as a test wants them."""

    def __init__(
        self, layers: list[nn.Module], order: list[int] | None = None, doubled: int | None = None
    ) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(20, 8), nn.ModuleList(layers)
        self.order, self.doubled = order, doubled

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        from types import SimpleNamespace

        x, before = self.embed(input_ids), None
        for i in self.order or range(len(self.layers)):
            if i < len(self.layers):
                before, x = x, self.layers[i](x)
                if i == self.doubled:
                    x = x * 2
        return SimpleNamespace(loss=x.square().mean() + before.mean())


def test_what_counts_as_a_repetition():
    repeats = find_repeats(Stack([Layer(i) for i in range(7)]))
    assert repeats is not None
    assert (repeats.path, repeats.count, set(repeats.structures)) == ("layers", 7, {0})
    assert repeats.outside == ["embed.weight"]
    assert repeats.local[3] == {
        "up.weight": "layers.3.up.weight", "up.bias": "layers.3.up.bias"
    }  # fmt: skip
    assert find_repeats(Stack([Layer(i) for i in range(4)])) is None  # too few to be worth it
    shared = [Layer(i) for i in range(7)]
    shared[5].up.weight = shared[2].up.weight
    assert find_repeats(Stack(shared)) is None
    assert find_repeats(Stack([Layer(0)] * 7)) is None
    odd = [Layer(i) for i in range(8)]
    odd[6].scale = 0.5
    assert find_repeats(Stack(odd)) is None  # not all of them are alike


@pytest.mark.parametrize(
    ("order", "doubled", "why"),
    [
        ([0, 0, 1, 2, 3, 4, 5, 6], None, "layers.0 is run after 1 of 7 layers"),
        ([1, 0, 2, 3, 4, 5, 6], None, "layers.1 is run as the first"),
        ([0, 1, 2, 3, 4, 5, 5, 6], None, "layers.5 is run after 6 of 7 layers"),
        ([0, 1, 2, 3, 4, 5, 6, 4], None, "layers.4 is run after 7 of 7 layers"),
        ([0, 1, 2, 3, 4, 5], None, "layers.6 is not run"),
        (None, 4, "something is done before layers.5"),
    ],
)
def test_layers_out_of_turn_are_run_as_they_are(order, doubled, why):
    """Those that a model of four layers does not show, too: by number, and above the fourth."""
    model = Stack([Layer(i) for i in range(7)], order, doubled)
    planner, flops = MemoryPlanner(model, batch_shape=SHAPE), FlopPlanner(model, SHAPE)
    plan = planner.plan()
    assert planner._folded is None  # it was tried
    assert why in planner.not_folded
    assert why in flops.not_folded
    whole = MemoryPlanner(model, batch_shape=SHAPE)
    whole._folded = None
    assert plan == whole.plan()
    linear = 2 * SHAPE[0] * SHAPE[1] * 8 * 8
    assert flops.plan().terms["forward"] == len(order or range(7)) * linear


def test_layers_in_turn_are_folded():
    model = Stack([Layer(i) for i in range(7)])
    planner, flops = MemoryPlanner(model, batch_shape=SHAPE), FlopPlanner(model, SHAPE)
    whole = MemoryPlanner(model, batch_shape=SHAPE)
    whole._folded = None
    assert planner.plan() == whole.plan()
    assert planner._folded is not None
    assert flops._repeats is not None
    assert planner.not_folded == flops.not_folded == ""


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers of each copy of a model that is made."""
    found: list[int] = []
    make = dry_run.DryRun.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        found.append(sum(1 for layer in self.layers if list(layer.parameters())))

    monkeypatch.setattr(dry_run.DryRun, "__init__", counted)
    return found


@pytest.mark.slow
def test_a_search_runs_few_layers(monkeypatch):
    """Not one run of the model for each candidate."""
    import fastgrad as fg

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**GROUPED, num_hidden_layers=40))
    planner = MemoryPlanner(model, batch_shape=SHAPE)
    full = planner.plan().total
    copied = counting(monkeypatch)
    made = fg.select(
        None, model, ranking="last", memory=int(0.7 * full), batch_shape=SHAPE, blocks="row"
    )
    assert planner.plan(made).total == made.meta["needs"]["value"] <= 0.7 * full
    assert sum(copied) <= 12 * 7
    copied.clear()
    FlopPlanner(model, SHAPE).plan(made)
    assert sum(copied) <= 8 + 1  # the one with which check_turns runs what is around the layers


SEVENTY = """
import json, sys
import fastgrad.dry_run as dry_run
layers = []
make = dry_run.DryRun.__init__
def counted(self, *args, **kwargs):
    make(self, *args, **kwargs)
    layers.append(sum(1 for layer in self.layers if list(layer.parameters())))
dry_run.DryRun.__init__ = counted
from fastgrad.cli import main
try:
    main(["plan", sys.argv[1], "--batch", "1x2048", "--flops", "--json"])
except SystemExit as end:
    assert not end.code
print(json.dumps(layers), file=sys.stderr)
"""


def test_the_command_plans_seventy_billion_weights_with_few_layers(tmp_path):
    """In a process of its own, from the configuration alone; what it runs is counted, not timed."""
    import json

    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, dtype=BF16,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SEVENTY, str(tmp_path)], check=True, capture_output=True, text=True
    )
    told = json.loads(done.stdout)
    assert told["n_total"] == pytest.approx(70.6e9, rel=1e-3)
    assert told["full_phases_bytes"]["backward"] > 12 * told["n_total"] / 2
    layer = told["n_total"] - 2 * 128256 * 8192 - 8192
    tokens = 2048
    products = 2 * tokens * (layer - 80 * 2 * 8192 + 128256 * 8192)
    assert told["flops"]["terms_flops"]["forward"] == products
    runs = json.loads(done.stderr.splitlines()[-1])
    assert len(runs) <= 5
    assert max(runs) <= 5
