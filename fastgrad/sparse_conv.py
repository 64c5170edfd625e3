"""Convolutions whose backward pass computes the gradient of the selected channels only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrad.sparse_layers import autocast_to, stripes_of
from fastgrad_kernels.layout import matrix_view
from fastgrad_kernels.stripes import Stripes

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
        x_needs, packed_needs = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if packed_needs else None, full if x_needs else None)
        ctx.shapes = x.shape, full.shape
        ctx.touched = _touched(blocks, full.shape, groups)
        ctx.dtype, ctx.groups = packed.dtype, groups
        ctx.geometry = stride, padding, dilation, False, [0] * (full.ndim - 2)
        return torch.ops.aten.convolution(x, full, bias, *ctx.geometry, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, full = ctx.saved_tensors
        x_shape, full_shape = ctx.shapes
        grad_x = grad_packed = grad_bias = None
        if full is not None:
            mask, like = [True, False, False], _without_memory(grad_out, x_shape)
            grad_x = _backward(grad_out, like, full, None, *ctx.geometry, ctx.groups, mask)[0]
        if x is not None:
            grad_packed = _weight_gradient(ctx, grad_out, x, full_shape).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_out.sum((0, *range(2, grad_out.ndim)))
        return grad_x, grad_packed, grad_bias, *[None] * 6


def _without_memory(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that convolution_backward asks for nothing but its shape, dtype and device."""
    return like.new_zeros(()).expand(shape)


@dataclass(frozen=True)
class _Touched:
    """What a gradient is formed for.

    Attributes:
        stripes: output channels with selected blocks.
        inputs: int64, input channels with selected blocks; None for all of them.
        groups: int64, groups with selected blocks.
        inside: int64, where the touched rows lie in the output channels of these groups.
    """

    stripes: Stripes
    inputs: Tensor | None
    groups: Tensor
    inside: Tensor


def _touched(blocks: PackedBlocks, shape: Sequence[int], groups: int) -> _Touched:
    """Computed once for a selection, on the host."""
    stripes = stripes_of(blocks)
    known = blocks.__dict__.get("_touched")
    if known is not None and known[0] is stripes and known[1] == groups:
        found: _Touched = known[2]
        return found
    device, rows, outs = stripes.rows.device, stripes.rows.cpu(), shape[0] // groups
    inputs = _input_channels(blocks.ids.cpu(), blocks.grid, shape[1]) if groups == 1 else None
    touched = torch.unique(rows // outs)
    inside = torch.searchsorted(touched, rows // outs) * outs + rows % outs
    inputs = None if inputs is None else inputs.to(device)
    found = _Touched(stripes, inputs, touched.to(device), inside.to(device))
    blocks.__dict__["_touched"] = (stripes, groups, found)
    return found


def _input_channels(ids: Tensor, grid: BlockGrid, n: int) -> Tensor | None:
    """Input channels, of ``n``, that selected blocks touch, int64; None for all of them."""
    if grid.grid_cols == 1:
        return None
    per_channel = grid.cols // n
    first = torch.unique(ids % grid.grid_cols) * grid.block_cols
    columns = (first[:, None] + torch.arange(grid.block_cols)).view(-1)
    channels = torch.unique(columns[columns < grid.cols] // per_channel)
    return None if channels.numel() == n else channels


def _weight_gradient(ctx: Any, grad_out: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    touched: _Touched = ctx.touched
    stripes, groups, rows = touched.stripes, ctx.groups, touched.stripes.rows
    mask = [False, True, False]
    if groups == 1:
        channels = touched.inputs
        if channels is not None:
            x = x[:, channels]
        part = _without_memory(x, (rows.numel(), x.shape[1], *shape[2:]))
        grad = _backward(grad_out[:, rows], x, part, None, *ctx.geometry, 1, mask)[1]
        if channels is not None:
            found, grad = grad, grad.new_zeros(rows.numel(), *shape[1:])
            grad[:, channels] = found
        return stripes.cut(matrix_view(grad.contiguous()))
    # Whole groups: output channels of a group read the same input channels.
    outs, ins, n = shape[0] // groups, shape[1], touched.groups.numel()
    g = grad_out.unflatten(1, (groups, outs))[:, touched.groups].flatten(1, 2)
    x = x.unflatten(1, (groups, ins))[:, touched.groups].flatten(1, 2)
    part = _without_memory(x, (n * outs, *shape[1:]))
    grad = _backward(g, x, part, None, *ctx.geometry, n, mask)[1]
    return stripes.cut(matrix_view(grad.contiguous())[touched.inside])


__all__ = ["SparseConv", "conv"]
