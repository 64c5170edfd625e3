"""Does a released blueprint still hold here: agreement beside the noise of the local sample.

A rank correlation by itself says little: 0.8 is drift if two halves of the local sample agree
to 0.99, and nothing at all if they agree to 0.75. So every statistic stands beside the same
statistic between random halves; where the release was given noise, or holds deciles alone, beside
what these leave of it (:mod:`fastgrad.release_noise`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastgrad.rank_agreement import (
    MIN_RELIABILITY,
    MIN_SUBMODULES,
    Agreement,
    agreement,
)
from fastgrad.release_noise import ReleaseNoise, above_noise, effect
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint

Array = NDArray[np.float64]
Verdict = Literal["fresh", "drifted", "different model", "sample too small"]

#: Halves need two units each for their means to vary less than single units do.
MIN_UNITS = 4

#: Allowed drop below the agreement of two halves of a sample. 0.1 in Spearman is what replacing a
#: tenth of the variance of the ranks by noise costs.
SPEARMAN_TOLERANCE = 0.1

#: Weighted tau falls about twice as fast as Spearman near 1 (τ = 2/π·arcsin r: from r = .95 to
#: .85 it falls by .15, from 1 to .9 by .29).
TAU_TOLERANCE = 0.2

#: A top set of which the share s is replaced has Jaccard (1 − s)/(1 + s): 0.2 forgives one
#: member in ten, which costs a selection little.
JACCARD_TOLERANCE = 0.2

#: Of the statistics, in the order of :class:`Agreement`.
LABELS = ("Spearman", "weighted tau", "top-20 % Jaccard")

#: What a reason says where the noise of a private release leaves no answer, and what would help.
HIDDEN = "the release's noise hides it"
SETTLED = (
    "A release of more examples or a larger epsilon would settle it, and no larger local sample"
)

#: One-sided 95 % point of a standard normal: chance level of Spearman is this over √(n − 1).
CHANCE = 1.645


@dataclass(frozen=True)
class SplitHalf:
    """Mean agreement (rms scores) between random halves of a sample.

    Attributes:
        basis: what was divided: ``batches``, or ``examples`` where there were too few batches.
        n: how many of them.
        repeats: number of random divisions.
    """

    basis: Literal["batches", "examples"]
    n: int
    repeats: int
    spearman: float
    weighted_tau: float
    top_jaccard: float

    @property
    def reliability(self) -> float:
        """Rank reliability of the *whole* sample, by the Spearman-Brown formula 2r/(1 + r)."""
        r = max(self.spearman, 0.0)
        return 2 * r / (1 + r)

    def needed(self, target: float = MIN_RELIABILITY) -> int | None:
        """Units that a sample of reliability ``target`` would have; None if nothing can be said."""
        if not 0 < self.spearman < 1:
            return None
        factor = target * (1 - self.spearman) / (self.spearman * (1 - target))
        return math.ceil(factor * self.n / 2)


@dataclass(frozen=True)
class Staleness:
    """Comparison of a released blueprint with a local sample.

    Attributes:
        verdict: ``fresh``, ``drifted``, ``different model`` or ``sample too small``.
        reason: the verdict in words.
        spearman, weighted_tau, top_jaccard: agreement of rms scores (top 20 % for Jaccard); None
            if they could not be computed.
        local: the same between halves of the local sample.
        released: the same between halves of the blueprint's sample, if it says so.
        n_compared: submodules compared.
        weights_match: whether both were measured on the same weights; None if not known.
        more_needed: further batches or examples (see ``local.basis``) that would settle it,
            where the sample is too small and that can be said.
        more_examples: the same in examples, at the batch size of the sample; where it cannot even
            be halved, the fewest that would let it.
        noise: what the release's noise, or its deciles, leave of an agreement; None for a release
            of exact numbers.
        hidden: that noise is why the verdict is ``sample too small``: the release's sample is, for
            its noise; no local sample would settle it.
    """

    verdict: Verdict
    reason: str
    spearman: float | None
    weighted_tau: float | None
    top_jaccard: float | None
    local: SplitHalf | None
    released: SplitHalf | None
    n_compared: int
    weights_match: bool | None
    more_needed: int | None = None
    more_examples: int | None = None
    noise: ReleaseNoise | None = None
    hidden: bool = False

    @property
    def bars(self) -> Agreement | None:
        """What each statistic is expected to reach: the lower agreement of halves, times what noise
        leaves of it."""
        known = [h for h in (self.local, self.released) if h is not None]
        return expected_of(known, self.noise) if known else None

    @property
    def limits(self) -> Agreement | None:
        """Below these it has drifted: the bars, less tolerance and what noise may take."""
        return None if self.bars is None else limits_of(self.bars, self.noise)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self) | {"noise": None if self.noise is None else self.noise.to_dict()}


def expected_of(halves: Sequence[Agreement | SplitHalf], noise: ReleaseNoise | None) -> Agreement:
    """The lower agreement of the halves, times what noise leaves of it: a correlation through two
    independent disturbances is the product of those through each."""
    left = None if noise is None else noise.expected
    e = left or Agreement(1.0, 1.0, 1.0)
    return Agreement(
        e.spearman * min(h.spearman for h in halves),
        e.weighted_tau * min(h.weighted_tau for h in halves),
        e.top_jaccard * min(h.top_jaccard for h in halves),
    )


def limits_of(bars: Agreement, noise: ReleaseNoise | None) -> Agreement:
    """What is allowed to fall below ``bars``: the tolerance, and what noise may take."""
    m = (None if noise is None else noise.margin) or Agreement(0.0, 0.0, 0.0)
    return Agreement(
        bars.spearman - SPEARMAN_TOLERANCE - m.spearman,
        bars.weighted_tau - TAU_TOLERANCE - m.weighted_tau,
        max(bars.top_jaccard - JACCARD_TOLERANCE - m.top_jaccard, 0.0),
    )


def split_half(
    stats: GradientStats, repeats: int = 20, seed: int = 0, among: Collection[str] | None = None
) -> SplitHalf | None:
    """Agreement between random halves of the sample; None if it is too small to be divided.

    Halves of the batches, since batch gradients are what is ranked; halves of the examples'
    contributions where there are fewer than four batches. ``among`` these submodules alone, if
    given.
    """
    basis: Literal["batches", "examples"]
    if stats.n_batches >= MIN_UNITS:
        basis, source = "batches", stats.batch_sq
    elif stats.n_examples >= MIN_UNITS:
        basis, source = "examples", stats.sq
    else:
        return None
    size = np.maximum(stats.numel, 1)
    dead = set(stats.dead)
    wanted = set(stats.names if among is None else among) - dead
    live = np.array([n in wanted for n in stats.names]) & ~np.isnan(source).any(1)
    rng = np.random.default_rng(seed)
    n, found = source.shape[1], []
    for _ in range(repeats):
        order = rng.permutation(n)
        halves = (order[: n // 2], order[n // 2 :])
        a, b = (np.sqrt(source[:, half].mean(1) / size)[live] for half in halves)
        found.append(agreement(a, b))
    known = [f for f in found if f is not None]
    if not known:
        return None
    spearman, tau, jaccard = np.mean(known, axis=0).tolist()
    return SplitHalf(basis, n, repeats, spearman, tau, jaccard)


def compare(blueprint: Blueprint, local: GradientStats) -> Staleness:
    """See :meth:`fastgrad.Blueprint.staleness`."""
    hashes = blueprint.weights_hash, local.meta.get("weights_hash")
    match = None if None in hashes else hashes[0] == hashes[1]
    released = blueprint.split_half
    shapes = dict(zip(blueprint.names, blueprint.shapes, strict=True))

    def result(verdict: Verdict, reason: str, found: Agreement | None = None, n: int = 0,
               halves: SplitHalf | None = None, more: int | None = None,
               examples: int | None = None, noise: ReleaseNoise | None = None,
               hidden: bool = False) -> Staleness:  # fmt: skip
        s, t, j = found or (None, None, None)
        return Staleness(verdict, reason, s, t, j, halves, released, n, match, more, examples,
                         noise, hidden)  # fmt: skip

    for name, shape in zip(local.names, local.shapes, strict=True):
        if name not in shapes:
            return result("different model", f"{name!r} is not in the blueprint")
        if tuple(shape) != shapes[name]:
            return result("different model", f"{name} has shape {tuple(shape)} here and "
                          f"{shapes[name]} in the blueprint")  # fmt: skip
    dead = set(blueprint.dead) & set(local.dead)
    theirs = blueprint.scores("rms", "module")
    norms = dict(zip(local.names, local.grad_norm.tolist(), strict=True))
    size = dict(zip(local.names, local.numel.tolist(), strict=True))
    common = [n for n in local.names if n in theirs and size[n] and n not in dead]
    noise = effect(blueprint.file, common, np.array([norms[n] for n in common]),
                   np.array([size[n] for n in common]))  # fmt: skip
    above = above_noise(blueprint.file)
    seen = common if above is None else [n for n in common if above[n]]
    a = np.array([theirs[n][0] for n in seen])
    b = np.array([norms[n] / math.sqrt(size[n]) for n in seen])
    found, n = agreement(a, b), len(seen)
    halves = split_half(local, among=None if above is None else seen)
    if noise is not None and noise.too_few and len(common) >= MIN_SUBMODULES:
        return result(
            "sample too small",
            f"{HIDDEN}: {n} of {len(common)} norms lie above twice the noise, which is too few. "
            f"{SETTLED}",
            found, n, halves, noise=noise, hidden=True,
        )  # fmt: skip
    if found is None or halves is None:
        what = (
            f"only {n} submodules can be compared" if n < MIN_SUBMODULES
            else "the scores are all equal" if found is None
            else f"{local.n_batches} batches and {local.n_examples} examples cannot be halved; at "
            f"least {MIN_UNITS} are needed"
        )  # fmt: skip
        fewest = MIN_UNITS - local.n_examples if halves is None and found is not None else 0
        return result("sample too small", what, found, n, halves,
                      examples=fewest if fewest > 0 else None, noise=noise)  # fmt: skip
    if halves.reliability < MIN_RELIABILITY:
        needed = halves.needed()
        more = None if needed is None else max(needed - halves.n, 1)
        examples = _in_examples(more, halves, local)
        said = "" if examples is None or halves.basis == "examples" else f" ({examples} examples)"
        return result(
            "sample too small",
            f"the local ranks reproduce themselves only to {halves.reliability:.2f} (needed: "
            f"{MIN_RELIABILITY}); "
            + (f"about {more} more {halves.basis}{said} would settle it" if more else
               "the halves do not agree at all, so the number that would settle it is unknown"),
            found, n, halves, more, examples, noise,
        )  # fmt: skip
    bars = expected_of([halves] if released is None else [halves, released], noise)
    limits = limits_of(bars, noise)
    chance = CHANCE / math.sqrt(n - 1)
    unknown = noise is not None and noise.expected is None
    # Noise may be what brings ranks down to chance.
    if match is False and found.spearman < chance and not unknown and (
        noise is None or found.spearman < limits.spearman
    ):  # fmt: skip
        return result("different model", f"other weights, and ranks that agree no better than "
                      f"chance (Spearman {found.spearman:.2f})", found, n, halves,
                      noise=noise)  # fmt: skip
    verdict, reason, hidden = _judge(found, bars, limits, noise, match)
    return result(verdict, reason, found, n, halves, noise=noise, hidden=hidden)


def _in_examples(more: int | None, halves: SplitHalf, local: GradientStats) -> int | None:
    if more is None or halves.basis == "examples":
        return more
    return math.ceil(more * local.n_examples / local.n_batches) if local.n_examples else None


def _judge(
    found: Agreement, bars: Agreement, limits: Agreement, noise: ReleaseNoise | None,
    match: bool | None,
) -> tuple[Verdict, str, bool]:  # fmt: skip
    """Verdict, reason, and whether noise hides the answer."""
    # Two halves differ more than two whole samples do, so a drop below them is no noise. The
    # noisier of the two samples sets the bar.
    against = "halves" if noise is None else "halves and noise" if noise.std else "halves, deciles"
    parts = [
        f"{label} {value:.2f} ({against} {bar:.2f})"
        for label, value, bar in zip(LABELS, found, bars, strict=True)
    ]
    low = [text for text, v, limit in zip(parts, found, limits, strict=True) if v < limit]
    note = " The weights differ from the blueprint's." if match is False else ""
    among = ""
    if noise is not None and noise.n_above is not None and noise.std:
        among = f", in the {noise.n_above} of {noise.n} norms above the release's noise"
    if low and noise is not None and noise.expected is None:
        return "sample too small", (
            f"{HIDDEN}, or it has drifted: {', '.join(low)}, and the release does not say how far "
            f"its norms are above the noise. {SETTLED}{note}"
        ), True  # fmt: skip
    if low:
        return "drifted", (
            f"agreement falls below the sample's own{among}: {', '.join(low)}.{note}"
        ), False  # fmt: skip
    if noise is not None and not noise.settles:
        left = 0.0 if noise.expected is None else noise.expected.spearman
        return "sample too small", (
            f"{HIDDEN}: one that still holds would agree to Spearman {left:.2f} by its noise alone"
            f"{among} (needed: {math.sqrt(MIN_RELIABILITY):.2f}; found: {found.spearman:.2f}). "
            f"{SETTLED}{note}"
        ), True  # fmt: skip
    return "fresh", (
        f"agrees as well as the sample with itself{among}: {', '.join(parts)}.{note}"
    ), False  # fmt: skip


# -- weights for a blend ---------------------------------------------------------------------


def share_variance(batch_sq: Array) -> Array | None:
    """Sampling variance of each submodule's share of the squared gradient norm.

    ``batch_sq`` is ``[P, N]``. The share m_i = Σ_b x_ib / Σ_b X_b, X_b = Σ_i x_ib, is a ratio
    estimator; linearised (Cochran, Sampling Techniques, section 2.11):
    ``Var m_i = Σ_b (x_ib − m_i X_b)² / (N (N − 1) X̄²)``. None with fewer than two batches.
    """
    n = batch_sq.shape[1]
    total = batch_sq.sum(0)
    if n < 2 or not total.sum() > 0:
        return None
    share = batch_sq.sum(1) / total.sum()
    rest = (batch_sq - share[:, None] * total) / total.mean()
    return (rest**2).sum(1) / (n * (n - 1))


def auto_weight(squared_distance: float, local: float, released: float | None) -> float:
    """Weight of the released measurement that minimises the expected squared error of a blend.

    The local shares are unbiased for the local data and have variance V_l. The released ones
    have variance V_r and, coming from other data, a bias b: their error is V_r + b². Since
    E‖released − local‖² = V_l + V_r + b², that error is estimated by
    max(‖released − local‖² − V_l, V_r), and inverse-variance weighting gives

        weight = V_l / max(‖released − local‖², V_l + V_r).
    """
    error = max(squared_distance, local + (released or 0.0))
    return local / error if error > 0 else 0.5
