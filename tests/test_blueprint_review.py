"""Strings of a blueprint that somebody else wrote, the share that k* keeps, and the record."""

from __future__ import annotations

import json
import sys
import types

import pytest
import yaml
from huggingface_hub import ModelCard

from fastgrad import cli
from fastgrad.blueprint import Blueprint
from fastgrad.blueprint_provenance import public_command
from fastgrad.blueprint_strict_json import canonical_json, parse_json
from fastgrad.blueprint_text import kept
from fastgrad.errors import BlueprintError
from fastgrad.model_card import META_END, write_card
from fastgrad.printable import printable, printable_lines
from tests.test_selection import synthetic_stats

ESCAPE, HOSTILE = "\x1b", "red\x1b[31m \x00\x9b2J\x7f\u202eback"


def run(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def rewritten(blueprint, folder, change):
    """The file of a blueprint after ``change`` of its JSON."""
    blueprint.save_pretrained(folder)
    path = folder / "gradient_blueprint.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("text", [
    r'{"a": "\ud800"}', r'{"\uDFFF": 1}', r'["\ude00\ud83d"]', r'[["x\ud83dy"]]', r'"\\\udbff"',
])  # fmt: skip
def test_half_of_a_surrogate_pair_is_refused(text):
    with pytest.raises(ValueError, match="half of a surrogate pair") as found:
        parse_json(text.encode())
    assert not isinstance(found.value, UnicodeError)
    str(found.value).encode("utf-8")


def test_whole_pairs_and_escaped_backslashes_are_text():
    assert parse_json(rb'["\ud83d\ude00", "\\ud800"]') == ["\U0001f600", "\\ud800"]
    assert parse_json(canonical_json(["\U0001f600", "\\ud800"]).encode())[0] == "\U0001f600"


@pytest.mark.parametrize("change", [
    pytest.param(lambda v: v["domain_tags"].append("\ud800"), id="tag"),
    pytest.param(lambda v: v.update({"x_note": ["\udc00"]}), id="further value"),
    pytest.param(lambda v: v["provenance"]["versions"].update({"\ud800": "1"}), id="key"),
])  # fmt: skip
def test_validate_refuses_such_a_file(change, tmp_path, capsys):
    path = rewritten(Blueprint.from_stats(synthetic_stats()), tmp_path, change)
    with pytest.raises(BlueprintError, match="half of a surrogate pair"):
        Blueprint.from_pretrained(tmp_path)
    assert run(capsys, "blueprint", "validate", path)[0] == 3
    assert run(capsys, "blueprint", "show", path)[0] == 1


def test_no_such_string_gets_into_a_file_that_is_made():
    with pytest.raises(BlueprintError, match="half of a surrogate pair"):
        Blueprint.from_stats(synthetic_stats(), domain_tags=["\ud800"])
    # A file name that is not UTF-8 is recorded all the same.
    assert public_command(["x", "/srv/caf\udce9.txt"]) == "x 'caf\\udce9.txt'"
    stats = synthetic_stats()
    file = Blueprint.from_stats(stats, datasets=["/srv/caf\udce9.txt"]).file
    assert file.data.datasets[0].name == "caf\\udce9.txt"


def test_over_aggressive_goes_by_the_measured_curve(tmp_path, capsys):
    stats = synthetic_stats(profile=[1e4, 1e3, 10, 1, 1, 1])
    entry = Blueprint.from_stats(stats).k_star["memory"]
    assert abs(entry.curve_share - entry.kept_share) > 0.01  # else nothing is told apart
    between = (entry.curve_share + entry.kept_share) / 2
    blueprint = Blueprint.from_stats(stats, over_aggressive_share=between)
    entry = blueprint.k_star["memory"]
    assert entry.over_aggressive == (entry.curve_share < between)
    assert entry.over_aggressive != (entry.kept_share < between)
    told = f"keeps {entry.curve_share:.0%} by the measured curve"
    blueprint.save_pretrained(tmp_path)
    assert told in run(capsys, "blueprint", "show", tmp_path)[1]
    write_card(tmp_path, blueprint)
    assert told in (tmp_path / "README.md").read_text()
    # A file of before: its flag went by the fit, the text goes by the curve all the same.
    before = entry.model_copy(update={"over_aggressive": not entry.over_aggressive})
    assert kept(before) == kept(entry)
    without = entry.model_copy(update={"curve_share": None, "over_aggressive": True})
    assert kept(without).endswith(f"keeps {entry.kept_share:.0%} by the fit")
    assert kept(without).startswith("over-aggressive")


def test_printable_escapes_what_a_terminal_obeys():
    controls = [chr(c) for c in [*range(32), *range(127, 160)]]
    assert all(printable(c).isprintable() and printable(c) != c for c in controls)
    assert printable("größe 大 \U0001f600 \\") == "größe 大 \U0001f600 \\"
    assert printable_lines("a\tb\nc\x1b\r\n") == "a\tb\nc\\x1b\\r\n"


def test_no_control_character_reaches_the_terminal(tmp_path, capsys):
    def change(value):
        value["domain_tags"] = [HOSTILE, "two\nlines"]
        value["model"]["class_name"] = HOSTILE

    plain = Blueprint.from_stats(synthetic_stats(seed=3), domain_tags=["prose"])
    plain.save_pretrained(tmp_path / "plain")
    path = rewritten(Blueprint.from_stats(synthetic_stats()), tmp_path / "hostile", change)
    for args in (("show", path), ("diff", path, tmp_path / "plain"), ("validate", path),
                 ("add-domain", path, tmp_path / "plain", "-o", tmp_path / "both"),
                 ("show", tmp_path / f"no{ESCAPE}[2Jsuch")):  # fmt: skip
        _, out, err = run(capsys, "blueprint", *args)
        assert all(c.isprintable() for c in (out + err).replace("\n", "")), args
    _, out, _ = run(capsys, "blueprint", "show", path)
    assert "\\x1b[31m" in out
    assert "two\\nlines" in out
    # JSON keeps the string itself.
    _, out, _ = run(capsys, "blueprint", "show", path, "--json")
    assert json.loads(out)["domain_tags"] == [HOSTILE, "two\nlines"]


@pytest.mark.parametrize("tag", [
    HOSTILE, f"x\u2028{META_END}", f"x\n{META_END}\nlicense: mit", "x\n---\n# y", "a\x85b\x1cc",
    "yes", "'\"", "- a: [b, #c", "größe \U0001f600", "w " * 6000,
])  # fmt: skip
def test_metadata_of_a_card_holds_any_tag(tag, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    blueprint = Blueprint.from_stats(synthetic_stats(), domain_tags=[tag])
    path = write_card(tmp_path, blueprint)
    text = path.read_bytes().decode()
    write_card(tmp_path, blueprint)
    assert path.read_bytes().decode() == text
    front = text.split("---\n")[1]
    assert yaml.safe_load(front)["gradient_blueprint"]["domain_tags"] == [tag]
    data = ModelCard.load(path).data.to_dict()
    assert data["gradient_blueprint"]["domain_tags"] == [tag]
    assert data["license"] == "apache-2.0"
    assert printable_lines(text) == text


@pytest.mark.parametrize("args", [
    ("probe", "no-model", "no-data", "--blocks", "foo"),
    ("select", "no-blueprint", "--fraction", "0.1", "-o", "s.json", "--blocks", "foo"),
    ("select", "no-blueprint", "--fraction", "0.1", "-o", "s.json", "--blocks", "a*=0x0"),
])  # fmt: skip
def test_a_granularity_that_cannot_be_read_is_wrong_usage(args, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert "--blocks" in err
    assert "granularity" in err


def test_recorded_command_and_versions(monkeypatch):
    assert public_command([cli.__file__, "probe", "/srv/m"]) == "fastgrad probe m"
    assert public_command(["/srv/tools/cli.py", "x"]) == "cli.py x"  # somebody else's
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(__version__="5.99"))
    versions = Blueprint.from_stats(synthetic_stats()).file.provenance.versions
    assert versions["transformers"] == "5.99"
    monkeypatch.delitem(sys.modules, "transformers")
    blueprint = Blueprint.from_stats(synthetic_stats())
    assert "transformers" not in blueprint.file.provenance.versions
    assert "transformers" not in sys.modules
