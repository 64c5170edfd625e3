"""Weight gradient, per-example squared norms and signed influences in one pass over the factors.

The kernel computes a tile of ``leftᵀ right`` one example after the other. At each example
boundary the tile's own contribution is at hand: its squared sums and its dot products with
target directions are written, then it is added to the running gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrad_kernels import gram
from fastgrad_kernels.compile_check import Shipped, in_tf32
from fastgrad_kernels.configs import (
    ARCHS,
    FUSED_IN_MEMORY,
    Tile,
    architecture,
    fused_tile,
    on_device,
    target,
    units,
)
from fastgrad_kernels.dispatch import interpreted, keep, moved, upload
from fastgrad_kernels.layout import block_sums

# Directions handled by one launch, with a gradient and without: each is a tile of registers at
# the example boundary, and the loop over them is unrolled, since a loop inside the token loop
# would end its pipelining. One more and the compiler spills.
MAX_DIRECTIONS = {True: 2, False: 4}
# Squared sums that one tile may write per example; more would rival the gradient's own traffic.
MAX_SUMS = 256
# Wide blocks are summed over 16 rows at a time: one warp holds 16 rows of an accumulator tile,
# so the sum needs no barrier while the matrix units wait.
WARP_ROWS = 16


@triton.jit
def cross_influence_kernel(  # type: ignore[no-untyped-def]
    left,
    right,
    offsets,
    splits,
    directions,
    grad,
    sums,
    dots,
    n_rows,
    n_cols,
    left_stride,
    right_stride,
    n_examples,
    sums_rows,
    sums_cols,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SUB_R: tl.constexpr,
    SUB_C: tl.constexpr,
    N_DIR: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """With ``P_j = left[o_j:o_{j+1}]ᵀ right[o_j:o_{j+1}]`` for example j of this split:

        grad[split] = Σ_j P_j            [rows, cols] per split, or added to what is there
        sums[j, u, v] = Σ P_j[u·SUB_R:(u+1)·SUB_R, v·SUB_C:(v+1)·SUB_C]²
        dots[d, j, tile] = ⟨P_j, directions_d⟩ over this tile

    left ``[N, rows]``, right ``[N, cols]`` with unit stride along columns; offsets int64
    ``[n + 1]``; splits int64 ``[n_splits + 1]``: split s owns examples ``splits[s]:splits[s+1]``;
    directions ``[N_DIR, rows, cols]`` contiguous; sums ``[n, sums_rows, sums_cols]``, which are
    the grid of tiles times the sums in each. Grid: (tiles, n_splits).

    Examples and chunks of tokens form one flat loop, not two nested ones: the pipeline of loads
    then runs on across example boundaries instead of draining at each. An example without tokens
    takes one chunk, fully masked, so that its zeros are written like all others.

    IN_MEMORY: the running gradient lives in ``grad`` (float32), not in registers. One program owns
    each address and adds to it in program order, so the sum's order is fixed; the additions are
    made by the cache and nothing waits for them.
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    tiles_r, tiles_c = tl.cdiv(n_rows, BR), tl.cdiv(n_cols, BC)
    first = pid // (GROUP * tiles_c) * GROUP
    height = tl.minimum(tiles_r - first, GROUP)
    pr = first + pid % (GROUP * tiles_c) % height
    pc = pid % (GROUP * tiles_c) // height

    j = tl.load(splits + split)
    j_first = j
    j_end = tl.load(splits + split + 1)
    chunks = 0
    for base in range(j, j_end, 128):
        index = base + tl.arange(0, 128)
        owned = index < j_end
        length = tl.load(offsets + index + 1, mask=owned, other=0)
        length -= tl.load(offsets + index, mask=owned, other=0)
        count = tl.where(owned, tl.maximum((length + BK - 1) // BK, 1), 0)
        chunks += tl.sum(count.to(tl.int32))

    r, c, k = tl.arange(0, BR), tl.arange(0, BC), tl.arange(0, BK)
    in_rows, in_cols = pr * BR + r < n_rows, pc * BC + c < n_cols
    # Left is loaded transposed, features by tokens: a transposition after the load would keep
    # chips before sm_90 from copying it to shared memory asynchronously.
    left_at = r[:, None] + k[None, :] * left_stride
    right_at = k[:, None] * right_stride + c[None, :]
    left += pr * BR
    right += pc * BC
    # Offsets inside a tile fit 32 bits (the launcher checks); the tile's own may not.
    corner = (pr * BR).to(tl.int64) * n_cols + pc * BC
    inside = r[:, None] * n_cols + c[None, :]
    in_tile = in_rows[:, None] & in_cols[None, :]
    NR: tl.constexpr = BR // SUB_R
    NC: tl.constexpr = BC // SUB_C
    sums_at = tl.arange(0, NR)[:, None] * sums_cols + tl.arange(0, NC)[None, :]

    part = tl.zeros((BR, BC), tl.float32)
    if WANT_GRAD:
        grad += split.to(tl.int64) * n_rows * n_cols + corner
    if not IN_MEMORY:
        total = tl.zeros((BR, BC), tl.float32)
    at = tl.load(offsets + j)
    end = tl.load(offsets + tl.minimum(j + 1, n_examples))
    for _ in range(chunks):
        mine = at + k < end  # both factors: a NaN of the next example times zero is NaN
        a = tl.load(left + at * left_stride + left_at, in_rows[:, None] & mine[None, :], 0.0)
        b = tl.load(right + at * right_stride + right_at, mine[:, None] & in_cols[None, :], 0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        part = tl.dot(a, b, part, input_precision=PRECISION)
        last = at + BK >= end
        if last:
            square = tl.reshape(part * part, (NR, SUB_R, NC, SUB_C))
            square = tl.sum(tl.sum(square, 3), 1)
            tl.store(sums + (j * sums_rows + pr * NR) * sums_cols + pc * NC + sums_at, square)
            for d in tl.static_range(N_DIR):
                at_d = directions + d * n_rows.to(tl.int64) * n_cols + corner
                v = tl.load(at_d + inside, in_tile, 0.0).to(tl.float32)
                dot = tl.sum(part * v)
                tl.store(dots + (d * n_examples + j) * tiles_r * tiles_c + pid, dot)
            if WANT_GRAD and IN_MEMORY:
                if ACCUMULATE or j > j_first:
                    tl.atomic_add(grad + inside, part, in_tile, sem="relaxed")
                else:
                    tl.store(grad + inside, part, in_tile)
            elif WANT_GRAD:
                total += part
            part = tl.zeros((BR, BC), tl.float32)
        j = tl.where(last, j + 1, j)
        at = tl.where(last, end, at + BK)
        end = tl.load(offsets + tl.minimum(j + 1, n_examples))

    if WANT_GRAD and IN_MEMORY:
        if chunks == 0 and not ACCUMULATE:  # a split without examples has added nothing
            tl.store(grad + inside, part, in_tile)
    elif WANT_GRAD:
        if ACCUMULATE:
            total += tl.load(grad + inside, in_tile, 0.0)
        tl.store(grad + inside, total, in_tile)


def _power(block: int, limit: int) -> int:
    """Largest power of two that divides ``block``, at most ``limit``."""
    return min(block & -block, limit)


def sub_block(
    tile: Tile, rows: int, cols: int, block_rows: int, block_cols: int
) -> tuple[int, int]:
    """Size of the pieces whose squared sums the kernel writes: pieces of which each block, and
    each tile, is made up exactly."""
    sub_c = tile.cols if block_cols >= cols else _power(block_cols, tile.cols)
    # A thin piece stays as tall as it can: its sums are many already.
    cap = min(WARP_ROWS, tile.rows) if sub_c == tile.cols else tile.rows
    return cap if block_rows >= rows else _power(block_rows, cap), sub_c


def unsupported(
    left: Tensor, right: Tensor, block_rows: int, block_cols: int, tile: Tile | None = None
) -> str | None:
    """Why the kernel cannot do this, in words, or None if it can."""
    if left.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {left.dtype}: the kernel accumulates in float32"
    rows, cols = left.shape[1], right.shape[1]
    tile = tile or fused_tile(left.dtype, architecture(left.device), True, 0)
    sub_r, sub_c = sub_block(tile, rows, cols, block_rows, block_cols)
    if tile.rows * tile.cols > MAX_SUMS * sub_r * sub_c:
        return (
            f"blocks of {block_rows}x{block_cols}: they share no pieces larger than "
            f"{sub_r}x{sub_c} with the kernel's {tile.rows}x{tile.cols} tiles; use powers of two, "
            "whole rows or whole columns"
        )
    widest = max(tile.rows * cols, tile.depth * max(left.stride(0), right.stride(0)))
    if widest + max(rows, cols) >= 2**31:
        return "one tile spans 2^31 elements or more: offsets inside a tile are 32 bits wide"
    return None


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _split_bounds(offsets: Tensor, tokens: int, splits: int) -> Tensor:
    """``[splits + 1]`` example numbers that share out the tokens evenly; no host round trip."""
    if splits == 1:
        return _ends(offsets.numel() - 1, offsets.device)
    goals = torch.arange(splits + 1, device=offsets.device) * tokens // splits
    bounds = torch.searchsorted(offsets, goals)
    bounds[-1] = offsets.numel() - 1  # trailing examples without tokens belong to the last
    return bounds


@keep
def _ends(examples: int, device: torch.device) -> Tensor:
    return upload(torch.tensor([0, examples]), device)


def launch_fused(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None,
    want_grad: bool,
    *,
    into: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the fused kernel. Arguments and result as in ``ops.cross_influence``.

    Args:
        into: contiguous float32 ``[rows, cols]`` to which the gradient is added in place.
        grad_dtype: what the gradient is rounded to as it is stored; float32 by default.
        tile: another tile than the default.
        splits: programs per tile, each with whole examples; by default as many as fill the chip.

    Raises:
        ValueError: if :func:`unsupported` names a reason, or ``into`` does not fit.
    """
    left, right = _row_major(left), _row_major(right)
    rows, cols, n = left.shape[1], right.shape[1], offsets.numel() - 1
    n_dir = 0 if directions is None else directions.shape[0]
    reason = unsupported(left, right, block_rows, block_cols, tile)
    if reason is not None:
        raise ValueError(f"fastgrad_kernels: {reason}")
    if into is not None and (
        into.shape != (rows, cols) or into.dtype != torch.float32 or not into.is_contiguous()
    ):
        raise ValueError(
            f"fastgrad_kernels: cannot add to {into.dtype} {tuple(into.shape)} with strides "
            f"{into.stride()}: a contiguous float32 tensor {(rows, cols)} is needed"
        )
    arch = architecture(left.device)
    grad_dtype = torch.float32 if grad_dtype is None or into is not None else grad_dtype
    tile = tile or fused_tile(left.dtype, arch, want_grad, n_dir)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)
    if n == 0 or tiles == 0:
        blocks = -(-rows // block_rows) * -(-cols // block_cols)
        grad = into if into is not None else left.new_zeros(rows, cols, dtype=grad_dtype)
        grad = grad if want_grad else left.new_empty(0, dtype=grad_dtype)
        squares = left.new_zeros(blocks, n, dtype=torch.float32)
        return grad, squares, squares.new_zeros(n_dir, n)
    if splits is None:
        # With a gradient each split writes one more copy of it; without, four waves even out
        # examples of different lengths.
        room = units(left.device) * (1 if want_grad else 4)
        splits = max(1, min(n, room // tiles))
    bounds = _split_bounds(offsets, left.shape[0], splits)

    sub_r, sub_c = sub_block(tile, rows, cols, block_rows, block_cols)
    sums_rows = triton.cdiv(rows, tile.rows) * (tile.rows // sub_r)
    sums_cols = triton.cdiv(cols, tile.cols) * (tile.cols // sub_c)
    sums = left.new_empty(n, sums_rows, sums_cols, dtype=torch.float32)
    dots = left.new_empty(n_dir, n, tiles, dtype=torch.float32)
    accumulate = into is not None and splits == 1
    # One split rounds as it stores; several are added in float32 first. The interpreter's own
    # cast to bfloat16 cuts off instead of rounding.
    in_memory = tile.total == "memory"
    one_pass = splits == 1 and not in_memory and not interpreted()
    stored = grad_dtype if one_pass else torch.float32
    if not want_grad:
        partial = left.new_empty(0, dtype=stored)
    elif accumulate:
        assert into is not None
        partial = into
    else:
        partial = left.new_empty(splits, rows, cols, dtype=stored)
    if directions is not None:
        directions = directions.contiguous()

    start = 0
    while start == 0 or start < n_dir:
        first = start == 0  # the gradient is written once; further launches repeat the sums
        some = min(MAX_DIRECTIONS[want_grad and first], n_dir - start)
        with on_device(left):
            cross_influence_kernel[(tiles, splits)](
                left,
                right,
                offsets,
                bounds,
                left if directions is None else directions[start:],
                partial,
                sums,
                dots[start:] if some else sums,
                rows,
                cols,
                left.stride(0),
                right.stride(0),
                n,
                sums_rows,
                sums_cols,
                BR=tile.rows,
                BC=tile.cols,
                BK=tile.depth,
                GROUP=tile.group,
                SUB_R=sub_r,
                SUB_C=sub_c,
                N_DIR=some,
                WANT_GRAD=want_grad and first,
                ACCUMULATE=accumulate,
                IN_MEMORY=in_memory,
                PRECISION=gram.precision(left.dtype),
                UPCAST=interpreted(),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        start += max(some, 1)

    # Pieces beyond the edge hold zeros; cut them off so that blocks fall on whole pieces.
    sums = sums[:, : triton.cdiv(rows, sub_r), : triton.cdiv(cols, sub_c)]
    per_block = block_sums(
        sums,
        sums.shape[1] if block_rows >= rows else block_rows // sub_r,
        sums.shape[2] if block_cols >= cols else block_cols // sub_c,
    )
    grad = partial
    if want_grad and not accumulate:
        grad = partial[0] if splits == 1 else partial.sum(0)
        grad = grad if into is None else into.add_(grad)
    return grad.to(grad_dtype), per_block.T.contiguous(), dots.sum(2)


def cross_influence(
    left: Tensor,
    right: Tensor,
    offsets: Tensor | Sequence[int],
    block_rows: int,
    block_cols: int,
    directions: Tensor | None,
    want_grad: bool,
    *,
    into: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.cross_influence`` on a GPU: fused kernel, or Gram kernel beside a plain product."""
    if not isinstance(offsets, Tensor):
        offsets = torch.tensor(offsets, dtype=torch.int64)
    offsets = moved(offsets, left.device)
    rows, cols, n = left.shape[1], right.shape[1], offsets.numel() - 1
    whole = block_rows >= rows and block_cols >= cols
    arch = architecture(left.device)
    if (
        whole
        and directions is None
        and gram.prefer_gram(rows, cols, n, left.shape[0], want_grad, left.dtype, arch)
    ):
        sq = gram.gram_norms(left, right, offsets).unsqueeze(0)
        grad = left.new_empty(0, dtype=grad_dtype or torch.float32)
        if want_grad:
            grad = _product(left, right, torch.float32 if into is not None else grad_dtype)
        return grad if into is None else into.add_(grad), sq, sq.new_zeros(0, n)
    return launch_fused(
        left, right, offsets, block_rows, block_cols, directions, want_grad,
        into=into, grad_dtype=grad_dtype,
    )  # fmt: skip


def _product(left: Tensor, right: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``leftᵀ right``, summed in float32 and rounded once, whatever the factors are stored in."""
    dtype = dtype or torch.float32
    if left.dtype == dtype:
        return left.T @ right
    if left.is_cuda and dtype == torch.float32:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return (left.T.float() @ right.float()).to(dtype)


MEMORY_FORM = ("sm_90", "bf16")


def _shipped() -> tuple[Shipped, ...]:
    """The forms that the launcher makes for whole weights, rows, columns and directions."""
    forms = {
        "grad": (True, 0, WARP_ROWS, None),
        "grad-rounded": (True, 0, WARP_ROWS, None),  # stored in the dtype of the factors
        "grad-in-memory": (True, 0, WARP_ROWS, None),
        "norms": (False, 0, WARP_ROWS, None),
        "grad+dirs": (True, MAX_DIRECTIONS[True], WARP_ROWS, None),
        "norms+dirs": (False, MAX_DIRECTIONS[False], WARP_ROWS, None),
        "grad/rows": (True, 0, 1, None),
        "grad/columns": (True, 0, None, 1),
    }
    out = []
    for arch in ARCHS:
        for short, dtype in gram.DTYPES.items():
            for form, (want_grad, n_dir, sub_r, sub_c) in forms.items():
                rounded = form == "grad-rounded"
                in_memory = form == "grad-in-memory"
                if (rounded and short == "fp32") or (in_memory and (arch, short) != MEMORY_FORM):
                    continue
                tile = fused_tile(dtype, arch, want_grad, n_dir)
                tile = FUSED_IN_MEMORY if in_memory else tile
                pointers = dict.fromkeys(("left", "right"), f"*{short}")
                pointers |= dict.fromkeys(("offsets", "splits"), "*i64")
                pointers |= dict.fromkeys(("directions", "grad", "sums", "dots"), "*fp32")
                pointers["grad"] = f"*{short}" if rounded else "*fp32"
                numbers = ("n_rows", "n_cols", "left_stride", "right_stride")
                counts = ("n_examples", "sums_rows", "sums_cols")
                constants = {
                    "BR": tile.rows,
                    "BC": tile.cols,
                    "BK": tile.depth,
                    "GROUP": tile.group,
                    "SUB_R": sub_r or tile.rows,
                    "SUB_C": sub_c or tile.cols,
                    "N_DIR": n_dir,
                    "WANT_GRAD": want_grad,
                    "ACCUMULATE": False,
                    "IN_MEMORY": tile.total == "memory",
                    "PRECISION": "ieee",
                    "UPCAST": False,
                }
                out.append(
                    Shipped(
                        f"cross_influence/{form}/{short}/{tile.rows}x{tile.cols}x{tile.depth}",
                        cross_influence_kernel,
                        pointers | dict.fromkeys(numbers + counts, "i32"),
                        constants,
                        tile.warps,
                        tile.stages,
                        (*pointers, *numbers),
                        (target(arch),),
                    )
                )
    return tuple(out)


SHIPPED = _shipped()
SHIPPED += in_tf32(e for e in SHIPPED if "/grad/fp32" in e.name)
