"""Statistics of a whole list of gradients in one launch: sums per block and per tensor.

A :class:`TensorTable` describes the list once: which pieces ("chunks") of which tensor belong to
which block. Kernels read data addresses from it, so that one launch serves any mixture of shapes
and dtypes. Chunk partials are written apart and added in a fixed order by a second kernel:
the same input gives the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrad_kernels.compile_check import TARGETS, Shipped
from fastgrad_kernels.dispatch import capturing, refill

CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
UNIT = tl.constexpr(16)  # elements side by side in a tile: any block width that 16 divides fits
INF = tl.constexpr(float("inf"))


@dataclass(frozen=True)
class StatsConfig:
    """Sizes of one program. ``chunk``: elements per program at most; 32 KiB of bfloat16 keep the
    table at 0.15 % of the data. ``rows`` x 16 elements are one step: 8 per thread, one 128-bit
    load for 16-bit types; ``unroll`` steps have their loads in flight together."""

    chunk: int = 16384
    rows: int = 64
    unroll: int = 4
    num_warps: int = 4
    reduce: int = 1024

    def __post_init__(self) -> None:
        if self.chunk % 16:
            raise ValueError(f"chunk {self.chunk} must be a multiple of 16")


CUDA = StatsConfig()
HIP = StatsConfig(rows=128)  # waves of 64 lanes: the same 8 elements per thread
DEFAULT = HIP if torch.version.hip else CUDA


@triton.jit
def _fast_sums(  # type: ignore[no-untyped-def]
    at, steps, width, stride,
    DTYPE: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Whole steps of an aligned chunk, no masks: this is where 128-bit loads come from."""
    # The caller has looked: the address is divisible by 16 bytes. The cast must happen here; a
    # hint on a function's argument is lost.
    ptr = tl.multiple_of(at.to(tl.pointer_type(DTYPE)), 16)
    stride8 = (stride // 8) * 8  # an identity here that tells the compiler about alignment
    units = tl.maximum(width // UNIT, 1)
    sq = tl.zeros([ROWS, UNIT], tl.float32)
    ab = tl.zeros([ROWS, UNIT], tl.float32)
    mx = tl.zeros([ROWS, UNIT], tl.float32)
    for i in range(steps):
        for u in tl.static_range(UNROLL):
            q = (i * UNROLL + u) * ROWS + tl.arange(0, ROWS)
            if RUN:
                base = q.to(tl.int64) * UNIT
            else:
                base = (q // units).to(tl.int64) * stride8 + (q % units) * UNIT
            x = tl.load(ptr + (base[:, None] + tl.arange(0, UNIT)[None, :])).to(tl.float32)
            x = tl.abs(x)
            sq += x * x
            ab += x
            mx = tl.maximum(mx, x)
    return _total(sq), _total(ab), _largest(mx)


@triton.jit
def _total(x):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def _largest(x):  # type: ignore[no-untyped-def]
    return tl.max(tl.max(x, axis=1), axis=0)


@triton.jit
def _slow_sums(at, first, n, width, stride, DTYPE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements ``first .. n`` of a chunk of any shape and alignment, non-finite ones apart."""
    ptr = at.to(tl.pointer_type(DTYPE))
    sq = tl.zeros([ROWS, UNIT], tl.float32)
    ab = tl.zeros([ROWS, UNIT], tl.float32)
    mx = tl.zeros([ROWS, UNIT], tl.float32)
    bad = tl.zeros([ROWS, UNIT], tl.float32)
    for i in range(first, n, ROWS * UNIT):
        e = i + tl.arange(0, ROWS)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
        offset = (e // width).to(tl.int64) * stride + e % width
        x = tl.abs(tl.load(ptr + offset, mask=e < n, other=0.0).to(tl.float32))
        finite = x < INF  # false for infinity and for NaN
        bad += tl.where(finite, 0.0, 1.0)
        x = tl.where(finite, x, 0.0)
        sq += x * x
        ab += x
        mx = tl.maximum(mx, x)
    return _total(sq), _total(ab), _largest(mx), _total(bad)


@triton.jit
def _chunk_sums(  # type: ignore[no-untyped-def]
    at, n, width, stride, partial, out, row, n_chunks, n_out,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    aligned = at % 16 == 0
    run = width >= n
    step: tl.constexpr = ROWS * UNIT * UNROLL
    sq, ab, mx = 0.0, 0.0, 0.0
    done = 0
    if aligned & run:
        done = n // step * step
        sq, ab, mx = _fast_sums(at, n // step, width, stride, DTYPE, True, ROWS, UNROLL)
    elif aligned & (width % 16 == 0) & (stride % 8 == 0):
        done = n // step * step
        sq, ab, mx = _fast_sums(at, n // step, width, stride, DTYPE, False, ROWS, UNROLL)
    # A NaN or infinity shows in the sum of absolute values. Only such a chunk is read again,
    # entry by entry: the usual one pays no instruction for telling finite from non-finite.
    keep = ab < INF
    first = tl.where(keep, done, 0)
    sq2, ab2, mx2, bad = _slow_sums(at, first, n, width, stride, DTYPE, ROWS)
    sq = tl.where(keep, sq, 0.0) + sq2
    ab = tl.where(keep, ab, 0.0) + ab2
    mx = tl.maximum(tl.where(keep, mx, 0.0), mx2)
    pid = tl.program_id(0).to(tl.int64)
    tl.store(partial + pid, sq)
    tl.store(partial + n_chunks + pid, ab)
    tl.store(partial + 2 * n_chunks + pid, mx)
    tl.store(partial + 3 * n_chunks + pid, bad)
    dest = tl.load(row + 5)  # here, not earlier: held so long it was spilled on sm_100
    if dest >= 0:  # a block of one chunk needs no second stage
        tl.store(out + dest, sq)
        tl.store(out + n_out + dest, ab)
        tl.store(out + 2 * n_out + dest, mx)
        tl.store(out + 3 * n_out + dest, bad)


@triton.jit(do_not_specialize=["n_chunks", "n_out"])
def grad_stats_kernel(  # type: ignore[no-untyped-def]
    tensors,  # int64 [n_tensors, 2]: data address (0: no gradient), dtype code
    chunks,  # int64 [n_chunks, 6]: tensor, first element, elements, width, stride, destination
    partial,  # float32 [4, n_chunks]
    out,  # float32 [4, n_out]
    n_chunks,
    n_out,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One chunk per program: ``Σ x²``, ``Σ |x|``, ``max |x|`` over its finite entries and the
    number of its non-finite ones.

    Element e of a chunk lies ``(e // width) * stride + e % width`` elements after its first.
    Bytes moved: each gradient byte once, and 48 + 16 bytes per chunk; four flops per element.
    """
    row = chunks + tl.program_id(0).to(tl.int64) * 6
    tensor = tl.load(row)
    start = tl.load(row + 1)
    n = tl.load(row + 2).to(tl.int32)
    width = tl.load(row + 3).to(tl.int32)
    stride = tl.load(row + 4)
    address = tl.load(tensors + tensor * 2)
    code = tl.load(tensors + tensor * 2 + 1)
    n = tl.where(address == 0, 0, n)
    if code == 2:
        _chunk_sums(address + start * 4, n, width, stride, partial, out, row, n_chunks, n_out,
                    tl.float32, ROWS, UNROLL)  # fmt: skip
    elif code == 1:
        _chunk_sums(address + start * 2, n, width, stride, partial, out, row, n_chunks, n_out,
                    tl.float16, ROWS, UNROLL)  # fmt: skip
    else:
        _chunk_sums(address + start * 2, n, width, stride, partial, out, row, n_chunks, n_out,
                    tl.bfloat16, ROWS, UNROLL)  # fmt: skip


@triton.jit(do_not_specialize=["n_chunks", "n_out"])
def reduce_segments_kernel(partial, segments, out, n_chunks, n_out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``out[:, dest] = reduction of partial[:, first:last]`` per row (first, last, dest) of
    ``segments``, in the order of the chunks; float64, because a tensor may have 10^5 chunks."""
    row = segments + tl.program_id(0).to(tl.int64) * 3
    first = tl.load(row)
    last = tl.load(row + 1)
    dest = tl.load(row + 2)
    sq = tl.zeros([BLOCK], tl.float64)
    ab = tl.zeros([BLOCK], tl.float64)
    mx = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float64)
    for i in range(first, last, BLOCK):
        at = i + tl.arange(0, BLOCK)
        inside = at < last
        sq += tl.load(partial + at, mask=inside, other=0.0).to(tl.float64)
        ab += tl.load(partial + n_chunks + at, mask=inside, other=0.0).to(tl.float64)
        mx = tl.maximum(mx, tl.load(partial + 2 * n_chunks + at, mask=inside, other=0.0))
        bad += tl.load(partial + 3 * n_chunks + at, mask=inside, other=0.0).to(tl.float64)
    tl.store(out + dest, tl.sum(sq).to(tl.float32))
    tl.store(out + n_out + dest, tl.sum(ab).to(tl.float32))
    tl.store(out + 2 * n_out + dest, tl.max(mx))
    tl.store(out + 3 * n_out + dest, tl.sum(bad).to(tl.float32))


_TABLES = {"tensors": "*i64", "chunks": "*i64", "partial": "*fp32", "out": "*fp32"}
_COUNTS = {"n_chunks": "i64", "n_out": "i64"}
SHIPPED = (
    *(
        Shipped(
            f"grad_stats/chunks/{name}",
            grad_stats_kernel,
            _TABLES | _COUNTS,
            {"ROWS": config.rows, "UNROLL": config.unroll},
            num_warps=config.num_warps,
            aligned=tuple(_TABLES),
            targets=targets,
        )
        for name, config, targets in (("cuda", CUDA, TARGETS[:3]), ("hip", HIP, TARGETS[3:]))
    ),
    Shipped(
        "grad_stats/reduce",
        reduce_segments_kernel,
        {"partial": "*fp32", "segments": "*i64", "out": "*fp32"} | _COUNTS,
        {"BLOCK": DEFAULT.reduce},
        aligned=("partial", "segments", "out"),
    ),
)

Grid = tuple[int, int] | None


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ValueError(f"fastgrad_kernels: {message}")


def _chunks_of(rows: int, cols: int, grid: Grid, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunks ``[n, 4]`` (start, elements, width, stride) of a contiguous matrix, block by block,
    and the number of chunks of each block."""
    if rows * cols == 0:
        return np.zeros((0, 4), np.int64), np.zeros(0, np.int64)
    block_rows, block_cols = (rows, cols) if grid is None else grid
    block_rows, block_cols = min(block_rows, rows), min(block_cols, cols)
    top, left = (
        part.ravel()
        for part in np.meshgrid(
            np.arange(0, rows, block_rows, dtype=np.int64),
            np.arange(0, cols, block_cols, dtype=np.int64),
            indexing="ij",
        )
    )
    height, width = np.minimum(block_rows, rows - top), np.minimum(block_cols, cols - left)
    start = top * cols + left
    if block_cols == cols:  # full rows lie one after the other: one run, cut anywhere
        height, width, block_cols = np.ones_like(height), height * cols, block_rows * cols
    most_cols = min(block_cols, chunk)
    most_rows = max(1, chunk // block_cols)
    across = -(-width // most_cols)
    counts = -(-height // most_rows) * across
    block = np.repeat(np.arange(len(counts)), counts)
    k = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
    r, c = k // across[block] * most_rows, k % across[block] * most_cols
    h, w = np.minimum(most_rows, height[block] - r), np.minimum(most_cols, width[block] - c)
    return np.stack([start[block] + r * cols + c, h * w, w, np.full_like(h, cols)], 1), counts


class TensorTable:
    """What the kernels need to know about a list of tensors, built once per list.

    Args:
        shapes: shape of each tensor; seen as a matrix, leading dimension by all others.
        grids: ``(block_rows, block_cols)`` of each tensor, or None for one block.
        device: where the tensors live.
        config: sizes of a program.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        grids: Sequence[Grid],
        device: torch.device,
        config: StatsConfig = DEFAULT,
    ) -> None:
        _refuse(len(shapes) != len(grids), f"{len(shapes)} shapes but {len(grids)} block grids")
        self.shapes, self.device, self.config = [tuple(s) for s in shapes], device, config
        parts, self.block_offsets, segments = [], [0], []
        n_chunks = 0
        totals: list[tuple[int, int]] = []
        for i, (shape, grid) in enumerate(zip(self.shapes, grids, strict=True)):
            _refuse(grid is not None and min(grid) <= 0, f"tensor {i}: block {grid} is empty")
            numel = int(np.prod(shape, dtype=np.int64))
            rows = shape[0] if len(shape) > 1 else 1
            body, counts = _chunks_of(rows, numel // max(rows, 1), grid, config.chunk)
            block = self.block_offsets[-1] + np.arange(len(counts))
            first = n_chunks + np.cumsum(counts) - counts
            dest = np.repeat(np.where(counts == 1, block, -1), counts)
            parts.append(np.column_stack([np.full(len(body), i), body, dest]))
            many = counts > 1
            segments.append(np.stack([first, first + counts, block], 1)[many])
            totals.append((n_chunks, n_chunks + len(body)))
            n_chunks += len(body)
            self.block_offsets.append(self.block_offsets[-1] + len(counts))
        self.n_chunks, self.n_blocks = n_chunks, self.block_offsets[-1]
        ends = [(a, b, self.n_blocks + i) for i, (a, b) in enumerate(totals)]
        segments.append(np.array(ends, np.int64).reshape(-1, 3))
        self.segments = torch.from_numpy(np.concatenate(segments).astype(np.int64)).to(device)
        rows_ = np.concatenate(parts) if parts else np.zeros((0, 6))
        self.chunks = torch.from_numpy(rows_.astype(np.int64)).to(device)
        self.tensors = torch.zeros(len(shapes), 2, dtype=torch.int64, device=device)
        self._known: list[int] = []

    def refresh(self, tensors: Sequence[Tensor | None]) -> None:
        """Take the tensors' present addresses and dtypes; copies to the device only if one
        changed, so a captured graph with fixed gradients needs no copy.

        Raises:
            ValueError: naming the tensor, for a wrong shape, dtype, device or memory layout.
        """
        _refuse(len(tensors) != len(self.shapes), f"{len(tensors)} tensors, table has other")
        flat: list[int] = []
        for i, (t, shape) in enumerate(zip(tensors, self.shapes, strict=True)):
            if t is None:
                flat += (0, 0)
                continue
            if t.shape != shape or t.dtype not in CODES or t.device != self.device:
                _refuse(t.dtype not in CODES, f"tensor {i} is {t.dtype}; {list(CODES)} only")
                _refuse(True, f"tensor {i}: {tuple(t.shape)} on {t.device}, table has {shape} on "
                              f"{self.device}")  # fmt: skip
            if not t.is_contiguous():
                _refuse(True, f"tensor {i} of shape {shape} is not contiguous: {t.stride()}")
            flat += (t.data_ptr() if t.numel() else 0, CODES[t.dtype])
        if flat != self._known:
            refill(self.tensors, flat)
            self._known = flat


@dataclass(frozen=True)
class ListStats:
    """``blocks [4, n_blocks]`` of all tensors one after the other and ``tensors [4, n]``, float32:
    sum of squares, sum of absolute values, largest absolute value, non-finite entries."""

    blocks: Tensor
    tensors: Tensor
    block_offsets: tuple[int, ...]

    def of(self, i: int) -> Tensor:
        """``[4, n_blocks]`` of tensor i, as ``ops.block_stats`` has them."""
        return self.blocks[:, self.block_offsets[i] : self.block_offsets[i + 1]]


def launch(table: TensorTable) -> ListStats:
    """Two launches over a refreshed table. Sums beyond float32's range come out as infinity."""
    _refuse(
        table.device.type == "cpu" and isinstance(grad_stats_kernel, triton.JITFunction),
        "the Triton kernels need a GPU; on a CPU use fastgrad_kernels.cpu",
    )
    config, n_out = table.config, table.n_blocks + len(table.shapes)
    partial = torch.empty(4, table.n_chunks, dtype=torch.float32, device=table.device)
    out = torch.empty(4, n_out, dtype=torch.float32, device=table.device)
    if table.n_chunks:
        grad_stats_kernel[(table.n_chunks,)](
            table.tensors, table.chunks, partial, out, table.n_chunks, n_out,
            ROWS=config.rows, UNROLL=config.unroll, num_warps=config.num_warps,
        )  # fmt: skip
    if len(table.segments):
        reduce_segments_kernel[(len(table.segments),)](
            partial, table.segments, out, table.n_chunks, n_out, BLOCK=config.reduce
        )
    return ListStats(out[:, : table.n_blocks], out[:, table.n_blocks :], tuple(table.block_offsets))


_CACHE: OrderedDict[object, TensorTable] = OrderedDict()
_captured: list[TensorTable] = []
_CACHE_SIZE = 256  # one entry per shape where gradients come one by one


def unsupported(grads: Sequence[Tensor]) -> str | None:
    """Why the kernel cannot do this, in words, or None if it can."""
    for g in grads:
        if g.dtype not in CODES:
            return f"dtype {g.dtype}: the kernel sums in float32"
    return None


def grad_stats(
    grads: Sequence[Tensor | None],
    grids: Sequence[Grid] | None = None,
    shapes: Sequence[tuple[int, ...]] | None = None,
    device: torch.device | None = None,
    config: StatsConfig = DEFAULT,
) -> ListStats:
    """Statistics of a list of gradients per block and per tensor.

    Args:
        grads: contiguous bfloat16, float16 or float32 tensors on one device; None counts as
            zero, and needs ``shapes``.
        grids: ``(block_rows, block_cols)`` per tensor or None for one block (the default).
        shapes, device: of the tensors; read from ``grads`` by default.
        config: sizes of a program.

    Raises:
        ValueError: naming the tensor that does not fit, before any launch.
    """
    if shapes is None:
        _refuse(any(g is None for g in grads), "a missing gradient needs shapes=")
        shapes = [tuple(g.shape) for g in grads if g is not None]
    if device is None:
        device = next((g.device for g in grads if g is not None), torch.device("cpu"))
    grids = [None] * len(shapes) if grids is None else list(grids)
    key = (tuple(shapes), tuple(grids), device, config)
    table = _CACHE.pop(key, None) or TensorTable(shapes, grids, device, config)
    table.refresh(grads)
    if capturing(device):  # a CUDA graph reads this table at each replay: leave it alone
        _captured.append(table)
    else:
        _CACHE[key] = table  # the youngest last
    if len(_CACHE) > _CACHE_SIZE:
        _CACHE.popitem(last=False)
    return launch(table)
