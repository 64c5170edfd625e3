"""How often staleness is wrong: samples with and without drift of a known size, and the verdicts.

    python bench/staleness_power.py            the tables of docs/blueprint.md, about a minute
    python bench/staleness_power.py --check    compare them with the page; exit 1 if they differ

Each trial draws a released and a local sample from known expected energies. Without drift both have
the same; with drift the local ones are multiplied by lognormal factors of the given width. The true
Spearman correlation of the two sets of expected scores says how large that drift is.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from fastgrad.blueprint import Blueprint
from fastgrad.stats import Coverage, GradientStats

PAGE = Path(__file__).parent.parent / "docs" / "blueprint.md"

#: Width of the expected energies on a log scale: submodules' rms scores spread over a factor of 20.
SPREAD = 1.5
RELEASED_BATCHES = 32
#: Widths of a batch's energy around its expectation, and of the drift, on the same scale.
NOISES = (0.7, 1.5)
DRIFTS = (0.0, 0.5, 1.0, 1.5)
BATCHES = (4, 16)
SUBMODULES = (30, 100)


class Rates(NamedTuple):
    """Verdicts of the trials of one setting.

    Attributes:
        spearman: mean true correlation of the expected scores.
        trials: how many.
        verdicts: how often each came up.
    """

    drift: float
    spearman: float
    trials: int
    verdicts: Counter[str]

    def share(self, verdict: str) -> float:
        return self.verdicts[verdict] / self.trials


def sample(
    energy: np.ndarray, n_batches: int, noise: float, rng: np.random.Generator
) -> GradientStats:
    """Statistics of batches whose energies scatter around ``energy [P]``."""
    p = len(energy)
    scatter = rng.lognormal(-(noise**2) / 2, noise, (p, n_batches))
    names = [f"layers.{i}.weight" for i in range(p)]
    return GradientStats(
        names=names, shapes=[(4, 4)] * p, spec="module", sq=np.zeros((p, 0)),
        batch=np.zeros(0, dtype=np.int64), label_tokens=np.zeros(0, dtype=np.int64),
        mean_factor=np.zeros(0), sum_factor=np.zeros(0), batch_sq=energy[:, None] * scatter,
        weight_sq=np.ones(p), coverage_list=[Coverage(n, "exact") for n in names],
    )  # fmt: skip


def rates(
    submodules: int, batches: int, noise: float, drifts: Sequence[float], trials: int, seed: int = 0
) -> list[Rates]:
    """Verdicts over ``trials`` draws, for each drift; the draws are the same for all of them."""
    found: list[tuple[list[float], Counter[str]]] = [([], Counter()) for _ in drifts]
    for trial in range(trials):
        rng = np.random.default_rng([seed, submodules, batches, trial])
        energy = rng.lognormal(0, SPREAD, submodules)
        factors = rng.standard_normal(submodules)
        released = Blueprint.from_stats(
            sample(energy, RELEASED_BATCHES, noise, rng), n_bootstrap=1, command="",
            created="2000-01-01",
        )  # fmt: skip
        for drift, (true, verdicts) in zip(drifts, found, strict=True):
            there = energy * np.exp(drift * factors)
            local = sample(there, batches, noise, np.random.default_rng([seed, trial, batches]))
            true.append(float(spearmanr(energy, there).statistic))
            verdicts[released.staleness(local).verdict] += 1
    return [
        Rates(drift, float(np.mean(true)), trials, verdicts)
        for drift, (true, verdicts) in zip(drifts, found, strict=True)
    ]


def row(submodules: int, batches: int, noise: float, found: Sequence[Rates]) -> str:
    fresh, *drifted = found
    cells = [f"{fresh.share('drifted'):.0%}", f"{fresh.share('sample too small'):.0%}"]
    cells += [f"{r.share('drifted'):.0%} ({r.spearman:.2f})" for r in drifted]
    return f"| {submodules} | {batches} | {noise:g} | " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--check", action="store_true", help="compare with docs/blueprint.md")
    options = parser.parse_args(arguments)
    head = [
        "submodules", "local batches", "noise", "no drift, called drifted", "no drift, too small",
        *(f"drift {d:g}, called drifted" for d in DRIFTS[1:]),
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "--:|" * len(head)]
    for setting in itertools.product(SUBMODULES, BATCHES, NOISES):
        lines.append(row(*setting, rates(*setting, DRIFTS, options.trials)))
    text = "\n".join(lines)
    print(text)
    if options.check and text not in PAGE.read_text(encoding="utf-8"):
        print(f"{PAGE.name} says otherwise", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
