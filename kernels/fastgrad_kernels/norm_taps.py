"""Per-example gradients of LayerNorm and RMSNorm weights, in one pass over two matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrad_kernels.compile_check import Shipped


@dataclass(frozen=True)
class NormConfig:
    """A program sums one example's tokens over ``cols`` features, ``tokens`` at a time: 16
    elements per thread and matrix, and 64 bfloat16 columns fill a 128-byte line."""

    tokens: int = 32
    cols: int = 64
    num_warps: int = 4


DEFAULT = NormConfig()


@triton.jit
def norm_taps_kernel(  # type: ignore[no-untyped-def]
    x,
    grad_out,
    mean,
    rstd,
    offsets,
    weight,
    bias,
    d,
    HAS_MEAN: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``weight[j] = Σ_{t in j} grad_out_t (x_t - mean_t) rstd_t``, ``bias[j] = Σ grad_out_t``.

    ``x, grad_out [tokens, d]``; ``mean, rstd`` float32 ``[tokens]`` (no mean: RMSNorm);
    ``offsets`` int64 ``[n + 1]``; ``weight, bias`` float32 ``[n, d]``. One program per example
    and strip of columns; a thread adds its tokens in order, then the threads are added as a
    tree. Bytes moved: both matrices once, 8 bytes per token and strip, ``4 n d`` per output.
    """
    example = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = col < d
    first = tl.load(offsets + example)
    last = tl.load(offsets + example + 1)
    w = tl.zeros([TOKENS, COLS], tl.float32)
    b = tl.zeros([TOKENS, COLS], tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < last
        at = token[:, None] * d + col[None, :]
        mask = there[:, None] & inside[None, :]
        g = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_MEAN:
            v -= tl.load(mean + token, mask=there, other=0.0)[:, None]
        w += g * (v * tl.load(rstd + token, mask=there, other=0.0)[:, None])
        if WANT_BIAS:
            b += g
    tl.store(weight + example * d + col, tl.sum(w, axis=0), mask=inside)
    if WANT_BIAS:
        tl.store(bias + example * d + col, tl.sum(b, axis=0), mask=inside)


_POINTERS = {"mean": "*fp32", "rstd": "*fp32", "offsets": "*i64", "weight": "*fp32",
             "bias": "*fp32"}  # fmt: skip
SHIPPED = tuple(
    Shipped(
        f"norm_taps/{name}/{kind}",
        norm_taps_kernel,
        _POINTERS | {"x": kind, "grad_out": kind, "d": "i32"},
        {"HAS_MEAN": layer, "WANT_BIAS": layer, "TOKENS": DEFAULT.tokens, "COLS": DEFAULT.cols},
        num_warps=DEFAULT.num_warps,
        aligned=(*_POINTERS, "x", "grad_out", "d"),
    )
    for kind in ("*bf16", "*fp32")
    for name, layer in (("layer", True), ("rms", False))
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ValueError(f"fastgrad_kernels: {message}")


def unsupported(x: Tensor, grad_out: Tensor, rstd: Tensor, mean: Tensor | None) -> str | None:
    """Why the kernel cannot do this, in words, or None if it can."""
    for t in (x, grad_out):
        if t.dtype not in _FLOATS:
            return f"dtype {t.dtype}: the kernel accumulates in float32"
    for t in (rstd, *(() if mean is None else (mean,))):
        if t.dtype != torch.float32:
            return f"statistics in {t.dtype}: the kernel takes float32"
    if -(-x.shape[1] // DEFAULT.cols) > 65535:
        return f"{x.shape[1]} features: a launch grid's second number ends at 65535"
    return None


def norm_taps(
    x: Tensor,
    grad_out: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    mean: Tensor | None = None,
    want_bias: bool = False,
    config: NormConfig = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Per-example gradients of a norm layer's weight and bias.

    Args:
        x, grad_out: contiguous ``[tokens, d]``, float32, bfloat16 or float16 (may differ).
        rstd, mean: float32 ``[tokens]``, as the forward pass has computed them.
        offsets: int64 ``[n + 1]`` on the same device, rising from 0 to the number of tokens.
        want_bias: also sum ``grad_out``.

    Returns:
        float32 ``weight [n, d]`` and ``bias [n, d]`` (empty if not wanted).

    Raises:
        ValueError: for a wrong shape, dtype, device or memory layout, before any launch.
    """
    _refuse(x.ndim != 2 or x.shape != grad_out.shape, f"x {tuple(x.shape)} and grad_out "
            f"{tuple(grad_out.shape)} must be matrices of one shape")  # fmt: skip
    tokens, d = x.shape
    _refuse(d >= 2**31, f"{d} features")
    for name, t in (("x", x), ("grad_out", grad_out)):
        _refuse(t.dtype not in _FLOATS, f"{name} is {t.dtype}; {list(_FLOATS)} only")
        _refuse(not t.is_contiguous(), f"{name} is not contiguous: {t.stride()}")
    for name, v in (("rstd", rstd), ("mean", mean)):
        if v is not None:
            wrong = v.shape != (tokens,) or v.dtype != torch.float32 or not v.is_contiguous()
            _refuse(wrong, f"{name} must be contiguous float32 [{tokens}]")
    wrong = offsets.ndim != 1 or offsets.dtype != torch.int64 or offsets.numel() < 1
    _refuse(
        wrong or not offsets.is_contiguous(), "offsets must be contiguous int64 [n_examples + 1]"
    )
    for t in (grad_out, rstd, offsets, *(() if mean is None else (mean,))):
        _refuse(t.device != x.device, f"{t.device} and {x.device}: one device is needed")
    _refuse(
        x.device.type == "cpu" and isinstance(norm_taps_kernel, triton.JITFunction),
        "the Triton kernels need a GPU; on a CPU use fastgrad_kernels.cpu",
    )
    n = offsets.numel() - 1
    weight = torch.empty(n, d, dtype=torch.float32, device=x.device)
    bias = torch.empty(n if want_bias else 0, d, dtype=torch.float32, device=x.device)
    if n and d:
        norm_taps_kernel[(n, -(-d // config.cols))](
            x, grad_out, rstd if mean is None else mean, rstd, offsets, weight,
            bias if want_bias else weight, d, HAS_MEAN=mean is not None, WANT_BIAS=want_bias,
            TOKENS=config.tokens, COLS=config.cols, num_warps=config.num_warps,
        )  # fmt: skip
    return weight, bias
