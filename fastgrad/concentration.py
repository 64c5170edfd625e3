"""How much of the gradient do the best k of the parameters hold: Lorenz curve and gamma.

This is what a training budget needs, and it assumes nothing about a distribution. Whether the
tail is a power law is another question, see :mod:`fastgrad.heavytail`. Plain arrays: no model
code, no torch. The derivations are in ``docs/maths.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgrad.errors import StatsError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Interval = tuple[float, float]

# The integrals behind gamma run over t = -log k, with dk = exp(-t) dt: a step of 0.02 resolves
# the curve near k = 1, and the end at 40 reaches k = 4e-18, less than one parameter of any model.
_GAMMA_STEP = 0.02
_GAMMA_POINTS = 2000

#: Confidence level of every bootstrap interval.
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class LorenzCurve:
    """Share of gradient mass held by the densest fraction of the parameters.

    Attributes:
        k: ``[n_blocks + 1]`` cumulative fraction of parameters, from 0 to 1.
        share: ``[n_blocks + 1]`` cumulative fraction of mass, from 0 to 1; concave in ``k``.
        order: ``[n_blocks]`` block indices, densest first; ties keep their input order.
        n_dead: blocks without any mass.  They keep their parameters, at the end of the curve.
        n_parameters: sum of the sizes.
    """

    k: FloatArray
    share: FloatArray
    order: IntArray
    n_dead: int
    n_parameters: int

    def share_at(self, k: npt.ArrayLike) -> Any:
        """Share of mass held by the densest fraction ``k`` of the parameters.

        Linear between the blocks, as if a block's mass were spread evenly over its parameters.
        For squared norms, which add up over a finer cut, this is the lowest curve that the block
        sums allow.  Norms do not add up: curves of norms are comparable only at the same cut.

        Args:
            k: fractions in [0, 1], a scalar or an array of any shape.

        Returns:
            A float for a scalar, else a float64 array of the same shape.

        Raises:
            StatsError: a fraction is outside [0, 1] or NaN.
        """
        at = np.asarray(k, dtype=np.float64)
        if not bool(np.all((at >= 0.0) & (at <= 1.0))):
            raise StatsError(f"k must lie in [0, 1], a fraction of the parameters; got {k!r}")
        out = np.interp(at, self.k, self.share)
        return float(out) if at.ndim == 0 else out

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return plain(self)


def lorenz(mass: npt.ArrayLike, sizes: npt.ArrayLike) -> LorenzCurve:
    """Lorenz curve of gradient mass over parameters, densest blocks first.

    Args:
        mass: ``[n]`` non-negative mass per block: a gradient norm or a squared norm, in any unit.
        sizes: ``[n]`` parameters per block, each at least 1.

    Returns:
        The curve through ``(0, 0)`` and ``(1, 1)``.

    Raises:
        StatsError: empty or mismatched input, NaN, infinite or negative mass, no mass at all, or
            a size that is not a whole number of at least 1.
    """
    m, s = _mass_and_sizes(mass, sizes)
    order = _density_order(m, s)
    k, share = _curve(m[order], s[order])
    return LorenzCurve(
        k=frozen(k),
        share=frozen(share),
        order=frozen(order),
        n_dead=int(np.count_nonzero(m == 0.0)),
        n_parameters=int(s.sum()),
    )


def _mass_and_sizes(mass: npt.ArrayLike, sizes: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    m = np.asarray(mass, dtype=np.float64)
    s = np.asarray(sizes, dtype=np.float64)
    if m.ndim != 1 or s.ndim != 1:
        raise StatsError(f"mass and sizes must be 1-D; got shapes {m.shape} and {s.shape}")
    if m.shape != s.shape:
        raise StatsError(f"mass has {m.size} blocks but sizes has {s.size}; give one size per mass")
    if m.size == 0:
        raise StatsError("mass is empty: there is no block to order")
    if not np.isfinite(m).all():
        bad = int(np.flatnonzero(~np.isfinite(m))[0])
        raise StatsError(f"mass[{bad}] is {m[bad]}: gradients must be finite")
    if (m < 0.0).any():
        bad = int(np.flatnonzero(m < 0.0)[0])
        raise StatsError(f"mass[{bad}] is {m[bad]}: a norm cannot be negative")
    counts = np.isfinite(s) & (s >= 1.0) & (s == np.floor(s))
    if not counts.all():
        bad = int(np.flatnonzero(~counts)[0])
        raise StatsError(f"sizes[{bad}] is {s[bad]}: a size counts parameters, 1 or more")
    top = float(m.max())
    if top == 0.0:
        raise StatsError("mass is zero in every block: no gradient was recorded, so no curve")
    # Only shares matter; dividing by the largest mass keeps sums of huge or denormal masses safe.
    return m / top, s


def _density_order(mass: FloatArray, sizes: FloatArray) -> IntArray:
    return np.argsort(-(mass / sizes), kind="stable").astype(np.int64)


def _curve(mass: FloatArray, sizes: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Cumulative fractions of blocks that are already in density order."""
    k = np.concatenate(([0.0], np.cumsum(sizes)))
    share = np.concatenate(([0.0], np.cumsum(mass)))
    # Dividing by the last partial sum, not by a separate sum, makes both ends exactly 1.
    return k / k[-1], share / share[-1]


# --------------------------------------------------------------------------------------------
# Gamma


@dataclass(frozen=True)
class GammaFit:
    """The exponent of ``S(k) ~ k**gamma``, overall and at chosen k.

    Attributes:
        gamma: overall exponent in (0, 1]; 1 means that mass is spread evenly.
        gamma_interval: bootstrap interval of ``gamma`` at level ``CONFIDENCE``.
        at: the fractions k at which the curve is read.
        share: S(k) at each ``at``.
        share_intervals: bootstrap interval of each share.
        gamma_at: pointwise exponent ``log S(k) / log k`` at each ``at``.
        gamma_at_intervals: bootstrap interval of each pointwise exponent.
        max_deviation: largest ``|S(k) - k**gamma|``, in share of mass, over the block edges (in
            between, the curve is not measured).  If it is large, no single gamma describes the
            curve: use the shares.
        n_blocks: blocks in the curve.
        n_dead: blocks without mass.
        n_bootstrap: resamples behind the intervals.
        seed: seed of the resampling.
    """

    gamma: float
    gamma_interval: Interval
    at: tuple[float, ...]
    share: tuple[float, ...]
    share_intervals: tuple[Interval, ...]
    gamma_at: tuple[float, ...]
    gamma_at_intervals: tuple[Interval, ...]
    max_deviation: float
    n_blocks: int
    n_dead: int
    n_bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return plain(self)


def fit_gamma(
    mass: npt.ArrayLike,
    sizes: npt.ArrayLike,
    at: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5),
    n_bootstrap: int = 200,
    seed: int = 0,
) -> GammaFit:
    """Fit ``S(k) ~ k**gamma`` to the empirical Lorenz curve.

    The overall gamma is the least-squares slope of ``log S`` on ``log k`` through ``(1, 1)``,
    with every k of the curve weighing the same::

        gamma = integral_0^1 log(k) log S(k) dk / integral_0^1 log(k)**2 dk

    On logarithms, because k* maximises the quotient S(k)/cost(k), which sees relative errors of
    S.  Over k, so that each *parameter* counts once: a sum over blocks would give another gamma
    when one block is cut into several equal ones, though the curve is the same.  And no lower
    cut-off has to be chosen, as log(k)**2 is integrable at 0.

    The intervals resample blocks with replacement.  They tell how much the result rests on single
    blocks; for a curve carried by one or two blocks they are too narrow, as any bootstrap of a
    heavy tail is.

    Args:
        mass: ``[n]`` non-negative mass per block.
        sizes: ``[n]`` parameters per block.
        at: fractions k strictly between 0 and 1 for the pointwise exponents.
        n_bootstrap: number of resamples, at least 1.
        seed: seed of the resampling.

    Raises:
        StatsError: as :func:`lorenz`, or an ``at`` outside (0, 1), or ``n_bootstrap < 1``.
    """
    check_bootstrap(n_bootstrap)
    points = np.asarray(at, dtype=np.float64)
    if points.ndim != 1 or points.size == 0 or not ((points > 0.0) & (points < 1.0)).all():
        raise StatsError(f"at must hold fractions strictly between 0 and 1; got {at!r}")
    m, s = _mass_and_sizes(mass, sizes)
    order = _density_order(m, s)
    m, s = m[order], s[order]

    k, share = _curve(m, s)
    gamma, share_at = _gamma_of(k, share, points)
    max_deviation = float(np.abs(share - np.power(k, gamma)).max())

    rng = np.random.default_rng(seed)
    gammas = np.empty(n_bootstrap)
    shares = np.empty((n_bootstrap, points.size))
    for b in range(n_bootstrap):
        # Multiplicities in density order: the resampled curve needs no second sort.
        weight = _resample_with_mass(rng, m)
        drawn = weight > 0
        k_b, share_b = _curve((m * weight)[drawn], (s * weight)[drawn])
        gammas[b], shares[b] = _gamma_of(k_b, share_b, points)
    log_k = np.log(points)
    pointwise = np.log(shares) / log_k
    return GammaFit(
        gamma=gamma,
        gamma_interval=interval(gammas),
        at=tuple(float(p) for p in points),
        share=tuple(float(v) for v in share_at),
        share_intervals=tuple(interval(shares[:, i]) for i in range(points.size)),
        gamma_at=tuple(float(v) for v in np.log(share_at) / log_k),
        gamma_at_intervals=tuple(interval(pointwise[:, i]) for i in range(points.size)),
        max_deviation=max_deviation,
        n_blocks=int(m.size),
        n_dead=int(np.count_nonzero(m == 0.0)),
        n_bootstrap=n_bootstrap,
        seed=seed,
    )


def _gamma_of(k: FloatArray, share: FloatArray, points: FloatArray) -> tuple[float, FloatArray]:
    t = (np.arange(_GAMMA_POINTS, dtype=np.float64) + 0.5) * _GAMMA_STEP
    grid = np.exp(-t)
    # A concave curve lies on or above the diagonal; the bounds only remove rounding.
    log_share = np.log(np.maximum(np.interp(grid, k, share), grid))
    # Both integrals by the same rule, so that S = k**gamma gives gamma back without its error.
    gamma = float(np.sum(grid * t * -log_share) / np.sum(grid * t * t))
    return min(gamma, 1.0), np.maximum(np.interp(points, k, share), points)


def _resample_with_mass(rng: np.random.Generator, mass: FloatArray) -> IntArray:
    """Bootstrap multiplicities, drawn again when only dead blocks came up (no curve exists)."""
    n = mass.size
    while True:
        weight = np.bincount(rng.integers(0, n, size=n), minlength=n).astype(np.int64)
        if float(mass @ weight) > 0.0:
            return weight


def paper_gamma(alpha: float) -> float:
    """The closed form ``1/(1 + alpha)`` of arXiv 2511.01077, for comparison only.

    It contradicts the power law it is meant to follow from (``docs/maths.md`` has the numbers),
    so nothing in fastgrad uses it.  ``alpha`` is the paper's rank exponent.

    Raises:
        StatsError: ``alpha`` is not a positive number.
    """
    check_positive("alpha", alpha)
    return 1.0 / (1.0 + alpha)


def asymptotic_gamma(rank_exponent: float) -> float:
    """Gamma of ``x_r ~ r**-a`` over infinitely many equal blocks: ``1 - a`` for a < 1, else 0.

    At a finite number of blocks gamma is larger; for a >= 1 the limit 0 says that finitely many
    blocks hold everything.  Derived in ``docs/maths.md``.

    Raises:
        StatsError: ``rank_exponent`` is not a positive number.
    """
    check_positive("rank_exponent", rank_exponent)
    return max(1.0 - rank_exponent, 0.0)


def check_bootstrap(n_bootstrap: int) -> None:
    if n_bootstrap < 1:
        raise StatsError(f"n_bootstrap must be at least 1; got {n_bootstrap}")


def check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise StatsError(f"{name} must be a positive number; got {value}")


def interval(samples: FloatArray) -> Interval:
    """Percentile interval; NaN when nothing could be resampled."""
    if samples.size == 0:
        return math.nan, math.nan
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(samples, (tail, 1.0 - tail))
    return float(low), float(high)


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array


def plain(record: Any) -> dict[str, Any]:
    return {f.name: plain_value(getattr(record, f.name)) for f in fields(record)}


def plain_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple):
        return [plain_value(v) for v in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
