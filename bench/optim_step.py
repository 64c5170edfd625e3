"""What does an optimizer step cost? SparseAdamW against torch.optim.AdamW(fused=True) on all.

    python bench/optim_step.py                              # all of it, three to five minutes
    python bench/optim_step.py --rounds 3 --layers 1        # a quick look
    python bench/optim_step.py --json bench/results/optim_step.json      # README's figures

Weights of a Llama-shaped model (67 million by default), random gradients. The peer updates every
weight; SparseAdamW updates 100, 20 and 1 % of them, chosen by whole submodules and by tiles, with
all that belongs to its step: the look for NaN, the update, and writing packed blocks through to
the full weights. Before anything is timed one step of every contender is compared with AdamW's on
the selected weights, and the others must not have changed a bit. Contenders run in turn, round
after round; each has its own tensors, so none finds another's in cache. AdamW does not look for
NaN: rows "without check" (check_finite=False) are like for like, and the others show what the look
costs, one more reading of the gradients. The last table times whole training steps of a Llama
model, forward, backward and update, with all weights trained.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial as bound
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import fastgrad as fg
import overhead_models
from fastgrad.blocks import BlockGrid
from step_overhead import cpu_seconds
from timing import environment, interleaved, keep_freed_memory

PEER = "torch.optim.AdamW(fused=True), all weights"
AIMS = {1.0: 1.05, 0.2: 0.25, 0.01: 0.03}
TILE = "128x128"
WITHOUT = ", without check"
READING = "all gradients read once, no step"
RATE = 1e-3


@dataclass(frozen=True)
class Size:
    """Shapes of a Llama model without its attention's arithmetic: weights alone."""

    width: int = 768
    inner: int = 2048
    layers: int = 6
    vocabulary: int = 32_000


@dataclass
class Row:
    """One contender; the ratio is to the peer's step in the same round."""

    step: str
    share: float  # of all weights that it trains
    aim: float | None
    ratio: float
    low: float
    high: float
    seconds: float

    @property
    def met(self) -> bool:
        return self.aim is None or self.ratio <= self.aim


class Weights(nn.Module):
    """As many linear layers as a Llama model has, an embedding, and norms' vectors."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        super().__init__()
        w = size.width
        self.embedding = nn.Embedding(size.vocabulary, w, dtype=dtype)
        shapes = [(w, w)] * 4 + [(size.inner, w)] * 2 + [(w, size.inner)]
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(c, r, bias=False, dtype=dtype) for r, c in shapes)
            for _ in range(size.layers)
        )
        self.norms = nn.ParameterList(torch.ones(w, dtype=dtype) for _ in range(2 * size.layers))


def select(model: nn.Module, spec: str, share: float) -> fg.Selection:
    """Blocks at random, as close to a share of all weights as whole blocks come."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    grids = {n: BlockGrid.of(s, spec) for n, s in shapes.items()}
    every = [(n, b, int(k)) for n, g in grids.items() for b, k in enumerate(g.sizes())]
    budget = round(share * sum(k for _, _, k in every))
    chosen: dict[str, list[int]] = {}
    for i in np.random.default_rng(0).permutation(len(every)):
        name, block, elements = every[i]
        if elements <= budget:
            chosen.setdefault(name, []).append(block)
            budget -= elements
    return fg.Selection(shapes, spec, {n: np.sort(chosen[n]) for n in shapes if n in chosen})


@dataclass
class Contender:
    """An optimizer over weights of its own, with gradients already there."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    partial: Any = None
    share: float = 1.0

    def step(self) -> None:
        self.optimizer.step()


@dataclass
class Reading:
    """One reading of all gradients and nothing else: what no look for NaN can undercut."""

    model: nn.Module
    partial: Any = None
    share: float = 1.0

    def step(self) -> None:
        for p in self.model.parameters():
            assert p.grad is not None
            p.grad.sum()


def gradient(name: str, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator)


def peer(model: nn.Module) -> Contender:
    """AdamW in float32; gradients of bfloat16 weights would be bfloat16 for both."""
    for name, p in model.named_parameters():
        p.grad = gradient(name, p.shape).to(p.dtype)
    return Contender(model, torch.optim.AdamW(model.parameters(), lr=RATE, fused=True))


def sparse(
    model: nn.Module, spec: str, share: float, master: torch.dtype | None, **options: Any
) -> Contender:
    selection = select(model, spec, share)
    total = sum(p.numel() for p in model.parameters())
    partial = fg.make_partial(model, selection, master, hash_base=False)
    packed = {b.name: b for b in partial.packed}
    for name, p in partial.named_parameters():
        dense = gradient(name, torch.Size(selection.shapes[name]))
        grad = packed[name].gather(dense).view_as(p) if name in packed else dense
        p.grad = grad.to(p.dtype)
    optimizer = fg.SparseAdamW(partial.parameters(), lr=RATE, **options)
    return Contender(model, optimizer, partial, partial.n_parameters / total)


def contenders(
    size: Size, dtype: torch.dtype
) -> Iterator[tuple[str, float | None, Contender | Reading]]:
    torch.manual_seed(0)
    start = Weights(size, dtype)
    yield PEER, None, peer(copy.deepcopy(start).float())
    master = None if dtype == torch.float32 else torch.float32
    for share, aim in AIMS.items():
        for spec in ("module", TILE):
            if share == 1.0 and spec == TILE and master is None:
                continue  # all tiles of a weight are the weight: trained as it stands
            for look in (True, False):
                made = sparse(copy.deepcopy(start), spec, share, master, check_finite=look)
                yield f"{share:.0%} by {spec}" + ("" if look else WITHOUT), aim, made
    yield READING, None, Reading(peer(copy.deepcopy(start)).model)


def verify(name: str, contender: Contender, start: nn.Module, want: nn.Module) -> None:
    """After one step of it and of AdamW: equal where trained, untouched elsewhere.

    Raises:
        AssertionError: naming contender and parameter.
    """
    selection = contender.partial.selection
    own = contender.model.state_dict()
    for parameter, before in start.state_dict().items():
        after, target = own[parameter], want.state_dict()[parameter]
        grid = BlockGrid.of(tuple(before.shape), selection.spec)
        mask = torch.zeros(before.shape, dtype=torch.bool)
        view = mask if mask.ndim == 2 else mask.view(1, -1)
        for block in selection.blocks.get(parameter, ()):
            r0, r1, c0, c1 = grid.bounds(int(block))
            view[r0:r1, c0:c1] = True
        assert torch.equal(after[~mask], before[~mask]), f"{name}: {parameter} moved unselected"
        # one unit in the last place: a bfloat16 weight may round to either side
        rtol = 1e-6 if before.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(
            after[mask].float(), target[mask].to(before.dtype).float(), rtol=rtol, atol=1e-7,
            msg=lambda m, p=parameter: f"{name}: {p}: {m}",
        )  # fmt: skip


def measure(
    size: Size, dtype: torch.dtype, rounds: int, clock: dict[str, Any], console: Console
) -> list[Row]:
    """Build, verify, time. All contenders live at once, each with tensors of its own."""
    torch.manual_seed(0)
    start = Weights(size, dtype)
    made: dict[str, tuple[float | None, Contender | Reading]] = {}
    for name, aim, contender in contenders(size, dtype):
        contender.step()
        if contender.partial is not None:
            verify(name, contender, start, made[PEER][1].model)
        made[name] = aim, contender
    calls: dict[str, Callable[[], None]] = {n: c.step for n, (_, c) in made.items()}
    with Progress(console=console, transient=True) as bar:
        tick = bound(bar.advance, bar.add_task("rounds", total=rounds + 2))
        timings = interleaved(calls, rounds, progress=tick, **clock)
    return [
        Row(name, made[name][1].share, made[name][0], t.ratio, t.low, t.high, t.seconds)
        for name, t in timings.items()
    ]


def training(
    rounds: int, examples: int, tokens: int, clock: dict[str, Any], console: Console
) -> list[Row]:
    """Whole training steps of the Llama model of ``bench/step_overhead.py``, all weights trained.

    Raises:
        AssertionError: if a first loss of two contenders differs.
    """
    case = overhead_models.make("llama", overhead_models.Shape(), examples, tokens)
    loops: dict[str, Callable[[], float]] = {}

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
        def step() -> float:
            optimizer.zero_grad()
            loss = model(**case.inputs).loss
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step

    model: nn.Module = case.again(False).model
    loops[PEER] = loop(model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))
    for name, look in (("SparseAdamW", True), ("SparseAdamW" + WITHOUT, False)):
        model = case.again(False).model
        partial = fg.make_partial(model, select(model, "module", 1.0), hash_base=False)
        optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-5, check_finite=look)
        loops[name] = loop(model, optimizer)
    first = {name: step() for name, step in loops.items()}
    assert len(set(first.values())) == 1, f"first losses differ: {first}"
    second = [step() for step in loops.values()]
    assert max(second) - min(second) < 1e-5 * max(second), f"second losses differ: {second}"
    with Progress(console=console, transient=True) as bar:
        tick = bound(bar.advance, bar.add_task("rounds", total=rounds + 2))
        timings = interleaved(loops, rounds, progress=tick, **clock)
    return [Row(n, 1.0, None, t.ratio, t.low, t.high, t.seconds) for n, t in timings.items()]


def table(title: str, rows: list[Row]) -> Table:
    out = Table(title=title)
    for column in ("step", "trained", "ms", "ratio", "quartiles", "aim"):
        out.add_column(column, justify="left" if column in ("step", "aim") else "right")
    for r in rows:
        verdict = "" if r.aim is None else f"<= {r.aim:.2f} " + ("met" if r.met else "MISSED")
        out.add_row(
            r.step,
            f"{r.share:.1%}",
            f"{r.seconds * 1e3:.2f}",
            f"{r.ratio:.3f}",
            f"{r.low:.3f}–{r.high:.3f}",
            verdict,
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--width", type=int, default=Size.width)
    parser.add_argument("--inner", type=int, default=Size.inner)
    parser.add_argument("--vocabulary", type=int, default=Size.vocabulary)
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"],
        help="of the weights; bfloat16 ones are trained through float32 masters",
    )  # fmt: skip
    parser.add_argument("--examples", type=int, default=4, help="of a whole training step")
    parser.add_argument("--tokens", type=int, default=128, help="of each example there")
    parser.add_argument("--json", type=Path, help="write the figures as JSON")
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
    clock: dict[str, Any] = {"clock": cpu_seconds} if args.cpu_time else {}
    console = Console(width=None if sys.stdout.isatty() else 120)
    size = Size(args.width, args.inner, args.layers, args.vocabulary)
    results: dict[str, list[Row]] = {}
    for dtype in args.dtypes:
        rows = measure(size, getattr(torch, dtype), args.rounds, clock, console)
        results[dtype] = rows
        total = sum(p.numel() for p in Weights(size, torch.float32).parameters())
        console.print(table(f"{total / 1e6:.0f} million weights in {dtype}", rows))
    whole = training(args.rounds, args.examples, args.tokens, clock, console)
    batch = f"{args.examples} x {args.tokens} tokens"
    console.print(table(f"whole training steps, all weights trained, {batch}", whole))
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        data = {
            "environment": environment(),
            "settings": settings | {"aims": {str(k): v for k, v in AIMS.items()}},
            "rows": {d: [asdict(r) | {"met": r.met} for r in rows] for d, rows in results.items()},
            "training": [asdict(r) for r in whole],
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
