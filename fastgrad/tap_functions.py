"""The autograd functions of the taps: backward passes that tell a record what they see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.derived import Sink, into_record
from fastgrad.records import ParamRecord
from fastgrad.regions import Region
from fastgrad.rows import Rows, wide, wide_dtype
from fastgrad_kernels import ops

_unsafe_view = torch.ops.aten._unsafe_view.default  # found once: each search takes as long as it


class LinearTap(torch.autograd.Function):
    """``y = x Wᵀ + b`` (or ``x W + b``); its backward pass takes gradient and ``T`` in one go."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        rows: Rows,
        weight_sink: Sink | None,
        bias_sink: Sink | None,
    ) -> Tensor:
        # the weight is needed for the input's gradient alone
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.transposed, ctx.rows = transposed, rows
        ctx.weight_dtype = weight.dtype
        ctx.sinks = _kept(weight_sink, bias_sink)
        if not transposed:
            out = F.linear(x, weight, bias)
        elif bias is not None and x.ndim == 2:
            out = torch.addmm(bias, x, weight)
        else:
            out = x @ weight if bias is None else x @ weight + bias
        # A view that a custom function made must not be changed in place; a model may do that.
        return _unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows: Rows = ctx.rows
        grad_x = grad_weight = grad_bias = None
        x2, g2 = _matrix(x.conj() if x.is_complex() else x), _matrix(grad_out)
        if ctx.needs_input_grad[0]:
            factor = weight.t() if ctx.transposed else weight
            factor = factor.conj() if factor.is_complex() else factor
            grad_x = torch.mm(g2, factor).view(x.shape)
        left, right = (x2, g2) if ctx.transposed else (g2, x2)
        traced = torch.is_grad_enabled()
        weight_sink, bias_sink = _measuring(ctx.sinks) if traced else ctx.sinks
        if ctx.needs_input_grad[1]:
            if weight_sink is None:
                grad_weight = left.T @ right
            else:
                grad_weight = weight_sink.product(left, right, rows, ctx.weight_dtype)
            if grad_weight.dtype != ctx.weight_dtype:
                grad_weight = grad_weight.to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = g2.sum(0) if traced else _bias(bias_sink, g2, rows)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _matrix(tensor: Tensor) -> Tensor:
    """``[rows, features]``. Not reshape(-1, ...): without a row that would be ambiguous."""
    if tensor.ndim == 2:
        return tensor
    if tensor.ndim > 2 and tensor.is_contiguous() and tensor.numel():
        return tensor.view(-1, tensor.shape[-1])
    return tensor.flatten(0, -2) if tensor.ndim > 2 else tensor[None]


def _kept(*sinks: Sink | None) -> tuple[Sink | None, ...]:
    return tuple(None if s is None else s.kept() for s in sinks)


def _measuring(sinks: Sequence[Sink | None]) -> Sequence[Sink | None]:
    """None of them if the backward pass is to be differentiated itself: then the taps compute with
    functions that autograd knows, and what comes of it will not pass them."""
    if not torch.is_grad_enabled():
        return sinks
    for sink in sinks:
        if sink is not None:
            sink.differentiated()
    return [None] * len(sinks)


def _bias(sink: Sink | None, grad: Tensor, rows: Rows) -> Tensor:
    """A bias' gradient from ``grad [rows, features]``."""
    per_example = rows.sums(grad)
    if sink is not None:
        sink.dense(per_example, grad.dtype)
    total = per_example.sum(0).to(grad.dtype)
    return total if rows.rest is None else total + grad[rows.rest].sum(0)


class LayerNormTap(torch.autograd.Function):
    """Layer norm whose backward pass keeps the scale's and shift's gradient of each example."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: list[int],
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        rows: Rows,
        weight_record: ParamRecord | None,
        bias_record: ParamRecord | None,
    ) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.shape, ctx.records, ctx.rows = shape, (weight_record, bias_record), rows
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if torch.is_grad_enabled():
            for record in ctx.records:
                if record is not None:
                    record.differentiated()
            mask = [bool(ctx.needs_input_grad[i]) for i in (0, 2, 3)]
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
                grad_out.contiguous(), x, ctx.shape, mean, rstd, weight, weight, mask
            )
            return grad_x, None, grad_weight, grad_bias, None, None, None, None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad_out.contiguous(), x, ctx.shape, mean, rstd, weight, None, [True, False, False]
            )[0]
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            rows, d = ctx.rows, math.prod(ctx.shape)
            parts = [x.reshape(-1, d), grad_out.reshape(-1, d), rstd.reshape(-1), mean.reshape(-1)]
            want = ctx.needs_input_grad[3]
            flat, grads, rstds, means = (rows.ordered(t) for t in parts)
            sums = ops.norm_gradients(flat, grads, rstds, rows.offsets, means, want)
            totals = [s.sum(0) for s in sums]
            if rows.rest is not None:
                flat, grads, rstds, means = (t[rows.rest] for t in parts)
                ends = torch.tensor([0, len(rows.rest)])
                others = ops.norm_gradients(flat, grads, rstds, ends, means, want)
                totals = [t + o[0] for t, o in zip(totals, others, strict=True) if len(o)]
            found = []
            for record, each, total in zip(ctx.records, sums, totals, strict=False):
                if record is not None and len(each):
                    record.add_dense(each.view(-1, *ctx.shape))
                found.append(total.view(ctx.shape).to(weight.dtype))
            grad_weight = found[0] if ctx.needs_input_grad[2] else None
            grad_bias = found[1] if want else None
        return grad_x, None, grad_weight, grad_bias, None, None, None, None


class GroupedTap(torch.autograd.Function):
    """``y_s = x_s W_e`` for the rows s of each expert e, one expert after the other.

    ``experts``: of each expert with rows its number, its first and last row, their owners, and
    where its matrix lies in the parameter (and whether transposed). Where the stack is no view of
    a parameter (adapters were added to it) the gradients of each example are formed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        ends: Tensor,
        sink: Sink,
        experts: Sequence[tuple[int, int, int, Rows, tuple[Region, bool] | None]],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.sink, ctx.experts = sink.kept(), experts
        return grouped_mm(x, weight, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_mm(grad_out, weight.transpose(1, 2), offs=ends)
        sink: Sink = ctx.sink
        if ctx.needs_input_grad[1] and torch.is_grad_enabled():
            sink.differentiated()
            parts = {e: x[a:b].T @ grad_out[a:b] for e, a, b, *_ in ctx.experts}
            nothing = torch.zeros_like(weight[0])
            grad_weight = torch.stack([parts.get(e, nothing) for e in range(len(weight))])
        elif ctx.needs_input_grad[1]:
            # memory as the weight has it: autograd then need not copy to add it up
            grad_weight = torch.zeros_like(weight)
            each = None
            if any(place is None for *_, place in ctx.experts):
                n = sink.roots[0].record.batch.n_examples
                each = weight.new_zeros(n, *weight.shape, dtype=wide_dtype(weight.dtype))
            for e, start, end, rows, place in ctx.experts:
                left, right = x[start:end], grad_out[start:end]
                if each is None:
                    record, dtype = sink.roots[0].record, weight.dtype
                    grad_weight[e] = into_record(record, left, right, rows, dtype, *place)
                    continue
                grad_weight[e] = left.T @ right
                left, right = wide(rows.ordered(left)), wide(rows.ordered(right))
                for j, part in enumerate(rows.parts()):
                    each[j, e] = left[part].T @ right[part]
            if each is not None:
                sink.dense(each, weight.dtype)
        return grad_x, grad_weight, None, None, None


grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class ConvTap(torch.autograd.Function):
    """Convolution of any number of dimensions: a product of output gradients with the patches of
    the input that each output saw."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        n_examples: int,
        weight_sink: Sink | None,
        bias_sink: Sink | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = (stride, padding, dilation, groups)
        ctx.n, ctx.sinks = n_examples, _kept(weight_sink, bias_sink)
        return _convolution(x, weight, bias, ctx.how)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        grad_x = grad_weight = grad_bias = None
        weight_sink, bias_sink = _measuring(ctx.sinks)
        if torch.is_grad_enabled():
            mask = [bool(needed) for needed in ctx.needs_input_grad[:3]]
            return *_convolution_backward(grad_out, x, weight, ctx.how, mask), *[None] * 7
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            grad_x = _convolution_backward(grad_out, x, weight, ctx.how, mask)[0]
        places = grad_out[0, 0].numel()
        rows = Rows.uniform(ctx.n, grad_out.shape[0] // ctx.n * places)
        if ctx.needs_input_grad[1]:
            patches = _patches(x, weight.shape[2:], stride, padding, dilation).conj()
            if groups == 1:
                left = grad_out.movedim(1, -1).reshape(-1, weight.shape[0])
                right = patches.reshape(len(left), -1)
                if weight_sink is None:
                    grad_weight = left.T @ right
                else:
                    grad_weight = weight_sink.product(left, right, rows, weight.dtype)
                grad_weight = grad_weight.view(weight.shape)
            else:
                each = _grouped(grad_out, patches, ctx.n, groups).reshape(ctx.n, *weight.shape)
                if weight_sink is not None:
                    weight_sink.dense(each, weight.dtype)
                grad_weight = each.sum(0).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            pixels = grad_out.movedim(1, -1).reshape(-1, grad_out.shape[1])
            grad_bias = _bias(bias_sink, pixels, rows)
        return grad_x, grad_weight, grad_bias, *[None] * 7


Convolution = tuple[Sequence[int], Sequence[int], Sequence[int], int]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, how: Convolution) -> Tensor:
    """Stride, padding, dilation and groups: ``how``."""
    functions: Any = (torch.conv1d, torch.conv2d, torch.conv3d)
    return functions[weight.ndim - 3](x, weight, bias, *how)


def _convolution_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, how: Convolution, mask: list[bool]
) -> Sequence[Tensor | None]:
    """Of input, weight and bias those gradients that ``mask`` wants."""
    if not x.is_complex() and not weight.is_complex():
        stride, padding, dilation, groups = how
        return torch.ops.aten.convolution_backward(
            grad_out, x, weight, weight.shape[:1] if mask[2] else None, list(stride),
            list(padding), list(dilation), False, [0] * len(stride), groups, mask,
        )  # fmt: skip
    # PyTorch makes it of real ones, and has no backward function for it
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        ends = [t.view_as(t) if again and t.requires_grad else t.detach() for t in (x, weight)]
        ends = [t if t.requires_grad else t.requires_grad_() for t in ends]
        found = torch.autograd.grad(
            _convolution(ends[0], ends[1], None, how), ends, grad_out, create_graph=again
        )
    bias = grad_out.movedim(1, 0).flatten(1).sum(1)
    return [g if m else None for g, m in zip((*found, bias), mask, strict=True)]


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What each output place saw: ``[images, *places, channels, *kernel]``, a view where nothing is
    padded."""
    nd = len(kernel)
    if any(padding):
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    for d in range(nd):
        span = (kernel[d] - 1) * dilation[d] + 1
        x = x.unfold(2 + d, span, stride[d])[..., :: dilation[d]]
    return x.movedim(1, 1 + nd)


def _grouped(grad_out: Tensor, patches: Tensor, n: int, groups: int) -> Tensor:
    """Gradient of a grouped convolution for each example, ``[n, out, in / groups * kernel]``."""
    images, out = grad_out.shape[:2]
    nd = grad_out.ndim - 2
    g = wide(grad_out).reshape(n, images // n, groups, out // groups, -1)
    g = g.permute(0, 2, 3, 1, 4).reshape(n * groups, out // groups, -1)
    # [images, *places, channels, *kernel] -> [n * groups, images/n * places, channels/groups * k]
    p = wide(patches).flatten(1, nd) if nd else wide(patches)
    places, channels = p.shape[1], p.shape[2]
    p = p.reshape(n, images // n, places, groups, channels // groups, -1).flatten(4)
    p = p.permute(0, 3, 1, 2, 4).reshape(n * groups, (images // n) * places, -1)
    return torch.bmm(g, p).reshape(n, out, -1)
