"""Uniform marks: which dimension of a function's output counts the examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrad.function_kinds import (
    ALONG,
    CLASSES,
    KEEPING,
    LOSSES,
    REDUCE,
    VECTORS,
    along,
    is_pointwise,
)
from fastgrad.ownership import MANY, NONE, Mark, functions, tensors_in

UNLISTED = -3  # the function is not known here


def uniform(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: list[tuple[Tensor, Mark]],
    out: Tensor,
    n: int,
) -> int:
    """``NONE`` if the output has no dimension that tells examples apart, ``MANY.dim`` if examples
    meet other examples, :data:`UNLISTED` if the function has to be tried."""
    places = [(x, m.dim) for x, m in known if m.dim >= 0]
    if not places:
        return NONE
    rule = _RULES.get(func)
    if rule is not None:
        x, dim = places[0]
        if args and args[0] is x:
            return rule(x, dim, *args[1:], **kwargs)
        if kwargs.get("input") is x:
            return rule(x, dim, *args, **{k: v for k, v in kwargs.items() if k != "input"})
        return NONE
    if func in RESHAPES:
        return _only({_reshaped(x, d, out, n) for x, d in places})
    if func not in _EACH and not is_pointwise(func, args):
        return UNLISTED
    if func is torch.einsum and len(_letters(args, places)) > 1:
        return MANY.dim
    args, places = apart(args, places)
    return _only({position(func, args, kwargs, x, d, out) for x, d in places})


def apart(
    args: tuple[Any, ...], places: list[tuple[Tensor, Any]]
) -> tuple[tuple[Any, ...], list[tuple[Tensor, Any]]]:
    """A tensor that meets itself is two arguments: the rules tell these apart by what they are."""
    if len(args) > 1 and isinstance(args[0], Tensor) and args[0] is args[1]:
        again = args[0].detach()
        twice = [(again, d) for x, d in places if x is args[0]][:1]
        return (args[0], again, *args[2:]), places + twice
    return args, places


def position(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    """Where a dimension of one argument is in the result; ``NONE`` if it is gone, ``MANY.dim`` if
    what lies along it meets, :data:`UNLISTED` if that is not known."""
    if is_pointwise(func, args):
        return aligned(x, dim, out)
    rule = _EACH.get(func)
    return UNLISTED if rule is None else rule(func, args, kwargs, x, dim, out)


def _only(found: set[int]) -> int:
    """The one position that all inputs agree on; ``MANY.dim`` if examples meet other examples."""
    return found.pop() if len(found) == 1 else MANY.dim


def aligned(x: Tensor, dim: int, out: Tensor) -> int:
    """Broadcasting aligns dimensions from the right."""
    position = dim + out.ndim - x.ndim
    same = 0 <= position < out.ndim and out.shape[position] == x.shape[dim]
    return position if same else NONE


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


_MASKS = (torch.bool, torch.uint8)


def _index(x: Tensor, dim: int, /, key: Any, *rest: Any) -> int:
    keys = key if isinstance(key, tuple) else (key,)
    if dim != 0 or any(isinstance(k, Tensor | list) for k in keys[:1]):
        return NONE  # rows are picked
    if len([k for k in keys if isinstance(k, Tensor | list | int)]) > 1 and any(
        isinstance(k, Tensor | list) for k in keys
    ):
        return NONE  # what is indexed apart from each other comes to the front
    if keys[0] is Ellipsis:
        masks = [k for k in keys[1:] if isinstance(k, Tensor) and k.dtype in _MASKS]
        taken = sum(k is not None for k in keys[1:]) + sum(k.ndim - 1 for k in masks)
        return 0 if taken < x.ndim else NONE
    return 0 if keys[0] == slice(None) and isinstance(keys[0], slice) else NONE


def _lost(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    return NONE


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


def _repeat(x: Tensor, dim: int, /, repeats: Any = None, along: Any = None, **kw: Any) -> int:
    along = kw.get("dim", along)
    if not isinstance(along, int):
        return NONE
    return dim if along % x.ndim != dim or (dim == 0 and isinstance(repeats, int)) else NONE


def _moved(x: Tensor, dim: int, /, *args: Any, **kw: Any) -> int:
    sizes = torch.empty([d + 2 for d in range(x.ndim)], device="meta")  # no two alike
    return list(torch.movedim(sizes, *args, **kw).shape).index(dim + 2)


def _table() -> dict[Any, Callable[..., int]]:
    rules: dict[Callable[..., int], tuple[str, ...]] = {
        _transpose: ("transpose", "swapaxes", "swapdims", "transpose_", "swapaxes_", "swapdims_"),
        _permute: ("permute",),
        _reverse: ("t", "t_"),
        _swap_last: ("adjoint",),
        _index: ("__getitem__",),
        _flip: ("flip",),
        _roll: ("roll",),
        _select: ("select", "unbind"),
        _repeat: ("repeat_interleave",),
        _moved: ("movedim", "moveaxis"),
        _lost: ("take", "masked_select", "nonzero", "tile", "vstack", "rot90", "flipud",
                "fliplr", "block_diag",
                "__iter__", "unique", "unique_consecutive", "bincount", "histc",
                "msort", "as_strided", "diagonal", "diag", "trace"),
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
RESHAPES = functions("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
                     "reshape_as", "atleast_1d", "atleast_2d", "atleast_3d")  # fmt: skip
PRODUCTS = functions("matmul", "mm", "bmm", "__matmul__", "mv", "dot", "vdot",
                     "grouped_mm", "_grouped_mm")  # fmt: skip
MADE = functions("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like",
                 "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
                 "randint_like")  # fmt: skip


def _reshaped(x: Tensor, dim: int, out: Tensor, n: int) -> int:
    """The leading dimension counts examples, or examples times rows of each."""
    whole = out.ndim > 0 and out.numel() == x.numel() and out.shape[0] % n == 0
    return 0 if dim == 0 and whole else NONE


# -- functions of several tensors: where each one's position goes -----------------------------

Each = Callable[[Any, tuple[Any, ...], dict[str, Any], Tensor, int, Tensor], int]


def _place(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, *names: str) -> int:
    """Which argument a tensor is, by position or by the names of the first ones."""
    for i, name in enumerate(names):
        if (args[i] if i < len(args) else kwargs.get(name)) is x:
            return i
    return -1


def _product(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    """Matrix products contract the last dimension of the first factor with the last but one of
    the second; all others stay, aligned from the right."""
    if len(args) > 0 and args[0] is x:
        if dim == x.ndim - 1:
            return NONE
        return dim if len(args) > 1 and args[1].ndim == 1 else dim + out.ndim - x.ndim
    if dim == max(x.ndim - 2, 0):
        return NONE
    if len(args) > 0 and args[0].ndim == 1:  # a vector leaves no dimension
        return dim if dim < x.ndim - 2 else dim - 1
    return dim + out.ndim - x.ndim


def _sum_of_products(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    if args and args[0] is x:
        return aligned(x, dim, out)
    if func in _ADDS_BATCH:  # over which it sums
        return NONE if dim == 0 else _product(func, args[1:], kwargs, x, dim, out)
    return _product(func, args[1:], kwargs, x, dim, out)


def _linear(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    place = _place(args, kwargs, x, "input", "weight", "bias")
    if place == 0:
        return dim if dim < x.ndim - 1 else NONE
    return out.ndim - 1 if place > 0 and dim == 0 else NONE


def _bilinear(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    place = _place(args, kwargs, x, "input1", "input2")
    return dim if place >= 0 and dim < x.ndim - 1 else NONE


def _rows(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    return dim if dim < x.ndim - 1 else NONE


def _lookup(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    return dim if args and args[0] is x else MANY.dim  # rows of an activation are picked


def _letters(args: tuple[Any, ...], places: list[tuple[Tensor, int]]) -> set[str]:
    """What an einsum calls the examples' dimension, for each operand that has one."""
    equation, *operands = args
    if not isinstance(equation, str) or "." in equation:
        return set()
    terms = equation.replace(" ", "").split("->")[0].split(",")
    known = {id(x): d for x, d in places}
    pairs = zip(terms, tensors_in(operands), strict=True)
    return {term[known[id(t)]] for term, t in pairs if id(t) in known}


def _einsum(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    equation, *operands = args
    if not isinstance(equation, str) or "." in equation:
        return UNLISTED
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    terms = zip(left.split(","), tensors_in(operands), strict=True)
    return _only({right.find(term[dim]) for term, operand in terms if operand is x})


def _outer(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    return 0 if args and args[0] is x else 1


def _inner(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    if dim == x.ndim - 1:
        return NONE
    return dim if args and args[0] is x else dim + args[0].ndim - 1


def _distances(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    if dim == x.ndim - 1:
        return NONE
    second = dim == x.ndim - 2 and _place(args, kwargs, x, "x1", "x2") == 1
    return out.ndim - 1 if second else dim + out.ndim - x.ndim


def _over_features(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape", ())
    count = 1 if isinstance(shape, int) else len(shape)
    return dim if dim < x.ndim - count else NONE


def _leading(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    """Layers for images: examples lead."""
    same = dim == 0 and out.ndim == x.ndim and out.shape[0] == x.shape[0]
    return 0 if same else NONE


def _pool(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    """Channels and examples stay apart; the last one to three dimensions are pooled."""
    digits = [c for c in getattr(func, "__name__", "") if c.isdigit()]
    return dim if digits and dim < x.ndim - int(digits[-1]) else _leading(
        func, args, kwargs, x, dim, out
    )  # fmt: skip


def _convolution(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    first = _place(args, kwargs, x, "input", "weight") == 0
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    if weight.ndim != x.ndim:
        return NONE  # one picture without a dimension that counts
    return 0 if first and dim == 0 and x.ndim == out.ndim and x.shape[0] == out.shape[0] else NONE


def _joined(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    at = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    if func in _STACKS:
        return dim + 1 if at % out.ndim <= dim else dim
    return dim if at % out.ndim != dim else NONE


def _divided(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    place = 1 if func in _NARROW else 2
    at = args[place] if len(args) > place else kwargs.get("dim", 0)
    return dim if isinstance(at, int) and at % x.ndim != dim else NONE


def _expanded(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    return aligned(x, dim, out)


def _indexed(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    """Rows are picked along one dimension; all others stay."""
    at = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(at, int) or x.ndim != out.ndim or dim == at % x.ndim:
        return NONE
    return dim if out.shape[dim] == x.shape[dim] else NONE


def _pad(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    widths = list(args[1] if len(args) > 1 else kwargs.get("pad", ()))
    at = 2 * (x.ndim - 1 - dim)
    return NONE if any(widths[at : at + 2]) else dim


def _attention(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    place = aligned(x, dim, out)
    return place if 0 <= place < out.ndim - 2 else MANY.dim


def _along(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    if func in _BROADCAST:  # the dimension is one of both together
        full = max(t.ndim for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        over = along(func, args, kwargs, x.new_empty([1] * full))
        place = dim + full - x.ndim
        return NONE if over is None or place in over else place - sum(d < place for d in over)
    over = along(func, args, kwargs, x)
    if over is None or (dim in over and func not in KEEPING):
        return NONE
    if out.ndim >= x.ndim:  # at least as many dimensions: it keeps them all
        return dim
    return dim - sum(d < dim for d in over)


def _loss(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, dim: int, out: Tensor
) -> int:
    scores = func in CLASSES and _place(args, kwargs, x, "input") == 0
    if scores and (x.ndim == 1 or dim == 1):
        return MANY.dim  # scores of classes, which compete
    if func in _CTC and out.ndim == 1:
        return 0
    target = func in _COSINE and _place(args, kwargs, x, "input1", "input2", "target") == 2
    if func in VECTORS and not target and (x.ndim == 1 or dim == x.ndim - 1) and x.ndim >= out.ndim:
        return MANY.dim  # features, which make up one number
    if out.ndim == 0:
        return NONE
    dropped = func in CLASSES and out.ndim < x.ndim and dim > 1
    place = dim - 1 if dropped else dim
    return place if place < out.ndim and out.shape[place] == x.shape[dim] else NONE


def _each() -> dict[Any, Each]:
    rules: dict[Each, tuple[str, ...]] = {
        _product: ("matmul", "mm", "bmm", "__matmul__", "mv", "dot", "vdot",
                   "grouped_mm", "_grouped_mm"),
        _sum_of_products: ("addmm", "addmv", "baddbmm", "addbmm"),
        _linear: ("linear",),
        _bilinear: ("bilinear",),
        _rows: ("multinomial",),
        _lookup: ("embedding", "one_hot"),
        _outer: ("outer", "ger"),
        _inner: ("inner",),
        _distances: ("cdist",),
        _over_features: ("layer_norm", "rms_norm"),
        _leading: ("group_norm", "instance_norm", "batch_norm", "interpolate", "upsample",
                   "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "grid_sample",
                   "affine_grid", "fold", "local_response_norm"),
        _pool: tuple(f"{kind}_pool{d}d" for d in (1, 2, 3) for kind in (
            "max", "avg", "lp", "adaptive_avg", "adaptive_max")),
        _convolution: tuple(f"conv{t}{d}d" for d in (1, 2, 3) for t in ("", "_transpose")),
        _pad: ("pad",),
        _joined: ("cat", "concat", "concatenate", "stack"),
        _divided: ("chunk", "split", "tensor_split", "split_with_sizes", "narrow", "unsafe_chunk",
                   "unsafe_split"),
        _expanded: ("expand", "expand_as", "broadcast_to", "broadcast_tensors",
                    "repeat"),
        _indexed: ("gather", "take_along_dim", "index_select"),
        _attention: ("scaled_dot_product_attention",),
    }  # fmt: skip
    table: dict[Any, Each] = {f: rule for rule, names in rules.items() for f in functions(*names)}
    table[torch.einsum] = _einsum
    table |= dict.fromkeys((*ALONG, *REDUCE), _along)
    table |= dict.fromkeys(LOSSES, _loss)
    return table


_CTC, _COSINE = functions("ctc_loss"), functions("cosine_embedding_loss")
_BROADCAST = functions("cosine_similarity", "pairwise_distance")
_ADDS_BATCH, _STACKS, _NARROW = functions("addbmm"), functions("stack"), functions("narrow")
_EACH = _each()
# all that have rules here
BY_RULE = {*_RULES, *_EACH} | RESHAPES | MADE
