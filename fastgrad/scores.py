"""Scores of examples, and a choice of the best that is not the same example again and again."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastgrad.concentration import FloatArray, IntArray
from fastgrad.errors import StatsError
from fastgrad.interaction import log_influence
from fastgrad.mass import MassMatrix
from fastgrad.stats import GradientStats, Scale

Score = Literal["norm", "alignment", "cosine"]

#: Examples compared with those already chosen at a time.
STRETCH = 256
#: Of fewer blocks than this the profiles of unrelated examples are often nearly parallel.
MIN_BLOCKS = 8


def example_scores(
    stats: GradientStats,
    by: Score = "norm",
    *,
    include: Sequence[str] | None = None,
    direction: str | None = None,
    scale: Scale | None = None,
    per_parameter: bool = False,
) -> FloatArray:
    """A score for every example, ``[E]``; or ``[P, E]`` for each parameter.

    * ``norm``: norm of the example's gradient. At the scale ``example_mean`` and early in training
      this is GraNd (Paul, Ganguli and Dziugaite, NeurIPS 2021).
    * ``alignment``: inner product of the example's gradient with a target direction, for instance
      the gradient of a target set (``fg.gradient_direction``): to first order what a small step on
      the example takes off the target's loss, as in in-run influence (Wang et al., arXiv
      2406.11011) and TracIn. With ``fg.adam_preconditioned`` the step is Adam's. Negative: the
      step hurts.
    * ``cosine``: that by the norm of the example's gradient (and only by that: the direction's own
      norm, the same for all, is left in), so that long or hard examples do not win by size alone.

    Args:
        stats: with examples; for the last two also a target direction.
        by: see above.
        include: name patterns (``fnmatch``) of the parameters to score by; all that are known by
            default.
        direction: name of the direction, if the statistics have several.
        scale: of the influence, see :meth:`GradientStats.influence`; by default ``example_mean``
            where the loss reduction is known, else ``contribution``.
        per_parameter: a row for each parameter of the statistics, NaN where not known or not
            included.

    Raises:
        StatsError: for an unknown score, a pattern that matches nothing, statistics without
            examples or direction, or parameters of which none is known.
    """
    if by not in ("norm", "alignment", "cosine"):
        raise StatsError(f"unknown score {by!r}; use norm, alignment or cosine")
    if scale is None:
        known_scale = not np.isnan(stats.mean_factor).any() and not stats.meta.get("mixes_examples")
        scale = "example_mean" if known_scale else "contribution"
    if isinstance(include, str):
        raise StatsError(f"include is a list of patterns; write [{include!r}]")
    influence = stats.influence(scale)
    rows = np.asarray(~np.isnan(influence).any(1))
    for pattern in include or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in stats.names):
            raise StatsError(f"include: the pattern {pattern!r} matches no parameter; names look "
                             f"like {', '.join(stats.names[:3])}")
    if include is not None:
        rows &= np.array([any(fnmatch.fnmatchcase(n, p) for p in include) for n in stats.names])
    if not rows.any():
        raise StatsError("no parameter is left whose influence is known: see stats.coverage")
    # a contribution has already been squared or multiplied by what the scale takes out
    signed = None if by == "norm" else _aligned(stats, direction) * stats.factor(scale)
    if per_parameter:
        table = influence if signed is None else signed
        if by == "cosine":
            table = _by_norm(table, influence)
        return np.where(rows[:, None], table, np.nan)
    norm = np.sqrt((influence[rows] ** 2).sum(0))
    if signed is None:
        return norm
    total = signed[rows].sum(0)
    return total if by == "alignment" else _by_norm(total, norm)


def _by_norm(values: FloatArray, norms: FloatArray) -> FloatArray:
    return np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)


def _aligned(stats: GradientStats, direction: str | None) -> FloatArray:
    names = stats.directions
    if not names:
        raise StatsError("no target direction was given; pass targets=... to Probe")
    if direction is None and len(names) > 1:
        raise StatsError(f"the statistics have {len(names)} directions. Remedy: direction=... with "
                         f"one of {', '.join(names)}")
    if direction is not None and direction not in names:
        raise StatsError(f"no direction {direction!r}; known: {', '.join(names)}")
    return stats.alignment_by_direction[0 if direction is None else names.index(direction)]


def profiles(stats: GradientStats, scale: Scale = "contribution") -> FloatArray:
    """``[E, R]``: where each example pulls, apart from how strongly: what is left of ``log T``
    after one number for each block and one for each example. Copies of an example have the same
    profile; unrelated examples have profiles that are about orthogonal, the more blocks the
    closer. An example without any gradient has a profile of zeros.

    Raises:
        StatsError: for fewer than ``MIN_BLOCKS`` blocks that every example with a gradient
            touches, or fewer than 3 such examples.
    """
    mass = MassMatrix.from_stats(stats, scale)
    logs, _, _ = log_influence(mass)
    if len(logs) < MIN_BLOCKS:
        raise StatsError(
            f"{len(logs)} blocks make no profile: unrelated examples would look alike by chance. "
            f"Remedy: at least {MIN_BLOCKS} blocks that every example touches, as rows or tiles "
            "are, or features of your own"
        )
    rest = logs - logs.mean(0) - logs.mean(1, keepdims=True) + logs.mean()
    found = np.zeros((mass.n_examples, len(logs)))
    found[mass.by_example > 0] = rest.T
    return found


def diverse_top(
    scores: npt.ArrayLike, features: npt.ArrayLike, count: int, similarity: float = 0.95
) -> IntArray:
    """The best examples that are not near-duplicates of one another.

    From the best score down, an example is taken unless the cosine of its features with those of
    one already taken reaches ``similarity``. If too few are left, the best of those passed over
    fill up.

    Args:
        scores: ``[E]``; larger is better.
        features: ``[E, F]``: :func:`profiles`, alignments with several directions, or embeddings.
            A row of zeros is similar to nothing.
        count: how many, 1 to E.
        similarity: in (0, 1]; 1 passes over exact copies only (to rounding).

    Returns:
        int64 ``[count]`` positions, in the order taken.

    Raises:
        StatsError: for arrays that do not fit, NaN or infinity, or a count or similarity outside
            its range.
    """
    s, f = np.asarray(scores, np.float64), np.asarray(features, np.float64)
    if s.ndim != 1 or f.ndim != 2 or len(f) != len(s):
        raise StatsError(f"scores {s.shape} and features {f.shape}: [E] and [E, F] are needed")
    if not (np.isfinite(s).all() and np.isfinite(f).all()):
        raise StatsError("scores and features must be finite")
    whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not whole or not 1 <= count <= s.size:
        raise StatsError(f"count must lie in 1..{s.size}, got {count!r}")
    if not 0 < similarity <= 1:
        raise StatsError(f"similarity must lie in (0, 1], got {similarity}")
    limit = similarity - 1e-9  # a copy has cosine 1 only to rounding
    largest = np.abs(f).max(1, keepdims=True)  # squares of huge and tiny features stay in range
    f = np.divide(f, largest, out=np.zeros_like(f), where=largest > 0)
    unit = _by_norm(f, np.sqrt((f**2).sum(1, keepdims=True)) + np.zeros_like(f))
    order = np.argsort(-s, kind="stable")
    taken = np.empty((count, f.shape[1]))
    chosen: list[int] = []
    passed: list[int] = []
    for start in range(0, s.size, STRETCH):
        block = order[start : start + STRETCH]
        rows = unit[block]
        near = np.asarray((rows @ taken[: len(chosen)].T >= limit).any(1))
        among = rows @ rows.T >= limit  # within the stretch, in order
        fresh: list[int] = []
        for i, position in enumerate(block.tolist()):
            if len(chosen) == count:
                return np.array(chosen, np.int64)
            if near[i] or among[i, fresh].any():
                passed.append(position)
                continue
            taken[len(chosen)] = rows[i]
            chosen.append(position)
            fresh.append(i)
    return np.array(chosen + passed[: count - len(chosen)], np.int64)


__all__ = ["Score", "diverse_top", "example_scores", "profiles"]
