"""Several processes together measure what one would have measured alone."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

import fastgrad as fg
from fastgrad.distributed import combine
from fastgrad.errors import StatsError
from tests.models import MODELS, batch_of, randomised
from tests.processes import ROOT, command, launched

WORKER = "tests.distributed_worker"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All scenarios, run once by two processes: starting them takes longer than any of them."""
    out = tmp_path_factory.mktemp("distributed") / "results.json"
    return launched(WORKER, out)


def check(found, tolerance=1e-4):
    assert "failed" not in found, found["failed"]
    numbers = {k: v for k, v in found.items() if isinstance(v, float)}
    assert numbers
    assert all(v < tolerance for v in numbers.values()), numbers  # NaN fails too
    assert found.get("coverage", ["exact"]) == ["exact"]
    assert found.get("same hash", True)


@pytest.mark.parametrize(
    "name",
    [
        "ddp_plain",
        "ddp_blocks_and_direction",
        "ddp_no_sync",
        "ddp_static_graph_bucket_views",
        "ddp_probe_made_first",
        "ddp_uneven",
        "ddp_packed",
        "ddp_ids",
        "ddp_to_disk",
        "fsdp_plain",
        "fsdp_tied_tiles",
        "fsdp_columns_no_reshard",
        "fsdp_accumulation",
        "fsdp_as_many_tokens_as_examples",
        "fsdp_checkpointed",
        "fsdp_gemma",
        "fsdp_hybrid",
        "fsdp_divide_factor",
        "fsdp_evaluated_before",
        "accelerate_accumulate",
        "ddp_token_mean_over_all_processes",
        "two_forwards_one_backward",
        "frozen_base",
        "norms_only_of_some_parameters",
        "nan_on_one_process",
        "dropped_accumulation",
    ],
)
def test_processes_together_are_one(results, name):
    check(results[name])


def test_l1_and_the_alignment_of_blocks_are_those_of_one_process(results):
    for name in ("ddp_blocks_and_direction", "fsdp_tied_tiles", "fsdp_columns_no_reshard"):
        assert results[name]["l1"] < 1e-4
        assert results[name]["block alignment"] < 1e-4
    assert results["ddp_no_sync"]["l1"] < 1e-4
    assert results["fsdp_accumulation"]["block alignment"] < 1e-4


def test_fully_shard_in_bfloat16_is_as_exact_as_bfloat16(results):
    check(results["fsdp_bf16"], 3e-2)


def test_examples_passes_and_tokens_are_in_order(results):
    plain, piled = results["ddp_plain"], results["ddp_no_sync"]
    assert plain["ids"] == list(range(8))
    assert plain["passes"] == [0] * 4 + [1] * 4
    assert piled["passes"] == [0] * 8 + [1] * 8
    assert results["accelerate_accumulate"]["passes"] == piled["passes"]
    assert results["fsdp_accumulation"]["passes"] == piled["passes"]
    assert results["ddp_uneven"]["passes"] == [0] * 4 + [1] * 4
    assert results["ddp_uneven"]["tokens"] == [4, 6, 6, 6, 6, 6, 4, 2]
    assert results["ddp_ids"]["ids"] == list(range(8))
    assert results["ddp_packed"]["tokens"] == [4, 7, 5, 8, 6]
    assert results["ddp_to_disk"]["files"] == 3
    assert {r["class"] for r in results.values() if "class" in r} == {
        "LlamaForCausalLM", "GemmaForCausalLM"
    }  # fmt: skip


def test_a_parameter_that_one_process_does_not_use(results):
    found = results["ddp_unused_on_one_process"]
    check({k: v for k, v in found.items() if k != "status"})
    assert found["rare"] == [True] * 3 + [False] * 3
    assert found["status"]["rare.weight"] == "exact"
    assert found["status"]["never.weight"] == "unused"


def test_the_self_check_works_in_each_process(results):
    found = results["self_check"]
    check({k: v for k, v in found.items() if isinstance(v, float)})
    for kind in ("ddp", "fsdp"):
        for case, said in ((kind, "custom autograd function"), (f"{kind} unseen", "self-check")):
            assert list(found[case]) == ["lin.weight"]
            assert said in found[case]["lin.weight"]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("frozen under FSDP2", "ProbeError: frozen="),
        ("frozen under DDP", "ProbeError: frozen="),
        ("DataParallel", "ProbeError: the model is wrapped in DataParallel"),
        ("fsdp1", r"ProbeError: the model is wrapped in FullyShardedDataParallel \(FSDP1\)"),
        ("a part in DDP", "ProbeError: only a part of the model, lm_head"),
        ("a part sharded", "ProbeError: model.embed_tokens.weight is not sharded"),
        ("communication hook", "ProbeError: the communication hook 'sum_hook'"),
        ("DeepSpeed", "ProbeError: lm_head.weight is a parameter of DeepSpeed's ZeRO stage 3"),
        ("tensor parallel", "ProbeError: lm_head.weight is a distributed tensor of another kind"),
        ("SyncBatchNorm", "ProbeError: 1 is a SyncBatchNorm in training mode"),
        ("join", r"ProbeError: .*DistributedDataParallel.join\(\)"),
        ("not the last backward", r"ProbeError: .*set_is_last_backward\(False\)"),
        ("partly reduced", "ProbeError: some modules reduced their gradients"),
        ("step in backward", "ProbeError: .* has no .grad at the end of the backward pass"),
        ("sharded after", "ProbeError: model.embed_tokens.weight was replaced after the probe"),
        ("inside and outside", "ProbeError: the model was called inside .* and outside of it"),
        ("not wrapped", "StatsError: .*not wrapped in DistributedDataParallel or fully_shard"),
        ("one is absent", r"StatsError: .*2 processes, and here .* of processes \[0\]"),
        ("twice the same", r"StatsError: .*of processes \[0, 0\]"),
        ("merged", r"StatsError: .*different processes \(see fastgrad.gather\): 0 and 1"),
        ("other passes", "StatsError: process 0 measured 1 batches and process 1 2"),
        ("other weights", r"StatsError: processes 0 and 1: .*different weights \(hash\)"),
        ("other gradients", "StatsError: processes 0 and 1 had different gradients"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(results, case, said):
    assert "failed" not in results["refusals"], results["refusals"]["failed"]
    message = results["refusals"][case]
    assert re.match(said, message), message
    assert "Remedy" in message or case == "merged"


def test_a_communication_hook_that_averages_is_fine(results):
    assert results["refusals"]["a hook that averages"] == "no error"


def pieces(n=3, ids=None):
    """What ``n`` processes might have measured: two passes of two examples each."""
    model = randomised(MODELS["llama"])
    with fg.Probe(model) as probe:
        for seed in (1, 2):
            model(**batch_of(2, seed=seed)).loss.backward()
    stats = probe.stats()
    found = []
    for r in range(n):
        meta = {**stats.meta, "processes": n, "rank": r}
        piece = replace(stats, sq=stats.sq * (r + 1), meta=meta)
        if ids is not None:
            piece.example_ids, piece.running_ids = np.array(ids[r]), False
        found.append(piece)
    return found


def test_combine_orders_by_pass_and_process_or_by_id():
    first, second, third = found = pieces()
    whole = combine([third, first, second])
    assert whole.batch.tolist() == [0] * 6 + [1] * 6
    assert whole.running_ids
    assert whole.example_ids.tolist() == list(range(12))
    expected = [p.sq[0, 2 * k + j] for k in (0, 1) for p in found for j in (0, 1)]
    assert whole.sq[0].tolist() == expected
    np.testing.assert_array_equal(whole.batch_sq, first.batch_sq)
    assert "rank" not in whole.meta
    again = whole.merge(whole)  # two measurements of all processes
    assert (again.n_batches, again.n_examples) == (4, 24)

    first, second, _ = given = pieces(3, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
    whole = combine(given)
    assert whole.example_ids.tolist() == list(range(12))
    assert whole.sq[0, :2].tolist() == [first.sq[0, 0], second.sq[0, 0]]
    given[0].running_ids = True
    with pytest.raises(StatsError, match="gave ids"):
        combine(given)


def test_coverage_is_the_worst():
    one, other = pieces(2)
    name = other.names[3]
    other.coverage_list = [
        fg.Coverage(name, "missing", "for once") if c.name == name else c
        for c in other.coverage_list
    ]
    whole = combine([one, other])
    assert whole.coverage[name].reason == "for once"
    assert np.isnan(whole.sq[3]).all()
    assert not np.isnan(whole.sq[2]).any()


def test_gather_without_processes_says_so():
    with pytest.raises(StatsError, match=r"torch.distributed is not running.*torchrun"):
        fg.gather(pieces(1)[0])
    with pytest.raises(StatsError, match="no statistics"):
        combine([])


def test_the_page_shows_this_command():
    shown = "torchrun " + " ".join(command(WORKER))
    assert shown in (ROOT / "docs" / "distributed.md").read_text()
