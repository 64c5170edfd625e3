"""Blocks and examples chosen together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgrad as fg
from fastgrad.errors import SelectionError, StatsError
from fastgrad.joint import STRATEGIES, JointCost, _smoothed, choose_jointly
from fastgrad.mass import MassMatrix, NpyRows
from fastgrad.scores import diverse_top, example_scores, profiles


def kinds(rows=12, columns=60, seed=0):
    """Two kinds of examples that pull on different halves of the blocks."""
    rng = np.random.default_rng(seed)
    kind = rng.random(columns) < 0.5
    own = np.where((np.arange(rows)[:, None] % 2).astype(bool) == kind, 1.0, 0.05)
    values = np.outer(rng.lognormal(0, 0.3, rows), rng.lognormal(0, 0.3, columns)) * own
    return MassMatrix.of(values * rng.lognormal(0, 0.2, values.shape))


# -- the choice --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    k=st.sampled_from([0.2, 0.4, 0.5]),
    q=st.sampled_from([0.2, 0.5]),
)
def test_alternating_is_never_below_marginal_nor_above_the_best(seed, k, q):
    rng = np.random.default_rng(seed)
    values = rng.lognormal(0, 1.5, (5, 10))
    mass = MassMatrix.of(values)
    marginal = choose_jointly(mass, k, q, strategy="marginal")
    both = choose_jointly(mass, k, q)
    n_blocks, n_examples = int(k * 5), int(q * 10)
    best = max(
        np.sort(values[list(rows)].sum(0))[-n_examples:].sum()
        for rows in itertools.combinations(range(5), n_blocks)
    )
    assert marginal.share <= both.share + 1e-12
    assert both.share <= best / values.sum() + 1e-12
    for found in (marginal, both):
        assert found.blocks.sum() == n_blocks
        assert found.examples.sum() == n_examples
        assert found.share == pytest.approx(
            values[np.ix_(found.blocks, found.examples)].sum() / values.sum()
        )


def test_two_kinds_are_told_apart():
    """Half of the blocks and half of the examples: the pair of one kind holds nearly half."""
    mass = kinds()
    marginal = choose_jointly(mass, 0.5, 0.5, strategy="marginal")
    for strategy in ("alternating", "low_rank"):
        both = choose_jointly(mass, 0.5, 0.5, strategy=strategy)
        assert both.share > 1.2 * marginal.share
        assert both.ratio > 1.3


def test_a_product_gains_nothing():
    rng = np.random.default_rng(0)
    mass = MassMatrix.of(np.outer(rng.lognormal(0, 1, 30), rng.lognormal(0, 1, 80)))
    found = [choose_jointly(mass, 0.2, 0.1, strategy=s) for s in STRATEGIES]
    for each in found[1:]:
        np.testing.assert_array_equal(each.blocks, found[0].blocks)
        np.testing.assert_array_equal(each.examples, found[0].examples)
    assert found[0].ratio == pytest.approx(1)


def test_sizes_count_and_the_fraction_is_never_exceeded():
    values = np.array([[9.0, 1], [8, 8], [1, 1]])
    mass = MassMatrix.of(values, sizes=[90, 8, 2])
    found = choose_jointly(mass, 0.1, 0.5, strategy="marginal")
    assert found.blocks.tolist() == [False, True, True]
    assert found.parameters == pytest.approx(0.1)
    assert choose_jointly(mass, 0.1, 0.5, n_parameters=1000).parameters == pytest.approx(0.1)
    with pytest.raises(SelectionError, match="empty"):
        choose_jointly(mass, 0.01, 0.5)
    dead = MassMatrix.of(np.array([[1.0, 1], [0, 0]]), sizes=[90, 10])
    with pytest.raises(SelectionError, match="no gradient"):
        choose_jointly(dead, 0.1, 0.5)


def test_a_matrix_in_a_file_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgrad.mass.STRETCH", 4 * 60 * 5)
    values = kinds().values.astype(np.float32)
    np.save(tmp_path / "m.npy", values)
    read, sizes = NpyRows.__getitem__, []

    def watched(self, rows):
        sizes.append(len(found := read(self, rows)))
        return found

    monkeypatch.setattr(NpyRows, "__getitem__", watched)
    for strategy in STRATEGIES:
        a = choose_jointly(MassMatrix.of(values), 0.3, 0.2, strategy=strategy)
        b = choose_jointly(MassMatrix.of(NpyRows(tmp_path / "m.npy")), 0.3, 0.2, strategy=strategy)
        np.testing.assert_array_equal(a.blocks, b.blocks)
        np.testing.assert_array_equal(a.examples, b.examples)
        assert a.share == pytest.approx(b.share)
    assert max(sizes) == 5  # never more than a stretch of it


# -- budgets and quotas ------------------------------------------------------------------


def test_a_budget_is_kept_and_spent_where_it_pays():
    mass = kinds()
    cost = JointCost(fixed=0.1, per_example=0.3, per_pair=0.6)
    found = choose_jointly(mass, budget=0.5, cost=cost)
    assert found.cost <= 0.5
    assert found.cost == pytest.approx(
        0.1 + 0.3 * found.examples.mean() + 0.6 * found.parameters * found.examples.mean()
    )
    for k, q in itertools.product((0.1, 0.25, 0.5, 1.0), (0.1, 0.2, 0.4, 0.6)):
        if cost.cost(k, q) <= 0.45:
            assert choose_jointly(mass, k, q).share <= found.share + 0.02
    coarse = MassMatrix.of(np.vstack([np.full((1, 100), 5.0), np.ones((1, 100))]), sizes=[26, 74])
    spent = choose_jointly(coarse, budget=0.2)  # a quarter of the parameters: more examples fit
    assert spent.parameters == pytest.approx(0.26)
    assert spent.examples.sum() == 76
    assert spent.cost <= 0.2
    for small in (1e-3, 1e-6):
        with pytest.raises(SelectionError, match="buys no block and example"):
            choose_jointly(mass, budget=small)
        with pytest.raises(SelectionError, match="buys no block and example"):
            choose_jointly(mass, budget=small, parameters=0.5)
    held = choose_jointly(mass, budget=0.5, cost=cost, examples=0.2)
    assert held.examples.mean() == pytest.approx(0.2)
    held = choose_jointly(mass, budget=0.5, cost=cost, parameters=0.25)
    assert held.parameters <= 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give both"),
        ({"parameters": 0.2}, "give both"),
        ({"parameters": 0, "examples": 0.2}, "parameters is a fraction"),
        ({"parameters": 0.2, "examples": 1.1}, "examples is a fraction"),
        ({"parameters": 0.2, "examples": True}, "examples is a fraction"),
        ({"parameters": 0.2, "examples": 0.2, "budget": 1.0}, "leave one"),
        ({"budget": -1.0}, "positive"),
        ({"budget": 0.05, "cost": JointCost(fixed=0.1)}, "below the cost"),
        ({"parameters": 0.2, "examples": 0.2, "strategy": "best"}, "unknown strategy"),
        ({"parameters": 0.2, "examples": 0.2, "groups": ["a"] * 60}, "give both"),
        ({"parameters": 0.2, "examples": 0.2, "groups": ["a"], "quotas": {}}, "names 1 examples"),
        (
            {"parameters": 0.2, "examples": 0.2, "groups": ["a"] * 60, "quotas": {"b": (0, 1)}},
            "no group",
        ),
        (
            {"parameters": 0.2, "examples": 0.2, "groups": ["a"] * 60, "quotas": {"a": (0, 0.5)}},
            "allow between 0 and 6",
        ),
        ({"parameters": 0.2, "examples": 0.2, "strategy": "low_rank", "rank": 12}, "rank=12"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(SelectionError, match=message):
        choose_jointly(kinds(), **arguments)


def test_a_cost_makes_sense():
    with pytest.raises(SelectionError, match="finite"):
        JointCost(per_pair=float("nan"))
    with pytest.raises(SelectionError, match="not all zero"):
        JointCost(per_pair=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(3, 40), low=st.floats(0, 0.4))
def test_quotas_are_kept_and_the_best_taken_within_them(seed, count, low):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 3, 40)
    if np.bincount(groups, minlength=3).min() < np.ceil(low * count):
        return
    mass = MassMatrix.of(rng.lognormal(0, 1, (6, 40)))
    found = choose_jointly(
        mass, 0.5, count / 40, strategy="marginal", groups=groups.tolist(), quotas={1: (low, 1.0)}
    )
    n = int(found.examples.sum())
    ones = groups == 1
    assert found.examples[ones].sum() >= np.ceil(low * n - 1e-9)
    # nobody left out is better than one taken that could make room for it
    out = ~found.examples
    for mine in (ones, ~ones):
        if (found.examples & mine).any() and (out & mine).any():
            assert mass.by_example[out & mine].max() <= mass.by_example[found.examples & mine].min()
    if found.examples[ones].sum() > np.ceil(low * n - 1e-9) and out.any():
        assert mass.by_example[out].max() <= mass.by_example[found.examples & ones].min()


# -- from a measurement to training ------------------------------------------------------


def setting(blocks="module", **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x, y = torch.randn(40, 8), torch.randint(0, 4, (40,))
    with fg.Probe(model, blocks, loss_reduction="row_mean", **options) as probe:
        for i in range(0, 40, 10):
            torch.nn.functional.cross_entropy(model(x[i : i + 10]), y[i : i + 10]).backward()
    return model, x, y, probe.stats()


@pytest.mark.parametrize("blocks", ["module", "row", "4x4"])
def test_what_is_chosen_can_be_trained(blocks):
    model, x, y, stats = setting(blocks)
    chosen = fg.select_jointly(stats, 0.3, 0.25, model=model)
    assert chosen.selection.fraction <= 0.3
    mass = MassMatrix.from_stats(stats)
    held = sum(
        float(stats.blocks(n)[ids][:, chosen.example_ids].__pow__(2).sum())
        for n, ids in chosen.selection.blocks.items()
    )
    assert held / mass.values.sum() == pytest.approx(chosen.choice.share, rel=1e-6)
    assert (np.diff(chosen.scores) <= 0).all()
    data = torch.utils.data.TensorDataset(x, y)
    subset = chosen.subset(data)
    assert [int(i) for i in subset.indices] == chosen.example_ids.tolist()
    partial = fg.make_partial(model, chosen.selection)
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    first = None
    for _ in range(5):
        inputs, labels = next(iter(torch.utils.data.DataLoader(subset, batch_size=10)))
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < first
    assert "squared gradient" in chosen.summary()


def test_blocks_without_detail_are_chosen_whole():
    model, *_, stats = setting("row", detail=["0.weight"])
    chosen = fg.select_jointly(stats, 0.9, 0.5, model=model)
    assert chosen.selection.is_whole("2.weight")
    assert chosen.selection.grid("2.weight").is_whole
    fg.make_partial(model, chosen.selection).remove()


def test_patterns_and_frozen_parameters_leave_blocks_out():
    model, *_, stats = setting()
    chosen = fg.select_jointly(stats, 1.0, 0.5, model=model, exclude=["*bias"])
    assert chosen.selection.names == ["0.weight", "2.weight"]
    model[0].weight.requires_grad_(False)
    chosen = fg.select_jointly(stats, 1.0, 0.5, model=model, exclude=["*bias"])
    assert chosen.selection.names == ["2.weight"]
    with pytest.raises(SelectionError, match="matches no parameter"):
        fg.select_jointly(stats, 1.0, 0.5, model=model, include=["nothing*"])


def test_the_sampler_draws_chosen_rows_alone():
    model, x, y, stats = setting()
    chosen = fg.select_jointly(stats, 0.3, 0.25, model=model)
    data = torch.utils.data.TensorDataset(x, y)
    drawn = list(chosen.sampler(data, 500))
    assert set(drawn) <= set(chosen.example_ids.tolist())
    assert list(chosen.sampler(data, 500)) == drawn
    counts = np.array([drawn.count(i) for i in chosen.example_ids.tolist()])
    expected = np.sqrt(chosen.scores) / np.sqrt(chosen.scores).sum() * 500
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 3).all()
    with pytest.raises(SelectionError, match="no row of this data set"):
        chosen.subset(torch.utils.data.TensorDataset(x[:5], y[:5]))


def test_ids_that_stand_for_several_examples_are_refused():
    model, x, y, stats = setting()
    stats.example_ids[:] = 3
    stats.running_ids = False
    chosen = fg.select_jointly(stats, 0.3, 0.25, model=model)
    with pytest.raises(SelectionError, match="more than once"):
        chosen.subset(torch.utils.data.TensorDataset(x, y))


def test_a_dataset_of_the_hub_kind_is_selected_from():
    datasets = pytest.importorskip("datasets")
    model, *_, stats = setting()
    chosen = fg.select_jointly(stats, 0.3, 0.25, model=model)
    rows = datasets.Dataset.from_dict({"row": list(range(40))})
    assert chosen.subset(rows)["row"][:] == chosen.example_ids.tolist()


# -- scores ------------------------------------------------------------------------------


def test_scores_are_norms_and_inner_products_of_example_gradients():
    model, x, y, _ = setting()
    held = torch.nn.functional.cross_entropy(model(x[:10]), y[:10])
    target = {
        n: g
        for (n, _), g in zip(
            model.named_parameters(),
            torch.autograd.grad(held, list(model.parameters())),
            strict=True,
        )
    }
    model.zero_grad()
    with fg.Probe(model, loss_reduction="row_mean", targets={"held": target}) as probe:
        torch.nn.functional.cross_entropy(model(x), y).backward()
    stats = probe.stats()
    norms, inner = [], []
    for i in range(40):
        loss = torch.nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(float(sum(g.double().square().sum() for g in grads)) ** 0.5)
        inner.append(
            float(sum((g.double() * target[n]).sum() for g, n in zip(grads, target, strict=True)))
        )
    np.testing.assert_allclose(example_scores(stats), norms, rtol=1e-4)
    np.testing.assert_allclose(example_scores(stats, "alignment"), inner, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        example_scores(stats, "cosine"), np.array(inner) / norms, rtol=1e-3, atol=1e-6
    )
    table = example_scores(stats, "alignment", per_parameter=True)
    np.testing.assert_allclose(table.sum(0), inner, rtol=1e-3, atol=1e-6)
    only = example_scores(stats, include=["2.*"])
    rows = [i for i, n in enumerate(stats.names) if n.startswith("2.")]
    np.testing.assert_allclose(
        only, np.sqrt((stats.influence("example_mean")[rows] ** 2).sum(0)), rtol=1e-12
    )


def test_scores_say_what_is_missing():
    *_, stats = setting()
    with pytest.raises(StatsError, match="unknown score"):
        example_scores(stats, "best")
    with pytest.raises(StatsError, match="no target direction"):
        example_scores(stats, "alignment")
    with pytest.raises(StatsError, match="matches no parameter"):
        example_scores(stats, include=["nothing"])
    with pytest.raises(StatsError, match="list of patterns"):
        example_scores(stats, include="*weight")
    with pytest.raises(StatsError, match="make no profile"):
        profiles(stats)


def test_copies_do_not_fill_the_set():
    model, x, y, _ = setting()
    x, y = torch.cat([x, x[:1].repeat(20, 1)]), torch.cat([y, y[:1].repeat(20)])
    x[40:] += 1e-4 * torch.randn(20, 8)
    with fg.Probe(model, "row", loss_reduction="row_mean") as probe:
        torch.nn.functional.cross_entropy(model(x), y).backward()
    stats = probe.stats()
    scores = example_scores(stats)
    scores[40:] += scores.max()  # the copies score best
    plain = np.argsort(-scores)[:10]
    assert (plain >= 40).all()
    chosen = diverse_top(scores, profiles(stats), 10)
    assert sum(i >= 40 or i == 0 for i in chosen) == 1
    assert len(set(chosen.tolist())) == 10


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 30))
def test_diverse_top_against_its_definition(seed, count):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(6, 3))[rng.integers(0, 6, 30)] + 0.01 * rng.normal(size=(30, 3))
    scores = rng.random(30)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    want, passed = [], []
    for i in np.argsort(-scores, kind="stable").tolist():
        near = want and (unit[want] @ unit[i]).max() >= 0.95 - 1e-9
        (passed if near else want).append(i)
    want = (want[:count] + passed)[:count]
    import fastgrad.scores as module

    for stretch in (4, 256):
        module.STRETCH, before = stretch, module.STRETCH
        try:
            assert diverse_top(scores, features, count).tolist() == want
        finally:
            module.STRETCH = before


def test_copies_are_copies_at_any_size():
    features = np.array([[1.0, 2], [2, -1], [1, 2]])
    for factor in (1.0, 1e160, 1e-165):
        assert diverse_top([3, 2, 1], features * factor, 2).tolist() == [0, 1]
        assert diverse_top([3, 1, 2], features * factor, 2).tolist() == [0, 1]
    with pytest.raises(StatsError, match="count"):
        diverse_top([3, 2, 1], features, 2.0)


def test_diverse_top_refuses_what_makes_no_sense():
    ones = np.ones((4, 2))
    for scores, features, count, similarity, message in (
        (np.ones(3), ones, 1, 0.9, "are needed"),
        (np.array([1, 2, 3, np.nan]), ones, 1, 0.9, "finite"),
        (np.ones(4), ones, 5, 0.9, "1..4"),
        (np.ones(4), ones, 0, 0.9, "1..4"),
        (np.ones(4), ones, 1, 0.0, "similarity"),
    ):
        with pytest.raises(StatsError, match=message):
            diverse_top(scores, features, count, similarity)


def test_patterns_that_undershoot_hold_nothing():
    """Where the leading patterns of T are negative there is no mass, not that of the square."""
    t = np.random.default_rng(0).random((6, 9)) ** 3
    u, values, v = np.linalg.svd(t, full_matrices=False)
    leading = (u[:, :2] * values[:2]) @ v[:2]
    assert leading.min() < -0.05
    smoothed = _smoothed(MassMatrix.of(t**2), 2, 0)
    expected = np.maximum(leading, 0) ** 2
    assert np.allclose(smoothed.in_memory(), expected, rtol=1e-6, atol=1e-9)
    assert np.allclose(smoothed.by_block, expected.sum(1), rtol=1e-6)
