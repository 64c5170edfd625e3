"""What T says: which blocks, which examples, and which of them together.

:func:`influence_report` puts the questions one by one: how concentrated are the two margins, how
many patterns does the matrix have, do examples differ in where they pull, does choosing blocks and
examples multiply, and how much of all that would another sample of examples confirm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from fastgrad.concentration import (
    FloatArray,
    GammaFit,
    Interval,
    check_bootstrap,
    fit_gamma,
    interval,
    plain_value,
)
from fastgrad.errors import StatsError
from fastgrad.heavytail import TailFit, fit_tail
from fastgrad.interaction import Independence, Spectrum, independence, log_influence, spectrum
from fastgrad.mass import MassMatrix
from fastgrad.multiplicativity import (
    FRACTIONS,
    MIN_BOOTSTRAP,
    TOLERANCE,
    Multiplicativity,
    drawn_again,
    multiplicativity,
    taken,
)
from fastgrad.stats import GradientStats, Scale


@dataclass(frozen=True, eq=False)
class Margin:
    """How mass spreads over the blocks, or over the examples.

    Attributes:
        what: ``blocks`` or ``examples``.
        mass: squared influence of each, over all of the other.
        gamma: fit of the Lorenz curve (``delta`` for examples), see
            :class:`fastgrad.concentration.GammaFit`.
        tail: power-law fit of the norms (square roots of ``mass``) with its verdict.
    """

    what: str
    mass: FloatArray
    gamma: GammaFit
    tail: TailFit


@dataclass(frozen=True, eq=False)
class Meeting:
    """Whether the blocks that are hot over all examples are hot on the hot examples too.

    Attributes:
        parameters, examples: fractions that count as hot.
        ratio: S(k, q) by the product of its margins, see
            :class:`fastgrad.multiplicativity.Multiplicativity`.
        interval: its bootstrap interval, over examples.
        correlation: Spearman's, between the mass of an example and the ratio of its mass in hot
            blocks to that in all others; 0 if each has the same profile. Where the noise of the
            hot blocks is larger than that of the others it is above 0 by itself: the mass contains
            them.
        correlation_interval: its bootstrap interval.
        warning: in words, where the interval of the ratio lies below 1 by more than
            :data:`fastgrad.multiplicativity.TOLERANCE`; else empty.
    """

    parameters: float
    examples: float
    ratio: float
    interval: Interval
    correlation: float
    correlation_interval: Interval
    warning: str


@dataclass(frozen=True, eq=False)
class Stability:
    """How much rests on these examples; each with a median and an interval.

    Attributes:
        block_ranks: Spearman correlation of the blocks' mass between random halves of the
            examples. Two samples as large as this one agree more than its halves.
        top_blocks: overlap (Jaccard), between halves, of the densest blocks that hold a fifth of
            the parameters.
        gamma, delta: exponents of both margins, resampled over examples. Of few examples the
            resampled delta lies above that of new samples: a heavy one may be missing.
        participation: how many patterns share ``T``, see :class:`fastgrad.interaction.Spectrum`;
            resampled alike; NaN where the matrix is too large for all its singular values.
    """

    block_ranks: tuple[float, Interval]
    top_blocks: tuple[float, Interval]
    gamma: tuple[float, Interval]
    delta: tuple[float, Interval]
    participation: tuple[float, Interval]


@dataclass(frozen=True, eq=False)
class InfluenceReport:
    """Answers of :func:`influence_report`.

    Attributes:
        n_blocks, n_examples: size of the matrix.
        scale: of the influence, see :meth:`fastgrad.GradientStats.influence`.
        left_out: parameters whose influence is not known.
        blocks, examples: the margins.
        spectrum, log_spectrum: of ``T``, and of ``log T`` less its mean; the second is None where
            fewer than three blocks are touched by every example.
        independence: None for the same reason.
        multiplicativity: of choosing blocks and examples.
        meeting: of hot blocks and hot examples.
        stability: over halves and resamples of the examples.
        untested: why there is no test of independence; empty if there is one.
    """

    n_blocks: int
    n_examples: int
    scale: str
    left_out: tuple[str, ...]
    blocks: Margin
    examples: Margin
    spectrum: Spectrum
    log_spectrum: Spectrum | None
    independence: Independence | None
    multiplicativity: Multiplicativity
    meeting: Meeting
    stability: Stability
    untested: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; NaN becomes None."""
        return _plain(self)

    def summary(self) -> str:
        """The answers in words, a line each."""
        s, m, i = self.spectrum, self.multiplicativity, self.independence
        stable = self.stability
        b, e = self.blocks, self.examples
        lines = [
            f"{self.n_blocks} blocks x {self.n_examples} examples, scale {self.scale}"
            + (f"; not known: {len(self.left_out)} parameters" if self.left_out else ""),
            f"blocks: the densest 20% of the parameters hold {_share(b.gamma):.0%} of the squared "
            f"gradient (gamma {_with(b.gamma.gamma, b.gamma.gamma_interval)} over blocks); tail: "
            f"{b.tail.verdict}, {b.tail.reason}",
            f"examples: the heaviest 20% hold {_share(e.gamma):.0%} (delta "
            f"{_with(e.gamma.gamma, e.gamma.gamma_interval)}); tail: {e.tail.verdict}, "
            f"{e.tail.reason}",
            f"patterns: the first holds {s.explained[0]:.0%} of T, stable rank {s.stable_rank:.2f}"
            + (f", participation {s.participation:.2f}" if s.complete else ""),
        ]
        if i is not None:
            lines.append(
                f"independence: one number for each block and example explains {i.explained:.0%} "
                f"of the variance of log T; {i.misplaced:.0%} of the mass lies elsewhere than "
                f"their product says; {i.reason}"
            )
        else:
            lines.append(f"independence: not tested: {self.untested}")
        lines += [
            f"multiplicativity: {m.verdict}: {m.reason}",
            f"hot blocks on hot examples: {_with(self.meeting.ratio, self.meeting.interval)} times "
            f"the product; {self.meeting.warning or 'no overestimate found'}",
            f"halves of the examples: ranks of blocks agree to {_with(*stable.block_ranks)}; "
            f"resampled over examples: gamma {_with(*stable.gamma)}, delta {_with(*stable.delta)}",
        ]
        return "\n".join(lines)


def influence_report(
    source: GradientStats | MassMatrix,
    *,
    scale: Scale = "contribution",
    blocks: bool = True,
    parameters: Sequence[float] = FRACTIONS,
    examples: Sequence[float] = FRACTIONS,
    hot: tuple[float, float] = (0.2, 0.1),
    n_bootstrap: int = 200,
    n_permutations: int = 200,
    seed: int = 0,
) -> InfluenceReport:
    """What the cross-influence says, with intervals and verdicts.

    Args:
        source: statistics with examples, or a mass matrix.
        scale, blocks: of the statistics, see :meth:`MassMatrix.from_stats`.
        parameters, examples: grid of :func:`fastgrad.multiplicativity.multiplicativity`.
        hot: fractions of parameters and examples that count as hot.
        n_bootstrap, n_permutations: resamples of the intervals and shuffles of the test.
        seed: of both.

    Raises:
        StatsError: for statistics without examples or with fewer than three, fractions outside
            (0, 1), or numbers of resamples below 1.
    """
    check_bootstrap(n_bootstrap)
    if isinstance(source, GradientStats):
        mass, of = MassMatrix.from_stats(source, scale, blocks=blocks), str(scale)
    else:
        mass, of = source, "as given"
    if mass.n_examples < 3 or mass.n_blocks < 3:
        raise StatsError(f"{mass.n_blocks} blocks and {mass.n_examples} examples: an analysis of "
                         "both needs at least 3 of each")
    norms = np.sqrt(mass.in_memory())
    log_spectrum, test, untested = None, None, ""
    try:
        logs = log_influence(mass)[0]
    except StatsError as error:
        untested = str(error)
    else:
        centred = logs - logs.mean()
        log_spectrum = spectrum(centred, seed) if np.any(centred) else None
        test = independence(mass, n_permutations, seed)
    ones = np.ones(mass.n_examples, dtype=np.int64)
    return InfluenceReport(
        n_blocks=mass.n_blocks,
        n_examples=mass.n_examples,
        scale=of,
        left_out=mass.left_out,
        blocks=_margin("blocks", mass.by_block, mass.sizes, n_bootstrap, seed),
        examples=_margin("examples", mass.by_example, ones, n_bootstrap, seed),
        spectrum=spectrum(norms, seed),
        log_spectrum=log_spectrum,
        independence=test,
        multiplicativity=multiplicativity(mass, parameters, examples, n_bootstrap, seed),
        meeting=_meeting(mass, hot, n_bootstrap, seed),
        stability=_stability(mass, n_bootstrap, seed),
        untested=untested,
    )


def _margin(
    what: str, mass: FloatArray, sizes: npt.NDArray[np.int64], n_bootstrap: int, seed: int
) -> Margin:
    gamma = fit_gamma(mass, sizes, n_bootstrap=n_bootstrap, seed=seed)
    return Margin(what, mass, gamma, fit_tail(np.sqrt(mass), n_bootstrap, seed))


def _meeting(
    mass: MassMatrix, hot: tuple[float, float], n_bootstrap: int, seed: int
) -> Meeting:
    k, q = hot
    found = multiplicativity(mass, [k], [q], n_bootstrap, seed)
    # Blocks that are hot over all examples stay those; examples are drawn anew.
    blocks = taken(mass.by_block / mass.sizes, mass.sizes.astype(np.float64), np.array([k]))[0]
    in_hot = np.zeros(mass.n_examples)
    for rows, part in mass.stretches():
        in_hot += blocks[rows] @ part
    live = mass.by_example > 0
    weight = mass.by_example[live]
    with np.errstate(divide="ignore"):
        share = in_hot[live] / np.maximum(weight - in_hot[live], 0.0)
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, weight.size, weight.size) for _ in range(n_bootstrap)]
    low, high = float(found.ratio_low[0, 0]), float(found.ratio_high[0, 0])
    warning = ""
    if high < 1 - TOLERANCE and n_bootstrap >= MIN_BOOTSTRAP:
        warning = (
            f"cross-influence overestimated: the {k:.0%} of the parameters and {q:.0%} of the "
            f"examples that are hot on their own hold {found.ratio[0, 0]:.2f} times what the "
            "product of their shares promises. Remedy: choose them together (select_jointly)"
        )
    return Meeting(
        parameters=k,
        examples=q,
        ratio=float(found.ratio[0, 0]),
        interval=(low, high),
        correlation=_spearman(weight, share),
        correlation_interval=interval(np.array([_spearman(weight[d], share[d]) for d in drawn])),
        warning=warning,
    )


def _spearman(a: FloatArray, b: FloatArray) -> float:
    if a.size < 2 or (a == a[0]).all() or (b == b[0]).all():
        return 0.0  # equal values have no order to agree about
    return float(spearmanr(a, b).statistic)


def _stability(mass: MassMatrix, n_bootstrap: int, seed: int) -> Stability:
    rng = np.random.default_rng(seed)
    values = mass.in_memory()
    sizes = mass.sizes.astype(np.float64)
    fifth = np.array([0.2])
    ones = np.ones(mass.n_examples, np.int64)
    ranks, tops, gammas, deltas, participations = [], [], [], [], []
    exact = min(values.shape) <= PARTICIPATION_LIMIT
    for _ in range(n_bootstrap):
        one = rng.permutation(mass.n_examples) < mass.n_examples // 2
        first = values[:, one].sum(1, dtype=np.float64)
        other = np.maximum(mass.by_block - first, 0.0)
        ranks.append(_spearman(first, other))
        a, b = (taken(half / sizes, sizes, fifth)[0] > 0 for half in (first, other))
        tops.append(float((a & b).sum() / (a | b).sum()))
        times = drawn_again(rng, mass.by_example)
        by_block = values @ times
        gammas.append(fit_gamma(by_block, mass.sizes, n_bootstrap=1).gamma)
        drawn = np.repeat(mass.by_example, times.astype(np.int64))
        deltas.append(fit_gamma(drawn, ones, n_bootstrap=1).gamma)
        if exact:
            participations.append(_participation(np.sqrt(values) * np.sqrt(times)))
    return Stability(*(_around(np.array(x)) for x in (ranks, tops, gammas, deltas,
                                                      participations)))  # fmt: skip


#: Longest shorter side of a matrix whose participation is found anew for every resample.
PARTICIPATION_LIMIT = 400


def _participation(matrix: FloatArray) -> float:
    """``(Σσ²)² / Σσ⁴`` without the singular values themselves."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = short @ short.T
    return float(np.trace(gram) ** 2 / np.einsum("ij,ij->", gram, gram))


def _around(samples: FloatArray) -> tuple[float, Interval]:
    middle = float(np.median(samples)) if samples.size else float("nan")
    return middle, interval(samples)


def _share(fit: GammaFit) -> float:
    return fit.share[fit.at.index(0.2)]


def _with(value: float, ends: Interval) -> str:
    return f"{value:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def _plain(value: Any) -> Any:
    """Dataclasses, arrays and tuples as JSON has them."""
    if hasattr(value, "to_dict") and not isinstance(value, InfluenceReport):
        return value.to_dict()
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return plain_value(value)


__all__ = ["InfluenceReport", "Margin", "Meeting", "Stability", "influence_report"]
