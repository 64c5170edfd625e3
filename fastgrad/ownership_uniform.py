"""Uniform marks: which dimension of a function's output counts the examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrad.ownership import MANY, NONE, Mark, functions, tensors_in


def uniform(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: list[tuple[Tensor, Mark]],
    out: Tensor,
    n: int,
) -> int:
    rule = _RULES.get(func)
    places = [(x, m.dim if m.dim >= 0 else NONE) for x, m in known]
    if rule is not None:
        x, dim = places[0]
        return rule(x, dim, *args[1:], **kwargs) if dim != NONE else NONE
    if func is torch.einsum:
        return _einsum(args, places)
    if func in PRODUCTS:
        return _product(args, places, out)
    found = {_kept(func, args, kwargs, x, d, out, n) for x, d in places if d != NONE}
    found.discard(NONE)
    return _only(found)


def _only(found: set[int]) -> int:
    """The one position that all inputs agree on; ``MANY.dim`` if examples meet other examples."""
    places = found - {NONE}
    if len(places) > 1:
        return MANY.dim
    return found.pop() if len(found) == 1 else NONE


def _swap(x: Tensor, dim: int, a: int, b: int) -> int:
    a, b = a % x.ndim, b % x.ndim
    return b if dim == a else a if dim == b else dim


def _transpose(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    if len(args) == 2:
        return _swap(x, dim, args[0], args[1])
    if "dim0" in kw and "dim1" in kw:
        return _swap(x, dim, kw["dim0"], kw["dim1"])
    return NONE


def _permute(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    order = kw.get("dims", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
    return [d % x.ndim for d in order].index(dim)


def _reverse(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    return x.ndim - 1 - dim


def _swap_last(x: Tensor, dim: int) -> int:
    return _swap(x, dim, -1, -2)


def _index(x: Tensor, dim: int, /, key: Any, *rest: Any) -> int:
    keys = key if isinstance(key, tuple) else (key,)
    if dim != 0 or any(isinstance(k, Tensor | list) for k in keys[:1]):
        return NONE  # rows are picked
    if keys[0] is Ellipsis:
        taken = sum(k is not None for k in keys[1:])
        return 0 if taken < x.ndim else NONE
    return 0 if keys[0] == slice(None) and isinstance(keys[0], slice) else NONE


def _lost(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    return NONE


def _gather(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    along = args[0] if args else kw.get("dim", 0)
    return dim if isinstance(along, int) and along % x.ndim != dim else NONE


def _sorted(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    """Position if another dimension is sorted."""
    along = kw.get("dim", next((a for a in args if type(a) is int), -1))
    return dim if along % x.ndim != dim else NONE


def _select(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    """One index of a dimension is taken, or each by itself: that dimension goes."""
    along = args[0] if args else kw.get("dim", 0)
    if not isinstance(along, int) or along % x.ndim == dim:
        return NONE
    return dim - (along % x.ndim < dim)


def _flip(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    over = kw.get("dims", args[0] if args and not isinstance(args[0], int) else args)
    return NONE if dim in {d % x.ndim for d in over} else dim


def _roll(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    over = kw.get("dims", args[1] if len(args) > 1 else None)
    over = (over,) if isinstance(over, int) else over
    return dim if over and all(d % x.ndim != dim for d in over) else NONE


def _repeat(x: Tensor, dim: int, /, repeats: Any, along: Any = None, **kw: Any) -> int:
    along = kw.get("dim", along)
    if not isinstance(along, int):
        return NONE
    return dim if along % x.ndim != dim or (dim == 0 and isinstance(repeats, int)) else NONE


def _stack(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    at = args[0] if args else kw.get("dim", 0)
    return dim + 1 if at % (x.ndim + 1) <= dim else dim


def _table() -> dict[Any, Callable[..., int]]:
    rules: dict[Callable[..., int], tuple[str, ...]] = {
        _transpose: ("transpose", "swapaxes", "swapdims", "transpose_"),
        _permute: ("permute",),
        _reverse: ("t", "adjoint"),
        _index: ("__getitem__",),
        _gather: ("gather", "index_select", "take_along_dim", "scatter",
                  "scatter_add", "index_add"),
        _flip: ("flip",),
        _roll: ("roll",),
        _select: ("select", "unbind"),
        _repeat: ("repeat_interleave",),
        _stack: ("stack",),
        _lost: ("take", "movedim", "moveaxis", "masked_select", "nonzero", "tile", "vstack",
                "broadcasttensors_in", "tensordot", "outer", "cdist", "__iter__", "unique",
                "unique_consecutive", "bincount", "histc"),
        _sorted: ("sort", "argsort", "topk", "msort"),
    }  # fmt: skip
    table: dict[Any, Callable[..., int]] = {}
    for rule, names in rules.items():
        for name in names:
            for func in functions(name):
                table[func] = rule
    for name in ("T", "mT", "H", "mH"):
        table[getattr(Tensor, name).__get__] = _reverse if name in "TH" else _swap_last
    return table


_RULES = _table()
RESHAPES = functions("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as")
LOOKUPS = functions("embedding", "one_hot")  # new dimensions come behind
PRODUCTS = functions("matmul", "mm", "bmm", "__matmul__", "__rmatmul__")
MADE = functions("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")
# all that have rules here
BY_RULE = {*_RULES, torch.einsum} | RESHAPES | LOOKUPS | PRODUCTS | MADE


def _kept(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor,
    n: int,
) -> int:  # fmt: skip
    """Position after a function without a rule of its own."""
    if func in RESHAPES:
        # The leading dimension counts examples, or examples times rows of each.
        whole = out.ndim > 0 and out.numel() == x.numel() and out.shape[0] % n == 0
        return 0 if dim == 0 and whole else NONE
    if func in MADE:
        return dim if out.shape == x.shape else NONE
    if out.ndim < x.ndim:  # a reduction: over which dimensions?
        gone = reduced(args, kwargs, x)
        return NONE if gone is None or dim in gone else dim - sum(d < dim for d in gone)
    # broadcasting aligns dimensions from the right
    position = dim if func in LOOKUPS else dim + out.ndim - x.ndim
    same = position < out.ndim and out.shape[position] == x.shape[dim]
    return position if same else NONE


def reduced(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> set[int] | None:
    """The dimensions that a reduction takes away, None if they cannot be read."""
    over = kwargs.get("dim", args[1] if len(args) > 1 else None)
    over = (over,) if isinstance(over, int) else over
    if not isinstance(over, list | tuple) or not all(isinstance(d, int) for d in over):
        return None
    return {d % x.ndim for d in over}


def _einsum(args: tuple[Any, ...], known: list[tuple[Tensor, int]]) -> int:
    equation, *operands = args
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return NONE
    left, right = equation.replace(" ", "").split("->")
    found = set()
    for term, operand in zip(left.split(","), list(tensors_in(operands)), strict=True):
        for x, dim in known:
            if x is operand and dim != NONE:
                found.add(right.find(term[dim]))
    return _only(found)


def _product(args: tuple[Any, ...], known: list[tuple[Tensor, int]], out: Tensor) -> int:
    """Matrix products contract the last dimension of the first factor with the last but one of
    the second; all others stay, aligned from the right."""
    found = set()
    for x, dim in known:
        if dim == NONE:
            continue
        first = len(args) > 0 and args[0] is x
        contracted = x.ndim - 1 if first else max(x.ndim - 2, 0)
        found.add(NONE if dim == contracted else dim + out.ndim - x.ndim)
    return _only(found)
