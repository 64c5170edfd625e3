"""Do examples pull on blocks in patterns of their own, or does each block have one share for all?

Two views of the cross-influence matrix ``T [blocks, examples]``: its singular spectrum (how many
patterns there are), and a test of independence (whether there is more than one block profile times
one example strength).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgrad.concentration import FloatArray, check_bootstrap, frozen, plain
from fastgrad.errors import StatsError
from fastgrad.mass import MassMatrix

#: Up to this many entries on the shorter side all singular values are computed.
EXACT = 1500
#: Singular values computed beyond that, by a randomised method.
RANK = 64
#: Further columns of the randomised method, and how often it goes through the matrix.
OVERSAMPLING, PASSES = 16, 5
#: The permutation test looks at no more than this many rows and columns, drawn at random.
TEST_ROWS, TEST_COLUMNS = 400, 1500
SIGNIFICANCE = 0.05
#: Fewer shuffles than this cannot reach ``SIGNIFICANCE``.
MIN_PERMUTATIONS = 20
#: A block's noise counts as at least this share of the median block's when blocks are weighed:
#: otherwise the quietest one alone would say how strong each example is.
QUIETEST = 0.05


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of a matrix, largest first.

    Attributes:
        values: the singular values, all of them or the leading ``RANK``.
        explained: ``[len(values)]`` share of the squared Frobenius norm in the leading ones.
        stable_rank: ``‖M‖_F² / σ₁²``.
        participation: ``(Σσ²)² / Σσ⁴``: how many directions share the norm; NaN if not all values
            are known.
        effective_rank: exponential of the entropy of ``σ / Σσ`` (Roy and Vetterli, EUSIPCO 2007);
            NaN if not all values are known.
        complete: whether ``values`` are all there are.
        seed: of the randomised method (Halko, Martinsson and Tropp, SIAM Review 53, 2011).
    """

    values: FloatArray
    explained: FloatArray
    stable_rank: float
    participation: float
    effective_rank: float
    complete: bool
    seed: int

    def rank_for(self, share: float) -> int | None:
        """How many directions hold ``share`` of the squared norm; None if more than are known."""
        enough = np.flatnonzero(self.explained >= share - 1e-12)
        return int(enough[0]) + 1 if enough.size else None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return plain(self)


def spectrum(matrix: FloatArray, seed: int = 0) -> Spectrum:
    """Singular spectrum of ``matrix [m, n]``: exact where the shorter side has at most ``EXACT``
    entries, else the leading ``RANK`` values by a randomised method.

    Raises:
        StatsError: for a matrix without a finite, non-zero entry.
    """
    largest = float(np.abs(matrix).max())
    if not np.isfinite(largest) or largest == 0.0:
        raise StatsError("a spectrum needs finite entries that are not all zero")
    matrix = matrix / largest  # squares of huge and tiny entries stay in range
    size = float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))
    complete = min(matrix.shape) <= EXACT
    if complete:
        # Through the matrix itself, not its square: small singular values keep their digits.
        values = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    else:
        whole = np.asarray(matrix, dtype=np.float64)
        values = leading_patterns(lambda: [(slice(None), whole)], whole.shape, RANK, seed)[1]
    sq = values**2
    p = values[values > 0] / values.sum()
    return Spectrum(
        values=frozen(values * largest),
        explained=frozen(np.minimum(np.cumsum(sq) / size, 1.0)),
        stable_rank=size / float(sq[0]),
        participation=size**2 / float((sq**2).sum()) if complete else float("nan"),
        effective_rank=float(np.exp(-(p * np.log(p)).sum())) if complete else float("nan"),
        complete=complete,
        seed=seed,
    )


def leading_patterns(
    parts: Callable[[], Iterable[tuple[slice, npt.NDArray[np.floating]]]],
    shape: tuple[int, int],
    rank: int,
    seed: int,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """``U [m, rank]``, singular values ``[rank]`` and ``V [n, rank]`` of the leading patterns, by
    the randomised subspace iteration of Halko, Martinsson and Tropp (algorithm 4.4).

    The matrix is gone through :data:`PASSES` times, stretch by stretch, and multiplied in its own
    precision, each time by itself and its transpose: singular values below the square root of that
    precision, as a share of the largest, are lost.

    Args:
        parts: gives the rows of the matrix ``[m, n]`` anew, as ``(which, values)``.
        shape: ``(m, n)``.
        rank: patterns wanted.
        seed: of the random start.
    """
    m, n = shape
    width = min(rank + OVERSAMPLING, m, n)
    side = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, width)))[0]
    for _ in range(PASSES - 1):
        total = np.zeros((n, width))
        for _, part in parts():
            total += part.T @ (part @ side.astype(part.dtype))
        side = np.linalg.qr(total)[0]
    image = np.empty((m, width))
    for rows, part in parts():
        image[rows] = part @ side.astype(part.dtype)
    left, values, turn = np.linalg.svd(image, full_matrices=False)
    return left[:, :rank], values[:rank], side @ turn[:rank].T


@dataclass(frozen=True, eq=False)
class Independence:
    """How well one profile of the blocks times one strength of each example describes ``T``.

    Attributes:
        explained: share of the variance of ``log T`` that an additive model (one number for each
            block, one for each example) explains: R².
        misplaced: share of the squared gradient that would have to move for it to be the outer
            product of its margins (total variation distance), 0 to 1.
        p_value: of the hypothesis that the rest has no structure, from random signs.
        leading: share of the rest's variance in its leading pattern, each block in units of its
            own noise.
        leading_by_chance: median of that under random signs.
        verdict: ``structured``, ``no structure found``, or ``undecided`` where there were fewer
            than ``MIN_PERMUTATIONS`` draws.
        reason: in words.
        n_zero: blocks left out of the logarithms, because some example does not touch them.
        n_idle: examples without any gradient, left out of them too.
        tested: rows and columns that the test looked at.
        n_permutations, seed: of the test.
    """

    explained: float
    misplaced: float
    p_value: float
    leading: float
    leading_by_chance: float
    verdict: str
    reason: str
    n_zero: int
    n_idle: int
    tested: tuple[int, int]
    n_permutations: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return plain(self)


def independence(mass: MassMatrix, n_permutations: int = 200, seed: int = 0) -> Independence:
    """Test whether examples differ in *where* they pull, and not only in how strongly.

    An additive model of ``log T`` is fitted with each block weighed by the inverse variance of its
    rest, and the rest is divided by its block's standard deviation. Without structure the signs of
    what remains are those of independent coins, whatever the size of the noise of each block and
    each example. So random signs, from which the additive part is taken out again, show how large
    the leading squared singular value is by chance. The test rests on noise that is symmetric on
    the logarithmic scale.

    Args:
        mass: see :class:`fastgrad.mass.MassMatrix`.
        n_permutations: draws of signs; the smallest p-value is 1/(n + 1).
        seed: of the draws, and of the rows and columns looked at in a large matrix.

    Raises:
        StatsError: for fewer than 3 blocks that every example touches, or fewer than 3 examples.
    """
    check_bootstrap(n_permutations)
    logs, n_zero, n_idle = log_influence(mass)
    total = logs - logs.mean()
    variance = float((total**2).sum())
    # what is left of a perfect product is rounding, and has no structure
    floor = 1e-20 * max(float((logs**2).sum()), 1.0)
    left = float((_centred(logs) ** 2).sum())
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(logs))[:TEST_ROWS])
    columns = np.sort(rng.permutation(logs.shape[1])[:TEST_COLUMNS])
    leading, p_value, by_chance = 0.0, 1.0, 0.0
    if left > floor:
        rest, common = standardised(logs[np.ix_(rows, columns)])
        leading = _leading_share(rest)
        draws = np.array([
            _leading_share(_without(rest * rng.choice((-1.0, 1.0), rest.shape), common))
            for _ in range(n_permutations)
        ])  # fmt: skip
        p_value = float((1 + (draws >= leading).sum()) / (n_permutations + 1))
        by_chance = float(np.median(draws))
    if n_permutations < MIN_PERMUTATIONS:
        verdict, reason = "undecided", (
            f"{n_permutations} draws cannot reach a p-value of {SIGNIFICANCE}; take at least "
            f"{MIN_PERMUTATIONS}"
        )
    elif p_value < SIGNIFICANCE:
        verdict, reason = "structured", (
            f"examples differ in where they pull: {leading:.0%} of what one profile leaves over "
            f"follows one more pattern, {by_chance:.0%} would by chance (p = {p_value:.3f})"
        )
    else:
        verdict, reason = "no structure found", (
            f"what one profile leaves over looks like chance: {leading:.0%} in one more pattern, "
            f"{by_chance:.0%} would be there anyway (p = {p_value:.3f})"
        )
    return Independence(
        explained=1.0 - left / variance if variance > floor else 1.0,
        misplaced=_misplaced(mass),
        p_value=p_value,
        leading=leading,
        leading_by_chance=by_chance,
        verdict=verdict,
        reason=reason,
        n_zero=n_zero,
        n_idle=n_idle,
        tested=(len(rows), len(columns)),
        n_permutations=n_permutations,
        seed=seed,
    )


def log_influence(mass: MassMatrix) -> tuple[FloatArray, int, int]:
    """``log T`` of the blocks that every example with a gradient touches; how many other blocks
    there are, and how many examples without a gradient.

    Raises:
        StatsError: for fewer than 3 such blocks, or fewer than 3 such examples.
    """
    live = mass.by_example > 0
    values = mass.in_memory()[:, live]
    touched = (values > 0).all(1)
    if touched.sum() < 3 or live.sum() < 3:
        raise StatsError(
            f"{int(touched.sum())} blocks are touched by all of the {int(live.sum())} examples "
            "that have a gradient; logarithms need 3 of both. Remedy: whole parameters as blocks, "
            "or more examples"
        )
    logs = 0.5 * np.log(values[touched].astype(np.float64))
    return logs, int((~touched).sum()), int((~live).sum())


def _centred(x: FloatArray) -> FloatArray:
    return x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()


def standardised(logs: FloatArray) -> tuple[FloatArray, FloatArray]:
    """What an additive model weighed by inverse variances leaves over, each row in units of its
    noise, ``[R, E]``; and the unit vector ``[R]`` along which the fit left nothing."""
    weight = np.ones(len(logs))
    centred = logs - logs.mean(1, keepdims=True)
    for _ in range(10):
        share = weight / weight.sum()
        rest = centred - share @ centred
        # each row has lost its own share of the common part
        variance = (rest**2).mean(1) / np.maximum(1.0 - share, 0.1)
        variance = np.maximum(variance, QUIETEST * np.median(variance))
        weight = 1.0 / np.maximum(variance, np.finfo(np.float64).tiny)
    common = np.sqrt(weight)
    common /= np.linalg.norm(common)
    return _without(centred * np.sqrt(weight)[:, None], common), common


def _without(x: FloatArray, common: FloatArray) -> FloatArray:
    """Without the rows' means and what lies along ``common`` in each column."""
    x = x - x.mean(1, keepdims=True)
    return x - np.outer(common, common @ x)


def _leading_share(residual: FloatArray) -> float:
    """Largest squared singular value, as a share of all."""
    if len(residual) > residual.shape[1]:
        residual = residual.T
    gram = residual @ residual.T
    trace = float(np.trace(gram))
    return float(np.linalg.eigvalsh(gram)[-1]) / trace if trace > 0 else 0.0


def _misplaced(mass: MassMatrix) -> float:
    by_block, by_example = mass.by_block, mass.by_example
    total = float(by_block.sum())
    distance = 0.0
    for rows, part in mass.stretches():
        product = np.outer(by_block[rows] / total, by_example / total)
        distance += float(np.abs(part / total - product).sum())
    return 0.5 * distance


__all__ = [
    "Independence",
    "Spectrum",
    "independence",
    "leading_patterns",
    "log_influence",
    "spectrum",
    "standardised",
]
