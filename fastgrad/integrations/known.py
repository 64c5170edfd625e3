"""What an optimizer trains: callbacks are given the optimizer, and find the partial model by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from fastgrad.partial import Partial
from fastgrad.reselection import GroupOf

_MARK = "_fastgrad_known"


@dataclass(frozen=True)
class Known:
    """What a factory tells about its optimizer.

    Attributes:
        partial: the partial model that it trains, or None if nothing is known.
        group_of: the param group that a weight belongs to, see :meth:`fastgrad.Partial.reselect`.
    """

    partial: Partial | None = None
    group_of: GroupOf | None = None


def make_known(optimizer: Optimizer, partial: Partial, group_of: GroupOf) -> None:
    """Let callbacks find what ``optimizer`` trains."""
    optimizer.__dict__[_MARK] = Known(partial, group_of)


def known(optimizer: Any) -> Known:
    """What is known of an optimizer, also inside Accelerate's wrapper, or of None."""
    while optimizer is not None and _MARK not in optimizer.__dict__:
        optimizer = optimizer.__dict__.get("optimizer")
    found: Known = Known() if optimizer is None else optimizer.__dict__[_MARK]
    return found
