"""Marks of what a function returns, from the marks of what it was given."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastgrad import choices
from fastgrad.function_kinds import (
    DETACHES,
    KEEPING,
    LINEAR,
    MIXERS,
    POINTWISE,
    PRODUCTS_OF_TWO,
    RANKS,
    along,
    is_pointwise,
)
from fastgrad.ownership import (
    COUNTED,
    MANY,
    NOBODY,
    NONE,
    SEVERAL,
    Mark,
    foreign,
    functions,
    mark,
    marked,
    stamped,
    tensors_in,
)
from fastgrad.ownership_explicit import PICKS, explicit
from fastgrad.ownership_uniform import BY_RULE, MADE, UNLISTED, uniform
from fastgrad.ownership_written import WRITES, target_of, written
from fastgrad.trials import tried

# How examples met in a function: their activations, or counts of what they chose. "": not at all
Meeting = Literal["", "activations", "choices"]


def propagate(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
    batch: int,
    n: int,
    tensors: list[Tensor] | None = None,
) -> Meeting:
    """Mark the output of ``func(*args, **kwargs)`` in a batch of ``n`` examples.

    Tells if activations of different examples were mixed, or may have been, or were weighted with
    what other examples chose: one example's loss then depends on the others, and its gradient in
    the batch is not that which it would have alone.
    ``tensors``: those among the arguments, if the caller knows them.
    """
    if tensors is None:
        tensors = tensors_in((*args, *kwargs.values()))
    known = [(t, m) for t in tensors if (m := marked(t, batch)) is not None]
    if known and func in _SIMPLE and isinstance(out, Tensor):  # nearly all functions
        x, first = known[0]
        same = first.dim >= 0 and out.ndim == x.ndim and out.shape[first.dim] == x.shape[first.dim]
        if len(known) < len(tensors):
            same = same and all(foreign(t, batch) is None for t in tensors)
        if not out.requires_grad:
            same = same and (first.chosen > 0 or not choices.begins(func, known, out))
        elif first.chosen == COUNTED:
            same = False
        if same and all(m is first and t.ndim == x.ndim for t, m in known[1:]):
            if marked(out, batch) is None:  # in place, it has the mark of what it was
                mark(out, batch, first)
            return ""
    if len(known) < len(tensors):
        known += [(t, m) for t in tensors if (m := foreign(t, batch)) is not None]
    if not known:
        return ""
    active = [(t, m) for t, m in known if t.requires_grad or m.live]
    if len({m.batch for _, m in active if m.owned or m.many}) > 1:
        # Of what comes of that no batch can say whose it is. Sums, and what lies side by side, do
        # not yet make one example's loss depend on those of another forward pass.
        target = target_of(func, args, out) if func in WRITES else out
        for tensor in tensors_in((target,)):
            mark(tensor, batch, SEVERAL)
        return "" if _stays_a_sum(func, args, [t for t, _ in active]) else "activations"
    plain = func in _ONE_PLACE and isinstance(out, Tensor) and out.requires_grad
    if plain and all(
        m.owner is None and m.dim >= 0 and not m.met and m.chosen < COUNTED for _, m in known
    ):
        dim = uniform(func, args, kwargs, known, out, n)  # nearly all others
        if dim >= 0:
            mark(out, batch, stamped(dim, batch))
            return ""
    if func in WRITES:
        found, mixed = written(func, args, kwargs, known, out, n)
        if found is None:
            found = choices.scattered(func, args, kwargs, known)
        if found is not None:
            target = target_of(func, args, out)
            chosen = choices.made(func, args, known, target, found, mixed, n)
            mark(target, batch, found._replace(chosen=chosen))
        return "activations" if mixed and n > 1 else ""
    if func in MADE:
        _made(known, out, batch)
        return ""
    in_place = isinstance(out, Tensor) and any(out is t for t in tensors)
    outs = [out] if in_place else tensors_in((out,))
    many = any(m.many for _, m in active)
    several = any(m.several for _, m in active)
    moving = [t for t, _ in active]
    met = any(m.met for _, m in known)
    # what has a gradient was reported where it met others
    hidden = any(m.met and not t.requires_grad for t, m in known)
    counted = n > 1 and any(t.requires_grad for t in outs) and choices.counted_in(func, known)
    if not any(m.owned for _, m in known):
        lost = SEVERAL if several else MANY if many else NOBODY
        mixed = (n > 1 or several) and many and not _stays_a_sum(func, args, moving)
        for tensor in outs:
            chosen = choices.made(func, args, known, tensor, lost, mixed, n)
            _mark(tensor, batch, lost, moving, mixed or met or counted, chosen)
        return _meeting(mixed or hidden, counted)
    found_marks, mixed = _found(func, args, kwargs, known, outs, n)
    # a batch norm makes all that comes after it depend on the whole batch, also of raw inputs
    counts = n > 1 and (bool(active) or func in _NORMS)
    decided, mixed = mixed, (counts and (many or mixed)) or several
    for tensor, new in zip(outs, found_marks, strict=True):
        lost = MANY if active and (tensor.is_floating_point() or tensor.is_complex()) else NOBODY
        new = new if new.owned else lost
        chosen = choices.made(func, args, known, tensor, new, decided, n)
        _mark(tensor, batch, new, moving, mixed or met or counted, chosen)
    return _meeting(mixed or hidden, counted)


def _meeting(activations: bool, counts: bool) -> Meeting:
    return "activations" if activations else "choices" if counts else ""


_NORMS = functions("batch_norm")
# All that nothing has to be known of but that each element is made of those in its place.
_SIMPLE = POINTWISE - DETACHES - WRITES - MADE


# Functions of one result that are what they are whatever their other arguments say.
_ONE_PLACE = BY_RULE - MADE - RANKS - KEEPING - WRITES - _NORMS


def _mark(
    tensor: Tensor, batch: int, found: Mark, active: list[Tensor], met: bool, chosen: int
) -> None:
    live = bool(active) and not tensor.requires_grad and tensor.is_floating_point()
    mark(tensor, batch, Mark(found.dim, found.owner, 0, live, False, found.several, met, chosen))


def _made(known: list[tuple[Tensor, Mark]], out: Any, batch: int) -> None:
    """Constants as large as an activation: filled by index later, they may turn out another's."""
    x, found = known[0]
    if isinstance(out, Tensor) and found.owned and out.shape == x.shape:
        mark(out, batch, Mark(found.dim, found.owner, blank=True))


def _found(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: list[tuple[Tensor, Mark]],
    outs: list[Tensor],
    n: int,
) -> tuple[list[Mark], bool]:
    """Marks of the outputs, and whether examples met on the way."""
    mixed = func in _NORMS and _of_batch(func, args, kwargs)
    simple = all(m.owner is None for _, m in known)
    listed = func in BY_RULE or func in PICKS or is_pointwise(func, args)
    if not listed:
        if all(_marked_already(t, known) for t in outs):  # by whoever tried it before
            return [t._fastgrad_examples for t in outs], False  # type: ignore[attr-defined]
        trial = tried(func, args, kwargs, known, outs, n)
        return ([NOBODY] * len(outs), True) if trial is None else (trial, False)
    found: list[Mark] = []
    left, unlisted = [], False
    for i, tensor in enumerate(outs):
        dim = uniform(func, args, kwargs, known, tensor, n) if simple else NONE
        mixed |= dim == MANY.dim
        unlisted |= dim == UNLISTED
        found.append(Mark(dim) if dim >= 0 else NOBODY)
        if dim in (NONE, UNLISTED):
            left.append(i)
    if unlisted:
        trial = tried(func, args, kwargs, known, outs, n)
        return ([NOBODY] * len(outs), True) if trial is None else (trial, mixed)
    if left and (not simple or func in PICKS):
        new = explicit(func, args, kwargs, known, outs, n)
        for i in left:
            if i < len(new) and (now := new[i]) is not None:
                mixed |= now.many
                found[i] = now
    lost = any(not m.owned for m in found)
    mixed |= lost and func in MIXERS
    if func in RANKS or func in KEEPING:  # rows keep their owners, but others decide which they are
        mixed |= any(
            d == m.dim or (m.owner is not None and m.owner.shape[d] > 1)
            for x, m in known
            for d in along(func, args, kwargs, x) or ()
        )
    return found, mixed


def _marked_already(tensor: Tensor, known: list[tuple[Tensor, Mark]]) -> bool:
    """By this forward pass: what a model keeps for long may still have the mark of another."""
    fresh = not any(tensor is t for t, _ in known)
    return fresh and any(marked(tensor, m.batch) is not None for _, m in known)


def _stays_a_sum(func: Any, args: tuple[Any, ...], active: list[Tensor]) -> bool:
    """Whether a sum over examples, given to a function, comes out as one."""
    if func in LINEAR:
        return True
    if func not in PRODUCTS_OF_TWO or len(active) != 1:
        return False
    return func not in _DIVIDES or (bool(args) and args[0] is active[0])


_DIVIDES = functions("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__")


def _of_batch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a batch norm takes its statistics from the batch."""
    if func is torch.nn.functional.batch_norm:
        return bool(kwargs.get("training", args[5] if len(args) > 5 else False))
    return bool(args[5] if len(args) > 5 else kwargs.get("training", True))
