"""How well scores of blocks rank what training a block does: rank correlations and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import rankdata

from fastgrad.concentration import FloatArray, IntArray, Interval, check_bootstrap, interval, plain
from fastgrad.errors import StatsError

#: What a score is, in the order of tables.
SCORES = {
    "norm": "gradient norm",
    "rms": "root mean square of the gradient",
    "abs": "sum of the gradient's absolute values",
    "fisher": "gᵀ (diagonal Fisher + damping)⁻¹ g",
    "kfac": "gᵀ (Kronecker-factored Fisher + damping)⁻¹ g",
    "alignment": "inner product of the training and the held-out gradient",
    "size": "number of elements, as a control",
}
EFFECTS = {
    "gradient_step": "one plain gradient step of the block alone",
    "adamw": "a few AdamW steps of the block alone",
}
#: A rank correlation lower by up to this much still counts as good as another.
TOLERANCE = 0.1

ProxyVerdict = Literal["better", "as well", "worse", "undecided"]


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation of a score with a measured effect, over blocks.

    Attributes:
        score, effect: keys of ``SCORES`` and ``EFFECTS``.
        per_element: both are divided by the block's number of elements first (the norm by its
            square root, which makes it the rms; the size is left as it is).
        value, interval: correlation and its bootstrap interval over blocks.
        n: blocks for which the score is known.
    """

    score: str
    effect: str
    per_element: bool
    value: float
    interval: Interval
    n: int


@dataclass(frozen=True)
class ProxyComparison:
    """The norm's rank correlation less another score's, on the blocks for which both are known.

    Attributes:
        score, effect, per_element: as in :class:`RankCorrelation`.
        norm, other: both correlations.
        difference, interval: ``norm - other`` and its bootstrap interval (paired, over blocks).
        n: blocks.
        verdict: of the norm: ``better`` (the interval lies above 0), ``worse`` (below 0), ``as
            well`` (it reaches no farther below 0 than ``TOLERANCE``), else ``undecided``.
    """

    score: str
    effect: str
    per_element: bool
    norm: float
    other: float
    difference: float
    interval: Interval
    n: int
    verdict: ProxyVerdict


@dataclass(frozen=True, eq=False)
class ProxyReport:
    """Scores of every parameter beside what training it alone did to a held-out loss.

    Attributes:
        names: of P parameters, the blocks.
        sizes: ``[P]`` elements of each.
        scores: key of ``SCORES`` -> ``[P]``; NaN where not known.
        effects: key of ``EFFECTS`` -> ``[P]`` decrease of the held-out loss (positive: it helped).
        reasons: parameter name -> why its Kronecker-factored score is not known.
        loss: held-out loss at the start.
        resolution: what two losses have to differ by to be told apart; smaller effects are noise.
        rate: of the plain gradient step.
        adam_rate, steps: of AdamW.
        damping, damping_of: see :func:`fastgrad.proxy_quality`.
        n_examples: rows that the Fisher matrices are made of.
        correlations, comparisons: of every score and effect, in total and per element.
        n_bootstrap, seed: of the intervals.
    """

    names: tuple[str, ...]
    sizes: IntArray
    scores: Mapping[str, FloatArray]
    effects: Mapping[str, FloatArray]
    reasons: Mapping[str, str]
    loss: float
    resolution: float
    rate: float
    adam_rate: float
    steps: int
    damping: float
    damping_of: str
    n_examples: int
    n_bootstrap: int
    seed: int
    correlations: tuple[RankCorrelation, ...] = field(default=())
    comparisons: tuple[ProxyComparison, ...] = field(default=())

    def correlation(
        self, score: str, effect: str, per_element: bool = False
    ) -> RankCorrelation:
        """One entry of :attr:`correlations`.

        Raises:
            StatsError: if there is none.
        """
        for c in self.correlations:
            if (c.score, c.effect, c.per_element) == (score, effect, per_element):
                return c
        raise StatsError(f"no correlation of {score!r} with {effect!r}; scores: "
                         f"{', '.join(SCORES)}; effects: {', '.join(EFFECTS)}")

    @property
    def n_unresolved(self) -> dict[str, int]:
        """Effect -> blocks whose effect is smaller than :attr:`resolution`."""
        return {k: int((np.abs(v) < self.resolution).sum()) for k, v in self.effects.items()}

    def summary(self) -> str:
        """What was found, in words."""
        lines = [
            f"{len(self.names)} parameters, each trained alone from a held-out loss of "
            f"{self.loss:.4f}: one gradient step at rate {self.rate:.3g}, and {self.steps} AdamW "
            f"steps at {self.adam_rate:.3g}. Second order from {self.n_examples} examples, damping "
            f"{self.damping:g} of the mean eigenvalue of "
            + {"model": "the whole model.", "block": "each block."}[self.damping_of]
        ]
        for effect in EFFECTS:
            found = self.correlation("norm", effect), self.correlation("norm", effect, True)
            lines.append(
                f"{EFFECTS[effect]}: rank correlation of norm and effect "
                f"{_with(found[0].value, found[0].interval)}, per element (rms) "
                f"{_with(found[1].value, found[1].interval)}; "
                f"{self.n_unresolved[effect]} effects are too small to tell from zero."
            )
            for c in self.comparisons:
                if c.effect == effect and c.score in ("fisher", "kfac", "size"):
                    lines.append("  " + _sentence(c))
        if self.reasons:
            lines.append(f"Without a Kronecker-factored score: {len(self.reasons)} parameters "
                         "(reasons: .reasons).")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; what is not known is None."""
        told = plain(self)
        for key in ("scores", "effects"):
            told[key] = {k: [_number(x) for x in v.tolist()] for k, v in told[key].items()}
        told["reasons"] = dict(self.reasons)
        for key in ("correlations", "comparisons"):
            told[key] = [plain(c) for c in getattr(self, key)]
        return {**told, "n_unresolved": self.n_unresolved, "explained": {**SCORES, **EFFECTS}}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _with(value: float, ends: Interval) -> str:
    return f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def _sentence(c: ProxyComparison) -> str:
    names = {"fisher": "the diagonal Fisher score", "kfac": "the Kronecker-factored score",
             "size": "the block's size alone"}  # fmt: skip
    norm = "the rms" if c.per_element else "the norm"
    how = {
        "better": f"{norm} ranks blocks better than",
        "as well": f"{norm} ranks blocks as well as",
        "worse": f"{norm} does not rank blocks as well as",
        "undecided": f"too few blocks to tell {norm} from",
    }[c.verdict]
    return (f"{'per element, ' if c.per_element else ''}{how} {names[c.score]} ({c.norm:.2f} "
            f"against {c.other:.2f}, difference {_with(c.difference, c.interval)}, {c.n} blocks)")


def rank_correlation(a: FloatArray, b: FloatArray) -> Any:
    """Spearman's along the last axis; 0 where one has no order. A float for 1-D input."""
    x, y = (rankdata(v, axis=-1) for v in (a, b))
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    out = np.divide((x * y).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)
    return float(out) if out.ndim == 0 else out


def per_element(score: str, values: FloatArray, sizes: IntArray) -> FloatArray:
    """A score by the number of elements of each block, see :class:`RankCorrelation`."""
    if score == "norm":
        return values / np.sqrt(sizes)
    return values if score in ("rms", "size") else values / sizes


def judge(
    scores: Mapping[str, FloatArray],
    effects: Mapping[str, FloatArray],
    sizes: IntArray,
    n_bootstrap: int,
    seed: int,
) -> tuple[tuple[RankCorrelation, ...], tuple[ProxyComparison, ...]]:
    """Correlations of every score with every effect, and the norm against every other score.

    Blocks are resampled with replacement: the intervals say how far the result depends on which
    blocks the model happens to have.

    Raises:
        StatsError: for fewer than 4 blocks, or ``n_bootstrap < 1``.
    """
    check_bootstrap(n_bootstrap)
    n = len(sizes)
    if n < 4:
        raise StatsError(f"{n} parameters: ranks of fewer than 4 say nothing")
    correlations: list[RankCorrelation] = []
    comparisons: list[ProxyComparison] = []
    for effect, values in effects.items():
        for normalised in (False, True):
            outcome = values / sizes if normalised else values
            table = {k: per_element(k, s, sizes) if normalised else s for k, s in scores.items()}
            for key, score in table.items():
                known = np.flatnonzero(np.isfinite(score))
                if len(known) < 4:
                    correlations.append(RankCorrelation(key, effect, normalised, math.nan,
                                                        (math.nan, math.nan), len(known)))
                    continue
                rng = np.random.default_rng(seed)  # the same draws for every score
                drawn = known[rng.integers(0, len(known), (n_bootstrap, len(known)))]
                value = rank_correlation(score[known], outcome[known])
                again = rank_correlation(score[drawn], outcome[drawn])
                correlations.append(RankCorrelation(key, effect, normalised, value,
                                                    interval(again), len(known)))
                if key == "norm" or (normalised and key == "rms"):  # itself
                    continue
                norm = rank_correlation(table["norm"][known], outcome[known])
                ends = interval(rank_correlation(table["norm"][drawn], outcome[drawn]) - again)
                comparisons.append(ProxyComparison(
                    key, effect, normalised, norm, value, norm - value, ends, len(known),
                    _verdict(ends),
                ))  # fmt: skip
    return tuple(correlations), tuple(comparisons)


def _verdict(ends: Interval) -> ProxyVerdict:
    if ends[0] > 0:
        return "better"
    if ends[1] < 0:
        return "worse"
    return "as well" if ends[0] >= -TOLERANCE else "undecided"


__all__ = [
    "EFFECTS", "SCORES", "TOLERANCE", "ProxyComparison", "ProxyReport", "RankCorrelation", "judge",
    "per_element", "rank_correlation",
]  # fmt: skip
