"""BlueprintLog and BlueprintCallback in two processes (gloo, CPU): as in one, unnoticed."""

from __future__ import annotations

import pytest

from tests.processes import launched

QUICK = ("ddp_find_unused", "fsdp", "evaluation_share", "refusals")


def run(out, names=()):
    return launched("tests.blueprint_log_worker", out, *names)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run(tmp_path_factory.mktemp("quick") / "found.json", QUICK)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return run(tmp_path_factory.mktemp("all") / "found.json")


def check(every):
    for found in every:
        assert "failed" not in found, found["failed"]
        assert found["changed"] == 0  # bit for bit what it is without the log
        compared = ("T", "batch", "example_mean", "loss")
        assert all(found[key] < 1e-6 for key in compared), found
        assert found.get("blocks", 0.0) < 1e-6
    if "written" in every[0]:
        assert [found["written"] for found in every] == [True, False]


@pytest.mark.parametrize("name", ["ddp_find_unused", "fsdp"])
def test_two_processes_measure_what_one_does(quick, name):
    check(quick[name])


def test_a_share_of_evaluation_is_that_of_all_processes_together(quick):
    for found in quick["evaluation_share"]:
        assert found["ddp"] == [6, pytest.approx(0.02), []]
        assert found["ddp_few"] == [2, pytest.approx(0.02), []]
        assert found["fsdp"] == [8, pytest.approx(0.016), []]
        examples, share, (told,) = found["fsdp_few"]
        assert (examples, share) == (4, pytest.approx(0.04))
        assert "the least that is measured is 2 batches, one for each process, of 2" in told


def test_what_several_processes_cannot_measure_is_refused_on_all(quick):
    first, second = quick["refusals"]
    for found in (first, second):
        assert "the processes do not hold the same model" in found["copies"]
        assert "under fully_shard each of 2 processes measures a batch at a time" in found["few"]
        assert "tensor or expert parallelism" in found["tensor"]
        assert "is a DTensor with hooks on its gradient" in found["hooks"]
        assert all("Remedy" in found[key] for key in ("copies", "error", "few", "tensor", "hooks"))
    assert first["error"].startswith("process 1 could not measure its validation batches")
    assert second["error"].startswith("the model returned no loss")
    assert "not in the group" in second["group"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["ddp_plain", "ddp_static_graph", "ddp_fewer_batches_than_processes", "ddp_partial",
     "trainer_run"],
)  # fmt: skip
def test_more_set_ups(everything, name):
    check(everything[name])


@pytest.mark.slow
def test_a_state_of_one_process_resumes_all_and_so_does_a_trainer(everything):
    assert everything["resumed"] == [{"texts": 1}] * 2
    for found in everything["trainer_run"]:
        assert found["kind"] == "DistributedDataParallel"
        assert found["texts"] == 1
        assert found["steps"] == [4, 6, 8]
        assert found["logged"] == 3
