"""Do examples pull on blocks in patterns of their own, or does each block have one share for all?

Two views of the cross-influence matrix ``T [blocks, examples]``: its singular spectrum (how many
patterns there are), and a test of independence (whether there is more than one block profile times
one example strength).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgrad.concentration import FloatArray, check_bootstrap, frozen, plain
from fastgrad.errors import StatsError
from fastgrad.mass import MassMatrix

#: Up to this many entries on the shorter side all singular values are computed.
EXACT = 1500
#: Singular values computed beyond that, by a randomised method.
RANK = 64
#: The permutation test looks at no more than this many rows and columns, drawn at random.
TEST_ROWS, TEST_COLUMNS = 400, 1500
SIGNIFICANCE = 0.05


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
    size = float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))
    if not np.isfinite(size) or size == 0.0:
        raise StatsError("a spectrum needs finite entries that are not all zero")
    complete = min(matrix.shape) <= EXACT
    if complete:
        # Through the matrix itself, not its square: small singular values keep their digits.
        values = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    else:
        values = _leading(matrix, seed)
    sq = values**2
    p = values[values > 0] / values.sum()
    return Spectrum(
        values=frozen(values),
        explained=frozen(np.minimum(np.cumsum(sq) / size, 1.0)),
        stable_rank=size / float(sq[0]),
        participation=size**2 / float((sq**2).sum()) if complete else float("nan"),
        effective_rank=float(np.exp(-(p * np.log(p)).sum())) if complete else float("nan"),
        complete=complete,
        seed=seed,
    )


def _leading(matrix: FloatArray, seed: int) -> FloatArray:
    import torch

    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)  # svd_lowrank takes no generator
        whole = torch.from_numpy(np.ascontiguousarray(matrix))
        _, values, _ = torch.svd_lowrank(whole, q=RANK + 16, niter=4)
    finally:
        torch.random.set_rng_state(state)
    return values[:RANK].double().numpy()


@dataclass(frozen=True, eq=False)
class Independence:
    """How well one profile of the blocks times one strength of each example describes ``T``.

    Attributes:
        explained: share of the variance of ``log T`` that an additive model (one number for each
            block, one for each example) explains: R².
        misplaced: share of the squared gradient that would have to move for it to be the outer
            product of its margins (total variation distance), 0 to 1.
        p_value: of the hypothesis that the rest has no structure: the share of its variance in
            its leading pattern, against the same after shuffling each block's rest over the
            examples.
        leading: that share.
        verdict: ``structured`` or ``no structure found``.
        reason: in words.
        n_zero: blocks left out of the logarithms, because some example does not touch them.
        tested: rows and columns that the test looked at.
        n_permutations, seed: of the test.
    """

    explained: float
    misplaced: float
    p_value: float
    leading: float
    verdict: str
    reason: str
    n_zero: int
    tested: tuple[int, int]
    n_permutations: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return plain(self)


def independence(mass: MassMatrix, n_permutations: int = 200, seed: int = 0) -> Independence:
    """Test whether examples differ in *where* they pull, and not only in how strongly.

    Under the additive model of ``log T``, the residuals of one block are exchangeable between
    examples. Shuffling them block by block therefore keeps everything but the patterns that
    several blocks have in common; the leading squared singular value of the residuals, as a share
    of all, is compared with what the shuffles give. The test is exact up to the centring, which is
    repeated after each shuffle.

    Args:
        mass: see :class:`fastgrad.mass.MassMatrix`.
        n_permutations: shuffles, at least 1; the smallest p-value is 1/(n + 1).
        seed: of the shuffles, and of the rows and columns looked at in a large matrix.

    Raises:
        StatsError: for fewer than 3 blocks that every example touches, or fewer than 3 examples.
    """
    check_bootstrap(n_permutations)
    logs, n_zero = log_influence(mass)
    total = logs - logs.mean()
    residual = _centred(logs)
    variance = float((total**2).sum())
    # what is left of a perfect product is rounding, and has no structure
    floor = 1e-20 * max(float((logs**2).sum()), 1.0)
    left = float((residual**2).sum())
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(residual))[:TEST_ROWS])
    columns = np.sort(rng.permutation(residual.shape[1])[:TEST_COLUMNS])
    part = _centred(residual[np.ix_(rows, columns)])
    if left <= floor:
        leading, p_value = 0.0, 1.0
    else:
        leading = _leading_share(part)
        beyond = sum(
            _leading_share(_centred(rng.permuted(part, axis=1))) >= leading
            for _ in range(n_permutations)
        )
        p_value = (1 + beyond) / (n_permutations + 1)
    structured = p_value < SIGNIFICANCE
    return Independence(
        explained=1.0 - left / variance if variance > floor else 1.0,
        misplaced=_misplaced(mass),
        p_value=p_value,
        leading=leading,
        verdict="structured" if structured else "no structure found",
        reason=(
            f"examples differ in where they pull: {leading:.0%} of what one profile leaves over "
            f"follows one more pattern (p = {p_value:.3f})"
            if structured
            else f"what one profile leaves over looks like chance (p = {p_value:.3f})"
        ),
        n_zero=n_zero,
        tested=(len(rows), len(columns)),
        n_permutations=n_permutations,
        seed=seed,
    )


def log_influence(mass: MassMatrix) -> tuple[FloatArray, int]:
    """``log T`` of the blocks that every example touches, and how many others there are.

    Raises:
        StatsError: for fewer than 3 such blocks, or fewer than 3 examples.
    """
    values = mass.in_memory()
    touched = (values > 0).all(1)
    if touched.sum() < 3 or mass.n_examples < 3:
        raise StatsError(
            f"{int(touched.sum())} blocks are touched by all of the {mass.n_examples} examples; "
            "logarithms need 3 of both. Remedy: more examples, or whole parameters as blocks"
        )
    return 0.5 * np.log(values[touched].astype(np.float64)), int((~touched).sum())


def _centred(x: FloatArray) -> FloatArray:
    return x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()


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


__all__ = ["Independence", "Spectrum", "independence", "log_influence", "spectrum"]
