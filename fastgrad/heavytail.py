"""How concentrated a gradient is: Lorenz curve, gamma, tail exponents, and an honest verdict.

Two questions are kept apart, because they have different answers:

* *How much of the gradient do the best k of the parameters hold?*  That is the Lorenz curve
  :func:`lorenz` and its exponent :func:`fit_gamma`.  It is what a training budget needs, and it
  assumes nothing about a distribution.
* *Is the upper tail of the norms a power law?*  That is :func:`fit_tail`, after Clauset, Shalizi
  and Newman (SIAM Review 51, 2009, doi:10.1137/070710111), written CSN below.  It is a claim
  about a distribution, so it comes with a goodness-of-fit test, alternatives and a verdict.

The whole module works on plain arrays: no model code, no torch.  The derivations, and the reasons
for each choice, are in ``docs/maths.md``.

Why the estimators are written out here and the ``powerlaw`` package is only the yardstick of the
tests: its exponent search stops at a density exponent of 3 unless told otherwise, its scan is too
slow to be repeated for a bootstrap, and its lognormal fit walks along a ridge into numbers that
underflow, so that the likelihood ratio it returns for a pure power law is noise.  The first two
are tested to agree where both are defined, the third is shown by a test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import erfc, erfcx, log_ndtr

from fastgrad.concentration import (
    CONFIDENCE,
    FloatArray,
    GammaFit,
    Interval,
    LorenzCurve,
    asymptotic_gamma,
    check_bootstrap,
    fit_gamma,
    interval,
    lorenz,
    paper_gamma,
    plain,
)
from fastgrad.dead import DEAD_RELATIVE
from fastgrad.errors import StatsError

__all__ = [
    "CONFIDENCE",
    "GammaFit",
    "LorenzCurve",
    "TailFit",
    "asymptotic_gamma",
    "fit_gamma",
    "fit_tail",
    "lorenz",
    "paper_gamma",
    "rank_exponent_least_squares",
]

Verdict = Literal["supported", "indistinguishable", "rejected", "too_few"]

#: A tail with fewer values than this gets the verdict "too_few".  The relative standard error of
#: a rank exponent is 1/sqrt(n_tail): 14 % at 50.  CSN (section 3) name about 50 as the size from
#: which the estimate can be relied on.
MIN_TAIL = 50

#: Fewer distinct live values than this leave no room for a threshold search at all.
MIN_DISTINCT = 4

#: The power law is rejected when its goodness-of-fit p-value is below this (CSN section 4.1).
GOF_SIGNIFICANCE = 0.1

#: A likelihood ratio is called decisive when its p-value is below this.
RATIO_SIGNIFICANCE = 0.05

#: More threshold candidates than this are thinned to evenly spaced ranks, in the estimate and in
#: its bootstraps alike, which keeps the test valid; up to here the search is exhaustive.
MAX_XMIN_CANDIDATES = 500

# Points of a tail at which the scan bounds a candidate's KS distance from below.
_COARSE_POINTS = 64

# Truncation point, in standard deviations above the mean, from which on a truncated normal is an
# exponential for every purpose here: its second moment ratio is then 2 - 2e-6.
_MAX_TRUNCATION = 1e3


def rank_exponent_least_squares(values: npt.ArrayLike) -> float:
    """BIASED, for comparison only: slope of ``log value`` on ``log rank``, sign reversed.

    Published power-law claims are often made this way.  The slope overestimates the exponent at
    the sample sizes of a model's submodules and its R-squared is high for a lognormal too
    (``docs/maths.md``).  :func:`fit_tail` is the estimate to use.

    Args:
        values: ``[n]`` non-negative values; dead ones (``DEAD_RELATIVE``) are left out.

    Raises:
        StatsError: invalid values, or fewer than three live ones.
    """
    live = _live(values)[0]
    if live.size < 3:
        raise StatsError(f"a slope needs at least three live values; got {live.size}")
    log_rank = np.log(np.arange(live.size, 0, -1))  # live is ascending: the largest has rank 1
    centred = log_rank - log_rank.mean()
    return float(-(centred @ np.log(live)) / (centred @ centred))


# --------------------------------------------------------------------------------------------
# Tail


@dataclass(frozen=True)
class TailFit:
    """Power-law fit of an upper tail with its tests.  NaN means "could not be computed".

    Attributes:
        xmin: start of the tail, in the unit of the values.
        n: live values.
        n_dead: values below the floor (``DEAD_RELATIVE`` of the largest), left out.
        n_tail: live values at or above ``xmin``.
        density_exponent: exponent of the density ``p(x) ~ x**-density_exponent`` above ``xmin``.
        density_interval: its bootstrap interval, with ``xmin`` searched anew in each resample.
        rank_exponent: exponent a of the rank-size law ``x_r ~ r**-a``, ``1/(density - 1)``.
        rank_interval: its bootstrap interval.
        ks: Kolmogorov-Smirnov distance between tail and fit.
        gof_p: goodness-of-fit p-value from the semi-parametric bootstrap.  Small speaks against
            the power law; large proves nothing.
        lognormal_ratio: log-likelihood of the power law minus that of the best lognormal on the
            tail.  Never positive: the power law is a limit of lognormals.
        lognormal_p: p-value of that nested comparison; small favours the lognormal.
        inner_lognormal_ratio: the same against the best lognormal whose median is not below the
            smallest live value, that is, one which is not a power law in disguise.
        inner_lognormal_p: two-sided Vuong p-value of the sign of ``inner_lognormal_ratio``.
        exponential_ratio: log-likelihood of the power law minus that of the exponential.
        exponential_p: two-sided Vuong p-value of the sign of ``exponential_ratio``.
        verdict: ``"supported"``, ``"indistinguishable"``, ``"rejected"`` or ``"too_few"``.
        reason: the verdict in words.
        n_bootstrap: resamples behind the p-value and behind the intervals, each.
        seed: seed of the resampling.
    """

    xmin: float
    n: int
    n_dead: int
    n_tail: int
    density_exponent: float
    density_interval: Interval
    rank_exponent: float
    rank_interval: Interval
    ks: float
    gof_p: float
    lognormal_ratio: float
    lognormal_p: float
    inner_lognormal_ratio: float
    inner_lognormal_p: float
    exponential_ratio: float
    exponential_p: float
    verdict: Verdict
    reason: str
    n_bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for strict JSON: NaN becomes None."""
        return plain(self)


def fit_tail(
    values: npt.ArrayLike, n_bootstrap: int = 1000, seed: int = 0, *, floor: float = DEAD_RELATIVE
) -> TailFit:
    """Fit and test a power law on the upper tail of positive values, after CSN (2009).

    Maximum likelihood (CSN eq. 3.1) with the threshold ``xmin`` that minimises the
    Kolmogorov-Smirnov distance, a semi-parametric bootstrap for the goodness of fit (CSN section
    4.1), and likelihood ratios against the lognormal and the exponential on the same tail.

    The verdict, first match wins:

    * ``too_few``: fewer than ``MIN_TAIL`` values in the tail.
    * ``rejected``: goodness of fit below ``GOF_SIGNIFICANCE``, or lognormal or exponential
      better at ``RATIO_SIGNIFICANCE``.
    * ``supported``: better, at ``RATIO_SIGNIFICANCE``, than the exponential and than every
      lognormal with its median inside the data.
    * ``indistinguishable``: anything else.

    Args:
        values: ``[n]`` non-negative values, for instance gradient norms per block, in any unit:
            the result does not depend on the scale.
        n_bootstrap: resamples for the p-value and again for the intervals, at least 1.  The
            standard error of the p-value is at most ``0.5 / sqrt(n_bootstrap)``.
        seed: seed of the resampling.
        floor: values below this fraction of the largest one are dead: counted, and left out of
            every logarithm.  The default is meant for norms; of squares it is its square.

    Raises:
        StatsError: empty, NaN, infinite, negative or all-zero values, or ``n_bootstrap < 1``.
    """
    check_bootstrap(n_bootstrap)
    live, n_dead = _live(values, floor)
    scale = float(live[-1])
    logs = np.log(live / scale)
    n = int(logs.size)
    scan = _scan(logs)
    if scan is None:
        nan = math.nan
        return TailFit(
            xmin=nan, n=n, n_dead=n_dead, n_tail=0, density_exponent=nan,
            density_interval=(nan, nan), rank_exponent=nan, rank_interval=(nan, nan), ks=nan,
            gof_p=nan, lognormal_ratio=nan, lognormal_p=nan, inner_lognormal_ratio=nan,
            inner_lognormal_p=nan, exponential_ratio=nan, exponential_p=nan, verdict="too_few",
            reason=f"fewer than {MIN_DISTINCT} distinct live values: nothing to fit",
            n_bootstrap=n_bootstrap, seed=seed,
        )  # fmt: skip

    start, slope, ks = scan
    tail = logs[start:] - logs[start]
    n_tail = int(tail.size)
    gof_rng, interval_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2)
    )
    gof_p = _goodness_of_fit(logs, start, slope, ks, n_bootstrap, gof_rng)
    slopes = _resampled_slopes(logs, n_bootstrap, interval_rng)
    lognormal, inner, exponential = _alternatives(tail, floor=float(logs[0] - logs[start]))
    verdict, reason = _judge(n_tail, gof_p, lognormal, inner, exponential)
    return TailFit(
        xmin=float(live[start]),
        n=n,
        n_dead=n_dead,
        n_tail=n_tail,
        density_exponent=1.0 + slope,
        density_interval=interval(1.0 + slopes),
        rank_exponent=1.0 / slope,
        rank_interval=interval(1.0 / slopes),
        ks=ks,
        gof_p=gof_p,
        lognormal_ratio=lognormal[0],
        lognormal_p=lognormal[1],
        inner_lognormal_ratio=inner[0],
        inner_lognormal_p=inner[1],
        exponential_ratio=exponential[0],
        exponential_p=exponential[1],
        verdict=verdict,
        reason=reason,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )


def _live(values: npt.ArrayLike, floor: float = DEAD_RELATIVE) -> tuple[FloatArray, int]:
    """Live values in ascending order, and the number of dead ones."""
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1:
        raise StatsError(f"values must be 1-D; got shape {v.shape}")
    if v.size == 0:
        raise StatsError("values is empty: there is no tail to fit")
    if not np.isfinite(v).all():
        bad = int(np.flatnonzero(~np.isfinite(v))[0])
        raise StatsError(f"values[{bad}] is {v[bad]}: values must be finite")
    if (v < 0.0).any():
        bad = int(np.flatnonzero(v < 0.0)[0])
        raise StatsError(f"values[{bad}] is {v[bad]}: a norm cannot be negative")
    top = float(v.max())
    if top == 0.0:
        raise StatsError("values are all zero: no gradient was recorded")
    live = np.sort(v[(v / top >= floor) & (v > 0.0)])
    return live, int(v.size - live.size)


def _scan(logs: FloatArray) -> tuple[int, float, float] | None:
    """Threshold search: (index of xmin, density exponent - 1, KS distance), or None.

    ``logs`` are ascending logarithms.  With ``y = log(x/xmin)`` the fit is an exponential of rate
    ``1/mean(y)``, so each candidate's exponent comes from one suffix sum.  Its KS distance is

        D = max over the tail in ascending order of |F(x_i) - i/n_tail|,   i = 0, 1, ...,

    the convention of CSN's own code.  Among equal values i runs on, so that a heap of ties, where
    the data jump and the power law does not, counts as the distance it is (``powerlaw`` takes the
    fraction strictly below and overlooks it).  Candidates are the distinct values but the two
    largest.  D on a few points of the tail bounds D on all of them from below, so candidates are
    completed in the order of that bound and the search stops once the bound passes the best D:
    the result is that of the full search.
    """
    n = logs.size
    below = np.searchsorted(logs, logs, side="left")  # [n] values strictly below each value
    second = below[max(int(below[-1]) - 1, 0)]  # index of the second largest distinct value
    starts = np.flatnonzero(below[:second] == np.arange(second))
    if starts.size < MIN_DISTINCT - 2:
        return None
    if starts.size > MAX_XMIN_CANDIDATES:
        pick = np.linspace(0, starts.size - 1, MAX_XMIN_CANDIDATES).round().astype(np.int64)
        starts = starts[pick]

    suffix = np.cumsum(logs[::-1])[::-1]
    count = (n - starts).astype(np.float64)
    slopes = count / (suffix[starts] - count * logs[starts])

    fractions = np.linspace(0.0, 1.0, min(_COARSE_POINTS, n))
    points = starts[:, None] + np.floor(fractions * (n - 1 - starts)[:, None]).astype(np.int64)
    model = -np.expm1(-slopes[:, None] * (logs[points] - logs[starts][:, None]))
    seen = (points - starts[:, None]) / count[:, None]
    bound = np.abs(model - seen).max(axis=1)

    best, best_distance = -1, math.inf
    for c in np.argsort(bound, kind="stable"):
        if bound[c] >= best_distance:
            break
        i = int(starts[c])
        model_c = -np.expm1(-slopes[c] * (logs[i:] - logs[i]))
        distance = float(np.abs(model_c - np.arange(n - i) / count[c]).max())
        if distance < best_distance:
            best, best_distance = int(c), distance
    return int(starts[best]), float(slopes[best]), best_distance


def _goodness_of_fit(
    logs: FloatArray, start: int, slope: float, ks: float, n_bootstrap: int,
    rng: np.random.Generator,
) -> float:  # fmt: skip
    """Semi-parametric bootstrap p-value (CSN section 4.1).

    Each synthetic sample draws every value from the fitted tail with probability n_tail/n, else
    from the observed values below xmin, and goes through the whole threshold search.  The
    observed sample counts as one of the draws, so that p is never exactly 0.
    """
    n = logs.size
    exceed = 0
    for _ in range(n_bootstrap):
        n_tail = int(rng.binomial(n, (n - start) / n))
        body = logs[rng.integers(0, start, size=n - n_tail)] if start else logs[:0]
        tail = logs[start] + rng.standard_exponential(n_tail) / slope
        scan = _scan(np.sort(np.concatenate((body, tail))))
        # A sample too poor to be fitted cannot contradict the observed distance.
        exceed += scan is None or scan[2] >= ks
    return (exceed + 1) / (n_bootstrap + 1)


def _resampled_slopes(logs: FloatArray, n_bootstrap: int, rng: np.random.Generator) -> FloatArray:
    """Density exponent - 1 in each resample; resamples without enough distinct values drop out."""
    n = logs.size
    scans = (_scan(np.sort(logs[rng.integers(0, n, size=n)])) for _ in range(n_bootstrap))
    return np.array([scan[1] for scan in scans if scan is not None], dtype=np.float64)


Ratio = tuple[float, float]  # log-likelihood ratio in favour of the power law, and its p-value


def _alternatives(y: FloatArray, floor: float) -> tuple[Ratio, Ratio, Ratio]:
    """Ratios against lognormal, inner lognormal and exponential on the tail ``y = log(x/xmin)``.

    In y the power law is an exponential, the lognormal a normal cut off at 0, and the
    exponential a Gumbel-like density; the change of variable is common to all of them.  ``floor``
    is ``log(smallest live value / xmin) <= 0``.
    """
    mean = float(y.mean())
    power = -math.log(mean) - y / mean

    ratio = 0.0
    free = _truncated_normal(y)
    if free is not None:
        # The exact maximum is never below the power law; the bound only removes rounding.
        ratio = min(float(np.sum(power - _truncated_normal_logpdf(y, *free))), 0.0)
    # Under the power law -2*ratio is 0 half of the time and chi-square with one degree of freedom
    # otherwise, since the power law sits on the edge of the family.
    lognormal = (ratio, 0.5 * float(erfc(math.sqrt(-ratio))) if ratio < 0.0 else 1.0)

    if free is not None and free[0] >= floor:
        mu, sigma = free
    else:
        mu, sigma = floor, _truncated_normal_sigma(y, floor)
    inner = _vuong(power - _truncated_normal_logpdf(y, mu, sigma))

    growth = np.expm1(y)
    rate = 1.0 / float(growth.mean())
    exponential = _vuong(power - (math.log(rate) + y - rate * growth))
    return lognormal, inner, exponential


def _vuong(difference: FloatArray) -> Ratio:
    """Sum of log-likelihood differences and the two-sided p-value of its sign (Vuong 1989)."""
    total = float(difference.sum())
    spread = math.sqrt(difference.size) * float(difference.std())
    return total, float(erfc(abs(total) / (math.sqrt(2.0) * spread))) if spread > 0.0 else 1.0


def _truncated_normal(y: FloatArray) -> tuple[float, float] | None:
    """Maximum likelihood (mu, sigma) of a normal cut off below 0, or None at the limit.

    The family is exponential in (y, y**2), so the maximum is where both moments match.  With the
    cut h = -mu/sigma standard deviations above the mean, E[y**2]/E[y]**2 depends on h alone and
    grows from 1 to 2; a sample ratio of 2 or more puts the maximum at the exponential density.
    """
    mean = float(y.mean())
    target = float(np.mean(y * y)) / (mean * mean)

    def excess(h: float) -> float:
        reach = _mills(h) - h
        return (1.0 - h * reach) / (reach * reach) - target

    if excess(_MAX_TRUNCATION) <= 0.0:
        return None
    low = -1.0
    while excess(low) >= 0.0:
        low *= 4.0
    h = float(brentq(excess, low, _MAX_TRUNCATION, xtol=1e-12, rtol=1e-12))
    sigma = mean / (_mills(h) - h)
    return -h * sigma, sigma


def _truncated_normal_sigma(y: FloatArray, mu: float) -> float:
    """Maximum likelihood sigma of a normal cut off below 0, its mean ``mu <= 0`` given."""
    target = float(np.mean((y - mu) ** 2))

    def excess(sigma: float) -> float:
        h = -mu / sigma
        return sigma * sigma * (1.0 + h * _mills(h)) - target

    high = math.sqrt(target)
    low = high
    while excess(low) >= 0.0:
        low *= 0.5
    return float(brentq(excess, low, high, xtol=1e-12 * high, rtol=1e-12)) if low < high else high


def _mills(h: float) -> float:
    """Inverse Mills ratio of the standard normal, phi(h) / (1 - Phi(h))."""
    return math.sqrt(2.0 / math.pi) / float(erfcx(h / math.sqrt(2.0)))


def _truncated_normal_logpdf(y: FloatArray, mu: float, sigma: float) -> FloatArray:
    h = -mu / sigma
    z = y / sigma
    if h > 0.0:
        # log(1 - Phi(h)) carries -h**2/2, which the exponent cancels: never form either.
        log_mass = math.log(float(erfcx(h / math.sqrt(2.0))) / 2.0)
        exponent = -0.5 * z * z - h * z
    else:
        log_mass = float(log_ndtr(-h))
        exponent = -0.5 * (z + h) ** 2
    return exponent - math.log(sigma) - 0.5 * math.log(2.0 * math.pi) - log_mass


def _judge(
    n_tail: int, gof_p: float, lognormal: Ratio, inner: Ratio, exponential: Ratio
) -> tuple[Verdict, str]:
    if n_tail < MIN_TAIL:
        return "too_few", (
            f"{n_tail} values in the tail; below {MIN_TAIL} neither the exponent nor a test "
            "against alternatives can be relied on"
        )
    if gof_p < GOF_SIGNIFICANCE:
        return "rejected", (
            f"goodness of fit p = {gof_p:.3g} is below {GOF_SIGNIFICANCE}: samples of the fitted "
            "power law lie closer to it than these values do"
        )
    for name, (ratio, p) in (("lognormal", lognormal), ("exponential", exponential)):
        if ratio < 0.0 and p < RATIO_SIGNIFICANCE:
            return "rejected", (
                f"a tail of the {name} kind fits better: log-likelihood ratio {ratio:.3g}, "
                f"p = {p:.3g}"
            )
    open_ = [
        name
        for name, (ratio, p) in (("lognormal", inner), ("exponential", exponential))
        if not (ratio > 0.0 and p < RATIO_SIGNIFICANCE)
    ]
    if not open_:
        return "supported", (
            f"passes the goodness-of-fit test (p = {gof_p:.3g}) and beats the exponential "
            f"(p = {exponential[1]:.3g}) and every lognormal with its median inside the data "
            f"(p = {inner[1]:.3g})"
        )
    return "indistinguishable", (
        f"passes the goodness-of-fit test (p = {gof_p:.3g}), but these {n_tail} values do not "
        f"tell it from: {', '.join(open_)}"
    )
