"""Tile sizes of the Triton kernels, one frozen choice per architecture, dtype and purpose.

Analytical defaults, not tuned ones: each table says which limit of the chip it comes from, and
nothing here is searched at run time, so that results and compile times never depend on what ran
before. A launcher takes another :class:`Tile` through its ``tile`` argument.

What bounds a tile of ``rows x cols`` float32 accumulators on an NVIDIA chip: 255 registers per
thread, less about 60 for addresses, masks and the pipeline. Eight warps hold 128x128 numbers in
64 registers each. The fused kernel keeps two such tiles, the example's and the running gradient,
so 128x128 is the most that fits; with one tile only, 128x256 does. Shared memory holds
``stages x (rows + cols) x depth`` elements.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Tile:
    """One program's work: ``rows x cols`` of the result, ``depth`` of the reduction at a time."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8  # tile rows that run together, so that the chip's cache serves both factors
    # Where the fused kernel keeps the running gradient: in "registers", beside the example's
    # part, or in "memory", added to at each example boundary, which leaves room for twice the tile.
    total: str = "registers"


@dataclass(frozen=True)
class Chip:
    """What the cost model needs to know: bytes and operations per second, number of units.

    Rates are what a good kernel reaches, not the data sheet's peak (about 0.7 of it for matrix
    products, 0.85 for memory), since only their ratios decide anything.
    """

    units: int
    matrix: float  # bf16/fp16 matrix FLOP/s
    scalar: float  # float32 FLOP/s on the ordinary pipes
    memory: float  # bytes/s
    launch: float = 5e-6  # seconds per additional launch


# Data sheets: A100 312 TFLOP/s bf16, 19.5 fp32, 2.0 TB/s; H200 990, 67, 4.8; B200 2250, 80, 8.0;
# MI300X 1307, 163 (81.7 without dual issue), 5.3.
CHIPS = {
    "sm_80": Chip(108, 220e12, 14e12, 1.7e12),
    "sm_90": Chip(132, 690e12, 45e12, 4.1e12),
    "sm_100": Chip(148, 1500e12, 56e12, 6.8e12),
    "gfx942": Chip(304, 700e12, 57e12, 4.2e12),
}


def target(arch: str) -> str:
    """The compiler's name for a row of the tables, as in ``compile_check.TARGETS``."""
    return f"hip:{arch}" if arch.startswith("gfx") else f"cuda:{arch.removeprefix('sm_')}"


@cache
def architecture(device: torch.device) -> str:
    """The row of the tables for a device; a host (interpreted kernels) counts as sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    # Consumer chips (8.6, 8.9, 12.x) have 99 KiB of shared memory: the tables of sm_80 fit it.
    return {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get((major, minor), "sm_80")


@cache
def units(device: torch.device) -> int:
    """Multiprocessors of a device; one for a host, where more programs only cost time."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def fused_tile(dtype: torch.dtype, arch: str, want_grad: bool, n_dir: int) -> Tile:
    """Tile of the fused weight gradient with per-example sums.

    sm_90: 64 tokens at a time are 128 bytes of bf16, one swizzle row; four stages of 32 KiB keep
    about 100 KiB in flight, which covers 1.5 us of latency at a unit's share of the bandwidth.
    sm_80: fragments pass through registers, so half the depth; the 48 KiB fit small chips too.
    Directions bring a third tile of registers, read at example boundaries: half the tile.
    float32 runs on the ordinary pipes, where a deep pipeline buys nothing and two programs per
    unit (at most 128 registers) buy latency.
    """
    if dtype == torch.float32:
        return Tile(128, 64, 16, 8, 2) if arch == "gfx942" else Tile(128, 64, 32, 8, 2)
    if arch == "sm_90" or arch == "sm_100":
        if n_dir:
            return Tile(128, 64, 64, 8, 4)
        if want_grad:
            return Tile(128, 128, 64, 8, 4)
        return Tile(128, 256, 64, 8, 3)
    if arch == "gfx942":
        return Tile(128, 128, 32, 8, 2)
    if n_dir:
        return Tile(64, 128, 32, 8, 4)
    return Tile(128, 128, 32, 8, 4)


# For sm_90 while its tiles of 128x128 wait for the L2 cache (docs/kernels.md): twice the tile, with
# the running gradient in memory. Not chosen by itself before a card has shown that it is faster.
FUSED_IN_MEMORY = Tile(128, 256, 32, 8, 4, total="memory")


def gram_tile(dtype: torch.dtype, arch: str) -> Tile:
    """Tile of the Gram kernel: ``rows = cols`` tokens, ``depth`` features at a time.

    Two accumulators as in the fused kernel. Short examples are what the form is for, so a tile
    is no larger than 64 tokens: a tile of 128 would be mostly padding below 100 tokens.
    """
    if dtype == torch.float32:
        return Tile(64, 64, 16, 4, 2)
    if arch == "sm_90" or arch == "sm_100":
        return Tile(64, 64, 128, 4, 4)
    if arch == "gfx942":
        return Tile(64, 64, 64, 4, 2)
    return Tile(64, 64, 64, 4, 3)


def sparse_tile(dtype: torch.dtype, arch: str, rows: int, cols: int) -> Tile:
    """Tile of the sparse weight gradient for blocks (or gathered matrices) of ``rows x cols``.

    One accumulator. The tile shrinks to the block, by powers of two, not below the 16 that a
    matrix instruction needs; four warps once it is 64 wide or less.
    """
    r, c = _fit(rows, 128), _fit(cols, 128)
    if dtype == torch.float32:
        c = min(c, 64)
        warps = 8 if r * c > 4096 else 4
        return Tile(r, c, 16, warps, 2) if arch == "gfx942" else Tile(r, c, 32, warps, 3)
    warps = 8 if r * c > 8192 else 4
    if arch == "sm_90" or arch == "sm_100":
        return Tile(r, c, 64, warps, 4)
    return Tile(r, c, 32, warps, 2 if arch == "gfx942" else 4)


def _fit(extent: int, limit: int) -> int:
    """Smallest power of two from 16 to ``limit`` that holds ``extent``, or the limit."""
    return min(limit, max(16, 1 << (max(extent, 1) - 1).bit_length()))
