"""A partial model under a Trainer in two processes (gloo, CPU): as in one, and resumed exactly."""

from __future__ import annotations

import pytest
import torch

from tests.processes import launch


def run(folder, processes):
    folder.mkdir()
    launch("tests.trainer_worker", folder, processes=processes)
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_train_what_one_trains_and_resume_exactly(tmp_path):
    (single,) = run(tmp_path / "one", 1)
    both = run(tmp_path / "two", 2)
    for result in (single, *both):
        assert result["straight"].keys() == result["resumed"].keys()
        for name, value in result["straight"].items():
            assert value.dtype == torch.float32
            assert torch.equal(value, result["resumed"][name]), name
    assert [r["wrapped"] for r in both] == ["DistributedDataParallel"] * 2
    assert both[0]["losses"] == pytest.approx(single["losses"], rel=0.02)  # bf16 forward passes
    for name, value in both[0]["straight"].items():
        assert torch.equal(value, both[1]["straight"][name]), name
