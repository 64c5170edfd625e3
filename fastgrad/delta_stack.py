"""A chain of deltas, each trained on top of the one before, as one delta for the first base."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.blocks import BlockGrid, condensed
from fastgrad.delta_files import DeltaFile, read_delta_file, write_delta_file
from fastgrad.errors import DeltaError
from fastgrad_kernels.layout import gather_blocks, matrix_view, scatter_blocks_


def stack_deltas(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> int:
    """Merge deltas into one for the base of the first. Returns the new file's size in bytes.

    Where several change a weight, the last one counts. Blocks of different granularities are
    written in the largest blocks that divide both. Not needed to use a chain: :func:`load_delta`
    takes one after another.

    Args:
        paths: files of :func:`save_delta`, in the order in which they were trained.
        out: where the merged delta goes; may be one of ``paths``.

    Raises:
        DeltaError: if a file is missing or damaged, a delta was not trained on top of the one
            before it, or two granularities have nothing in common but single weights. No file is
            written then.
    """
    if isinstance(paths, str | os.PathLike) or len(paths) < 2:
        raise DeltaError("stack_deltas takes a list of two or more files. Remedy: [first, second]")
    deltas = [read_delta_file(path) for path in paths]
    for (path, delta), (above, following) in pairwise(zip(paths, deltas, strict=True)):
        _check_link(path, delta, above, following)
    return write_delta_file(_merged(deltas, paths), out)


def _check_link(path: object, delta: DeltaFile, above: object, following: DeltaFile) -> None:
    if delta.result_hash is None:
        raise DeltaError(
            f"{path} does not say what weights it results in: it was saved by an older version. "
            "Remedy: load the deltas into the base model one after another, or save it again"
        )
    if following.base_hash != delta.result_hash:
        raise DeltaError(
            f"{above} was trained on weights {following.base_hash[:23]}..., not on those that "
            f"{path} results in, {delta.result_hash[:23]}... Remedy: give the deltas of one chain "
            "in the order in which they were trained"
        )


def _merged(deltas: Sequence[DeltaFile], paths: Sequence[object]) -> DeltaFile:
    names = list(dict.fromkeys(name for delta in deltas for name in delta.shapes))
    shapes: dict[str, tuple[int, ...]] = {}
    specs: dict[str, str] = {}
    ids: dict[str, Tensor | None] = {}
    values: dict[str, Tensor] = {}
    for name in names:
        layers = [delta for delta in deltas if name in delta.shapes]
        kinds = {(delta.shapes[name], delta.values[name].dtype) for delta in layers}
        if len(kinds) > 1:
            raise DeltaError(
                f"{name} has another shape or dtype in some of {', '.join(map(str, paths))}: they "
                "were made for different models"
            )
        shapes[name] = layers[0].shapes[name]
        grid = _common([delta.grid(name) for delta in layers], name)
        specs[name] = grid.spec
        ids[name], values[name] = _overlaid(name, layers, grid)
    spec, differing = condensed(specs)
    return DeltaFile(
        spec, shapes, ids, values, deltas[0].base_hash, deltas[-1].result_hash, differing
    )


def _common(grids: Sequence[BlockGrid], name: str) -> BlockGrid:
    """The grid of the largest blocks that every block of each grid is made of.

    Raises:
        DeltaError: if these are single weights where no grid has such.
    """
    first = grids[0]
    if all(grid.same_blocks(first) for grid in grids):
        return first
    # A block as high as the weight is made of blocks of any height.
    rows = math.gcd(*(g.block_rows for g in grids if g.block_rows < first.rows)) or first.rows
    cols = math.gcd(*(g.block_cols for g in grids if g.block_cols < first.cols)) or first.cols
    if rows == cols == 1 and first.numel > 1:
        raise DeltaError(
            f"{name}: blocks of granularities {', '.join(sorted({g.spec for g in grids}))} have "
            "nothing in common but single weights, whose numbers would take more bytes than they "
            "do. Remedy: load the deltas one after another, or train them at one granularity"
        )
    high = "*" if rows == first.rows else str(rows)
    wide = "*" if cols == first.cols else str(cols)
    return BlockGrid.of(first.shape, "module" if high == wide == "*" else f"{high}x{wide}")


def _overlaid(
    name: str, layers: Sequence[DeltaFile], grid: BlockGrid
) -> tuple[Tensor | None, Tensor]:
    """Numbers and values of the blocks of ``grid`` that any of the deltas changes."""
    canvas = torch.zeros(grid.shape, dtype=layers[0].values[name].dtype)
    covered = np.zeros((grid.grid_rows, grid.grid_cols), dtype=bool)
    view = matrix_view(canvas)
    for delta in layers:
        own, ids = delta.grid(name), delta.ids[name]
        if ids is None:
            canvas.copy_(delta.values[name])
            covered[:] = True
            continue
        scatter_blocks_(view, ids, delta.values[name], own.block_rows, own.block_cols)
        covered |= _divided(own, ids, grid)
    numbers = torch.from_numpy(np.flatnonzero(covered))
    if numbers.numel() == grid.n_blocks:
        return None, canvas
    return numbers, gather_blocks(view, numbers, grid.block_rows, grid.block_cols)


def _divided(own: BlockGrid, ids: Tensor, finer: BlockGrid) -> NDArray[np.bool_]:
    """Which blocks of the finer grid lie in these blocks, ``[grid_rows, grid_cols]``."""
    inside = np.zeros(own.n_blocks, dtype=bool)
    inside[ids.numpy()] = True
    marks = inside.reshape(own.grid_rows, own.grid_cols)
    marks = marks.repeat(-(-own.block_rows // finer.block_rows), axis=0)[: finer.grid_rows]
    return marks.repeat(-(-own.block_cols // finer.block_cols), axis=1)[:, : finer.grid_cols]
