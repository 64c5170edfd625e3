"""Which example each index of a tensor belongs to: followed from the model's inputs on.

A size alone proves nothing: a batch of as many rows as a row has tokens looks the same either
way round. So each tensor that a probed forward pass makes carries a mark:

* *uniform*: the position of one dimension that counts examples, each of them equally often and
  one after the other (the usual case; costs nothing);
* *explicit*: an int64 tensor of owners with as many dimensions as the tensor, of size one where
  the dimension says nothing. Packed rows begin so, and rows that a router picks by index;
* *nobody*: known to have no example dimension.

Functions that PyTorch offers are known by name; any other is tried with single examples
(:mod:`fastgrad.trials`). Where the mark is lost (a function that PyTorch does not announce), a size
decides only if no other dimension of the batch has it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

NONE = -1
_MANY = -2
# what a tensor without a gradient tells of the examples' choices: see fastgrad.choices
CHOICE, COUNTED = 1, 2


class Mark(NamedTuple):
    """``dim >= 0``: uniform at that dimension; ``owner``: explicit; neither: nobody's, or made of
    many examples."""

    dim: int
    owner: Tensor | None = None
    batch: int = 0  # number of the forward pass; the mark of another one says nothing
    live: bool = False  # depends on parameters, although no gradient flows through it any more
    blank: bool = False  # a constant in the shape of what belongs to examples: a hint, no more
    several: bool = False  # made of several forward passes, in whose examples batches meet
    met: bool = False  # examples have met in it, or in what it was made of
    chosen: int = 0  # CHOICE: each row's owner decided what is in it; COUNTED: several did

    def __reduce__(self) -> tuple[Any, ...]:
        """Saved with a tensor, a mark is nothing: files stay free of this library's classes."""
        return OrderedDict, ()

    @property
    def many(self) -> bool:
        """Made of several examples' activations: a mean over the batch, a loss."""
        return self.dim == _MANY

    @property
    def plain(self) -> bool:
        """Uniform, and nothing else is known: the one object that :func:`stamped` keeps for it."""
        return self.dim >= 0 and self is stamped(self.dim, self.batch)

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
MANY = Mark(_MANY)
SEVERAL = Mark(_MANY, several=True)


@lru_cache(maxsize=64)
def stamped(
    dim: int,
    batch: int,
    live: bool = False,
    blank: bool = False,
    several: bool = False,
    met: bool = False,
    chosen: int = 0,
) -> Mark:
    """One object for all tensors that say the same: hundreds of small ones in each forward pass
    would keep Python's garbage collector busy."""
    return Mark(dim, None, batch, live, blank, several, met, chosen)


def mark(tensor: Tensor, batch: int, found: Mark) -> None:
    if found.batch != batch:
        if found.owner is None:
            found = stamped(found.dim, batch, *found[3:])
        else:
            found = found._replace(batch=batch)
    tensor._fastgrad_examples = found  # type: ignore[attr-defined]


def marked(tensor: Tensor, batch: int) -> Mark | None:
    """What is known of a tensor; None if nothing is."""
    found = getattr(tensor, "_fastgrad_examples", None)
    return found if type(found) is Mark and found.batch == batch else None


def foreign(tensor: Tensor, batch: int) -> Mark | None:
    """What another forward pass knew of a tensor through which gradients flow. Others may be
    kept by a model for long, as tables of rotations are: of them it says nothing."""
    if not tensor.requires_grad:
        return None
    found = getattr(tensor, "_fastgrad_examples", None)
    return found if type(found) is Mark and found.batch != batch else None


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


def tensors_in(values: Iterable[Any], found: list[Tensor] | None = None) -> list[Tensor]:
    """The tensors among ``values``, also inside lists, tuples and dictionaries."""
    found = [] if found is None else found
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            tensors_in(value, found)
        elif isinstance(value, dict):
            tensors_in(value.values(), found)
    return found


def functions(*names: str) -> set[Any]:
    return {getattr(o, n) for n in names for o in (torch, Tensor, torch.nn.functional)
            if hasattr(o, n)}  # fmt: skip
