"""Matrix views cut into blocks: gather, scatter and reduce without index tensors.

A matrix ``[rows, cols]`` is cut by ``block_rows x block_cols``; blocks are numbered row by
row. Edge blocks are smaller; packed tensors pad them with zeros. Interior, right edge, bottom
edge and corner are each a regular sub-matrix, so that all work is done on strided views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor


def matrix_view(tensor: Tensor) -> Tensor:
    """``[rows, cols]`` view: leading dimension by the product of all others; 1-D is one row."""
    if tensor.ndim == 2:
        return tensor
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.flatten(1)


def grid_shape(rows: int, cols: int, block_rows: int, block_cols: int) -> tuple[int, int]:
    return -(-rows // block_rows), -(-cols // block_cols)


Region: TypeAlias = tuple[slice, slice, int, int, slice, slice]


def _regions(rows: int, cols: int, block_rows: int, block_cols: int) -> Iterator[Region]:
    """Regular sub-matrices: (row slice, col slice, height, width, grid rows, grid cols)."""
    full_r, full_c = rows // block_rows, cols // block_cols
    row_parts = [(slice(0, full_r * block_rows), block_rows, slice(0, full_r))]
    col_parts = [(slice(0, full_c * block_cols), block_cols, slice(0, full_c))]
    if rows % block_rows:
        row_parts.append(
            (slice(full_r * block_rows, rows), rows % block_rows, slice(full_r, full_r + 1))
        )
    if cols % block_cols:
        col_parts.append(
            (slice(full_c * block_cols, cols), cols % block_cols, slice(full_c, full_c + 1))
        )
    for rs, h, gr in row_parts:
        for cs, w, gc in col_parts:
            if gr.stop > gr.start and gc.stop > gc.start:
                yield rs, cs, h, w, gr, gc


def block_sums(matrix: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """Sum of each block's elements: ``[..., rows, cols] -> [..., n_blocks]``."""
    rows, cols = matrix.shape[-2:]
    gr, gc = grid_shape(rows, cols, block_rows, block_cols)
    if gr == gc == 1:
        return matrix.sum((-2, -1)).unsqueeze(-1)
    out = matrix.new_empty(*matrix.shape[:-2], gr, gc)
    for rs, cs, h, w, grs, gcs in _regions(rows, cols, block_rows, block_cols):
        view = matrix[..., rs, cs].unflatten(-1, (-1, w)).unflatten(-3, (-1, h))
        out[..., grs, gcs] = view.sum((-3, -1))
    return out.flatten(-2)


def _groups(
    matrix: Tensor, ids: Tensor, block_rows: int, block_cols: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, int, int]]:
    """For each regular region: (view [gr, h, gc, w], i, j, where in packed, h, w); ``where`` is
    None for all of them."""
    rows, cols = matrix.shape
    if matrix.is_meta or not ids.numel():  # nothing to be read or written
        return
    grid_cols = -(-cols // block_cols)
    i, j = ids // grid_cols, ids % grid_cols
    regions = list(_regions(rows, cols, block_rows, block_cols))
    places = _places(ids, i, j, regions)
    for (rs, cs, h, w, grs, gcs), where in zip(regions, places, strict=True):
        if where is not None and where.numel() == 0:
            continue
        view = matrix[rs, cs].unflatten(1, (-1, w)).unflatten(0, (-1, h))
        row, col = (i, j) if where is None else (i[where], j[where])
        yield view, row - grs.start, col - gcs.start, where, h, w


def _places(
    ids: Tensor, i: Tensor, j: Tensor, regions: Sequence[Region]
) -> Sequence[Tensor | None]:
    """Which blocks lie in each region, int64; None for all of them.

    To count them a GPU's host waits. Block numbers stay the same for a whole training run, so what
    was found is kept with them until they change.
    """
    if len(regions) == 1:
        return [None]
    key = None
    if type(ids) is Tensor and not ids.is_inference() and not torch.compiler.is_compiling():
        key = [r[2:] for r in regions], ids._version
        known = ids.__dict__.get("_fastgrad_places")
        if known is not None and known[0] == key:
            found: Sequence[Tensor | None] = known[1]
            return found
    places: list[Tensor | None] = []
    for _, _, _, _, grs, gcs in regions:
        inside = (i >= grs.start) & (i < grs.stop) & (j >= gcs.start) & (j < gcs.stop)
        where = inside.nonzero().squeeze(1)
        places.append(None if where.numel() == ids.numel() else where)
    if key is not None:
        ids._fastgrad_places = key, places  # type: ignore[attr-defined]
    return places


def gather_blocks(matrix: Tensor, ids: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """Packed copy ``[n, block_rows, block_cols]`` of the blocks in ``ids`` (int64 ``[n]``)."""
    packed = matrix.new_zeros(ids.numel(), block_rows, block_cols)
    for view, i, j, where, h, w in _groups(matrix, ids, block_rows, block_cols):
        if where is None:
            packed[:, :h, :w] = view[i, :, j, :]
        else:
            packed[where, :h, :w] = view[i, :, j, :]
    return packed


def scatter_blocks_(
    matrix: Tensor, ids: Tensor, packed: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    """Write packed blocks into ``matrix`` in place, rounding to its dtype; padding is dropped."""
    for view, i, j, where, h, w in _groups(matrix, ids, block_rows, block_cols):
        blocks = packed if where is None else packed[where]  # a copy
        view[i, :, j, :] = blocks[:, :h, :w].to(matrix.dtype)
    return matrix


def write_blocks_(
    tensor: Tensor, ids: Tensor, packed: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    """:func:`scatter_blocks_` into a tensor of any shape and memory layout, in place."""
    if tensor.ndim <= 2 or tensor.is_contiguous():
        scatter_blocks_(matrix_view(tensor), ids, packed, block_rows, block_cols)
        return tensor
    # flattening would copy (channels_last, permuted experts): the copy must go back
    dense = tensor.contiguous()
    scatter_blocks_(matrix_view(dense), ids, packed, block_rows, block_cols)
    return tensor.copy_(dense)


def bare(tensor: Tensor) -> Tensor:
    """Without its graph. Most tensors of a backward pass have none, and a view of each would cost
    as much as what is done with it."""
    return tensor.detach() if tensor.requires_grad else tensor


NORM_CHUNK = 4096


def norm_chunks(flat: Tensor) -> list[Tensor]:
    """Consecutive chunks of :data:`NORM_CHUNK` elements as views: ``[n, NORM_CHUNK]`` of whole
    ones, ``[1, m]`` of what remains; what is empty is left out.

    PyTorch's float32 norm of a whole tensor is off by 6e-4 at 2^24 elements on a CPU, and a dot
    product by 9e-5 at 2^22, because each vector lane adds up millions of terms. Norms of short
    chunks, squared and added in float64, are right to float32 rounding and as fast.
    """
    main = flat.numel() // NORM_CHUNK
    if main and main * NORM_CHUNK == flat.numel():
        return [flat.view(main, NORM_CHUNK)]
    whole, rest = flat[: main * NORM_CHUNK], flat[main * NORM_CHUNK :]
    return [v for v in (whole.view(-1, NORM_CHUNK), rest.view(1, -1)) if v.numel()]


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Sum of squares of all elements, a float64 scalar; see :func:`norm_chunks`."""
    x = bare(tensor)
    if x.is_complex():  # of the magnitudes
        x = torch.view_as_real(x.resolve_conj()).flatten()
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if x.numel() <= NORM_CHUNK:
        return torch.linalg.vector_norm(x).double().square()
    if not x.is_contiguous() and x.ndim == 2 and x.T.is_contiguous():
        x = x.T
    parts = [torch.linalg.vector_norm(c, dim=1) for c in norm_chunks(x.reshape(-1))]
    norms = parts[0] if len(parts) == 1 else torch.cat(parts)
    return torch.linalg.vector_norm(norms, dtype=torch.float64).square_()


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays float64, all else accumulates in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
