"""Every block of docs/train.md runs, on tiny models, and what the page claims holds."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import fastgrad as fg
from tests.models import batch_of, llama, randomised
from tests.sft import sentences, tokenizer
from tests.training_runs import HELD_OUT, Rows, state

PAGE = (Path(__file__).parent.parent / "docs" / "train.md").read_text()
SECTIONS = {
    part.split("\n", 1)[0]: re.findall(r"^```python\n(.*?)^```", part, re.M | re.S)
    for part in PAGE.split("\n## ")[1:]
}
PLAIN = "Ten lines in a plain loop"


def surroundings(seed=0):
    """What the page takes for granted."""
    model = randomised(llama, seed)
    return {
        "torch": torch,
        "fg": fg,
        "model": model,
        "fresh_model": randomised(llama, seed),
        "another_model": randomised(llama, seed),
        "loader": [batch_of(seed=s) for s in range(20)],
        "sample": HELD_OUT,
        "validation_batches": HELD_OUT,
        "train_dataset": Rows(),
        "sentences": sentences(),
        "tokenizer": tokenizer(),
        "selection": fg.select(None, model=model, fraction=0.3, ranking="random",
                               blocks="16x16"),
        "other_selection": fg.select(None, model=model, fraction=0.3, ranking="random",
                                     blocks="16x16", seed=1),
    }  # fmt: skip


@pytest.fixture
def _folder(tmp_path, monkeypatch):
    """A released model with its blueprint lies in my-model/."""
    monkeypatch.chdir(tmp_path)
    model = randomised(llama)
    model.save_pretrained("my-model")
    with fg.Probe(model) as probe:
        for batch in HELD_OUT:
            model(**batch).loss.backward()
    fg.Blueprint.from_stats(probe.stats(), model=model).save_pretrained("my-model")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def run(code, names):
    exec(compile(code, "docs/train.md", "exec"), names)
    return names


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("title", [t for t, blocks in SECTIONS.items() if blocks and t != PLAIN])
def test_every_block_runs(title):
    names = surroundings()
    for code in SECTIONS[title]:
        run(code, names)


@pytest.mark.usefixtures("_folder")
def test_the_migration_is_ten_lines_and_equal_at_a_hundred_percent():
    before, after = SECTIONS[PLAIN]
    changed = [
        line for line in difflib.ndiff(before.splitlines(), after.splitlines())
        if line[0] == "+" and line[1:].strip()
    ]  # fmt: skip
    assert len(changed) <= 10
    plain, part, all_of_it = surroundings(), surroundings(), surroundings()
    was = state(plain["model"])
    run(before, plain)
    run(after, part)
    assert "fraction=0.2" in after
    run(after.replace("fraction=0.2", "fraction=1.0"), all_of_it)
    moved = state(part["model"])
    chosen = part["selection"]
    assert 0.1 < chosen.fraction <= 0.2
    for name, value in state(plain["model"]).items():
        torch.testing.assert_close(
            state(all_of_it["model"])[name], value, rtol=1e-4, atol=1e-6, msg=name
        )
        assert torch.equal(moved[name], was[name]) == (name not in chosen.blocks), name
    base = randomised(llama)
    fg.load_delta(base, "tuned/delta.safetensors")  # of the run that was last
    assert fg.weights_hash(base) == fg.weights_hash(all_of_it["partial"].remove())


def test_links_on_the_page_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (Path(__file__).parent.parent / "docs" / target).exists(), target
