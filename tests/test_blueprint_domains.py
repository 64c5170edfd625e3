"""Several domains in one file, the nearest one, and how two blueprints differ."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastgrad.blueprint import Blueprint
from fastgrad.blueprint_schema import DOMAIN_VECTORS_NAME, MAX_DOMAINS, validate
from fastgrad.errors import BlueprintError
from tests.test_selection import SHAPES, synthetic_stats

NAME, VECTORS = "gradient_blueprint.json", "gradient_blueprint.safetensors"
MANY = {f"layers.{i}.weight": (3 + i % 7, 4 + i % 5) for i in range(30)}
RNG = np.random.default_rng(3)
PROFILES = {tag: RNG.lognormal(0, 1.5, 30) for tag in ("prose", "code", "maths")}


def sample(tag="prose", seed=0, n_batches=16, spec="module", **kwargs):
    return synthetic_stats(MANY, profile=PROFILES[tag], n_batches=n_batches, seed=seed, spec=spec,
                           **kwargs)  # fmt: skip


def made(tag="prose", seed=0, **kwargs):
    return Blueprint.from_stats(sample(tag, seed, **kwargs), domain_tags=[tag],
                                created="2025-01-02", command="test")  # fmt: skip


def three(**kwargs):
    return made(**kwargs).with_domain(made("code", 1, **kwargs)).with_domain(made("maths", 2))


# -- in the file ---------------------------------------------------------------------------------


def test_each_domain_is_a_blueprint_of_its_own():
    whole = three()
    assert [b.domain_tags for b in whole.domains] == [["prose"], ["code"], ["maths"]]
    assert whole.domain_tags == ["prose"]
    for tag, seed in (("prose", 0), ("code", 1), ("maths", 2)):
        assert whole.domain(tag).to_json() == made(tag, seed).to_json()
    # Adding a file of several domains adds them all.
    pair = made("code", 1).with_domain(made("maths", 2))
    assert made().with_domain(pair).to_json() == whole.to_json()


@pytest.mark.parametrize("spec", ["row", "2x3"])
def test_files_and_vectors(tmp_path, spec):
    whole = three(spec=spec)
    assert whole.domain("code").spec == spec
    assert whole.domain("maths").spec == "module"
    whole.save_pretrained(tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {NAME, VECTORS, DOMAIN_VECTORS_NAME}
    again = Blueprint.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    for tag in ("prose", "code", "maths"):
        one, two = whole.domain(tag), again.domain(tag)
        assert one.to_json() == two.to_json()
        assert one.block_sq.keys() == two.block_sq.keys()
        assert all(np.array_equal(v, two.block_sq[n]) for n, v in one.block_sq.items())
    made(spec=spec).save_pretrained(tmp_path / "a")  # vectors of domains that are gone go too
    assert {p.name for p in (tmp_path / "a").iterdir()} == {NAME, VECTORS}


def test_domain_vectors_alone(tmp_path):
    """Vectors of another domain only: the primary one has none."""
    whole = made().with_domain(made("code", 1, spec="row"))
    whole.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {NAME, DOMAIN_VECTORS_NAME}
    again = Blueprint.from_pretrained(tmp_path)
    assert not again.block_sq
    assert again.domain("code").spec == "row"
    (tmp_path / DOMAIN_VECTORS_NAME).write_bytes(b"x" * 200)
    with pytest.raises(BlueprintError, match=r"domains\.safetensors is damaged"):
        Blueprint.from_pretrained(tmp_path)
    (tmp_path / DOMAIN_VECTORS_NAME).unlink()
    with pytest.raises(BlueprintError, match=r"no file gradient_blueprint\.domains"):
        Blueprint.from_pretrained(tmp_path)


def test_a_reader_of_an_older_schema_reads_the_primary_domain(tmp_path):
    """Such a reader keeps ``domains`` as a key it does not know, and loads the one vector file."""
    three(spec="row").save_pretrained(tmp_path)
    content = json.loads((tmp_path / NAME).read_text())
    assert content["schema_version"].startswith("1.")
    del content["domains"]
    (tmp_path / DOMAIN_VECTORS_NAME).unlink()
    (tmp_path / NAME).write_text(json.dumps(content))
    assert Blueprint.from_pretrained(tmp_path).to_json() == made(spec="row").to_json()
    from safetensors.numpy import load_file

    assert set(load_file(tmp_path / VECTORS)) == set(MANY)  # names alone, as ever


def test_versions_and_unknown_keys():
    content = json.loads(made("code", 1).to_json()) | {"schema_version": "1.0.0", "note": [1, "x"]}
    content["submodules"][3]["role"] = "gate"
    old = Blueprint(validate(content))
    whole = made().with_domain(old)
    assert json.loads(whole.to_json())["domains"][0]["note"] == [1, "x"]
    back = whole.domain("code")
    assert back.submodules[3].model_extra == {"role": "gate"}
    assert json.loads(back.to_json())["note"] == [1, "x"]
    # An old file that gets a domain becomes one of the present schema; a newer one stays.
    assert old.with_domain(made()).file.schema_version == made().file.schema_version
    newer = Blueprint(validate(content | {"schema_version": "1.77.0"}))
    assert newer.with_domain(made()).file.schema_version == "1.77.0"


def test_refused_domains():
    primary = made()
    for other, message in (
        (made("code", weights_hash="sha256:" + "b" * 64), r"weights sha256:aaa.*sha256:bbb"),
        (made("code", weights_hash=None), "measured on None"),
        (made("prose", 5), "does not tell it from.*Remedy"),
        (Blueprint.from_stats(sample("code")), "does not tell it from"),
        (Blueprint.from_stats(synthetic_stats(SHAPES), domain_tags=["toy"]), "215"),
    ):
        with pytest.raises(BlueprintError, match=message):
            primary.with_domain(other)
    with pytest.raises(BlueprintError, match="primary domain has no tag"):
        Blueprint.from_stats(sample()).with_domain(made("code"))
    turned = sample("code")
    turned.shapes[3] = turned.shapes[3][::-1]
    with pytest.raises(BlueprintError, match=r"layers\.3\.weight has shape"):
        primary.with_domain(Blueprint.from_stats(turned, domain_tags=["code"]))
    with pytest.raises(BlueprintError, match="no domain has the tag 'law'; there are: prose, cod"):
        three().domain("law")
    two = made("code").file.model_copy(update={"domain_tags": ["prose", "code"]})
    with pytest.raises(BlueprintError, match="2 domains have the tag 'prose'"):
        primary.with_domain(Blueprint(two)).domain("prose")


def test_a_file_whose_domains_do_not_fit():
    content = json.loads(three().to_json())
    for key, value in (("weights_hash", None), ("n_parameters", 7)):
        changed = json.loads(json.dumps(content))
        changed["domains"][1]["model"][key] = value
        with pytest.raises(ValueError, match=r"domains\.1"):
            validate(changed)
    content["domains"] = [content["domains"][0]] * (MAX_DOMAINS + 1)
    with pytest.raises(ValueError, match="domains"):
        validate(content)


# -- the nearest one -----------------------------------------------------------------------------


def test_the_nearest_domain_is_the_one_that_the_sample_is_from():
    whole = three()
    for tag in PROFILES:
        found = whole.nearest_domain(sample(tag, seed=50))
        assert found.tags == (tag,)
        assert found.verdict == "clear", found.reason
        assert found.blueprint.to_json() == whole.domain(tag).to_json()
        first, *rest = found.domains
        assert first.staleness.verdict == "fresh"
        assert first.support > 0.95
        assert all(d.staleness.spearman < first.staleness.spearman for d in rest)
        assert sum(d.support for d in found.domains) == pytest.approx(1)
        assert json.loads(json.dumps(found.to_dict()))["tags"] == [tag]


def test_two_alike_domains_are_close():
    """Both measured on the same kind of data: the sample cannot decide, and says so."""
    twin = Blueprint.from_stats(sample("prose", 7), domain_tags=["twin"])
    verdicts = [
        made().with_domain(twin).nearest_domain(sample("prose", seed)).verdict
        for seed in range(100, 110)
    ]
    assert verdicts.count("close") >= 8


def test_small_samples_and_other_models_are_undecided():
    small = three().nearest_domain(sample("code", 60, n_batches=1, per_batch=2))
    assert small.verdict == "undecided"
    assert small.tags == ("code",)  # the best guess, with no claim to certainty
    assert all(d.support is None for d in small.domains)
    assert "too few to be resampled" in small.reason
    few = three().nearest_domain(sample("code", 60, n_batches=2, per_batch=8))  # examples instead
    assert few.domains[0].support is not None
    other = three().nearest_domain(synthetic_stats(SHAPES))
    assert (other.blueprint, other.tags, other.verdict) == (None, None, "undecided")
    assert "is not in the blueprint" in other.reason
    only = made().nearest_domain(sample(seed=9))
    assert only.tags == ("prose",)
    assert "no other domain" in only.reason


# -- diff ----------------------------------------------------------------------------------------


def test_diff_of_the_same():
    found = made().diff(made())
    assert (found.identical, found.verdict, found.provenance) == (True, "identical", ())
    assert found.distance == 0
    assert found.spearman == 1


def test_diff_names_what_may_explain_a_difference():
    one = made()
    stats = sample("code", 1)
    stats.meta |= {"loss_reduction": "sum", "attention": "eager",
                   "data": {"datasets": [{"name": "org/code", "revision": "v2"}]}}  # fmt: skip
    other = Blueprint.from_stats(stats, domain_tags=["code"], created="2025-01-02", command="test")
    found = one.diff(other)
    assert found.verdict == "differ"
    named = {d.field: (d.kind, d.one, d.other) for d in found.provenance}
    assert named["data.loss_reduction"] == ("measurement", "token_mean", "sum")
    assert named["data.attention"] == ("measurement", None, "eager")
    assert named["domain_tags"] == ("data", ["prose"], ["code"])
    assert named["data.datasets"][2][0]["name"] == "org/code"
    assert "provenance.created" not in named
    for field in ("data.loss_reduction", "data.datasets"):
        assert field in found.reason
    shares = [{s.name: s.share for s in b.submodules} for b in (one, other)]
    truth = {n: shares[1][n] - shares[0][n] for n in MANY}
    assert [c.name for c in found.changes] == sorted(truth, key=lambda n: -abs(truth[n]))
    assert found.changes[0].change == pytest.approx(truth[found.changes[0].name])
    assert abs(found.changes[0].z) > 5
    assert found.distance == pytest.approx(sum(abs(x) for x in truth.values()) / 2)
    assert found.spearman == one.staleness(stats).spearman
    text = found.text()
    assert text == str(found)
    for part in ("data.loss_reduction", "token_mean -> sum", found.changes[0].name, "halves"):
        assert part in text
    assert json.loads(json.dumps(found.to_dict()))["verdict"] == "differ"


def test_diff_of_two_samples_of_the_same_data():
    found = made(seed=0).diff(made(seed=1))
    assert found.verdict == "agree"
    # Shares differ by noise, and z says so: about a twentieth is beyond two standard errors.
    z = np.array([c.z for c in found.changes])
    assert np.mean(np.abs(z) > 1.96) < 0.2
    assert "data" not in {d.kind for d in found.provenance}


def test_diff_of_other_models_and_of_little():
    other = made().diff(Blueprint.from_stats(synthetic_stats(SHAPES)))
    assert other.verdict == "different model"
    assert len(other.only_one) == 30
    assert set(other.only_other) == set(SHAPES)
    assert other.distance is None
    few = {n: (3, 3) for n in "abc"}
    pair = [Blueprint.from_stats(synthetic_stats(few, seed=s)) for s in (0, 1)]
    assert pair[0].diff(pair[1]).verdict == "unknown"
    merged = made(seed=0).merge(made(seed=1))  # says nothing on its halves
    assert merged.diff(made(seed=2)).halves_one is None
    assert merged.diff(made(seed=2).merge(made(seed=3))).verdict == "unknown"


def test_diff_renders_with_rich():
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(made().diff(made("code", 1)))
    text = console.export_text()
    assert "differ" in text
    assert "largest changes" in text
    console.file.close()
