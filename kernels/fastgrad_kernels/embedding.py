"""Per-example, per-block squared norms of an embedding's gradient, without the gradient.

Tokens are sorted by (example, id); equal keys are one row of one example's gradient and add up
before squaring. Rows of one example and block are neighbours too, so both sums run in a fixed
order over contiguous ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrad_kernels.compile_check import Shipped
from fastgrad_kernels.dispatch import moved


@dataclass(frozen=True)
class EmbeddingConfig:
    """``tokens`` repeated tokens by up to ``cols`` columns at a time; ``segments`` values are
    added at a time in the second stage."""

    tokens: int = 2
    cols: int = 512
    segments: int = 128
    num_warps: int = 4


DEFAULT = EmbeddingConfig()


@triton.jit
def segment_squares_kernel(  # type: ignore[no-untyped-def]
    order,  # int64 [tokens]: token numbers, sorted by (example, id)
    starts,  # int64 [n_segments + 1]: where in order each (example, id) begins
    rows,  # int64 [n_segments]: id of each segment
    grad_out,  # [tokens, cols]
    directions,  # [n_dir, num_rows, cols]
    squares,  # float32 [n_segments, grid_cols]
    dots,  # float32 [n_segments, grid_cols, n_dir]
    cols,
    block_cols,
    direction_stride,
    HAS_DIRECTIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``s = Σ_{t in segment} grad_out_t`` over one range of columns; ``Σ s²``, ``Σ s·direction``.

    One program per segment, column block and direction; the first of these writes the squares.
    Bytes moved: ``grad_out`` and the rows of a direction that occur, once per direction (once in
    all without any); 8 per token and column block, 4 per segment and column block.
    """
    segment = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    grid_cols = tl.num_programs(1)
    first = tl.load(starts + segment)
    last = tl.load(starts + segment + 1)
    row = tl.load(rows + segment)
    left = block * block_cols
    right = tl.minimum(left + block_cols, cols)
    square = tl.zeros([COLS], tl.float32)
    dot = tl.zeros([COLS], tl.float32)
    k = tl.program_id(2).to(tl.int64)  # 64 bits: times the size of a direction
    for c in range(left, right, COLS):
        col = c + tl.arange(0, COLS)
        inside = col < right
        acc = tl.zeros([TOKENS, COLS], tl.float32)
        for start in range(first, last, TOKENS):
            at = start + tl.arange(0, TOKENS)
            there = at < last
            token = tl.load(order + at, mask=there, other=0)
            acc += tl.load(
                grad_out + token[:, None] * cols + col[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
        total = tl.sum(acc, axis=0)
        square += total * total
        if HAS_DIRECTIONS:
            direction = directions + k * direction_stride + row * cols
            dot += total * tl.load(direction + col, mask=inside, other=0.0).to(tl.float32)
    at = segment * grid_cols + block
    if k == 0:
        tl.store(squares + at, tl.sum(square))
    if HAS_DIRECTIONS:
        tl.store(dots + at * tl.num_programs(2) + k, tl.sum(dot))


@triton.jit(do_not_specialize=["width", "out_stride"])
def sum_ranges_kernel(  # type: ignore[no-untyped-def]
    values,  # float32 [n, width]
    starts,  # int64 [n_groups + 1]
    cells,  # int64 [n_groups]: first cell of each group's result
    out,
    width,
    out_stride,  # from one column's result to the next
    SEGMENTS: tl.constexpr,
):
    """``out[cells[g] + w * out_stride] = Σ values[starts[g]:starts[g + 1], w]`` in float32, lane by
    lane in order, then as a tree. ``4 n width`` bytes read, 4 written per group and column."""
    group = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1).to(tl.int64)
    last = tl.load(starts + group + 1)
    acc = tl.zeros([SEGMENTS], tl.float32)
    for start in range(tl.load(starts + group), last, SEGMENTS):
        at = start + tl.arange(0, SEGMENTS)
        acc += tl.load(values + at * width + w, mask=at < last, other=0.0)
    tl.store(out + tl.load(cells + group) + w * out_stride, tl.sum(acc))


_SIZES = {"block_cols": "i32", "direction_stride": "i64", "cols": "i32"}
_POINTERS = {"order": "*i64", "starts": "*i64", "rows": "*i64", "directions": "*fp32",
             "squares": "*fp32", "dots": "*fp32"}  # fmt: skip
SHIPPED = (
    *(
        Shipped(
            f"embedding/{name}/{kind}",
            segment_squares_kernel,
            _POINTERS | _SIZES | {"grad_out": kind},
            {"HAS_DIRECTIONS": signed, "TOKENS": DEFAULT.tokens, "COLS": DEFAULT.cols},
            num_warps=DEFAULT.num_warps,
            aligned=(*_POINTERS, "grad_out", "cols", "block_cols", "direction_stride"),
        )
        for kind in ("*bf16", "*fp32")
        for name, signed in (("squares", False), ("signed", True))
    ),
    Shipped(
        "embedding/sums",
        sum_ranges_kernel,
        {"values": "*fp32", "starts": "*i64", "cells": "*i64", "out": "*fp32"}
        | {"width": "i32", "out_stride": "i64"},
        {"SEGMENTS": DEFAULT.segments},
        aligned=("values", "starts", "cells", "out"),
    ),
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ValueError(f"fastgrad_kernels: {message}")


def unsupported(
    ids: Tensor,
    grad_out: Tensor,
    offsets: Tensor,
    num_rows: int,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None,
) -> str | None:
    """Why the kernel cannot do this, in words, or None if it can."""
    for t in (grad_out, *(() if directions is None else (directions,))):
        if t.dtype not in _FLOATS:
            return f"dtype {t.dtype}: the kernel accumulates in float32"
    blocks = -(-grad_out.shape[1] // block_cols)
    if blocks * max(1, 0 if directions is None else directions.shape[0]) > 65535:
        return f"{blocks} column blocks: a launch grid's second number ends at 65535"
    return None


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def embedding_influence(
    ids: Tensor,
    grad_out: Tensor,
    offsets: Tensor,
    num_rows: int,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None,
    config: EmbeddingConfig = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastgrad_kernels.ops.embedding_influence`; float32, float16 or bfloat16 input.

    Raises:
        ValueError: for a wrong shape, dtype, device or memory layout, before any launch. The
            values of ``ids`` and ``offsets`` are the caller's to check (``ops`` does).
    """
    _refuse(grad_out.dtype not in _FLOATS, f"grad_out is {grad_out.dtype}; {list(_FLOATS)} only")
    _refuse(grad_out.ndim != 2 or ids.shape != grad_out.shape[:1], f"{tuple(ids.shape)} ids, "
            f"grad_out {tuple(grad_out.shape)}")  # fmt: skip
    grad_out = grad_out.contiguous()
    directions = None if directions is None else directions.contiguous()
    _refuse(min(block_rows, block_cols) <= 0, f"block {block_rows}x{block_cols} is empty")
    for name, t in (("ids", ids), ("offsets", offsets)):
        _refuse(t.dtype != torch.int64, f"{name} must be int64, not {t.dtype}")
    device, cols, n = grad_out.device, grad_out.shape[1], offsets.numel() - 1
    _refuse(ids.device != device, f"ids on {ids.device}, grad_out on {device}")
    n_dir = 0
    if directions is not None:
        n_dir = directions.shape[0]
        fits = directions.shape[1:] == (num_rows, cols) and directions.is_contiguous()
        fits &= directions.dtype in _FLOATS and directions.device == device
        _refuse(not fits, f"directions {tuple(directions.shape)} {directions.dtype}: contiguous "
                f"[k, {num_rows}, {cols}] of a float type on {device} is needed")  # fmt: skip
    _refuse(
        device.type == "cpu" and isinstance(sum_ranges_kernel, triton.JITFunction),
        "the Triton kernels need a GPU; on a CPU use fastgrad_kernels.cpu",
    )
    block_rows, block_cols = min(block_rows, max(num_rows, 1)), min(block_cols, max(cols, 1))
    grid_r, grid_c = -(-num_rows // block_rows), -(-cols // block_cols)
    _refuse(grid_c * max(n_dir, 1) > 65535, f"{grid_c} column blocks x {n_dir} directions exceed a "
            "launch grid's 65535")  # fmt: skip
    sq = torch.zeros(grid_r * grid_c, n, dtype=torch.float32, device=device)
    dots = torch.zeros(n_dir, n, dtype=torch.float32, device=device)
    if ids.numel() == 0 or cols == 0:
        return sq, dots
    offsets = moved(offsets, device)
    example = torch.repeat_interleave(
        torch.arange(n, device=device), offsets.diff(), output_size=ids.numel()
    )
    # Stable: repeated tokens add in the order of the text, so the bits never change.
    keys, order = torch.sort(example * num_rows + ids, stable=True)
    keys, counts = torch.unique_consecutive(keys, return_counts=True)
    row, owner = keys % num_rows, keys // num_rows
    squares = torch.empty(len(keys), grid_c, dtype=torch.float32, device=device)
    products = torch.empty(len(keys), grid_c * n_dir, dtype=torch.float32, device=device)
    width = min(config.cols, triton.next_power_of_2(block_cols))
    segment_squares_kernel[(len(keys), grid_c, max(n_dir, 1))](
        order, _starts(counts), row, grad_out, grad_out if directions is None else directions,
        squares, products if n_dir else squares, cols, block_cols, num_rows * cols,
        HAS_DIRECTIONS=n_dir > 0, TOKENS=config.tokens, COLS=width,
        num_warps=config.num_warps if width >= 128 else 1,
    )  # fmt: skip
    # One group per (example, block row) that occurs; the others stay zero.
    group, counts = torch.unique_consecutive(owner * grid_r + row // block_rows, return_counts=True)
    sum_ranges_kernel[(len(group), grid_c)](
        squares, _starts(counts), group % grid_r * grid_c * n + group // grid_r, sq, grid_c, n,
        SEGMENTS=config.segments,
    )  # fmt: skip
    if n_dir:
        found, counts = torch.unique_consecutive(owner, return_counts=True)
        partial = torch.empty(len(found), grid_c * n_dir, dtype=torch.float32, device=device)
        sum_ranges_kernel[(len(found), grid_c * n_dir)](
            products, _starts(counts), torch.arange(len(found), device=device) * grid_c * n_dir,
            partial, grid_c * n_dir, 1, SEGMENTS=config.segments,
        )  # fmt: skip
        dots[:, found] = partial.view(-1, grid_c, n_dir).sum(1).T
    return sq, dots
