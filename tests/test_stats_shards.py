"""Statistics in pieces: ids, order and joins in memory, and folders that hold more than memory."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import fastgrad as fg
from fastgrad import stats_files
from fastgrad.errors import StatsError
from fastgrad.stats import Coverage, GradientStats
from fastgrad.stats_shards import INDEX_NAME, ShardReader, ShardWriter

SHAPES = {"a.weight": (6, 4), "b.weight": (5, 3), "norm": (4,)}


def piece(
    per_pass=(2, 3), seed=0, *, spec="row", specs=None, detail=True, shapes=SHAPES, **changes
) -> GradientStats:
    """A measurement with one backward pass per entry of ``per_pass``, which counts its examples."""
    rng = np.random.default_rng(seed)
    names, E, N = list(shapes), sum(per_pass), len(per_pass)
    made = GradientStats(
        names=names,
        shapes=list(shapes.values()),
        spec=spec,
        specs=specs or {},
        sq=rng.random((len(names), E)),
        batch=np.repeat(np.arange(N), per_pass),
        label_tokens=rng.integers(1, 9, E),
        mean_factor=rng.random(E) + 1,
        sum_factor=rng.random(E) + 1,
        batch_sq=rng.random((len(names), N)),
        weight_sq=np.ones(len(names)),
        directions=["d", "e"],
        alignment_by_direction=rng.random((2, len(names), E)),
        coverage_list=[Coverage(n, "exact") for n in names],
        meta={"weights_hash": "sha256:0", "loss_reduction": "token_mean", "skipped_batches": 1},
    )
    for name in names:
        n = made.grid(name).n_blocks
        if n > 1:
            made.block_batch_sq[name] = rng.random(n) * N
            if detail and E:
                made.block_sq[name] = rng.random((n, E)).astype(np.float32)
    return replace(made, **changes)


def assert_same(a, b, *, leave_out=()):
    for f in fields(GradientStats):
        one, other = getattr(a, f.name), getattr(b, f.name)
        if f.name in leave_out:
            continue
        if f.name == "block_batch_sq":  # summed in another order
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-14)
        elif isinstance(one, dict) and one and isinstance(next(iter(one.values())), np.ndarray):
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name], err_msg=f.name)
        elif isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other, err_msg=f.name)
            assert one.dtype == other.dtype, f.name
        else:
            assert one == other, f.name


# -- joining -------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=5))
def test_concat_is_repeated_merge(sizes):
    pieces = [piece(tuple(s), seed) for seed, s in enumerate(sizes)]
    merged = pieces[0]
    for p in pieces[1:]:
        merged = merged.merge(p)
    whole = GradientStats.concat(pieces)
    assert_same(whole, merged)
    assert whole.n_batches == sum(map(len, sizes))
    assert whole.example_ids.tolist() == list(range(sum(map(sum, sizes))))
    assert whole.meta["skipped_batches"] == len(pieces)
    np.testing.assert_array_equal(whole.sq, np.concatenate([p.sq for p in pieces], 1))
    # each pass keeps its examples: numbers rise by one from pass to pass, over all pieces
    counts = [n for s in sizes for n in s]
    np.testing.assert_array_equal(whole.batch, np.repeat(np.arange(len(counts)), counts))


def test_concat_refuses_what_does_not_belong_together():
    one = piece()
    for other, what in (
        (piece(shapes={**SHAPES, "norm": (5,)}), "shapes"),
        (piece(shapes={"x": (6, 4), "b.weight": (5, 3), "norm": (4,)}), "parameters: a.weight and"),
        (piece(spec="column"), "block granularity"),
        (piece(specs={"b.weight": "2x*"}), "block granularity: b.weight: row and b.weight: 2x"),
        (piece(meta={"weights_hash": "sha256:1"}), "weights"),
        (piece(directions=["d", "f"]), "directions: e and f"),
        (piece(detail=False), "block detail"),
        (piece(block_batch_sq={}), "block norms"),
        (piece((0, 0), detail=True), "block detail"),
    ):
        with pytest.raises(StatsError, match=f"cannot merge statistics of different {what}"):
            one.merge(other)
    with pytest.raises(StatsError, match="kinds"):
        piece(detail=False).merge(piece((0, 0)))
    with pytest.raises(StatsError, match="no statistics to merge"):
        GradientStats.concat([])


def test_a_piece_without_a_backward_pass_only_counts_what_was_skipped():
    idle = piece((), detail=False)
    whole = GradientStats.concat([piece(detail=False), idle])
    assert_same(whole, piece(detail=False), leave_out=("meta",))
    assert whole.meta["skipped_batches"] == 2


def test_modules_that_mix_examples_are_gathered():
    """They are seen when they run, so a later piece may know more of them."""
    pieces = [piece(seed=i) for i in range(3)]
    assert "mixes_examples" not in GradientStats.concat(pieces).meta
    pieces[1].meta["mixes_examples"] = ["b", "a"]
    pieces[2].meta["mixes_examples"] = ["b", "c"]
    assert GradientStats.concat(pieces).meta["mixes_examples"] == ["a", "b", "c"]


def test_what_is_missing_once_is_missing_in_all_examples():
    late = piece(seed=1)
    late.coverage_list[0] = Coverage("a.weight", "missing", "a use without a tap")
    whole = piece().merge(late)
    assert np.isnan(whole.sq[0]).all()
    assert np.isnan(whole.blocks("a.weight")).all()
    assert np.isnan(whole.alignment[:, 0]).all()
    assert not np.isnan(whole.sq[1:]).any()
    assert not np.isnan(whole.grad_norm).any()
    assert whole.coverage["a.weight"].reason == "a use without a tap"


# -- ids and order -------------------------------------------------------------------------------


def test_ids_number_the_examples_unless_given(tmp_path):
    one, two = piece(), piece(seed=1)
    assert one.running_ids
    assert one.example_ids.tolist() == [0, 1, 2, 3, 4]
    assert one.merge(two).example_ids.tolist() == list(range(10))
    # ids that were given count as such, also where they look like running numbers
    given_ids = replace(two, example_ids=np.arange(5), running_ids=False)
    for merged in (given_ids.merge(given_ids), one.merge(given_ids)):
        assert merged.example_ids.tolist() == [*range(5), *range(5)]
        assert not merged.running_ids
    for stats in (one, given_ids):
        stats.save(tmp_path / "s.safetensors")
        assert_same(GradientStats.load(tmp_path / "s.safetensors"), stats)


def test_ranks_whose_examples_interleave_are_put_in_order():
    whole = piece((4, 4))
    ids = whole.example_ids
    ranks = [
        replace(
            piece((2, 2)),
            example_ids=ids[r::2],
            running_ids=False,
            block_sq={n: v[:, r::2] for n, v in whole.block_sq.items()},
            **{n: getattr(whole, n)[..., r::2] for n in (
                "sq", "label_tokens", "mean_factor", "sum_factor", "alignment_by_direction")},
        )
        for r in (0, 1)
    ]  # fmt: skip
    gathered = ranks[0].merge(ranks[1]).sorted_by_example()
    assert_same(gathered, whole, leave_out=(
        "batch", "batch_sq", "block_batch_sq", "meta", "running_ids"))  # fmt: skip
    assert gathered.batch.tolist() == [0, 2, 0, 2, 1, 3, 1, 3]  # each rank had its own passes
    gathered._validate()


def test_reordering_moves_everything_that_belongs_to_an_example():
    stats = piece((3, 3))
    order, blocks = [5, 0, 4, 1, 3, 2], stats.blocks("a.weight")
    moved = stats.reordered(order)
    for k, j in enumerate(order):
        assert moved.example_ids[k] == j
        assert moved.batch[k] == stats.batch[j]
        np.testing.assert_array_equal(moved.T[:, k], stats.T[:, j])
        np.testing.assert_array_equal(moved.alignment[..., k], stats.alignment[..., j])
        np.testing.assert_array_equal(moved.blocks("a.weight")[:, k], blocks[:, j])
    assert moved.n_batches == 2
    assert not moved.running_ids
    np.testing.assert_allclose(moved.signal_sq, stats.signal_sq)
    assert_same(moved.sorted_by_example(), stats, leave_out=("running_ids",))
    for bad in ([0, 1], [0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], np.arange(6.0)):
        with pytest.raises(StatsError, match=r"each of 0\.\.5 once"):
            stats.reordered(bad)


def test_files_of_the_first_version_load(tmp_path):
    """As fastgrad 0.1 wrote them: without ids and without granularities by name."""
    path = tmp_path / "s.safetensors"
    stats = piece()
    stats.save(path)
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["fastgrad"])
        arrays = {k: file.get_tensor(k) for k in file.keys() if k != "example_ids"}  # noqa: SIM118
    assert header["format"] == "fastgrad.stats/1"
    for new in ("specs", "running_ids"):
        del header[new]
    save_file(arrays, path, metadata={"fastgrad": json.dumps(header)})
    assert_same(GradientStats.load(path), stats)


def test_granularities_by_name_round_trip_in_a_format_of_their_own(tmp_path):
    path = tmp_path / "s.safetensors"
    stats = piece(spec="module", specs={"a.weight": "2x*", "b.weight": "*x2"})
    assert (stats.grid("a.weight").n_blocks, stats.grid("b.weight").n_blocks) == (3, 2)
    stats.save(path)
    assert_same(GradientStats.load(path), stats)
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["fastgrad"])
        arrays = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    assert header["format"] == "fastgrad.stats/2"  # a reader of /1 would misplace the blocks
    for change in (
        {"specs": {"nope": "row"}},
        {"specs": {"a.weight": "2x"}},
        {"specs": {"a.weight": 3}},
        {"specs": []},
        {"specs": {"a.weight": "3x*"}},
        {"running_ids": None, "format": "fastgrad.stats/3"},
    ):
        save_file(arrays, path, metadata={"fastgrad": json.dumps(header | change)})
        with pytest.raises(StatsError):
            GradientStats.load(path)
    for ids in (np.arange(5.0), np.arange(4), np.arange(5)[::-1].copy()):
        save_file(arrays | {"example_ids": ids}, path, metadata={"fastgrad": json.dumps(header)})
        with pytest.raises(StatsError, match="example_ids"):
            GradientStats.load(path)


# -- what is read --------------------------------------------------------------------------------


def test_only_the_block_detail_asked_for_is_read(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    stats = piece()
    stats.save(path)
    read = []

    class Recorded:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr("safetensors.safe_open", Recorded)
    light = GradientStats.load(path, blocks=False)
    assert not any(k.startswith("block_sq/") for k in read)
    assert light.block_sq == {}
    assert light.unloaded == ("a.weight", "b.weight")
    assert_same(light, stats, leave_out=("block_sq", "unloaded"))
    with pytest.raises(StatsError, match=r"left on disk.*blocks=\['a.weight'\]"):
        light.blocks("a.weight")
    some = GradientStats.load(path, blocks=["b.*"])
    np.testing.assert_array_equal(some.blocks("b.weight"), stats.blocks("b.weight"))
    assert some.unloaded == ("a.weight",)
    with pytest.raises(StatsError, match=r"pattern 'norm'.*some for a.weight"):
        GradientStats.load(path, blocks=["norm"])
    with pytest.raises(StatsError, match=r"write \['b.\*'\]"):
        GradientStats.load(path, blocks="b.*")
    whole = light.merge(light)
    assert whole.unloaded == light.unloaded


# -- folders -------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(1, 9),
)
def test_a_folder_reads_as_one_measurement(tmp_path_factory, sizes, every):
    folder = tmp_path_factory.mktemp("shards") / "s"
    pieces = [piece(tuple(s), seed) for seed, s in enumerate(sizes)]
    with ShardWriter(folder, every) as writer:
        for p in pieces:
            writer.add(p)
    whole = GradientStats.concat(pieces)
    assert_same(GradientStats.load(folder), whole)
    reader = ShardReader(folder)
    assert reader.n_examples == writer.n_written == whole.n_examples
    assert reader.n_batches == whole.n_batches
    parts = list(reader)
    assert len(parts) == len(reader) == len(list(folder.glob("stats-*.safetensors")))
    ids = np.concatenate([p.example_ids for p in parts])
    np.testing.assert_array_equal(ids, whole.example_ids)
    for p in parts:
        p._validate()  # batch numbers count within the piece
    assert_same(GradientStats.concat(parts), whole, leave_out=("running_ids",))
    reader.verify()
    light = GradientStats.load(folder, blocks=["a.*"])
    assert list(light.block_sq) == ["a.weight"]
    assert light.unloaded == ("b.weight",)
    assert_same(light, whole, leave_out=("block_sq", "unloaded"))
    assert GradientStats.load(folder, blocks=False).block_sq == {}


def test_gradient_norms_alone_are_written_by_passes(tmp_path):
    with ShardWriter(tmp_path / "s", 4) as writer:
        for seed in range(6):
            writer.add(piece((0, 0), seed, detail=False))
    assert [s.n_batches for s in ShardReader(tmp_path / "s").shards] == [4, 4, 4]
    assert GradientStats.load(tmp_path / "s").n_batches == 12


def test_a_writer_refuses_a_stranger_and_keeps_what_it_has(tmp_path):
    writer = ShardWriter(tmp_path / "s", 100)
    writer.add(piece())
    with pytest.raises(StatsError, match="weights"):
        writer.add(piece(meta={"weights_hash": "sha256:1"}))
    with pytest.raises(StatsError, match="block detail"):
        writer.add(piece((0,), detail=False))
    assert (writer.n_examples, writer.n_written) == (5, 0)
    writer.close()
    writer.close()
    assert writer.n_written == 5
    assert_same(GradientStats.load(tmp_path / "s"), piece())
    for every in (0, -1, 1.5, True, "8"):
        with pytest.raises(StatsError, match="number of examples"):
            ShardWriter(tmp_path / "t", every)


def test_going_on_after_a_crash(tmp_path):
    """Killed after a file was written and before the index names it, and with pieces waiting."""
    folder = tmp_path / "s"
    writer = ShardWriter(folder, 5)
    writer.add(piece(seed=0))
    index = (folder / INDEX_NAME).read_bytes()
    writer.add(piece(seed=1))
    writer.add(piece((1,), seed=2))
    (folder / INDEX_NAME).write_bytes(index)
    assert_same(GradientStats.load(folder), piece(seed=0))
    with pytest.raises(StatsError, match=r"holds statistics already.*resume=True"):
        ShardWriter(folder)
    again = ShardWriter(folder, 5, resume=True)
    assert again.n_examples == 5
    with pytest.raises(StatsError, match="weights"):
        again.add(piece(meta={"weights_hash": "sha256:1"}))
    again.add(piece(seed=1))
    assert_same(GradientStats.load(folder), piece(seed=0).merge(piece(seed=1)))


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "s"
    writer = ShardWriter(folder, 5)
    writer.add(piece(seed=0))
    names = sorted(p.name for p in folder.iterdir())

    def full(stats, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stats_files, "write", full)
    with pytest.raises(OSError, match="No space"):
        writer.add(piece(seed=1))
    assert sorted(p.name for p in folder.iterdir()) == names
    monkeypatch.undo()
    writer.flush()  # the piece still waits
    assert_same(GradientStats.load(folder), piece(seed=0).merge(piece(seed=1)))


def test_damage_is_named_with_the_remedy(tmp_path):
    def made():
        folder = tmp_path / "s"
        for file in folder.glob("*") if folder.exists() else ():
            file.unlink()
        with ShardWriter(folder, 5) as writer:
            for seed in range(3):
                writer.add(piece(seed=seed))
        return folder, folder / "stats-00001.safetensors"

    folder, shard = made()
    shard.unlink()
    with pytest.raises(StatsError, match=r"stats-00001\.safetensors is missing.*Remedy"):
        GradientStats.load(folder)
    folder, shard = made()
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(StatsError, match=r"stats-00001.*is damaged.*bytes.*Remedy"):
        GradientStats.load(folder)
    folder, shard = made()
    raw = bytearray(shard.read_bytes())
    raw[40] ^= 255  # in the header
    shard.write_bytes(raw)
    with pytest.raises(StatsError, match=r"stats-00001.*damaged.*Remedy"):
        GradientStats.load(folder)
    folder, shard = made()
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1  # in an array: nothing but the hash can tell
    shard.write_bytes(raw)
    with pytest.raises(StatsError, match=r"stats-00001.*hash is another.*Remedy"):
        ShardReader(folder).verify()
    folder, shard = made()
    index = folder / INDEX_NAME
    text = index.read_text()
    for damaged in ("", text[: len(text) // 2], "[]", "{}", text.replace("stats-00001", "../x"),
                    text.replace('"n_examples": 5', '"n_examples": "5"'),
                    text.replace("stats-shards/1", "stats-shards/9")):  # fmt: skip
        index.write_text(damaged)
        with pytest.raises(StatsError, match=r"index\.json"):
            GradientStats.load(folder)
    index.unlink()
    with pytest.raises(StatsError, match=r"holds no index.json.*Remedy"):
        GradientStats.load(folder)


def test_a_file_of_another_measurement_is_noticed(tmp_path):
    folder = tmp_path / "s"
    with ShardWriter(folder, 5) as writer:
        writer.add(piece((2, 3), seed=0))
    index = json.loads((folder / INDEX_NAME).read_text())
    piece((5,), seed=0).save(folder / "stats-00000.safetensors")
    index["shards"][0]["n_bytes"] = (folder / "stats-00000.safetensors").stat().st_size
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(StatsError, match="5 examples and 1 passes, not 5 and 2"):
        GradientStats.load(folder)


def test_memory_does_not_grow_with_the_number_of_examples(tmp_path):
    """100 examples of 3 parameters with 3000 blocks in all are 1.2 MB; 40 times as many are 48."""
    shapes = {f"{i}.weight": (1000, 2) for i in range(3)}

    def peak(n_pieces, folder):
        tracemalloc.start()
        with ShardWriter(folder, 100) as writer:
            for seed in range(n_pieces):
                writer.add(piece((5, 5), seed, shapes=shapes))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(2, tmp_path / "warm")  # imports and caches
    few, many = peak(20, tmp_path / "few"), peak(400, tmp_path / "many")
    one_file = 100 * (4 * 3000 + 8 * 3 * (1 + 2) + 40)
    assert many < 1.1 * few < 1.1 * 4 * one_file, (few, many, one_file)
    reader = ShardReader(tmp_path / "many")
    assert reader.n_examples == 4000
    for read, most in (
        (lambda: sum(p.blocks("0.weight").sum() for p in reader), 4 * one_file),
        (lambda: GradientStats.load(tmp_path / "many", blocks=False), 2 * 4000 * (8 * 9 + 40)),
    ):
        tracemalloc.start()
        read()
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert used < most, (used, most)


def test_the_writer_is_public():
    assert fg.ShardWriter is ShardWriter
    assert fg.ShardReader is ShardReader
