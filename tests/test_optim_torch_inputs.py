"""PyTorch's own optimizer inputs, good and bad, on SparseAdamW as on ``torch.optim.AdamW``."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import optim_db

import fastgrad as fg
from fastgrad.optim_arguments import OptimizerError

# The import forbids all settings of backends; other tests of this process need them.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
# Configurations for "cuda" are those for "cpu" and more: capturable, tensors as betas. They run on
# a CPU too where the update is fused, and are compared there.
INPUTS = INFO.optim_inputs_func(device="cuda", dtype=torch.float32)
BAD = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)
SHAPES = [(), (1,), (7, 5), (0, 3), (2, 3, 4), (130, 70)]


def tensors(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]


def run(optimizer, params, steps=12):
    """Steps with the same gradients for whoever calls; one parameter misses every third one."""
    torch.manual_seed(1)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            if step % 3 == 2 and i == 2:
                p.grad = None
        optimizer.step()
    return params, optimizer


def close(mine, theirs, rtol=1e-6):
    for p, q in zip(mine[0], theirs[0], strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)
        a, b = mine[1].state[p], theirs[1].state[q]
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(a[key], b[key], rtol=rtol, atol=rtol)
        assert float(a["step"]) == float(b["step"])


def supported(inputs):
    return [i for i in inputs if not i.kwargs.get("amsgrad")]


@pytest.mark.parametrize("config", supported(INPUTS), ids=lambda i: i.desc)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fused", [None, True])
def test_inputs_of_pytorch_give_the_results_of_adamw(config, dtype, fused):
    theirs, mine = tensors(dtype), tensors(dtype)
    # on a CPU AdamW takes capturable only where it is fused; what it computes is the same
    kwargs = copy.deepcopy(config.kwargs) | {"fused": fused or "capturable" in config.kwargs}
    want = run(torch.optim.AdamW(theirs, **kwargs), theirs)
    got = run(fg.SparseAdamW(mine, **copy.deepcopy(config.kwargs), fused=fused), mine)
    assert not torch.equal(got[0][2], tensors(dtype)[2])
    close(got, want)


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("value", [None, False, True])
def test_ways_to_compute_are_accepted_and_change_nothing(flag, value):
    plain, other = tensors(), tensors()
    run(fg.SparseAdamW(plain), plain)
    run(fg.SparseAdamW(other, **{flag: value}), other)
    assert all(torch.equal(p, q) for p, q in zip(plain, other, strict=True))


@pytest.mark.parametrize(
    "config", [i for i in INPUTS if i.kwargs.get("amsgrad")], ids=lambda i: i.desc
)
def test_amsgrad_is_refused_by_name(config):
    with pytest.raises(OptimizerError, match=r"amsgrad.*Remedy"):
        fg.SparseAdamW(tensors(), **config.kwargs)


def test_options_are_refused_in_a_group_and_in_a_state_as_well():
    params = tensors(shapes=[(3,)])
    for option in ("amsgrad", "differentiable"):
        with pytest.raises(OptimizerError, match=option):
            fg.SparseAdamW(tensors(), **{option: True})
        with pytest.raises(OptimizerError, match=option):
            fg.SparseAdamW([{"params": params, option: True}])
    theirs = torch.optim.AdamW(params, amsgrad=True)
    run(theirs, params, 1)
    mine = fg.SparseAdamW(params)
    run(mine, params, 1)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(OptimizerError, match="amsgrad"):
        mine.load_state_dict(theirs.state_dict())
    assert str(before) == str(mine.state_dict())


def raised(make):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the two are compared
        make()
    return caught.value


@pytest.mark.parametrize("config", BAD, ids=lambda c: c.optimizer_error_input.desc)
def test_errors_of_pytorch_are_raised_alike(config):
    given = config.optimizer_error_input

    def make(cls):
        return cls(tensors() if given.params is None else given.params, **given.kwargs)

    if issubclass(config.error_type, Warning):
        for cls in (torch.optim.AdamW, fg.SparseAdamW):
            with pytest.warns(config.error_type, match=config.error_regex):
                make(cls)
        return
    with pytest.raises(config.error_type, match=config.error_regex):
        make(fg.SparseAdamW)
    mine, theirs = (
        raised(lambda cls=cls: make(cls)) for cls in (fg.SparseAdamW, torch.optim.AdamW)
    )
    assert (type(mine), str(mine)) == (type(theirs), str(theirs))


WRONG = [
    {"lr": -1.0},
    {"lr": float("nan")},
    {"lr": torch.tensor(-1.0)},
    {"lr": torch.ones(2)},
    {"lr": "fast"},
    {"eps": -1e-8},
    {"betas": (1.0, 0.999)},
    {"betas": (0.9, -0.1)},
    {"betas": (0.9,)},
    {"betas": (0, 0.999)},
    {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.999))},
    {"betas": (torch.tensor(0.9), torch.tensor([0.999, 0.999]))},
    {"betas": (torch.tensor(0.9), torch.tensor(0.999)), "foreach": True},
    {"weight_decay": -0.1},
    {"weight_decay": None},
    {"foreach": True, "fused": True},
    {"fused": True, "differentiable": True},
    {"lr": torch.tensor(1e-3), "foreach": True},
]


@pytest.mark.parametrize("kwargs", WRONG, ids=str)
def test_bad_hyperparameters_are_answered_as_by_adamw(kwargs):
    mine = raised(lambda: fg.SparseAdamW(tensors(), **kwargs))
    theirs = raised(lambda: torch.optim.AdamW(tensors(), **kwargs))
    assert (type(mine), str(mine)) == (type(theirs), str(theirs))


@pytest.mark.parametrize(
    "params",
    [[], [torch.zeros(2, requires_grad=True) * 2], ["weight"], torch.zeros(3), {1, 2}, [{}], None],
    ids=["empty", "not a leaf", "text", "tensor", "set", "no params", "None"],
)
def test_bad_parameters_are_answered_as_by_adamw(params):
    mine = raised(lambda: fg.SparseAdamW(params))
    theirs = raised(lambda: torch.optim.AdamW(params))
    assert (type(mine), str(mine)) == (type(theirs), str(theirs))


def test_groups_that_do_not_fit_are_answered_as_by_adamw():
    def errors(cls):
        a, b = tensors(shapes=[(2,), (3,)])
        optimizer = cls([a])
        other = cls([a, b]).state_dict()
        yield raised(lambda: optimizer.add_param_group([a]))
        yield raised(lambda: optimizer.add_param_group({"params": [a]}))
        yield raised(lambda: optimizer.add_param_group({"params": {a}}))
        yield raised(lambda: optimizer.load_state_dict(other))
        yield raised(lambda: optimizer.load_state_dict({"state": {}, "param_groups": []}))

    for mine, theirs in itertools.zip_longest(errors(fg.SparseAdamW), errors(torch.optim.AdamW)):
        assert (type(mine), str(mine)) == (type(theirs), str(theirs))


def test_sparse_gradients_are_refused_whether_or_not_they_are_looked_at():
    for options in ({}, {"check_finite": False}):
        p = nn.Parameter(torch.zeros(3, 2))
        p.grad = torch.eye(3, 2).to_sparse()
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            fg.SparseAdamW([p], **options).step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(), (9,), (4, 5)], ids=str)
def test_complex_parameters_move_as_under_adamw(dtype, shape):
    theirs, mine = tensors(dtype, [shape]), tensors(dtype, [shape])
    want = run(torch.optim.AdamW(theirs, lr=1e-2), theirs)
    got = run(fg.SparseAdamW(mine, lr=1e-2), mine)
    close(got, want)
    assert got[1].state[mine[0]]["exp_avg"].dtype == dtype
    mine[0].grad = torch.full_like(mine[0], complex(0.0, float("nan")))
    before = mine[0].detach().clone()
    with pytest.raises(fg.errors.NonFiniteGradientError):
        got[1].step()
    assert torch.equal(before, mine[0])
    again = fg.SparseAdamW(mine, lr=1e-2)
    again.load_state_dict(got[1].state_dict())
    assert torch.equal(again.state[mine[0]]["exp_avg"], got[1].state[mine[0]]["exp_avg"])


def test_a_conjugate_gradient_is_read_as_what_it_stands_for():
    a, b = tensors(torch.complex64, [(6,)]), tensors(torch.complex64, [(6,)])
    grad = torch.randn(6, dtype=torch.complex64)
    a[0].grad, b[0].grad = grad.conj(), grad.conj().resolve_conj()
    for params in (a, b):
        fg.SparseAdamW(params).step()
    assert torch.equal(a[0], b[0])


def test_capturable_leaves_the_check_out_and_says_so_where_both_are_asked_for():
    assert fg.SparseAdamW(tensors(), capturable=True).param_groups[0]["check_finite"] is False
    assert fg.SparseAdamW(tensors()).param_groups[0]["check_finite"] is True
    with pytest.raises(OptimizerError, match=r"check_finite.*Remedy"):
        fg.SparseAdamW(tensors(), capturable=True, check_finite=True)


def test_betas_may_be_tensors_that_a_schedule_changes():
    betas = torch.tensor(0.5), torch.tensor(0.9)
    params, plain = tensors(shapes=[(5,)]), tensors(shapes=[(5,)])
    optimizer = fg.SparseAdamW(params, betas=betas)
    run(optimizer, params, 1)
    betas[0].fill_(0.8)
    run(optimizer, params, 2)
    other = fg.SparseAdamW(plain, betas=(0.5, 0.9))
    run(other, plain, 1)
    other.param_groups[0]["betas"] = (float(torch.tensor(0.8)), float(torch.tensor(0.9)))
    run(other, plain, 2)
    torch.testing.assert_close(params[0], plain[0], rtol=1e-6, atol=1e-7)
