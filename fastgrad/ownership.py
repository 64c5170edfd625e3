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

from collections.abc import Callable, Iterable
from functools import partial
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


def propagate(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, batch: int, n: int
) -> bool:
    """Mark the output of ``func(*args, **kwargs)`` in a batch of ``n`` examples.

    True if activations of different examples were mixed: one example's loss then depends on the
    others, and its gradient in the batch is not that which it would have alone.
    """
    known = [
        (t, m) for t in _tensors((*args, *kwargs.values())) if (m := marked(t, batch)) is not None
    ]
    if func in _WRITES:
        _written(func, args, kwargs, known, out, batch, n)
        return False
    if not known:
        return False
    outs = [t for t in _tensors((out,)) if not any(t is k for k, _ in known)]
    owned = [(t, m) for t, m in known if m.owned]
    many = any(m is MANY and t.requires_grad for t, m in known)
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
        dim = _uniform(func, args, kwargs, known, tensor, n) if simple else NONE
        if dim < 0:
            left.append((i, tensor))
            if dim == _MANY and n > 1:
                mixing = True
        mark(tensor, batch, Mark(dim) if dim >= 0 else _unowned(tensor, owned))
    if left and (not simple or func in _PICKS):
        found = _explicit(func, args, kwargs, known, outs, n)
        for i, tensor in left:
            new = found[i] if i < len(found) else None
            if new is not None:
                mark(tensor, batch, new if new.owned else _unowned(tensor, owned))
    return mixing


def _unowned(out: Tensor, owned: list[tuple[Tensor, Mark]]) -> Mark:
    return MANY if out.requires_grad and any(t.requires_grad for t, _ in owned) else NOBODY


_NORMS = {torch.nn.functional.batch_norm, torch.batch_norm}


def _of_batch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a batch norm takes its statistics from the batch."""
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


# -- uniform marks: positions only -------------------------------------------------------


def _uniform(
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
    if func in _PRODUCTS:
        return _product(args, places, out)
    found = {_kept(func, args, kwargs, x, d, out, n) for x, d in places if d != NONE}
    found.discard(NONE)
    return _only(found)


def _only(found: set[int]) -> int:
    """The one position that all inputs agree on; ``_MANY`` if examples meet other examples."""
    places = found - {NONE}
    if len(places) > 1:
        return _MANY
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


def _roll(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    """The last argument names the dimensions along which indices move."""
    over = kw.get("dims", args[-1] if args else None)
    over = (over,) if isinstance(over, int) else over
    if not isinstance(over, list | tuple):
        return NONE
    return dim if all(d % x.ndim != dim for d in over) else NONE


def _repeat(x: Tensor, dim: int, /, repeats: Any, along: Any = None, **kw: Any) -> int:
    along = kw.get("dim", along)
    if not isinstance(along, int):
        return NONE
    return dim if along % x.ndim != dim or (dim == 0 and isinstance(repeats, int)) else NONE


def _stack(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    at = args[0] if args else kw.get("dim", 0)
    return dim + 1 if at % (x.ndim + 1) <= dim else dim


def _functions(*names: str) -> set[Any]:
    return {getattr(o, n) for n in names for o in (torch, Tensor, torch.nn.functional)
            if hasattr(o, n)}  # fmt: skip


def _table() -> dict[Any, Callable[..., int]]:
    rules: dict[Callable[..., int], tuple[str, ...]] = {
        _transpose: ("transpose", "swapaxes", "swapdims", "transpose_"),
        _permute: ("permute",),
        _reverse: ("t", "adjoint"),
        _index: ("__getitem__",),
        _gather: ("gather", "index_select", "take_along_dim", "scatter",
                  "scatter_add", "index_add"),
        _roll: ("flip", "roll"),
        _select: ("select", "unbind"),
        _repeat: ("repeat_interleave",),
        _stack: ("stack",),
        _lost: ("take", "movedim", "moveaxis", "masked_select", "nonzero", "tile", "vstack",
                "broadcast_tensors", "tensordot", "outer", "cdist", "__iter__", "unique",
                "unique_consecutive", "bincount", "histc"),
        _sorted: ("sort", "argsort", "topk", "msort"),
    }  # fmt: skip
    table: dict[Any, Callable[..., int]] = {}
    for rule, names in rules.items():
        for name in names:
            for func in _functions(name):
                table[func] = rule
    for name in ("T", "mT", "H", "mH"):
        table[getattr(Tensor, name).__get__] = _reverse if name in "TH" else _swap_last
    return table


_RULES = _table()
_RESHAPES = _functions("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as")
_LOOKUPS = _functions("embedding", "one_hot")  # new dimensions come behind
_PRODUCTS = _functions("matmul", "mm", "bmm", "__matmul__", "__rmatmul__")
_MADE = _functions("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")


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
        gone = _reduced(args, kwargs, x)
        return NONE if gone is None or dim in gone else dim - sum(d < dim for d in gone)
    # broadcasting aligns dimensions from the right
    position = dim if func in _LOOKUPS else dim + out.ndim - x.ndim
    same = position < out.ndim and out.shape[position] == x.shape[dim]
    return position if same else NONE


def _reduced(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> set[int] | None:
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
    for term, operand in zip(left.split(","), list(_tensors(operands)), strict=True):
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


# -- explicit marks: the owners go through the function themselves -------------------------

_VIEWS = _functions(
    "transpose", "swapaxes", "swapdims", "permute", "t", "adjoint", "movedim", "moveaxis",
    "unsqueeze", "squeeze", "select", "narrow", "chunk", "split", "tensor_split", "unbind",
    "flatten", "unflatten", "view", "reshape", "view_as", "expand", "expand_as", "broadcast_to",
    "diagonal", "__iter__",
) | {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}  # fmt: skip
_GETITEM = _functions("__getitem__")
_ROLLS = _functions("flip", "roll")
_REPEATS = _functions("repeat_interleave")
_INDEX_SELECT = _functions("index_select")
_CAT = _functions("cat", "concat", "concatenate")
_STACKS = _functions("stack")
_SORTS = _functions("sort", "argsort")
_PICKS = (
    _VIEWS | _GETITEM | _ROLLS | _REPEATS | _INDEX_SELECT | _CAT | _STACKS | _SORTS
)  # what may turn a uniform mark into an explicit one
_WRITES = {Tensor.index_add_, Tensor.__setitem__, Tensor.index_copy_, Tensor.index_put_}
_WRITES |= _functions("index_add")


def _explicit(
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
            results = list(_tensors((_moved(func, x, own, args, kwargs),)))
        except (RuntimeError, IndexError, TypeError, ValueError):
            return []
        picked = func in _GETITEM | _INDEX_SELECT
        settle = partial(_settled, n=n) if picked else partial(Mark, NONE)
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
    return [_settled(owner.expand(x.shape)[outs[-1]], n) for _ in outs]


def _settled(owner: Tensor, n: int) -> Mark:
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
        return _picked(x, owner, args[1])
    if func in _INDEX_SELECT | _REPEATS | _ROLLS:
        wide = owner.expand(x.shape)
        # keep the dimensions that say nothing from being copied
        dim = args[-1] if func in _REPEATS else args[1] if len(args) > 1 else None
        along = kwargs.get("dim", kwargs.get("dims", dim))
        if isinstance(along, int):
            keep = along % x.ndim
            wide = owner if owner.shape[keep] > 1 else owner.transpose(0, 0)
            if owner.shape[keep] == 1:
                return owner
        return func(wide, *args[1:], **kwargs)
    wide = owner.expand(x.shape)
    reshaped = func in _functions("view", "reshape", "view_as", "flatten", "unflatten")
    if not reshaped:
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


def _picked(x: Tensor, owner: Tensor, key: Any) -> Tensor:
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
    parts = list(_tensors((args[0] if args else kwargs.get("tensors"),)))
    along = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if any(id(p) not in owners for p in parts):
        return NOBODY
    found = [owners[id(p)] for p in parts]
    if func in _STACKS:
        found = [o.unsqueeze(along % out.ndim) for o in found]
    elif all(o.shape[along] == 1 for o in found) and _all_same(found):
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
    """Elementwise functions, reductions, products and lookups."""
    found: list[tuple[Tensor, Mark]] = []
    for x, m in known:
        if id(x) not in owners:
            continue
        owner = _through(func, args, kwargs, x, owners[id(x)], out)
        if owner is not None:
            found.append((owner, m))
    if not found:
        return NOBODY
    if func in _PRODUCTS:  # the rows of the first factor are the rows of the result
        return _checked(found[0][0], out)
    if not _all_same([o for o, _ in found]):
        return NOBODY
    for owner, m in found:
        if m.owner is None:  # a uniform mark says the same at less cost
            dims = [d for d in range(owner.ndim) if owner.shape[d] > 1]
            if len(dims) == 1 and out.shape[dims[0]] == owner.shape[dims[0]]:
                return Mark(dims[0])
    return _checked(found[0][0], out)


def _through(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, owner: Tensor, out: Tensor
) -> Tensor | None:
    """Owners of the output as far as one input tells; None if they are lost."""
    if func in _LOOKUPS:
        return owner.view(*owner.shape, *[1] * (out.ndim - owner.ndim))
    if func in _MADE:
        return owner if out.shape == x.shape else None
    if func in _PRODUCTS:
        contracted = x.ndim - 1 if args and args[0] is x else max(x.ndim - 2, 0)
        if owner.shape[contracted] > 1:
            return None
        return owner.view([1] * (out.ndim - owner.ndim) + list(owner.shape))
    if out.ndim < x.ndim:
        gone = _reduced(args, kwargs, x)
        if gone is None:
            return None
        for d in sorted(gone, reverse=True):
            first = owner.narrow(d, 0, 1)
            if owner.shape[d] > 1 and not bool((owner == first).all()):
                return None
            owner = first.squeeze(d)
        return owner
    owner = owner.view([1] * (out.ndim - owner.ndim) + list(owner.shape))
    fits = all(a in (1, b) for a, b in zip(owner.shape, out.shape, strict=True))
    return owner if fits else None


def _all_same(owners: list[Tensor]) -> bool:
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
    if func in _functions("index_add", "index_add_"):
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
        there, own = _picked(x, owner, key), theirs.explicit(source, n)
        own = own.view([1] * (there.ndim - own.ndim) + list(own.shape))
        if ours.owner is not None and bool((there == NONE).any()):
            owner = owner.clone()
            owner[key] = own.expand(there.shape)
            found = Mark(NONE, owner) if bool((there == NONE).all()) else NOBODY
        else:
            found = ours if _all_same([there, own]) else NOBODY
    except (RuntimeError, IndexError):
        found = NOBODY
    mark(target, batch, found)


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
