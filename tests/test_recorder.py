"""The recorder: the same statistics whether they stay in memory or go to disk in pieces."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrad import stats_files
from fastgrad.blocks import grid_of
from fastgrad.errors import StatsError
from fastgrad.recorder import Column, Recorder
from fastgrad.stats import Coverage, GradientStats
from fastgrad.stats_shards import ShardReader, ShardWriter
from tests.test_stats_shards import assert_same

SHAPES = {"a.weight": (6, 4), "b.weight": (5, 3), "norm": (4,)}
SPECS = {"a.weight": "2x*"}
META = {"weights_hash": "sha256:0", "loss_reduction": "token_mean"}
EXACT = [Coverage(n, "exact") for n in SHAPES]


def recorder(writer=None, shapes=SHAPES, detail=("a.weight",), **kwargs):
    grids = {n: grid_of(n, s, "row", SPECS) for n, s in shapes.items()}
    specs = {n: s for n, s in SPECS.items() if n in grids}
    return Recorder(
        grids, "row", specs, detail=detail, directions=["d"], weight_sq=np.ones(len(shapes)),
        writer=writer, **kwargs,
    )  # fmt: skip


def passes(sizes, seed=0, shapes=SHAPES, detail=("a.weight",), ids=False):
    """Per backward pass: its columns, one per forward pass, and its norms."""
    rng, number = np.random.default_rng(seed), 0
    grids = {n: grid_of(n, s, "row", SPECS) for n, s in shapes.items()}
    for forward in sizes:
        columns = []
        for n in forward:
            columns.append(Column(
                n,
                {name: rng.random(n) for name in shapes},
                {name: rng.random((1, n)) for name in shapes},
                {name: rng.random((grids[name].n_blocks, n)) for name in detail},
                [int(x) for x in rng.integers(1, 9, n)],
                list(rng.random(n)),
                list(rng.random(n)),
                [1000 - number - j for j in range(n)] if ids else None,
            ))  # fmt: skip
            number += n
        # not every parameter has a gradient in every pass
        having = [n for n in shapes if n != "b.weight" or len(forward) == 1]
        yield columns, {n: rng.random(grids[n].n_blocks) for n in having}


def test_what_was_added_comes_out_in_its_place():
    made = recorder()
    added = list(passes([[2, 1], [3]]))
    for columns, norms in added:
        made.add(columns, norms)
    stats = made.stats(EXACT, {**META, "skipped_batches": 4})
    stats._validate()
    assert (stats.n_examples, stats.n_batches, made.n_passes) == (6, 2, 2)
    assert stats.batch.tolist() == [0, 0, 0, 1, 1, 1]  # two forward passes in one backward pass
    flat = [c for columns, _ in added for c in columns]
    for p, name in enumerate(SHAPES):
        np.testing.assert_array_equal(stats.sq[p], np.concatenate([c.sq[name] for c in flat]))
        norms = [n.get(name, np.zeros(1)) for _, n in added]
        np.testing.assert_allclose(stats.batch_sq[p], [n.sum() for n in norms])
        np.testing.assert_array_equal(
            stats.alignment[p], np.concatenate([c.dots[name][0] for c in flat])
        )
    assert list(stats.block_sq) == ["a.weight"]
    assert stats.block_sq["a.weight"].shape == (3, 6)
    np.testing.assert_allclose(
        stats.block_batch_sq["a.weight"], sum(n["a.weight"] for _, n in added)
    )
    np.testing.assert_allclose(stats.block_batch_sq["b.weight"], added[1][1]["b.weight"])
    assert stats.running_ids
    assert stats.meta["skipped_batches"] == 4
    # and the statistics do not change when more is added
    before = stats.block_batch_sq["a.weight"].copy()
    made.add(*added[0])
    np.testing.assert_array_equal(stats.block_batch_sq["a.weight"], before)


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=2), min_size=1, max_size=8),
    st.integers(1, 9),
    st.sets(st.integers(0, 7)),
    st.booleans(),
)
def test_pieces_on_disk_are_the_same_measurement(tmp_path_factory, sizes, every, looks, ids):
    """Wherever the boundaries fall, whenever somebody looks, and with batches skipped between."""
    folder = tmp_path_factory.mktemp("r") / "s"
    whole, pieces = recorder(), recorder(ShardWriter(folder, every))
    skipped = 0
    for k, (columns, norms) in enumerate(passes(sizes, ids=ids)):
        skipped += k % 2
        meta = {**META, "skipped_batches": skipped}
        for each in (whole, pieces):
            each.add(columns, norms)
        if pieces.is_due:
            pieces.write(EXACT, meta)
        if k in looks:
            so_far = pieces.stats(EXACT, meta)
            assert_same(so_far, whole.stats(EXACT, meta), leave_out=("block_sq", "unloaded"))
    meta = {**META, "skipped_batches": skipped + 1}
    found, expected = pieces.stats(EXACT, meta), whole.stats(EXACT, meta)
    assert_same(found, expected, leave_out=("block_sq", "unloaded"))
    assert found.unloaded == ("a.weight",)
    assert_same(GradientStats.load(folder), expected)
    assert pieces.n_passes == whole.n_passes == len(sizes)


def test_what_turns_out_to_be_missing_late_is_missing_in_all_pieces(tmp_path):
    whole, pieces = recorder(), recorder(ShardWriter(tmp_path / "s", 2))
    late = [Coverage("a.weight", "missing", "no tap"), *EXACT[1:]]
    for k, (columns, norms) in enumerate(passes([[2], [2], [2]])):
        for each in (whole, pieces):
            each.add(columns, norms)
        assert pieces.is_due
        pieces.write(EXACT if k == 0 else late, META)
    pieces.stats(late, META)
    expected = whole.stats(late, META)
    assert_same(GradientStats.load(tmp_path / "s"), replace(
        expected, meta={**META, "skipped_batches": 0}))  # fmt: skip
    for part in ShardReader(tmp_path / "s"):
        assert np.isnan(part.blocks("a.weight")).all()


def test_ids_are_given_for_all_or_none():
    made = recorder()
    for columns, norms in passes([[2], [1]], ids=True):
        made.add(columns, norms)
    stats = made.stats(EXACT, META)
    assert stats.example_ids.tolist() == [1000, 999, 998]
    assert not stats.running_ids
    assert stats.sorted_by_example().example_ids.tolist() == [998, 999, 1000]
    for columns, norms in passes([[1]]):
        made.add(columns, norms)
    with pytest.raises(StatsError, match=r"1 of 3 forward passes came without example ids.*Rem"):
        made.stats(EXACT, META)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    whole, pieces = recorder(), recorder(ShardWriter(tmp_path / "s", 2))
    for columns, norms in passes([[2]]):
        whole.add(columns, norms)
        pieces.add(columns, norms)

    def full(stats, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stats_files, "write", full)
        with pytest.raises(OSError, match="No space"):
            pieces.write(EXACT, {**META, "skipped_batches": 0})
    for columns, norms in passes([[1]], seed=1):
        whole.add(columns, norms)
        pieces.add(columns, norms)
    meta = {**META, "skipped_batches": 0}
    pieces.stats(EXACT, meta)
    assert_same(GradientStats.load(tmp_path / "s"), whole.stats(EXACT, meta))


def test_gradient_norms_alone(tmp_path):
    pieces = recorder(ShardWriter(tmp_path / "s", 3), per_example=False)
    for _, norms in passes([[1]] * 7):
        pieces.add([], norms)
        if pieces.is_due:
            pieces.write(EXACT, META)
    stats = pieces.stats(EXACT, META)
    assert (stats.n_examples, stats.n_batches, stats.block_sq) == (0, 7, {})
    assert len(ShardReader(tmp_path / "s")) == 3


def test_memory_does_not_grow_with_examples_or_passes(tmp_path):
    shapes = {f"{i}.weight": (2000, 2) for i in range(2)}

    def peak(n, folder):
        made = recorder(ShardWriter(folder, 50), shapes=shapes, detail=tuple(shapes))
        coverage = [Coverage(name, "exact") for name in shapes]
        tracemalloc.start()
        for k in range(n):
            for columns, norms in passes([[5]], k, shapes, tuple(shapes)):
                made.add(columns, norms)
            if made.is_due:
                made.write(coverage, META)
        made.stats(coverage, META)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(2, tmp_path / "warm")  # imports and caches
    few, many = peak(20, tmp_path / "few"), peak(400, tmp_path / "many")
    assert many < 1.2 * few, (few, many)

    def kept(n):
        """Without a writer: the norms of passes' blocks are summed, not kept."""
        made = recorder(shapes=shapes, detail=())
        tracemalloc.start()
        for k in range(n):
            for _, norms in passes([[1]], k, shapes, ()):
                made.add([], norms)
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return used

    assert kept(100) - kept(10) < 90 * 2000 * 8 / 10
