"""The look for NaN in the backward pass: nothing slips through, and it ends where it is no use."""

from __future__ import annotations

import copy
import gc
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad import optim
from fastgrad.errors import NonFiniteGradientError
from fastgrad.optim_looks import PATIENCE


class Loop:
    """A small model whose optimizer has stepped often enough to look in the backward pass."""

    def __init__(self, steps=3, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4, bias=False))
        named = list(self.model.named_parameters())
        self.optimizer = fg.SparseAdamW(named, lr=1e-2, **options)
        self.data = torch.randn(5, 6)
        for _ in range(steps):
            self.backward()
            self.optimizer.step()

    @property
    def params(self):
        return [*self.model.parameters()]

    def backward(self, factor=1.0, accumulate=False, **options):
        if not accumulate:
            self.optimizer.zero_grad()
        (self.model(self.data).square().sum() * factor).backward(**options)

    def read_in_step(self):
        """How many gradients a step reads itself."""
        with mock.patch.object(optim, "looks_finite", wraps=optim.looks_finite) as reading:
            self.optimizer.step()
        return reading.call_count

    def hooks(self):
        return sum(len(p._post_accumulate_grad_hooks or ()) for p in self.params)

    def refused(self, *names):
        before = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()["state"]))
        with pytest.raises(NonFiniteGradientError) as error:
            self.optimizer.step()
        assert sorted(error.value.names) == sorted(names)
        after = self.model.state_dict(), self.optimizer.state_dict()["state"]
        for a, b in zip(before[0].values(), after[0].values(), strict=True):
            assert torch.equal(a, b)
        for key, state in before[1].items():
            assert all(torch.equal(state[k], after[1][key][k]) for k in state)


def test_the_step_reads_no_gradient_that_the_backward_pass_has_read():
    loop = Loop(steps=0)
    reads = []
    for _ in range(6):
        loop.backward()
        reads.append(loop.read_in_step())
    # the second step is prepared, with what the third looks for
    assert reads == [3, 3, 0, 0, 0, 0]
    assert Loop(check_finite=False).hooks() == 0


def test_nan_out_of_the_backward_pass_is_refused():
    loop = Loop()
    loop.backward(factor=float("nan"))
    loop.refused("0.weight", "0.bias", "2.weight")
    loop.backward()
    assert loop.read_in_step() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("zero", [True, False], ids=["set to none", "zeroed"])
def test_what_happens_to_a_gradient_after_the_backward_pass_is_seen(value, zero):
    loop = Loop()

    def fresh():
        loop.optimizer.zero_grad(set_to_none=zero)
        loop.model(loop.data).square().sum().backward()
        return loop.model[0].weight

    fresh().grad[1, 2] = value
    loop.refused("0.weight")
    p = fresh()
    p.grad = torch.full_like(p, value)
    loop.refused("0.weight")
    p = fresh()
    p.grad.data = torch.full_like(p, value)
    loop.refused("0.weight")
    # a copy of a gradient that is known is not known itself
    p = fresh()
    p.grad = copy.deepcopy(p.grad)
    p.grad.data.mul_(value)
    loop.refused("0.weight")
    fresh()
    assert loop.read_in_step() == 0


def test_a_later_hook_is_seen():
    loop = Loop()
    weight = loop.model[2].weight

    def spoil(p):
        p.grad.mul_(float("nan"))

    weight.register_post_accumulate_grad_hook(spoil)
    loop.backward()
    loop.refused("2.weight")


def test_a_sum_may_overflow_where_every_entry_is_finite():
    loop = Loop()
    for p in loop.params:
        p.register_hook(lambda g: torch.full_like(g, 3e38))
    loop.backward()
    assert loop.read_in_step() == 3  # unsure, so the step looks itself, and at each entry
    assert all(torch.isfinite(p).all() for p in loop.params)


def test_clipping_and_accumulation_end_it():
    clipped, accumulated = Loop(), Loop()
    assert clipped.hooks() == accumulated.hooks() == 3
    for _ in range(PATIENCE):
        clipped.backward()
        torch.nn.utils.clip_grad_norm_(clipped.params, 1e-3)
        assert clipped.read_in_step() == 3
        accumulated.backward()
        accumulated.backward(accumulate=True)
        assert accumulated.read_in_step() == 0
    assert clipped.hooks() == accumulated.hooks() == 0
    for loop in (clipped, accumulated):
        loop.backward(factor=float("inf"))
        with pytest.raises(NonFiniteGradientError):
            loop.optimizer.step()


def test_one_useless_step_does_not_end_it():
    loop = Loop()
    for _ in range(3):
        loop.backward()
        for p in loop.params:
            p.grad.mul_(0.5)
        assert loop.read_in_step() == 3
        loop.backward()
        assert loop.read_in_step() == 0
    assert loop.hooks() == 3


def test_nothing_is_left_behind():
    loop = Loop()
    assert loop.hooks() == 3
    loop.optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})
    loop.backward()
    loop.optimizer.step()  # not the same step any more: it is looked at anew
    assert loop.hooks() == 0
    for _ in range(2):
        loop.backward()
        loop.optimizer.step()
    assert loop.hooks() == 3
    loop.optimizer = None
    gc.collect()
    assert loop.hooks() == 0


def test_gradients_are_not_kept_alive():
    loop = Loop()
    loop.backward()
    gone = torch.utils.weak.TensorWeakRef(loop.params[0].grad)
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    assert gone() is None


def test_copies_and_pickles_of_a_run_go_on_alike():
    loop = Loop()
    model, optimizer = copy.deepcopy((loop.model, loop.optimizer))
    again = pickle.loads(pickle.dumps((loop.model, loop.optimizer)))
    copies = [(loop.model, loop.optimizer), (model, optimizer), again]
    for own, stepping in copies:
        for _ in range(4):
            stepping.zero_grad()
            own(loop.data).square().sum().backward()
            stepping.step()
    for other in (model, again[0]):
        for a, b in zip(loop.params, other.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Using backward.*create_graph")
def test_a_gradient_with_a_graph_of_its_own():
    loop = Loop()
    loop.backward(create_graph=True)
    assert loop.params[0].grad.requires_grad
    assert loop.read_in_step() == 0
    loop.optimizer.zero_grad()  # breaks the cycle of parameter and gradient


def test_among_several_processes_the_step_looks():
    loop = Loop()  # gradients of other processes may be added after the hooks have run
    with mock.patch.object(torch.distributed, "is_initialized", return_value=True):
        loop.backward()
        assert loop.read_in_step() == 3
        assert Loop().hooks() == 0


def test_packed_blocks_are_looked_at_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    chosen = {"0.weight": [0, 3], "2.weight": [1], "2.bias": [0]}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    partial = fg.make_partial(model, fg.Selection(shapes, "8x8", chosen))
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    data = torch.randn(4, 16)
    for step in range(5):
        optimizer.zero_grad()
        model(data).square().sum().backward()
        with mock.patch.object(optim, "looks_finite", wraps=optim.looks_finite) as reading:
            optimizer.step()
        assert reading.call_count == (0 if step >= 2 else 3)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    (model(data).square().sum() * float("nan")).backward()
    with pytest.raises(NonFiniteGradientError, match=r"0\.weight"):
        optimizer.step()
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
