"""Is the gradient mass of chosen blocks and chosen examples the product of both shares?

If block i and example j met independently, the best fraction k of the parameters and the best
fraction q of the examples would together hold ``S(k, 1) · S(1, q)`` of the squared gradient. That
is what arXiv 2511.01077 multiplies when it says that choosing both multiplies the gain. Here
``S(k, q)`` is measured, with intervals, and set against that product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastgrad.concentration import (
    FloatArray,
    check_bootstrap,
    fit_gamma,
    frozen,
    interval,
    plain,
)
from fastgrad.errors import StatsError
from fastgrad.mass import MassMatrix

#: A measured share within this factor of the product counts as the product, however sure it is: a
#: difference of a twentieth does not change a decision.
TOLERANCE = 0.05
FRACTIONS = (0.05, 0.1, 0.2, 0.5)
#: Intervals from fewer resamples than this carry no verdict.
MIN_BOOTSTRAP = 50

MultiplicityVerdict = Literal["multiplicative", "less", "more", "mixed", "undecided"]


@dataclass(frozen=True, eq=False)
class Multiplicativity:
    """``S(k, q)`` over a grid, beside what independence would give.

    Attributes:
        parameters: the fractions k, ``[K]``.
        examples: the fractions q, ``[Q]``.
        share: ``[K, Q]`` share of the squared gradient that the densest fraction k of the
            parameters has on the heaviest fraction q of the examples.
        share_low, share_high: its bootstrap interval, over examples.
        by_parameters: ``[K]`` S(k, 1).
        by_examples: ``[Q]`` S(1, q).
        ratio: ``[K, Q]`` ``S(k, q) / (S(k, 1) S(1, q))``; 1 if both choices multiply.
        ratio_low, ratio_high: its bootstrap interval.
        gamma, delta: exponents of ``S(k, 1) ~ k^gamma`` and ``S(1, q) ~ q^delta``.
        power_deviation: largest ``|S(k, q) - k^gamma q^delta|`` over the grid, in share of mass.
        verdict: ``multiplicative`` (every interval of the ratio lies within ``TOLERANCE`` of 1),
            ``less`` / ``more`` (some lie wholly below / above 1 by more than that and none on the
            other side), ``mixed`` (both), ``undecided`` (the intervals are too wide to say, or
            from fewer than ``MIN_BOOTSTRAP`` resamples).
        reason: the verdict in words.
        n_bootstrap, seed: of the intervals.
    """

    parameters: FloatArray
    examples: FloatArray
    share: FloatArray
    share_low: FloatArray
    share_high: FloatArray
    by_parameters: FloatArray
    by_examples: FloatArray
    ratio: FloatArray
    ratio_low: FloatArray
    ratio_high: FloatArray
    gamma: float
    delta: float
    power_deviation: float
    verdict: MultiplicityVerdict
    reason: str
    n_bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return plain(self)


def multiplicativity(
    mass: MassMatrix,
    parameters: Sequence[float] = FRACTIONS,
    examples: Sequence[float] = FRACTIONS,
    n_bootstrap: int = 200,
    seed: int = 0,
) -> Multiplicativity:
    """Measure ``S(k, q)`` and compare it with the product of its margins.

    Blocks are ordered by mass per element over all examples, examples by mass over all blocks: the
    choice that each makes without the other. A block or an example at the edge counts in part, as
    in :func:`fastgrad.concentration.lorenz`. The intervals resample examples and order everything
    anew, so they contain what the choice itself owes to chance; blocks are not resampled, for they
    are all there are.

    Args:
        mass: see :class:`fastgrad.mass.MassMatrix`.
        parameters, examples: fractions strictly between 0 and 1.
        n_bootstrap: resamples, at least 1.
        seed: of the resampling.

    Raises:
        StatsError: for a fraction outside (0, 1), or ``n_bootstrap < 1``.
    """
    check_bootstrap(n_bootstrap)
    k, q = _fractions("parameters", parameters), _fractions("examples", examples)
    values, sizes = mass.in_memory(), mass.sizes.astype(np.float64)
    ones = np.ones(mass.n_examples)
    share, by_k, by_q = _shares(values, sizes, ones, mass.by_block, mass.by_example, k, q)
    ratio = share / np.outer(by_k, by_q)
    rng = np.random.default_rng(seed)
    shares = np.empty((n_bootstrap, k.size, q.size))
    ratios = np.empty_like(shares)
    for b in range(n_bootstrap):
        times = drawn_again(rng, mass.by_example)
        resampled = _shares(values, sizes, times, values @ times, mass.by_example, k, q)
        shares[b], ratios[b] = resampled[0], resampled[0] / np.outer(*resampled[1:])
    low, high = bounds(ratios)
    gamma = fit_gamma(mass.by_block, mass.sizes, n_bootstrap=1).gamma
    delta = fit_gamma(mass.by_example, np.ones(mass.n_examples, np.int64), n_bootstrap=1).gamma
    verdict, reason = _judge(k, q, ratio, low, high)
    if n_bootstrap < MIN_BOOTSTRAP:
        verdict = "undecided"
        reason = f"{n_bootstrap} resamples make no interval; take at least {MIN_BOOTSTRAP}"
    share_low, share_high = bounds(shares)
    return Multiplicativity(
        parameters=frozen(k), examples=frozen(q), share=frozen(share),
        share_low=frozen(share_low), share_high=frozen(share_high), by_parameters=frozen(by_k),
        by_examples=frozen(by_q), ratio=frozen(ratio), ratio_low=frozen(low),
        ratio_high=frozen(high), gamma=gamma, delta=delta,
        power_deviation=float(np.abs(share - np.outer(k**gamma, q**delta)).max()),
        verdict=verdict, reason=reason, n_bootstrap=n_bootstrap, seed=seed,
    )  # fmt: skip


def _fractions(what: str, given: Sequence[float]) -> FloatArray:
    fractions = np.array(given, dtype=np.float64)  # a copy: the caller's stays writable
    if fractions.ndim != 1 or not fractions.size or not ((fractions > 0) & (fractions < 1)).all():
        raise StatsError(f"{what} must hold fractions strictly between 0 and 1; got {given!r}")
    return fractions


def drawn_again(rng: np.random.Generator, weight: FloatArray) -> FloatArray:
    """How often each example is drawn; drawn anew if none with any mass came up."""
    n = weight.size
    while True:
        times = np.bincount(rng.integers(0, n, size=n), minlength=n).astype(np.float64)
        if float(weight @ times) > 0.0:
            return times


def taken(density: FloatArray, sizes: FloatArray, fractions: FloatArray) -> FloatArray:
    """``[F, n]``: how much of each block (0 to 1) lies within the densest fraction of all."""
    order = np.argsort(-density, kind="stable")
    ends = np.cumsum(sizes[order])
    wanted = fractions[:, None] * ends[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (wanted - (ends - sizes[order])) / sizes[order]
    out = np.empty((fractions.size, sizes.size))
    out[:, order] = np.clip(np.nan_to_num(part, nan=0.0), 0.0, 1.0)
    return out


def _shares(
    values: Any,
    sizes: FloatArray,
    times: FloatArray,
    by_block: FloatArray,
    by_example: FloatArray,
    k: FloatArray,
    q: FloatArray,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """``S(k, q)``, ``S(k, 1)`` and ``S(1, q)`` with each example counted ``times``."""
    blocks = taken(by_block / sizes, sizes, k)
    examples = taken(by_example, times, q) * times
    total = float(by_block.sum())
    chosen = blocks @ values
    return chosen @ examples.T / total, blocks @ by_block / total, examples @ by_example / total


def bounds(samples: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Interval of each entry over the first dimension."""
    flat = samples.reshape(len(samples), -1)
    ends = np.array([interval(column) for column in flat.T])
    return ends[:, 0].reshape(samples.shape[1:]), ends[:, 1].reshape(samples.shape[1:])


def _judge(
    k: FloatArray, q: FloatArray, ratio: FloatArray, low: FloatArray, high: FloatArray
) -> tuple[MultiplicityVerdict, str]:
    less, more = high < 1 - TOLERANCE, low > 1 + TOLERANCE
    product = (low >= 1 - TOLERANCE) & (high <= 1 + TOLERANCE)

    def where(i: Any) -> str:
        at = np.unravel_index(int(i), ratio.shape)
        return (f"the best {k[at[0]]:.0%} of the parameters and {q[at[1]]:.0%} of the examples "
                f"hold {ratio[at]:.2f} [{low[at]:.2f}, {high[at]:.2f}] times the product of "
                "their shares")  # fmt: skip

    if less.any() and more.any():
        return "mixed", (f"{where(ratio.argmin())}; {where(ratio.argmax())}")
    if less.any():
        return "less", (f"cross-influence is overestimated by multiplying: {where(ratio.argmin())}")
    if more.any():
        return "more", f"both choices meet more than independence says: {where(ratio.argmax())}"
    if product.all():
        farthest = where(np.abs(ratio - 1).argmax())
        return "multiplicative", (f"every measured share is within {TOLERANCE:.0%} of the product "
                                  f"of both; farthest: {farthest}")  # fmt: skip
    return "undecided", (f"{int((~product).sum())} of {product.size} intervals reach farther than "
                         f"{TOLERANCE:.0%} from the product without leaving it; more examples "
                         f"would tell. Widest: {where((high - low).argmax())}")  # fmt: skip


__all__ = ["FRACTIONS", "TOLERANCE", "Multiplicativity", "multiplicativity"]
