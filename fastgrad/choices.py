"""Choices that examples make, and counts of them.

Where an example's activations decide something (the expert of a token, the best class, what is
above a threshold), what comes out is an integer or a truth value: no gradient flows through it, so
nobody asks whose it is. But counted over several examples it says something of them all, and if
such a count comes back as a factor, as the share of tokens that an expert gets in a router's
balancing loss (Fedus et al., arXiv 2101.03961, equations 4 to 6), one example's loss depends on
what the others chose.

A count that is only an index or an offset, as those by which grouped products cut their rows, moves
rows and changes none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgrad.function_kinds import is_pointwise
from fastgrad.ownership import CHOICE, COUNTED, NOBODY, Mark, functions

Known = list[tuple[Tensor, Mark]]

# The first argument is what is picked from; others say where.
_PICKS = functions(
    "__getitem__", "index_select", "gather", "take", "take_along_dim", "masked_select",
    "repeat_interleave",
)  # fmt: skip
# What a model asks to catch numbers that are none. That is no choice that training meets.
_FINITE = functions("isfinite", "isinf", "isnan", "isposinf", "isneginf", "isreal", "signbit")
_SCATTERS = functions("scatter", "scatter_", "scatter_add", "scatter_add_")
_ADDS = functions("index_add", "index_add_")


def begins(func: Any, known: Known, out: Tensor) -> bool:
    """Whether ``func`` turned activations into a choice."""
    if out.requires_grad or out.is_floating_point() or out.is_complex() or func in _FINITE:
        return False
    return any(t.requires_grad or m.live for t, m in known)


def made(
    func: Any, args: tuple[Any, ...], known: Known, out: Tensor, found: Mark, mixed: bool, n: int
) -> int:
    """What ``out`` is, which got the mark ``found``: 0, :data:`CHOICE` or :data:`COUNTED`;
    ``mixed``: others decide what is in its rows."""
    if out.requires_grad:
        return 0
    level, by_index = 0, False
    for tensor, m in known:
        if tensor.requires_grad or not m.chosen:
            continue
        picks = func in _PICKS and not (args and tensor is args[0])
        by_index |= picks and m.chosen == COUNTED
        if not picks:
            level = max(level, m.chosen)
        elif found.owned:  # rows of a constant, as a frozen expert's weights, are no count
            level = max(level, CHOICE)
    if not level and begins(func, known, out):
        level = CHOICE
    if level == CHOICE and n > 1 and (not found.owned or (mixed and not by_index)):
        return COUNTED
    return level


def counted_in(func: Any, known: Known) -> bool:
    """Whether counts of choices come back as a factor in ``func``, through which gradients flow."""
    counts = [t for t, m in known if m.chosen == COUNTED and not t.requires_grad]
    if not counts or func in _PICKS:
        return False
    return any(t.is_floating_point() or is_pointwise(func, (t,)) for t in counts)


def scattered(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: Known
) -> Mark | None:
    """The mark of constants into which numbers were written at places that examples chose, each in
    a row of its own, as a mask of the experts of each token is; None if nobody chose."""
    if func not in _SCATTERS and func not in _ADDS:
        return None
    index = args[2] if len(args) > 2 else kwargs.get("index")
    m = next((m for t, m in known if t is index and m.chosen), None)
    if m is None or index is None:
        return None
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    target = args[0]
    if func in _SCATTERS and m.dim >= 0 and m.dim != dim % max(target.ndim, 1):
        same = target.ndim == index.ndim and target.shape[m.dim] == index.shape[m.dim]
        return Mark(m.dim) if same else NOBODY
    return NOBODY


__all__ = ["begins", "counted_in", "made", "scattered"]
