"""Which dimension of a tensor counts the examples: followed from the model's inputs on.

A size alone proves nothing: a batch of as many rows as a row has tokens looks the same either
way round. So each tensor that a probed forward pass makes carries a mark: the position of its
example dimension, or "none". Functions that move dimensions or pick rows are known by name; all
others keep the position if the size there is unchanged. Where the mark is lost (a function that
PyTorch does not announce), a size decides only if no other dimension of the batch has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

NONE = -1  # known to have no example dimension
_MARK = "_fastgrad_examples"


def mark(tensor: Tensor, batch: int, dim: int) -> None:
    setattr(tensor, _MARK, (batch, dim))


def marked(tensor: Tensor, batch: int) -> int | None:
    """Position of the example dimension, ``NONE``, or None if nothing is known."""
    found = getattr(tensor, _MARK, None)
    return found[1] if found is not None and found[0] == batch else None


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _swap(x: Tensor, dim: int, a: int, b: int) -> int:
    a, b = a % x.ndim, b % x.ndim
    return b if dim == a else a if dim == b else dim


def _transpose(x: Tensor, dim: int, *args: Any, **kw: Any) -> int:
    if len(args) == 2:
        return _swap(x, dim, args[0], args[1])
    if "dim0" in kw and "dim1" in kw:
        return _swap(x, dim, kw["dim0"], kw["dim1"])
    return NONE


def _permute(x: Tensor, dim: int, *args: Any, **kw: Any) -> int:
    order = kw.get("dims", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
    return [d % x.ndim for d in order].index(dim)


def _reverse(x: Tensor, dim: int, *args: Any, **kw: Any) -> int:
    return x.ndim - 1 - dim


def _index(x: Tensor, dim: int, key: Any, *rest: Any) -> int:
    keys = key if isinstance(key, tuple) else (key,)
    if dim != 0 or any(isinstance(k, Tensor | list) for k in keys[:1]):
        return NONE  # rows are picked: whose they are is no longer known
    if keys[0] is Ellipsis:
        taken = sum(k is not None for k in keys[1:])
        return 0 if taken < x.ndim else NONE
    return 0 if keys[0] == slice(None) and isinstance(keys[0], slice) else NONE


def _lost(x: Tensor, dim: int, *args: Any, **kw: Any) -> int:
    return NONE


def _gather(x: Tensor, dim: int, *args: Any, **kw: Any) -> int:
    along = args[0] if args else kw.get("dim", 0)
    return dim if isinstance(along, int) and along % x.ndim != dim else NONE


def _stack(x: Tensor, dim: int, *args: Any, **kw: Any) -> int:
    at = args[0] if args else kw.get("dim", 0)
    return dim + 1 if at % (x.ndim + 1) <= dim else dim


def _table() -> dict[Any, Callable[..., int]]:
    rules = {
        _transpose: ("transpose", "swapaxes", "swapdims", "transpose_"),
        _permute: ("permute",),
        _reverse: ("t", "adjoint"),
        _index: ("__getitem__",),
        _gather: ("gather", "index_select", "flip", "roll", "unbind", "repeat_interleave",
                  "take_along_dim", "scatter", "scatter_add", "index_add", "select"),
        _stack: ("stack",),
        _lost: ("take", "movedim", "moveaxis", "masked_select", "nonzero", "tile", "vstack",
                "broadcast_tensors", "tensordot", "outer", "cdist"),
    }  # fmt: skip
    table: dict[Any, Callable[..., int]] = {}
    for rule, names in rules.items():
        for name in names:
            for owner in (torch, Tensor):
                if hasattr(owner, name):
                    table[getattr(owner, name)] = rule
    for name in ("T", "mT", "H", "mH"):
        table[getattr(Tensor, name).__get__] = _reverse if name in "TH" else _swap_last
    return table


def _swap_last(x: Tensor, dim: int) -> int:
    return _swap(x, dim, -1, -2)


def _functions(*names: str) -> set[Any]:
    return {getattr(o, n) for n in names for o in (torch, Tensor, torch.nn.functional)
            if hasattr(o, n)}  # fmt: skip


_RULES = _table()
_RESHAPES = _functions("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as")
_LOOKUPS = _functions("embedding", "one_hot")  # new dimensions come behind
_PRODUCTS = _functions("matmul", "mm", "bmm", "__matmul__", "__rmatmul__")
_MADE = _functions("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")


def propagate(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, batch: int, n: int
) -> None:
    """Mark the output of ``func(*args, **kwargs)`` in a batch of ``n`` examples."""
    known = [
        (t, dim)
        for t in _tensors((*args, *kwargs.values()))
        if (dim := marked(t, batch)) is not None
    ]
    if not known:
        return
    rule = _RULES.get(func)
    for tensor in _tensors((out,)):
        if any(tensor is t for t, _ in known):
            continue  # in place, or handed through: it keeps its mark
        if rule is not None:
            x, dim = known[0]
            position = rule(x, dim, *args[1:], **kwargs) if dim != NONE else NONE
        elif func is torch.einsum:
            position = _einsum(args, known)
        elif func in _PRODUCTS:
            position = _product(args, known, tensor)
        else:
            found = {_kept(func, args, kwargs, x, d, tensor, n) for x, d in known if d != NONE}
            found.discard(NONE)
            position = found.pop() if len(found) == 1 else NONE
        mark(tensor, batch, position)


def _kept(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor,
    n: int,
) -> int:  # fmt: skip
    """Position after a function without a rule of its own."""
    if func in _RESHAPES:
        # The leading dimension counts examples, or examples times rows of each.
        whole = out.ndim > 0 and out.numel() == x.numel() and out.shape[0] % n == 0
        return 0 if dim == 0 and whole else NONE
    if func in _MADE:
        return dim if out.shape == x.shape else NONE
    if out.ndim < x.ndim:  # a reduction: over which dimensions?
        over = kwargs.get("dim", args[1] if len(args) > 1 else None)
        over = (over,) if isinstance(over, int) else over
        if not isinstance(over, list | tuple) or not all(isinstance(d, int) for d in over):
            return NONE
        gone = {d % x.ndim for d in over}
        return NONE if dim in gone else dim - sum(d < dim for d in gone)
    # broadcasting aligns dimensions from the right
    position = dim if func in _LOOKUPS else dim + out.ndim - x.ndim
    same = position < out.ndim and out.shape[position] == x.shape[dim]
    return position if same else NONE


def _einsum(args: tuple[Any, ...], known: list[tuple[Tensor, int]]) -> int:
    equation, *operands = args
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return NONE
    left, right = equation.replace(" ", "").split("->")
    found = set()
    for term, operand in zip(left.split(","), list(_tensors(operands)), strict=True):
        for x, dim in known:
            if x is operand and dim != NONE:
                found.add(right.find(term[dim]))
    return found.pop() if len(found) == 1 else NONE


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
    return found.pop() if len(found) == 1 else NONE
