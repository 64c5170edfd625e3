"""The code of docs/meter.md, run as it stands on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer

import fastgrad as fg
from fastgrad import meter_energy
from tests.models import batch_of, llama, randomised
from tests.training_runs import Rows, arguments_of

GUIDE = (Path(__file__).parent.parent / "docs" / "meter.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S)


def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    model = randomised(llama)
    held_out = batch_of(n=3, seed=5)

    @torch.no_grad()
    def validation_loss():
        return float(model(**held_out).loss)

    names = {
        "fg": fg, "model": model, "loader": [batch_of(n=2, seed=s) for s in range(3)],
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2), "Trainer": Trainer,
        "validation_loss": validation_loss, "train": Rows(), "valid": Rows(n=4),
        "args": arguments_of(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=4),
    }  # fmt: skip
    plain, trainer, restart, compare = SNIPPETS
    exec(plain, names)
    steps = names["meter"].steps
    assert 0 < steps <= 3
    assert "traffic_bytes" in capsys.readouterr().out
    exec(trainer, names)
    assert names["callback"].meter.steps == 4
    exec(restart, names)
    assert names["meter"].resumed
    assert names["meter"].steps == steps
    exec(compare, names)
    assert (tmp_path / "arms.png").is_file()
    assert (tmp_path / "meter.json").is_file()
    assert (tmp_path / "trainer.json").is_file()


def test_the_guide_names_every_resource_and_source():
    from fastgrad.meter import UNITS

    for name in (*UNITS, *meter_energy.SOURCES[:-1]):
        assert f"`{name}`" in GUIDE
