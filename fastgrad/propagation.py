"""Marks of what a function returns, from the marks of what it was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad.ownership import MANY, NOBODY, NONE, Mark, functions, mark, marked, tensors_in
from fastgrad.ownership_explicit import PICKS, all_same, explicit, picked
from fastgrad.ownership_uniform import BY_RULE, uniform

_WRITES = {Tensor.index_add_, Tensor.__setitem__, Tensor.index_copy_, Tensor.index_put_}
_INDEX_ADD = functions("index_add", "index_add_")
_WRITES |= _INDEX_ADD


def propagate(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
    batch: int,
    n: int,
    tensors: list[Tensor] | None = None,
) -> bool:
    """Mark the output of ``func(*args, **kwargs)`` in a batch of ``n`` examples.

    True if activations of different examples were mixed: one example's loss then depends on the
    others, and its gradient in the batch is not that which it would have alone. ``tensors``: those
    among the arguments, if the caller knows them.
    """
    if tensors is None:
        tensors = tensors_in((*args, *kwargs.values()))
    known = [(t, m) for t in tensors if (m := marked(t, batch)) is not None]
    if known and isinstance(out, Tensor) and func not in _SPECIAL:  # nearly all functions
        x, first = known[0]
        same = first.dim >= 0 and out.ndim == x.ndim and out.shape[first.dim] == x.shape[first.dim]
        if same and all(m is first and t.ndim == x.ndim for t, m in known[1:]):
            if not any(out is t for t in tensors):
                mark(out, batch, first)
            return False
    if func in _WRITES:
        _written(func, args, kwargs, known, out, batch, n)
        return False
    if not known:
        return False
    outs = [t for t in tensors_in((out,)) if not any(t is k for k, _ in known)]
    owned = [(t, m) for t, m in known if m.owned]
    many = any(m.many and t.requires_grad for t, m in known)
    mixing = n > 1 and bool(owned) and (many or (func in _NORMS and _of_batch(func, args, kwargs)))
    if not outs:
        return mixing  # in place, or handed through: it keeps its mark
    if not owned:
        for tensor in outs:
            mark(tensor, batch, MANY if many else NOBODY)
        return False
    simple = all(m.owner is None for _, m in known)
    left = []
    for i, tensor in enumerate(outs):
        dim = uniform(func, args, kwargs, known, tensor, n) if simple else NONE
        if dim < 0:
            left.append((i, tensor))
            if dim == MANY.dim and n > 1:
                mixing = True
        mark(tensor, batch, Mark(dim) if dim >= 0 else _unowned(tensor, owned))
    if left and (not simple or func in PICKS):
        found = explicit(func, args, kwargs, known, outs, n)
        for i, tensor in left:
            new = found[i] if i < len(found) else None
            if new is not None:
                mark(tensor, batch, new if new.owned else _unowned(tensor, owned))
    return mixing


# Functions of whose output it is not enough to know that the dimension's size is the same.
_NORMS = {torch.nn.functional.batch_norm, torch.batch_norm}
_SPECIAL = BY_RULE | PICKS | _WRITES | _NORMS


def _unowned(out: Tensor, owned: list[tuple[Tensor, Mark]]) -> Mark:
    return MANY if out.requires_grad and any(t.requires_grad for t, _ in owned) else NOBODY


def _of_batch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a batch norm takes its statistics from the batch."""
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))


def _written(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: list[tuple[Tensor, Mark]],
    out: Any,
    batch: int,
    n: int,
) -> None:
    """Rows written by index into a tensor, as a mixture of experts puts its results together: they
    must arrive where their owner's rows are."""
    marks = {id(t): m for t, m in known}
    key: Any
    if func in _INDEX_ADD:
        x, dim, index, source = (*args, *(kwargs.get(k) for k in ("dim", "index", "source")
                                          if k in kwargs))[:4]  # fmt: skip
        if not isinstance(dim, int) or not isinstance(index, Tensor):
            return
        key = (*[slice(None)] * (dim % x.ndim), index)
    elif func is Tensor.__setitem__:
        x, key, source, dim = *args, 0
    else:
        x, source, key, dim = args[0], None, None, 0
    target = out if isinstance(out, Tensor) and out is not x else x
    if not isinstance(source, Tensor):
        return
    theirs, ours = marks.get(id(source)), marks.get(id(x))
    if theirs is None and ours is None:
        return
    if theirs is None or not theirs.owned or (ours is not None and not ours.owned) or key is None:
        mark(target, batch, NOBODY)
        return
    try:
        if ours is None:  # a fresh tensor of zeros: what is written says whose it is
            blank = torch.full((), NONE, device=x.device, dtype=torch.int64)
            owner = blank.view([1] * x.ndim)
            owner = owner.repeat([k if d == dim % x.ndim else 1 for d, k in enumerate(x.shape)])
            ours = Mark(NONE, owner)
        owner = ours.explicit(x, n)
        there, own = picked(x, owner, key), theirs.explicit(source, n)
        own = own.view([1] * (there.ndim - own.ndim) + list(own.shape))
        if ours.owner is not None and bool((there == NONE).any()):
            owner = owner.clone()
            owner[key] = own.expand(there.shape)
            found = Mark(NONE, owner) if bool((there == NONE).all()) else NOBODY
        else:
            found = ours if all_same([there, own]) else NOBODY
    except (RuntimeError, IndexError):
        found = NOBODY
    mark(target, batch, found)
