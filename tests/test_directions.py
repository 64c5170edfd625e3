"""Target directions against values computed by hand and by Adam itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.errors import NonFiniteGradientError, ProbeError
from tests.models import MODELS, batch_of, randomised


def test_the_gradient_is_copied_by_name():
    model = randomised(MODELS["llama-tied"])
    model(**batch_of()).loss.backward()
    direction = fg.gradient_direction(model)
    assert list(direction) == [n for n, _ in model.named_parameters()]
    kept = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=False)
    assert all(torch.equal(direction[n], kept[n]) for n in kept)


def test_wrappers_are_looked_through():
    model = nn.Linear(3, 2)
    wrapped = nn.DataParallel(model)
    model(torch.ones(1, 3)).sum().backward()
    assert list(fg.gradient_direction(wrapped)) == ["weight", "bias"]


def test_parameters_without_a_gradient_are_named():
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abcdef"})
    with pytest.raises(ProbeError, match=r"no parameter has a gradient.*Remedy"):
        fg.gradient_direction(model)
    model["f"].weight.requires_grad_(False)
    model["b"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(ProbeError, match=r"a\.weight, c\.weight, d\.weight and 1 more have no"):
        fg.gradient_direction(model)
    assert list(fg.gradient_direction(model, allow_missing=True)) == ["b.weight"]
    model["b"].weight.grad[0, 0] = torch.nan
    with pytest.raises(NonFiniteGradientError, match=r"b\.weight"):
        fg.gradient_direction(model, allow_missing=True)


def test_sparse_gradients_become_dense():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    assert fg.gradient_direction(table)["weight"].tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SparseAdamW"])
def test_against_values_computed_by_hand(kind):
    """Two steps with gradients 3 and 4: v = .9·.1·9 + .1·16 = 2.41, and 1 - .9² = .19."""
    model = nn.Linear(1, 1, bias=False)
    make = getattr(torch.optim, kind, None) or getattr(fg, kind)
    optimizer = make(model.parameters(), lr=0.1, betas=(0.5, 0.9), eps=0.25)
    for gradient in (3.0, 4.0):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    found = fg.adam_preconditioned({"weight": torch.tensor([[2.0]])}, optimizer, model)
    expected = 2 / (math.sqrt((0.9 * 0.1 * 9 + 0.1 * 16) / 0.19) + 0.25)
    torch.testing.assert_close(found["weight"].item(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_what_adam_does_to_a_gradient(amsgrad, dtype):
    """Without momentum (β₁ = 0) Adam's step on g is -lr g / (√v̂ + ε), v̂ including g itself."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=1.0, betas=(0.0, 0.9), eps=1e-3, amsgrad=amsgrad
    )
    for scale in (3.0, 1.0, 0.1):  # falling, so that the largest v is not the last
        for p in model.parameters():
            p.grad = torch.randn_like(p) * scale
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
    direction = {n: p.grad for n, p in model.named_parameters()}
    found = fg.adam_preconditioned(direction, optimizer, model)
    for n, p in model.named_parameters():
        assert found[n].dtype == wide
        step = before[n].to(wide) - p.detach().to(wide)
        tolerance = {"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(found[n], step, **tolerance)


def test_moments_of_packed_parameters_that_are_whole():
    """A float32 master copy of a whole bfloat16 weight has the state; a part of one is refused."""
    model = randomised(MODELS["llama"]).to(torch.bfloat16)
    names = ["model.norm.weight", "lm_head.weight"]
    chosen = fg.select(None, model, fraction=1.0, ranking="first", include=names)
    partial = fg.make_partial(model, chosen, torch.float32)
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-3)
    model(**batch_of()).loss.backward()
    packed = dict(partial.named_parameters())
    direction = {n: packed[n].grad.clone() for n in names}
    optimizer.step()
    found = fg.adam_preconditioned(direction, optimizer, model)
    for n in names:  # after one step √v̂ is |g|
        expected = direction[n] / (direction[n].abs() + 1e-8)
        torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=1e-6)
    partial.remove()
    part = fg.select(None, model, count=3, ranking="first", blocks="row")
    partial = fg.make_partial(model, part)
    (name,) = part.names
    with pytest.raises(ProbeError, match=rf"only selected blocks of {name} are trained"):
        fg.adam_preconditioned(
            {name: torch.zeros(part.shapes[name])}, fg.SparseAdamW(partial.parameters()), model
        )


def test_what_has_no_state_is_named():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(model["a"].parameters())
    direction = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    with pytest.raises(ProbeError, match=r"no state for a\.weight, a\.bias, b\.weight and 1 more"):
        fg.adam_preconditioned(direction, optimizer, model)
    model["a"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(ProbeError, match=r"no state for b\.weight, b\.bias: .*Remedy"):
        fg.adam_preconditioned(direction, optimizer, model)
    mine = {n: d for n, d in direction.items() if n.startswith("a")}
    assert list(fg.adam_preconditioned(mine, optimizer, model)) == list(mine)
    optimizer.state[model["a"].bias]["step"].zero_()  # prepared for loading, never stepped
    with pytest.raises(ProbeError, match=r"no state for a\.bias"):
        fg.adam_preconditioned(mine, optimizer, model)
    with pytest.raises(ProbeError, match="names c, which the model lacks"):
        fg.adam_preconditioned({"c": torch.ones(2)}, optimizer, model)
    with pytest.raises(ProbeError, match=r"another shape.*a\.weight: \(2,\), not \(2, 2\)"):
        fg.adam_preconditioned({"a.weight": torch.ones(2)}, optimizer, model)
    with pytest.raises(ProbeError, match=r"SGD keeps no second moment.*Remedy"):
        fg.adam_preconditioned(mine, torch.optim.SGD(model.parameters(), lr=1.0), model)


def test_an_optimizer_that_accelerate_has_prepared():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    direction = fg.gradient_direction(model)
    try:
        wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
        found = fg.adam_preconditioned(direction, wrapped, model)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    torch.testing.assert_close(found["weight"], torch.ones(1, 2))


def test_the_probe_takes_a_preconditioned_direction():
    """⟨P d, c_j⟩ = ⟨d, P c_j⟩: the sum over a batch is that of the batch's own gradient."""
    model = randomised(MODELS["llama"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(**batch_of(seed=7)).loss.backward()
    optimizer.step()
    direction = fg.adam_preconditioned(fg.gradient_direction(model), optimizer, model)
    model.zero_grad()
    with fg.Probe(model, targets=direction) as probe:
        model(**batch_of(seed=3)).loss.backward()
    gradient = fg.gradient_direction(model)
    expected = torch.stack([(direction[n] * gradient[n]).sum() for n in direction])
    found = torch.from_numpy(probe.stats().alignment.sum(1)).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
