"""Custom autograd functions that read a probed parameter.

PyTorch tells function modes nothing of ``torch.autograd.Function.apply``, so no tap sees what such
a function does. But its node stands in the autograd graph of what it returned, and there it is
noticed as soon as that enters a function that is announced, leaves the model, or is called
``backward`` on. From the node a parameter is found directly or through functions of parameters
alone (views, casts).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fastgrad.records import Batch

# Taps, and what runs a function of the model that is seen itself
_KNOWN = ("fastgrad.", "torch.utils.checkpoint", "torch._library")
# Rows that are looked up are attributed where they come out.
_LOOKUPS = ("Embedding", "Index", "Gather", "Take")
_DEPTH = 16  # of functions between a parameter and a custom function


@lru_cache(maxsize=512)  # a model may define such a class in each forward pass
def _is_custom(kind: Any) -> bool:
    if not issubclass(kind, BackwardCFunction):
        return False
    return not getattr(kind, "_forward_cls", kind).__module__.startswith(_KNOWN)


def refuse_unannounced(tensors: Sequence[Tensor], batch: Batch) -> None:
    """Report the parameters that custom autograd functions read whose results are ``tensors``."""
    for tensor in tensors:
        node = tensor.grad_fn
        if node is not None and _is_custom(type(node)):
            _refuse(node, batch)


def _refuse(node: Any, batch: Batch) -> None:
    name = type(node)._forward_cls.__qualname__
    for before, _ in node.next_functions:
        if before is None:
            continue
        kind: Any = type(before)
        if _is_custom(kind):  # what it returned met no function that is announced
            _refuse(before, batch)
            continue
        for parameter in _made_of(before, _DEPTH) or ():
            record = batch.lookup(parameter)
            if record is not None:
                record.refuse(
                    f"used by the custom autograd function {name}, which PyTorch does not announce"
                )


def _made_of(node: Any, depth: int) -> list[Tensor] | None:
    """The parameters that a node's result is made of; None if there is more in it than these."""
    variable = getattr(node, "variable", None)
    if variable is not None:
        return [variable]
    kind = type(node)
    if not depth or issubclass(kind, BackwardCFunction) or kind.__name__.startswith(_LOOKUPS):
        return None
    found: list[Tensor] = []
    for before, _ in node.next_functions:
        if before is not None:
            more = _made_of(before, depth - 1)
            if more is None:
                return None
            found += more
    return found


__all__ = ["refuse_unannounced"]
