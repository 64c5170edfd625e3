"""Budgets of bytes and FLOPs: never exceeded, used well, found with few plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgrad as fg
from fastgrad import budgets
from fastgrad.budgets import largest_within, parse_flops
from fastgrad.choosing import select
from fastgrad.errors import SelectionError
from fastgrad.flops import FlopPlanner
from fastgrad.planner import MemoryPlanner
from tests.models import llama
from tests.test_selection import SHAPES, Toy, synthetic_stats

# -- the search ----------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    slope=st.integers(1, 20),
    steps=st.lists(st.integers(-3000, 9000), min_size=1, max_size=5),
    percent=st.integers(0, 130),
    split=st.booleans(),
)
def test_what_is_found_fits_even_where_costs_fall(sizes, slope, steps, percent, split):
    """Fillings take a prefix of blocks; their cost rises by element and steps up and down."""
    total = sum(sizes)
    priced = []

    def filled(capacity):
        taken = np.cumsum(sizes) <= capacity
        return int(np.array(sizes)[taken].sum())

    def rest(n):
        return sum(s for k, s in enumerate(steps) if n > k * total // len(steps))

    def cost(n):
        priced.append(n)
        return float(1000 + slope * n + rest(n))

    limit = 1000 + percent * (slope * total + abs(sum(steps))) // 100
    found = largest_within(limit, sizes[0], total, filled, lambda a, b: a == b, cost,
                           (lambda n: 1000.0 + slope * n) if split else None)  # fmt: skip
    least = 1000 + slope * sizes[0] + rest(sizes[0])
    assert (found is None) == (least > limit)
    if found is None:
        return
    assert found.cost == 1000 + slope * found.found + rest(found.found) <= limit
    assert len(priced) <= 2 + budgets.CHEAP.attempts
    if all(s >= 0 for s in steps):  # costs rise: nothing larger fits, but for the resolution
        reached = [filled(c) for c in np.cumsum(sizes) if c > found.found]
        if reached and limit - found.cost > limit * budgets.CHEAP.resolution:
            assert 1000 + slope * reached[0] + rest(reached[0]) > limit


def test_few_plans_are_made():
    """A billion elements of which activations take steps: bisection would make fourteen plans."""
    for part in (None, lambda n: 14.0 * n):
        priced = []

        def cost(n, priced=priced):
            priced.append(n)
            return 14.0 * n + (5e9 if n > 1e6 else 1e8)

        found = largest_within(
            12 * 10**9, 1000, 10**9, lambda c: c, lambda a, b: a == b, cost, part, budgets.DEAR
        )
        assert found is not None
        assert 12e9 - 14 * 10**9 * budgets.DEAR.resolution <= found.cost <= 12e9
        assert len(priced) <= (4 if part else 10)


def test_ends_that_are_unlike_the_rest_do_not_mislead():
    """What is not weights falls with the capacity, and both ends have much less of it, as with
    rows of a model of seven billion elements."""
    priced = []

    def cost(n):
        priced.append(n)
        inside = 1000 < n < 10**9
        return 14.0 * n + (4e9 - 2.5 * n + 1e-9 * n * n / 2 if inside else 1e8)

    found = largest_within(
        8 * 10**9, 1000, 10**9, lambda c: c, lambda a, b: a == b, cost, lambda n: 14.0 * n,
        budgets.DEAR,
    )  # fmt: skip
    assert found is not None
    assert 8e9 * (1 - budgets.DEAR.resolution) <= found.cost <= 8e9
    assert len(priced) <= 5


# -- memory --------------------------------------------------------------------------------------


def next_larger(model, made):
    """The filling of the next capacity that gives more."""
    for extra in range(1, 200):
        share = (made.n_parameters + extra + 0.5) / made.n_total
        more = select(None, model, ranking="last", fraction=share, blocks=made.spec)
        if more.n_parameters > made.n_parameters:
            return more
    raise AssertionError("no larger filling")


def meta_model():
    with torch.device("meta"):
        return llama(layers=1)


def test_memory_with_activations_fits_and_is_used():
    model, shape = meta_model(), (2, 16)
    planner = MemoryPlanner(model, batch_shape=shape)
    first = select(None, model, ranking="last", count=1, blocks="8x8")
    full, least = planner.plan().total, planner.plan(first).total
    budget = int(least + 0.6 * (full - least))
    made = select(None, model, ranking="last", memory=budget, blocks="8x8", batch_shape=shape)
    assert made.weights_hash is None  # nothing to hash on the meta device
    needs = planner.plan(made).total
    assert made.meta["needs"] == {"unit": "bytes", "value": needs}
    assert needs <= budget
    if needs < budget * (1 - 1e-3):  # with room for one more block it would not have fitted
        assert planner.plan(next_larger(model, made)).total > budget
    static = select(None, model, ranking="last", memory=budget, blocks="8x8")
    assert static.n_parameters > made.n_parameters  # activations do count
    assert "no batch_shape" in static.meta["note"]
    with pytest.raises(SelectionError, match=r"bytes are not enough.*nearer to the output"):
        select(None, model, ranking="last", memory=least // 2, batch_shape=shape)


def test_memory_with_floors_and_caps():
    stats, model = synthetic_stats(spec="2x3", seed=1), Toy()
    full = fg.plan_memory(model).total
    spread = {"floor": 0.2, "cap": 0.8, "exclude": ["*norm*"]}
    made = select(stats, model, memory=int(full * 0.8), **spread)
    assert fg.plan_memory(model, made).total <= full * 0.8
    for name in SHAPES:
        if "norm" not in name:
            n = made.grid(name).numel
            assert 0.2 * n <= made.n_selected(name) <= 0.8 * n
    weights = sum(p.numel() * 4 for p in model.parameters())
    with pytest.raises(SelectionError, match=r"bytes are not enough: with a selection of"):
        select(stats, model, memory=weights + 200, **spread)


# -- FLOPs ---------------------------------------------------------------------------------------


def test_flops_budget():
    model, shape = meta_model(), (2, 16)
    planner = FlopPlanner(model, shape)
    first = select(None, model, ranking="last", count=1, blocks="8x8")
    full, least = planner.plan().total, planner.plan(first).total
    budget = int(least + 0.6 * (full - least))
    made = select(None, model, ranking="last", flops=budget, batch_shape=shape, blocks="8x8")
    found = planner.plan(made).total
    assert found <= budget
    assert made.meta["needs"] == {"unit": "FLOPs", "value": found}
    assert made.meta["budget"] == {"kind": "flops", "value": budget}
    assert f"a step needs {found:,.0f} FLOPs" in made.summary()
    if found < budget * (1 - 1e-4):
        assert planner.plan(next_larger(model, made)).total > budget
    with pytest.raises(SelectionError, match=r"10 FLOPs are not enough.*a step needs"):
        select(None, model, ranking="last", flops=10, batch_shape=shape)
    with pytest.raises(SelectionError, match=r"one step. Remedy: batch_shape"):
        select(None, model, ranking="last", flops="1T")
    with pytest.raises(SelectionError, match=r"flops budget needs model"):
        select(synthetic_stats(), flops="1T", batch_shape=shape)


def test_parse_flops():
    assert parse_flops("2.5T") == parse_flops("2.5 TFLOPs") == parse_flops(2.5e12) == 25 * 10**11
    assert parse_flops("3e9") == parse_flops("3GFLOP") == parse_flops(3 * 10**9) == 3 * 10**9
    assert parse_flops("1P") == 10**15
    for text in ("", "T", "-1T", "nan", "inf", "0", "1 TB", "2.5TiFLOPs", True, None):
        with pytest.raises(SelectionError, match="not a number of FLOPs"):
            parse_flops(text)


# -- the model hash ------------------------------------------------------------------------------


def test_a_selection_names_the_weights_it_was_made_for(tmp_path):
    model = Toy()
    made = select(None, model, ranking="random", fraction=0.3)
    assert made.weights_hash == fg.weights_hash(model)
    made.save(tmp_path / "s.json")
    loaded = fg.Selection.load(tmp_path / "s.json")
    loaded.check_model(model)
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    with pytest.raises(SelectionError, match="made for weights"):
        loaded.check_model(model)
    # What the source was measured on stays; a source that does not know is completed.
    stats = synthetic_stats()
    assert select(stats, model, fraction=0.3).weights_hash == stats.meta["weights_hash"]
    nameless = synthetic_stats(weights_hash=None)
    assert select(nameless, model, fraction=0.3).weights_hash == fg.weights_hash(model)
    assert select(nameless, model, fraction=0.3, hash_weights=False).weights_hash is None
    assert select(nameless, fraction=0.3).weights_hash is None
