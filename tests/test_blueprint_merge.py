"""Merging blueprints: what comes out is the blueprint of the merged statistics."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import fastgrad as fg
from fastgrad.blueprint import Blueprint
from fastgrad.errors import BlueprintError
from tests.test_selection import SHAPES, synthetic_stats

MEDIAN, HALVES = "submodules.example_median_norm", "noise.split_half_reliability"


def about(name, n, **more):
    return {"datasets": [{"name": name, "revision": "r1", "n_examples": n}], "seed": 3, **more}


def stats(seed, name="org/prose", *, n_batches=6, **kwargs):
    found = synthetic_stats(seed=seed, n_batches=n_batches, **kwargs)
    found.meta |= {"data": about(name, found.n_examples, command=f"probe {name}"),
                   "torch": "2.99", "skipped_batches": seed, "dtypes": ["torch.float32"],
                   "attention": "sdpa", "shift_labels": True}  # fmt: skip
    return found


def blueprint(found, tag="prose", **kwargs):
    return Blueprint.from_stats(found, domain_tags=[tag], created="2025-01-02", command="make",
                                **kwargs)  # fmt: skip


def close(a, b, path=""):
    """Equal up to rounding, everywhere."""
    if isinstance(a, dict):
        assert isinstance(b, dict), path
        assert set(a) == set(b), (path, set(a) ^ set(b))
        for key in a:
            close(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert isinstance(b, list), path
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{path}.{i}")
    elif isinstance(a, float) and isinstance(b, float):
        assert math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12), (path, a, b)
    else:
        assert a == b, (path, a, b)


def as_json(made):
    content = json.loads(made.to_json())
    for key in ("merge", "block_vectors"):
        content.pop(key)
    return content


@pytest.mark.parametrize("spec", ["module", "row", "2x3"])
def test_merged_is_the_blueprint_of_the_merged_statistics(spec):
    one = stats(1, spec=spec)
    other = stats(2, "org/code", spec=spec, n_batches=3, profile=np.arange(1.0, 7.0))
    merged = blueprint(one).merge(blueprint(other, "code"), created="2025-01-02", command="make")
    truth = as_json(Blueprint.from_stats(
        one.merge(other), domain_tags=["prose", "code"], created="2025-01-02", command="make"
    ))  # fmt: skip
    # What no sum can give is null, and said to be.
    assert set(merged.file.merge.not_merged) == {MEDIAN, HALVES, "data.command"}
    for entry in truth["submodules"]:
        assert entry["example_median_norm"] is not None
        entry["example_median_norm"] = None
    assert truth["noise"]["split_half_reliability"] is not None
    truth["noise"]["split_half_reliability"] = None
    close(as_json(merged), truth)
    assert merged.spec == spec
    assert set(merged.block_sq) == set(one.block_batch_sq)
    for name, values in merged.block_sq.items():
        np.testing.assert_allclose(values, one.merge(other).block_grad_norm(name) ** 2)
    assert [d.name for d in merged.file.data.datasets] == ["org/prose", "org/code"]


def test_the_order_does_not_matter_and_sources_are_flat():
    a, b, c = (blueprint(stats(s, n_batches=2 + s), f"t{s}") for s in (1, 2, 3))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    assert [s.domain_tags for s in left.file.merge.sources] == [["t1"], ["t2"], ["t3"]]
    assert left.file.merge.sources == right.file.merge.sources
    close(json.loads(left.to_json()), json.loads(right.to_json()))
    for s, t in zip(a.merge(b).submodules, b.merge(a).submodules, strict=True):
        assert s.share == pytest.approx(t.share, rel=1e-12)
        assert s.share_variance == pytest.approx(t.share_variance, rel=1e-9)
    # The same data set on both sides is one, with all its examples.
    (entry,) = left.file.data.datasets
    assert (entry.name, entry.n_examples) == ("org/prose", 4 * (3 + 4 + 5))


def test_a_merged_blueprint_is_one_again(tmp_path):
    merged = blueprint(stats(1, spec="row")).merge(blueprint(stats(2, spec="row")))
    merged.save_pretrained(tmp_path)
    again = Blueprint.from_pretrained(tmp_path)
    assert again.to_json() == merged.to_json()
    assert fg.select(again, fraction=0.3).spec == "row"
    assert again.staleness(stats(3, spec="row")).n_compared == len(SHAPES)
    assert again.blend(stats(4, spec="row")).file.blend.released.share_variance > 0


def test_missing_in_one_is_missing_in_both():
    one, other = stats(1), stats(2)
    other.sq[2] = np.nan
    other.coverage_list[2] = fg.Coverage(other.names[2], "missing", "a custom function")
    merged = blueprint(one).merge(blueprint(other))
    entry = merged.submodules[2]
    assert (entry.coverage, entry.coverage_reason) == ("missing", "a custom function")
    assert (entry.example_sum_sq, entry.example_mean_norm, entry.n_examples) == (None, None, 0)
    assert entry.signal_sq is None
    assert entry.grad_norm == pytest.approx(
        math.sqrt((one.batch_sq[2].sum() + other.batch_sq[2].sum()) / 12)
    )
    truth = Blueprint.from_stats(one.merge(other)).noise
    assert merged.noise.noise_scale == pytest.approx(truth.noise_scale)
    assert merged.noise.signal == pytest.approx(truth.signal)


def test_single_batches_get_a_variance_by_merging():
    one, other = stats(1, n_batches=1), stats(2, n_batches=1)
    assert blueprint(one).noise.share_variance is None
    merged = blueprint(one).merge(blueprint(other))
    truth = Blueprint.from_stats(one.merge(other)).noise.share_variance
    assert merged.noise.share_variance == pytest.approx(truth, rel=1e-9)


def test_parameters_that_only_one_file_lists():
    part = {n: s for n, s in SHAPES.items() if n != "embed.weight"}
    files = []
    for seed, full in ((1, True), (2, False)):
        found = stats(seed, shapes=part)
        found.meta["n_model_parameters"] = 215
        made = blueprint(found)
        if full:
            frozen = made.submodules[0].model_copy(update={
                "name": "embed.weight", "shape": [12, 6], "coverage": "frozen",
                **dict.fromkeys(("batch_sum_sq", "grad_norm", "share", "share_variance", "rms",
                                 "relative_norm", "example_sum_sq", "signal_sq")),
            })  # fmt: skip
            everything = [frozen, *made.submodules]
            made = Blueprint(made.file.model_copy(update={"submodules": everything}))
        files.append(made)
    for one, other in (files, files[::-1]):
        merged = one.merge(other)
        assert merged.names == list(SHAPES)
        assert merged.submodules[0].coverage == "frozen"


def test_tokens_per_step_and_costs():
    one, other = stats(1), stats(2, n_batches=3)
    merged = blueprint(one).merge(blueprint(other))  # both by default: label tokens of a batch
    assert merged.k_star["flops"].tokens_per_step == 36
    told = blueprint(one, tokens_per_step=1000).merge(blueprint(other, tokens_per_step=1000))
    assert told.k_star["flops"].tokens_per_step == 1000
    mixed = blueprint(one, tokens_per_step=1000).merge(blueprint(other))
    assert "flops" not in mixed.k_star
    assert mixed.file.merge.not_merged["k_star.flops"] == "of 1000 and 36 tokens per step"
    times = [fg.CostModel.time([(0.1, 1.0 + s), (0.5, 2.0 + s), (1.0, 3.3 + s)], n_params=215)
             for s in (0, 0.5)]  # fmt: skip
    timed = blueprint(one, costs=[times[0]])
    for kept in (timed.merge(blueprint(other)), timed.merge(blueprint(other, costs=[times[0]]))):
        assert kept.k_star["time"].residual == times[0].residual
        assert kept.k_star["time"].fixed == times[0].fixed
    lost = timed.merge(blueprint(other, costs=[times[1]]))
    assert "time" not in lost.k_star
    assert "other coefficients" in lost.file.merge.not_merged["k_star.time"]


def test_checkpoints_of_the_same_weights_are_merged():
    one, other = stats(1), stats(2, n_batches=3)
    late = stats(9, weights_hash="sha256:" + "c" * 64)
    a = blueprint(one, checkpoints=[("50%", 5, one), ("100%", 10, one)])
    b = blueprint(other, checkpoints=[("50%", 5, late), ("100%", 10, other)])
    merged = a.merge(b)
    (kept,) = merged.file.checkpoints
    assert (kept.label, kept.n_batches, kept.n_examples) == ("100%", 9, 36)
    np.testing.assert_allclose(list(kept.grad_norm.values()), one.merge(other).grad_norm)
    assert merged.file.merge.not_merged["checkpoints"].startswith("1 of 2 and 2 were kept")


def test_unknown_keys_survive_where_both_have_them():
    def with_keys(made, **keys):
        content = json.loads(made.to_json())
        content |= {"campaign": "x"} | keys
        content["submodules"][0]["role"] = "embedding"
        content["data"]["language"] = keys.get("future", 0)
        from fastgrad.blueprint_schema import validate

        return Blueprint(validate(content))

    merged = with_keys(blueprint(stats(1)), future=1).merge(
        with_keys(blueprint(stats(2)), future=2)
    )
    content = json.loads(merged.to_json())
    assert content["campaign"] == "x"
    assert content["submodules"][0]["role"] == "embedding"
    assert "future" not in content
    assert "language" not in content["data"]
    assert {"future", "data.language"} <= set(content["merge"]["not_merged"])


def test_files_of_an_older_schema_lose_what_they_lack():
    from fastgrad.blueprint_schema import validate

    content = json.loads(blueprint(stats(1)).to_json())
    content["schema_version"] = "1.1.0"
    for entry in content["submodules"]:
        del entry["batch_sum_fourth"], entry["batch_sum_with_total"]
    del content["data"]["weight_sum_sq"], content["data"]["weight_pair_sum"]
    del content["noise"]["total_sum_fourth"], content["merge"], content["domains"]
    merged = Blueprint(validate(content)).merge(blueprint(stats(2)))
    lost = merged.file.merge.not_merged
    for key in ("noise.share_variance", "noise.noise_scale", "submodules.signal_sq"):
        assert "before 1.2" in lost[key]
    assert merged.noise.noise_scale is None
    assert "before 1.2" in merged.noise.noise_scale_reason
    assert merged.noise.share_variance is None
    assert merged.submodules[0].share > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.meta.update(weights_hash="sha256:" + "b" * 64), r"different weights: .*aaa"),
        (lambda s: s.meta.update(weights_hash=None), "different weights"),
        (lambda s: s.meta.update(loss_reduction="sum"), "loss reduction: token_mean and sum"),
        (lambda s: s.meta.update(shift_labels=False), "labels"),
        (lambda s: s.meta.update(n_model_parameters=300), "different models: 215 and 300"),
        (lambda s: s.meta.update(clip="per_example", clip_norm=1.0), "clipping"),
        (lambda s: s.mean_factor.fill(np.nan), "scale of per-example norms"),
    ],
)
def test_refused_by_name(change, message):
    other = stats(2)
    change(other)
    with pytest.raises(BlueprintError, match=message):
        blueprint(stats(1)).merge(blueprint(other))


def test_refused_kinds():
    one = blueprint(stats(1))
    with pytest.raises(BlueprintError, match=r"very same sums.*Remedy"):
        one.merge(blueprint(stats(1)))
    with pytest.raises(BlueprintError, match="a blend's numbers"):
        one.merge(blueprint(stats(2)).blend(stats(3)))
    with pytest.raises(BlueprintError, match="domain by domain"):
        one.with_domain(blueprint(stats(2), "code")).merge(blueprint(stats(3)))
    with pytest.raises(BlueprintError, match=r"granularity: .*embed\.weight"):
        blueprint(stats(1, spec="row")).merge(blueprint(stats(2, spec="2x3")))
    with pytest.raises(BlueprintError, match="granularity: 0 parameters in the one, 4 in"):
        one.merge(blueprint(stats(2, spec="row")))
    bare = stats(2)
    bare.sq, bare.batch = np.zeros((6, 0)), np.zeros(0, np.int64)
    bare.label_tokens, bare.mean_factor = np.zeros(0, np.int64), np.zeros(0)
    with pytest.raises(BlueprintError, match="per-example norms"):
        one.merge(blueprint(bare))
    noisy = one.file.model_copy(
        update={"privacy": one.file.privacy.model_copy(update={"mechanism": "gaussian"})}
    )
    with pytest.raises(BlueprintError, match="protected by gaussian"):
        blueprint(stats(2)).merge(Blueprint(noisy))
    fewer = {n: s for n, s in SHAPES.items() if n != "head.weight"}
    part = stats(2, shapes=fewer)
    part.meta["n_model_parameters"] = 215
    with pytest.raises(BlueprintError, match="different parameters: 6 parameters in the one"):
        one.merge(blueprint(part))
