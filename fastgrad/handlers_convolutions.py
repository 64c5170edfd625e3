"""Convolutions, and those that go the other way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.derived import beyond, roots_of
from fastgrad.handlers_common import cast, constant, ownership, refuse, sinks_of
from fastgrad.records import Batch
from fastgrad.tap_functions import ConvTap


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
