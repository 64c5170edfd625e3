"""Convolutions, and those that go the other way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.derived import beyond, roots_of
from fastgrad.handlers_common import (
    cast,
    constant,
    expect_dense,
    ownership,
    refuse,
    sinks_of,
    too_large,
    watch_sinks,
)
from fastgrad.records import Batch
from fastgrad.rows import Rows, wide_dtype
from fastgrad.tap_functions import ConvTap, _grouped, _patches
from fastgrad.tap_watch import Sinks, give, watched


def conv(
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
    if x.ndim != nd + 2 or roots_of(x, batch) or constant(x, batch):
        return NotImplemented
    stride, dilation = ([v] * nd if isinstance(v, int) else list(v) for v in (stride, dilation))
    sinks = sinks_of(batch, weight, bias)
    found = ownership(x, batch)
    if found.dim != 0 or x.shape[0] % n:
        return refuse(
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
            return refuse(sinks, large)
        if dense:
            sink.expect_dense(weight)
        else:
            sink.expect_product(weight)
    if sinks[1] is not None and bias is not None:
        sinks[1].expect_dense(bias)
    x, weight, bias = cast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return ConvTap.apply(x, weight, bias, stride, padding, dilation, groups, n, *sinks)


def conv_transpose(
    batch: Batch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """A convolution's backward pass: each input place meets a patch of the output's gradient."""
    x, nd, n = input, weight.ndim - 2, batch.n_examples
    if x.ndim != nd + 2 or roots_of(x, batch) or constant(x, batch):
        return NotImplemented
    args = (x, weight, bias, stride, padding, output_padding, groups, dilation)
    sinks = watch_sinks(batch, weight, bias)
    if not any(sinks):
        return func(*args)
    found = ownership(x, batch)
    if found.dim != 0 or x.shape[0] % n:
        return refuse(
            sinks,
            f"its convolution saw an input of shape {tuple(x.shape)}, whose leading dimension "
            f"is not known to count the batch's {n} examples",
        )
    large = too_large(batch, sinks, (weight, bias))
    if groups > 1 and sinks[0] is not None and n * weight.numel() > sinks[0].limit:
        large = beyond(n * weight.numel(), sinks[0].limit)
    if large is not None:
        return refuse(sinks, large)
    if sinks[0] is not None and groups == 1:
        sinks[0].expect_product(weight)
    elif sinks[0] is not None:
        sinks[0].expect_dense(weight)
    expect_dense(sinks[1:], (bias,))
    steps, edges, spread = (
        [v] * nd if isinstance(v, int) else list(v) for v in (stride, padding, dilation)
    )
    kernel, n_rows = weight.shape[2:], x.shape[0]
    places, dtype = [slice(k) for k in x.shape[2:]], weight.dtype

    def measure(
        sinks: Sinks, grads: Sequence[Tensor], saved: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        (grad,), (x,) = grads, saved
        x = x.to(grad.dtype)
        shift = None
        if sinks[1] is not None:
            each = (
                grad.unflatten(0, (n, n_rows // n))
                .flatten(3)
                .sum((1, 3), dtype=wide_dtype(grad.dtype))
            )
            shift = give(sinks[1], each, grad.dtype)
        if sinks[0] is None:
            return None, shift
        # more output than the stride asks for adds places that no input has
        patches = _patches(grad, kernel, steps, edges, spread)[(slice(None), *places)]
        if groups > 1:
            return give(sinks[0], _grouped(x, patches, n, groups), dtype), shift
        left = x.movedim(1, -1).reshape(-1, x.shape[1])
        rows = Rows.uniform(n, len(left) // n)
        return sinks[0].product(left, patches.reshape(len(left), -1), rows, dtype), shift

    def run(weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        return [func(x, weight, bias, *args[3:])]

    return watched(run, (weight, bias), sinks, measure, x)[0]
