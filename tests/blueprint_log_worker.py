"""BlueprintLog in two processes against one:

    torchrun --standalone --nproc-per-node 2 -m tests.blueprint_log_worker

Each scenario trains a tiny model with and without the log, and measures on one process what all
of them measured. Every process has to come to the same result.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastgrad as fg
import tests.conftest  # noqa: F401  (quiet, one thread)
from fastgrad.errors import FastgradError
from fastgrad.identity import whole
from fastgrad.measuring import measure
from tests.models import batch_of, llama, randomised

SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {}
HELD_OUT = [batch_of(n=2, seed=s) for s in range(20, 25)]
STEPS = 4


def scenario(function: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    SCENARIOS[function.__name__] = function
    return function


def make() -> nn.Module:
    return randomised(lambda: llama(tied=True, attention_dropout=0.2))


def make_with_spare() -> nn.Module:
    """One parameter is used in evaluation alone."""
    model = make()
    model.spare = nn.Parameter(torch.ones(1))
    model.lm_head.register_forward_hook(  # type: ignore[operator, union-attr]
        lambda module, args, out: out if module.training else out * model.spare
    )
    return model


def shard(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)
    return model


def train(model: nn.Module, log: fg.BlueprintLog | None, parameters: Any = None) -> None:
    optimizer = torch.optim.SGD(
        parameters or model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1
    )
    torch.manual_seed(dist.get_rank())
    model.train()
    for step in range(STEPS):
        model(**batch_of(n=2, seed=2 * step + dist.get_rank())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if log is not None:
            log.step()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n.removeprefix("module."): whole(p).detach().clone()
            for n, p in model.named_parameters()}  # fmt: skip


def changed(one: nn.Module, other: nn.Module) -> int:
    """Parameters that are not bit for bit the same."""
    a, b = weights(one), weights(other)
    return sum(not torch.equal(a[n], b[n]) for n in a)


def copy_of(model: nn.Module) -> nn.Module:
    single = make_with_spare() if "spare" in weights(model) else make()
    single.load_state_dict({**single.state_dict(), **weights(model)})
    return single


def apart(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def against_one(model: nn.Module, log: fg.BlueprintLog, batches: Any, **options: Any) -> dict:
    last = log.measurements[-1]
    expected, loss = measure(copy_of(model), batches, **options)
    same = {
        "T": apart(last.stats.T, expected.T),
        "batch": apart(last.stats.batch_sq, expected.batch_sq),
        "example_mean": apart(
            last.stats.influence("example_mean"), expected.influence("example_mean")
        ),
        "loss": apart([last.loss], [loss]),
    }
    for name in expected.block_batch_sq:
        blocks = apart(last.stats.block_batch_sq[name], expected.block_batch_sq[name])
        same["blocks"] = max(same.get("blocks", 0.0), blocks)
    assert (last.n_batches, last.n_examples) == (expected.n_batches, expected.n_examples)
    return same


def ddp(folder: Path, batches: Any = HELD_OUT, **options: Any) -> dict[str, Any]:
    build = make_with_spare if options.get("find_unused_parameters") else make
    plain = DistributedDataParallel(build(), **options)
    model = DistributedDataParallel(build(), **options)
    train(plain, None)
    log = fg.BlueprintLog(model, batches, STEPS, steps=[1, 2], blocks="16x16")
    train(model, log)
    path = log.save_pretrained(folder / f"process-{dist.get_rank()}")
    assert [m.step for m in log.measurements] == [1, 2, STEPS]
    return {
        "changed": changed(plain, model), "written": path.exists(),
        **against_one(model, log, batches, blocks="16x16"),
    }  # fmt: skip


@scenario
def ddp_plain(folder: Path) -> dict[str, Any]:
    return ddp(folder)


@scenario
def ddp_find_unused(folder: Path) -> dict[str, Any]:
    """A pass of the trained parameters would mark the spare one as used: its gradient would be
    zero instead of none, and the optimizer would decay it."""
    return ddp(folder, find_unused_parameters=True)


@scenario
def ddp_static_graph(folder: Path) -> dict[str, Any]:
    """The first pass counts how often each hook fires: it is measured after one step."""
    return ddp(folder, static_graph=True)


@scenario
def ddp_fewer_batches_than_processes(folder: Path) -> dict[str, Any]:
    return ddp(folder, HELD_OUT[:1])


@scenario
def ddp_partial(folder: Path) -> dict[str, Any]:
    def build() -> tuple[nn.Module, fg.Partial]:
        model = make()
        chosen = fg.select(None, model=model, fraction=0.3, ranking="random", blocks="16x16")
        partial = fg.make_partial(model, chosen)
        return DistributedDataParallel(model), partial

    (plain, one), (model, other) = build(), build()
    train(plain, None, one.parameters())
    log = fg.BlueprintLog(model, HELD_OUT, STEPS, every=1, partial=other)
    train(model, log, other.parameters())
    different = changed(plain, model)
    log.blueprint()
    one.remove()
    other.remove()
    return {"changed": different, **against_one(model, log, HELD_OUT)}


@scenario
def fsdp(folder: Path) -> dict[str, Any]:
    plain, model = shard(make()), shard(make())
    train(plain, None)
    log = fg.BlueprintLog(model, HELD_OUT, STEPS, steps=[1, 2], blocks="16x16")
    train(model, log)
    path = log.save_pretrained(folder / f"process-{dist.get_rank()}")
    # Two batches at a time, of as many tokens: a batch of the result is both. 4 of the 5.
    pairs = [
        {k: torch.cat([HELD_OUT[i][k], HELD_OUT[j][k]]) for k in HELD_OUT[i]}
        for i, j in zip(*[iter(log.held_out.chosen(2))] * 2, strict=True)
    ]
    assert len(pairs) == 2
    return {
        "changed": changed(plain, model), "written": path.exists(),
        **against_one(model, log, pairs, blocks="16x16"),
    }  # fmt: skip


@scenario
def resumed(folder: Path) -> dict[str, Any]:
    """The state of one process serves all."""
    texts = []
    for stop in (None, 2):
        model = DistributedDataParallel(make())
        log = fg.BlueprintLog(model, HELD_OUT, STEPS, steps=[1])
        for step in range(STEPS):
            if step == stop:
                states: list[Any] = [log.state_dict()]
                dist.broadcast_object_list(states)
                log = fg.BlueprintLog(model, HELD_OUT, STEPS, steps=[1])
                log.load_state_dict(json.loads(json.dumps(states[0])))
            model.eval()
            model(**batch_of(n=2, seed=2 * step + dist.get_rank())).loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad  # type: ignore[operator]
                    p.grad = None
            log.step()
        texts.append(log.blueprint(created="2026-01-01").to_json())
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, texts)
    return {"texts": len({text for own in every for text in own})}


@scenario
def trainer_run(folder: Path) -> dict[str, Any]:
    """The callback in a Trainer: with and without, and resumed."""
    from fastgrad.integrations.transformers import BlueprintCallback
    from tests.training_runs import trainer

    roots: list[Any] = [str(folder)]
    dist.broadcast_object_list(roots)
    root = Path(roots[0])

    def run(name: str, callbacks: list[Any], resume: str | None = None) -> Any:
        made = trainer(
            make(), root / name, callbacks, per_device_train_batch_size=2, ddp_backend="gloo",
            save_strategy="steps", save_steps=6, max_steps=8,
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        return made

    plain = run("plain", [])
    callback, again = BlueprintCallback(HELD_OUT), BlueprintCallback(HELD_OUT)
    watched = run("watched", [callback])
    kind = type(watched.model_wrapped).__name__
    dist.barrier()
    different = changed(plain.model, watched.model)
    run("resumed", [again], str(root / "watched" / "checkpoint-6"))
    dist.barrier()
    texts = [(root / n / "gradient_blueprint.json").read_text() for n in ("watched", "resumed")]
    result = against_one(watched.model, callback.log, HELD_OUT)
    dist.barrier()
    return {
        "changed": different, "texts": len(set(texts)), "kind": kind, **result,
        "steps": [m.step for m in again.measurements],
        "logged": sum("blueprint_loss" in e for e in watched.state.log_history),
    }  # fmt: skip


@scenario
def evaluation_share(folder: Path) -> dict[str, Any]:
    """Batches of 2 examples and one measurement: at 2 %, 400 evaluated examples pay for one."""

    def measured(model: nn.Module, batches: int) -> tuple[int, float | None, list[str]]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            log = fg.BlueprintLog(
                model, HELD_OUT, STEPS, at=[1.0], evaluation_share=0.02,
                evaluated_examples=400 * batches,
            )  # fmt: skip
            found = log.blueprint()
        texts = [str(w.message) for w in told if "evaluation_share" in str(w.message)]
        return found.n_examples, log.evaluation_share, texts

    return {
        "ddp": measured(DistributedDataParallel(make()), 3),
        "ddp_few": measured(DistributedDataParallel(make()), 1),
        "fsdp": measured(shard(make()), 5),  # of 5, 4 can be measured by two
        "fsdp_few": measured(shard(make()), 1),
    }


@scenario
def refusals(folder: Path) -> dict[str, Any]:
    def refused(call: Callable[[], Any]) -> str:
        try:
            call()
        except FastgradError as error:
            return str(error)
        return "not refused"

    rank = dist.get_rank()
    other = make()
    with torch.no_grad():
        next(other.parameters()).mul_(1 + rank)
    bad = [*HELD_OUT[:2], {"input_ids": HELD_OUT[0]["input_ids"]}]  # the second process' part
    mesh = dist.init_device_mesh("cpu", (2,))
    parallel = parallelize_module(make(), mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})
    first = dist.new_group([0])
    hooked = shard(make())
    next(hooked.parameters()).register_hook(lambda grad: grad)
    return {
        "copies": refused(lambda: fg.BlueprintLog(other, HELD_OUT, every=1).step()),
        "error": refused(lambda: fg.BlueprintLog(make(), bad, every=1).step()),
        "few": refused(lambda: fg.BlueprintLog(shard(make()), HELD_OUT[:1], every=1)),
        "hooks": refused(lambda: fg.BlueprintLog(hooked, HELD_OUT, every=1).step()),
        "tensor": refused(lambda: fg.BlueprintLog(parallel, HELD_OUT, every=1)),
        "group": refused(lambda: fg.BlueprintLog(make(), HELD_OUT, every=1, group=first)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--out")
    given = parser.parse_args()
    out = given.out
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as own:
        for name in given.names:
            try:
                result = SCENARIOS[name](Path(own) / name)
            except Exception:
                result = {"failed": traceback.format_exc()}
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, result)
            found[name] = every
            if any("failed" in r for r in every):
                break  # the others may be waiting elsewhere
    if dist.get_rank() == 0:
        for name, every in found.items():
            print(name, *every, sep="\n    ")
        if out:
            Path(out).write_text(json.dumps(found))
    dist.barrier()  # gloo aborts a process that outlives its peer's connection
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
