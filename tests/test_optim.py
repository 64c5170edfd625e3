"""SparseAdamW in PyTorch's habits: GradScaler, learning rates as tensors, rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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
    assert optimizer._fastgrad_written == {id(first)}
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


def test_an_error_under_a_grad_scaler_leaves_nothing_behind():
    """Its scale and finding would be taken for the next step's own."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model, partial, optimizer = trained(1, scaler)
    scaler.scale(model(**batch_of()).loss).backward()
    with torch.no_grad():
        partial.packed[0].full.add_(1.0)
    with pytest.raises(fg.errors.PartialError):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    partial.packed[0].packed.grad.fill_(torch.nan)
    with pytest.raises(fg.errors.NonFiniteGradientError):
        optimizer.step()


def test_a_skipped_step_does_not_pass_for_a_write_through():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model, partial, optimizer = trained(1, scaler)
    scaler.scale(model(**batch_of()).loss).backward()
    blocks = partial.packed[0]
    with torch.no_grad():
        blocks.packed.mul_(1.5)  # by hand, after the backward pass
    blocks.packed.grad.view(-1)[0] = torch.inf
    scaler.step(optimizer)
    model(**batch_of())
    assert torch.equal(blocks.gather(blocks.full), blocks.packed.detach())


def test_a_loaded_state_is_a_copy_on_the_host():
    _, _, source = trained(2)
    _, _, target = trained(1)
    state = source.state_dict()
    target.load_state_dict(state)
    for mine, theirs in zip(target.state.values(), source.state.values(), strict=True):
        assert mine["step"] is not theirs["step"]
        assert mine["step"].device.type == "cpu"
        assert mine["step"].dtype == torch.float32


def test_groups_are_rounded_by_different_dice():
    params = [torch.nn.Parameter(torch.ones(2048).bfloat16()) for _ in range(2)]
    groups = [{"params": [p]} for p in params]
    optimizer = fg.SparseAdamW(groups, lr=2e-3, weight_decay=0.0, stochastic_rounding=True)
    for p in params:
        p.grad = torch.full_like(p, -1.0)
    optimizer.step()
    assert not torch.equal(params[0], params[1])


def test_fake_tensors_do_not_outlive_their_mode():
    p = torch.nn.Parameter(torch.ones(7))
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.nn.Parameter(torch.ones(7))
        q.grad = torch.ones(7)
        fg.SparseAdamW([q], lr=0.123, check_finite=False).step()
    p.grad = torch.ones(7)
    fg.SparseAdamW([p], lr=0.123).step()
    assert float(p.detach()[0]) == pytest.approx(1 - 0.123 * 1.01, abs=1e-6)
