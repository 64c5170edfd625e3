"""The autograd functions of the taps: backward passes that tell a record what they see."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrad_kernels import ops
from fastgrad_kernels.dispatch import keep

if TYPE_CHECKING:
    from fastgrad.records import ParamRecord


class Rows(NamedTuple):
    """How a tensor's rows belong to examples: ``per_example`` consecutive rows each."""

    n_examples: int
    per_example: int

    @property
    def offsets(self) -> Tensor:
        """int64 ``[n_examples + 1]`` on the CPU; the same tensor for the same numbers."""
        return _uniform_offsets(self.n_examples, self.per_example)


@keep
def _uniform_offsets(n_examples: int, per_example: int) -> Tensor:
    return torch.arange(n_examples + 1, dtype=torch.int64, device="cpu") * per_example


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
        weight_record: ParamRecord | None,
        bias_record: ParamRecord | None,
    ) -> Tensor:
        # the weight is needed for the input's gradient alone
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.transposed, ctx.rows = transposed, rows
        ctx.weight_dtype = weight.dtype
        ctx.weight_record, ctx.bias_record = weight_record, bias_record
        if not transposed:
            return F.linear(x, weight, bias)
        if bias is not None and x.ndim == 2:
            return torch.addmm(bias, x, weight)
        out = x @ weight
        return out if bias is None else out + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows: Rows = ctx.rows
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_out @ (weight.T if ctx.transposed else weight)
        x2, g2 = x.reshape(-1, x.shape[-1]), grad_out.reshape(-1, grad_out.shape[-1])
        left, right = (x2, g2) if ctx.transposed else (g2, x2)
        if ctx.needs_input_grad[1]:
            if ctx.weight_record is None:
                grad_weight = left.T @ right
            else:
                grad_weight = ctx.weight_record.add_product(left, right, rows, ctx.weight_dtype)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            wide = torch.float64 if g2.dtype == torch.float64 else torch.float32
            per_example = g2.reshape(rows.n_examples, rows.per_example, -1).sum(1, dtype=wide)
            if ctx.bias_record is not None:
                ctx.bias_record.add_dense(per_example, grad_out.dtype)
            grad_bias = per_example.sum(0).to(grad_out.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


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
        n_examples: int,
        weight_record: ParamRecord | None,
        bias_record: ParamRecord | None,
    ) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.shape, ctx.records = shape, (weight_record, bias_record)
        ctx.n_examples = n_examples
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad_out.contiguous(), x, ctx.shape, mean, rstd, weight, None, [True, False, False]
            )[0]
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            d, shape = math.prod(ctx.shape), tuple(ctx.shape)
            flat = x.reshape(-1, d)
            scales, shifts = ops.norm_gradients(
                flat,
                grad_out.reshape(-1, d),
                rstd.reshape(-1),
                Rows(ctx.n_examples, flat.shape[0] // max(ctx.n_examples, 1)).offsets,
                mean.reshape(-1),
                ctx.needs_input_grad[3],
            )
        if ctx.needs_input_grad[2]:
            if ctx.records[0] is not None:
                ctx.records[0].add_dense(scales.view(-1, *shape))
            grad_weight = scales.sum(0).view(shape).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            if ctx.records[1] is not None:
                ctx.records[1].add_dense(shifts.view(-1, *shape))
            grad_bias = shifts.sum(0).view(shape).to(weight.dtype)
        return grad_x, None, grad_weight, grad_bias, None, None, None, None


class ExpandTap(torch.autograd.Function):
    """A parameter expanded over examples (no copy), so that its gradient comes per example."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shape: torch.Size, record: ParamRecord) -> Tensor:
        ctx.record, ctx.shape = record, parameter.shape
        return parameter.expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        per_example = grad_out.reshape(grad_out.shape[0], *ctx.shape)
        ctx.record.add_dense(per_example)
        return per_example.sum(0), None, None
