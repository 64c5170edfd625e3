"""Backward passes that compute the selected blocks of a weight's gradient.

The forward pass reads the full weight. One autograd function per kind of product forms the
selected blocks' gradient alone; :class:`Overlay` serves every other reader of a weight. Each saves
only what its own gradients need: no input where the packed parameter needs no gradient, no weight
where the input needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrad.sparse_products import wgrad
from fastgrad_kernels.layout import accumulation_dtype, gather_blocks

if TYPE_CHECKING:
    from fastgrad.blocks import BlockGrid
    from fastgrad.packed import PackedBlocks


@dataclass(frozen=True)
class Stripes:
    """The rows of a weight's matrix that selected blocks touch: no gradient beyond these is formed.

    Attributes:
        rows: int64 ``[m]``, ascending; whole block rows, of which only the last may be short.
        place: int64 ``[grid_rows]``, which of the touched block rows it is, -1 for none.
        ids: int64 ``[n]``, the selected blocks' numbers in the matrix of these rows alone.
        grid: the weight's blocks.
    """

    rows: Tensor
    place: Tensor
    ids: Tensor
    grid: BlockGrid

    def cut(self, touched: Tensor) -> Tensor:
        """Packed blocks ``[n, block_rows, block_cols]`` of the touched rows ``[m, cols]``."""
        grid = self.grid
        if self.in_order and touched.shape[0] == self.ids.numel() * grid.block_rows:
            return touched.reshape(-1, grid.block_rows, grid.cols)  # no copy
        return gather_blocks(touched, self.ids, grid.block_rows, grid.block_cols)

    def slots(self, index: Tensor) -> Tensor:
        """Where in the touched rows each row in ``index`` (int64, any shape) lies, -1 for none."""
        place = self.place[index // self.grid.block_rows]
        slot = place * self.grid.block_rows + index % self.grid.block_rows
        return torch.where(place < 0, -1, slot)

    @cached_property
    def in_order(self) -> bool:
        """The selected blocks are the touched rows, stripe after stripe."""
        return self.grid.grid_cols == 1 and bool((self.ids.diff() > 0).all())

    @cached_property
    def slot_of(self) -> dict[int, int]:
        """Row -> where in the touched rows it lies, on the host."""
        return {row: slot for slot, row in enumerate(self.rows.tolist())}

    @cached_property
    def runs(self) -> list[tuple[int, int, int, int]]:
        """Selected blocks that lie side by side, as ``(first of them in the packed tensor, block
        row, first block column, how many)``; on the host."""
        found: list[tuple[int, int, int, int]] = []
        block_row = (self.rows[:: self.grid.block_rows] // self.grid.block_rows).tolist()
        for slot, block in enumerate(self.ids.tolist()):
            i, j = block_row[block // self.grid.grid_cols], block % self.grid.grid_cols
            if found and found[-1][1] == i and found[-1][2] + found[-1][3] == j:
                first, _, begin, count = found[-1]
                found[-1] = first, i, begin, count + 1
            else:
                found.append((slot, i, j, 1))
        return found


def stripes_of(blocks: PackedBlocks) -> Stripes:
    """The touched rows of a weight; computed once for a selection."""
    ids, grid = blocks.ids, blocks.grid
    known: tuple[Tensor, Stripes] | None = blocks.__dict__.get("_stripes")
    if known is not None and known[0] is ids:
        return known[1]
    touched, slot = torch.unique(ids // grid.grid_cols, return_inverse=True)
    place = torch.full((grid.grid_rows,), -1, dtype=torch.int64, device=ids.device)
    place[touched] = torch.arange(touched.numel(), device=ids.device)
    rows = touched[:, None] * grid.block_rows + torch.arange(grid.block_rows, device=ids.device)
    rows = rows.view(-1)
    stripes = Stripes(
        rows[rows < grid.rows], place, slot * grid.grid_cols + ids % grid.grid_cols, grid
    )
    blocks.__dict__["_stripes"] = (ids, stripes)
    return stripes


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
        ctx.ids, ctx.stripes = blocks.ids, stripes_of(blocks)
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
            grad_packed = wgrad(left, right, ctx.ids, ctx.stripes).to(ctx.dtype)
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
        stripes: Stripes = ctx.stripes
        index = index.reshape(-1)
        slots = stripes.slots(index)
        keep = slots >= 0
        if ctx.padding_idx is not None:
            keep &= index != ctx.padding_idx
        grad = grad_out.reshape(index.numel(), stripes.grid.cols)[keep]
        grad = grad.to(accumulation_dtype(grad))
        touched = grad.new_zeros(stripes.rows.numel(), stripes.grid.cols)
        touched.index_add_(0, slots[keep], grad)
        return stripes.cut(touched).to(ctx.dtype), None, None, None, None
