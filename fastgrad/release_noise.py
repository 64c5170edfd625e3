"""What the noise of a private release, or its coarse steps, leave of an agreement with it.

A release says how large its noise is, so what that alone does to ranks can be tried out: the norms
of a measurement without noise are taken for the truth, brought to the release's scale, given noise
of the stated size many times, and read as the release is read. How well such readings agree with
the truth is what a release that still holds can be expected to reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm as gaussian

from fastgrad.blueprint_schema import Measured
from fastgrad.rank_agreement import MIN_RELIABILITY, MIN_SUBMODULES, TOP, Agreement, agreement

Array = NDArray[np.float64]

#: A noised norm above this many standard deviations of the noise is told from none: noise alone
#: goes beyond it in 2.3 % of the submodules.
ABOVE = 2.0

#: Readings that are drawn; their first percentile is what is wanted of them.
DRAWS = 300

#: Noise lowers an agreement further than by the margin in one reading of a hundred.
ONE_IN_A_HUNDRED = 1.0


@dataclass(frozen=True)
class ReleaseNoise:
    """What noise and coarse steps leave of an agreement with a release.

    Attributes:
        std: standard deviation of the noise on each norm; 0 for a release without noise, None
            where the file does not say.
        n: norms that could be compared.
        n_above: how many of them are above twice the noise, which are the ones that are compared;
            None where the release does not say (ranks and deciles of noised norms).
        expected: mean agreement of a reading with the truth; None where it is not known.
        margin: by how much one reading in a hundred falls below that; of the top set at least what
            one member costs, 2/(m + 1) of m, since the norm of a mean of cut gradients and that of
            batches need not agree on which of two near ones is in. None with ``expected``.
    """

    std: float | None
    n: int
    n_above: int | None
    expected: Agreement | None
    margin: Agreement | None

    @property
    def too_few(self) -> bool:
        """Whether too few norms are above the noise for anything to be compared."""
        return self.n_above is not None and self.expected is None

    @property
    def settles(self) -> bool:
        """Whether what noise leaves is enough to call a release fresh; True where the release does
        not say, and the agreement alone has to show it."""
        if self.expected is None:
            return not self.too_few
        return max(self.expected.spearman, 0.0) ** 2 >= MIN_RELIABILITY

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        pair = {"expected": self.expected, "margin": self.margin}
        return asdict(self) | {k: None if v is None else v._asdict() for k, v in pair.items()}


def is_noised(file: Measured) -> bool:
    """Whether noise protects what the measurement says."""
    return file.privacy.mechanism != "none"


def is_read_exactly(file: Measured) -> bool:
    """Whether the order of a file's norms is that of what was measured."""
    return not is_noised(file) and file.privacy.released != "deciles"


def noised_norms(file: Measured) -> dict[str, float] | None:
    """The released norms, noise included; None if the file is exact or does not tell them."""
    std = file.privacy.noise_std
    if not is_noised(file) or std is None or file.privacy.released in ("ranks", "deciles"):
        return None
    return {
        s.name: float(np.hypot(s.grad_norm, std)) if s.noised_norm is None else s.noised_norm
        for s in file.submodules if s.grad_norm is not None
    }  # fmt: skip


def above_noise(file: Measured) -> dict[str, bool] | None:
    """Whether each released norm is above twice the noise; None if the file is exact, or does not
    tell its norms (ranks and deciles)."""
    norms, std = noised_norms(file), file.privacy.noise_std or 0.0
    return None if norms is None else {n: v > ABOVE * std for n, v in norms.items()}


def in_noise(file: Measured) -> str:
    """How many of the norms of a private release say something."""
    above = above_noise(file)
    if above is None:
        return (
            "how many of the norms are above the noise is not released: the order may be that of "
            "noise"
        )
    count = sum(above.values())
    rest = "" if count == len(above) else "; the others' rms and place are mostly noise"
    return f"{count} of {len(above)} norms above twice the noise{rest}"


def effect(
    file: Measured, names: Sequence[str], truth: Array, numel: Array, seed: int = 0
) -> ReleaseNoise | None:
    """What noise and steps of ``file`` leave of the agreement with ``truth``; None for a file that
    is read exactly.

    Args:
        file: the release.
        names: submodules that both know.
        truth: ``[n]`` their norms by a measurement without noise, of any scale.
        numel: ``[n]`` their elements.
        seed: of the draws.
    """
    if is_read_exactly(file):
        return None
    size = np.sqrt(numel)
    if not is_noised(file):
        steps = agreement(truth / size, _deciles(truth / size))
        nothing = None if steps is None else Agreement(0.0, 0.0, 0.0)
        return ReleaseNoise(0.0, len(names), len(names), steps, nothing)
    std, released = file.privacy.noise_std, noised_norms(file)
    if released is None or std is None:  # ranks of what may be all noise
        return ReleaseNoise(std, len(names), None, None, None)
    values = np.array([released[n] for n in names])
    n_above = int((values > ABOVE * std).sum())
    if n_above < MIN_SUBMODULES or not truth.any():
        return ReleaseNoise(std, len(names), n_above, None, None)
    drawn = _readings(_to_scale(truth, values, std), size, std, np.random.default_rng(seed))
    if len(drawn) < DRAWS / 2:
        return ReleaseNoise(std, len(names), n_above, None, None)
    mean = drawn.mean(0)
    margin = np.maximum(mean - np.percentile(drawn, ONE_IN_A_HUNDRED, axis=0), 0.0)
    margin[2] = max(margin[2], 2 / (max(1, round(TOP * n_above)) + 1))
    return ReleaseNoise(
        std, len(names), n_above, Agreement(*mean.tolist()), Agreement(*margin.tolist())
    )


def _to_scale(truth: Array, values: Array, std: float) -> Array:
    """``truth`` times a factor, so that as many norms are expected above the noise, and no more
    energy in all, as the release has.

    The number above the noise is what the order depends on, and is met even where the release's
    norms are spread more widely than those of the truth; where all are above it, it says no more
    than that, and the energy Σ(v² − σ²) does.
    """
    energy = float((values**2 - std**2).sum())
    factor = np.sqrt(max(energy, 0.0) / float((truth**2).sum()))
    count = int((values > ABOVE * std).sum())

    def surplus(log_factor: float) -> float:
        return float(gaussian.sf(ABOVE - np.exp(log_factor) * truth / std).sum()) - count

    if count < values.size and factor > 0 and surplus(np.log(factor)) > 0:
        low = np.log(std / truth.max()) - 50.0  # nothing above the noise but by chance
        factor = np.exp(brentq(surplus, low, np.log(factor))) if surplus(low) < 0 else 0.0
    scaled: Array = truth * factor
    return scaled


def _readings(norms: Array, size: Array, std: float, rng: np.random.Generator) -> Array:
    """``[≤ DRAWS, 3]`` agreement of the norms with themselves once noised, among those that are
    then above the noise."""
    found = []
    for noised in norms + std * rng.standard_normal((DRAWS, norms.size)):
        seen = noised > ABOVE * std
        read = np.sqrt(np.maximum(noised[seen] ** 2 - std**2, 0.0)) / size[seen]
        one = agreement(norms[seen] / size[seen], read)
        if one is not None:
            found.append(one)
    return np.array(found).reshape(-1, 3)


def _deciles(scores: Array) -> Array:
    """Scores of which nothing but the tenth of the ranks is left; the highest is 10."""
    rank = np.empty(scores.size)
    rank[np.argsort(-scores, kind="stable")] = np.arange(scores.size)
    return np.asarray(10 - 10 * rank.astype(np.int64) // scores.size, dtype=np.float64)
