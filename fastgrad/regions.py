"""Which part of a parameter a view shows, read from its place in memory."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Region(NamedTuple):
    """A matrix inside a parameter: a slice of rows, one expert's matrix, a fused projection's part.

    Element ``(i, k)`` is element ``offset + i * row_stride + k * col_stride`` of the flattened,
    contiguous parameter; ``row_stride > col_stride``, so a transposed view is noted by whoever
    made the region.
    """

    offset: int
    rows: int
    cols: int
    row_stride: int
    col_stride: int

    def of(self, tensor: Tensor) -> Tensor:
        """This region of a contiguous tensor that is laid out as the parameter: a view."""
        return tensor.view(-1).as_strided(
            (self.rows, self.cols),
            (self.row_stride, self.col_stride),
            self.offset + tensor.storage_offset(),
        )

    @property
    def end(self) -> int:
        """One past its last element."""
        last = (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride
        return self.offset + last + 1

    def disjoint(self, other: Region) -> bool:
        """True if they certainly share no element."""
        if self.end <= other.offset or other.end <= self.offset:
            return True
        # Two stripes of columns of one matrix lie interleaved in memory.
        step = self.row_stride
        if step != other.row_stride or {self.col_stride, other.col_stride} != {1}:
            return False
        (a, b), (c, d) = ((r.offset % step, r.offset % step + r.cols) for r in (self, other))
        return max(b, d) <= step and (b <= c or d <= a)

    def entries(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and presence of flat positions of the parameter."""
        place = index - self.offset
        row = place.div(self.row_stride, rounding_mode="floor")
        rest = place - row * self.row_stride
        col = rest.div(self.col_stride, rounding_mode="floor")
        here = (row >= 0) & (row < self.rows) & (col < self.cols) & (rest % self.col_stride == 0)
        return row.clamp(0, self.rows - 1), col.clamp(0, self.cols - 1), here


def region_of(view: Tensor, parameter: Tensor) -> tuple[Region, bool] | None:
    """The region of ``parameter`` that a matrix shows, and whether it shows it transposed.

    None if the matrix is no view of the (contiguous) parameter.
    """
    if view.ndim != 2 or 0 in view.shape or view.dtype != parameter.dtype:
        return None
    if view.is_conj() or view.is_neg():
        return None
    if not parameter.is_contiguous() or parameter.device.type == "meta":
        return None
    if view.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
        return None
    offset = int(view.storage_offset() - parameter.storage_offset())
    (rows, cols), (row_stride, col_stride) = view.shape, view.stride()
    # the stride of a dimension of size one says nothing
    col_stride = 1 if cols == 1 else col_stride
    row_stride = cols * col_stride if rows == 1 else row_stride
    flipped = row_stride < col_stride
    if flipped:
        rows, cols, row_stride, col_stride = cols, rows, col_stride, row_stride
    region = Region(offset, rows, cols, row_stride, col_stride)
    if col_stride < 1 or row_stride < (cols - 1) * col_stride + 1:  # expanded, or overlapping
        return None
    if offset < 0 or region.end > parameter.numel():
        return None
    return region, flipped


def whole(rows: int, cols: int) -> Region:
    """All of a parameter whose matrix view has this size."""
    return Region(0, rows, cols, cols, 1)


__all__ = ["Region", "region_of", "whole"]
