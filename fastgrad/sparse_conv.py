"""Convolutions whose backward pass computes the gradient of the selected channels only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrad.sparse_layers import autocast_to, stripes_of
from fastgrad_kernels.layout import matrix_view

if TYPE_CHECKING:
    from fastgrad.blocks import BlockGrid
    from fastgrad.packed import PackedBlocks

_backward = torch.ops.aten.convolution_backward


def conv(
    x: Tensor,
    full: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    blocks: PackedBlocks,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.conv1d``, ``conv2d`` or ``conv3d``, by the weight's number of dimensions.

    Rows of the weight's matrix are output channels, columns are (input channel, kernel position).
    The gradient is formed for the output channels and input channels that selected blocks touch,
    with several groups for the touched groups, and cut from there.

    Args:
        x: ``[batch, in, ...]``, or without the batch.
        full: ``[out, in / groups, ...]``.
        packed: what receives the gradient.
        stride, padding, dilation, groups: as for ``torch.conv2d``.
    """
    dims = full.ndim - 2
    steps, spread = _numbers(stride, dims), _numbers(dilation, dims)
    if isinstance(padding, str):
        x, around = _named_padding(x, padding, steps, spread, full.shape[2:])
    else:
        around = _numbers(padding, dims)
    x, full, bias = autocast_to(x, full, bias)
    batch = x if x.ndim == full.ndim else x[None]
    with torch.autocast(x.device.type, enabled=False):
        out = SparseConv.apply(batch, packed, bias, full, blocks, steps, around, spread, groups)
    return out if batch is x else out[0]


def _numbers(value: int | Sequence[int], dims: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _named_padding(
    x: Tensor, padding: str, stride: list[int], dilation: list[int], kernel: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """``valid`` and ``same`` as numbers; where ``same`` is uneven, the input is padded."""
    if padding == "valid":
        return x, [0] * len(kernel)
    if padding != "same" or any(s != 1 for s in stride):
        raise ValueError(f"padding {padding!r} with stride {stride}: 'same' needs a stride of 1")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(t % 2 == 0 for t in total):
        return x, [t // 2 for t in total]
    more = [n for t in reversed(total) for n in (0, t % 2)]  # the odd one goes to the end
    return F.pad(x, more), [t // 2 for t in total]


class SparseConv(torch.autograd.Function):
    """Convolution whose backward pass computes the touched channels of the gradient only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        full: Tensor,
        blocks: PackedBlocks,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        # the weight is saved by reference; convolution_backward asks for its shape and device
        ctx.save_for_backward(x, full)
        ctx.stripes, ctx.dtype, ctx.groups = stripes_of(blocks), packed.dtype, groups
        ctx.ids = blocks.ids
        ctx.geometry = stride, padding, dilation, False, [0] * (full.ndim - 2)
        return torch.ops.aten.convolution(x, full, bias, *ctx.geometry, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, full = ctx.saved_tensors
        grad_x = grad_packed = grad_bias = None
        x_needs, packed_needs, bias_needs = ctx.needs_input_grad[:3]
        if x_needs:
            mask = [True, False, False]
            grad_x = _backward(grad_out, x, full, None, *ctx.geometry, ctx.groups, mask)[0]
        if packed_needs:
            grad_packed = _weight_gradient(ctx, grad_out, x, full).to(ctx.dtype)
        if bias_needs:
            grad_bias = grad_out.sum((0, *range(2, grad_out.ndim)))
        return grad_x, grad_packed, grad_bias, *[None] * 6


def _input_channels(ids: Tensor, grid: BlockGrid, full: Tensor) -> Tensor | None:
    """Input channels that selected blocks touch, int64; None for all of them."""
    if grid.grid_cols == 1:
        return None
    per_channel = grid.cols // full.shape[1]
    first = torch.unique(ids % grid.grid_cols) * grid.block_cols
    columns = (first[:, None] + torch.arange(grid.block_cols, device=first.device)).view(-1)
    channels = torch.unique(columns[columns < grid.cols] // per_channel)
    return None if channels.numel() == full.shape[1] else channels


def _weight_gradient(ctx: Any, grad_out: Tensor, x: Tensor, full: Tensor) -> Tensor:
    stripes, groups, rows = ctx.stripes, ctx.groups, ctx.stripes.rows
    mask = [False, True, False]
    if groups == 1:
        channels = _input_channels(ctx.ids, stripes.grid, full)
        if channels is not None:
            x = x[:, channels]
        part = full.new_empty(rows.numel(), x.shape[1], *full.shape[2:])
        grad = _backward(grad_out[:, rows], x, part, None, *ctx.geometry, 1, mask)[1]
        if channels is not None:
            found, grad = grad, grad.new_zeros(rows.numel(), *full.shape[1:])
            grad[:, channels] = found
        return stripes.cut(matrix_view(grad.contiguous()))
    # Whole groups: output channels of a group read the same input channels.
    outs, ins = full.shape[0] // groups, full.shape[1]
    touched = torch.unique(rows // outs)
    g = grad_out.unflatten(1, (groups, outs))[:, touched].flatten(1, 2)
    x = x.unflatten(1, (groups, ins))[:, touched].flatten(1, 2)
    part = full.new_empty(touched.numel() * outs, *full.shape[1:])
    grad = _backward(g, x, part, None, *ctx.geometry, touched.numel(), mask)[1]
    inside = torch.searchsorted(touched, rows // outs) * outs + rows % outs
    return stripes.cut(matrix_view(grad.contiguous())[inside])


__all__ = ["SparseConv", "conv"]
