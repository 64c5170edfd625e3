"""The GPU gate runs everywhere at small sizes, and a wrong kernel does not get past it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gate_checks
import gate_rows
import gpu_gate
import roofline
from fastgrad_kernels import cpu, ops
from timing import Timing, interleaved

BENCH = Path(__file__).parent.parent / "bench"


def gate(*arguments, **env):
    return subprocess.run(
        [sys.executable, str(BENCH / "gpu_gate.py"), "--device", "cpu", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | env,
        check=False,
    )


def test_one_command_checks_times_and_writes(tmp_path):
    output = tmp_path / "gate.json"
    done = gate("--rounds", "2", "--rows", "wgrad,stats", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(output.read_text())
    assert len(data["checks"]) > 100
    assert all(c["ok"] for c in data["checks"])
    assert {"date", "torch", "commit", "device"} <= set(data["environment"])
    assert len(data["rows"]) == 5
    assert all(r["ratio"] > 0 and r["met"] is None for r in data["rows"])
    assert "sparse_wgrad, 20%" in done.stdout
    assert "not how fast" in done.stdout


@pytest.mark.slow
def test_every_row_runs():
    done = gate("--rounds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    for measured in ("dW + T", "grad_stats", "adamw_, 1%", "sparse_wgrad", "step with T"):
        assert measured in done.stdout


@pytest.mark.slow
def test_the_checks_pass_through_the_kernels():
    """The whole correctness part in Triton's interpreter, at the kernels' own tile sizes."""
    pytest.importorskip("triton")
    done = gate("--rounds", "2", "--rows", "stats", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_other_configurations_are_checked_and_compared():
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCH / "tune.py"), "--device", "cpu", "--rounds", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    assert done.stdout.count("(shipped)") == 4
    assert "in memory" in done.stdout
    refused = subprocess.run(command, capture_output=True, text=True)
    assert "TRITON_INTERPRET=1" in refused.stderr


@pytest.mark.parametrize("wrong", ["T", "gradient"])
def test_a_wrong_operator_is_not_timed(monkeypatch, wrong):
    original = cpu.cross_influence

    def damaged(*args):
        grad, sq, dots = original(*args)
        return (grad * (1 + 1e-3 * (wrong == "gradient")), sq * (1 + 1e-4 * (wrong == "T")), dots)

    monkeypatch.setattr(cpu, "cross_influence", damaged)
    monkeypatch.setattr(gate_checks, "ALL", (gate_checks.influence,))
    monkeypatch.setattr(sys, "argv", ["gpu_gate.py", "--device", "cpu", "--rows", "wgrad"])
    with pytest.raises(SystemExit) as stopped:
        gpu_gate.main()
    assert "nothing is timed" in str(stopped.value)


def test_floors_count_what_the_operators_count():
    """The roofline's FLOP are those of the operators' formulas; its tiles' intensity as the page
    says."""
    left, right = torch.randn(24, 128), torch.randn(24, 256)
    with FlopCounterMode(display=False) as counter:
        ops.cross_influence(left, right, torch.tensor([0, 12, 24]), 128, 256)
    work = roofline.fused(128, 256, 2, 12, (128, 128))
    assert work.matrix == counter.get_total_flops()
    assert work.matrix / work.cache == 64
    assert roofline.fused(256, 256, 2, 12, (128, 256)).matrix / roofline.fused(
        256, 256, 2, 12, (128, 256)
    ).cache == pytest.approx(85.3, abs=0.1)
    # three block pairs per example of 128 tokens, of 64x64 tokens over all features
    assert roofline.gram(128, 256, 5, 128).matrix == 5 * 3 * 2 * 64 * 64 * (128 + 256)
    seconds, bound = roofline.statistics(4.8e12).floor(roofline.H200)
    assert (round(seconds, 3), bound) == (2.0, "memory")


def test_nan_never_passes():
    assert not gate_checks.Check("x", float("nan"), 1.0).ok


def test_unknown_rows_are_named():
    done = gate("--rows", "speed")
    assert done.returncode == 2
    assert "unknown rows speed" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said():
    done = gate("--device", "cuda")
    assert done.returncode == 2
    assert "no GPU is visible" in done.stderr


def test_ratios_are_within_rounds():
    """A slow round hurts both: the ratio is taken before the median."""
    times = {"peer": [1.0, 10.0, 2.0], "ours": [2.0, 20.0, 4.0]}
    contenders = {"peer": lambda: "peer", "ours": lambda: "ours"}
    found = interleaved(contenders, 3, 0, clock=lambda call: times[call()].pop(0))
    assert found == {"peer": Timing(2.0, 1.0, 1.0, 1.0), "ours": Timing(4.0, 2.0, 2.0, 2.0)}


def test_a_row_is_judged_by_its_aim():
    timing = Timing(0.9, 0.9, 0.8, 1.0)
    peer = Timing(1.0, 1.0, 1.0, 1.0)
    assert gate_rows.row("a", "b", timing, peer, 1.0).met
    assert not gate_rows.row("a", "b", timing, peer, 0.5).met
    assert gate_rows.row("a", "b", timing, peer).met is None
    higher = gate_rows.Row("a", "b", 0.95, 0.9, 1.0, 1.0, 1.0, 0.9, at_least=True)
    assert higher.met
    assert "MISSED" in gpu_gate.table([gate_rows.row("a", "b", timing, peer, 0.5)])
