"""Filling a budget: blocks are taken from the best rank down, as long as each one fits.

The definition is a loop: a block is taken if the budget and the cap of its group allow it, and
else skipped for good. With millions of blocks that loop is too slow in Python; here whole
stretches are taken at once, with the same result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgrad.errors import SelectionError

if TYPE_CHECKING:
    from fastgrad.ranking import Ranked
    from fastgrad.spread import Spread

Ints = NDArray[np.int64]


class Allowance(ABC):
    """What a budget still allows.

    Attributes:
        small_first: which blocks meet a floor at the least expense: the smallest, or the largest.
    """

    small_first: bool

    @abstractmethod
    def admits(self, ranks: Ints) -> NDArray[np.bool_]:
        """Which of these blocks would fit as the next one."""

    @abstractmethod
    def prefix(self, ranks: Ints) -> int:
        """How many of these blocks fit, taken one after the other."""

    @abstractmethod
    def take(self, ranks: Ints) -> None:
        """Blocks that fit were taken."""

    @abstractmethod
    def cost(self, ranks: Ints) -> int:
        """What these blocks would take from a fresh budget."""

    @abstractmethod
    def in_words(self) -> str:
        """The budget, for messages."""


class Elements(Allowance):
    """At most ``capacity`` elements."""

    small_first = True

    def __init__(self, ranked: Ranked, capacity: int) -> None:
        self.sizes, self.capacity, self.left = ranked.sizes, capacity, capacity

    def admits(self, ranks: Ints) -> NDArray[np.bool_]:
        return self.sizes[ranks] <= self.left

    def prefix(self, ranks: Ints) -> int:
        return int(np.searchsorted(np.cumsum(self.sizes[ranks]), self.left, side="right"))

    def take(self, ranks: Ints) -> None:
        self.left -= self.cost(ranks)

    def cost(self, ranks: Ints) -> int:
        return int(self.sizes[ranks].sum())

    def in_words(self) -> str:
        return f"{self.capacity:,} elements"


class Blocks(Allowance):
    """At most ``count`` blocks."""

    small_first = False

    def __init__(self, count: int) -> None:
        self.count = self.left = count

    def admits(self, ranks: Ints) -> NDArray[np.bool_]:
        return np.full(ranks.size, self.left > 0)

    def prefix(self, ranks: Ints) -> int:
        return min(self.left, ranks.size)

    def take(self, ranks: Ints) -> None:
        self.left -= ranks.size

    def cost(self, ranks: Ints) -> int:
        return int(ranks.size)

    def in_words(self) -> str:
        return f"{self.count:,} blocks"


class Tensors(Allowance):
    """Blocks of at most ``count`` parameters: a further block of a parameter costs nothing."""

    small_first = False

    def __init__(self, ranked: Ranked, count: int) -> None:
        self.owner, self.count, self.left = ranked.owner, count, count
        self.touched = np.zeros(len(ranked.names), dtype=bool)

    def admits(self, ranks: Ints) -> NDArray[np.bool_]:
        return self.touched[self.owner[ranks]] | (self.left > 0)

    def prefix(self, ranks: Ints) -> int:
        owners = self.owner[ranks]
        new, first = np.unique(owners, return_index=True)
        first = np.sort(first[~self.touched[new]])  # where each untouched parameter comes first
        return int(first[self.left]) if first.size > self.left else int(ranks.size)

    def take(self, ranks: Ints) -> None:
        new = np.unique(self.owner[ranks])
        self.left -= int((~self.touched[new]).sum())
        self.touched[new] = True

    def cost(self, ranks: Ints) -> int:
        return int(np.unique(self.owner[ranks]).size)

    def in_words(self) -> str:
        return f"{self.count:,} submodules"


class Filling(NamedTuple):
    """What was taken.

    Attributes:
        ranks: the blocks, ascending.
        floors_by: None without floors; ``score`` if each was met with the group's best blocks,
            ``size`` if only the blocks of least expense fitted the budget and the caps.
    """

    ranks: Ints
    floors_by: str | None


def fill(ranked: Ranked, allowance: Allowance, spread: Spread | None = None) -> Filling:
    """Take blocks in their order, each if it fits, floors first.

    Raises:
        SelectionError: if nothing fits, or the floors do not.
    """
    waiting = np.arange(len(ranked), dtype=np.int64)
    taken: list[Ints] = []
    floors_by = None
    room = np.zeros(0, np.int64) if spread is None else spread.cap.copy()
    if spread is not None and spread.floor.any():
        first, floors_by = floors(ranked, allowance, spread)
        taken.append(first)
        allowance.take(first)
        room -= spread.counts(first, ranked.sizes)
        waiting = np.delete(waiting, first)
    while True:
        waiting = waiting[allowance.admits(waiting)]
        accepted = waiting if spread is None else _within_caps(ranked, waiting, spread, room)
        if not accepted.size:
            break
        got = accepted[: allowance.prefix(accepted)]
        taken.append(got)
        allowance.take(got)
        if got.size == accepted.size:
            break  # what is left does not fit into the caps
        if spread is not None:
            room -= spread.counts(got, ranked.sizes)
        # The first that did not fit, and what the caps refused before it, never will: there is
        # only ever less room. What comes behind it is looked at again.
        waiting = waiting[waiting > accepted[got.size]]
    if not sum(part.size for part in taken):
        capped = spread is not None and bool((spread.cap < spread.choosable).any())
        raise SelectionError(
            f"the selection is empty: the budget is {allowance.in_words()} and the smallest block "
            f"has {int(ranked.sizes.min()):,}{', within caps' if capped else ''}. Remedy: a larger "
            f"{'budget, higher caps' if capped else 'budget'} or finer blocks=..."
        )
    return Filling(np.sort(np.concatenate(taken)), floors_by)


def _within_caps(ranked: Ranked, waiting: Ints, spread: Spread, room: Ints) -> Ints:
    """What the caps alone would let through of the blocks that wait, taken in their order."""
    among = np.zeros(len(ranked), dtype=bool)
    among[waiting] = True
    among = _capped(ranked.sizes, spread.by_group[among[spread.by_group]], spread.group, room)
    return np.flatnonzero(among).astype(np.int64)


def _capped(sizes: Ints, ranks: Ints, group: Ints, room: Ints) -> NDArray[np.bool_]:
    """``[n]`` which of ``ranks``, given group by group, fit into ``room`` of their group, each
    taken in turn if it does."""
    accepted = np.zeros(sizes.size, dtype=bool)
    left = room.copy()
    ranks = ranks[sizes[ranks] <= left[group[ranks]]]
    while ranks.size:
        g, size = group[ranks], sizes[ranks]
        fits = _running(g, size) <= left[g]  # in each group a stretch at its beginning
        accepted[ranks[fits]] = True
        left -= np.bincount(g[fits], size[fits], minlength=left.size).astype(np.int64)
        ranks = ranks[~fits]
        ranks = ranks[sizes[ranks] <= left[group[ranks]]]
    return accepted


def _running(group: Ints, size: Ints) -> Ints:
    """Running sums that begin anew with each group."""
    total = np.cumsum(size)
    first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    before = total[first] - size[first]
    return total - np.repeat(before, np.diff(np.r_[first, group.size]))


def floors(ranked: Ranked, allowance: Allowance, spread: Spread) -> tuple[Ints, str]:
    """Blocks that meet every floor within the caps and the budget, and how they were chosen.

    Raises:
        SelectionError: naming the group, or what the floors need together.
    """
    best, lacking = _met(ranked, spread, spread.by_group)
    if not lacking.any() and allowance.prefix(best) == best.size:
        return best, "score"
    thrifty = _thrifty(ranked, spread, allowance.small_first)
    if allowance.prefix(thrifty) < thrifty.size:
        few = "smallest" if allowance.small_first else "largest"
        raise SelectionError(
            f"the floors do not fit the budget of {allowance.in_words()}: met with the {few} "
            f"blocks they take {allowance.cost(thrifty):,}. Remedy: a larger budget, a lower floor "
            "or finer blocks=..."
        )
    return thrifty, "size"


def thriftiest(ranked: Ranked, spread: Spread) -> int:
    """Elements of the smallest blocks that meet every floor within the caps.

    Raises:
        SelectionError: naming a group where they do not.
    """
    return Elements(ranked, 0).cost(_thrifty(ranked, spread, small_first=True))


def _thrifty(ranked: Ranked, spread: Spread, small_first: bool) -> Ints:
    by_size = ranked.sizes if small_first else -ranked.sizes
    found, lacking = _met(ranked, spread, np.lexsort((by_size, spread.group)))  # which is stable
    if lacking.any():
        g = int(np.flatnonzero(lacking)[0])
        smallest = int(ranked.sizes[spread.group == g].min())
        raise SelectionError(
            f"{spread.names[g]}: its floor of {spread.floor[g]:,} elements cannot be met within its"
            f" cap of {spread.cap[g]:,} with these blocks, of which the smallest has {smallest:,}. "
            "Remedy: a higher cap, a lower floor, finer blocks=..., or leave it out: exclude=..."
        )
    return found


def _met(ranked: Ranked, spread: Spread, order: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """The first blocks of each group, in this order and within the caps, that meet its floor; and
    in which groups they do not."""
    capped = _capped(ranked.sizes, order, spread.group, spread.cap)
    order = order[capped[order]]
    if order.size:
        g, size = spread.group[order], ranked.sizes[order]
        order = order[_running(g, size) - size < spread.floor[g]]
    return order, spread.counts(order, ranked.sizes) < spread.floor
