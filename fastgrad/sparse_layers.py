"""Backward passes that compute the selected blocks of a weight's gradient.

The forward pass reads the full weight. One autograd function per kind of layer forms the selected
blocks' gradient alone; :class:`Overlay` serves every other reader of a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrad_kernels import ops
from fastgrad_kernels.layout import gather_blocks

if TYPE_CHECKING:
    from fastgrad.blocks import BlockGrid
    from fastgrad.packed import PackedBlocks


class Overlay(torch.autograd.Function):
    """The full weight's values with the packed parameter's gradient: correct for any module.

    The gradient of this one weight is formed densely for a moment and then cut.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, blocks: PackedBlocks) -> Tensor:
        ctx.blocks, ctx.dtype = blocks, packed.dtype
        return blocks.full.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.blocks.gather(grad).to(ctx.dtype), None


class SparseLinear(torch.autograd.Function):
    """Linear layer whose backward pass computes the selected blocks of the gradient only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        blocks: PackedBlocks,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.blocks, ctx.transposed, ctx.dtype = blocks, transposed, packed.dtype
        if not transposed:
            return F.linear(x, weight, bias)
        out = x @ weight
        return out if bias is None else out + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_packed = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_out @ (weight.T if ctx.transposed else weight)
        x2, g2 = x.reshape(-1, x.shape[-1]), grad_out.reshape(-1, grad_out.shape[-1])
        if ctx.needs_input_grad[1]:
            left, right = (x2, g2) if ctx.transposed else (g2, x2)
            grid: BlockGrid = ctx.blocks.grid
            grad_packed = ops.sparse_wgrad(
                left, right, ctx.blocks.ids, grid.block_rows, grid.block_cols
            ).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = g2.sum(0)
        return grad_x, grad_packed, grad_bias, None, None, None


class SparseEmbedding(torch.autograd.Function):
    """Embedding whose backward pass touches the selected rows only."""

    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        ids: Tensor,
        weight: Tensor,
        blocks: PackedBlocks,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.blocks, ctx.padding_idx, ctx.dtype = blocks, padding_idx, packed.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        grid, selected = ctx.blocks.grid, ctx.blocks.ids
        stripes, slot = torch.unique(selected // grid.grid_cols, return_inverse=True)
        # slot_of[i]: place of block row i among the selected block rows, or -1
        slot_of = torch.full((grid.grid_rows,), -1, dtype=torch.int64, device=ids.device)
        slot_of[stripes] = torch.arange(stripes.numel(), device=ids.device)
        flat = ids.reshape(-1)
        place = slot_of[flat // grid.block_rows]
        keep = place >= 0
        if ctx.padding_idx is not None:
            keep &= flat != ctx.padding_idx
        rows = place[keep] * grid.block_rows + flat[keep] % grid.block_rows
        grad = grad_out.reshape(-1, grad_out.shape[-1])[keep].float()
        dense = grad.new_zeros(stripes.numel() * grid.block_rows, grid.cols)
        dense.index_add_(0, rows, grad)
        packed = gather_blocks(
            dense,
            slot * grid.grid_cols + selected % grid.grid_cols,
            grid.block_rows,
            grid.block_cols,
        )
        return packed.to(ctx.dtype), None, None, None, None
