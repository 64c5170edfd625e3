"""Norms with a scale and a shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrad.derived import roots_of
from fastgrad.handlers_common import (
    constant,
    example_rows,
    expect_dense,
    ownership,
    per_channel,
    refuse,
    sinks_of,
    too_large,
    watch_sinks,
)
from fastgrad.handlers_elementwise import broadcast
from fastgrad.propagation import propagate
from fastgrad.records import Batch
from fastgrad.rows import wide
from fastgrad.tap_functions import LayerNormTap
from fastgrad.tap_watch import Sinks, give, watched


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


# -- norms of channels: watched ----------------------------------------------------------


def batch_norm(
    batch: Batch,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:

    def call(weight: Tensor | None, bias: Tensor | None) -> Any:
        return func(input, running_mean, running_var, weight, bias, training, momentum, eps)

    stats = _Stats([0, *range(2, input.ndim)], eps)
    running = (running_mean, running_var) if not training else None
    return _channels(batch, call, (input, weight, bias), stats, running)


def torch_batch_norm(batch: Batch, func: Any, *args: Any) -> Any:
    """The same with arguments in another order."""
    if len(args) < 8:
        return NotImplemented
    x, weight, bias, mean, var, training, _, eps = args[:8]
    running = (mean, var) if not training else None
    stats = _Stats([0, *range(2, x.ndim)], eps)

    def call(weight: Tensor | None, bias: Tensor | None) -> Any:
        return func(x, weight, bias, *args[3:])

    return _channels(batch, call, (x, weight, bias), stats, running)


def instance_norm(
    batch: Batch,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:

    def call(weight: Tensor | None, bias: Tensor | None) -> Any:
        return func(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    running = (running_mean, running_var) if not use_input_stats else None
    stats = _Stats(list(range(2, input.ndim)), eps)
    return _channels(batch, call, (input, weight, bias), stats, running)


def group_norm(
    batch: Batch,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Any:

    def call(weight: Tensor | None, bias: Tensor | None) -> Any:
        return func(input, num_groups, weight, bias, eps, *rest)

    stats = _Stats([-1], eps, num_groups)
    return _channels(batch, call, (input, weight, bias), stats, None)


class _Stats(NamedTuple):
    """Over what a norm takes its mean and variance."""

    dims: list[int]
    eps: float
    groups: int | None = None  # of channels, each flattened beforehand

    def normalised(self, x: Tensor, running: Sequence[Tensor]) -> Tensor:
        x = wide(x)
        if running:
            shape = [-1, *[1] * (x.ndim - 2)]
            mean, var = (wide(t).view(shape) for t in running)
            return (x - mean) * (var + self.eps).rsqrt()
        flat = x if self.groups is None else x.reshape(x.shape[0], self.groups, -1)
        var, mean = torch.var_mean(flat, self.dims, correction=0, keepdim=True)
        return ((flat - mean) * (var + self.eps).rsqrt()).reshape(x.shape)


def _channels(
    batch: Batch,
    call: Callable[[Tensor | None, Tensor | None], Any],
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    stats: _Stats,
    running: Sequence[Tensor | None] | None,
) -> Any:
    """A norm whose scale and shift have an element for each channel."""
    x, weight, bias = tensors
    if roots_of(x, batch) or constant(x, batch) or x.ndim < 2:
        return NotImplemented
    sinks = watch_sinks(batch, weight, bias)
    if not any(sinks):
        return call(weight, bias)
    sums = per_channel(batch, ownership(x, batch), x, x.shape[1])
    if sums is None:
        return refuse(
            sinks,
            f"its norm saw an input of shape {tuple(x.shape)}, in which the batch's "
            f"{batch.n_examples} examples cannot be told apart",
        )
    if (large := too_large(batch, sinks, (weight, bias))) is not None:
        return refuse(sinks, large)
    expect_dense(sinks, (weight, bias))
    # those of the forward pass: a later one may change the buffers
    saved = [] if running is None else [t.clone() for t in running if t is not None]

    def measure(
        sinks: Sinks, grads: Sequence[Tensor], saved: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        (grad,), (x, *running) = grads, saved
        scale = shift = None
        if sinks[0] is not None:
            scale = give(sinks[0], sums(grad * stats.normalised(x, running)), grad.dtype)
        if sinks[1] is not None:
            shift = give(sinks[1], sums(grad), grad.dtype)
        return scale, shift

    return watched(lambda *w: [call(*w)], (weight, bias), sinks, measure, x, *saved)[0]
