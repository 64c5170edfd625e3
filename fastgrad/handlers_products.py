"""Matrix products of activations with a parameter, or with what was made of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad import handlers_contractions as contractions
from fastgrad.derived import Sink, beyond, expanded_size, roots_of
from fastgrad.handlers_common import cast, constant, example_rows, ownership, refuse, sinks_of
from fastgrad.ownership import mark, marked
from fastgrad.records import Batch
from fastgrad.regions import region_of
from fastgrad.rows import Rows
from fastgrad.tap_functions import GroupedTap, LinearTap


def product(batch: Batch, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Any:
    if weight.ndim != 2 or roots_of(x, batch) or constant(x, batch):
        return NotImplemented
    if bias is not None and bias.shape != weight.shape[int(transposed) :][:1]:
        return NotImplemented  # a broadcast bias is not what layers have
    sinks = sinks_of(batch, weight, bias)
    rows = example_rows(x, batch)
    if rows is None:
        return refuse(
            sinks,
            f"its layer saw an input of shape {tuple(x.shape)}, whose rows cannot be "
            f"assigned to the batch's {batch.n_examples} examples",
        )
    for sink, tensor in zip(sinks, (weight, bias), strict=True):
        if sink is not None and tensor is not None:
            large = sink.too_large(tensor, batch.n_examples)
            if large:
                return refuse([sink], large)
    if sinks[0] is not None:
        sinks[0].expect_product(weight)
    if sinks[1] is not None and bias is not None:
        sinks[1].expect_dense(bias)
    found = marked(x, batch.index)
    if not torch.is_autocast_enabled(x.device.type):
        out = LinearTap.apply(x, weight, bias, transposed, rows, *sinks)
    else:
        x, weight, bias = cast(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            out = LinearTap.apply(x, weight, bias, transposed, rows, *sinks)
    known = all(s is None or s.direct for s in sinks) and sinks[0] is not None
    if known and found is not None and found.plain and found.dim < x.ndim - 1:
        mark(out, batch.index, found)  # its rows are those of x: nothing has to be found out
    return out


def linear(
    batch: Batch, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    return product(batch, input, weight, bias, transposed=False)


def addmm(batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 3 and not kwargs and args[0].ndim == 1:  # what layers compute
        bias, x, weight = args
        found = product(batch, x, weight, bias, transposed=True)
        if found is not NotImplemented:
            return found
    return contractions.added(batch, func, *args, **kwargs)


def matmul(batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 2 or not all(isinstance(a, Tensor) for a in args):
        return NotImplemented
    x, weight = args
    if not roots_of(weight, batch) or x.ndim < 2 or weight.ndim != 2:
        return contractions.matmul(batch, func, *args)
    return product(batch, x, weight, None, transposed=True)


def grouped(
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
        return refuse(
            [sink],
            f"its experts saw an input of shape {tuple(x.shape)}, whose rows cannot be assigned "
            f"to the batch's {n} examples",
        )
    places = [None if len(sink.roots) > 1 else region_of(w, sink.roots[0].tensor) for w in weight]
    views = sink.roots[0].ids is None and None not in places
    size = expanded_size(weight, sink.roots, n)
    if not views and size > sink.limit:
        return refuse([sink], beyond(size, sink.limit))
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
