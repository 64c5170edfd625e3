"""What does T cost? A training step with the full cross-influence tensor against a plain step.

    python bench/step_overhead.py                             # all of it, ten to twelve minutes
    python bench/step_overhead.py --models llama --tokens 64 --rounds 3      # a quick look
    python bench/step_overhead.py --output bench/results/step_overhead.json  # README's figures

Time and peak memory of llama and bert steps, interleaved with the peers: Opacus' ghost norms and
torch.func's per-example gradients. Before anything is timed, every contender's figures are
compared with one-example-at-a-time backward. Peak memory has a pass of its own
(bench/memory.py), and a second one on two examples: in a large batch the peak is the loss's
logits, in a small one the gradients. The C library keeps freed memory for all contenders alike
(--system-malloc leaves it as it is).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from memory import Peak, peak
from overhead_models import MODELS, Case, Shape, make
from overhead_steps import MODULE, NORMS, PEERS, PLAIN, Step, contenders
from timing import Timing, environment, interleaved, keep_freed_memory

AIM = 1.10  # of the plain step's time and memory, for what is measured by whole parameters
AIMED = (NORMS, MODULE)
SMALL = 2  # examples of the second memory pass


@dataclass
class Row:
    """One contender at one shape; all ratios are to the plain step of the same shape."""

    model: str
    tokens: int
    examples: int
    step: str
    ratio: float
    low: float
    high: float
    seconds: float
    peak_bytes: int
    memory: float
    memory_small: float | None  # with SMALL examples; None for a peer that fails there
    misses: list[str] = field(default_factory=list)


@dataclass
class Absent:
    """A peer that did not run at one shape, and why."""

    model: str
    tokens: int
    examples: int
    step: str
    why: str


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def peaks_of(steps: Mapping[str, Step]) -> dict[str, Peak]:
    return {name: peak(step) for name, step in steps.items()}


def measure(
    model: str, case: Case, time_all: Callable[[Mapping[str, Step]], dict[str, Timing]]
) -> tuple[list[Row], list[Absent], dict[str, Peak], float]:
    """Check, then memory, then time, of all contenders at one shape."""
    key = (model, case.inputs["input_ids"].shape[1], case.examples)
    found = contenders(case)
    peaks = peaks_of(found.steps)
    small = peaks
    if case.examples > SMALL:
        small = peaks_of(contenders(case.only(slice(SMALL))).steps)
    timings = time_all(found.steps)
    rows = []
    for name, t in timings.items():
        memory, less = (
            p[name].bytes / p[PLAIN].bytes if name in p else None for p in (peaks, small)
        )
        figures = (t.ratio, t.low, t.high, t.seconds, peaks[name].bytes, memory, less)
        row = Row(*key, name, *figures)
        if name in AIMED:
            row.misses = list(misses(row, timings))
        rows.append(row)
    absent = [Absent(*key, name, why) for name, why in found.absent.items()]
    return rows, absent, small, found.error


def misses(row: Row, timings: Mapping[str, Timing]) -> Iterator[str]:
    """What a row lacks for the aim: little above the plain step, and no slower than a peer."""
    if row.ratio > AIM:
        yield f"time > {AIM:.2f}"
    if max(row.memory, row.memory_small or 0) > AIM:
        yield f"memory > {AIM:.2f}"
    for name in PEERS:
        if name in timings and row.low > timings[name].high:  # quartiles apart: no accident
            yield f"slower than {name}"


def table(title: str, rows: list[Row], absent: list[Absent]) -> Table:
    out = Table(title=title)
    columns = ("step", "ms", "time", "quartiles", "peak MiB", "memory", f"{SMALL} examples", "aim")
    for column in columns:
        out.add_column(column, justify="left" if column in ("step", "aim") else "right")
    for r in rows:
        aim = f"[bold red]missed: {', '.join(r.misses)}" if r.misses else "met"
        out.add_row(
            r.step,
            f"{r.seconds * 1e3:.0f}",
            f"{r.ratio:.3f}",
            f"{r.low:.3f}–{r.high:.3f}",
            f"{r.peak_bytes / 2**20:.0f}",
            f"{r.memory:.3f}",
            "–" if r.memory_small is None else f"{r.memory_small:.3f}",
            aim if r.step in AIMED else "",
        )
    for a in absent:
        out.add_row(a.step, *["–"] * 6, a.why)
    return out


def explain(peaks: Mapping[str, Peak]) -> str:
    """Whose tensors are alive at the peak of T's step, and at that of the plain step."""
    lines = []
    for name in (PLAIN, MODULE):
        lines.append(f"{name}: {peaks[name].bytes / 2**20:.2f} MiB at the peak, of these")
        for path, size in peaks[name].holders.most_common(8):
            lines.append(f"{size / 2**20:9.2f} MiB  {path}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--width", type=int, default=Shape.width)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--tied", action="store_true", help="tie llama's output layer as well")
    parser.add_argument("--explain", action="store_true", help="whose tensors make the peak")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--system-malloc", action="store_true", help="leave the heap as it is")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time on one thread: for a machine that others use too",
    )
    args = parser.parse_args()
    if not args.system_malloc and not keep_freed_memory():
        print("this C library cannot keep freed memory: page faults are in the figures")
    if args.cpu_time:
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus' hooks
    warnings.filterwarnings("ignore", message="There is a performance drop")  # see torch_func_step
    console = Console(width=None if sys.stdout.isatty() else 120)
    shape = Shape(args.width, args.layers, args.tied)
    clock: dict[str, Any] = {"clock": cpu_seconds} if args.cpu_time else {}
    rows: list[Row] = []
    absent: list[Absent] = []
    for model in args.models:
        for tokens in args.tokens:
            case = make(model, shape, max(2, args.batch_tokens // tokens), tokens)
            size = f"{case.examples} x {tokens} tokens"

            def time_all(steps: Mapping[str, Step], size: str = size) -> dict[str, Timing]:
                with Progress(console=console, transient=True) as bar:
                    tick = partial(bar.advance, bar.add_task(size, total=args.rounds))
                    return interleaved(steps, args.rounds, warmup=0, progress=tick, **clock)

            new, gone, peaks, error = measure(model, case, time_all)
            console.print(table(f"{model}, {args.layers} x {args.width}, {size}", new, gone))
            console.print(f"T against one-example-at-a-time backward: {error:.1e} at worst\n")
            if args.explain:
                console.print(explain(peaks), "", highlight=False)
            rows += new
            absent += gone
            gc.collect()  # peers' models and hooks refer to each other
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k not in ("output", "explain")}
        data = {
            "environment": environment(),
            "settings": settings | {"aim": AIM, "small": SMALL},
            "rows": [asdict(r) for r in rows],
            "absent": [asdict(a) for a in absent],
        }
        args.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
