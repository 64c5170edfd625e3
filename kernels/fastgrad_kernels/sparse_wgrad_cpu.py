"""Selected blocks of a weight gradient ``leftᵀ right`` in PyTorch, by the shape of the blocks.

Rows and columns are one product over what is gathered of one factor. Tiles are one product each,
of views, straight into their place; neighbours share one. Products of tiles smaller than 16x16 are
mostly calls: for these whole block rows are formed, a bounded part at a time, and cut, so that a
small share of them saves little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrad_kernels.layout import accumulation_dtype, gather_blocks
from fastgrad_kernels.stripes import Stripes, stripes_of

SMALLEST_TILE = 256  # elements of a tile that is worth a product of its own
PART = 1 << 20  # elements of whole block rows that are formed at a time


def sparse_wgrad(
    left: Tensor, right: Tensor, ids: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    """See :func:`fastgrad_kernels.ops.sparse_wgrad`."""
    dtype = accumulation_dtype(left)
    rows, cols = left.shape[1], right.shape[1]
    if block_rows == rows and block_cols == 1:
        return (right[:, ids].to(dtype).T @ left.to(dtype))[:, :, None]
    stripes = stripes_of(ids, rows, cols, block_rows, block_cols)
    if block_cols >= cols:
        if stripes.rows.numel() < rows:
            left = left[:, stripes.rows]
        return stripes.cut(left.to(dtype).T @ right.to(dtype))
    left, right = left.to(dtype), right.to(dtype)
    if block_rows * block_cols < SMALLEST_TILE:
        return _cut_parts(left, right, stripes)
    return _tiles(left, right, stripes)


def _tiles(left: Tensor, right: Tensor, stripes: Stripes) -> Tensor:
    height, width = stripes.block
    ragged = stripes.shape[0] % height or stripes.shape[1] % width
    shape = (stripes.ids.numel(), height, width)
    packed = left.new_zeros(shape) if ragged else left.new_empty(shape)
    for slot, i, j, count in stripes.runs:
        rows = left[:, i * height : (i + 1) * height].T
        cols = right[:, j * width : (j + count) * width]
        if count == 1 and not ragged:
            torch.mm(rows, cols, out=packed[slot])
            continue
        product = rows @ cols
        for k, tile in enumerate(product.split(width, 1)):
            packed[slot + k, : tile.shape[0], : tile.shape[1]] = tile
    return packed


def _cut_parts(left: Tensor, right: Tensor, stripes: Stripes) -> Tensor:
    height, width = stripes.block
    across, touched = stripes.grid[1], stripes.rows
    packed = left.new_empty(stripes.ids.numel(), height, width)
    step = max(1, PART // (stripes.cols * height))  # block rows of a part
    place = stripes.ids // across
    for first in range(0, -(-touched.numel() // height), step):
        rows = touched[first * height : (first + step) * height]
        inside = ((place >= first) & (place < first + step)).nonzero().squeeze(1)
        local = stripes.ids[inside] - first * across
        packed[inside] = gather_blocks(left[:, rows].T @ right, local, height, width)
    return packed


__all__ = ["sparse_wgrad"]
