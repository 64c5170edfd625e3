"""What does BlueprintCallback cost, beside the evaluation that a run makes anyway?

    python bench/callback_cost.py                                       # four minutes
    python bench/callback_cost.py --json bench/results/callback_cost.json

Four figures, in processor time on one thread:

1. Measuring against the plain forward and backward passes that it needs, and against evaluation
   (forward passes without gradients), on the same batches, interleaved.
2. A whole Trainer run: all seconds in the callback against all seconds in ``Trainer.evaluate``, at
   defaults, with one batch in each measurement, and with ``evaluation_share`` in a run of more
   evaluations.
3. What does not grow with the batches that are measured: the hash of the weights, hooks and
   stand-ins, the fits of the blueprint.
4. The callback where nothing is due, for each training step.

Before anything is timed: measured norms are those of gradients made by hand, and the run's
weights are bit for bit those of a run without the callback.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
from fastgrad.blueprint_log import BlueprintLog
from fastgrad.evaluation_budget import COST
from fastgrad.identity import weights_hash
from fastgrad.integrations.transformers import BlueprintCallback, measure
from overhead_models import VOCAB, Shape, llama
from step_overhead import cpu_seconds
from timing import environment, interleaved, keep_freed_memory

AIM = 0.02  # of evaluation time
PLAIN, EVALUATION = "forward and backward", "evaluation"
NORMS, MEASURED = "measuring, norms alone", "measuring"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Of both models, their batches, and the run."""

    rows: int = 8
    tokens: int = 128
    batches: int = 3  # of part 1
    width: int = 512
    layers: int = 4
    run_width: int = 192
    run_layers: int = 2
    validation: int = 60  # batches that an evaluation of the run reads
    steps: int = 20
    evaluations: int = 4
    share_validation: int = 240  # of the run with ``evaluation_share``: pays for 4 batches exactly
    share_evaluations: int = 10


@dataclass
class Part:
    """One contender on the same batches; ratios are to the forward and backward passes."""

    name: str
    seconds: float
    ratio: float
    low: float
    high: float


@dataclass
class Run:
    """One Trainer run; seconds over all of it."""

    name: str
    measured_batches: int
    measurements: int
    evaluations: int
    evaluated_batches: int  # in each
    evaluation_seconds: float
    callback_seconds: float
    passes_seconds: float  # of plain forward and backward passes over as many batches
    share: float  # callback by evaluation
    step_seconds: float


class Rows(Dataset):
    def __init__(self, n: int, tokens: int, seed: int) -> None:
        self.ids = torch.randint(3, VOCAB, (n, tokens),
                                 generator=torch.Generator().manual_seed(seed))  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Batch:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def batches_of(rows: Rows, each: int) -> list[Batch]:
    return [{"input_ids": part, "labels": part} for part in rows.ids.split(each)]


# -- 1: the same batches -------------------------------------------------------------------------


def passes(model: nn.Module, batches: list[Batch]) -> dict[str, Callable[[], object]]:
    def plain() -> None:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()

    def evaluation() -> None:
        with torch.no_grad():
            for batch in batches:
                float(model(**batch).loss)

    return {
        PLAIN: plain,
        EVALUATION: evaluation,
        NORMS: lambda: measure(model, batches, per_example=False),
        MEASURED: lambda: measure(model, batches),
    }


def check(model: nn.Module, batches: list[Batch]) -> None:
    """Raises SystemExit unless measured norms are those of gradients made by hand."""
    stats, _ = measure(model, batches[:2])
    found = dict(zip(stats.names, stats.grad_norm.tolist(), strict=True))
    squares = dict.fromkeys(found, 0.0)
    for batch in batches[:2]:
        model(**batch).loss.backward()
        for name, p in model.named_parameters():
            squares[name] += float(p.grad.double().square().sum())
        model.zero_grad()
    for name, norm in found.items():
        if not math.isclose(norm, math.sqrt(squares[name] / 2), rel_tol=1e-4):
            raise SystemExit(f"{name}: measured {norm}, by hand {math.sqrt(squares[name] / 2)}")


def same_batches(size: Size, rounds: int) -> list[Part]:
    model = llama(Shape(size.width, size.layers), tied=False).eval()
    rows = Rows(size.batches * size.rows, size.tokens, 1)
    batches = batches_of(rows, size.rows)
    check(model, batches)
    timings = interleaved(passes(model, batches), rounds, warmup=1, clock=cpu_seconds)
    return [Part(name, t.seconds, t.ratio, t.low, t.high) for name, t in timings.items()]


# -- 2 and 3: a run ------------------------------------------------------------------------------


class Timed(BlueprintCallback):
    """Counts the seconds of all its events."""

    seconds = 0.0

    def _timed(self, event: str, *args: Any, **kwargs: Any) -> None:
        start = time.process_time()
        getattr(super(), event)(*args, **kwargs)
        self.seconds += time.process_time() - start

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._timed("on_train_begin", *args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._timed("on_step_end", *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._timed("on_train_end", *args, **kwargs)


class TimedTrainer(Trainer):
    """Counts the seconds of its evaluations."""

    evaluation_seconds = 0.0
    evaluations = 0

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        found = super().evaluate(*args, **kwargs)
        self.evaluation_seconds += time.process_time() - start
        self.evaluations += 1
        return found


@dataclass(frozen=True)
class Kind:
    """Of a run: evaluations, batches in each, and how many of them are measured."""

    evaluations: int
    validation: int
    options: dict[str, Any]


def kinds_of(size: Size) -> dict[str, Kind]:
    few = size.evaluations, size.validation
    many = size.share_evaluations, size.share_validation
    return {
        "defaults": Kind(*few, {}),
        "one batch each": Kind(*few, {"examples": 1}),
        f"evaluation_share={AIM}": Kind(*many, {"evaluation_share": AIM}),
    }


def trained(size: Size, kind: Kind, callback: Timed | None) -> tuple[TimedTrainer, float]:
    """A run, and its seconds; without evaluations if there is no callback."""
    held_out = Rows(kind.validation * size.rows, size.tokens, 2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=size.steps, per_device_train_batch_size=size.rows,
            per_device_eval_batch_size=size.rows,
            eval_strategy="no" if callback is None else "steps",
            eval_steps=size.steps // kind.evaluations, prediction_loss_only=True,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
            dataloader_pin_memory=False, logging_steps=size.steps,
        )  # fmt: skip
        trainer = TimedTrainer(
            model=llama(Shape(size.run_width, size.run_layers), tied=False), args=arguments,
            train_dataset=Rows(size.steps * size.rows, size.tokens, 3), eval_dataset=held_out,
            callbacks=[] if callback is None else [callback],
        )  # fmt: skip
        trainer.pop_callback(PrinterCallback)
        start = time.process_time()
        trainer.train()
        return trainer, time.process_time() - start


def whole_run(size: Size, rounds: int) -> list[Run]:
    """Runs of each kind, in turn; medians of the rounds."""
    kinds = kinds_of(size)
    bare, _ = trained(size, kinds["defaults"], None)
    expected = bare.model.state_dict()
    found: dict[str, list[Run]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, kind in kinds.items():
            held_out = batches_of(Rows(kind.validation * size.rows, size.tokens, 2), size.rows)
            callback = Timed(held_out, **kind.options)
            trainer, seconds = trained(size, kind, callback)
            for key, value in trainer.model.state_dict().items():
                if not torch.equal(value, expected[key]):
                    raise SystemExit(f"{key}: the callback changed the training run")
            last = callback.measurements[-1]
            spent, evaluation = callback.seconds, trainer.evaluation_seconds
            plain = passes(trainer.model.eval(), held_out[: last.n_batches])[PLAIN]
            passed = len(callback.measurements) * cpu_seconds(plain)
            found[name].append(Run(
                name, last.n_batches, len(callback.measurements), trainer.evaluations,
                kind.validation, evaluation, spent, passed, spent / evaluation,
                (seconds - spent - evaluation) / size.steps,
            ))  # fmt: skip
    return [sorted(runs, key=lambda run: run.share)[len(runs) // 2] for runs in found.values()]


def fixed_seconds(size: Size, repeats: int = 5) -> dict[str, float]:
    """What does not grow with the batches, on the run's model; the first two once a measurement."""
    model = llama(Shape(size.run_width, size.run_layers), tied=False).eval()
    log = BlueprintLog(model, batches_of(Rows(4 * size.rows, size.tokens, 2), size.rows), at=[1.0])
    log.blueprint()
    smallest = batches_of(Rows(1, 2, 1), 1)  # two tokens: its passes take next to nothing
    calls: dict[str, Callable[[], object]] = {
        "hash": lambda: weights_hash(model),
        "measure": lambda: measure(model, smallest),
        "blueprint": lambda: log.blueprint(),  # of what was measured: a hash and the fits
    }
    found = {
        name: statistics.median(cpu_seconds(call) for _ in range(repeats))
        for name, call in calls.items()
    }
    return {
        "the hash of the weights": found["hash"],
        "hooks, stand-ins and sums, the rest of a measurement of two tokens":
            found["measure"] - found["hash"],
        "the fits of the blueprint, once a run": found["blueprint"] - found["hash"],
    }  # fmt: skip


# -- 4 -------------------------------------------------------------------------------------------


def idle_seconds(size: Size, calls: int = 50_000) -> float:
    """Of one call where nothing is due."""
    held_out = batches_of(Rows(size.rows, size.tokens, 2), size.rows)
    callback = BlueprintCallback(held_out)

    class Arguments:
        distributed_state, deepspeed, fp16 = None, None, False

    class State:
        max_steps, global_step, num_input_tokens_seen = 10**9, 0, 0
        stateful_callbacks: dict[str, Any] = {}  # noqa: RUF012

    state = State()
    model = llama(Shape(size.run_width, size.run_layers), tied=False)
    callback.on_train_begin(Arguments(), state, None, model=model)
    times = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(calls):
            state.global_step += 1
            callback.on_step_end(None, state, None)
        times.append((time.process_time() - start) / calls)
    assert not callback.measurements
    return statistics.median(times)


# -- report --------------------------------------------------------------------------------------


def readings(parts: list[Part], runs: list[Run], idle: float) -> dict[str, float]:
    """What "2 % of evaluation time" may mean, as shares of evaluation time."""
    by = {p.name: p for p in parts}
    evaluation = by[EVALUATION].seconds
    run = runs[0]
    return {
        "measuring the same batches": by[MEASURED].seconds / evaluation,
        "the passes that measuring needs, the same batches": by[PLAIN].seconds / evaluation,
        "what measuring adds to its passes, the same batches":
            (by[MEASURED].seconds - by[PLAIN].seconds) / evaluation,
        "the callback in a whole run, defaults": run.share,
        "what it adds to its passes in a whole run, defaults":
            (run.callback_seconds - run.passes_seconds) / run.evaluation_seconds,
        "the callback in a whole run, one batch each": runs[1].share,
        "the idle callback in a whole run":
            idle * Size.steps / run.evaluation_seconds,
        "evaluated batches for which defaults cost 2 %":
            run.share * run.evaluations * run.evaluated_batches / AIM,
        "the callback in a whole run, evaluation_share": runs[2].share,
        "evaluated examples that a measured one took in it": _cost(runs[2]),
    }  # fmt: skip


def _cost(run: Run) -> float:
    measured = run.callback_seconds / (run.measurements * run.measured_batches)
    return measured / (run.evaluation_seconds / (run.evaluations * run.evaluated_batches))


def show(
    parts: list[Part], runs: list[Run], fixed: dict[str, float], idle: float, out: Console
) -> None:
    table = Table(title=f"{Size.batches} batches", title_justify="left")
    for heading in ("", "seconds", "by forward and backward", "quartiles"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for p in parts:
        table.add_row(p.name, f"{p.seconds:.2f}", f"{p.ratio:.3f}", f"{p.low:.3f}–{p.high:.3f}")
    out.print(table)
    for run in runs:
        out.print(
            f"{run.name}: {run.measurements} measurements of {run.measured_batches} batches took "
            f"{run.callback_seconds:.2f} s beside {run.evaluations} evaluations of "
            f"{run.evaluated_batches} batches in {run.evaluation_seconds:.2f} s: {run.share:.2%}"
        )
    for name, seconds in fixed.items():
        out.print(f"{name}: {seconds * 1e3:.1f} ms")
    out.print(f"where nothing is due: {idle * 1e6:.2f} µs a step, "
              f"{idle / runs[0].step_seconds:.1e} of a training step")  # fmt: skip
    for name, value in readings(parts, runs, idle).items():
        if name.startswith("evaluated"):
            took = "took" in name
            out.print(f"{name}: {value:,.2f}, planned with {COST:g}" if took else
                      f"{name}: {value:,.0f}")  # fmt: skip
            continue
        verdict = "within" if value <= AIM else "above"
        out.print(f"{name}: {value:.2%} of evaluation time, {verdict} {AIM:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=4, help="of part 1")
    parser.add_argument("--runs", type=int, default=1, help="rounds of part 2")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    out = Console(highlight=False, width=110)
    size = Size()
    parts = same_batches(size, given.rounds)
    runs = whole_run(size, given.runs)
    fixed, idle = fixed_seconds(size), idle_seconds(size)
    show(parts, runs, fixed, idle, out)
    if given.json:
        record = {
            "command": f"python bench/callback_cost.py --rounds {given.rounds} --runs {given.runs}",
            "environment": environment(), "size": asdict(size), "aim": AIM, "planned_cost": COST,
            "same_batches": [asdict(p) for p in parts], "runs": [asdict(r) for r in runs],
            "fixed_seconds": fixed, "idle_seconds": idle, "readings": readings(parts, runs, idle),
        }  # fmt: skip
        given.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
