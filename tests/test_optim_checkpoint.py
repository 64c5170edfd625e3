"""SparseAdamW under ``torch.distributed.checkpoint``: what it saves, and exact resume."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import fastgrad as fg
from fastgrad.identity import PACKED_SUFFIX
from fastgrad.partial import make_partial
from fastgrad.sharded import TrainingState
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import selection_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")


def started(dtype=torch.float32, master=None, lr=1e-2, **kwargs):
    model = randomised(MODELS["llama"]).to(dtype)
    names = [n for n in dict(model.named_parameters()) if "layers.0" in n or "norm" in n]
    selection = selection_of(model, "16x8", 0.4, names=names)
    partial = make_partial(model, selection, master)
    return model, partial, fg.SparseAdamW(partial.parameters(), lr=lr, **kwargs)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(**batch_of(seed=step)).loss.backward()
        optimizer.step()
    optimizer.zero_grad()


def equal(one, other):
    for (name, p), q in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_looking_at_a_fresh_optimizer_changes_nothing(dtype, rate):
    """PyTorch makes a step with zero gradients to see the state. With AdamW that step is counted,
    and the first real one is corrected as if it were the second."""
    model, partial, optimizer = started(dtype, lr=rate, stochastic_rounding=True, weight_decay=0.5)
    twin, _, untouched = started(dtype, lr=1e-2, stochastic_rounding=True, weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    state = get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert len(state["state"]) == len(list(partial.parameters()))
    assert all(float(s["step"]) == 0 and not s["exp_avg"].any() for s in state["state"].values())
    assert all(p.grad is None for p in model.parameters())
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2)
    train(model, optimizer, 2)
    train(twin, untouched, 2)
    equal(model, twin)


def test_a_first_step_at_rate_zero_with_gradients_counts():
    model, partial, optimizer = started(lr=0.0)
    train(model, optimizer, 1)
    for p in partial.parameters():
        assert float(optimizer.state[p]["step"]) == 1
        assert optimizer.state[p]["exp_avg"].any()


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("named", [False, True], ids=["tensors", "named"])
def test_a_run_saved_to_files_goes_on_bit_for_bit(flat, named, tmp_path):
    """Packed parameters are no part of the model's state, but their moments are found under
    their names; without a master copy the full weights hold all that they hold."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def start():
        model, partial, _ = started()
        params = partial.named_parameters() if named else partial.parameters()
        return model, fg.SparseAdamW(params, lr=1e-2)

    model, optimizer = start()
    train(model, optimizer, 3)
    weights, state = get_state_dict(model, optimizer, options=options)
    assert not [name for name in weights if PACKED_SUFFIX in name]
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    other, fresh = start()
    weights, state = get_state_dict(other, fresh, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state, options=options)
    equal(model, other)
    for s, t in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(s[k], t[k]) and s[k].dtype == torch.float32 for k in s)
    train(model, optimizer, 3, first=3)
    train(other, fresh, 3, first=3)
    equal(model, other)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_moments_in_float32_of_bfloat16_parameters_come_back_so(flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, _, optimizer = started(torch.bfloat16)
    train(model, optimizer, 2)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other, _, fresh = started(torch.bfloat16)
    set_optimizer_state_dict(other, fresh, state, options=options)
    for s, t in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert torch.equal(s["exp_avg"], t["exp_avg"])
        assert t["exp_avg"].dtype == torch.float32
        assert float(t["step"]) == 2


def test_masters_need_training_state_and_resume_exactly_with_it(tmp_path):
    """The model's weights are the masters rounded: from them alone a run cannot go on exactly."""
    model, partial, optimizer = started(torch.bfloat16, torch.float32)
    train(model, optimizer, 3)
    state = {"training": TrainingState(partial, optimizer)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    other, other_partial, fresh = started(torch.bfloat16, torch.float32)
    loaded = {"training": TrainingState(other_partial, fresh)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    for p, q in zip(partial.parameters(), other_partial.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, p.bfloat16().float())
    train(model, optimizer, 3, first=3)
    train(other, fresh, 3, first=3)
    equal(model, other)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_counts_by_block_are_saved_and_loaded(flat, tmp_path):
    """A fresh optimizer counts by tensor; files hold a count for each block."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, partial, optimizer = started()
    train(model, optimizer, 2)
    optimizer.count_by_block()
    for blocks in partial.packed:
        optimizer.state[blocks.packed]["step"][0] = 1
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    other, _, fresh = started()
    weights, state = get_state_dict(other, fresh, options=options)
    with pytest.raises(CheckpointException, match="Size mismatch"):
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    other, _, fresh = started()
    fresh.count_by_block()
    weights, state = get_state_dict(other, fresh, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=state, options=options)
    for s, t in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert torch.equal(s["step"], t["step"])
    train(model, optimizer, 3, first=3)
    train(other, fresh, 3, first=3)
    equal(model, other)


def test_a_state_of_another_selection_is_named():
    model, _, optimizer = started()
    train(model, optimizer, 1)
    state = get_optimizer_state_dict(model, optimizer)
    other = randomised(MODELS["llama"])
    names = [n for n in dict(other.named_parameters()) if "layers.0" in n or "norm" in n]
    partial = make_partial(other, selection_of(other, "16x8", 0.7, names=names))
    fresh = fg.SparseAdamW(partial.parameters())
    with pytest.raises(ValueError, match="saved exp_avg has shape"):
        set_optimizer_state_dict(other, fresh, state)
