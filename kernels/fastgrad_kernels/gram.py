"""Per-example squared norms of a weight gradient through token-by-token products.

``‖left_jᵀ right_j‖² = Σ_{s,t} (left_s·left_t)(right_s·right_t)``: cheaper than the gradient
itself for short examples, at whole-parameter resolution only. No matrix of tokens by tokens is
ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    gram_tile,
    on_device,
    target,
    units,
)
from fastgrad_kernels.dispatch import interpreted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are made: exactly, unless PyTorch was told that TF32 will do
    (``torch.backends.cuda.matmul.fp32_precision`` or ``allow_tf32``), as its own products are."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


@triton.jit
def _block_product(  # type: ignore[no-untyped-def]
    x, first, second, end, width, stride, BT: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``x[first:first+BT] · x[second:second+BT]ᵀ``, rows at or beyond ``end`` as zeros."""
    t, k = tl.arange(0, BT), tl.arange(0, BK)
    a_at = t[:, None] * stride + k[None, :]
    b_at = t[None, :] * stride + k[:, None]
    a_in, b_in = (first + t < end)[:, None], (second + t < end)[None, :]
    acc = tl.zeros((BT, BT), tl.float32)
    for start in range(0, width, BK):
        inside = start + k < width
        a = tl.load(x + first * stride + start + a_at, a_in & inside[None, :], 0.0)
        b = tl.load(x + second * stride + start + b_at, b_in & inside[:, None], 0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def gram_kernel(  # type: ignore[no-untyped-def]
    left,
    right,
    offsets,
    partial,
    n_rows,
    n_cols,
    left_stride,
    right_stride,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``partial[j, p] = Σ over token-block pairs (s <= t) number p, p + P, p + 2P, … of example j
    of w_st · Σ (left_s left_tᵀ) ∘ (right_s right_tᵀ)``, w = 1 on the diagonal and 2 off it.

    left ``[N, rows]``, right ``[N, cols]`` with unit stride along columns, offsets int64
    ``[n + 1]``, partial ``[n, P]``. Grid: (n, P), for the
    second number of a grid ends at 65535.
    """
    j, p, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin, end = tl.load(offsets + j), tl.load(offsets + j + 1)
    blocks = ((end - begin + BT - 1) // BT).to(tl.int32)
    result = 0.0
    for q in range(p, blocks * (blocks + 1) // 2, programs):
        # Pair q of the lower triangle: t is the root of t(t+1)/2 <= q, then set right where the
        # float32 root is off by one.
        t = ((tl.sqrt(8.0 * q + 1.0) - 1.0) * 0.5).to(tl.int32)
        t = tl.where((t + 1) * (t + 2) // 2 <= q, t + 1, t)
        t = tl.where(t * (t + 1) // 2 > q, t - 1, t)
        s = q - t * (t + 1) // 2
        first, second = begin + s * BT, begin + t * BT
        x = _block_product(left, first, second, end, n_rows, left_stride, BT, BK, PRECISION, UPCAST)
        y = _block_product(
            right, first, second, end, n_cols, right_stride, BT, BK, PRECISION, UPCAST
        )
        result += tl.where(s == t, 1.0, 2.0) * tl.sum(x * y)
    tl.store(partial + j.to(tl.int64) * programs + p, result)


def gram_norms(
    left: Tensor,
    right: Tensor,
    bounds: Tensor | Sequence[int],
    *,
    tile: Tile | None = None,
    programs: int | None = None,
) -> Tensor:
    """``‖left_jᵀ right_j‖²`` for every example, float32 ``[n]``.

    Args:
        left, right: ``[tokens, rows]`` and ``[tokens, cols]``, float32, bfloat16 or float16.
        bounds: ``[n + 1]`` example boundaries, a tensor on any device or numbers.
        tile: another tile than the default.
        programs: how many programs share the token-block pairs of one example.

    Raises:
        ValueError: for a dtype that the kernel does not know.
    """
    if left.dtype not in DTYPES.values():
        raise ValueError(f"fastgrad_kernels: dtype {left.dtype}: the kernel accumulates in float32")
    offsets = torch.as_tensor(bounds, dtype=torch.int64).to(left.device)
    n = offsets.numel() - 1
    if n == 0:
        return left.new_zeros(0, dtype=torch.float32)
    left = left if left.stride(1) == 1 else left.contiguous()
    right = right if right.stride(1) == 1 else right.contiguous()
    tile = tile or gram_tile(left.dtype, architecture(left.device))
    if programs is None:
        # Two waves, so that a second program hides the latency of the first; never more than the
        # pairs of an example of mean length (twice that for ragged ones).
        blocks = triton.cdiv(left.shape[0], n * tile.rows)
        programs = max(1, min(blocks * (blocks + 1), triton.cdiv(4 * units(left.device), n)))
    partial = left.new_empty(n, programs, dtype=torch.float32)
    with on_device(left):
        gram_kernel[(n, programs)](
            left,
            right,
            offsets,
            partial,
            left.shape[1],
            right.shape[1],
            left.stride(0),
            right.stride(0),
            BT=tile.rows,
            BK=tile.depth,
            PRECISION=precision(left.dtype),
            UPCAST=interpreted(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return partial.sum(1).clamp_min_(0)  # rounding may leave a tiny negative for a zero norm


def prefer_gram(
    rows: int, cols: int, examples: int, tokens: int, want_grad: bool, dtype: torch.dtype, arch: str
) -> bool:
    """True where a plain product and the Gram kernel beat the fused kernel, by this model.

    With n examples of T = tokens/n each, R rows, C columns, and a chip's matrix rate M, scalar
    rate S, units U (:data:`configs.CHIPS`; for float32 M is S):

        fused = 2·N·R·C / M  +  n·3·R·C / S  +  n·⌈R/128⌉·⌈C/128⌉ · 0.3 us / U
        Gram  = [2·N·R·C / M if the gradient is wanted]  +  n·p·2·64²·(R + C) / M  +  launch

    p = b·(b + 1)/2 pairs of 64-token blocks, b = ⌈T/64⌉. The fused kernel's second term is the
    square, its sum and the addition to the total at each boundary, its third the time that the
    matrix units stand idle there. Factors are read from cache in both forms. Equal lengths are
    assumed: the true ones are on the device, and asking for them would stall the host.
    """
    if examples == 0:
        return False
    chip = CHIPS[arch]
    rate = chip.scalar if dtype == torch.float32 else chip.matrix
    product = 2 * tokens * rows * cols / rate
    tiles = -(-rows // 128) * -(-cols // 128)
    fused = product + 3 * examples * rows * cols / chip.scalar
    fused += examples * tiles * 0.3e-6 / chip.units
    blocks = -(-tokens // (examples * 64))
    pairs = blocks * (blocks + 1) // 2
    gram_form = examples * pairs * 2 * 64 * 64 * (rows + cols) / rate + chip.launch
    return gram_form + (product if want_grad else 0.0) < fused


def _shipped() -> tuple[Shipped, ...]:
    out = []
    for arch in ARCHS:
        for short, dtype in DTYPES.items():
            tile = gram_tile(dtype, arch)
            pointers = {"left": f"*{short}", "right": f"*{short}", "offsets": "*i64"}
            pointers["partial"] = "*fp32"
            numbers = ("n_rows", "n_cols", "left_stride", "right_stride")
            out.append(
                Shipped(
                    f"gram/{short}/{tile.rows}x{tile.cols}x{tile.depth}",
                    gram_kernel,
                    pointers | dict.fromkeys(numbers, "i32"),
                    {"BT": tile.rows, "BK": tile.depth, "PRECISION": "ieee", "UPCAST": False},
                    tile.warps,
                    tile.stages,
                    (*pointers, *numbers),
                    (target(arch),),
                )
            )
    return tuple(out)


SHIPPED = _shipped()
SHIPPED += in_tf32(SHIPPED)
