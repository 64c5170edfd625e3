"""Several processes train what one would have trained, and send no more than they must."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.blocks import BlockGrid
from fastgrad.errors import PartialError
from fastgrad.sharded import write_rows_
from fastgrad_kernels.layout import gather_blocks
from tests.partial_worker import SCENARIOS, resumed_by_one, selection_of, sparse_adamw
from tests.processes import ROOT, command, launched

WORKER = "tests.partial_worker"
FIRST = [
    "ddp_sparse_adamw",
    "ddp_no_sync",
    "ddp_bytes",
    "ddp_unused",
    "ddp_first_process_decides",
    "fsdp_tiles",
    "fsdp_masters",
    "fsdp_conversion",
    "fsdp_delta",
    "fsdp_checkpoints",
    "nan_on_one_process",
    "refusals",
]
ACCUMULATING = ("ddp_no_sync", "ddp_accelerate", "fsdp_accumulation")
OTHERS = [name for name in SCENARIOS if name not in FIRST]
APART = ("checkpoints", "thousand_steps")  # tested in their own way


def run(names, folder):
    found = launched(WORKER, folder / "results.json", *names, "--folder", folder, timeout=600)
    return {**found, "folder": folder}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run once by two processes: starting them takes longer than any scenario."""
    return run(FIRST, tmp_path_factory.mktemp("partial"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return run(OTHERS, tmp_path_factory.mktemp("partial"))


def check(found, tolerance=1e-6):
    """Largest differences, relative to the largest element of each parameter, to one process that
    takes the parts of a batch one after the other. With whole batches, or where a step accumulates
    several batches, sums have another order, and since Adam divides by the gradient's size, their
    rounding weighs more in single elements where the gradient is near zero."""
    assert "failed" not in found, found["failed"]
    assert found["weights"] <= tolerance, found  # NaN fails too
    assert found.get("whole batches", 0.0) <= max(tolerance, 1e-5), found
    assert found["smallest change"] > 1e-3  # each selected parameter was trained
    assert found["frozen"]  # unselected weights: the base's bits, by hash, on every process
    assert found["all alike"]  # all weights, by hash, on every process


def check_shards(found, name):
    """Sharded: half of full and packed weights (and padding) each, moments once in all."""
    copies = 2 if name == "fsdp_hybrid" else 1
    assert found["moment bytes per element"] == 8 * copies
    if found["shares"]:  # something is packed
        assert found["shares"] <= (0.52 if copies == 1 else 1)
    assert found["gradients"]  # no parameter has one but the trained ones


@pytest.mark.parametrize(
    "name",
    ["ddp_sparse_adamw", "ddp_no_sync", "ddp_bytes", "ddp_unused", "fsdp_tiles", "fsdp_masters"],
)
def test_processes_together_train_what_one_trains(results, name):
    found = results[name]
    check(found, 4e-6 if name in ACCUMULATING else 1e-6)
    if "shares" in found:
        check_shards(found, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in OTHERS if not any(a in n for a in APART)])
def test_other_ways_to_train(others, name):
    found = others[name]
    of_gradients = 5e-3 if name == "fsdp_mixed_precision" else 1e-6  # rounded to bfloat16 there
    check(found, 4e-6 if name in ACCUMULATING else of_gradients)
    if "shares" in found:
        check_shards(found, name)
    assert found.get("evaluation", 0.0) < 2e-6
    assert found.get("hash", True)
    assert found.get("one size", True)
    assert found.get("torch AdamW", 0.0) < 2e-6


@pytest.mark.slow
def test_unselected_weights_keep_their_bits_over_1000_steps_of_two_processes(others):
    found = others["ddp_thousand_steps"]
    assert "failed" not in found, found["failed"]
    assert found["unselected"] > 500
    assert found["frozen"]
    assert found["all alike"]
    assert found["moved"]
    assert found["counts"] == [1000.0]


def test_only_packed_gradients_are_sent(results):
    found = results["ddp_bytes"]
    assert found["sent"] == found["packed"]
    assert found["sent"] < 0.32 * found["full"]


def test_a_step_that_does_not_use_all_layers_with_either_optimizer(results):
    assert results["ddp_unused"]["torch AdamW"] < 1e-6


def test_what_process_0_has_is_broadcast_to_packed_parameters_too(results):
    found = results["ddp_first_process_decides"]
    assert "failed" not in found, found["failed"]
    assert found["frozen"]
    assert found["all alike"]
    assert found["finite"]
    assert found["buffers"] == 3


def test_a_delta_of_sharded_weights_is_written_once_and_whole(results):
    found = results["fsdp_delta"]
    check(found, 0.0)
    assert found["hash"]
    assert found["one size"]


def check_checkpoints(found, name, masters):
    assert "failed" not in found[name], found[name]["failed"]
    assert found[name]["a normal model"]
    assert found[name]["resumed"] < 1e-6
    assert found[name]["from one"] < 1e-6
    kind = name.partition("_")[0]
    assert resumed_by_one(found["folder"] / f"{kind}-{masters}", masters) < 1e-6


def test_a_checkpoint_of_two_processes_is_resumed_by_one_and_back(results):
    check_checkpoints(results, "fsdp_checkpoints", False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "masters"), [("fsdp_checkpoints_with_masters", True), ("ddp_checkpoints", False)]
)
def test_other_checkpoints(others, name, masters):
    check_checkpoints(others, name, masters)


def test_all_processes_refuse_a_step_that_one_must_refuse(results):
    found = results["nan_on_one_process"]
    assert "failed" not in found, found["failed"]
    for kind in ("ddp", "fsdp"):
        assert found[f"{kind} named"]
        assert found[f"{kind} unchanged"]
        assert found[f"{kind} weights"] < 1e-6


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("after_ddp", "the model is under DistributedDataParallel already"),
        ("inside_ddp", "DistributedDataParallel was made before the blocks of"),
        ("after_fsdp", "the model is under fully_shard already"),
        ("optimizer_first", ".* was replaced by fully_shard after this optimizer was built"),
        ("removed", r"remove\(\) is not possible under fully_shard"),
        ("changed_packed", "the packed parameter of .* was changed outside of an optimizer step"),
        ("changed_full", r"lm_head.weight was changed from outside .*refresh\(\)"),
        ("other_dimension", r".*q_proj.weight is cut up as \(Shard\(dim=1\),\)"),
        ("mixed_ddp", r"DistributedDataParallel\(mixed_precision=...\)"),
        ("other_blocks", "the checkpoint was made for other blocks of lm_head.weight"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(results, case, said):
    assert "failed" not in results["refusals"], results["refusals"]["failed"]
    message = results["refusals"][case]
    assert re.match("PartialError: " + said, message), message
    assert "Remedy" in message


@pytest.mark.parametrize("spec", ["row", "column", "3x4", "5x*", "64x3"])
@pytest.mark.parametrize("shape", [(17, 9), (6, 4, 3), (3, 5)])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_blocks_are_written_into_the_rows_that_each_process_holds(spec, shape, parts):
    """Against the whole tensor, wherever the cut goes through blocks."""
    grid = BlockGrid.of(shape, spec)
    g = torch.Generator().manual_seed(0)
    ids = torch.randperm(grid.n_blocks, generator=g)[: max(1, grid.n_blocks // 2)].sort().values
    new = torch.randn(shape, generator=g)
    packed = gather_blocks(new.flatten(1), ids, grid.block_rows, grid.block_cols)
    old = torch.randn(shape, generator=g)
    whole = old.clone()
    for block in ids.tolist():
        r0, r1, c0, c1 = grid.bounds(block)
        whole.flatten(1)[r0:r1, c0:c1] = new.flatten(1)[r0:r1, c0:c1]
    rows = -(-shape[0] // parts)
    for rank in range(parts):
        first = min(rank * rows, shape[0])
        part = old[first : first + rows].clone()
        write_rows_(part, first, grid, ids, packed)
        assert torch.equal(part, whole[first : first + rows])


def test_training_state_in_one_process_without_any_others(tmp_path):
    """Also through torch.save: nothing but tensors, numbers and names."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).bfloat16()
    selection = selection_of(model, "2x3", 0.5)
    x = torch.randn(4, 6, dtype=torch.bfloat16)

    def begin():
        torch.manual_seed(0)
        fresh = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).bfloat16()
        partial = fg.make_partial(fresh, selection, torch.float32)
        return fresh, partial, sparse_adamw(partial.parameters())

    def steps(model, optimizer, count):
        for _ in range(count):
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, partial, optimizer = begin()
    steps(model, optimizer, 2)
    torch.save(fg.TrainingState(partial, optimizer).state_dict(), tmp_path / "state.pt")
    steps(model, optimizer, 3)
    again, other, second = begin()
    fg.TrainingState(other, second).load_state_dict(torch.load(tmp_path / "state.pt"))
    steps(again, second, 3)
    for (name, p), (_, q) in zip(partial.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    partial = fg.make_partial(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).bfloat16(),
                              selection_of(model, "2x3", 0.9), torch.float32)  # fmt: skip
    with pytest.raises(PartialError, match=r"made for other blocks of 0\.weight"):
        fg.TrainingState(partial, sparse_adamw(partial.parameters())).load_state_dict(
            torch.load(tmp_path / "state.pt")
        )


def test_a_conversion_after_fully_shard(results):
    found = results["fsdp_conversion"]
    check(found, 1e-9)
    assert found["frozen"]
    assert found["all alike"]
    assert "would be rounded to torch.float16" in found["refused"]
    assert "Remedy" in found["refused"]


def test_the_page_shows_this_command():
    shown = "torchrun " + " ".join(command(WORKER))
    assert shown in (ROOT / "docs" / "distributed.md").read_text()
