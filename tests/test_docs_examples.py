"""Every blueprint among the docs is valid, and is the one that the page tells of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import fastgrad as fg
from fastgrad.cli import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXAMPLES = sorted(DOCS.rglob("gradient_blueprint*.json"))
RESULTS = ROOT / "bench" / "results" / "minilm" / "results.json"


def test_there_are_examples():
    assert {p.parent.name for p in EXAMPLES} >= {"minilm-code", "minilm-prose"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.parent.name)
def test_the_command_finds_it_valid(path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["blueprint", "validate", str(path)])
    assert stop.value.code == 0, capsys.readouterr()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.parent.name)
def test_the_library_keeps_all_that_it_says(path):
    def kept(before, after):
        if isinstance(before, dict):
            return all(k in after and kept(v, after[k]) for k, v in before.items())
        if isinstance(before, list):
            return len(before) == len(after) and all(map(kept, before, after))
        return before == after

    written = json.loads(fg.Blueprint.from_pretrained(path).to_json())
    assert kept(json.loads(path.read_text("utf-8")), written)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.parent.name)
def test_it_names_no_folder_of_the_machine_that_made_it(path):
    text = path.read_text("utf-8")
    assert str(ROOT) not in text
    assert not re.search(r'"/[a-z]+/', text)


def test_the_results_are_those_of_the_files():
    record = json.loads(RESULTS.read_text())
    for name, found in record["domains"].items():
        blueprint = fg.Blueprint.from_pretrained(DOCS / "examples" / f"minilm-{name}")
        tail = blueprint.file.fits.norm.tail
        assert blueprint.weights_hash == record["model"]["weights_hash"]
        assert blueprint.n_examples == found["n_examples"] == 2 * found["n_pairs"]
        assert (tail.verdict, tail.rank_exponent) == (
            found["tail"]["verdict"], found["tail"]["exponent"],
        )  # fmt: skip
        assert blueprint.split_half.spearman == found["split_half"]["spearman"]


def test_the_page_links_what_is_there():
    page = DOCS / "blueprint.md"
    links = re.findall(r"\]\((examples/[^)#]+)\)", page.read_text("utf-8"))
    assert any(link.endswith(".png") for link in links)
    for link in links:
        assert (DOCS / link).exists(), link
