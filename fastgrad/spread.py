"""Floors and caps: how much of each layer, parameter or kind a selection takes at least, at most.

Both are shares of the elements of a group *that may be chosen*: what include and exclude leave
out, what requires no gradient and what has no score does not count.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastgrad.errors import SelectionError
from fastgrad.selection import kind_of, layer_of

if TYPE_CHECKING:
    from fastgrad.ranking import Ranked

Ints = NDArray[np.int64]
#: One share for all groups, or patterns of group names with the share of each.
Shares = float | Mapping[str, float]

GROUPINGS: Mapping[str, Callable[[str], str]] = {
    "layer": layer_of,
    "parameter": lambda name: name,
    "kind": kind_of,
}


@dataclass(frozen=True)
class Spread:
    """Floors and caps of G groups, in elements.

    Attributes:
        names: the groups, in the model's order.
        group: ``[n]`` group of each ranked block.
        choosable, floor, cap: ``[G]`` elements that may be chosen, that must be chosen at least
            and that may be chosen at most.
        by_group: ``[n]`` ranks of the blocks, group by group, each in the order of the ranks.
    """

    names: list[str]
    group: Ints
    choosable: Ints
    floor: Ints
    cap: Ints
    by_group: Ints

    def counts(self, ranks: Ints, sizes: Ints) -> Ints:
        """``[G]`` elements of these blocks in each group."""
        # Sums of whole numbers below 2^53 are exact in float64.
        found = np.bincount(self.group[ranks], sizes[ranks], minlength=len(self.names))
        return found.astype(np.int64)

    def to_meta(self) -> dict[str, dict[str, int]]:
        return {
            name: {"choosable": int(n), "floor": int(floor), "cap": int(cap)}
            for name, n, floor, cap in zip(
                self.names, self.choosable, self.floor, self.cap, strict=True
            )
        }


def plan_spread(
    ranked: Ranked, by: str | None, floor: Shares | None, cap: Shares | None
) -> Spread | None:
    """What ``spread_by``, ``floor`` and ``cap`` of :func:`fastgrad.select` ask for; None if
    nothing.

    Raises:
        SelectionError: for an unknown grouping, a share outside [0, 1], a pattern that matches no
            group, a floor above the cap of its group, or ``by`` alone.
    """
    if floor is None and cap is None:
        if by is not None:
            raise SelectionError(f"spread_by={by!r} groups floors and caps. Remedy: give floor=... "
                                 "or cap=... too")
        return None
    by = "layer" if by is None else by
    if by not in GROUPINGS:
        raise SelectionError(f"unknown spread_by {by!r}; use one of {', '.join(GROUPINGS)}")
    of_parameter = [GROUPINGS[by](name) for name in ranked.names]
    names = list(dict.fromkeys(of_parameter))
    number = {name: i for i, name in enumerate(names)}
    group = np.array([number[g] for g in of_parameter], dtype=np.int64)[ranked.owner]
    totals = np.bincount(group, ranked.sizes, minlength=len(names)).astype(np.int64)
    least, most = _shares("floor", floor, names, 0.0), _shares("cap", cap, names, 1.0)
    for name, low, high in zip(names, least, most, strict=True):
        if low > high:
            raise SelectionError(f"{name}: its floor {float(low):g} is above its cap "
                                 f"{float(high):g}. Remedy: a lower floor or a higher cap")
    return Spread(
        names,
        group,
        totals,
        np.array([-int(-s * int(n) // 1) for s, n in zip(least, totals, strict=True)], np.int64),
        np.array([int(s * int(n) // 1) for s, n in zip(most, totals, strict=True)], np.int64),
        np.argsort(group, kind="stable"),
    )


def _shares(
    argument: str, given: Shares | None, names: list[str], default: float
) -> list[Fraction]:
    if given is None:
        given = default
    if not isinstance(given, Mapping):
        return [_share(argument, given)] * len(names)
    asked = {pattern: _share(f"{argument} of {pattern!r}", s) for pattern, s in given.items()}
    for pattern in asked:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise SelectionError(f"{argument}: the pattern {pattern!r} matches no group; groups "
                                 f"are {', '.join(names[:4])}" + ", ..." * (len(names) > 4))
    rest = Fraction(default)
    return [
        next((s for p, s in asked.items() if fnmatch.fnmatchcase(name, p)), rest) for name in names
    ]


def _share(argument: str, value: Any) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise SelectionError(f"{argument} is a share between 0 and 1; got {value!r}")
    if not 0 <= value <= 1:
        raise SelectionError(f"{argument} must lie in [0, 1]; got {value}")
    return Fraction(repr(float(value)))  # the decimal number that was written
