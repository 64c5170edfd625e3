"""Weight gradient of the selected blocks only, into a packed tensor.

One program per tile of a selected block. Thin blocks (single rows or columns) would waste a
matrix instruction on 1 of its 16 rows, so their factor's features are gathered first and the
whole selection becomes one dense product, computed by the same kernel as a single block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrad_kernels.compile_check import Shipped, in_tf32
from fastgrad_kernels.configs import (
    ARCHS,
    CHIPS,
    Tile,
    architecture,
    on_device,
    sparse_tile,
    target,
    units,
)
from fastgrad_kernels.dispatch import interpreted
from fastgrad_kernels.gram import DTYPES, precision

# Stripes thinner than a matrix instruction are gathered.
THIN = 16
MAX_SPLITS = 16


@triton.jit
def sparse_wgrad_kernel(  # type: ignore[no-untyped-def]
    left,
    right,
    ids,
    offsets,
    packed,
    tokens,
    n_rows,
    n_cols,
    left_stride,
    right_stride,
    n_blocks,
    block_rows,
    block_cols,
    grid_cols,
    tokens_per_split,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``packed[split, i] = block ids[i] of left[s]ᵀ right[s]``, s the tokens of this split; added
    to what is there if ACCUMULATE. Entries of a block beyond the matrix are zeros.

    left ``[tokens, n_rows]``, right ``[tokens, n_cols]`` with unit stride along columns; ids int64
    ``[n_blocks]`` numbers of blocks ``block_rows x block_cols``, row by row, ``grid_cols`` to a
    row; packed ``[n_splits, n_blocks, block_rows, block_cols]`` float32.

    EXPERTS: ids are numbers of experts instead; block i is the whole ``n_rows x n_cols`` product of
    the tokens ``offsets[ids[i]]:offsets[ids[i] + 1]`` (int64 ``[n_experts + 1]``), each split an
    equal part of them.
    Grid: (n_blocks · tiles in a block, n_splits).
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    tiles_r, tiles_c = tl.cdiv(block_rows, BR), tl.cdiv(block_cols, BC)
    i = pid // (tiles_r * tiles_c)
    pid = pid % (tiles_r * tiles_c)
    first = pid // (GROUP * tiles_c) * GROUP
    height = tl.minimum(tiles_r - first, GROUP)
    tr = (first + pid % (GROUP * tiles_c) % height) * BR
    tc = pid % (GROUP * tiles_c) // height * BC

    block = tl.load(ids + i)
    if EXPERTS:
        row, col = tr, tc
        first_token = tl.load(offsets + block)
        tokens = tl.load(offsets + block + 1) - first_token
        share = (tokens + tl.num_programs(1) - 1) // tl.num_programs(1)
        tokens_per_split = ((share + BK - 1) // BK * BK).to(tl.int32)
        left += first_token * left_stride
        right += first_token * right_stride
    else:
        row, col = block // grid_cols * block_rows + tr, block % grid_cols * block_cols + tc
    r, c, k = tl.arange(0, BR), tl.arange(0, BC), tl.arange(0, BK)
    # Features of the next block in the same tile are read but not stored; only the matrix's own
    # edge is masked, whose position keeps the loads wide.
    in_rows, in_cols = (row + r < n_rows)[:, None], (col + c < n_cols)[None, :]
    left_at = r[:, None] + k[None, :] * left_stride
    right_at = k[:, None] * right_stride + c[None, :]
    begin = split.to(tl.int64) * tokens_per_split
    count = tl.minimum(tokens_per_split, tl.maximum(tokens - begin, 0)).to(tl.int32)
    left += row + begin * left_stride
    right += col + begin * right_stride
    acc = tl.zeros((BR, BC), tl.float32)
    for start in range(0, count, BK):
        mine = start + k < count
        a = tl.load(left + left_at, in_rows & mine[None, :], 0.0)
        b = tl.load(right + right_at, mine[:, None] & in_cols, 0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        left += BK * left_stride.to(tl.int64)
        right += BK * right_stride.to(tl.int64)

    # What lies right of or below the matrix was read as zeros; blocks end with the grid.
    inside = (tr + r < block_rows)[:, None] & (tc + c < block_cols)[None, :]
    at = (split.to(tl.int64) * n_blocks + i) * block_rows * block_cols
    at += tr.to(tl.int64) * block_cols + tc
    spot = packed + at + r[:, None] * block_cols + c[None, :]
    if ACCUMULATE:
        acc += tl.load(spot, inside, 0.0)
    tl.store(spot, acc, inside)


def token_splits(tiles: int, work: float, written: float, n_units: int, limit: int) -> int:
    """How many programs share the tokens of one tile.

    A selection rarely fills whole waves of the chip: 205 tiles on 132 units cost two waves, as
    much as 264 would. With s programs per tile ``⌈tiles·s/units⌉ / s`` waves are left, for which
    s copies of the result are written and read again. The cheapest s in seconds is taken.

    Args:
        tiles: tiles of the result.
        work: seconds that one unit needs for one tile over all tokens.
        written: seconds for writing one copy of the result and reading it again.
        n_units: multiprocessors.
        limit: largest s that leaves each program enough tokens.
    """

    def seconds(s: int) -> float:
        extra = s * written + 5e-6 if s > 1 else 0.0
        return -(-tiles * s // n_units) / s * work + extra

    return min(range(1, max(1, min(limit, MAX_SPLITS)) + 1), key=seconds)


def _too_large(tile: Tile, tiles: int, left: Tensor, right: Tensor, block_cols: int) -> str | None:
    if (
        tile.rows * block_cols + tile.cols >= 2**31
        or tiles >= 2**31
        or tile.depth * max(left.stride(0), right.stride(0)) + max(left.shape[1], right.shape[1])
        >= 2**31
    ):
        return (
            "one tile spans 2^31 elements or more, or there are as many tiles: offsets inside a "
            "tile are 32 bits wide"
        )
    return None


def unsupported(
    left: Tensor, right: Tensor, ids: Tensor, block_rows: int, block_cols: int
) -> str | None:
    """Why the kernel cannot do this, in words, or None if it can."""
    if left.dtype not in DTYPES.values():
        return f"dtype {left.dtype}: the kernel accumulates in float32"
    rows, cols = left.shape[1], right.shape[1]
    tile = sparse_tile(
        left.dtype, architecture(left.device), min(block_rows, rows), min(block_cols, cols)
    )
    tiles = ids.numel() * -(-block_rows // tile.rows) * -(-block_cols // tile.cols)
    return _too_large(tile, tiles, left, right, block_cols)


def _launch(
    left: Tensor,
    right: Tensor,
    ids: Tensor,
    shape: tuple[int, int],
    block: tuple[int, int],
    into: Tensor | None,
    tile: Tile | None,
    splits: int | None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Blocks ``ids`` of a ``shape`` matrix as ``[n, *block]``; the factors may be wider. With
    ``offsets`` the product of each expert in ``ids``."""
    (rows, cols), (block_rows, block_cols) = shape, block
    tokens, n = left.shape[0], ids.numel()
    arch = architecture(left.device)
    tile = tile or sparse_tile(left.dtype, arch, min(block_rows, rows), min(block_cols, cols))
    tiles = n * triton.cdiv(block_rows, tile.rows) * triton.cdiv(block_cols, tile.cols)
    if (reason := _too_large(tile, tiles, left, right, block_cols)) is not None:
        raise ValueError(f"fastgrad_kernels: {n} blocks of {block_rows}x{block_cols}: {reason}")
    if splits is None:
        chip, n_units = CHIPS[arch], units(left.device)
        rate = (chip.scalar if left.dtype == torch.float32 else chip.matrix) / chip.units
        mean = tokens if offsets is None else tokens / max(1, offsets.numel() - 1)
        work = 2 * mean * tile.rows * tile.cols / rate
        written = 8 * n * block_rows * block_cols / chip.memory
        # Eight chunks at the least, or filling the pipeline costs more than the split saves.
        splits = token_splits(tiles, work, written, n_units, int(mean) // (8 * tile.depth))
    accumulate = into is not None and splits == 1
    out = into
    if out is None or not accumulate:
        out = left.new_empty(splits, n, block_rows, block_cols, dtype=torch.float32)
    per_split = triton.cdiv(triton.cdiv(max(tokens, 1), splits), tile.depth) * tile.depth
    with on_device(left):
        sparse_wgrad_kernel[(tiles, splits)](
            left,
            right,
            ids,
            ids if offsets is None else offsets,
            out,
            tokens,
            left.shape[1],
            right.shape[1],
            left.stride(0),
            right.stride(0),
            n,
            block_rows,
            block_cols,
            triton.cdiv(cols, block_cols),
            per_split,
            BR=tile.rows,
            BC=tile.cols,
            BK=tile.depth,
            GROUP=tile.group,
            EXPERTS=offsets is not None,
            ACCUMULATE=accumulate,
            PRECISION=precision(left.dtype),
            UPCAST=interpreted(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    if accumulate:
        return out
    result = out[0] if splits == 1 else out.sum(0)
    return result if into is None else into.add_(result)


def _gather(x: Tensor, stripes: Tensor, width: int) -> Tensor:
    """``[tokens, n·width]`` features of the stripes, zeros beyond the edge; the row length is
    rounded up to 16 elements, so that the kernel's loads stay 128 bits wide."""
    index = (stripes[:, None] * width + torch.arange(width, device=x.device)).view(-1)
    index = torch.nn.functional.pad(index, (0, -index.numel() % 16), value=x.shape[1])
    gathered = x.index_select(1, index.clamp_max(x.shape[1] - 1))
    # where, not a product: NaN times zero is NaN.
    return torch.where(
        index < x.shape[1], gathered, torch.zeros((), dtype=x.dtype, device=x.device)
    )


def sparse_wgrad(
    left: Tensor,
    right: Tensor,
    ids: Tensor,
    block_rows: int,
    block_cols: int,
    *,
    into: Tensor | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """``ops.sparse_wgrad`` on a GPU: ``[n, block_rows, block_cols]`` float32.

    Args:
        left, right, ids, block_rows, block_cols: as in ``ops.sparse_wgrad``.
        into: contiguous packed float32 tensor to add to, in place; it is returned.
        tile: another tile than the default.
        splits: programs that share the tokens of one tile; partial sums are added in order.

    Raises:
        ValueError: for a dtype that the kernel does not know, or an ``into`` that does not fit.
    """
    if left.dtype not in DTYPES.values():
        raise ValueError(f"fastgrad_kernels: dtype {left.dtype}: the kernel accumulates in float32")
    n, rows, cols = ids.numel(), left.shape[1], right.shape[1]
    full = (n, block_rows, block_cols)
    if into is not None and (
        into.shape != full or into.dtype != torch.float32 or not into.is_contiguous()
    ):
        raise ValueError(
            f"fastgrad_kernels: cannot add to {into.dtype} {tuple(into.shape)} with strides "
            f"{into.stride()}: a contiguous float32 tensor {full} is needed"
        )
    if n == 0 or rows == 0 or cols == 0:
        return left.new_zeros(full, dtype=torch.float32) if into is None else into
    left = left if left.stride(1) == 1 else left.contiguous()
    right = right if right.stride(1) == 1 else right.contiguous()
    ids = ids.to(left.device)
    whole = ids.new_zeros(1)
    if block_cols >= cols and block_rows < min(THIN, rows):
        dense = (n * block_rows, block_cols)
        target = None if into is None else into.view(1, *dense)
        rows_of = _gather(left, ids, block_rows)
        args = (rows_of, right, whole, (dense[0], cols), dense)
        return _launch(*args, target, tile, splits).view(full)
    if block_rows >= rows and block_cols < min(THIN, cols):
        # Columns are rows of the transposed gradient, whose factors change places.
        dense = (n * block_cols, block_rows)
        direct = block_cols == 1 and into is not None
        target = into.view(1, *dense) if direct and into is not None else None
        columns_of = _gather(right, ids, block_cols)
        args = (columns_of, left, whole, (dense[0], rows), dense)
        result = _launch(*args, target, tile, splits).view(n, block_cols, block_rows).mT
        if direct or into is None:
            return result.contiguous().view(full)
        return into.add_(result)
    return _launch(left, right, ids, (rows, cols), (block_rows, block_cols), into, tile, splits)


def expert_wgrad(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    ids: Tensor,
    *,
    into: Tensor | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """``ops.expert_wgrad`` on a GPU: ``[n, rows, cols]`` float32.

    Args:
        left, right, offsets, ids: as in ``ops.expert_wgrad``.
        into: contiguous packed float32 tensor to add to, in place; it is returned.
        tile: another tile than the default.
        splits: programs that share an expert's tokens; partial sums are added in order.

    Raises:
        ValueError: for a dtype that the kernel does not know.
    """
    if left.dtype not in DTYPES.values():
        raise ValueError(f"fastgrad_kernels: dtype {left.dtype}: the kernel accumulates in float32")
    shape = (left.shape[1], right.shape[1])
    if ids.numel() == 0 or 0 in shape:
        empty = left.new_zeros(ids.numel(), *shape, dtype=torch.float32)
        return empty if into is None else into
    left = left if left.stride(1) == 1 else left.contiguous()
    right = right if right.stride(1) == 1 else right.contiguous()
    return _launch(left, right, ids, shape, shape, into, tile, splits, offsets)


def _shipped() -> tuple[Shipped, ...]:
    """Blocks of 128x128 and gathered stripes, 64x64 and 16x16 blocks."""
    out = []
    for arch in ARCHS:
        for short, dtype in DTYPES.items():
            for size in (128, 64, 16):
                tile = sparse_tile(dtype, arch, size, size)
                pointers = {"left": f"*{short}", "right": f"*{short}", "ids": "*i64"}
                pointers |= {"offsets": "*i64", "packed": "*fp32"}
                numbers = ["n_rows", "n_cols", "left_stride", "right_stride"]
                numbers += ["block_rows", "block_cols", "tokens_per_split"]
                others = ("tokens", "n_blocks", "grid_cols")
                constants = {
                    "BR": tile.rows,
                    "BC": tile.cols,
                    "BK": tile.depth,
                    "GROUP": tile.group,
                    "ACCUMULATE": False,
                    "PRECISION": "ieee",
                    "UPCAST": False,
                }
                for experts in (False, True) if size == 128 else (False,):
                    form = "experts/" if experts else ""
                    out.append(
                        Shipped(
                            f"sparse_wgrad/{form}{short}/{tile.rows}x{tile.cols}x{tile.depth}",
                            sparse_wgrad_kernel,
                            pointers | dict.fromkeys((*numbers, *others), "i32"),
                            constants | {"EXPERTS": experts},
                            tile.warps,
                            tile.stages,
                            (*pointers, *numbers),
                            (target(arch),),
                        )
                    )
    return tuple(out)


SHIPPED = _shipped()
SHIPPED += in_tf32(e for e in SHIPPED if "/128x" in e.name)
