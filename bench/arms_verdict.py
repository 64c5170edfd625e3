"""Is a peer better, level or worse? Paired over test rows and training seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of the intervals
EQUAL_MEMORY = 0.05  # amounts that differ by less count as equal


@dataclass(frozen=True)
class Difference:
    """Mean of one arm's loss less another's, with an interval of confidence :data:`LEVEL`."""

    mean: float
    low: float
    high: float
    seeds: int
    rows: int

    @property
    def word(self) -> str:
        """What it says about the first arm; lower losses are better."""
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "level"


def difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Difference:
    """Paired comparison of losses ``[seeds, rows]``; both saw the same rows and seeds.

    Test rows are the same for every seed, so the ``seeds * rows`` differences are no independent
    sample: rows and seeds are crossed random effects. With the mean squares of seeds, rows and the
    rest, the variance of the mean is ``(MS_seeds + MS_rows - MS_rest) / (seeds * rows)``, at least
    that of the larger one alone; degrees of freedom after Satterthwaite (1946). With one seed the
    interval covers test rows only.

    Raises:
        ValueError: if shapes differ, or there are fewer than two rows.
    """
    shape = np.shape(a)
    if shape != np.shape(b) or len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"losses of shapes {shape} and {np.shape(b)} cannot be paired")
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    seeds, rows = d.shape
    mean = float(d.mean())
    by_row = rows_square(d)
    if seeds == 1:
        variance, freedom = by_row / rows, float(rows - 1)
    else:
        by_seed = rows * float(d.mean(1).var(ddof=1))
        rest = d - d.mean(1, keepdims=True) - d.mean(0, keepdims=True) + mean
        remaining = float((rest**2).sum()) / ((seeds - 1) * (rows - 1))
        squares = max(by_seed + by_row - remaining, by_seed, by_row)
        parts = (
            by_seed**2 / (seeds - 1) + by_row**2 / (rows - 1)
            + remaining**2 / ((seeds - 1) * (rows - 1))
        )  # fmt: skip
        variance = squares / (seeds * rows)
        freedom = squares**2 / parts if parts > 0 else float(rows - 1)
        freedom = max(freedom, float(seeds - 1))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * math.sqrt(variance)
    return Difference(mean, mean - half, mean + half, seeds, rows)


def rows_square(d: np.ndarray) -> float:
    """Mean square between rows of differences ``[seeds, rows]``."""
    return d.shape[0] * float(d.mean(0).var(ddof=1))


def memory_word(peer: float, own: float) -> str:
    """How much memory the peer takes: less, equal or more."""
    if abs(peer - own) <= EQUAL_MEMORY * own:
        return "equal"
    return "less" if peer < own else "more"


@dataclass(frozen=True)
class Verdict:
    """One arm against the best of ours."""

    key: str
    label: str
    role: str
    against: str
    found: Difference
    memory: str  # less, equal, more
    memory_ratio: float

    @property
    def beats(self) -> bool:
        """Lower loss at no more memory: where the aim is missed."""
        return self.found.word == "better" and self.memory != "more"

    def sentence(self) -> str:
        f = self.found
        return (
            f"{self.label}: {f.word} at {self.memory} memory ({self.memory_ratio:.2f} x); "
            f"loss {f.mean:+.3f} [{f.low:+.3f}, {f.high:+.3f}]"
        )


def aim(verdicts: Sequence[Verdict], role: str) -> str:
    """Whether the aim is met: at equal memory or less, no peer has a better held-out loss."""
    judged = [v for v in verdicts if v.role == role]
    if not judged:
        return "no peer ran, so nothing is said about the aim"
    beaten = [v for v in judged if v.beats]
    if beaten:
        return "missed: better at equal or less memory are " + ", ".join(v.label for v in beaten)
    words = {w: sum(v.found.word == w for v in judged) for w in ("better", "level", "worse")}
    close = [
        f"{v.label} {v.found.mean:+.3f}"
        for v in judged
        if v.found.word == "level" and v.found.mean < 0 and v.memory != "more"
    ]
    return (
        f"met: none of {len(judged)} peers is better at equal or less memory "
        f"({words['worse']} worse, {words['level']} level, {words['better']} better with more "
        "memory)" + (f"; lower by mean, within the interval: {', '.join(close)}" if close else "")
    )
