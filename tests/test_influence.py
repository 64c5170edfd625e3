"""What T says, on matrices whose truth is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fastgrad as fg
from fastgrad.errors import StatsError
from fastgrad.influence import influence_report
from fastgrad.interaction import independence, leading_patterns, spectrum
from fastgrad.mass import MassMatrix, NpyRows
from fastgrad.multiplicativity import multiplicativity, taken


def heavy(rows=40, columns=300, seed=0):
    rng = np.random.default_rng(seed)
    return rng, rng.lognormal(0, 1.5, rows), rng.lognormal(0, 1, columns)


# -- the matrix --------------------------------------------------------------------------


def measured(blocks="module"):
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, y = torch.randn(24, 6), torch.randint(0, 3, (24,))
    with fg.Probe(model, blocks, loss_reduction="row_mean") as probe:
        for i in range(0, 24, 8):
            torch.nn.functional.cross_entropy(model(x[i : i + 8]), y[i : i + 8]).backward()
    return model, x, y, probe.stats()


def test_the_matrix_holds_what_was_measured_block_by_block():
    *_, stats = measured("row")
    mass = MassMatrix.from_stats(stats)
    assert mass.n_blocks == 8 + 1 + 3 + 1  # rows of weights; biases are one block
    for name in stats.names:
        rows = [i for i, n in enumerate(mass.names) if n == name]
        np.testing.assert_allclose(mass.values[rows], stats.blocks(name) ** 2)
        assert mass.sizes[rows].tolist() == stats.grid(name).sizes().tolist()
    whole = MassMatrix.from_stats(stats, blocks=False)
    np.testing.assert_allclose(whole.values, stats.T**2)
    np.testing.assert_allclose(whole.by_example, mass.by_example, rtol=1e-5)


def test_what_is_not_known_is_left_out_by_name():
    *_, stats = measured()
    stats.sq[1] = np.nan
    mass = MassMatrix.from_stats(stats)
    assert mass.left_out == (stats.names[1],)
    assert stats.names[1] not in mass.names
    stats.sq[:] = np.nan
    with pytest.raises(StatsError, match="no parameter's influence is known"):
        MassMatrix.from_stats(stats)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-30])
def test_bad_influence_is_refused_with_its_row(bad):
    values = np.ones((3, 4))
    values[1, 2] = bad
    with pytest.raises(StatsError, match=r"v\.1.*finite and not negative"):
        MassMatrix.of(values, names=["v.0", "v.1", "v.2"])


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        (np.zeros((2, 3)), {}, "every gradient is zero"),
        (np.ones(3), {}, "with one of each"),
        (np.ones((0, 3)), {}, "with one of each"),
        (np.ones((2, 3)), {"sizes": [1, 2, 3]}, "do not fit"),
        (np.ones((2, 3)), {"sizes": [1, 0]}, "1 or more"),
        (np.ones((2, 3)), {"example_ids": [0.5, 1, 2]}, "whole numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(values, more, message):
    with pytest.raises(StatsError, match=message):
        MassMatrix.of(values, **more)


def test_a_matrix_in_a_file_is_read_by_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgrad.mass.STRETCH", 4 * 30 * 7)
    rng = np.random.default_rng(0)
    values = rng.random((50, 30)).astype(np.float32)
    np.save(tmp_path / "m.npy", values)
    mass = MassMatrix.of(NpyRows(tmp_path / "m.npy"))
    same = MassMatrix.of(values)
    assert [r.stop - r.start for r, _ in mass.stretches()] == [7] * 7 + [1]
    columns, rows = rng.random(30) < 0.4, rng.random(50) < 0.4
    np.testing.assert_allclose(mass.by_block, values.sum(1, dtype=np.float64))
    np.testing.assert_allclose(mass.on_examples(columns), values[:, columns].sum(1), rtol=1e-6)
    np.testing.assert_allclose(mass.on_blocks(rows), values[rows].sum(0), rtol=1e-6)
    np.testing.assert_allclose(mass.on_blocks(rows), same.on_blocks(rows))
    np.testing.assert_array_equal(mass.in_memory(), values)
    data = (tmp_path / "m.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(data[:-8])
    with pytest.raises(StatsError, match="cut off"):
        NpyRows(tmp_path / "cut.npy")
    (tmp_path / "not.npy").write_bytes(b"nothing of the kind")
    with pytest.raises(StatsError, match="cannot be read"):
        NpyRows(tmp_path / "not.npy")
    np.save(tmp_path / "ints.npy", np.ones((3, 3), np.int64))
    with pytest.raises(StatsError, match="float32 or"):
        NpyRows(tmp_path / "ints.npy")


# -- multiplicativity --------------------------------------------------------------------


def test_shares_against_counting():
    """S(k, q) by hand: sizes of one, no fractions cut."""
    values = np.array([[8.0, 1, 1, 2], [2, 4, 1, 1], [1, 1, 0, 1], [1, 0, 1, 0]])
    m = multiplicativity(MassMatrix.of(values), [0.25, 0.5], [0.25, 0.5], n_bootstrap=5)
    total = values.sum()
    assert m.share[0, 0] == pytest.approx(8 / total)
    assert m.share[1, 1] == pytest.approx((8 + 1 + 2 + 4) / total)
    assert m.by_parameters[0] == pytest.approx(12 / total)
    assert m.by_examples[0] == pytest.approx(12 / total)
    assert m.ratio[0, 0] == pytest.approx(8 * total / 144)


def test_a_block_at_the_edge_counts_in_part():
    blocks = taken(np.array([1.0, 3.0, 2.0]), np.array([5.0, 2.0, 3.0]), np.array([0.3, 0.6]))
    np.testing.assert_allclose(blocks, [[0, 1, 1 / 3], [0.2, 1, 1]])


def test_a_product_multiplies():
    _, r, c = heavy()
    m = multiplicativity(MassMatrix.of(np.outer(r, c)), n_bootstrap=50)
    np.testing.assert_allclose(m.ratio, 1, rtol=1e-12)
    assert m.verdict == "multiplicative"


def test_examples_that_pull_on_blocks_of_their_own_are_more_than_the_product():
    """Two kinds of examples, heavy ones of each on blocks of their own."""
    rng, r, c = heavy()
    kind = rng.random(300) < 0.5
    own = np.where(np.arange(40)[:, None] % 2 == kind, 1.0, 1e-3)
    heavier = np.where(kind, 5.0, 1.0)  # the first kind makes the hot blocks and the hot examples
    m = multiplicativity(MassMatrix.of(np.outer(r, c) * own * heavier), n_bootstrap=50)
    assert m.verdict == "more"
    assert m.ratio_low.max() > 1.05


def test_heavy_examples_that_pull_elsewhere_are_named():
    """The heaviest examples pull hardest on the blocks that are light for all others."""
    _, r, c = heavy()
    r, c = np.sort(r)[::-1], np.sort(c)[::-1]
    values = np.outer(r, np.r_[c[:30] * 0.5, c[30:]])
    values[:, :30] = values[::-1, :30]
    found = influence_report(MassMatrix.of(values), n_bootstrap=50, hot=(0.2, 0.1))
    assert found.multiplicativity.verdict in ("less", "mixed")
    meeting = found.meeting
    assert meeting.interval[1] < 1
    assert meeting.ratio < 0.9
    assert meeting.correlation_interval[1] < 0
    assert "overestimated" in meeting.warning
    assert "select_jointly" in meeting.warning


def test_intervals_cover_the_truth():
    """The ratio of the population that the examples are drawn from lies within the interval about
    as often as promised."""
    rng = np.random.default_rng(1)
    r = rng.lognormal(0, 1.5, 20)
    loads = rng.normal(0, 0.8, 20)

    def sample(n):
        strength, side = rng.lognormal(0, 0.8, n), rng.normal(0, 1, n)
        return np.outer(r, strength) * np.exp(np.outer(loads, side))

    truth = multiplicativity(MassMatrix.of(sample(60_000)), [0.2], [0.2], n_bootstrap=1).ratio
    inside = 0
    for i in range(40):
        m = multiplicativity(MassMatrix.of(sample(300)), [0.2], [0.2], n_bootstrap=100, seed=i)
        inside += bool(m.ratio_low[0, 0] <= truth[0, 0] <= m.ratio_high[0, 0])
    assert inside >= 31  # binomial(40, 0.9): 31 or fewer has probability 0.02


@pytest.mark.parametrize("bad", [[], [0.0], [1.0], [0.5, float("nan")], 0.3])
def test_fractions_outside_the_interval_are_refused(bad):
    with pytest.raises(StatsError, match="strictly between 0 and 1"):
        multiplicativity(MassMatrix.of(np.ones((3, 3))), bad)


# -- patterns and independence -----------------------------------------------------------


def test_spectrum_of_known_singular_values():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(30, 4)))
    v, _ = np.linalg.qr(rng.normal(size=(50, 4)))
    s = spectrum((u * [4, 2, 1, 1]) @ v.T)
    np.testing.assert_allclose(s.values[:4], [4, 2, 1, 1], rtol=1e-10)
    np.testing.assert_allclose(s.explained[:3], np.array([16, 20, 21]) / 22)
    assert s.stable_rank == pytest.approx(22 / 16)
    assert s.participation == pytest.approx(22**2 / (256 + 16 + 1 + 1))
    p = np.array([4, 2, 1, 1]) / 8
    assert s.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert s.rank_for(0.9) == 2
    assert s.rank_for(1.0) is not None


def test_the_randomised_spectrum_agrees_and_says_what_it_does_not_know(monkeypatch):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 300)) + 0.01 * rng.normal(
        size=(200, 300)
    )
    exact = spectrum(matrix)
    monkeypatch.setattr("fastgrad.interaction.EXACT", 100)
    found = spectrum(matrix)
    assert not found.complete
    assert np.isnan(found.participation)
    np.testing.assert_allclose(found.values[:5], exact.values[:5], rtol=1e-6)
    assert found.stable_rank == pytest.approx(exact.stable_rank, rel=1e-6)
    assert found.rank_for(1.0) is None
    whole = [(slice(0, 200), matrix)]
    in_stretches = [(slice(i, i + 60), matrix[i : i + 60]) for i in range(0, 200, 60)]
    one, again, apart = (
        leading_patterns(lambda parts=parts: parts, matrix.shape, 5, 3)
        for parts in (whole, whole, in_stretches)
    )
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    u, values, v = np.linalg.svd(matrix)
    best = (u[:, :5] * values[:5]) @ v[:5]
    for left, sizes, right in (one, apart):
        np.testing.assert_allclose(left.T @ left, np.eye(5), atol=1e-12)
        np.testing.assert_allclose(sizes, values[:5], rtol=1e-6)
        np.testing.assert_allclose((left * sizes) @ right.T, best, atol=1e-4)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("rows", [3, 6, 12])
@pytest.mark.parametrize(("by_row", "by_column"), [(0, 0), (1, 0), (0, 1), (1, 0.5)])
def test_independence_is_not_rejected_whatever_the_noise(rows, by_row, by_column):
    """Noise that differs between blocks, and between examples, is no structure."""
    rejected = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        size = np.exp(by_row * rng.normal(size=(rows, 1)) + by_column * rng.normal(size=(1, 60)))
        logs = rng.normal(0, 1.5, (rows, 1)) + rng.normal(0, 1, (1, 60))
        logs = logs + 0.3 * size * rng.normal(size=(rows, 60))
        rejected += independence(MassMatrix.of(np.exp(2 * logs)), 40, seed).p_value < 0.05
    assert rejected <= 8  # binomial(60, 0.05): more has probability 0.005


def test_few_draws_give_no_verdict():
    rng, r, c = heavy(8, 30)
    values = np.outer(r, c) * rng.lognormal(0, 0.3, (8, 30))
    assert independence(MassMatrix.of(values), 19).verdict == "undecided"
    assert multiplicativity(MassMatrix.of(values), n_bootstrap=49).verdict == "undecided"
    report = influence_report(MassMatrix.of(values), n_bootstrap=5, n_permutations=5)
    assert report.meeting.warning == ""


def test_an_example_without_gradient_is_counted_and_hides_nothing():
    rng, r, c = heavy(12, 60)
    values = np.outer(r, c) * rng.lognormal(0, 0.3, (12, 60))
    without = independence(MassMatrix.of(values), 30)
    values = np.insert(values, 7, 0, axis=1)
    found = independence(MassMatrix.of(values), 30)
    assert found.n_idle == 1
    assert found.p_value == without.p_value
    values[:, :10] = 0
    values[:10, 20] = 0
    report = influence_report(MassMatrix.of(values), n_bootstrap=5, n_permutations=20)
    assert report.independence is None
    assert "touched by all" in report.untested
    assert "not tested" in report.summary()


def test_no_agreement_is_reported_where_there_is_none():
    """Blocks that are all alike: what one half ranks first the other does not."""
    a = np.random.default_rng(0).lognormal(0, 1, (200, 100))
    found = influence_report(MassMatrix.of(a), n_bootstrap=60, n_permutations=20).stability
    assert abs(found.block_ranks[0]) < 0.15
    assert found.top_blocks[0] < 0.25


def test_huge_and_tiny_entries_keep_their_spectrum():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 9))
    want = spectrum(matrix)
    for factor in (1e200, 1e-200):
        found = spectrum(matrix * factor)
        np.testing.assert_allclose(found.values, want.values * factor, rtol=1e-10)
        np.testing.assert_allclose(found.explained, want.explained, rtol=1e-10)
    with pytest.raises(StatsError, match="overflows"):
        MassMatrix.of(np.full((5, 9), 1.7e307))
    with pytest.raises(StatsError, match="real numbers"):
        MassMatrix.of(np.ones((3, 3)) * 1j)


def test_nobody_s_arrays_are_shared():
    fractions = np.array([0.1, 0.2])
    mass = MassMatrix.of(np.random.default_rng(0).random((5, 20)))
    multiplicativity(mass, fractions, n_bootstrap=5)
    fractions[0] = 0.3
    with pytest.raises(ValueError, match="read-only"):
        mass.by_block[0] = 0


def test_a_file_that_shrinks_is_noticed(tmp_path):
    np.save(tmp_path / "m.npy", np.ones((6, 4)))
    rows = NpyRows(tmp_path / "m.npy")
    data = (tmp_path / "m.npy").read_bytes()
    (tmp_path / "m.npy").write_bytes(data[:-40])
    with pytest.raises(StatsError, match="shorter"):
        rows[:]
    with pytest.raises(StatsError, match="stretches"):
        rows[::2]


def test_a_second_pattern_is_found():
    rng, r, c = heavy(30, 200)
    kinds = np.exp(np.outer(rng.normal(0, 0.5, 30), rng.choice([-1, 1], 200)))
    noise = rng.lognormal(0, 0.5, (30, 200))
    i = independence(MassMatrix.of(np.outer(r, c) * kinds * noise), 100)
    assert i.verdict == "structured"
    assert i.p_value == pytest.approx(1 / 101)
    assert 0 < i.explained < 1
    assert 0 < i.misplaced < 1


def test_a_product_is_explained_entirely():
    _, r, c = heavy()
    i = independence(MassMatrix.of(np.outer(r, c)), 20)
    assert i.explained == pytest.approx(1)
    assert i.misplaced == pytest.approx(0, abs=1e-12)
    assert i.verdict == "no structure found"


def test_blocks_that_some_example_does_not_touch_are_counted():
    rng = np.random.default_rng(0)
    values = rng.random((6, 20)) + 0.1
    values[2, 3] = 0
    assert independence(MassMatrix.of(values), 5).n_zero == 1
    values[:4, 3] = 0
    with pytest.raises(StatsError, match="touched by all"):
        independence(MassMatrix.of(values), 5)


# -- the report --------------------------------------------------------------------------


def test_the_report_is_json_and_words_and_the_same_each_time():
    *_, stats = measured("row")
    first = influence_report(stats, n_bootstrap=30, n_permutations=30)
    again = influence_report(stats, n_bootstrap=30, n_permutations=30)
    text = json.dumps(first.to_dict(), allow_nan=False, sort_keys=True)
    assert text == json.dumps(again.to_dict(), allow_nan=False, sort_keys=True)
    words = first.summary()
    for word in ("blocks", "examples", "independence", "multiplicativity", "halves of"):
        assert word in words
    assert first.scale == "contribution"
    assert first.examples.mass == pytest.approx(MassMatrix.from_stats(stats).by_example)


def test_stability_shrinks_with_more_examples():
    rng, r, _ = heavy(20)

    def width(n):
        values = np.outer(r, rng.lognormal(0, 1, n)) * rng.lognormal(0, 1, (20, n))
        found = influence_report(MassMatrix.of(values), n_bootstrap=60, n_permutations=5).stability
        return found.gamma[1][1] - found.gamma[1][0]

    assert width(2000) < 0.6 * width(50)


def test_too_little_is_refused():
    with pytest.raises(StatsError, match="at least 3"):
        influence_report(MassMatrix.of(np.ones((2, 9))))
