"""Steps that SparseAdamW has prepared: the bits of those that it has not, whatever changes."""

from __future__ import annotations

import copy

import pytest
import torch

import fastgrad as fg
from fastgrad.partial import make_partial
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import selection_of


class Twins:
    """Two models trained alike; one optimizer prepares its steps, the other looks each time."""

    def __init__(self, spec="16x8", dtype=torch.float32, master=None, **options):
        self.sides = []
        for _ in range(2):
            model = randomised(MODELS["llama"]).to(dtype)
            partial = make_partial(model, selection_of(model, spec), master)
            optimizer = fg.SparseAdamW(partial.parameters(), **{"lr": 1e-2, **options})
            self.sides.append((model, partial, optimizer))
        self.sides[1][2]._prepare = lambda: None
        self.batch = batch_of()

    def each(self, call):
        for side in self.sides:
            call(*side)

    def step(self, times=1):
        for _ in range(times):
            for model, _, optimizer in self.sides:
                optimizer.zero_grad()
                model(**self.batch).loss.backward()
                optimizer.step()
        return self

    @property
    def prepared(self):
        return self.sides[0][2]._prepared is not None

    def assert_alike(self):
        (model, partial, optimizer), (other, other_partial, plain) = self.sides
        assert plain._prepared is None
        for (name, a), b in zip(
            model.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
        for a, b in zip(partial.parameters(), other_partial.parameters(), strict=True):
            assert torch.equal(a, b)
            for key, value in optimizer.state[a].items():
                assert torch.equal(value, plain.state[b][key]), key


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spec": "module"},
        {"spec": "row"},
        {"spec": "column"},
        {"dtype": torch.bfloat16, "master": torch.float32},
        {"spec": "module", "dtype": torch.bfloat16, "master": torch.float32},
        {"maximize": True, "weight_decay": 0.3, "betas": (0.8, 0.95)},
        {"lr": torch.tensor(1e-2)},
        {"check_finite": False},
    ],
    ids=lambda o: " ".join(map(str, o)) or "tiles",
)
def test_a_prepared_step_gives_the_same_bits(options):
    twins = Twins(**options).step(2)
    assert twins.prepared
    twins.step(4).assert_alike()
    assert twins.prepared


def test_hyperparameters_are_read_at_each_step():
    twins = Twins().step(3)
    for change in ({"lr": 3e-3}, {"weight_decay": 0.5}, {"betas": (0.5, 0.9)}, {"eps": 1e-3}):
        twins.each(lambda _model, _partial, o, change=change: o.param_groups[0].update(change))
        twins.step()
        assert twins.prepared
    twins.assert_alike()


def _first(optimizer):
    return optimizer.param_groups[0]["params"][0]


def _new_values(model, partial, optimizer):
    p = _first(optimizer)
    p.data = p.data * 1.5


def _new_moment(model, partial, optimizer):
    state = optimizer.state[_first(optimizer)]
    state["exp_avg"] = state["exp_avg"] * 2


def _moved_moment(model, partial, optimizer):
    moment = optimizer.state[_first(optimizer)]["exp_avg_sq"]
    moment.data = moment.data * 3


def _new_count(model, partial, optimizer):
    optimizer.state[_first(optimizer)]["step"] = torch.tensor(9.0)


def _moved_count(model, partial, optimizer):
    count = optimizer.state[_first(optimizer)]["step"]
    count.data = torch.tensor(9.0)


def _new_weight(model, partial, optimizer):
    full = partial.packed[0].full
    full.data = full.data.clone()


def _other_strides(model, partial, optimizer):
    full = partial.packed[0].full
    full.data = full.data.t().contiguous().t()


def _loaded(model, partial, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    for s in state["state"].values():
        s["exp_avg"].mul_(0.5)
    optimizer.load_state_dict(state)


def _turned(model, partial, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def _cut(model, partial, optimizer):
    del optimizer.param_groups[0]["params"][1]


def _split(model, partial, optimizer):
    group = optimizer.param_groups[0]
    params = group["params"]
    optimizer.param_groups.append({**group, "params": params[2:], "lr": 0.5})
    group["params"] = params[:2]


@pytest.mark.parametrize(
    "change",
    [_new_values, _new_moment, _moved_moment, _new_count, _moved_count, _new_weight,
     _other_strides, _loaded, _turned, _cut, _split],
)  # fmt: skip
def test_what_is_exchanged_is_noticed(change):
    twins = Twins().step(3)
    assert twins.prepared
    twins.each(change)
    twins.step().assert_alike()
    twins.step(3).assert_alike()
    assert twins.prepared  # anew


def test_gradients_come_and_go_and_change_their_layout():
    twins = Twins().step(3)

    def step(model, partial, optimizer, change):
        optimizer.zero_grad()
        model(**twins.batch).loss.backward()
        change(_first(optimizer))
        optimizer.step()

    def none(p):
        p.grad = None

    def turned(p):
        p.grad = p.grad.transpose(-1, -2).contiguous().transpose(-1, -2)

    for change in (none, none, none, turned, turned):
        twins.each(lambda *side, change=change: step(*side, change))
        twins.assert_alike()
    twins.step(3).assert_alike()


def test_block_numbers_that_change_in_place_are_noticed():
    """They never do in this package; a step must not write to old places if they do."""
    twins = Twins().step(3)

    def shuffle(model, partial, optimizer):
        blocks = partial.packed[0]
        order = blocks.ids.flip(0)
        blocks.ids.copy_(order)
        blocks.refresh()

    twins.each(shuffle)
    twins.step(2).assert_alike()


def test_a_nan_is_named_and_nothing_moves():
    twins = Twins().step(3)
    model, partial, optimizer = twins.sides[0]
    model(**twins.batch).loss.backward()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    name, p = list(partial.named_parameters())[-1]
    p.grad.view(-1)[-1] = torch.nan
    with pytest.raises(fg.errors.NonFiniteGradientError, match="No parameter and no") as caught:
        optimizer.step()
    assert caught.value.names == [name]
    assert twins.prepared
    assert all(torch.equal(a, before[0][n]) for n, a in model.state_dict().items())
    for i, s in optimizer.state_dict()["state"].items():
        assert all(torch.equal(s[k], before[1][i][k]) for k in s)
    twins.step(2).assert_alike()


def test_a_large_finite_gradient_is_none():
    """Its sum overflows, no entry does."""
    twins = Twins(check_finite=True).step(3)
    for model, partial, optimizer in twins.sides:
        model(**twins.batch).loss.backward()
        next(iter(partial.parameters())).grad.fill_(3e38)
        optimizer.step()
    twins.assert_alike()


def test_a_weight_changed_from_outside_stops_the_step():
    twins = Twins().step(3)
    model, partial, optimizer = twins.sides[0]
    model(**twins.batch).loss.backward()
    with torch.no_grad():
        partial.packed[-1].full.add_(1.0)
    before = [p.detach().clone() for p in partial.parameters()]
    with pytest.raises(fg.errors.PartialError, match="changed from outside"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(partial.parameters(), before, strict=True))


def test_autograd_is_told_of_a_prepared_step():
    twins = Twins().step(3)
    _, partial, optimizer = twins.sides[0]
    p = partial.packed[0].packed
    loss = p.square().sum()  # keeps p for its backward pass
    optimizer.step()
    assert twins.prepared
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_grad_scaler_between_prepared_steps():
    twins = Twins().step(3)
    for model, _, optimizer in twins.sides:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer.zero_grad()
        scaler.scale(model(**twins.batch).loss).backward()
        scaler.step(optimizer)
    twins.assert_alike()
    twins.step(2).assert_alike()


def test_whoever_steps_with_other_tensors_each_time_is_served_too():
    """Experts that no token reached have no gradient; nothing is kept for them in vain."""
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(3)]
    plain = [torch.nn.Parameter(torch.ones(5)) for _ in range(3)]
    mine = fg.SparseAdamW(params, lr=1e-2)
    theirs = torch.optim.AdamW(plain, lr=1e-2, fused=True)
    for t in range(9):
        for ps, optimizer in ((params, mine), (plain, theirs)):
            for i, p in enumerate(ps):
                p.grad = torch.full((5,), 1.0 + t) if i != t % 3 else None
            optimizer.step()
        assert mine._prepared is None
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))


def test_what_is_kept_is_not_pickled_nor_copied():
    twins = Twins().step(3)
    other = copy.deepcopy(twins.sides[0][2])
    assert twins.prepared
    assert other._prepared is None
