"""The step-overhead benchmark: its memory figures are exact, and one command runs all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from memory import peak
from overhead_models import Shape, make
from overhead_peers import opacus_step, torch_func_step
from overhead_steps import FUNC, MODULE, OPACUS, PLAIN, contenders

BENCH = Path(__file__).parent.parent / "bench"
TINY = Shape(width=64, layers=1)
MiB = 1 << 20


def test_peak_counts_what_is_alive_at_once_and_names_it():
    def call():
        a = torch.zeros(MiB)  # 4 MiB alive
        b = a.clone()  # 8 MiB
        del a
        c = torch.ones(MiB // 2)  # 6 MiB
        return b, c

    found = peak(call)
    assert found.bytes == 8 * MiB
    assert sorted(found.holders.values()) == [4 * MiB, 4 * MiB]
    assert any(path.startswith("aten::clone") for path in found.holders)


def test_peak_sees_scratch_inside_an_operator():
    x = torch.randn(1 << 16)
    assert peak(lambda: torch.median(x)).bytes >= x.numel() * 4


def test_memory_from_before_the_call_is_no_credit():
    kept = [torch.zeros(MiB)]

    def call():
        kept.clear()
        return torch.zeros(MiB)

    assert peak(call).bytes == 4 * MiB


def test_peak_of_a_step_is_the_same_each_time_and_holds_the_gradients():
    case = make("bert", TINY, 2, 8)
    steps = contenders(case).steps
    weights = sum(p.numel() * p.element_size() for p in case.model.parameters())
    for name in (PLAIN, MODULE):
        first, second = peak(steps[name]).bytes, peak(steps[name]).bytes
        assert first == second > weights


def test_examples_of_a_batch_have_equally_many_labels():
    labels = make("bert", TINY, 5, 40).inputs["labels"]
    assert (labels != -100).sum(1).tolist() == [6] * 5


def test_a_peer_that_does_not_fit_or_is_wrong_says_so(monkeypatch):
    case = make("llama", TINY, 2, 8)
    wrong = torch_func_step(case.model, case.inputs, np.ones(2))
    assert isinstance(wrong, str)
    assert "wrong" in wrong
    monkeypatch.setattr("overhead_peers.available_memory", lambda: 1000)
    assert "GiB" in torch_func_step(case.model, case.inputs)


def test_opacus_says_why_it_takes_no_tied_weights():
    pytest.importorskip("opacus")
    case = make("llama", Shape(64, 1, tied=True), 2, 8)
    assert "tying" in opacus_step(case.model, case.inputs)


def test_one_command_measures_and_writes(tmp_path):
    pytest.importorskip("opacus")
    output = tmp_path / "overhead.json"
    done = subprocess.run(
        [sys.executable, str(BENCH / "step_overhead.py"), "--models", "bert", "--rounds", "2",
         "--tokens", "8", "--batch-tokens", "32", "--width", "64", "--layers", "1",
         "--output", str(output)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(output.read_text())
    assert data["absent"] == []
    assert {r["step"] for r in data["rows"]} >= {PLAIN, MODULE, OPACUS, FUNC}
    assert all(r["ratio"] > 0 and r["memory"] > 0 for r in data["rows"])
    assert all(r["memory"] == r["memory_small"] == 1 for r in data["rows"] if r["step"] == PLAIN)
