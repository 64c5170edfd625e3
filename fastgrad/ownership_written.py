"""Marks of tensors that others are written into by index: a row belongs to whom it comes from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad.ownership import MANY, NOBODY, NONE, Mark, functions
from fastgrad.ownership_explicit import all_same, settled

_SETITEM = {Tensor.__setitem__}
_PUT = functions("index_put", "index_put_")
_ALONG = functions("index_add", "index_add_", "index_copy", "index_copy_")
_INDEX_ADD = functions("index_add", "index_add_")
_SCATTER = functions("scatter", "scatter_", "scatter_add", "scatter_add_")
_SCATTER_ADD = functions("scatter_add", "scatter_add_")
_OTHERS = functions(
    "scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_", "masked_scatter",
    "masked_scatter_", "put", "put_", "index_fill", "index_fill_", "fill_diagonal_",
    "select_scatter", "slice_scatter", "diagonal_scatter",
)  # fmt: skip
WRITES = _SETITEM | _PUT | _ALONG | _SCATTER | _OTHERS


class _Mixed(Exception):
    """Two examples' rows were added up in one place."""


def target_of(func: Any, args: tuple[Any, ...], out: Any) -> Tensor:
    """Whose mark is meant: of the result, or of what was written into."""
    return out if isinstance(out, Tensor) else args[0]


def written(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: list[tuple[Tensor, Mark]],
    out: Any,
    n: int,
) -> tuple[Mark | None, bool]:
    """The mark after ``func`` has written, None if it is as it was; and whether rows of different
    examples met in one place."""
    marks = {id(t): m for t, m in known}
    x = args[0]
    source = _source(func, args, kwargs)
    ours = marks.get(id(x))
    theirs = None if not isinstance(source, Tensor) else marks.get(id(source))
    if isinstance(out, Tensor) and out.shape != x.shape:  # broadcast as well
        return NOBODY, False
    if theirs is None:
        return ours, False
    blank = ours is None or ours.blank or (not ours.owned and not x.requires_grad)
    if theirs.many:
        return MANY, ours is not None and ours.owned and not blank
    if not theirs.owned:
        return (ours if blank else NOBODY), False
    if not blank and ours is not None and not ours.owned:
        return (MANY if ours.many else NOBODY), ours.many
    if func in _OTHERS:
        return MANY, True  # whose rows met there is not looked into
    assert isinstance(source, Tensor)
    try:
        owner, fits = _owners(func, args, kwargs, x, source, ours, theirs, blank, n)
    except _Mixed:
        return NOBODY, True
    except (RuntimeError, IndexError, TypeError, ValueError):
        return NOBODY, False
    if fits and ours is not None:
        return ours._replace(blank=False), False
    return settled(owner, n), False


def _source(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _SETITEM | _PUT:
        return args[2] if len(args) > 2 else kwargs.get("values")
    if func in _ALONG | _SCATTER:
        return args[3] if len(args) > 3 else kwargs.get("source", kwargs.get("src"))
    return next((a for a in reversed(args[1:]) if isinstance(a, Tensor)), None)


def _owners(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    x: Tensor,
    source: Tensor,
    ours: Mark | None,
    theirs: Mark,
    blank: bool,
    n: int,
) -> tuple[Tensor, bool]:
    """Owners after the writing, and whether they are what the mark of ``x`` says already."""
    hint = ours.explicit(x, n) if ours is not None and ours.owned else None
    nobody = torch.full((), NONE, device=x.device, dtype=torch.int64)
    before = nobody.view([1] * x.ndim) if blank or hint is None else hint
    own = theirs.explicit(source, n)
    if func in _SCATTER:
        dim, index = args[1] if len(args) > 1 else kwargs["dim"], args[2]
        full, values = before.expand(x.shape), own.expand(source.shape)
        if func in _SCATTER_ADD:
            return _added(full, dim, index, values), False
        return full.scatter(dim, index, values), False
    if func in _ALONG:
        dim, index = args[1] if len(args) > 1 else kwargs["dim"], args[2]
        key: Any = (*[slice(None)] * (dim % x.ndim), index)
    else:
        key = args[1]
        key = tuple(key) if func in _PUT else key
    adds = func in _INDEX_ADD
    adds |= func in _PUT and bool(args[3] if len(args) > 3 else kwargs.get("accumulate", False))
    # trailing dimensions that say nothing stay of size one
    keyed = _keyed(key, x)
    tail = x.ndim - keyed
    while tail and (own.ndim < tail or any(k > 1 for k in own.shape[own.ndim - tail :])):
        tail -= 1
    size = [*x.shape[: x.ndim - tail], *before.shape[x.ndim - tail :]]
    owner = before.expand(size).clone()
    there = owner[key]
    value = own.view([1] * (there.ndim - own.ndim) + list(own.shape)).expand(there.shape)
    if hint is not None and blank:
        shown = hint.expand(torch.broadcast_shapes(hint.shape, owner.shape))[key]
        if all_same([shown, value.expand(torch.broadcast_shapes(shown.shape, value.shape))]):
            return owner, True
    if adds and bool(((there != NONE) & (there != value)).any()):
        raise _Mixed
    owner[key] = value
    if adds and not torch.equal(owner[key], value):
        raise _Mixed
    return owner, not blank and hint is not None and all_same([hint, owner])


def _added(full: Tensor, dim: int, index: Tensor, values: Tensor) -> Tensor:
    """Owners of places that rows are added to."""
    values = values[tuple(slice(k) for k in index.shape)]
    far = torch.iinfo(torch.int64).max
    least = full.where(full != NONE, far).scatter_reduce(dim, index, values, "amin")
    most = full.scatter_reduce(dim, index, values, "amax")
    if bool(((least != most) & (most != NONE)).any()):
        raise _Mixed
    return most


def _keyed(key: Any, x: Tensor) -> int:
    """How many leading dimensions an index speaks of."""
    keys = key if isinstance(key, tuple) else (key,)
    if any(k is Ellipsis or k is None for k in keys):
        return x.ndim
    return sum(
        k.ndim if isinstance(k, Tensor) and k.dtype in (torch.bool, torch.uint8) else 1
        for k in keys
    )
