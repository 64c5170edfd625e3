"""The section of a model card: what it says, and that nothing else changes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard

from fastgrad import cli
from fastgrad.blueprint import Blueprint
from fastgrad.errors import BlueprintError, MissingExtraError
from fastgrad.model_card import BEGIN, END, META_BEGIN, META_END, Emissions, Picture, write_card
from fastgrad.plots_card import card_pictures
from tests.test_hub import blueprint_of

HAND_WRITTEN = """---
license: apache-2.0      # as the base model
tags:
    - text-generation
    - "quoted"
language: [en, de]
---

# My model

Written by hand,   with trailing spaces.\x20\x20
<!-- a comment -->
"""


@pytest.fixture(scope="module")
def blueprint():
    return blueprint_of()


@pytest.fixture
def folder(blueprint, tmp_path):
    blueprint.save_pretrained(tmp_path / "my-model")
    return tmp_path / "my-model"


def outside(text: str) -> str:
    """What is not ours."""
    text = re.sub(f"{re.escape(META_BEGIN)}.*?{re.escape(META_END)}\r?\n", "", text, flags=re.S)
    return re.sub(f"\r?\n{re.escape(BEGIN)}.*?{re.escape(END)}\r?\n", "", text, flags=re.S)


@pytest.mark.parametrize("text", [
    pytest.param(HAND_WRITTEN, id="plain"),
    pytest.param(HAND_WRITTEN.replace("\n", "\r\n"), id="windows"),
    pytest.param(HAND_WRITTEN.rstrip("\n"), id="no newline at the end"),
    pytest.param("\ufeff" + HAND_WRITTEN, id="byte order mark"),
    pytest.param("---\n---\n# Empty metadata\n", id="empty metadata"),
])  # fmt: skip
def test_every_other_byte_stays(blueprint, folder, text):
    path = folder / "README.md"
    path.write_bytes(text.encode())
    assert write_card(folder, blueprint) == path
    once = path.read_bytes()
    end = "\r\n" if "\r\n" in text else "\n"
    left = outside(once.decode())
    assert left in (text, text + end)  # a last line without an end is given one
    assert ("\r\n" in text) == (b"\r\n" in once)
    assert b"\r" not in once.replace(b"\r\n", b"")
    assert not re.search(rb"(?<!\r)\n", once) or end == "\n"
    write_card(folder, blueprint)
    assert path.read_bytes() == once
    other = blueprint_of(seed=5)
    write_card(folder, other)
    assert path.read_bytes() != once
    assert outside(path.read_bytes().decode()) == left
    write_card(folder, blueprint)
    assert path.read_bytes() == once


def test_metadata_is_what_the_hub_reads(blueprint, folder):
    (folder / "README.md").write_text(HAND_WRITTEN)
    write_card(folder, blueprint, emissions=Emissions(12.5, "wall meter", hardware="1 CPU"))
    data = ModelCard.load(folder / "README.md").data.to_dict()
    before = ModelCard(HAND_WRITTEN).data.to_dict()
    assert {k: data[k] for k in before} == before
    assert data["co2_eq_emissions"] == {
        "emissions": 12.5, "source": "wall meter", "hardware_used": "1 CPU"
    }  # fmt: skip
    assert data["gradient_blueprint"] == {
        "file": "gradient_blueprint.json", "schema_version": blueprint.file.schema_version,
        "weights_hash": blueprint.weights_hash, "domain_tags": ["toy"],
    }  # fmt: skip
    assert "12.5 g of CO2" in (folder / "README.md").read_text()
    write_card(folder, blueprint)  # no longer measured: no longer said
    text = (folder / "README.md").read_text()
    assert "co2" not in text.lower()


def test_every_domain_is_named(blueprint, folder):
    tagged = [
        b.file.model_copy(update={"domain_tags": [tag], "model": blueprint.file.model})
        for b, tag in ((blueprint, "prose"), (blueprint_of(seed=5), "code"),
                       (blueprint_of(seed=6), "l|w"))
    ]  # fmt: skip
    one, *others = (Blueprint(file) for file in tagged)
    for other in others:
        one = one.with_domain(other)
    write_card(folder, one)
    text = (folder / "README.md").read_text()
    rows = {"prose": one.file, "code": one.file.domains[0], "l&#124;w": one.file.domains[1]}
    for tag, content in rows.items():
        best = max((s for s in content.submodules if s.rms), key=lambda s: s.rms)
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {tag} | ")]
        assert f"| {content.data.n_examples:,} |" in row
        assert f"`{best.name}`" in row
    data = ModelCard(text).data.to_dict()["gradient_blueprint"]
    assert data["domain_tags"] == ["prose"]
    assert data["domains"] == [["prose"], ["code"], ["l|w"]]
    write_card(folder, one)
    assert (folder / "README.md").read_text() == text


def test_a_card_of_its_own(blueprint, folder):
    write_card(folder, blueprint)
    text = (folder / "README.md").read_text()
    assert "# my-model\n" in text
    assert blueprint.file.privacy.statement in text
    assert blueprint.weights_hash in text
    for name in ("0.weight", "2.weight"):
        assert f"| `{name}` |" in text
    assert ModelCard(text).data.to_dict()["gradient_blueprint"]["domain_tags"] == ["toy"]


def test_the_hub_may_have_dropped_our_comments(blueprint, folder):
    """Tools that rewrite metadata keep its values and drop comments."""
    path = folder / "README.md"
    path.write_text(HAND_WRITTEN)
    write_card(folder, blueprint)
    card = ModelCard.load(path)
    card.save(path)
    rewritten = path.read_text()
    assert META_BEGIN not in rewritten
    write_card(folder, blueprint)  # the values are right already
    assert path.read_text() == rewritten
    with pytest.raises(BlueprintError, match="a gradient_blueprint of its own"):
        write_card(folder, blueprint_of(seed=5))


@pytest.mark.parametrize(("text", "said"), [
    ("---\nlicense: [\n---\n", "not valid"),
    ("---\n- a\n- b\n---\n", "not valid"),
    (f"# x\n{BEGIN}\n", "markers"),
    (f"{END}\n{BEGIN}\n", "markers"),
    (f"{BEGIN}{END}{BEGIN}{END}", "markers"),
    (f"---\n{META_BEGIN}\n---\n", "comments"),
    ("---\nco2_eq_emissions: 5\n---\n", "a co2_eq_emissions of its own"),
])  # fmt: skip
def test_damaged_cards_are_refused_and_left_alone(blueprint, folder, text, said):
    path = folder / "README.md"
    path.write_text(text)
    with pytest.raises(BlueprintError, match=said) as refused:
        write_card(folder, blueprint, emissions=Emissions(1, "meter"))
    assert str(path) in str(refused.value)
    assert "Remedy" in str(refused.value)
    assert path.read_text() == text


def test_no_text_at_all(blueprint, folder):
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(BlueprintError, match="not UTF-8"):
        write_card(folder, blueprint)


def test_words_of_the_file_cannot_break_the_card(blueprint, folder):
    tag = f"a | b\n{END} `x` [y](z)\n{META_END}"
    file = blueprint.file.model_copy(update={"domain_tags": [tag]})
    hostile = Blueprint(file, blueprint.spec, blueprint.block_sq, blueprint.specs)
    path = folder / "README.md"
    path.write_text(HAND_WRITTEN)
    write_card(folder, hostile)
    once = path.read_text()
    assert ModelCard(once).text.count(END) == 1
    write_card(folder, hostile)
    assert path.read_text() == once
    assert ModelCard(once).data.to_dict()["gradient_blueprint"]["domain_tags"] == [tag]


def test_emissions():
    assert Emissions.of_energy(3.6e6, 400, "meter").grams == 400  # one kWh
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(BlueprintError, match="impossible"):
            Emissions(wrong, "meter")
    with pytest.raises(BlueprintError, match="how they were measured"):
        Emissions(1, " ")


def test_without_the_package(blueprint, folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"fastgrad\[hf\]"):
        write_card(folder, blueprint)


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    def call(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main(["blueprint", "card", *map(str, args)])
        return stop.value.code, *capsys.readouterr()

    return call


def test_command_draws_and_writes(run, folder):
    code, out, err = run(folder)
    assert code == 0, err
    text = (folder / "README.md").read_text()
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)\n\n\*([^*]+)\*\n", text)
    assert [name for _, name, _ in pictures] == [
        f"gradient_blueprint_{kind}.png" for kind in ("lorenz", "rank_size", "heat_map")
    ]
    for alt, name, caption in pictures:
        data = (folder / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 100_000
        assert name in out
        assert alt.endswith(".")
        assert caption.endswith(".")
        assert alt != caption
        assert len(alt.split()) > 12  # a sentence, no label
    assert "none were given" in err
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert run(folder)[0] == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before  # idempotent, to the byte


def test_captions_state_what_the_file_holds(blueprint, tmp_path):
    lorenz, tail, heat = card_pictures(blueprint, tmp_path)
    fit, measured = blueprint.file.fits.norm.tail, blueprint.file.fits.squared_norm
    assert tail.caption.startswith(f"Power law: {fit.verdict.replace('_', ' ')}. ")
    assert fit.reason[1:] in tail.caption
    share = np.interp(0.5, measured.lorenz.k, measured.lorenz.share)
    assert int(re.search(r"half (\d+)%", lorenz.alt)[1]) == pytest.approx(100 * share, abs=1)
    assert f"k^{measured.gamma.gamma:.2f}" in lorenz.caption
    best = max(blueprint.submodules, key=lambda s: s.rms)
    assert f"highest in {best.name}." in heat.caption
    dead = blueprint.submodules[0].name
    file = blueprint.file.model_copy(update={"dead": [dead]})
    fits = file.fits.norm.tail.model_copy(update={"n": fit.n - 1, "n_dead": 1})
    norm = file.fits.norm.model_copy(update={"tail": fits})
    file = file.model_copy(update={"fits": file.fits.model_copy(update={"norm": norm})})
    _, tail, heat = card_pictures(Blueprint(file, "module", {}), tmp_path)
    grey = f"; 1 of {len(blueprint.names)} parameters have none beyond rounding (grey)."
    assert grey in heat.caption
    assert f"of {fit.n - 1} parameters" in tail.alt


def test_no_picture_of_what_was_not_released(run, blueprint, tmp_path):
    assert card_pictures(blueprint.coarse("ranks"), tmp_path) == []
    assert not list(tmp_path.iterdir())
    blueprint.coarse("ranks").save_pretrained(tmp_path)
    code, _, err = run(tmp_path)
    assert code == 0
    assert "no picture" in err
    assert "![" not in (tmp_path / "README.md").read_text()


def test_words_of_a_picture_cannot_break_the_card(blueprint, folder):
    hostile = f"a](x) *b* _c_ <!-- {END}\n\n# d"
    write_card(folder, blueprint, figures=[Picture("p.png", hostile, hostile)])
    text = (folder / "README.md").read_text()
    assert text.count(END) == 1
    assert len(re.findall(r"^!\[[^\]]+\]\(p\.png\)$", text, re.M)) == 1
    assert len(re.findall(r"^\*[^*]+\*$", text, re.M)) == 1
    assert "\n# d" not in text


def test_names_with_dollar_signs_are_no_formulas(blueprint, tmp_path):
    entries = [s.model_copy(update={"name": f"layers.{i}.a$\\frac$_{{x"})
               for i, s in enumerate(blueprint.submodules)]  # fmt: skip
    file = blueprint.file.model_copy(update={"submodules": entries, "dead": []})
    assert len(card_pictures(Blueprint(file, "module", {}), tmp_path)) == 3


def test_command_names_measured_emissions(run, folder):
    code, out, _ = run(folder, "--no-figures", "--energy", 0.5, "--carbon-intensity", 380,
                       "--source", "meter", "--location", "here", "--json")  # fmt: skip
    assert code == 0
    said = {"emissions": 190.0, "source": "meter", "geographical_location": "here"}
    assert json.loads(out) == {
        "path": str(folder / "README.md"), "figures": [], "co2_eq_emissions": said
    }  # fmt: skip
    assert ModelCard.load(folder / "README.md").data.to_dict()["co2_eq_emissions"] == said
    for options in (
        ["--energy", 1], ["--carbon-intensity", 1], ["--emissions", 1], ["--source", "x"],
        ["--location", "x"], ["--hardware", "x"], ["--training-type", "x"],
        ["--emissions", 1, "--energy", 1, "--carbon-intensity", 1, "--source", "x"],
        ["--emissions", -1, "--source", "x"],
    ):  # fmt: skip
        assert run(folder, "--no-figures", *options)[0] == 2, options
