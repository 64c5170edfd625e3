"""The rows of a matrix that selected blocks touch: found once for a list of block numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastgrad_kernels.layout import gather_blocks, grid_shape


@dataclass(frozen=True)
class Stripes:
    """Block rows with selected blocks: no gradient beyond these is formed.

    Attributes:
        rows: int64 ``[m]``, ascending; whole block rows, of which only the last may be short.
        place: int64 ``[grid_rows]``, which of the touched block rows it is, -1 for none.
        ids: int64 ``[n]``, the selected blocks' numbers in the matrix of these rows alone.
        in_order: the selected blocks are the touched rows, stripe after stripe.
        shape: rows and columns of the whole matrix.
        block: rows and columns of a block, which may exceed those of the matrix.
    """

    rows: Tensor
    place: Tensor
    ids: Tensor
    in_order: bool
    shape: tuple[int, int]
    block: tuple[int, int]

    @property
    def cols(self) -> int:
        return self.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks down and across the whole matrix."""
        return grid_shape(*self.shape, *self.block)

    def cut(self, touched: Tensor) -> Tensor:
        """Packed blocks ``[n, block_rows, block_cols]`` of the touched rows ``[m, cols]``."""
        height, width = self.block
        fits = touched.shape[0] == self.ids.numel() * height and width == self.cols
        if self.in_order and fits:
            return touched.reshape(-1, height, width)  # no copy
        return gather_blocks(touched, self.ids, height, width)

    def slots(self, index: Tensor) -> Tensor:
        """Where in the touched rows each row in ``index`` (int64, any shape) lies, -1 for none."""
        height = self.block[0]
        place = self.place[index // height]
        return torch.where(place < 0, -1, place * height + index % height)

    @cached_property
    def slot_of(self) -> dict[int, int]:
        """Row -> where in the touched rows it lies, on the host."""
        return {row: slot for slot, row in enumerate(self.rows.tolist())}

    @cached_property
    def runs(self) -> list[tuple[int, int, int, int]]:
        """Selected blocks that lie side by side, as ``(first of them in the packed tensor, block
        row, first block column, how many)``; on the host."""
        found: list[tuple[int, int, int, int]] = []
        height, across = self.block[0], self.grid[1]
        block_row = (self.rows[::height] // height).tolist()
        for slot, block in enumerate(self.ids.tolist()):
            i, j = block_row[block // across], block % across
            if found and found[-1][1] == i and found[-1][2] + found[-1][3] == j:
                first, _, begin, count = found[-1]
                found[-1] = first, i, begin, count + 1
            else:
                found.append((slot, i, j, 1))
        return found


@torch.compiler.disable  # what it keeps hangs on the tensor, and it may wait for a device
def stripes_of(ids: Tensor, rows: int, cols: int, block_rows: int, block_cols: int) -> Stripes:
    """What these blocks of a ``rows x cols`` matrix touch.

    Found on the host, for which a GPU is waited for once: it is kept with the numbers (int64
    ``[n]``) until they are changed in place or asked for another matrix.
    """
    version = None if ids.is_inference() else ids._version
    key = (version, rows, cols, block_rows, block_cols)
    known: tuple[object, Stripes] | None = getattr(ids, "_fastgrad_stripes", None)
    if known is not None and known[0] == key:
        return known[1]
    across = -(-cols // block_cols)
    host = ids.cpu()
    touched, slot = torch.unique(host // across, return_inverse=True)
    place = torch.full((-(-rows // block_rows),), -1, dtype=torch.int64)
    place[touched] = torch.arange(touched.numel())
    every = (touched[:, None] * block_rows + torch.arange(block_rows)).view(-1)
    inside = slot * across + host % across
    stripes = Stripes(
        every[every < rows].to(ids.device),
        place.to(ids.device),
        inside.to(ids.device),
        across == 1 and bool((inside.diff() > 0).all()),
        (rows, cols),
        (block_rows, block_cols),
    )
    ids._fastgrad_stripes = key, stripes  # type: ignore[attr-defined]
    return stripes


__all__ = ["Stripes", "stripes_of"]
