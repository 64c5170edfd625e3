"""Choosing blocks and examples together: the pair of choices that holds the most gradient.

``S`` of a pair is the share of the squared gradient that the chosen blocks have on the chosen
examples. Choosing each by its own total (marginal) is best if both meet independently; where some
examples pull on some blocks, each choice should know of the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastgrad.concentration import FloatArray, IntArray
from fastgrad.errors import SelectionError
from fastgrad.filling import Elements, fill
from fastgrad.interaction import leading_patterns
from fastgrad.mass import MassMatrix, Rows

Bools = npt.NDArray[np.bool_]
Strategy = Literal["marginal", "alternating", "low_rank"]
STRATEGIES: tuple[Strategy, ...] = ("marginal", "alternating", "low_rank")
#: Rounds of the alternating choice; it ends by itself when nothing changes, mostly within five.
MAX_ROUNDS = 20
#: Patterns of the low-rank strategy.
RANK = 4
#: Fractions that a budget is spent on, of which the best pair is taken.
LADDER = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)


@dataclass(frozen=True)
class JointCost:
    """What training fraction k of the parameters on fraction q of the examples costs.

    ``fixed + per_parameter k + per_example q + per_pair k q``, in any unit. With the defaults the
    cost is k·q of full training. A transformer's FLOPs are about ``JointCost(per_example=2/3,
    per_pair=1/3)``: the forward pass and the gradient of activations are paid for every example,
    the gradient of weights only where it is wanted.
    """

    fixed: float = 0.0
    per_parameter: float = 0.0
    per_example: float = 0.0
    per_pair: float = 1.0

    def __post_init__(self) -> None:
        terms = (self.fixed, self.per_parameter, self.per_example, self.per_pair)
        if not all(math.isfinite(t) and t >= 0 for t in terms) or not any(terms):
            raise SelectionError(f"the terms of a cost are finite, not negative and not all zero; "
                                 f"got {self}")

    def cost(self, k: float, q: float) -> float:
        """Cost of fractions k and q, in the unit of the terms."""
        return self.fixed + self.per_parameter * k + self.per_example * q + self.per_pair * k * q


@dataclass(frozen=True, eq=False)
class JointChoice:
    """Blocks and examples chosen together.

    Attributes:
        blocks: ``[R]`` which rows of the mass matrix.
        examples: ``[E]`` which columns.
        score: ``[E]`` mass of each example on the chosen blocks: what it was chosen by.
        share: S of the pair.
        by_blocks, by_examples: share of all mass in the chosen blocks, and on the chosen examples.
        parameters: fraction of all elements that was chosen.
        strategy: how.
        rounds: alternations until nothing changed.
        cost: of the pair under the cost model.
    """

    blocks: Bools
    examples: Bools
    score: FloatArray
    share: float
    by_blocks: float
    by_examples: float
    parameters: float
    strategy: str
    rounds: int
    cost: float

    @property
    def ratio(self) -> float:
        """S by the product of the two shares; above 1 the two choices fit each other. NaN if
        either is zero."""
        product = self.by_blocks * self.by_examples
        return self.share / product if product > 0 else math.nan


def choose_jointly(
    mass: MassMatrix,
    parameters: float | None = None,
    examples: float | None = None,
    *,
    strategy: Strategy = "alternating",
    budget: float | None = None,
    cost: JointCost | None = None,
    groups: Sequence[Any] | None = None,
    quotas: Mapping[Any, tuple[float, float]] | None = None,
    rank: int = RANK,
    n_parameters: int | None = None,
    seed: int = 0,
) -> JointChoice:
    """Choose blocks and examples from their squared influence.

    ``marginal`` orders blocks by mass per element over all examples, and examples by mass over all
    blocks. ``alternating`` begins there and chooses each anew for the other until nothing changes;
    of what it met the pair with the largest S is returned, so it is never below ``marginal``.
    ``low_rank`` chooses like that on the leading patterns of ``T`` (truncated SVD), which leaves
    out what a single example does to a single block; its S is of the matrix itself.

    Args:
        mass: see :class:`fastgrad.mass.MassMatrix`. Of a matrix in a file, a few rows are in
            memory at a time.
        parameters: fraction of the parameters, 0 < k <= 1: blocks are taken whole as long as they
            fit.
        examples: fraction of the examples, 0 < q <= 1, rounded down to at least one.
        strategy: see above.
        budget: instead of both fractions, or of one: most that the pair may cost. Fractions of
            the parameters along a ladder are tried, each with as many examples as what it takes
            leaves paid for; of these pairs the one with the largest S is taken.
        cost: what a pair costs, k·q by default.
        groups: ``[E]`` class or source of each example, for ``quotas``.
        quotas: group -> least and most share of the chosen examples that come from it.
        rank: patterns of ``low_rank``.
        n_parameters: elements of the whole model; by default those of ``mass``.
        seed: of the randomised SVD.

    Raises:
        SelectionError: for fractions outside (0, 1], both or neither of fractions and budget, a
            budget that buys nothing, an unknown strategy, or quotas that cannot be met.
    """
    if strategy not in STRATEGIES:
        raise SelectionError(f"unknown strategy {strategy!r}; use one of {', '.join(STRATEGIES)}")
    cost = cost or JointCost()
    total = int(mass.sizes.sum()) if n_parameters is None else n_parameters
    quota = _Quota(mass.n_examples, groups, quotas)
    pairs = _pairs(parameters, examples, budget, cost)
    seen = _smoothed(mass, rank, seed) if strategy == "low_rank" else mass
    if budget is None:
        return _choose(mass, seen, *pairs[0], strategy, quota, cost, total)
    best, why = None, ""
    for k, q in pairs:
        try:
            found = _choose(mass, seen, k, q, strategy, quota, cost, total)
            more = _affordable(found.parameters, budget, cost)
            if examples is None and int(more * mass.n_examples) > found.examples.sum():
                # blocks are taken whole: what they left of k pays for more examples
                again = _choose(mass, seen, k, more, strategy, quota, cost, total)
                found = again if again.cost <= budget * (1 + 1e-12) else found
        except SelectionError as error:  # a step of the ladder that no block or quota fits
            why = str(error)
            continue
        if found.cost > budget * (1 + 1e-12):
            why = f"one example with the smallest of these blocks costs {found.cost:g}"
        elif best is None or found.share > best.share:
            best = found
    if best is None:
        raise SelectionError(f"the budget {budget:g} buys no block and example together: {why}. "
                             "Remedy: a larger budget, finer blocks or looser quotas")
    return best


def _pairs(
    parameters: float | None, examples: float | None, budget: float | None, cost: JointCost
) -> list[tuple[float, float]]:
    for name, value in (("parameters", parameters), ("examples", examples)):
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value <= 1):
            raise SelectionError(f"{name} is a fraction in (0, 1]; got {value!r}")
    if budget is None:
        if parameters is None or examples is None:
            raise SelectionError("give both parameters=... and examples=..., or budget=...")
        return [(float(parameters), float(examples))]
    if not budget > 0 or not math.isfinite(budget):
        raise SelectionError(f"budget is a positive amount; got {budget!r}")
    if parameters is not None and examples is not None:
        raise SelectionError("parameters and examples fix the cost already: leave one of them, or "
                             "budget, out")
    ks = LADDER if parameters is None else (float(parameters),)
    qs = LADDER if examples is None else (float(examples),)
    found = []
    for k in ks:  # for each k the largest q that the budget pays for, and the ladder's own
        dearest = _affordable(k, budget, cost)
        if examples is None and dearest > 0:
            found.append((k, dearest))
        found += [(k, q) for q in qs if examples is not None and q <= dearest]
    if not found:
        raise SelectionError(f"the budget {budget:g} is below the cost of the smallest choice, "
                             f"{cost.cost(min(ks), 0 if examples is None else min(qs)):g}")
    return found


def _affordable(k: float, budget: float, cost: JointCost) -> float:
    """Largest q that the budget pays for at k, at most 1; negative if none."""
    left = budget - cost.fixed - cost.per_parameter * k
    slope = cost.per_example + cost.per_pair * k
    if left < 0:
        return -1.0
    return min(1.0, left / slope) if slope > 0 else 1.0


class _Rows:
    """Blocks in an order, as :func:`fastgrad.filling.fill` reads them."""

    def __init__(self, sizes: IntArray) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return int(self.sizes.size)


def _choose(
    mass: MassMatrix,
    seen: MassMatrix,
    k: float,
    q: float,
    strategy: str,
    quota: _Quota,
    cost: JointCost,
    total: int,
) -> JointChoice:
    capacity = int(Fraction(repr(k)) * total)  # as the decimal number that was written
    count = max(1, int(Fraction(repr(q)) * mass.n_examples))
    examples = quota.best(seen.by_example, count)
    blocks = _best_blocks(seen.by_block, mass.sizes, capacity)
    kept: tuple[float, Bools, Bools] | None = None
    rounds = 0
    while True:
        on_blocks = seen.on_blocks(blocks)
        share = float(on_blocks[examples].sum())
        if kept is None or share > kept[0]:
            kept = share, blocks, examples
        if strategy == "marginal" or rounds == MAX_ROUNDS:
            break
        rounds += 1
        again = quota.best(on_blocks, count)
        blocks_again = _best_blocks(seen.on_examples(again), mass.sizes, capacity)
        if np.array_equal(again, examples) and np.array_equal(blocks_again, blocks):
            break
        examples, blocks = again, blocks_again
    _, blocks, examples = kept
    score = mass.on_blocks(blocks)
    if not score[examples].any():
        raise SelectionError("the blocks that fit have no gradient on any example that was chosen. "
                             "Remedy: a larger fraction of the parameters, or finer blocks")
    whole = float(mass.by_block.sum())
    taken = float(mass.sizes[blocks].sum()) / total
    return JointChoice(
        blocks=blocks,
        examples=examples,
        score=score,
        share=float(score[examples].sum()) / whole,
        by_blocks=float(mass.by_block[blocks].sum()) / whole,
        by_examples=float(mass.by_example[examples].sum()) / whole,
        parameters=taken,
        strategy=strategy,
        rounds=rounds,
        cost=cost.cost(taken, float(examples.mean())),
    )


def _best_blocks(by_block: FloatArray, sizes: IntArray, capacity: int) -> Bools:
    """Blocks by mass per element, each as long as it fits."""
    order = np.argsort(-by_block / sizes, kind="stable")
    ranked: Any = _Rows(sizes[order])
    chosen = np.zeros(sizes.size, dtype=bool)
    chosen[order[fill(ranked, Elements(ranked, capacity)).ranks]] = True
    return chosen


class _Quota:
    """How many examples may, and must, come from each group."""

    def __init__(
        self,
        n: int,
        groups: Sequence[Any] | None,
        quotas: Mapping[Any, tuple[float, float]] | None,
    ) -> None:
        if (groups is None) != (quotas is None):
            raise SelectionError("quotas are of groups: give both, or neither")
        self.names: list[Any] = []
        if groups is None or quotas is None:
            return
        labels = list(groups)
        if len(labels) != n:
            raise SelectionError(f"groups names {len(labels)} examples, there are {n}")
        self.names = list(dict.fromkeys(labels))
        if unknown := [g for g in quotas if g not in set(self.names)]:
            raise SelectionError(f"quotas name {unknown[0]!r}, which is no group; groups are "
                                 f"{', '.join(map(repr, self.names[:5]))}")
        number = {g: i for i, g in enumerate(self.names)}
        self.group = np.array([number[g] for g in labels], dtype=np.int64)
        self.size = np.bincount(self.group, minlength=len(self.names))
        self.low, self.high = np.zeros(len(self.names)), np.ones(len(self.names))
        for g, (low, high) in quotas.items():
            if not 0 <= low <= high <= 1:
                raise SelectionError(f"quota of {g!r}: 0 <= least <= most <= 1, got {low}, {high}")
            self.low[number[g]], self.high[number[g]] = low, high

    def best(self, score: FloatArray, count: int) -> Bools:
        """The ``count`` examples of largest score that the quotas allow."""
        order = np.argsort(-score, kind="stable")
        if self.names:
            order = self._allowed(order, count)
        chosen = np.zeros(score.size, dtype=bool)
        chosen[order[:count]] = True
        return chosen

    def _allowed(self, order: IntArray, count: int) -> IntArray:
        """The examples that must come from each group, then the others that may."""
        # a hair of rounding must not turn 0.3 · 10 into 4
        least = np.ceil(self.low * count - 1e-9).astype(np.int64)
        most = np.minimum(np.floor(self.high * count + 1e-9).astype(np.int64), self.size)
        if (short := np.flatnonzero(least > most)).size:
            g = int(short[0])
            raise SelectionError(
                f"quota of {self.names[g]!r}: {least[g]} of {count} examples are wanted, "
                f"{most[g]} can be had"
            )
        if least.sum() > count or most.sum() < count:
            raise SelectionError(
                f"the quotas allow between {least.sum()} and {most.sum()} examples, {count} are to "
                "be chosen. Remedy: looser quotas"
            )
        group = self.group[order]
        by_group = np.argsort(group, kind="stable")  # keeps the order within each group
        starts = np.cumsum(self.size) - self.size
        place = np.empty(order.size, dtype=np.int64)  # within the group, best first
        place[by_group] = np.arange(order.size) - np.repeat(starts, self.size)
        must, may = place < least[group], place < most[group]
        return np.concatenate((order[must], order[may & ~must]))


class _Patterns(Rows):
    """The leading patterns of ``T``, squared; rows are made when asked for."""

    def __init__(self, left: FloatArray, right: FloatArray, dtype: Any) -> None:
        self.left, self.right = left.astype(dtype), np.ascontiguousarray(right.T.astype(dtype))
        self.shape, self.dtype = (len(left), len(right)), np.dtype(dtype)

    def __getitem__(self, rows: slice) -> npt.NDArray[np.floating]:
        found = self.left[rows] @ self.right
        np.maximum(found, 0, out=found)
        return np.square(found, out=found)


def _smoothed(mass: MassMatrix, rank: int, seed: int) -> MassMatrix:
    """The leading patterns of ``T``, squared."""
    if not 1 <= rank < min(mass.values.shape):
        raise SelectionError(f"rank={rank} must lie in 1..{min(mass.values.shape) - 1}")
    left, values, right = leading_patterns(
        lambda: ((rows, np.sqrt(part)) for rows, part in mass.stretches()),
        mass.values.shape, rank, seed,
    )  # fmt: skip
    patterns = _Patterns(left * values, right, mass.values.dtype)
    return MassMatrix.of(patterns, mass.sizes, mass.names, mass.example_ids)


__all__ = ["STRATEGIES", "JointChoice", "JointCost", "Strategy", "choose_jointly"]
