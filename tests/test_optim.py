"""SparseAdamW in PyTorch's habits: GradScaler, learning rates as tensors, rounding."""

from __future__ import annotations

import copy

import pytest
import torch

import fastgrad as fg
from fastgrad.partial import make_partial
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import selection_of


def trained(steps, scaler=None, **kwargs):
    model, batch = randomised(MODELS["llama"]), batch_of()
    partial = make_partial(model, selection_of(model, "16x8"))
    optimizer = fg.SparseAdamW(partial.parameters(), **{"lr": 1e-2, **kwargs})
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return model, partial, optimizer


def test_a_grad_scaler_changes_nothing():
    """Powers of two divide out exactly; the scaler's scale reaches the update itself."""
    plain, _, _ = trained(4)
    scaled, _, optimizer = trained(4, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert not hasattr(optimizer, "grad_scale")
    for (name, a), b in zip(plain.state_dict().items(), scaled.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7, msg=name)


def test_a_grad_scaler_skips_infinite_gradients():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model, partial, optimizer = trained(1, scaler)
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    scaler.scale(model(**batch_of()).loss).backward()
    next(iter(partial.parameters())).grad.view(-1)[0] = torch.inf
    scaler.step(optimizer)  # no error: skipping is the scaler's way
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
    for i, s in optimizer.state_dict()["state"].items():
        assert all(torch.equal(s[k], state[i][k]) for k in s)


def test_a_tensor_as_learning_rate_is_read_at_each_step():
    rate = torch.tensor(1e-2)
    by_number, _, _ = trained(3)
    by_tensor, _, optimizer = trained(3, lr=rate)
    for a, b in zip(by_number.parameters(), by_tensor.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    before = copy.deepcopy(by_tensor.state_dict())
    rate.zero_()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in by_tensor.state_dict().items())


@pytest.mark.parametrize("stochastic", [False, True])
def test_stochastic_rounding_moves_weights_that_rounding_to_nearest_cannot(stochastic):
    p = torch.nn.Parameter(torch.ones(4096).bfloat16())
    optimizer = fg.SparseAdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic)
    for _ in range(20):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    drift = float(p.detach().float().mean()) - 1
    if stochastic:  # 20 steps of 1e-4; one standard deviation of the mean is 6e-5
        assert abs(drift - 20e-4) < 4e-4
    else:
        assert drift == 0


def test_write_through_is_done_once_and_only_for_what_was_stepped():
    """The optimizer's own write-through and the hook for other optimizers do not meet."""
    model, partial, optimizer = trained(1)
    (first, *others) = partial.packed
    model(**batch_of()).loss.backward()
    for blocks in others:
        blocks.packed.grad = None
    optimizer.step()
    assert [b.name for b in optimizer._fastgrad_written] == [first.name]
    for blocks in partial.packed:
        assert torch.equal(blocks.gather(blocks.full), blocks.packed.detach())


def test_a_weight_changed_from_outside_stops_the_step_before_it_begins():
    model, partial, optimizer = trained(1)
    model(**batch_of()).loss.backward()
    last = partial.packed[-1]
    with torch.no_grad():
        last.full.add_(1.0)
    before = [b.packed.detach().clone() for b in partial.packed]
    with pytest.raises(fg.errors.PartialError, match="changed from outside"):
        optimizer.step()
    assert all(torch.equal(b.packed, old) for b, old in zip(partial.packed, before, strict=True))
