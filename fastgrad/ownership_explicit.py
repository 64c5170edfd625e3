"""Explicit marks: the owners of indices go through the function themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgrad.ownership import MANY, NOBODY, NONE, Mark, functions, tensors_in
from fastgrad.ownership_uniform import PRODUCTS, aligned, apart, position

_VIEWS = functions(
    "transpose", "swapaxes", "swapdims", "permute", "t", "adjoint", "movedim", "moveaxis",
    "unsqueeze", "squeeze", "select", "narrow", "chunk", "split", "tensor_split", "unbind",
    "flatten", "unflatten", "view", "reshape", "view_as", "expand", "expand_as", "broadcast_to",
    "diagonal", "__iter__", "flipud", "fliplr", "rot90", "tile", "repeat", "gather",
    "take_along_dim", "split_with_sizes", "take", "masked_select",
) | {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}  # fmt: skip
_RESHAPED = functions("view", "reshape", "view_as", "flatten", "unflatten")
_GETITEM = functions("__getitem__")
_ROLL = functions("roll")
_ROLLS = functions("flip") | _ROLL
_REPEATS = functions("repeat_interleave")
_INDEX_SELECT = functions("index_select")
_MOVERS = functions("gather", "take_along_dim", "flipud", "rot90", "take", "masked_select")
_CAT = functions("cat", "concat", "concatenate")
_STACKS = functions("stack")
_SORTS = functions("sort", "argsort")
_ATTENTION = functions("scaled_dot_product_attention")
PICKS = (
    _VIEWS | _GETITEM | _ROLLS | _REPEATS | _INDEX_SELECT | _CAT | _STACKS | _SORTS
)  # what may turn a uniform mark into an explicit one


def explicit(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: list[tuple[Tensor, Mark]],
    outs: list[Tensor],
    n: int,
) -> list[Mark | None]:
    """Marks of the outputs by sending the owners themselves through the function."""
    owners = {id(x): m.explicit(x, n) for x, m in known if m.owned}
    x = known[0][0]
    own = owners.get(id(x))
    if func in _VIEWS | _ROLLS | _GETITEM | _REPEATS | _INDEX_SELECT:
        if own is None or not (args and args[0] is x):
            return []
        try:
            results = list(tensors_in((_moved(func, x, own, args, kwargs),)))
        except (RuntimeError, IndexError, TypeError, ValueError):
            return []
        by_index = func in _GETITEM | _INDEX_SELECT | _MOVERS
        settle = partial(settled, n=n) if by_index else partial(Mark, NONE)
        return [
            m if _checked((m := settle(_folded(r))).explicit(o, n), o).owned else NOBODY
            for r, o in zip(results, outs, strict=False)
        ]
    if func in _SORTS:
        return _through_sort(x, own, kwargs, args, outs, n)
    if func in _CAT | _STACKS:
        return [_joined(func, args, kwargs, owners, outs[0])]
    return [_combined(func, args, kwargs, known, owners, out) for out in outs]


def _through_sort(
    x: Tensor,
    owner: Tensor | None,
    kwargs: dict[str, Any],
    args: tuple[Any, ...],
    outs: list[Tensor],
    n: int,
) -> list[Mark | None]:
    """Values and indices that were sorted along the examples: the last output says from where."""
    along = kwargs.get("dim", next((a for a in args[1:] if type(a) is int), -1)) % x.ndim
    if owner is None or x.ndim != 1:
        moved = owner is not None and owner.shape[along] == 1
        return [Mark(NONE, owner) if moved else NOBODY for _ in outs]
    return [settled(owner.expand(x.shape)[outs[-1]], n) for _ in outs]


def settled(owner: Tensor, n: int) -> Mark:
    """The simplest mark that says the same. Looks at the owners: for what was picked by index."""
    for d in range(owner.ndim):
        if owner.shape[d] > 1 and bool((owner == owner.narrow(d, 0, 1)).all()):
            owner = owner.narrow(d, 0, 1)
    dims = [d for d in range(owner.ndim) if owner.shape[d] > 1]
    if len(dims) == 1 and owner.numel() % n == 0:
        even = torch.arange(n, device=owner.device).repeat_interleave(owner.numel() // n)
        if torch.equal(owner.reshape(-1), even):
            return Mark(dims[0])
    return Mark(NONE, owner)


def _folded(owner: Tensor) -> Tensor:
    """Dimensions of stride zero say nothing: back to size one."""
    for d in range(owner.ndim):
        if owner.stride(d) == 0 and owner.shape[d] > 1:
            owner = owner.narrow(d, 0, 1)
    return owner


def _checked(owner: Tensor, out: Tensor) -> Mark:
    fits = owner.ndim == out.ndim and all(
        a in (1, b) for a, b in zip(owner.shape, out.shape, strict=True)
    )
    return Mark(NONE, owner) if fits else NOBODY


def _moved(
    func: Any, x: Tensor, owner: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if func in _GETITEM:
        return picked(x, owner, args[1])
    if func in _INDEX_SELECT | _REPEATS:
        place = 1 if func in _INDEX_SELECT else 2
        dim = kwargs.get("dim", args[place] if len(args) > place else None)
        if dim is None:  # of all elements in a row
            return func(owner.expand(x.shape), *args[1:], **kwargs)
        return owner if owner.shape[dim] == 1 else func(owner, *args[1:], **kwargs)
    if func in _ROLLS and (len(args) > 2 or "dims" in kwargs or func not in _ROLL):
        return func(owner, *args[1:], **kwargs)  # nothing moves along dimensions of size one
    wide = owner.expand(x.shape)
    if func not in _RESHAPED:
        return func(wide, *args[1:], **kwargs)
    shape = list(func(x, *args[1:], **kwargs).shape)
    # trailing dimensions that say nothing and stay as they are need not be copied
    tail = 0
    while (
        tail < min(x.ndim, len(shape)) - 1
        and owner.shape[-1 - tail] == 1
        and x.shape[x.ndim - 1 - tail] == shape[len(shape) - 1 - tail]
    ):
        tail += 1
    for d in range(x.ndim - tail, x.ndim):
        wide = wide.narrow(d, 0, 1)
    return wide.reshape(*shape[: len(shape) - tail], *[1] * tail)


def picked(x: Tensor, owner: Tensor, key: Any) -> Tensor:
    """``owner`` indexed as ``x`` was, without copying dimensions that say nothing."""
    keys = list(key) if isinstance(key, tuple) else [key]
    taken = sum(
        k.ndim if isinstance(k, Tensor) and k.dtype in (torch.bool, torch.uint8) else k is not None
        for k in keys
        if k is not Ellipsis
    )
    places = [i for i, k in enumerate(keys) if k is Ellipsis]
    if places:
        at = places[0]
        keys[at : at + 1] = [slice(None)] * (x.ndim - taken)
    new: list[Any] = []
    d = 0
    for k in keys:
        if k is None:
            new.append(None)
            continue
        if isinstance(k, list):
            k = torch.tensor(k, device=x.device)
        if isinstance(k, Tensor) and k.dtype in (torch.bool, torch.uint8):
            for where in k.nonzero(as_tuple=True):
                new.append(where if owner.shape[d] > 1 else torch.zeros_like(where))
                d += 1
            continue
        if owner.shape[d] > 1:
            new.append(k)
        elif isinstance(k, Tensor):
            new.append(torch.zeros_like(k))
        else:
            new.append(0 if isinstance(k, int) and not isinstance(k, bool) else slice(None))
        d += 1
    return owner[tuple(new)]


def _joined(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], owners: dict[int, Tensor], out: Tensor
) -> Mark:
    parts = list(tensors_in((args[0] if args else kwargs.get("tensors"),)))
    along = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if any(id(p) not in owners for p in parts):
        return NOBODY
    found = [owners[id(p)] for p in parts]
    if func in _STACKS:
        found = [o.unsqueeze(along % out.ndim) for o in found]
    elif all(o.shape[along] == 1 for o in found) and all_same(found):
        return _checked(found[0], out)
    shapes = [o.shape for o in found]
    wide = []
    for p, o in zip(parts, found, strict=True):
        size = list(torch.broadcast_shapes(*[[1 if d == along % out.ndim else k for d, k in
                                              enumerate(s)] for s in shapes]))  # fmt: skip
        size[along % out.ndim] = 1 if func in _STACKS else p.shape[along]
        wide.append(o.expand(size))
    return _checked(torch.cat(wide, along % out.ndim), out)


def _combined(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: list[tuple[Tensor, Mark]],
    owners: dict[int, Tensor],
    out: Tensor,
) -> Mark:
    """Functions whose rules say where each dimension goes."""
    found: list[tuple[Tensor, Mark]] = []
    args, pairs = apart(args, [(x, (m, owners[id(x)])) for x, m in known if id(x) in owners])
    for x, (m, own) in pairs:
        owner = _through(func, args, kwargs, x, own, out)
        if isinstance(owner, Tensor):
            found.append((owner, m))
        elif func not in PRODUCTS | _ATTENTION:
            return MANY if owner == MANY.dim else NOBODY
    if not found:
        return NOBODY
    if func in PRODUCTS:  # the rows of the first factor are the rows of the result
        pairs_of_rows = len(found) > 1 and max(x.ndim for x, _ in pairs) < 3
        if pairs_of_rows and merged([o for o, _ in found]) is None:
            return MANY  # in attention over packed rows the mask keeps examples apart
        return _checked(found[0][0], out)
    together = merged([o for o, _ in found])
    if together is None:
        return MANY
    for owner, m in found:
        if m.owner is None:  # a uniform mark says the same at less cost
            dims = [d for d in range(owner.ndim) if owner.shape[d] > 1]
            if len(dims) == 1 and out.shape[dims[0]] == owner.shape[dims[0]]:
                return Mark(dims[0])
    return _checked(together, out)


def _through(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, owner: Tensor, out: Tensor
) -> Tensor | int:
    """Owners of the output as far as one input tells; ``NONE`` or ``MANY.dim`` if they are lost."""
    places = {}
    for d in [d for d in range(owner.ndim) if owner.shape[d] != 1]:
        if func in _ATTENTION:  # its mask keeps packed examples apart, if anything does
            place = aligned(x, d, out)
        else:
            place = position(func, args, kwargs, x, d, out)
        if place < 0:
            first = owner.narrow(d, 0, min(1, owner.shape[d]))
            if not bool((owner == first).all()) or not owner.shape[d]:
                return MANY.dim if place == MANY.dim else NONE
            owner = first
        elif out.shape[place] != owner.shape[d]:
            return NONE
        else:
            places[d] = place
    if len(set(places.values())) < len(places):
        return NONE
    order = sorted(places, key=lambda d: places[d])
    rest = [d for d in range(owner.ndim) if d not in places]
    size = [1] * out.ndim
    for d, place in places.items():
        size[place] = owner.shape[d]
    return owner.permute([*order, *rest]).reshape(size)


def merged(owners: list[Tensor]) -> Tensor | None:
    """What owners say together, if they do not contradict each other: what is nobody's is a
    constant, for instance a row that no expert has written to."""
    if all_same(owners):
        return owners[0]
    try:
        found, *others = torch.broadcast_tensors(*owners)
    except RuntimeError:
        return None
    for other in others:
        if bool(((found != other) & (found != NONE) & (other != NONE)).any()):
            return None
        found = torch.where(found == NONE, other, found)
    return found


def all_same(owners: list[Tensor]) -> bool:
    first = owners[0]
    for other in owners[1:]:
        if first is other or (
            first.data_ptr() == other.data_ptr()
            and first.shape == other.shape
            and first.stride() == other.stride()
        ):
            continue
        try:
            shape = torch.broadcast_shapes(first.shape, other.shape)
        except RuntimeError:
            return False
        if not torch.equal(first.expand(shape), other.expand(shape)):
            return False
    return True
