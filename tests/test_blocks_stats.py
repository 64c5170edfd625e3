"""Block arithmetic by properties; statistics: merge, round trip, noise, damage."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastgrad as fg
from fastgrad.blocks import BlockGrid, check_specs, condensed, grid_of, in_words
from fastgrad.errors import BlockSpecError, StatsError
from tests.models import MODELS, batch_of, randomised

shapes = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)
specs = st.one_of(
    st.sampled_from(["module", "row", "column", "expert"]),
    st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda t: f"{t[0]}x{t[1]}"),
    st.integers(1, 12).map(lambda n: f"{n}x*"),
    st.integers(1, 12).map(lambda n: f"*x{n}"),
)


@given(shapes, specs)
def test_blocks_partition_the_parameter(shape, spec):
    grid = BlockGrid.of(shape, spec)
    seen = np.zeros((grid.rows, grid.cols), dtype=int)
    sizes = grid.sizes()
    assert len(sizes) == grid.n_blocks
    for block in range(grid.n_blocks):
        r0, r1, c0, c1 = grid.bounds(block)
        assert 0 < r1 - r0 <= grid.block_rows
        assert 0 < c1 - c0 <= grid.block_cols
        assert (r1 - r0) * (c1 - c0) == sizes[block]
        seen[r0:r1, c0:c1] += 1
    assert (seen == 1).all()
    assert sizes.sum() == grid.numel == int(np.prod(shape, dtype=int))
    if len(shape) < 2 or spec == "module":
        assert grid.is_whole


def test_grids_of_each_granularity():
    assert BlockGrid.of((6, 4), "row").n_blocks == 6
    assert BlockGrid.of((6, 4), "column").n_blocks == 4
    assert BlockGrid.of((6, 4), "4x3").n_blocks == 4
    assert BlockGrid.of((6, 4), "expert").n_blocks == 1
    assert BlockGrid.of((6, 4, 5), "expert").n_blocks == 6
    assert BlockGrid.of((6, 4, 5), "2x10").n_blocks == 6
    for bad in ("tile", "0x4", "4x", "-1x2", "", "4x4x4", "*x*", "x*", "0x*", "*", "head", 4):
        with pytest.raises(BlockSpecError, match="unknown block granularity"):
            BlockGrid.of((6, 4), bad)
    grid = BlockGrid.of((6, 4), "row")
    with pytest.raises(BlockSpecError, match="twice"):
        grid.check_ids([1, 1], "w")
    with pytest.raises(BlockSpecError, match="do not fit"):
        grid.check_ids([6], "w")
    with pytest.raises(BlockSpecError, match="-1"):
        grid.check_ids([-1], "w")
    with pytest.raises(BlockSpecError, match="outside"):
        grid.bounds(6)


@pytest.mark.parametrize("listed", [1, 5, 400, 9000])
def test_block_numbers_come_out_sorted(listed):
    """Few of many are sorted, many are marked."""
    grid = BlockGrid.of((10_000, 4), "row")
    ids = np.random.default_rng(listed).permutation(10_000)[:listed]
    out = grid.check_ids(ids, "w")
    assert out.dtype == np.int64
    np.testing.assert_array_equal(out, np.sort(ids))
    with pytest.raises(BlockSpecError, match="listed twice"):
        grid.check_ids([*ids, ids[-1]], "w")


def test_stripes():
    rows, cols = BlockGrid.of((7, 4), "3x*"), BlockGrid.of((7, 4), "*x3")
    assert [rows.bounds(i) for i in range(3)] == [(0, 3, 0, 4), (3, 6, 0, 4), (6, 7, 0, 4)]
    assert rows.sizes().tolist() == [12, 12, 4]
    assert [cols.bounds(i) for i in range(2)] == [(0, 7, 0, 3), (0, 7, 3, 4)]
    assert BlockGrid.of((7, 4), "9x*").is_whole
    assert BlockGrid.of((5, 2, 3), "*x3").n_blocks == 2
    assert BlockGrid.of((6, 4), "row").same_blocks(BlockGrid.of((6, 4), "1x*"))
    assert not rows.same_blocks(cols)
    with pytest.raises(BlockSpecError, match="a whole parameter is 'module'"):
        BlockGrid.of((6, 4), "*x*")
    with pytest.raises(BlockSpecError, match=r"granularity\.resolve\(model, 'head'\)"):
        BlockGrid.of((6, 4), "head")


@given(st.dictionaries(st.text(), specs, min_size=1))
def test_one_granularity_for_all_and_others_by_name(by_name):
    spec, differing = condensed(by_name)
    shape = (6, 4)
    for name, own in by_name.items():
        assert grid_of(name, shape, spec, differing) == BlockGrid.of(shape, own)
    assert check_specs(differing, by_name) == differing
    assert all(own != spec for own in differing.values())


def test_granularities_by_name_are_checked_and_told():
    assert in_words("row", None) == "row"
    told = in_words("module", {"a": "2x*", "b": "2x*", "c": "*x2"})
    assert told == "module (2 parameters 2x*, 1 parameter *x2)"
    many = {str(i): f"{i + 1}x*" for i in range(6)}
    assert in_words("module", many).endswith("1 parameter 4x*, 2 others)")
    with pytest.raises(BlockSpecError, match="'b', which is no parameter"):
        check_specs({"b": "row"}, ["a"])
    with pytest.raises(BlockSpecError, match="unknown block granularity"):
        check_specs({"a": "rows"}, ["a"])
    with pytest.raises(BlockSpecError, match="are a mapping, not list"):
        check_specs(["row"], ["a"])


def probed(model, seeds, **kwargs):
    with fg.Probe(model, **kwargs) as probe:
        for seed in seeds:
            model(**batch_of(seed=seed)).loss.backward()
            model.zero_grad()
    return probe.stats()


def test_merge_is_exact_and_round_trips(tmp_path):
    model = randomised(MODELS["llama-tied"])
    direction = {"model.norm.weight": torch.randn(32)}
    kwargs = {"blocks": "8x8", "targets": direction}
    together = probed(model, [1, 2, 3], **kwargs)
    merged = probed(model, [1], **kwargs).merge(probed(model, [2, 3], **kwargs))
    merged.save(tmp_path / "s.safetensors")
    for stats in (merged, fg.GradientStats.load(tmp_path / "s.safetensors")):
        for field in ("sq", "batch", "label_tokens", "mean_factor", "batch_sq", "weight_sq"):
            assert np.array_equal(getattr(stats, field), getattr(together, field)), field
        assert np.array_equal(stats.alignment, together.alignment)
        for name in stats.names:
            assert np.array_equal(stats.blocks(name), together.blocks(name))
            np.testing.assert_allclose(
                stats.block_grad_norm(name), together.block_grad_norm(name), rtol=1e-12
            )
        assert stats.coverage == together.coverage
        assert stats.meta == together.meta


def test_blocks_add_up_to_the_module():
    model = randomised(MODELS["gpt2"])
    whole = probed(model, [1])
    for spec in ("row", "column", "8x8", "100x3", "5x*", "*x7"):
        stats = probed(model, [1], blocks=spec)
        np.testing.assert_allclose(stats.T, whole.T, rtol=1e-4, atol=1e-6)
        for p, name in enumerate(stats.names):
            np.testing.assert_allclose(
                (stats.blocks(name) ** 2).sum(0), whole.T[p] ** 2, rtol=1e-4, atol=1e-8
            )


def test_detail_is_kept_where_asked():
    stats = probed(randomised(MODELS["llama"]), [1], blocks="8x8", detail=["*.q_proj.weight"])
    assert sorted(stats.block_sq) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    with pytest.raises(StatsError, match="no block detail"):
        stats.blocks("lm_head.weight")
    with pytest.raises(StatsError, match="was not probed"):
        stats.blocks("nope")


def test_merge_refuses_other_weights_and_other_blocks():
    model = randomised(MODELS["llama"])
    stats = probed(model, [1])
    with pytest.raises(StatsError, match="block granularity"):
        stats.merge(probed(model, [1], blocks="row"))
    other = randomised(MODELS["llama"], seed=5)
    with pytest.raises(StatsError, match="weights"):
        stats.merge(probed(other, [1]))
    with pytest.raises(StatsError, match="parameters"):
        stats.merge(probed(randomised(MODELS["gpt2"]), [1]))


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    stats = probed(randomised(MODELS["llama"]), [1])
    stats.save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(StatsError, match="damaged"):
            fg.GradientStats.load(path)
    with pytest.raises(StatsError, match="no statistics file"):
        fg.GradientStats.load(tmp_path / "none")


@pytest.mark.parametrize(
    "change",
    [
        {"names": "abc"},
        {"names": [1, 2]},
        {"names": ["a"]},
        {"shapes": [[float("inf")]]},
        {"spec": "8x"},
        {"meta": []},
        {"coverage": [{"name": "a", "status": "sure"}]},
        {"directions": ["a"]},
        {"format": "x"},
    ],
    ids=str,
)
def test_hostile_headers_are_refused(tmp_path, change):
    import json

    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / "s.safetensors"
    probed(randomised(MODELS["llama"]), [1]).save(path)
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["fastgrad"])
        arrays = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(arrays, path, metadata={"fastgrad": json.dumps(header | change)})
    with pytest.raises(StatsError):
        fg.GradientStats.load(path)
    save_file(
        arrays | {"sq": arrays["sq"][:, :1].copy()}, path, metadata={"fastgrad": json.dumps(header)}
    )
    with pytest.raises(StatsError, match="sq has shape"):
        fg.GradientStats.load(path)


class Mean(nn.Module):
    """Loss ``½|w - x|²``: the gradient of example x is ``w - x``, so its moments are known."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d))

    def forward(self, x, labels):
        return 0.5 * (x.unsqueeze(1) - self.w).square().sum((1, 2)).mean()


def test_noise_estimates_are_unbiased():
    """Against known ‖μ‖² and tr Σ; four standard errors of the mean over 400 samples."""
    torch.manual_seed(0)
    d, mu = 8, torch.linspace(0.1, 0.5, 8)
    signal, scale = [], []
    for _ in range(400):
        model = Mean(d)
        with fg.Probe(model, loss_reduction="row_mean") as probe:
            for _ in range(2):
                x = mu + torch.randn(6, d)
                model(x, torch.zeros(6, 1)).backward()
        stats = probe.stats()
        signal.append(float(stats.signal_sq[0]))
        weights = 1 / 6
        scale.append(float(stats.sq.sum() / (12 * weights**2) - stats.signal_sq[0]))
    for values, truth in ((signal, float(mu.square().sum())), (scale, float(d))):
        error = np.std(values) / len(values) ** 0.5
        assert abs(np.mean(values) - truth) < 4 * error
    assert abs(np.mean(signal) - float(mu.square().sum())) < 0.3 * float(mu.square().sum())


def test_noise_scale_and_halves():
    model = randomised(MODELS["llama"])
    stats = probed(model, range(6))
    assert stats.noise_scale > 0
    assert stats.noise_scale_by_parameter.shape == (len(stats.names),)
    reliability = stats.split_half_reliability()
    assert 0.5 < reliability <= 1
    one = copy.deepcopy(stats)
    one.sq, one.batch = one.sq[:, :1], one.batch[:1]
    one.batch_sq = one.batch_sq[:, :1]
    with pytest.raises(StatsError, match="at least two"):
        one.halves()
    unknown = probed(model, [1], loss_reduction="token_mean")
    unknown.mean_factor[:] = np.nan
    with pytest.raises(StatsError, match="loss_reduction"):
        _ = unknown.signal_sq
