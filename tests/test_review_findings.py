"""Situations in which a budget was exceeded or a delta did not lead where it said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.errors import DeltaError, FastgradError
from fastgrad.integrations.transformers import sparse_adamw
from tests.models import batch_of, llama, randomised


def test_the_plugs_memory_budget_counts_the_masters():
    model = randomised(llama, 0).to(torch.bfloat16)
    budget = 250_000
    factory, _ = sparse_adamw(ranking="last", memory=budget, master_dtype=torch.float32, lr=1e-3)
    factory.build(model)
    selection = factory.partial.selection
    factory.partial.remove()
    plan = fg.plan_memory(model, selection, master_dtype=torch.float32)
    assert 0.5 * budget < plan.total <= budget


def test_the_plug_takes_every_budget_and_no_options_beside_a_selection():
    model = randomised(llama, 0)
    factory, _ = sparse_adamw(ranking="last", submodules=3, lr=1e-3)
    factory.build(model)
    assert len(factory.partial.selection.blocks) == 3
    selection = factory.partial.selection
    with pytest.raises(FastgradError, match="no use for ranking, include"):
        sparse_adamw(selection=selection, ranking="first", include=["*"])


def test_a_memory_budget_beside_caps_that_forbid_the_smallest_block():
    model = randomised(llama, 0)
    chosen = fg.select(None, model, ranking="random", memory="400kB", blocks="8x8", cap=0.5,
                       spread_by="parameter")  # fmt: skip
    assert fg.plan_memory(model, chosen).total <= 400_000
    for name in chosen.blocks:
        assert chosen.n_selected(name) <= 0.5 * chosen.grid(name).numel


def test_a_delta_that_lacks_what_changed_beside_it_is_not_applied(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base = {n: p.clone() for n, p in model.state_dict().items()}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    partial = fg.make_partial(model, fg.Selection(shapes, "row", {"0.weight": np.array([1])}))
    with torch.no_grad():
        next(partial.parameters()).add_(1)
        model[1].bias.add_(1)  # not selected
    fg.save_delta(partial, tmp_path / "d.safetensors")
    partial.remove()
    model.load_state_dict(base)
    with pytest.raises(DeltaError, match="other weights than those of the selection"):
        fg.load_delta(model, tmp_path / "d.safetensors")
    assert all(torch.equal(p, base[n]) for n, p in model.state_dict().items())
    fg.load_delta(model, tmp_path / "d.safetensors", check_base=False)
    assert torch.equal(model[0].weight[1], base["0.weight"][1] + 1)


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    from fastgrad.cli import main

    model = randomised(llama, 0)
    with fg.Probe(model, per_example=False) as probe:
        model(**batch_of(seed=0)).loss.backward()
    probe.stats().save(tmp_path / "stats.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(["select", str(tmp_path / "stats.safetensors"), "--fraction", "0.1", "-o",
              str(tmp_path)])  # fmt: skip
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert "IsADirectoryError" in shown
    assert "Remedy" in shown
    assert "Traceback" not in shown
