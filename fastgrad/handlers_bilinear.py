"""A matrix between two inputs, for each output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad.derived import beyond, roots_of
from fastgrad.handlers_common import (
    constant,
    example_rows,
    expect_dense,
    refuse,
    too_large,
    watch_sinks,
)
from fastgrad.records import Batch
from fastgrad.rows import wide
from fastgrad.tap_watch import Sinks, give, watched


def bilinear(
    batch: Batch,
    func: Any,
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Any:
    """``y_o = Σ_ik x1_i w_oik x2_k``: a product with the outer products of the inputs."""
    inputs, n = (input1, input2), batch.n_examples
    args = (input1, input2, weight, bias)
    if any(roots_of(t, batch) for t in inputs) or all(constant(t, batch) for t in inputs):
        return NotImplemented
    sinks = watch_sinks(batch, weight, bias)
    if not any(sinks):
        return func(*args)
    found = [r for t in inputs if not constant(t, batch)
             if (r := example_rows(t, batch)) is not None]  # fmt: skip
    large = too_large(batch, sinks, (weight, bias))
    if not found:
        return refuse(
            sinks,
            f"its inputs of shapes {tuple(input1.shape)} and {tuple(input2.shape)} cannot be "
            f"assigned to the batch's {n} examples",
        )
    rows, sink = found[0], sinks[0]
    cells = math.prod(input1.shape[:-1]) * math.prod(weight.shape[1:])
    formed = sink is not None and cells > sink.limit
    if sink is not None and formed and n * weight.numel() > sink.limit:
        large = beyond(n * weight.numel(), sink.limit)
    if large is not None:
        return refuse(sinks, large)
    if sink is not None and not formed:
        sink.expect_product(weight)
    expect_dense((sink if formed else None, sinks[1]), (weight, bias))
    dtype = weight.dtype

    def measure(
        sinks: Sinks, grads: Sequence[Tensor], saved: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        grad = grads[0].flatten(0, -2)
        a, b = (t.to(grad.dtype).flatten(0, -2) for t in saved)
        shift = give(sinks[1], rows.sums(grad), grad.dtype) if sinks[1] is not None else None
        if sinks[0] is None:
            return None, shift
        if not formed:
            right = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)
            return sinks[0].product(grad, right, rows, dtype), shift
        g, a, b = (wide(rows.ordered(t)) for t in (grad, a, b))
        each = [g[p].T @ (a[p].unsqueeze(2) * b[p].unsqueeze(1)).flatten(1) for p in rows.parts()]
        return give(sinks[0], torch.stack(each), grad.dtype), shift

    return watched(lambda *w: [func(*inputs, *w)], (weight, bias), sinks, measure, *inputs)[0]
