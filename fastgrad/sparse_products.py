"""Selected blocks of a weight gradient ``leftᵀ right`` on a CPU, by the shape of the blocks.

Rows and columns are one product over what is gathered of one factor. Tiles are one product each,
of views, straight into their place; neighbours share one.
``ops.sparse_wgrad`` on a CPU gathers columns for each stripe of tiles instead, which costs more the
smaller the tiles are. Products of tiles smaller than 16x16 are mostly calls: for these whole block
rows are formed, a bounded part at a time, and cut, so that a small share of them saves little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgrad_kernels import ops
from fastgrad_kernels.layout import accumulation_dtype, gather_blocks

if TYPE_CHECKING:
    from fastgrad.sparse_layers import Stripes

SMALLEST_TILE = 256  # elements of a tile that is worth a product of its own
PART = 1 << 20  # elements of whole block rows that are formed at a time


def wgrad(left: Tensor, right: Tensor, ids: Tensor, stripes: Stripes) -> Tensor:
    """Selected blocks of ``leftᵀ right``.

    Args:
        left, right: ``[tokens, rows]`` and ``[tokens, cols]``, of one float dtype.
        ids: int64 ``[n]``, the selected blocks.
        stripes: what these blocks touch.

    Returns:
        ``[n, block_rows, block_cols]``, float32 (float64 for float64 factors); edge blocks are
        padded with zeros.
    """
    grid = stripes.grid
    if left.device.type != "cpu" or torch.compiler.is_compiling():
        return ops.sparse_wgrad(left, right, ids, grid.block_rows, grid.block_cols)
    dtype = accumulation_dtype(left)
    if grid.grid_cols == 1:
        if stripes.rows.numel() < grid.rows:
            left = left[:, stripes.rows]
        return stripes.cut(left.to(dtype).T @ right.to(dtype))
    if grid.grid_rows == 1 and grid.block_cols == 1:
        return (right[:, ids].to(dtype).T @ left.to(dtype))[:, :, None]
    left, right = left.to(dtype), right.to(dtype)
    if grid.block_rows * grid.block_cols < SMALLEST_TILE:
        return _cut_parts(left, right, ids, stripes)
    return _tiles(left, right, stripes)


def _tiles(left: Tensor, right: Tensor, stripes: Stripes) -> Tensor:
    grid = stripes.grid
    height, width = grid.block_rows, grid.block_cols
    ragged = grid.rows % height or grid.cols % width
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


def _cut_parts(left: Tensor, right: Tensor, ids: Tensor, stripes: Stripes) -> Tensor:
    grid = stripes.grid
    height = grid.block_rows
    packed = left.new_empty(ids.numel(), height, grid.block_cols)
    step = max(1, PART // (grid.cols * height))  # block rows of a part
    touched = stripes.rows
    place = stripes.ids // grid.grid_cols
    for first in range(0, -(-touched.numel() // height), step):
        rows = touched[first * height : (first + step) * height]
        inside = ((place >= first) & (place < first + step)).nonzero().squeeze(1)
        local = stripes.ids[inside] - first * grid.grid_cols
        packed[inside] = gather_blocks(left[:, rows].T @ right, local, height, grid.block_cols)
    return packed


__all__ = ["wgrad"]
