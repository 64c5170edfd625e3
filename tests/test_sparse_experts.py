"""Mixture-of-experts weights: the selected experts' gradient, however the layer reads them."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import fastgrad as fg
from fastgrad import sparse_experts
from fastgrad.identity import model_parameters
from fastgrad.partial import make_partial
from tests.models import VOCAB, batch_of, randomised
from tests.test_partial import selection_of
from tests.test_sparse_layers import check

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def mixtral(experts=6):
    return MixtralForCausalLM(
        MixtralConfig(intermediate_size=48, num_local_experts=experts, **COMMON)
    )


def qwen3():
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            intermediate_size=48, moe_intermediate_size=24, num_experts=6, head_dim=8, **COMMON
        )
    )


def olmoe():
    return OlmoeForCausalLM(OlmoeConfig(intermediate_size=24, num_experts=6, **COMMON))


def experts_of(model):
    return [n for n, p in model_parameters(model).items() if p.ndim == 3]


@pytest.mark.parametrize("spec", ["expert", "2x*", "4x1000"])
@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("build", [mixtral, qwen3, olmoe])
def test_experts_equal_the_dense_gradient(build, how, spec):
    model = randomised(build)
    model.set_experts_implementation(how)
    names = experts_of(model)
    assert len(names) == 4
    batch = batch_of()
    check(model, lambda m: m(**batch).loss, spec, share=0.4, names=names)


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_only_selected_experts_gradients_are_formed(how):
    model = randomised(lambda: mixtral(experts=24))
    model.set_experts_implementation(how)
    names = experts_of(model)
    batch = batch_of(n=2, tokens=8)
    limit = min(dict(model.named_parameters())[n].numel() for n in names) // 2
    check(model, lambda m: m(**batch).loss, "expert", share=0.2, names=names, dense_limit=limit)


class Loop(nn.Module):
    """Experts in turn, each with tokens of its own, as Mixtral's eager layer reads them."""

    def __init__(self, how, experts=5, transposed=False):
        super().__init__()
        shape = (experts, 8, 12) if transposed else (experts, 12, 8)
        self.weight = nn.Parameter(torch.randn(shape) / 3)
        self.how, self.transposed = how, transposed

    def forward(self, x, offs):
        if self.how == "grouped":
            weight = self.weight if self.transposed else self.weight.transpose(-2, -1)
            return F.grouped_mm(x, weight, offs=offs)
        out, start = [], 0
        for e, end in enumerate(offs.tolist()):
            weight = self.weight[e if e % 2 else torch.tensor(e - len(offs))]
            out.append(x[start:end] @ (weight if self.transposed else weight.T))
            start = end
        return torch.cat(out)


OFFS = torch.tensor([3, 3, 10, 16, 20], dtype=torch.int32)  # the second expert has no tokens


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("how", ["loop", "grouped"])
def test_flops_and_saved_inputs_are_those_of_the_selected_experts(how, transposed):
    torch.manual_seed(0)
    model = Loop(how, transposed=transposed)
    x = torch.randn(20, 8)
    weight = model.weight.detach().clone().requires_grad_()
    dense = Loop(how, transposed=transposed)
    dense.weight = nn.Parameter(weight.detach())
    dense(x, OFFS).square().sum().backward()
    selection = fg.Selection({"weight": tuple(weight.shape)}, "expert", {"weight": [1, 2, 4]})
    partial = make_partial(model, selection)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x, OFFS).square().sum()
    inputs = [t for t in saved if t.shape[-1] == 8 and t.ndim == 2 and t.shape[0] in (7, 4, 11)]
    assert sum(t.shape[0] for t in inputs) == 7 + 4  # tokens of experts 2 and 4
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * (7 + 4) * 8 * 12
    (p,) = partial.parameters()
    want = dense.weight.grad[[1, 2, 4]].reshape(p.shape)
    torch.testing.assert_close(p.grad, want, rtol=1e-5, atol=1e-5)
    assert not p.grad[0].any()


def test_readings_one_by_one_meet_in_one_node_that_does_not_outlive_them():
    torch.manual_seed(0)
    model, x = Loop("loop"), torch.randn(20, 8)
    partial = make_partial(model, selection_of(model, "expert", 0.7))
    (p,) = partial.parameters()
    first = model(x, OFFS).square().sum()
    assert len(sparse_experts._GATES) == 1
    second = model(2 * x, OFFS).square().sum()  # two passes at once share the node
    assert len(sparse_experts._GATES) == 1
    second.backward()
    first.backward()
    got, p.grad = p.grad, None
    (model(x, OFFS).square().sum() + model(2 * x, OFFS).square().sum()).backward()
    torch.testing.assert_close(got, p.grad)
    del first, second
    gc.collect()
    assert len(sparse_experts._GATES) == 0


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_experts_in_bfloat16_with_masters_and_under_autocast(how):
    model = randomised(mixtral).bfloat16()
    model.set_experts_implementation(how)
    names = experts_of(model)
    partial = make_partial(
        model, selection_of(model, "expert", 0.5, names=names), master_dtype=torch.float32
    )
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch_of()).loss
        loss.backward()
        losses.append(float(loss))
        assert all(p.grad.dtype == torch.float32 for p in partial.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    wide = randomised(mixtral)
    wide.set_experts_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16):
        wide(**batch_of()).loss.backward()
    grads = {n: p.grad for n, p in wide.named_parameters()}
    partial = make_partial(wide, selection_of(wide, "expert", 0.5, names=names))
    with torch.autocast("cpu", torch.bfloat16):
        wide(**batch_of()).loss.backward()
    for blocks in partial.packed:
        torch.testing.assert_close(
            blocks.packed.grad, blocks.gather(grads[blocks.name]), rtol=2e-2, atol=1e-4
        )
