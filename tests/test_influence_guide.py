"""The code of docs/influence.md, run as it stands on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import fastgrad as fg
from tests.models import batch_of, llama, randomised

GUIDE = (Path(__file__).parent.parent / "docs" / "influence.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S)


def test_the_guide_runs(capsys):
    model = randomised(llama)
    batches = [batch_of(n=4, seed=s) for s in range(4)]
    names = {
        "fg": fg, "model": model, "loader": batches, "wide_loader": batches,
        "dataset": list(range(16)), "DataLoader": DataLoader, "batches": batches[:2],
        "heldout": batches[2:],
    }  # fmt: skip
    report, scores, proxy, online = SNIPPETS
    exec(report, names)
    assert "multiplicativity" in capsys.readouterr().out
    rows = [int(i) for part in names["loader"] for i in part]
    assert sorted(rows) == sorted(names["chosen"].example_ids.tolist())
    names["partial"].remove()
    model.zero_grad()

    model(**batches[3]).loss.backward()
    target = fg.gradient_direction(model)
    model.zero_grad()
    with fg.Probe(model, targets=target, loss_reduction="token_mean") as probe:
        model(**batches[0]).loss.backward()
    exec(scores, names | {"stats": probe.stats()})
    model.zero_grad()

    exec(proxy, names)
    assert "norm" in capsys.readouterr().out
    exec(online, names)
    assert len(names["chosen"].rows) == 1
    assert torch.equal(
        names["chosen"].batch["input_ids"], batches[-1]["input_ids"][names["chosen"].rows]
    )
