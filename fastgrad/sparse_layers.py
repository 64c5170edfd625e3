"""Backward passes that compute the selected blocks of a weight's gradient.

The forward pass reads the full weight. One autograd function per kind of product forms the
selected blocks' gradient alone; :class:`Overlay` serves every other reader of a weight. Each saves
only what its own gradients need: no input where the packed parameter needs no gradient, no weight
where the input needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrad_kernels import ops, stripes
from fastgrad_kernels.layout import accumulation_dtype
from fastgrad_kernels.stripes import Stripes

if TYPE_CHECKING:
    from fastgrad.packed import PackedBlocks


def stripes_of(blocks: PackedBlocks) -> Stripes:
    """The rows of a weight's matrix that its selected blocks touch."""
    grid = blocks.grid
    return stripes.stripes_of(blocks.ids, grid.rows, grid.cols, grid.block_rows, grid.block_cols)


class Overlay(torch.autograd.Function):
    """The full weight's values with the packed parameter's gradient: correct for any reader.

    The gradient of this one weight is formed densely for a moment and then cut.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, full: Tensor, blocks: PackedBlocks) -> Tensor:
        ctx.blocks, ctx.dtype = blocks, packed.dtype
        return full.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        blocks: PackedBlocks = ctx.blocks
        grad = grad.to_dense() if grad.is_sparse else grad  # nn.Embedding(sparse=True)
        return (grad if blocks.whole else blocks.gather(grad)).to(ctx.dtype), None, None


def autocast_to(*tensors: Tensor | None) -> list[Any]:
    """The tensors as autocast would hand them to a product: in its dtype where it is on."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    keep = (torch.float64,)  # which autocast leaves alone
    return [
        t if t is None or t.dtype in keep or not t.is_floating_point() else t.to(dtype)
        for t in tensors
    ]


def linear(
    x: Tensor,
    full: Any,
    packed: Any,
    bias: Tensor | None,
    blocks: PackedBlocks,
    transposed: bool = False,
) -> Tensor:
    """``x fullᵀ + bias`` whose backward pass forms the selected blocks' gradient only.

    Args:
        x: ``[..., in]``.
        full: ``[out, in]``; ``[in, out]`` if ``transposed`` (transformers' ``Conv1D``).
        packed: what receives the gradient.
        bias: ``[out]`` or None.
    """
    x, full, bias = autocast_to(x, full, bias)
    with torch.autocast(x.device.type, enabled=False):
        return SparseLinear.apply(x, packed, bias, full, blocks, transposed)


class SparseLinear(torch.autograd.Function):
    """Linear layer whose backward pass computes the selected blocks of the gradient only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        full: Tensor,
        blocks: PackedBlocks,
        transposed: bool,
    ) -> Tensor:
        x_needs, packed_needs = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if packed_needs else None, full if x_needs else None)
        ctx.ids, ctx.block = blocks.ids, (blocks.grid.block_rows, blocks.grid.block_cols)
        ctx.transposed, ctx.dtype = transposed, packed.dtype
        if not transposed:
            return F.linear(x, full, bias)
        out = x @ full
        return out if bias is None else out + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, full = ctx.saved_tensors
        grad_x = grad_packed = grad_bias = None
        if full is not None:
            grad_x = grad_out @ (full.T if ctx.transposed else full)
        g2 = grad_out.reshape(-1, grad_out.shape[-1])
        if x is not None:
            x2 = x.reshape(-1, x.shape[-1])
            left, right = (x2, g2) if ctx.transposed else (g2, x2)
            grad_packed = ops.sparse_wgrad(left, right, ctx.ids, *ctx.block).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = g2.sum(0)
        return grad_x, grad_packed, grad_bias, None, None, None


class SparseRows(torch.autograd.Function):
    """``full[index]`` along the leading dimension, the gradient in the selected blocks only.

    Embeddings, and weights of experts that are gathered for each token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        index: Tensor,
        full: Tensor,
        blocks: PackedBlocks,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.save_for_backward(index if ctx.needs_input_grad[0] else None)
        ctx.stripes, ctx.padding_idx, ctx.dtype = stripes_of(blocks), padding_idx, packed.dtype
        return F.embedding(index, full) if full.ndim == 2 else full[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        touches: Stripes = ctx.stripes
        index = index.reshape(-1)
        slots = touches.slots(index)
        if ctx.padding_idx is not None:
            slots = torch.where(index == ctx.padding_idx, -1, slots)
        grad = grad_out.reshape(index.numel(), touches.cols)
        summed = sum_rows(grad, slots, touches.rows.numel(), filtered=grad.device.type == "cpu")
        return touches.cut(summed).to(ctx.dtype), None, None, None, None


#: Rows that take what belongs nowhere: one alone would be added to by all at once.
SPARE_ROWS = 64


def sum_rows(grad: Tensor, slots: Tensor, n: int, *, filtered: bool) -> Tensor:
    """Sum of the rows of ``grad`` that have the same slot.

    Args:
        grad: ``[tokens, cols]``.
        slots: int64 ``[tokens]``, below ``n``; rows of negative slots are left out.
        filtered: leave them out first, which costs less, but on a GPU the host would wait to learn
            how many remain. Else they are added to spare rows.

    Returns:
        ``[n, cols]``, float32 (float64 for float64).
    """
    dtype = accumulation_dtype(grad)
    if filtered:
        keep = slots >= 0
        grad, slots, spare = grad[keep], slots[keep], 0
    else:
        spare = SPARE_ROWS
        aside = torch.arange(slots.numel(), device=slots.device) % spare + n
        slots = torch.where(slots < 0, aside, slots)
    sums = torch.zeros(n + spare, grad.shape[1], dtype=dtype, device=grad.device)
    return sums.index_add_(0, slots, grad.to(dtype))[:n]
