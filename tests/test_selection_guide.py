"""Every block of docs/selection.md runs, and what the page says about its results holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastgrad as fg
from fastgrad.errors import SelectionError
from fastgrad.flops import plan_flops
from fastgrad.ranking import CONTROLS, MEASURED
from tests.models import MODELS, batch_of, randomised

PAGE = (Path(__file__).parent.parent / "docs" / "selection.md").read_text()


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, batch = randomised(MODELS["llama"]), batch_of()
    with fg.Probe(model, blocks="row") as probe:
        model(**batch).loss.backward()
    names = {"fg": fg, "model": model, "batch": batch, "stats": probe.stats()}
    code = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(code) == 4
    for block in code:
        exec(compile(block, "docs/selection.md", "exec"), names)
    assert names["selection"].summary() in capsys.readouterr().out
    assert fg.Selection.load("selection.json") == names["selection"]
    assert fg.plan_memory(model, names["small"], batch_shape=(2, 16)).total <= 250_000
    assert plan_flops(model, names["cheap"], batch_shape=(2, 16)).total <= 2_500_000
    for name in ("selection", "small", "cheap", "mixed", "spread"):
        assert 0 < names[name].fraction < 1
    mixed = names["mixed"]
    assert {mixed.grid(n).spec for n in mixed.shapes} == {"8x*", "8x8", "module"}
    groups = names["spread"].meta["spread"]["groups"]
    assert groups["model.layers.0"]["floor"] == -(-groups["model.layers.0"]["choosable"] // 20)
    with pytest.raises(SelectionError, match="made for weights"):
        names["small"].check_model(randomised(MODELS["llama"], seed=7))


def test_the_page_names_every_ranking_and_budget():
    from fastgrad.budgets import KINDS

    for name in (*MEASURED, *CONTROLS):
        assert f"`{name}`" in PAGE
    for kind in KINDS:
        assert f"`{kind}=" in PAGE
