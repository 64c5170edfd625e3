"""Norms with a scale and a shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad.derived import roots_of
from fastgrad.handlers_common import constant, example_rows, refuse, sinks_of
from fastgrad.handlers_elementwise import broadcast
from fastgrad.propagation import propagate
from fastgrad.records import Batch
from fastgrad.tap_functions import LayerNormTap


def layer_norm(
    batch: Batch,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
) -> Any:
    sinks = sinks_of(batch, weight, bias)
    if roots_of(input, batch) or constant(input, batch):
        return NotImplemented
    if weight is None or any(s is not None and not s.direct for s in sinks):
        out = func(input, normalized_shape, None, None, eps)
        propagate(func, (input,), {}, out, batch.index, batch.n_examples)
        return _affine(batch, out, weight, bias)
    rows = example_rows(input, batch, len(normalized_shape))
    if rows is None:
        return refuse(
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


def rms_norm(
    batch: Batch,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if roots_of(input, batch) or constant(input, batch):
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
