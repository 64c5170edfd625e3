"""What schema 1.2 adds to a blueprint: provenance of the data, fits within submodules, the
resources' k* with the paper's beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fastgrad as fg
from fastgrad.blueprint import Blueprint
from fastgrad.errors import BlueprintError
from fastgrad.resources import OVER_AGGRESSIVE_SHARE
from tests.test_selection import SHAPES, synthetic_stats

WIDE = {"embed.weight": (400, 6), "proj.weight": (120, 5), "norm.weight": (6,),
        "head.weight": (9, 4)}  # fmt: skip


def test_provenance_of_the_data():
    stats = synthetic_stats()
    stats.meta |= {
        "model_revision": "0123abc", "attention": "sdpa", "dtypes": ["torch.bfloat16"],
        "data": {"datasets": [{"name": "org/wiki", "revision": "v3", "split": "test",
                               "n_examples": 24}], "seed": 7, "command": "fastgrad probe m d"},
    }  # fmt: skip
    file = Blueprint.from_stats(stats).file
    (entry,) = file.data.datasets
    assert (entry.name, entry.revision, entry.split, entry.n_examples) == (
        "org/wiki", "v3", "test", 24)  # fmt: skip
    assert (file.data.seed, file.data.command) == (7, "fastgrad probe m d")
    assert (file.data.clip, file.data.clip_norm) == ("none", None)
    assert file.model.revision == "0123abc"
    # What is given counts, and no folder of this machine gets into the file.
    given = Blueprint.from_stats(stats, revision="main", datasets=["/srv/secret/lines.txt", "o/d"])
    assert given.file.model.revision == "main"
    assert [d.name for d in given.file.data.datasets] == ["lines.txt", "o/d"]
    for bad in ([{"revision": "x"}], [{"name": "a", "n_examples": -1}], [{"name": ""}]):
        with pytest.raises(BlueprintError, match="datasets"):
            Blueprint.from_stats(stats, datasets=bad)


def test_merged_statistics_name_all_data():
    one, other = synthetic_stats(seed=1), synthetic_stats(seed=2)
    one.meta["data"] = {"datasets": [{"name": "a", "n_examples": 24}], "seed": 1, "command": "x"}
    other.meta["data"] = {"datasets": [{"name": "b"}, {"name": "a", "n_examples": 2}], "seed": 1,
                          "command": "y"}  # fmt: skip
    data = Blueprint.from_stats(one.merge(other)).file.data
    assert [(d.name, d.n_examples) for d in data.datasets] == [("a", 26), ("b", None)]
    assert (data.seed, data.command) == (1, None)
    assert Blueprint.from_stats(one.merge(synthetic_stats(seed=3))).file.data.seed is None


def test_raw_sums_are_those_that_the_variance_follows_from():
    stats = synthetic_stats(n_batches=7)
    file = Blueprint.from_stats(stats).file
    together = stats.batch_sq.sum(0)
    for p, entry in enumerate(file.submodules):
        assert entry.batch_sum_fourth == pytest.approx((stats.batch_sq[p] ** 2).sum())
        assert entry.batch_sum_with_total == pytest.approx((stats.batch_sq[p] * together).sum())
    assert file.noise.total_sum_fourth == pytest.approx((together**2).sum())
    # Four examples of weight 1/4 in each of seven batches.
    assert file.data.weight_sum_sq == pytest.approx(7 * 4 / 16)
    assert file.data.weight_pair_sum == pytest.approx(7 * 12 / 16)
    # Beyond the range of float64 a sum is not known, and the rest is.
    loud = synthetic_stats(profile=[1e200, 1, 1, 1, 1, 1])
    entry = Blueprint.from_stats(loud).submodules[0]
    assert entry.batch_sum_fourth is None
    assert entry.grad_norm > 1e99


def test_fits_within_submodules():
    stats = synthetic_stats(WIDE, spec="row", noise=1.0)
    embed, proj, norm, head = Blueprint.from_stats(stats).submodules
    for entry in (embed, proj):
        energy = stats.block_batch_sq[entry.name] / stats.n_batches
        rows, sizes = np.sqrt(energy), np.full(energy.size, WIDE[entry.name][1])
        gamma = fg.heavytail.fit_gamma(energy, sizes, n_bootstrap=50)
        assert entry.n_blocks == rows.size
        assert entry.gamma == gamma.gamma
        assert entry.gamma_interval == list(gamma.gamma_interval)
        tail = fg.heavytail.fit_tail(rows, n_bootstrap=50)
        assert entry.rank_exponent == tail.rank_exponent
        assert entry.rank_exponent_interval == list(tail.rank_interval)
        assert (entry.rank_exponent_verdict, entry.block_fit_reason) == (tail.verdict, tail.reason)
        assert entry.rank_exponent_n_tail == tail.n_tail
    assert (norm.n_blocks, norm.gamma, norm.rank_exponent_verdict) == (None, None, None)
    assert norm.block_fit_reason == "measured as a whole: no blocks"
    assert head.n_blocks == 9
    assert 0 < head.gamma < 1
    assert (head.rank_exponent, head.rank_exponent_verdict) == (None, "too_few")
    assert "9 blocks" in head.block_fit_reason
    whole = Blueprint.from_stats(synthetic_stats(WIDE)).submodules
    assert {s.block_fit_reason for s in whole} == {"measured as a whole: no blocks"}


def test_a_power_law_within_a_submodule_is_found():
    stats = synthetic_stats({"w": (600, 2), "v": (3, 3)}, spec="row")
    norms = np.random.default_rng(0).pareto(1 / 0.7, 600) + 1  # rank exponent 0.7
    stats.block_batch_sq["w"] = norms**2 * stats.n_batches
    entry = Blueprint.from_stats(stats).submodules[0]
    low, high = entry.rank_exponent_interval
    assert low < 0.7 < high
    assert entry.rank_exponent_verdict != "rejected"
    lognormal = np.random.default_rng(0).lognormal(0, 0.5, 600)
    stats.block_batch_sq["w"] = lognormal**2 * stats.n_batches
    assert Blueprint.from_stats(stats).submodules[0].rank_exponent_verdict != "supported"


def test_k_star_with_the_papers_closed_form_beside_it():
    stats = synthetic_stats(profile=[1e4, 1e3, 10, 1, 1, 1], noise=0.1)
    blueprint = Blueprint.from_stats(stats, tokens_per_step=1000)
    tail = blueprint.file.fits.norm.tail
    energy = stats.grad_norm**2
    curve = fg.heavytail.lorenz(energy, stats.numel)
    for name, entry in blueprint.k_star.items():
        paper = entry.paper
        assert "2511.01077" in paper.label
        assert paper.rank_exponent == tail.rank_exponent
        assert paper.gamma == pytest.approx(1 / (1 + tail.rank_exponent))
        assert paper.value == pytest.approx(
            paper.gamma * entry.fixed / (entry.per_param * (1 - paper.gamma))
        )
        assert paper.gamma != entry.gamma, name  # it is shown, and not used
        assert entry.curve_share == pytest.approx(curve.share_at(entry.value))
        assert paper.curve_share == pytest.approx(curve.share_at(min(paper.value, 1.0)))
        assert entry.over_aggressive_share == OVER_AGGRESSIVE_SHARE
        assert entry.over_aggressive == (entry.curve_share < OVER_AGGRESSIVE_SHARE)
        assert entry.mode == "counted"
    assert "the paper's closed forms" in blueprint.summary()
    alike = Blueprint.from_stats(synthetic_stats({"a": (2, 2), "b": (2, 2)}))  # no tail to fit
    assert alike.k_star["memory"].paper is None


def test_measured_resources():
    stats = synthetic_stats(profile=[1e4, 1e3, 10, 1, 1, 1])
    seconds = [(0.1, 1.11), (0.5, 1.52), (1.0, 1.99), (0.1, 1.1)]
    costs = [fg.CostModel.time(seconds, n_params=215),
             fg.CostModel.energy([(k, 80 * s) for k, s in seconds], n_params=215),
             fg.CostModel.memory(215, activation_bytes=5000)]  # fmt: skip
    blueprint = Blueprint.from_stats(stats, costs=costs)
    gamma = blueprint.file.fits.squared_norm.gamma.gamma
    assert set(blueprint.k_star) == {"memory", "flops", "time", "energy"}
    for cost in costs:
        entry, truth = blueprint.k_star[cost.resource], fg.k_star(gamma, cost)
        assert (entry.value, entry.reason, entry.unit) == (truth.value, truth.reason, cost.unit)
        assert (entry.mode, entry.n_points, entry.residual) == (
            cost.mode, cost.n_points, cost.residual)  # fmt: skip
    # They stay in a blend, which is about the same machine and model.
    mixed = blueprint.blend(synthetic_stats(seed=3))
    assert mixed.k_star["time"].fixed == blueprint.k_star["time"].fixed
    assert mixed.k_star["memory"].fixed == 430 + 5000
    assert json.loads(mixed.to_json())["k_star"]["energy"]["unit"] == "J"
    with pytest.raises(BlueprintError, match=r"time is of a model with 99 parameters.*Remedy"):
        Blueprint.from_stats(stats, costs=[fg.CostModel.time(seconds, n_params=99)])
    with pytest.raises(BlueprintError, match="two costs of time"):
        Blueprint.from_stats(stats, costs=[costs[0], costs[0]])


def test_an_older_file_is_read_and_written_on(tmp_path):
    """A file as version 1.1 wrote it has none of the new keys."""
    from tests.test_blueprint import write

    content = json.loads(Blueprint.from_stats(synthetic_stats(), domain_tags=["a"]).to_json())
    content["schema_version"] = "1.1.0"
    new = {"n_blocks", "gamma", "gamma_interval", "rank_exponent", "rank_exponent_interval",
           "rank_exponent_verdict", "rank_exponent_n_tail", "block_fit_reason",
           "batch_sum_fourth", "batch_sum_with_total"}  # fmt: skip
    for entry in content["submodules"]:
        for key in new:
            del entry[key]
    for key in ("datasets", "clip", "clip_norm", "seed", "command", "weight_sum_sq",
                "weight_pair_sum"):  # fmt: skip
        del content["data"][key]
    for entry in content["k_star"].values():
        for key in ("paper", "curve_share", "over_aggressive_share", "mode", "n_points",
                    "residual"):  # fmt: skip
            del entry[key]
    del content["model"]["revision"], content["merge"], content["domains"]
    del content["noise"]["total_sum_fourth"]
    old = Blueprint.from_pretrained(write(tmp_path, json.dumps(content)))
    old.summary()
    assert old.staleness(synthetic_stats(seed=4)).n_compared == len(SHAPES)
    assert old.blend(synthetic_stats(seed=4)).k_star["memory"].paper is not None
    assert json.loads(old.to_json())["schema_version"] == "1.1.0"
