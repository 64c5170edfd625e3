"""Which example each index of a tensor belongs to: followed from the model's inputs on.

A size alone proves nothing: a batch of as many rows as a row has tokens looks the same either
way round. So each tensor that a probed forward pass makes carries a mark:

* *uniform*: the position of one dimension that counts examples, each of them equally often and
  one after the other (the usual case; costs nothing);
* *explicit*: an int64 tensor of owners with as many dimensions as the tensor, of size one where
  the dimension says nothing. Packed rows begin so, and rows that a router picks by index;
* *nobody*: known to have no example dimension.

Functions that move dimensions or pick rows are known by name; all others keep the position if
the size there is unchanged. Where the mark is lost (a function that PyTorch does not announce),
a size decides only if no other dimension of the batch has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

NONE = -1
_MANY = -2
_MARK = "_fastgrad_examples"


class Mark(NamedTuple):
    """``dim >= 0``: uniform at that dimension; ``owner``: explicit; neither: nobody's, or made of
    many examples."""

    dim: int
    owner: Tensor | None = None

    @property
    def owned(self) -> bool:
        return self.dim >= 0 or self.owner is not None

    def explicit(self, x: Tensor, n: int) -> Tensor:
        """Owners with the dimensions of ``x``."""
        if self.owner is not None:
            return self.owner
        size = x.shape[self.dim]
        owner = torch.arange(n, device=x.device).repeat_interleave(size // n)
        return owner.view([size if d == self.dim else 1 for d in range(x.ndim)])


NOBODY = Mark(NONE)
MANY = Mark(_MANY)  # made of several examples' activations: a mean over the batch, a loss


def mark(tensor: Tensor, batch: int, found: Mark) -> None:
    setattr(tensor, _MARK, (batch, found))


def marked(tensor: Tensor, batch: int) -> Mark | None:
    """What is known of a tensor; None if nothing is."""
    found = getattr(tensor, _MARK, None)
    return found[1] if found is not None and found[0] == batch else None


def carry(module: torch.nn.Module, args: Any, output: Any, batch: int) -> None:
    """Mark the output of a module without parts of its own, where PyTorch did not announce what it
    computes (a custom autograd function: activations, quantised products): it works on features,
    and its rows are those of its input."""
    x = args[0] if isinstance(args, tuple) and args else None
    if not isinstance(output, Tensor) or not isinstance(x, Tensor) or module._modules:
        return
    found = marked(x, batch)
    if found is None or not found.owned or marked(output, batch) is not None or x.ndim < 2:
        return
    by_features = found.owner is None or found.owner.shape[-1] == 1
    if output.shape[:-1] == x.shape[:-1] and found.dim < x.ndim - 1 and by_features:
        mark(output, batch, found)


def tensors_in(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


def functions(*names: str) -> set[Any]:
    return {getattr(o, n) for n in names for o in (torch, Tensor, torch.nn.functional)
            if hasattr(o, n)}  # fmt: skip
