"""Budgets of a selection: what they say, and the largest filling that one of bytes or FLOPs allows.

Elements, blocks and submodules are counted while blocks are taken (see :mod:`fastgrad.filling`).
What a selection takes of memory or FLOPs is known from a plan of the whole step alone, so there
the number of elements is searched for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from fastgrad.errors import SelectionError
from fastgrad.filling import Blocks, Elements, Filling, Tensors, fill, thriftiest
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastgrad.blueprint import Blueprint
    from fastgrad.flops import FlopPlanner
    from fastgrad.planner import MemoryPlanner
    from fastgrad.ranking import Ranked
    from fastgrad.selection import Selection
    from fastgrad.spread import Spread

KINDS = ("fraction", "count", "submodules", "memory", "flops", "k_star")


class Effort(NamedTuple):
    """How long a search goes on: until it knows the elements to a ``resolution`` of the model's, or
    that share of the budget is left, or ``attempts`` fillings between the ends were priced."""

    resolution: float
    attempts: int


#: Where a price is arithmetic, or most of it is known after the first.
CHEAP = Effort(1e-4, 40)
#: Where a price takes a run of the model on fake tensors, seconds for a large model: what is left
#: is still far below what such a plan can promise.
DEAR = Effort(1e-3, 8)

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class Budget(NamedTuple):
    """The one budget that was given: one of :data:`KINDS`, and what it allows."""

    kind: str
    value: Any


def one_budget(given: dict[str, Any]) -> Budget:
    """The budget that is not None.

    Raises:
        SelectionError: for none, or more than one.
    """
    present = [Budget(kind, value) for kind, value in given.items() if value is not None]
    if len(present) != 1:
        raise SelectionError(
            f"give exactly one budget: {', '.join(KINDS[:-1])} or {KINDS[-1]}; got "
            + (" and ".join(b.kind for b in present) or "none")
        )
    return present[0]


def parse_memory(text: str | int) -> int:
    """Bytes from a number or from text such as ``16GiB`` (2^30) or ``16GB`` (10^9).

    Raises:
        SelectionError: if it is not a positive amount of memory.
    """
    units = _DECIMAL | {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", str(text), re.I | re.ASCII)
    size = int(Fraction(match[1]) * units[match[2].lower()]) if match else 0
    if size < 1:
        raise SelectionError(f"{text!r} is not an amount of memory; write for instance '16GiB', "
                             "'500MB' or a number of bytes")
    return size


def parse_flops(text: str | float) -> int:
    """Floating-point operations from a number or from text such as ``2.5T``, ``2.5 TFLOPs`` or
    ``2.5e12``.

    Raises:
        SelectionError: if it is not a positive number of operations.
    """
    units = _DECIMAL | {"p": 10**15, "e": 10**18}
    number = r"\s*(\d+(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([kmgtpe]|)(?:flops?)?\s*"
    match = re.fullmatch(number, str(text), re.I | re.ASCII)
    found = int(Fraction(match[1]) * units[match[2].lower()]) if match else 0
    if found < 1 or isinstance(text, bool):
        raise SelectionError(f"{text!r} is not a number of FLOPs; write for instance '2.5T' "
                             "(2.5e12) or a number")
    return found


def parse_count(kind: str, value: Any, most: int) -> int:
    """A whole number in ``1..most``.

    Raises:
        SelectionError: if it is not.
    """
    what = "blocks" if kind == "count" else "parameters"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise SelectionError(f"{kind} must be a whole number of {what}; got {value!r}")
    if not 1 <= value <= most:
        raise SelectionError(f"{kind} must lie in 1..{most}, the number of {what} that can be "
                             f"chosen; got {value}")
    return int(value)


def capacity(fraction: Any, total: int) -> int:
    """Elements that a fraction of ``total`` allows.

    Raises:
        SelectionError: unless it is a number in (0, 1].
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float | np.number):
        raise SelectionError(f"fraction must be a number; got {fraction!r}")
    if not 0 < fraction <= 1:
        raise SelectionError(f"fraction must lie in (0, 1]; got {fraction}")
    # As the decimal number that the user wrote: 0.29 of 100 is 29, though 0.29 * 100 < 29.
    return int(Fraction(repr(float(fraction))) * total)


def k_star_value(source: Blueprint | GradientStats | None, resource: str) -> float:
    """The fraction that a blueprint says pays best for a resource.

    Raises:
        SelectionError: for another source, or a resource that the blueprint does not know.
    """
    if source is None or isinstance(source, GradientStats):
        raise SelectionError("k_star is read from a blueprint. Remedy: pass "
                             "Blueprint.from_stats(stats)")
    if resource not in source.k_star:
        raise SelectionError(f"the blueprint has no k* for {resource!r}; it has "
                             f"{', '.join(source.k_star) or 'none'}")
    return source.k_star[resource].value


class Price(NamedTuple):
    """What a selection takes of a budget: all of it, its unit, how well it is to be met, and
    the part that is quick to know where all of it is not."""

    cost: Callable[[Selection], float]
    unit: str
    effort: Effort = CHEAP
    part: Callable[[Selection], float] | None = None


Found = TypeVar("Found")


class Attempt(NamedTuple, Generic[Found]):
    """A filling and what it takes of the budget."""

    capacity: int
    found: Found
    cost: float
    rest: float  # of the cost, what is not cheap to know


def largest_within(
    limit: int,
    low: int,
    high: int,
    filled: Callable[[int], Found],
    same: Callable[[Found, Found], bool],
    cost: Callable[[Found], float],
    part: Callable[[Found], float] | None = None,
    effort: Effort = CHEAP,
) -> Attempt[Found] | None:
    """The filling of the largest capacity that was found to cost at most ``limit``; None if that
    of ``low`` costs more.

    Between a capacity that fits and one that does not, the next one to try is where the limit
    is expected, or halfway where two such steps have not halved what is in between. Each answer has
    been priced itself, so it fits even where costs do not rise with the capacity everywhere.

    Args:
        limit: of the cost.
        low, high: capacities in elements.
        filled: what a capacity gives.
        same: whether two fillings are the same, which saves pricing them twice.
        cost: price of a filling; dear.
        part: the part of the price that is cheap to know and rises with every element. The rest
            (activations, and what is not alive at the peak) is expected on the line through the
            two latest attempts; without ``part`` the price is expected to be linear.
        effort: when to stop.
    """
    enough = max(1, int(high * effort.resolution))

    def attempt(capacity: int, found: Found) -> Attempt[Found]:
        price = cost(found)
        return Attempt(capacity, found, price, price - part(found) if part is not None else 0.0)

    # The middle of what ends the search: a guess that is a little off fits, and is the last one.
    aim = limit * (1 - effort.resolution / 2)

    def expected(fits: Attempt[Found], fails: Attempt[Found]) -> int:
        width = fails.capacity - fits.capacity
        if part is None:
            return fits.capacity + int(width * (aim - fits.cost) / (fails.cost - fits.cost))
        one, other = latest
        apart = other.capacity - one.capacity
        slope = (other.rest - one.rest) / apart if apart else 0.0
        below, above = fits.capacity, fails.capacity
        while above - below > max(1, enough // 10):
            middle = (below + above) // 2
            price = part(filled(middle)) + other.rest + slope * (middle - other.capacity)
            below, above = (middle, above) if price <= aim else (below, middle)
        return below

    fits = attempt(low, filled(low))
    if fits.cost > limit:
        return None
    fails = attempt(high, filled(high))
    if fails.cost <= limit:
        return fails
    # What the rest is expected from: first the ends, then what was found between them, for the ends
    # are unlike all else (nothing is trained in packed blocks).
    latest = fits, fails
    before = width = 4 * (high - low)
    attempts = 0
    while attempts < effort.attempts:
        earlier, before, width = before, width, fails.capacity - fits.capacity
        if width <= enough or limit - fits.cost <= limit * effort.resolution:
            break
        middle = (fits.capacity + fails.capacity) // 2
        if 2 * width <= earlier:
            margin = max(width // 50, 1) if part is None else 1
            middle = expected(fits, fails)
            middle = min(max(middle, fits.capacity + margin), fails.capacity - margin)
        found = filled(middle)
        if same(found, fits.found):
            fits = fits._replace(capacity=middle)
        elif same(found, fails.found):
            fails = fails._replace(capacity=middle)
        else:
            new, attempts = attempt(middle, found), attempts + 1
            latest = (latest[1] if attempts > 1 else new), new
            fits, fails = (new, fails) if new.cost <= limit else (fits, new)
    return fits


def filled(
    budget: Budget,
    source: Blueprint | GradientStats | None,
    ranked: Ranked,
    spread: Spread | None,
    total: int,
) -> Filling:
    """The blocks that a budget of elements, blocks or submodules allows.

    Args:
        source: what k* is read from.
        total: elements of the whole model, which fractions are of.

    Raises:
        SelectionError: for a budget that is no number of its kind, or allows nothing.
    """
    if budget.kind == "count":
        count = parse_count("count", budget.value, len(ranked))
        return fill(ranked, Blocks(count), spread)
    if budget.kind == "submodules":
        count = parse_count("submodules", budget.value, int(np.unique(ranked.owner).size))
        return fill(ranked, Tensors(ranked, count), spread)
    share = budget.value
    if budget.kind == "k_star":
        share = k_star_value(source, share)
    return fill(ranked, Elements(ranked, capacity(share, total)), spread)


def searched(
    budget: Budget,
    ranked: Ranked,
    spread: Spread | None,
    made: Callable[[Filling], Selection],
    price: Price,
    total: int,
) -> tuple[Filling, float]:
    """The largest filling of which the plan stays within a budget of bytes or FLOPs, and what it
    needs.

    Args:
        made: makes a selection of a filling.
        price: what a selection needs, as :func:`price_of` gives it.
        total: elements of the whole model.

    Raises:
        SelectionError: if the smallest selection needs more than the budget.
    """
    cost, unit, effort, part = price
    limit = parse_memory(budget.value) if unit == "bytes" else parse_flops(budget.value)
    # The smallest block may lie where the backward pass has a long way; the best one is tried too.
    sizes = ranked.sizes
    if spread is not None:  # not one that a cap forbids
        sizes = sizes[sizes <= spread.cap[spread.group]]
    lows = sorted({int(sizes.min()), int(sizes[0])}) if sizes.size else [int(ranked.sizes.min())]
    if spread is not None and spread.floor.any():
        lows = [thriftiest(ranked, spread)]

    def taken(elements: int) -> Filling:
        return fill(ranked, Elements(ranked, elements), spread)

    def priced(filling: Filling) -> float:
        return cost(made(filling))

    def partly(filling: Filling) -> float:
        assert part is not None
        return part(made(filling))

    for low in lows:
        best = largest_within(
            limit, low, total, taken, lambda a, b: np.array_equal(a.ranks, b.ranks), priced,
            None if part is None else partly, effort,
        )  # fmt: skip
        if best is not None:
            break
    else:
        needed, smallest = min((priced(taken(low)), low) for low in lows)
        raise SelectionError(
            f"{limit:,} {unit} are not enough: with a selection of {smallest:,} elements a step "
            f"needs {needed:,.0f}. Remedy: a larger {budget.kind} budget, finer blocks=..., or "
            "include=[...] of what is nearer to the output, so that the backward pass ends earlier"
        )
    return best.found, best.cost


def price_of(
    budget: Budget,
    model: nn.Module | None,
    optimizer: str,
    batch_shape: tuple[int, int] | None,
    master_dtype: torch.dtype | None,
) -> Price | None:
    """What a selection takes of a budget of memory or FLOPs; None for others.

    Raises:
        SelectionError: if the model, or for FLOPs the shape of the batch, is not known.
    """
    if budget.kind not in ("memory", "flops"):
        return None
    if model is None:
        raise SelectionError(f"a {budget.kind} budget needs model=...; one on the meta device "
                             "will do")
    if budget.kind == "memory":
        from fastgrad.planner import MemoryPlanner

        planner = functools.partial(
            MemoryPlanner, model, optimizer=optimizer, master_dtype=master_dtype
        )
        weights = _total(planner())
        if batch_shape is None:
            return Price(weights, "bytes")
        return Price(_total(planner(batch_shape=batch_shape)), "bytes", DEAR, weights)
    if batch_shape is None:
        raise SelectionError("a flops budget is for one step. Remedy: batch_shape=(rows, tokens)")
    from fastgrad.flops import FlopPlanner

    return Price(_total(FlopPlanner(model, batch_shape, optimizer=optimizer)), "FLOPs")


def _total(planner: MemoryPlanner | FlopPlanner) -> Callable[[Selection], float]:
    return lambda selection: float(planner.plan(selection).total)
