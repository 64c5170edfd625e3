"""Budgets, floors and caps, compared with a plain loop over the blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad.blocks import BlockGrid
from fastgrad.choosing import select
from fastgrad.errors import SelectionError
from fastgrad.ranking import Ranked
from fastgrad.selection import Selection
from fastgrad.spread import GROUPINGS
from tests.test_selection import SHAPES, Toy, as_set, synthetic_stats

# -- the definition ------------------------------------------------------------------------------


class Impossible(Exception):
    pass


class Reference:
    """Block after block, in plain Python; written from the documentation of ``select``."""

    def __init__(self, blocks, budget, by, floor, cap):
        self.blocks = blocks  # (name, number, size), best first
        self.kind, self.limit = budget
        self.group = {name: GROUPINGS[by](name) for name, _, _ in blocks}
        self.choosable = {}
        for name, _, size in blocks:
            g = self.group[name]
            self.choosable[g] = self.choosable.get(g, 0) + size
        # In percent, so that no rounding enters.
        self.floor = {g: -(-floor * n // 100) for g, n in self.choosable.items()}
        self.cap = {g: cap * n // 100 for g, n in self.choosable.items()}

    def cost(self, chosen):
        if self.kind == "elements":
            return sum(size for _, _, size in chosen)
        if self.kind == "count":
            return len(chosen)
        return len({name for name, _, _ in chosen})

    def inside(self, chosen, g):
        return sum(size for name, _, size in chosen if self.group[name] == g)

    def floors(self, order):
        chosen = []
        for block in order:
            g = self.group[block[0]]
            have = self.inside(chosen, g)
            if have < self.floor[g] and have + block[2] <= self.cap[g]:
                chosen.append(block)
        met = all(self.inside(chosen, g) >= need for g, need in self.floor.items())
        return chosen, met

    def choose(self):
        chosen, met = self.floors(self.blocks)
        if not met or self.cost(chosen) > self.limit:
            sign = 1 if self.kind == "elements" else -1
            chosen, met = self.floors(sorted(self.blocks, key=lambda b: sign * b[2]))
            if not met or self.cost(chosen) > self.limit:
                raise Impossible
        for block in self.blocks:
            g = self.group[block[0]]
            if block in chosen or self.inside(chosen, g) + block[2] > self.cap[g]:
                continue
            if self.cost([*chosen, block]) <= self.limit:
                chosen.append(block)
        if not chosen:
            raise Impossible
        return {(name, i) for name, i, _ in chosen}


def in_order(stats, spec, ranking="rms"):
    blocks = []
    for name, shape in zip(stats.names, stats.shapes, strict=True):
        sizes = BlockGrid.of(shape, spec).sizes()
        norms = stats.block_grad_norm(name) if spec != "module" else [
            stats.grad_norm[stats.index(name)]
        ]  # fmt: skip
        for i, (norm, size) in enumerate(zip(norms, sizes, strict=True)):
            score = norm / math.sqrt(size) if ranking == "rms" else norm
            blocks.append((-score, len(blocks), name, i, int(size)))
    return [block[2:] for block in sorted(blocks)]


shapes_strategy = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(1, 9)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    shapes=shapes_strategy,
    spec=st.sampled_from(["module", "row", "column", "2x3", "expert"]),
    by=st.sampled_from(["layer", "parameter", "kind"]),
    kind=st.sampled_from(["elements", "elements", "count", "submodules"]),
    amount=st.integers(1, 100),
    floor=st.sampled_from([0, 0, 5, 20, 50]),
    cap=st.sampled_from([20, 50, 60, 90, 100, 100]),
    seed=st.integers(0, 5),
    ties=st.booleans(),
)
def test_like_the_plain_loop(shapes, spec, by, kind, amount, floor, cap, seed, ties):
    named = {f"layers.{i // 2}.{'ab'[i % 2]}.weight": s for i, s in enumerate(shapes)}
    stats = synthetic_stats(named, spec=spec, n_batches=2, per_batch=1, seed=seed,
                            noise=0.0 if ties else 1.0)  # fmt: skip
    total = sum(math.prod(s) for s in shapes)
    blocks = in_order(stats, spec)
    most = {"count": len(blocks), "submodules": len(shapes)}.get(kind, total)
    limit = max(1, amount * most // 100) if kind != "elements" else amount * total // 100
    given_ = {"fraction": amount / 100} if kind == "elements" else {kind: limit}
    spread = {"floor": floor / 100, "cap": cap / 100, "spread_by": by}
    if floor > cap:
        with pytest.raises(SelectionError, match="above its cap"):
            select(stats, **given_, **spread)
        return
    reference = Reference(blocks, (kind, limit), by, floor, cap)
    try:
        expected = reference.choose()
    except Impossible:
        with pytest.raises(SelectionError, match="Remedy"):
            select(stats, **given_, **spread)
        return
    made = select(stats, **given_, **spread)
    assert as_set(made) == expected
    # What must hold whatever the loop does.
    if kind == "elements":
        assert made.n_parameters <= limit
    assert kind != "count" or made.n_blocks <= limit
    assert kind != "submodules" or len(made.names) <= limit
    for g, n in reference.choosable.items():
        inside = sum(made.n_selected(name) for name in named if GROUPINGS[by](name) == g)
        assert floor * n <= 100 * inside <= cap * n
        assert made.meta["spread"]["groups"][g] == {
            "choosable": n, "floor": reference.floor[g], "cap": reference.cap[g],
        }  # fmt: skip
    again = select(stats, **given_, **spread)
    assert made == again


def test_many_blocks_are_taken_as_fast_as_few_are():
    """Half a million blocks of several sizes, in groups with caps: stretches, not single steps."""
    import time

    rng = np.random.default_rng(0)
    shapes = {f"layers.{i}.{n}.weight": (1024, 16 + i) for i in range(32) for n in "abcd"}
    grids = {name: BlockGrid.of(shape, "3x2") for name, shape in shapes.items()}
    ranked = Ranked(grids, {n: rng.random(g.n_blocks) for n, g in grids.items()}, True)
    assert len(ranked) > 500_000
    from fastgrad.filling import Elements, fill
    from fastgrad.spread import plan_spread

    spread = plan_spread(ranked, "parameter", 0.05, {"*.a.weight": 0.1, "*": 0.4})
    start = time.process_time()
    filling = fill(ranked, Elements(ranked, int(ranked.sizes.sum()) // 4), spread)
    assert time.process_time() - start < 5  # a loop over the blocks takes minutes
    inside = spread.counts(filling.ranks, ranked.sizes)
    assert (spread.floor <= inside).all()
    assert (inside <= spread.cap).all()
    assert inside.sum() <= int(ranked.sizes.sum()) // 4


# -- single cases, by hand -----------------------------------------------------------------------

FOUR = {f"layers.{i}.w": (10, 10) for i in range(4)}


def test_floors_spread_what_one_layer_would_take():
    stats = synthetic_stats(FOUR, spec="row", profile=[1e6, 1e4, 1e2, 1], noise=0.0)
    assert select(stats, fraction=0.25).names == ["layers.0.w"]
    made = select(stats, fraction=0.25, floor=0.1)
    assert [made.n_selected(n) for n in FOUR] == [70, 10, 10, 10]
    capped = select(stats, fraction=0.25, floor=0.1, cap=0.5)
    assert [capped.n_selected(n) for n in FOUR] == [50, 30, 10, 10]
    named = select(stats, fraction=0.25, floor={"layers.3": 0.4}, cap={"layers.0": 0.2, "*": 0.5})
    assert [named.n_selected(n) for n in FOUR] == [20, 40, 0, 40]
    # Caps may leave some of the budget.
    assert select(stats, fraction=0.9, cap=0.2).n_parameters == 80


def test_groups_are_layers_parameters_or_kinds():
    shapes = {f"layers.{i}.{n}.weight": (4, 10) for i in range(2) for n in ("a", "b")}
    stats = synthetic_stats(shapes, spec="row", profile=[1e6, 1e4, 1e2, 1], noise=0.0)
    by = {by: select(stats, fraction=0.5, cap=0.5, spread_by=by) for by in GROUPINGS}
    assert [by["layer"].n_selected(n) for n in shapes] == [40, 0, 40, 0]
    assert [by["parameter"].n_selected(n) for n in shapes] == [20, 20, 20, 20]
    assert [by["kind"].n_selected(n) for n in shapes] == [40, 40, 0, 0]
    assert list(by["kind"].meta["spread"]["groups"]) == ["layers.*.a.weight", "layers.*.b.weight"]


def test_floors_take_the_smallest_blocks_where_the_best_do_not_fit():
    shapes = {}
    for i in range(2):
        shapes |= {f"layers.{i}.big": (9, 10), f"layers.{i}.small": (1, 10)}
    stats = synthetic_stats(shapes, profile=[1e9, 1, 1e9, 1], noise=0.0)
    best = select(stats, fraction=0.95, floor=0.1)
    assert best.meta["spread"]["floors_by"] == "score"
    assert best.names[0] == "layers.0.big"
    thrifty = select(stats, fraction=0.2, floor=0.1)
    assert thrifty.meta["spread"]["floors_by"] == "size"
    assert thrifty.names == ["layers.0.small", "layers.1.small"]
    assert "smallest" in thrifty.summary()
    with pytest.raises(SelectionError, match=r"floors do not fit.*19 elements.*they take 20"):
        select(stats, fraction=0.099, floor=0.1)
    # Fewest blocks are the largest ones.
    assert select(stats, count=2, floor=0.9).names == ["layers.0.big", "layers.1.big"]
    with pytest.raises(SelectionError, match=r"budget of 1 blocks.*largest blocks they take 2"):
        select(stats, count=1, floor=0.9)
    with pytest.raises(SelectionError, match=r"budget of 1 submodules.*take 2"):
        select(stats, submodules=1, floor=0.1)


def test_a_share_counts_what_may_be_chosen():
    """Neither what is excluded nor what has no gradient belongs to a group's elements."""
    made = select(synthetic_stats(spec="row"), fraction=0.5, exclude=["*norm*"], floor=1e-9)
    groups = made.meta["spread"]["groups"]
    assert groups["layers.0"]["choosable"] == 48
    assert groups["layers.0"]["floor"] == 1  # a floor above zero takes something
    assert all(made.n_selected(f"layers.{i}.proj.weight") for i in (0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": 0.6, "cap": 0.5}, r"embed: its floor 0\.6 is above its cap 0\.5"),
        ({"floor": {"layers.1": 0.6}, "cap": 0.5}, r"layers\.1: its floor"),
        ({"floor": 1.5}, r"floor must lie in \[0, 1\]; got 1\.5"),
        ({"cap": -0.1}, r"cap must lie in \[0, 1\]"),
        ({"cap": math.nan}, r"cap must lie in"),
        ({"cap": True}, "cap is a share"),
        ({"floor": "0.1"}, "floor is a share"),
        ({"floor": {"head": "x"}}, "floor of 'head' is a share"),
        ({"cap": {"layer.9": 0.5}}, r"cap: the pattern 'layer\.9' matches no group.*embed"),
        ({"cap": {"*.proj.weight": 0.5}}, r"groups are embed, layers\.0, layers\.1, head"),
        ({"spread_by": "layer"}, "groups floors and caps"),
        ({"floor": 0.1, "spread_by": "depth"}, "unknown spread_by 'depth'; use one of layer"),
        ({"floor": 0.2}, r"floors do not fit the budget of 43 elements"),
        ({"floor": 0.02, "cap": 0.03}, r"embed: its floor of 2 elements cannot be met within its"),
        ({"cap": 0.01}, r"empty.*within caps.*higher caps"),
    ],
)
def test_impossible_spreads(options, message):
    with pytest.raises(SelectionError, match=message):
        select(synthetic_stats(), fraction=0.2, **options)


# -- submodules ----------------------------------------------------------------------------------


def test_submodules_are_taken_whole_and_best_first():
    stats = synthetic_stats(spec="row", seed=3)
    order = []
    for name, _, _ in in_order(stats, "row"):
        if name not in order:
            order.append(name)
    for n in (1, 3, 6):
        made = select(stats, submodules=n)
        assert set(made.names) == set(order[:n])
        assert all(made.is_whole(name) for name in made.names)
    part = select(stats, submodules=2, cap=0.5, spread_by="parameter")
    assert not any(part.is_whole(name) for name in part.names)
    for bad, message in ((0, r"1\.\.6"), (7, r"1\.\.6"), (1.0, "whole number"), (True, "whole")):
        with pytest.raises(SelectionError, match=message):
            select(stats, submodules=bad)


# -- the report and the file ---------------------------------------------------------------------


def test_summary_shows_floors_and_caps_beside_what_was_taken(tmp_path):
    stats = synthetic_stats(spec="row", seed=2)
    made = select(stats, fraction=0.4, floor={"layers.*": 0.1}, cap=0.5)
    text = made.summary()
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    groups = made.meta["spread"]["groups"]
    for layer in ("embed", "layers.0", "layers.1", "head"):
        assert lines[layer][-2:] == [f"{groups[layer]['floor']:,}", f"{groups[layer]['cap']:,}"]
    made.save(tmp_path / "s.json")
    loaded = Selection.load(tmp_path / "s.json")
    assert loaded == made
    assert loaded.summary() == text


def test_summary_of_kinds_shows_floors_in_the_table_of_kinds():
    made = select(None, Toy(), ranking="first", fraction=0.5, blocks="row", floor=0.1,
                  spread_by="kind")  # fmt: skip
    table = made.summary().split("kind of parameter")[1]
    assert "floor" in table
    assert "floor" not in made.summary().split("kind of parameter")[0].split("layer", 1)[1]
    assert set(made.meta["spread"]["groups"]) == {
        "embed.weight", "layers.*.proj.weight", "layers.*.norm.weight", "head.weight",
    }  # fmt: skip
    assert made.n_total == sum(math.prod(s) for s in SHAPES.values())
