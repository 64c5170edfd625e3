"""Blueprint: content, files, hostile files, staleness, blend."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgrad as fg
from fastgrad import staleness
from fastgrad.blueprint import Blueprint
from fastgrad.blueprint_provenance import public_command
from fastgrad.blueprint_schema import (
    MAX_BYTES,
    canonical_json,
    json_schema,
    parse_blueprint,
    parse_json,
)
from fastgrad.choosing import select
from fastgrad.errors import BlueprintError, SelectionError
from fastgrad.stats import GradientStats
from tests.models import MODELS, batch_of, randomised
from tests.test_selection import SHAPES, Toy, synthetic_stats

ROOT = Path(__file__).parent.parent
NAME, VECTORS = "gradient_blueprint.json", "gradient_blueprint.safetensors"
MANY = {f"layers.{i}.weight": (3 + i % 7, 4 + i % 5) for i in range(30)}
PROFILE = np.random.default_rng(1).lognormal(0, 1.5, 30)


def made(spec="module", **kwargs):
    stats = synthetic_stats(spec=spec, **kwargs)
    return Blueprint.from_stats(stats, domain_tags=["toy"], created="2025-01-02", command="test")


@pytest.fixture(scope="module")
def text():
    return made().to_json()


def write(tmp_path, content):
    path = tmp_path / NAME
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def edited(text, change):
    content = json.loads(text)
    change(content)
    return json.dumps(content)


# -- content -------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_statistics():
    stats = synthetic_stats(spec="2x3", seed=7)
    blueprint = Blueprint.from_stats(stats, domain_tags=["a", "b"], name_or_path="org/toy")
    assert blueprint.names == stats.names
    assert blueprint.domain_tags == ["a", "b"]
    info, data = blueprint.file.model, blueprint.file.data
    assert (info.class_name, info.name_or_path, info.n_parameters) == ("Toy", "org/toy", 215)
    assert info.weights_hash == stats.meta["weights_hash"]
    assert (data.n_examples, data.n_batches, data.n_label_tokens) == (24, 6, 216)
    assert data.example_scale == "example_mean"
    for p, s in enumerate(blueprint.submodules):
        assert s.batch_sum_sq == pytest.approx(stats.batch_sq[p].sum())
        assert s.example_sum_sq == pytest.approx(stats.sq[p].sum())
        assert s.example_sum_norm == pytest.approx(np.sqrt(stats.sq[p]).sum())
        assert s.example_mean_norm == pytest.approx(4 * np.sqrt(stats.sq[p]).mean())
        assert s.example_median_norm == pytest.approx(4 * np.median(np.sqrt(stats.sq[p])))
        assert s.grad_norm == pytest.approx(stats.grad_norm[p])
        assert s.rms == pytest.approx(stats.grad_norm[p] / math.sqrt(stats.numel[p]))
        assert s.relative_norm == pytest.approx(stats.grad_norm[p] / stats.weight_norm[p])
        assert s.signal_sq == pytest.approx(stats.signal_sq[p])
        assert (s.n_batches, s.n_examples, s.coverage) == (6, 24, "exact")
    assert sum(s.share for s in blueprint.submodules) == pytest.approx(1)
    assert blueprint.noise.signal == pytest.approx(stats.signal_sq.sum())
    for name, values in blueprint.block_sq.items():
        np.testing.assert_allclose(values, stats.block_grad_norm(name) ** 2)
    assert set(blueprint.block_sq) == {n for n, s in SHAPES.items() if len(s) == 2}


def test_fits_and_k_star():
    stats = synthetic_stats(profile=[1e4, 1e3, 10, 1, 1, 1], noise=0.1)
    blueprint = Blueprint.from_stats(stats, tokens_per_step=1000)
    energy = stats.grad_norm**2
    fits = blueprint.file.fits
    for fit, mass in ((fits.norm, np.sqrt(energy)), (fits.squared_norm, energy)):
        curve = fg.heavytail.lorenz(mass, stats.numel)
        np.testing.assert_allclose(fit.lorenz.share, curve.share_at(fit.lorenz.k))
        assert len(fit.lorenz.k) == 33
        assert fit.gamma.gamma == fg.heavytail.fit_gamma(mass, stats.numel).gamma
        assert fit.tail.verdict == "too_few"
    memory = fg.k_star(fits.squared_norm.gamma.gamma, fg.CostModel.memory(215))
    flops = fg.k_star(fits.squared_norm.gamma.gamma, fg.CostModel.flops(215, 1000))
    for name, expected in (("memory", memory), ("flops", flops)):
        entry = blueprint.k_star[name]
        assert (entry.value, entry.reason) == (expected.value, expected.reason)
        assert (entry.fixed, entry.per_param) == (expected.fixed, expected.per_param)
        assert entry.clamped == expected.clamped
    # Finer blocks show more concentration, and k* says that it used them.
    fine = made("row", noise=2.0)
    assert fine.file.block_fit.gamma.gamma < fine.file.fits.squared_norm.gamma.gamma
    assert fine.k_star["memory"].granularity == "row"
    assert fine.k_star["memory"].gamma == fine.file.block_fit.gamma.gamma


def test_unknown_is_null_not_zero():
    stats = synthetic_stats(n_batches=1, per_batch=3)
    stats.sq[2] = np.nan
    stats.label_tokens[:] = -1
    stats.mean_factor[:] = np.nan
    blueprint = Blueprint.from_stats(stats)
    entry = blueprint.submodules[2]
    assert entry.example_sum_sq is None
    assert entry.example_mean_norm is None
    assert entry.grad_norm > 0
    assert entry.share_variance is None  # one batch
    assert blueprint.noise.noise_scale is None
    assert "loss reduction" in blueprint.noise.noise_scale_reason
    assert blueprint.file.data.n_label_tokens is None
    assert blueprint.file.data.example_scale == "contribution"
    assert set(blueprint.k_star) == {"memory"}  # FLOPs need a number of tokens
    assert blueprint.split_half is None
    assert "NaN" not in blueprint.to_json()


def test_without_per_example_norms():
    stats = synthetic_stats()
    stats.sq, stats.batch = np.zeros((6, 0)), np.zeros(0, np.int64)
    stats.label_tokens, stats.mean_factor = np.zeros(0, np.int64), np.zeros(0)
    blueprint = Blueprint.from_stats(stats)
    assert blueprint.submodules[0].example_sum_sq is None
    assert blueprint.noise.noise_scale_reason == "per-example norms were not measured"
    assert blueprint.split_half.basis == "batches"


def test_dead_and_unmeasured_parameters():
    part = synthetic_stats({n: s for n, s in SHAPES.items() if n != "embed.weight"},
                           profile=[1, 1e-22, 1, 1, 1])  # fmt: skip
    part.meta["n_model_parameters"] = 215
    blueprint = Blueprint.from_stats(part, Toy())
    assert blueprint.names == list(SHAPES)  # in the model's order
    assert blueprint.dead == ["layers.0.norm.weight"]
    frozen = blueprint.submodules[0]
    assert (frozen.coverage, frozen.grad_norm, frozen.share) == ("frozen", None, None)
    assert blueprint.file.fits.norm.tail.n_dead == 1  # the frozen one is not dead
    # k is a fraction of all parameters: what was not measured has mass zero.
    curve = blueprint.file.fits.squared_norm.lorenz
    at = np.interp(143 / 215, curve.k, curve.share)
    assert at > 0.999
    without_model = Blueprint.from_stats(part)
    assert without_model.n_model_parameters == 215
    np.testing.assert_allclose(without_model.file.fits.squared_norm.lorenz.share, curve.share)
    assert select(blueprint, fraction=1.0).names == list(SHAPES)[1:]
    with pytest.raises(SelectionError, match="pass model"):
        select(without_model, fraction=0.5)


def test_from_stats_refuses():
    stats = synthetic_stats()
    with pytest.raises(BlueprintError, match=r"head\.weight was measured .*lacks it"):
        Blueprint.from_stats(stats, Toy({"embed.weight": (12, 6)} | {
            n: s for n, s in SHAPES.items() if n != "head.weight"}))  # fmt: skip
    with pytest.raises(BlueprintError, match="list; write"):
        Blueprint.from_stats(stats, domain_tags="python")
    with pytest.raises(BlueprintError, match="created"):
        Blueprint.from_stats(stats, created="yesterday")
    with pytest.raises(BlueprintError, match="no gradient was recorded"):
        Blueprint.from_stats(synthetic_stats(profile=[0] * 6))
    stats.batch_sq[1, 2] = np.inf
    with pytest.raises(BlueprintError, match=r"layers\.0\.proj\.weight is not finite"):
        Blueprint.from_stats(stats)
    with pytest.raises(BlueprintError, match="no backward pass"):
        Blueprint.from_stats(synthetic_stats(n_batches=0))


def test_checkpoints():
    stats = synthetic_stats()
    norms = dict(zip(stats.names, stats.grad_norm.tolist(), strict=True))
    blueprint = Blueprint.from_stats(
        stats,
        checkpoints=[
            ("50%", 10, stats),
            {"label": "80%", "step": 16, "tokens_seen": 999, "grad_norm": norms, "lr": 2.5},
        ],
    )
    first, second = json.loads(blueprint.to_json())["checkpoints"]
    assert first == {
        "label": "50%", "step": 10, "tokens_seen": None, "grad_norm": norms, "fraction": None,
        "loss": None, "n_batches": 6, "n_examples": 24, "weights_hash": "sha256:" + "a" * 64,
    }  # fmt: skip
    assert second["lr"] == 2.5  # an unknown key is kept
    with pytest.raises(BlueprintError, match="no submodule"):
        Blueprint.from_stats(stats, checkpoints=[{"label": "x", "grad_norm": {"y": 1.0}}])
    with pytest.raises(BlueprintError, match="needs grad_norm"):
        Blueprint.from_stats(stats, checkpoints=[{"label": "x"}])


def test_provenance_shows_no_folders():
    line = public_command([
        "/home/alice/.venv/bin/fastgrad", "--data=/mnt/secret data/x.txt", "~alice/y", "org/name",
        "https://me:pw@host/a/b", "C:\\Users\\alice\\z.txt", "sub/dir/file", "data:/srv/q", "file:///home/alice/w",
    ])  # fmt: skip
    for secret in ("alice", "home", "mnt", "secret", "srv", "Users", "pw"):
        assert secret not in line
    for kept in ("fastgrad", "--data=x.txt", "org/name", "https://host/a/b", "z.txt",
                 "sub/dir/file", "data:q"):  # fmt: skip
        assert kept in line
    stats = synthetic_stats()
    for given_name, shown in (("/home/alice/model-x", "model-x"), ("./out/m", "m"), ("o/m", "o/m")):
        stats.meta["name_or_path"] = given_name
        assert Blueprint.from_stats(stats).file.model.name_or_path == shown
    assert "/" + "home" not in Blueprint.from_stats(stats).to_json()


def test_scores():
    blueprint = made("row")
    rows = blueprint.scores("rms")
    assert {n: v.size for n, v in rows.items()} == {
        n: s[0] if len(s) == 2 else 1 for n, s in SHAPES.items()
    }
    whole = blueprint.scores("norm", "module")
    assert [whole[s.name][0] for s in blueprint.submodules] == pytest.approx(
        [s.grad_norm for s in blueprint.submodules]
    )
    relative = blueprint.scores("relative", "module")
    assert relative["head.weight"][0] == pytest.approx(blueprint.submodules[-1].relative_norm)
    with pytest.raises(SelectionError, match="'row', not 'column'"):
        blueprint.scores("rms", "column")
    with pytest.raises(SelectionError, match="not a gradient norm"):
        blueprint.scores("alignment")


def test_summary():
    text = made(profile=[1e4, 1e3, 10, 1, 1, 1]).summary()
    for part in ("Toy", "215 parameters", "toy", "24 examples", "k*", "for memory", "for flops",
                 "too_few", "embed.weight", "Spearman"):  # fmt: skip
        assert part in text
    assert text.index("embed.weight") < text.index("head.weight")  # highest rms first


# -- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["module", "row", "2x3"])
def test_round_trip_is_byte_equal(tmp_path, spec):
    blueprint = made(spec)
    path = blueprint.save_pretrained(tmp_path / "a")
    assert path.name == NAME
    assert path.with_name(VECTORS).exists() == (spec != "module")
    for source in (tmp_path / "a", path):
        again = Blueprint.from_pretrained(source)
        again.save_pretrained(tmp_path / "b")
        for file in (tmp_path / "a").iterdir():
            assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
        for ranking in ("norm", "rms"):
            one, two = blueprint.scores(ranking), again.scores(ranking)
            assert all(np.array_equal(one[n], two[n]) for n in one)
    assert made(spec).to_json() == blueprint.to_json()  # equal content, equal bytes
    assert path.read_text().endswith("}\n")


def test_an_old_vector_file_goes(tmp_path):
    made("row").save_pretrained(tmp_path)
    made("module").save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BlueprintError, match="cannot be written"):
        made().save_pretrained(tmp_path / "file")


def test_unknown_keys_survive(tmp_path, text):
    def add(d):
        d["schema_version"] = "1.7.3"  # a newer minor version only adds keys
        d["future"] = {"b": [1, 2.5, None], "a": "ä"}
        d["submodules"][0]["curvature"] = 0.25
        d["k_star"]["energy"] = d["k_star"]["memory"] | {"joules": 3}
        d["fits"]["norm"]["gamma"]["extra"] = True

    path = write(tmp_path, edited(text, add))
    blueprint = Blueprint.from_pretrained(path)
    assert json.loads(blueprint.to_json()) == json.loads(path.read_text())
    once = Blueprint.from_pretrained(blueprint.save_pretrained(tmp_path / "x"))
    assert once.to_json() == blueprint.to_json()


@pytest.mark.parametrize(
    ("version", "message"),
    [("2.0.0", r"newer than this library.*Remedy"), ("10.1.0", "newer"), ("0.9.0", "never"),
     ("1.0", "schema_version"), ("1.0.0-beta", "schema_version"), (1, "schema_version"),
     (None, "schema_version"), ("9" * 5000 + ".0.0", "schema_version")],
)  # fmt: skip
def test_versions(tmp_path, text, version, message):
    path = write(tmp_path, edited(text, lambda d: d.update(schema_version=version)))
    with pytest.raises(BlueprintError, match=message):
        Blueprint.from_pretrained(path)


def set_at(*keys):
    """A change of the parsed file: the last of ``keys`` is the value put at the others."""
    *path, last, value = keys

    def change(d):
        for key in path:
            d = d[key]
        d[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("submodules"), "submodules"),
        (set_at("submodules", [], ), "submodules"),
        (lambda d: d["submodules"].append(d["submodules"][0]), "listed twice"),
        (set_at("submodules", 0, "grad_norm", 3.0), "contradicts"),
        (set_at("submodules", 0, "grad_norm", -3.0), "grad_norm"),
        (set_at("submodules", 0, "grad_norm", "3"), "grad_norm"),
        (set_at("submodules", 0, "shape", [2**40, 2**40]), "more than"),
        (set_at("submodules", 0, "shape", [2**64]), "shape"),
        (set_at("submodules", 0, "shape", [1.0]), "shape"),
        (set_at("submodules", 0, "shape", [1] * 17), "shape"),
        (set_at("submodules", 0, "coverage", "perfect"), "coverage"),
        (set_at("submodules", 0, "n_batches", 0), "no batch"),
        (set_at("model", "weights_hash", "md5:00"), "weights_hash"),
        (set_at("model", "n_parameters", 214), "more than model.n_parameters"),
        (set_at("dead", ["nothing"]), "no submodule"),
        (set_at("k_star", "memory", "value", 0.0), "k_star"),
        (set_at("fits", "norm", "lorenz", "k", [0.0]), "differ in length"),
        (set_at("data", "n_examples", True), "n_examples"),
        (set_at("block_vectors", {"file": "../x.safetensors", "sha256": "0" * 64, "spec": "row"}),
         "block_vectors"),
    ],
)  # fmt: skip
def test_wrong_content(tmp_path, text, change, message):
    path = write(tmp_path, edited(text, change))
    with pytest.raises(BlueprintError, match=message):
        Blueprint.from_pretrained(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "usable"),
        (b"[]", "not an object"),
        (b"\xff\xfe", "usable"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"a":' + b"[" * 70 + b"]" * 70 + b"}", "nested"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "not JSON"),
        (b'{"a": 1e999}', "overflows"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digit"),
        (b'{"a": 1, "a": 2}', "repeated"),
    ],
)
def test_strict_json(tmp_path, content, message):
    with pytest.raises(BlueprintError, match=message):
        Blueprint.from_pretrained(write(tmp_path, content))


def test_missing_and_huge_files(tmp_path):
    for path in (tmp_path, tmp_path / "none", "a\0b", "/dev/zero"):
        with pytest.raises(BlueprintError):
            Blueprint.from_pretrained(path)
    path = tmp_path / NAME
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a sparse file: it takes no space
    with pytest.raises(BlueprintError, match="larger than"):
        Blueprint.from_pretrained(path)


def test_every_truncation(tmp_path, text):
    for cut in range(0, len(text) - 2, 97):
        with pytest.raises(BlueprintError):
            Blueprint.from_pretrained(write(tmp_path, text[:cut]))


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from([10**400, -1, 2**63, 1e308, "sha256:", "1.0.0", 5e-324]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)


def _places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else (
        list(enumerate(value))[:2] if isinstance(value, list) else ()
    )  # fmt: skip
    for key, child in items:
        yield from _places(child, (*path, key))


def _use(blueprint):
    """What reads a blueprint must not fail on one that was accepted."""
    blueprint.summary()
    scores = blueprint.scores("rms", "module")
    assert not any(np.isnan(v).any() for v in scores.values())
    assert Blueprint(parse_blueprint(blueprint.to_json().encode())).to_json() == blueprint.to_json()
    blueprint.staleness(synthetic_stats())
    with contextlib.suppress(SelectionError):  # it may have become a blueprint of very little
        select(blueprint, fraction=0.5)
    with contextlib.suppress(BlueprintError):
        blueprint.blend(synthetic_stats())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fuzz_changed_values(tmp_path_factory, text, data):
    content = json.loads(text)
    places = list(_places(content))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places))
        if not path:
            continue
        target = content
        try:
            for key in path[:-1]:
                target = target[key]
            if data.draw(st.booleans()):
                target[path[-1]] = data.draw(values)
            else:
                del target[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change removed the place
    path = write(tmp_path_factory.mktemp("f"), json.dumps(content))
    try:
        blueprint = Blueprint.from_pretrained(path)
    except BlueprintError:
        return
    _use(blueprint)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_fuzz_changed_bytes(tmp_path_factory, text, data):
    raw = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        end = at + data.draw(st.integers(0, 30))
        raw[at:end] = data.draw(st.binary(max_size=10) | st.sampled_from(
            [b"NaN", b"1e999", b"[" * 500, b"\\ud800", b'"', b"}", b"-0", b"null"]))  # fmt: skip
    path = write(tmp_path_factory.mktemp("f"), bytes(raw))
    try:
        blueprint = Blueprint.from_pretrained(path)
    except BlueprintError:
        return
    _use(blueprint)


def test_damaged_vectors(tmp_path):
    path = made("row").save_pretrained(tmp_path)
    vectors = path.with_name(VECTORS)
    whole = vectors.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", whole[:-1] + b"x"):
        vectors.write_bytes(damaged)
        with pytest.raises(BlueprintError, match="damaged or belongs to another"):
            Blueprint.from_pretrained(path)
    vectors.unlink()
    with pytest.raises(BlueprintError, match=r"no file gradient_blueprint\.safetensors"):
        Blueprint.from_pretrained(path)


def _with_vectors(path, raw, spec="row"):
    """The JSON file at ``path`` made to name ``raw`` with its right hash."""
    import hashlib

    path.with_name(VECTORS).write_bytes(raw)
    content = json.loads(path.read_text())
    content["block_vectors"] = {
        "file": VECTORS, "sha256": hashlib.sha256(raw).hexdigest(), "spec": spec,
    }  # fmt: skip
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("arrays", "spec", "message"),
    [
        ({"head.weight": np.ones(6)}, "row", r"shape \(6,\)"),
        ({"head.weight": np.ones(7, np.float32)}, "row", "float32"),
        ({"head.weight": -np.ones(7)}, "row", "negative"),
        ({"head.weight": np.full(7, np.nan)}, "row", "NaN"),
        ({"other": np.ones(7)}, "row", "no submodule"),
        ({"head.weight": np.ones(7)}, "rows", "granularity"),
    ],
)
def test_hostile_vectors_with_a_right_hash(tmp_path, arrays, spec, message):
    from safetensors.numpy import save

    path = made().save_pretrained(tmp_path)
    _with_vectors(path, save(arrays), spec)
    with pytest.raises(BlueprintError, match=message):
        Blueprint.from_pretrained(path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=120))
def test_fuzz_vectors_with_a_right_hash(tmp_path_factory, text, raw):
    path = write(tmp_path_factory.mktemp("f"), text)
    _with_vectors(path, raw)
    with pytest.raises(BlueprintError):
        Blueprint.from_pretrained(path)


def test_canonical_json():
    assert canonical_json({"b": -0.0, "a": [1, 0.1]}) == (
        '{\n  "a": [\n    1,\n    0.1\n  ],\n  "b": 0.0\n}\n'
    )
    assert parse_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        parse_json(b'{"a": "\\ud800"}')
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"a": math.nan})


def test_schema_file_is_the_generated_one():
    committed = (ROOT / "docs" / "blueprint.schema.json").read_text()
    assert committed == json_schema(), "run: fastgrad blueprint schema > docs/blueprint.schema.json"
    assert json.loads(committed)["properties"]["submodules"]["items"]["$ref"].endswith("Submodule")


def test_blueprint_and_heavytail_need_no_torch(tmp_path):
    made("row").save_pretrained(tmp_path)
    code = (
        "import sys, fastgrad.heavytail\n"
        "from fastgrad.blueprint import Blueprint\n"
        "from fastgrad.choosing import select\n"
        f"b = Blueprint.from_pretrained({str(tmp_path)!r}); b.summary()\n"
        "select(b, fraction=0.5)\n"
        "bad = [m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# -- verify --------------------------------------------------------------------------------------


def test_verify():
    model = Toy()
    stats = synthetic_stats(weights_hash=fg.weights_hash(model))
    blueprint = Blueprint.from_stats(stats)
    blueprint.verify(model)
    with torch.no_grad():
        model.embed.weight[0, 0] += 1
    with pytest.raises(BlueprintError) as caught:
        blueprint.verify(model)
    assert fg.weights_hash(model) in str(caught.value)
    assert stats.meta["weights_hash"] in str(caught.value)
    with pytest.raises(BlueprintError, match=r"head\.weight has shape"):
        blueprint.verify(Toy({**SHAPES, "head.weight": (5, 7)}))
    with pytest.raises(BlueprintError, match="this model lacks"):
        blueprint.verify(torch.nn.Linear(2, 2))
    with pytest.raises(BlueprintError, match="217 parameters"):
        blueprint.verify(Toy({**SHAPES, "extra.weight": (2,)}))
    with pytest.raises(BlueprintError, match="meta device"):
        blueprint.verify(Toy().to("meta"))
    with pytest.raises(BlueprintError, match="no hash"):
        Blueprint.from_stats(synthetic_stats(weights_hash=None)).verify(model)


# -- staleness -----------------------------------------------------------------------------------


def sample(seed, n_batches=16, profile=PROFILE, noise=0.5, weights="a"):
    return synthetic_stats(MANY, profile=profile, n_batches=n_batches, noise=noise, seed=seed,
                           weights_hash="sha256:" + weights * 64)  # fmt: skip


def test_fresh_drifted_and_different():
    released = Blueprint.from_stats(sample(0))
    rng = np.random.default_rng(9)
    same = released.staleness(sample(1))
    assert same.verdict == "fresh"
    assert same.weights_match is True
    assert same.n_compared == 30
    shifted = released.staleness(sample(1, profile=PROFILE * rng.lognormal(0, 1.5, 30)))
    assert shifted.verdict == "drifted"
    assert "Spearman" in shifted.reason
    assert shifted.spearman < min(shifted.local.spearman, shifted.released.spearman) - 0.1
    # The same ranks with other weights are still fresh, and the reason says that they differ.
    tuned = released.staleness(sample(1, weights="b"))
    assert (tuned.verdict, tuned.weights_match) == ("fresh", False)
    assert "weights differ" in tuned.reason
    other = released.staleness(sample(1, profile=PROFILE[::-1], weights="b"))
    assert other.verdict == "different model"
    assert "chance" in other.reason
    # Ranks at chance level on the very same weights are a matter of data, not of the model.
    assert released.staleness(sample(1, profile=PROFILE[::-1])).verdict == "drifted"
    assert json.loads(json.dumps(same.to_dict()))["local"]["basis"] == "batches"


def test_other_names_or_shapes_are_a_different_model():
    released = Blueprint.from_stats(sample(0))
    for shapes, message in (
        ({**MANY, "new.weight": (3, 3)}, "'new.weight' is not in the blueprint"),
        ({**MANY, "layers.3.weight": (9, 9)}, "layers.3.weight has shape (9, 9)"),
    ):
        found = released.staleness(synthetic_stats(shapes))
        assert found.verdict == "different model"
        assert found.spearman is None
        assert message in found.reason


def test_sample_too_small():
    released = Blueprint.from_stats(sample(0, profile=None, noise=0.01))
    one = released.staleness(synthetic_stats(MANY, n_batches=1, per_batch=2))
    assert one.verdict == "sample too small"
    assert "cannot be halved" in one.reason
    # Without any true difference between submodules the local ranks are noise.
    sizes = np.array([float(math.prod(s)) for s in MANY.values()])
    flat = released.staleness(sample(1, n_batches=8, profile=sizes))  # one rms for all
    assert flat.verdict == "sample too small"
    assert flat.local.reliability < 0.7
    # With a weak difference the remedy is a number, and that number is about right.
    weak = np.exp(0.15 * np.linspace(-1, 1, 30)) * sizes
    reference = Blueprint.from_stats(sample(0, profile=weak, n_batches=400))
    needs = [reference.staleness(sample(s, profile=weak, n_batches=8)) for s in range(1, 9)]
    small = [n for n in needs if n.verdict == "sample too small" and n.more_needed]
    assert len(small) >= 4
    enough = 8 + int(np.median([n.more_needed for n in small]))
    assert 10 < enough < 300
    assert reference.staleness(sample(99, profile=weak, n_batches=3 * enough)).verdict == "fresh"
    few = Blueprint.from_stats(synthetic_stats({"a": (3, 3), "b": (2, 2)}))
    assert "only 2 submodules" in few.staleness(synthetic_stats({"a": (3, 3), "b": (2, 2)})).reason


def test_agreement():
    a = np.arange(10.0)
    same = staleness.agreement(a, a * 3)
    assert same == pytest.approx((1.0, 1.0, 1.0))
    turned = staleness.agreement(a, -a)
    assert turned.spearman == pytest.approx(-1)
    assert turned.top_jaccard == 0
    assert staleness.agreement(a, np.r_[a[:8], 20, 11]).top_jaccard == 1  # top two: 8 and 9
    assert staleness.agreement(a, np.r_[a[:7], 20, 8, 11]).top_jaccard == pytest.approx(1 / 3)
    assert staleness.agreement(a[:4], a[:4]) is None
    assert staleness.agreement(a, np.ones(10)) is None


def test_split_half_uses_examples_where_batches_are_few():
    few = staleness.split_half(synthetic_stats(MANY, profile=PROFILE, n_batches=2, per_batch=8))
    assert (few.basis, few.n) == ("examples", 16)
    assert staleness.split_half(synthetic_stats(MANY, n_batches=1, per_batch=3)) is None
    half = staleness.SplitHalf("batches", 10, 20, 0.5, 0.5, 0.5)
    assert half.reliability == pytest.approx(2 / 3)
    # Spearman-Brown backwards: n units that give 0.7 when 5 give 0.5.
    n = half.needed(0.7)
    assert n == math.ceil(5 * 0.7 * 0.5 / (0.5 * 0.3))


# -- blend ---------------------------------------------------------------------------------------


def test_blend_by_hand():
    released = Blueprint.from_stats(synthetic_stats(seed=1), domain_tags=["a"])
    local = synthetic_stats(seed=2, profile=np.arange(1, 7) * 50)
    mixed = released.blend(local, weight=0.25, domain_tags=["b"])
    theirs, ours = synthetic_stats(seed=1).grad_norm ** 2, local.grad_norm**2
    share = 0.25 * theirs / theirs.sum() + 0.75 * ours / ours.sum()
    np.testing.assert_allclose([s.grad_norm**2 for s in mixed.submodules], share)
    np.testing.assert_allclose([s.share for s in mixed.submodules], share)
    assert mixed.domain_tags == ["a", "b"]
    assert mixed.file.blend.blend_weight == 0.25
    assert mixed.file.blend.rule == "given"
    assert mixed.file.blend.released.domain_tags == ["a"]
    assert mixed.file.blend.local.data.n_batches == 6
    assert mixed.n_batches == 12
    assert mixed.submodules[0].batch_sum_sq is None  # normalised: nothing to add up any more
    var = [released.noise.share_variance, Blueprint.from_stats(local).noise.share_variance]
    assert mixed.noise.share_variance == pytest.approx(0.25**2 * var[0] + 0.75**2 * var[1])
    # The scale of a loss does not count, only where the gradient lies.
    louder = synthetic_stats(seed=2, profile=np.arange(1, 7) * 5e6)
    again = released.blend(louder, weight=0.25)
    np.testing.assert_allclose([s.share for s in again.submodules], share)


def test_blend_ends_are_the_sources():
    released, local = Blueprint.from_stats(synthetic_stats(seed=1)), synthetic_stats(seed=2)
    for weight, source in ((1.0, released), (0.0, Blueprint.from_stats(local))):
        mixed = released.blend(local, weight=weight)
        np.testing.assert_allclose(
            [s.share for s in mixed.submodules], [s.share for s in source.submodules]
        )
        assert as_names(mixed) == as_names(source)


def as_names(source):
    return select(source, fraction=0.5).names


def test_blend_is_a_blueprint_again(tmp_path):
    released = Blueprint.from_stats(synthetic_stats(spec="row", seed=1))
    mixed = released.blend(synthetic_stats(spec="row", seed=2))
    mixed.save_pretrained(tmp_path)
    loaded = Blueprint.from_pretrained(tmp_path)
    assert loaded.to_json() == mixed.to_json()
    assert "released" in loaded.summary()
    assert loaded.staleness(synthetic_stats(seed=3)).n_compared == 6
    twice = loaded.blend(synthetic_stats(spec="row", seed=3), weight=0.5)
    assert twice.file.blend.released.share_variance == loaded.noise.share_variance
    made_from = select(twice, fraction=0.3)
    assert made_from.spec == "row"
    assert made_from.meta["source"]["n_batches"] == 18


def test_blend_of_blocks():
    one, two = synthetic_stats(spec="row", seed=1), synthetic_stats(spec="row", seed=2)
    released = Blueprint.from_stats(one)
    mixed = released.blend(two, weight=0.3)
    for name, values in mixed.block_sq.items():
        parts = [s.block_grad_norm(name) ** 2 / (s.grad_norm**2).sum() for s in (one, two)]
        np.testing.assert_allclose(values, 0.3 * parts[0] + 0.7 * parts[1])
    # Only one side has rows: they divide the parameter's blended mass.
    coarse = synthetic_stats(seed=2)
    for fine_released, a, b in ((True, one, coarse), (False, coarse, one)):
        mixed = Blueprint.from_stats(a).blend(b, weight=0.3)
        assert mixed.spec == "row", fine_released
        for s in mixed.submodules:
            if s.name in mixed.block_sq:
                rows = one.block_grad_norm(s.name) ** 2
                np.testing.assert_allclose(mixed.block_sq[s.name], s.share * rows / rows.sum())
    # Two granularities: the local one counts.
    mixed = released.blend(synthetic_stats(spec="2x3", seed=2), weight=0.3)
    assert mixed.spec == "2x3"
    assert select(mixed, fraction=0.2).spec == "2x3"


def test_blend_refuses():
    released = Blueprint.from_stats(synthetic_stats())
    with pytest.raises(BlueprintError, match=r"sha256:aaa.*sha256:bbb.*allow_other_weights"):
        released.blend(synthetic_stats(weights_hash="sha256:" + "b" * 64))
    mixed = released.blend(synthetic_stats(weights_hash="sha256:" + "b" * 64), weight=0.5,
                           allow_other_weights=True)  # fmt: skip
    assert mixed.weights_hash == "sha256:" + "b" * 64  # what is about to be trained
    other = {**SHAPES, "layers.0.proj.weight": (6, 8)}
    with pytest.raises(BlueprintError, match=r"layers\.0\.proj\.weight has shape"):
        released.blend(synthetic_stats(other))
    fewer = synthetic_stats({n: s for n, s in SHAPES.items() if n != "head.weight"})
    with pytest.raises(BlueprintError, match="180"):
        released.blend(fewer)
    fewer.meta["n_model_parameters"] = 215
    with pytest.raises(BlueprintError, match=r"head\.weight was not measured in the local"):
        released.blend(fewer)
    for weight in (-0.1, 1.1, "much", True, math.nan):
        with pytest.raises(BlueprintError, match="weight must be"):
            released.blend(synthetic_stats(), weight=weight)
    with pytest.raises(BlueprintError, match="two local batches"):
        released.blend(synthetic_stats(n_batches=1))
    assert released.blend(synthetic_stats(n_batches=1), weight=0.5).file.blend.rule == "given"


def test_share_variance_is_the_spread_over_repeated_samples():
    draws = [sample(seed, n_batches=12, noise=0.4) for seed in range(200)]
    shares = np.array([d.batch_sq.sum(1) / d.batch_sq.sum() for d in draws])
    truth = shares.var(0, ddof=1).sum()
    estimates = [staleness.share_variance(d.batch_sq).sum() for d in draws]
    assert np.mean(estimates) == pytest.approx(truth, rel=0.2)
    assert staleness.share_variance(draws[0].batch_sq[:, :1]) is None


def test_auto_weight():
    assert staleness.auto_weight(0.0, 1.0, 1.0) == 0.5
    assert staleness.auto_weight(0.0, 3.0, 1.0) == 0.75
    assert staleness.auto_weight(100.0, 1.0, 1.0) == 0.01  # another domain
    assert staleness.auto_weight(0.0, 0.0, 1.0) == 0.0
    assert staleness.auto_weight(2.0, 1.0, None) == 0.5
    assert staleness.auto_weight(0.0, 0.0, 0.0) == 0.5


@pytest.mark.parametrize("drift", [0.0, 0.3, 1.0])
def test_auto_blend_is_no_worse_than_the_better_source_by_much(drift):
    """Mean squared error against the true shares of the local domain, over repeated samples."""
    errors = []
    for seed in range(40):
        rng = np.random.default_rng(500 + seed)
        there = PROFILE * rng.lognormal(0, drift, 30)
        released, local = sample(seed, 32), sample(1000 + seed, 8, profile=there)
        r, m = (s.batch_sq.sum(1) / s.batch_sq.sum() for s in (released, local))
        w = staleness.auto_weight(
            float(((r - m) ** 2).sum()),
            float(staleness.share_variance(local.batch_sq).sum()),
            float(staleness.share_variance(released.batch_sq).sum()),
        )
        # The profile is the energy of one block, and module statistics have one per parameter.
        truth = there / there.sum()
        errors.append([((x - truth) ** 2).sum() for x in (w * r + (1 - w) * m, r, m)])
    blended, only_released, only_local = np.mean(errors, axis=0)
    assert blended <= 1.05 * only_local
    if drift == 0:  # the same data: most of what the larger sample gives
        assert blended < 0.6 * only_local
    else:  # another domain: not dragged along
        assert blended < 0.5 * only_released


# -- a real model --------------------------------------------------------------------------------


def probed(model, blocks, seeds):
    with fg.Probe(model, blocks=blocks) as probe:
        for seed in seeds:
            model.zero_grad()
            model(**batch_of(seed=seed)).loss.backward()
    return probe.stats()


def test_probe_to_selection(tmp_path):
    model = randomised(MODELS["llama-tied"])
    stats = probed(model, "module", range(6))
    stats.save(tmp_path / "stats.safetensors")
    stats = GradientStats.load(tmp_path / "stats.safetensors")
    blueprint = Blueprint.from_stats(stats, model=model, domain_tags=["noise"])
    blueprint.save_pretrained(tmp_path)
    blueprint = Blueprint.from_pretrained(tmp_path)
    blueprint.verify(model)
    assert blueprint.names == [n for n, _ in model.named_parameters()]
    assert {s.coverage for s in blueprint.submodules} == {"exact"}
    local = probed(model, "module", range(10, 16))
    assert blueprint.staleness(local).verdict == "fresh"
    chosen = select(blueprint.blend(local), model, fraction=0.3)
    assert chosen.fraction <= 0.3
    partial = fg.make_partial(model, chosen)
    assert partial.n_parameters == chosen.n_parameters
