"""How each function that PyTorch offers uses a parameter that meets the examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.derived import (
    Root,
    Sink,
    beyond,
    expanded_size,
    lookup_hook,
    roots_of,
    set_root,
    spread_over,
)
from fastgrad.ownership import NOBODY, Mark, marked
from fastgrad.propagation import propagate
from fastgrad.records import Batch
from fastgrad.regions import region_of
from fastgrad.rows import Rows
from fastgrad.tap_functions import ConvTap, GroupedTap, LayerNormTap, LinearTap


def ownership(x: Tensor, batch: Batch) -> Mark:
    """Which of an activation's dimensions tell examples apart.

    The mark that the tensor carries decides (:mod:`fastgrad.ownership`). Without a mark, an
    activation's leading dimension counts as examples only if no other dimension of the batch has
    that size.
    """
    n = batch.n_examples
    found = marked(x, batch.index)
    if found is None and x._base is not None:
        found = _mark_of_base(x, batch)
    plausible = x.requires_grad and not isinstance(x, torch.nn.Parameter) and x.ndim > 0
    if found is None and plausible:
        if batch.owner is not None:
            if x.shape[:2] == batch.owner.shape:
                found = Mark(-1, batch.owner.view(*batch.owner.shape, *[1] * (x.ndim - 2)))
        elif n == 1 or (x.shape[0] == n and n not in batch.other_sizes):
            found = Mark(0)
    if n == 1 and (found is None or not found.owned) and x.ndim > 0 and (plausible or found):
        return Mark(0)  # all that is of one example
    return found or NOBODY


def _mark_of_base(x: Tensor, batch: Batch) -> Mark | None:
    """A view that covers a marked tensor, one example after the other in memory."""
    base = x._base
    of_base = None if base is None else marked(base, batch.index)
    if base is None or of_base is None or of_base.dim != 0 or not x.is_contiguous() or x.ndim == 0:
        return None
    ordered = base.stride(0) * base.shape[0] == x.numel() == base.numel()
    return Mark(0) if ordered and x.shape[0] % batch.n_examples == 0 else None


def example_rows(x: Tensor, batch: Batch, features: int = 1) -> Rows | None:
    """How the rows of ``x [..., *features]`` (the last ``features`` dimensions) belong to
    examples; None if that cannot be known."""
    lead = x.shape[: x.ndim - features]
    if not lead or 0 in x.shape[x.ndim - features :]:
        return None
    n, rows = batch.n_examples, math.prod(lead)
    if n == 1:
        return Rows.uniform(1, rows)
    found = ownership(x, batch)
    if found.owner is None:
        if not 0 <= found.dim < len(lead) or lead[found.dim] % n:
            return None
        if found.dim == 0:
            return Rows.uniform(n, rows // n)
    owner = found.explicit(x, n)
    if math.prod(owner.shape[len(lead) :]) != 1:
        return None
    return batch.rows_of(owner.reshape(owner.shape[: len(lead)]), lead)


def _cast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, cast as the function itself would; autograd sees the casts."""
    if not torch.is_autocast_enabled(x.device.type):
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))


def _sinks(batch: Batch, *tensors: Tensor | None) -> list[Sink | None]:
    return [None if t is None else Sink.of(t, batch) for t in tensors]


def _refuse(sinks: Sequence[Sink | None], reason: str) -> Any:
    for sink in sinks:
        if sink is not None:
            sink.refuse(reason)
    return NotImplemented


def _constant(x: Tensor, batch: Batch) -> bool:
    """No activation: something that does not depend on the examples."""
    return not x.requires_grad and marked(x, batch.index) is None


# -- products ----------------------------------------------------------------------------


def _product(
    batch: Batch, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> Any:
    if weight.ndim != 2 or roots_of(x, batch) or _constant(x, batch):
        return NotImplemented
    if bias is not None and bias.shape != weight.shape[int(transposed) :][:1]:
        return NotImplemented  # a broadcast bias is not what layers have
    sinks = _sinks(batch, weight, bias)
    rows = example_rows(x, batch)
    if rows is None:
        return _refuse(
            sinks,
            f"its layer saw an input of shape {tuple(x.shape)}, whose rows cannot be "
            f"assigned to the batch's {batch.n_examples} examples",
        )
    for sink, tensor in zip(sinks, (weight, bias), strict=True):
        if sink is not None and tensor is not None:
            large = sink.too_large(tensor, batch.n_examples)
            if large:
                return _refuse([sink], large)
    if sinks[0] is not None:
        sinks[0].expect_product(weight)
    if sinks[1] is not None and bias is not None:
        sinks[1].expect_dense(bias)
    x, weight, bias = _cast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return LinearTap.apply(x, weight, bias, transposed, rows, *sinks)


def _linear(
    batch: Batch, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    return _product(batch, input, weight, bias, transposed=False)


def _addmm(
    batch: Batch, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any
) -> Any:
    if kwargs or input.ndim != 1:  # scaled sums are not what layers compute
        return NotImplemented
    return _product(batch, mat1, mat2, input, transposed=True)


def _matmul(batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 2 or not all(isinstance(a, Tensor) for a in args):
        return NotImplemented
    x, weight = args
    if not roots_of(weight, batch) or x.ndim < 2:
        return NotImplemented
    return _product(batch, x, weight, None, transposed=True)


def _grouped(
    batch: Batch, func: Any, x: Tensor, weight: Tensor, offs: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Rows sorted by expert times a stack of matrices, the experts of one parameter."""
    sink = Sink.of(weight, batch)
    simple = isinstance(offs, Tensor) and x.ndim == 2 and weight.ndim == 3 and not args
    if sink is None or not simple or any(v is not None for v in kwargs.values()):
        return NotImplemented
    n, found = batch.n_examples, ownership(x, batch)
    owner = found.explicit(x, n) if found.owned else None
    if owner is None or owner.shape[1] != 1:
        return _refuse(
            [sink],
            f"its experts saw an input of shape {tuple(x.shape)}, whose rows cannot be assigned "
            f"to the batch's {n} examples",
        )
    places = [None if len(sink.roots) > 1 else region_of(w, sink.roots[0].tensor) for w in weight]
    views = sink.roots[0].ids is None and None not in places
    size = expanded_size(weight, sink.roots, n)
    if not views and size > sink.limit:
        return _refuse([sink], beyond(size, sink.limit))
    flat = owner.expand(x.shape[0], 1).reshape(-1).cpu()
    experts, start = [], 0
    for e, end in enumerate(offs.tolist()):
        if end > start:
            rows = Rows.of(flat[start:end].to(x.device), n)
            place = places[e] if views else None
            experts.append((e, start, end, rows, place))
            if place is not None:
                sink.roots[0].record.expect("product", place[0])
        start = end
    if not views:
        sink.expect_dense(weight)
    return GroupedTap.apply(x, weight, offs, sink, experts)


def _conv(
    batch: Batch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    x, nd, n = input, weight.ndim - 2, batch.n_examples
    if x.ndim != nd + 2 or roots_of(x, batch) or _constant(x, batch):
        return NotImplemented
    stride, dilation = ([v] * nd if isinstance(v, int) else list(v) for v in (stride, dilation))
    sinks = _sinks(batch, weight, bias)
    found = ownership(x, batch)
    if found.dim != 0 or x.shape[0] % n:
        return _refuse(
            sinks,
            f"its convolution saw an input of shape {tuple(x.shape)}, whose leading dimension "
            f"is not known to count the batch's {n} examples",
        )
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [t // 2 for t in total]
        if any(t % 2 for t in total):  # one more behind
            x = F.pad(x, [side for t in reversed(total) for side in (0, t % 2)])
    padding = [padding] * nd if isinstance(padding, int) else list(padding)
    sink = sinks[0]
    if sink is not None:
        dense = groups > 1
        large = sink.too_large(weight, n)
        if dense and n * weight.numel() > sink.limit:
            large = beyond(n * weight.numel(), sink.limit)
        if large:
            return _refuse(sinks, large)
        if dense:
            sink.expect_dense(weight)
        else:
            sink.expect_product(weight)
    if sinks[1] is not None and bias is not None:
        sinks[1].expect_dense(bias)
    x, weight, bias = _cast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return ConvTap.apply(x, weight, bias, stride, padding, dilation, groups, n, *sinks)


# -- lookups -----------------------------------------------------------------------------


def _embedding(
    batch: Batch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    record = batch.lookup(weight)
    if record is None:
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq or sparse:
        record.refuse("its embedding uses max_norm, scale_grad_by_freq or sparse gradients")
        return func(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    skipped = None if padding_idx is None else padding_idx % weight.shape[0]
    return _looked_up(batch, Root(record, weight, input, skipped), func(input, weight, padding_idx))


def _getitem(batch: Batch, func: Any, x: Tensor, key: Any) -> Any:
    record = batch.lookup(x)
    ids = isinstance(key, Tensor) and key.ndim > 0 and not key.is_floating_point()
    if record is None or not ids or key.dtype in (torch.bool, torch.uint8):
        return NotImplemented
    return _looked_up(batch, Root(record, x, key), func(x, key))


def _looked_up(batch: Batch, root: Root, out: Tensor) -> Any:
    record, ids = root.record, root.ids
    assert ids is not None
    if _constant(ids, batch):  # to be attributed where it meets the examples
        set_root(out, record, ids.long() % root.tensor.shape[0], root.padding)
        return out
    rows = example_rows(ids, batch, 0)
    if rows is None:
        record.refuse(
            f"its embedding was looked up with ids of shape {tuple(ids.shape)}, which cannot be "
            f"assigned to the batch's {batch.n_examples} examples"
        )
        return out
    flat = ids.reshape(-1).long() % root.tensor.shape[0]
    record.expect_lookup(rows.ordered(flat), rows)
    out.register_hook(lookup_hook(root, flat, rows))
    return out


# -- norms -------------------------------------------------------------------------------


def _layer_norm(
    batch: Batch,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
) -> Any:
    sinks = _sinks(batch, weight, bias)
    if roots_of(input, batch) or _constant(input, batch):
        return NotImplemented
    if weight is None or any(s is not None and not s.direct for s in sinks):
        out = func(input, normalized_shape, None, None, eps)
        propagate(func, (input,), {}, out, batch.index, batch.n_examples)
        return _affine(batch, out, weight, bias)
    rows = example_rows(input, batch, len(normalized_shape))
    if rows is None:
        return _refuse(
            sinks,
            f"its layer norm saw an input of shape {tuple(input.shape)} without an "
            f"example dimension of {batch.n_examples}",
        )
    records = [None if s is None else s.roots[0].record for s in sinks]
    for record in records:
        if record is not None:
            record.expect("dense", None)
    if torch.is_autocast_enabled(input.device.type):  # autocast runs layer norm in float32
        input, weight = input.float(), weight.float()
        bias = None if bias is None else bias.float()
    return LayerNormTap.apply(input, list(normalized_shape), weight, bias, eps, rows, *records)


def _rms_norm(
    batch: Batch,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if roots_of(input, batch) or _constant(input, batch):
        return NotImplemented
    out = func(input, normalized_shape, None, eps)
    propagate(func, (input,), {}, out, batch.index, batch.n_examples)
    out = _affine(batch, out, weight, None)
    return out if out is NotImplemented else out.to(input.dtype)


def _affine(batch: Batch, out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
    """``out * weight + bias``, either of them perhaps a parameter's."""
    for func, tensor in ((torch.mul, weight), (torch.add, bias)):
        if tensor is None:
            continue
        if roots_of(tensor, batch):
            new = broadcast(batch, func, out, tensor)
            if new is NotImplemented:
                return NotImplemented
        else:
            new = func(out, tensor)
        propagate(func, (out, tensor), {}, new, batch.index, batch.n_examples)
        out = new
    return out


def _attention(
    batch: Batch,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Scores that all examples share, as relative positions are, added inside attention."""
    found = ownership(query, batch)
    if attn_mask is None or any(roots_of(t, batch) for t in (query, key, value)):
        return NotImplemented
    roots, scores = roots_of(attn_mask, batch), query.new_empty(1).expand(*query.shape[:-1], 1)
    if not found.owned or found.dim >= query.ndim - 2 or not roots:
        return NotImplemented
    if attn_mask.ndim == query.ndim and attn_mask.shape[max(found.dim, 0)] > 1:
        return NotImplemented
    spread = spread_over(attn_mask, roots, scores, found, batch)
    if isinstance(spread, str):
        return _refuse([Sink(roots, False)], f"used by {func.__name__}: {spread}")
    return func(query, key, value, spread, *args, **kwargs)


# -- elementwise -------------------------------------------------------------------------


def broadcast(batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Elementwise functions: what is made of parameters is expanded over the examples."""
    roots = [roots_of(a, batch) if isinstance(a, Tensor) else () for a in args]
    if any(isinstance(v, Tensor) for v in kwargs.values()) or (func in _INPLACE and roots[0]):
        return NotImplemented
    partners = [a for a, r in zip(args, roots, strict=True) if isinstance(a, Tensor) and not r]
    owned = [(p, m) for p in partners if (m := ownership(p, batch)).owned]
    if not owned:
        return NotImplemented
    x, found = max(owned, key=lambda pair: pair[0].ndim)
    new = list(args)
    for i, own in enumerate(roots):
        if own:
            spread = spread_over(args[i], own, x, found, batch)
            if isinstance(spread, str):
                for root in own:
                    root.record.refuse(f"used by {getattr(func, '__name__', func)}: {spread}")
                return NotImplemented
            new[i] = spread
    return func(*new, **kwargs)


INPLACE = ("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__")
_INPLACE = {getattr(Tensor, name) for name in INPLACE}
ELEMENTWISE = (
    "mul", "add", "sub", "div", "true_divide", "pow", "maximum", "minimum", "where", "addcmul",
    "addcdiv", "lerp", "multiply", "subtract", "divide", "__mul__", "__rmul__", "__add__",
    "__radd__", "__sub__", "__rsub__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__",
)  # fmt: skip


def _handlers() -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = {
        F.linear: _linear,
        torch.addmm: _addmm,
        F.embedding: _embedding,
        F.layer_norm: _layer_norm,
        F.rms_norm: _rms_norm,
        F.scaled_dot_product_attention: _attention,
        Tensor.__getitem__: _getitem,
    }
    functions: tuple[Any, ...] = (F, torch)
    for place in functions:
        for name in ("grouped_mm", "_grouped_mm"):
            if hasattr(place, name):
                table[getattr(place, name)] = _grouped
        for name in ("conv1d", "conv2d", "conv3d"):
            table[getattr(place, name)] = _conv
    for names, handler in (
        (("matmul", "mm", "__matmul__"), _matmul),
        ((*ELEMENTWISE, *INPLACE), broadcast),
    ):
        for name in names:
            for owner in (torch, Tensor):
                if hasattr(owner, name):
                    table[getattr(owner, name)] = handler
    return table


HANDLERS = _handlers()
