"""What does a partial training step cost? Time, operations and saved bytes against a full one.

    python bench/partial_step.py                            # llama and bert, under three minutes
    python bench/partial_step.py --models llama --width 128 --rounds 3       # a quick look
    python bench/partial_step.py --output bench/results/partial_step.json    # the guide's figures

A step is forward, backward, optimizer step and zero_grad. The full step is that of
``torch.optim.AdamW(fused=True)`` on all parameters; the others train a share of them with
``fg.SparseAdamW``: whole submodules, rows or tiles drawn at random over the model (so that the
backward pass goes all the way down, the dear case), or the last submodules (where it ends early).
Before anything is timed each contender's gradient is compared with that of a plain backward pass.
Forward and backward pass are timed inside the same steps.

Columns are ratios to the full step. Operations are PyTorch's count of products, saved bytes those
that the graph holds after the forward pass (each storage once, parameters left out), and kept
bytes are gradients and optimizer state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
import fastgrad as fg
from fastgrad.blocks import BlockGrid
from fastgrad.identity import model_parameters
from overhead_models import MODELS, Case, Shape, make
from timing import environment, interleaved, keep_freed_memory

FULL = "full AdamW"
GRANULARITIES = {"submodule": "module", "row": "row", "tile": "64x64", "last": "module"}
TOLERANCE = 1e-4  # of the largest entry: float32 rounding of two backward passes


@dataclass
class Row:
    """One contender; ratios are to the full step of the same model and batch."""

    model: str
    contender: str
    fraction: float  # of the weights, as selected
    seconds: float
    ratio: float
    low: float
    high: float
    backward_ratio: float  # forward and backward alone
    flops: int
    flop_ratio: float
    saved_bytes: int
    saved_ratio: float
    kept_bytes: int
    kept_ratio: float


def selection(model: nn.Module, kind: str, fraction: float, seed: int = 0) -> fg.Selection:
    """Blocks of the model's matrices up to ``fraction`` of all weights, at least one."""
    spec = GRANULARITIES[kind]
    shapes = {n: tuple(p.shape) for n, p in model_parameters(model).items()}
    grids = {n: BlockGrid.of(s, spec) for n, s in shapes.items() if len(s) >= 2}
    places = [(n, i) for n, g in grids.items() for i in range(g.n_blocks)]
    sizes = np.concatenate([grids[n].sizes() for n in grids])
    order = (
        np.arange(len(places))[::-1]
        if kind == "last"
        else np.random.default_rng(seed).permutation(len(places))
    )
    budget = fraction * sum(int(np.prod(s)) for s in shapes.values())
    chosen: dict[str, list[int]] = {}
    for place in order:
        if sizes[place] <= budget:
            budget -= int(sizes[place])
            name, block = places[place]
            chosen.setdefault(name, []).append(block)
        elif kind == "last" and chosen:
            break  # a small one far below would lead the backward pass down there
    if not chosen:
        raise SystemExit(f"no {kind} fits into {fraction:.0%} of this model")
    return fg.Selection(shapes, spec, {n: sorted(chosen[n]) for n in shapes if n in chosen})


class Contender:
    """A model of its own with its optimizer; calling it is one training step."""

    def __init__(self, case: Case, kind: str | None = None, fraction: float = 1.0) -> None:
        self.case = case.again(case.tied)
        self.partial = None
        self.passes: list[float] = []  # seconds of forward and backward pass of each step
        if kind is None:
            self.optimizer = torch.optim.AdamW(self.case.model.parameters(), lr=1e-5, fused=True)
            self.fraction = 1.0
        else:
            chosen = selection(self.case.model, kind, fraction)
            self.partial = fg.make_partial(self.case.model, chosen, hash_base=False)
            self.optimizer = fg.SparseAdamW(self.partial.parameters(), lr=1e-5)
            weights = sum(p.numel() for p in model_parameters(self.case.model).values())
            self.fraction = self.partial.n_parameters / weights

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(
            self.case.model.named_parameters()
            if self.partial is None
            else self.partial.named_parameters()
        )

    def backward(self) -> None:
        self.case.loss().backward()
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        start = time.perf_counter()
        self.case.loss().backward()
        self.passes.append(time.perf_counter() - start)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self, dense: dict[str, torch.Tensor]) -> None:
        """Ends the program if a gradient differs from the plain one."""
        self.case.loss().backward()
        packed = {b.name: b for b in self.partial.packed} if self.partial else {}
        for name, p in self.trained().items():
            want = packed[name].gather(dense[name]) if name in packed else dense[name]
            error = float((p.grad - want).abs().max() / want.abs().max().clamp_min(1e-12))
            if error > TOLERANCE:
                raise SystemExit(f"{name}: the gradient is off by {error:.1e} of its largest entry")
        self.optimizer.zero_grad()

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.backward()
        return counter.get_total_flops()

    def saved_bytes(self) -> int:
        own = {t.untyped_storage().data_ptr() for t in self.case.model.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.case.loss()
        total = sum(sizes.values())
        del loss
        return total

    def kept_bytes(self) -> int:
        """Gradients and what the optimizer keeps; after a step."""
        state = [t for s in self.optimizer.state.values() for t in s.values()]
        tensors = [t for t in [*state, *self.trained().values()] if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def rows_of(name: str, args: argparse.Namespace) -> list[Row]:
    case = make(name, Shape(args.width, args.layers), args.examples, args.tokens)
    contenders: dict[str, Contender] = {FULL: Contender(case)}
    for fraction in args.fractions:
        for kind in args.kinds:
            contenders[f"{kind} {fraction:.0%}"] = Contender(case, kind, fraction)
    plain = case.again(case.tied)
    plain.loss().backward()
    dense = {n: p.grad for n, p in plain.model.named_parameters()}
    for contender in contenders.values():
        contender.check(dense)
    del plain, dense
    whole = interleaved(contenders, args.rounds, warmup=1)
    full = contenders[FULL]
    baseline = full.passes[-args.rounds :]
    flops, saved, kept = full.flops(), full.saved_bytes(), full.kept_bytes()
    rows = []
    for label, c in contenders.items():
        both = zip(c.passes[-args.rounds :], baseline, strict=True)
        passes = statistics.median(own / other for own, other in both)
        t, f, s, k = whole[label], c.flops(), c.saved_bytes(), c.kept_bytes()
        rows.append(
            Row(
                name, label, c.fraction, t.seconds, t.ratio, t.low, t.high,
                passes, f, f / flops, s, s / saved, k, k / kept,
            )
        )  # fmt: skip
    return rows


def table(rows: list[Row]) -> Table:
    columns = ("model", "contender", "trained", "step", "quartiles", "forward + backward",
               "operations", "saved bytes", "kept bytes")  # fmt: skip
    out = Table(*columns, title="ratios to the full step")
    for r in rows:
        low_to_high = f"{r.low:.2f}-{r.high:.2f}"
        out.add_row(
            r.model, r.contender, f"{r.fraction:.1%}", f"{r.ratio:.2f}", low_to_high,
            f"{r.backward_ratio:.2f}", f"{r.flop_ratio:.2f}", f"{r.saved_ratio:.2f}",
            f"{r.kept_ratio:.3f}",
        )  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--kinds", nargs="+", choices=list(GRANULARITIES),
                        default=list(GRANULARITIES))  # fmt: skip
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.2, 0.05])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    kept = keep_freed_memory()
    rows = [row for name in args.models for row in rows_of(name, args)]
    Console(width=120).print(table(rows))
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k != "output"}
        report = {
            "environment": environment() | {"keeps_freed_memory": kept},
            "settings": settings,
            "rows": [asdict(r) for r in rows],
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
