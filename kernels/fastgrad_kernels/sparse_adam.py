"""AdamW (arXiv 1711.05101) on a list of packed tensors, in place, with write-through.

A packed tensor ``[n, block_rows, block_cols]`` holds the selected blocks of a full weight; a
whole tensor is its own packed form. Two launches do a step for any number of tensors of one
(parameter, gradient, full weight) dtype group: one counts steps and computes the scalars that
follow from them in float64, one updates. Learning rate, gradient scale and found-inf are tensors
of one element on the device, so nothing waits for the device and a CUDA graph can hold the step.

Equal to ``torch.optim.AdamW(fused=True)``: the order of operations (decay, moments, step size
``lr / (1 - beta1^t)``, denominator ``sqrt(v) / sqrt(1 - beta2^t) + eps``), scalars in float64,
correctly rounded division and square root, found-inf and ``grad_scale`` semantics. Different:
elements are float32 throughout, where torch multiplies by float64 constants before it rounds;
the gradient is multiplied by ``1 / grad_scale`` (the same for powers of two, as GradScaler's
are), and the unscaled gradient is not written back. Kernels that work in place are not autotuned:
trial runs would be steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrad_kernels.compile_check import TARGETS, Shipped
from fastgrad_kernels.dispatch import refill, upload

UNIT = tl.constexpr(16)  # elements side by side in a tile: any block width that 16 divides fits
_HYPER = 64  # sets of hyperparameters that a prepared step keeps on the device
FIELDS = 11  # int64 per tensor in the table, see adamw_kernel
FIELDS_ = tl.constexpr(FIELDS)


@triton.jit(do_not_specialize=["n_steps"])
def advance_kernel(  # type: ignore[no-untyped-def]
    grads,  # int64 [n_tensors]: addresses of the gradients, 0 for none
    steps,  # int64 [n_steps, 2]: address of a float32 step count, tensor that it belongs to
    scalars,  # float32 [3, n_steps]: lr / (1 - beta1^t), sqrt(1 - beta2^t), lr * weight_decay
    hyper,  # float64 [8]: ln beta1, ln beta2, weight decay, ...
    lr,
    found_inf,
    n_steps,
    HAS_INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count up the steps of tensors with a gradient (none if found_inf) and compute each count's
    scalars in float64. Apart from the update, many programs of which read one count.

    Bytes moved: 44 per count.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_steps
    tensor = tl.load(steps + 2 * at + 1, mask=inside, other=0)
    here = inside & (tl.load(grads + tensor, mask=inside, other=0) != 0)
    if HAS_INF:
        here = here & (tl.load(found_inf + at * 0) == 0.0)
    ptr = tl.load(steps + 2 * at, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(ptr, mask=here, other=0.0) + 1.0
    tl.store(ptr, step, mask=here)
    step = step.to(tl.float64)
    rate = tl.load(lr).to(tl.float64)
    size = rate / (1.0 - tl.exp(step * tl.load(hyper)))
    root = tl.sqrt(1.0 - tl.exp(step * tl.load(hyper + 1)))
    decay = rate * tl.load(hyper + 2) + tl.zeros([BLOCK], tl.float64)
    tl.store(scalars + at, size.to(tl.float32), mask=here)
    tl.store(scalars + n_steps + at, root.to(tl.float32), mask=here)
    tl.store(scalars + 2 * n_steps + at, decay.to(tl.float32), mask=here)


@triton.jit
def _random_words(e0, chunk, step, seed, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One 32-bit word per element of a tile that starts at element e0 (divisible by 4) of its
    chunk: Philox-4x32-7 with key ``seed`` and counter ``(element // 4, chunk, step, 0)``. Seven
    rounds are the fewest that pass BigCrush (Salmon et al. 2011)."""
    quads: tl.constexpr = UNIT // 4
    q = tl.arange(0, ROWS)[:, None] * quads + tl.arange(0, quads)[None, :] + e0 // 4
    zero = (q * 0).to(tl.uint32)
    a, b, c, d = tl.philox(
        seed, q.to(tl.uint32), zero + chunk.to(tl.uint32), zero + step.to(tl.uint32), zero, 7
    )
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, UNIT])


@triton.jit
def _to_bfloat16(x, words, STOCHASTIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 to bfloat16: to nearest, ties to even; or up with the probability of the part cut
    off. NaN and infinity stay. In integers, since the interpreter's own cast cuts off."""
    bits = x.to(tl.uint32, bitcast=True)
    special = (bits & 0x7F800000) == 0x7F800000
    if STOCHASTIC:
        addend = words & 0xFFFF
        # Rounding up by chance must not turn the largest finite number into infinity.
        addend = tl.where((bits & 0x7FFF0000) == 0x7F7F0000, addend * 0, addend)
    else:
        addend = ((bits >> 16) & 1) + 0x7FFF
    moved = tl.add(bits, addend, sanitize_overflow=False) & 0xFFFF0000
    return tl.where(special, x, moved.to(tl.float32, bitcast=True)).to(tl.bfloat16)


@triton.jit
def _cast(x, to: tl.constexpr):  # type: ignore[no-untyped-def]
    if to == tl.bfloat16:
        y = _to_bfloat16(x, 0, False)
    else:
        y = x.to(to)
    return y


@triton.jit
def _update_tile(  # type: ignore[no-untyped-def]
    p_at, g_at, m_at, v_at, f_at, e0, n, local, block_cols, stride, rows_left, cols_left, chunk,
    beta1, rest1, beta2, rest2, eps, size, root, decay, inv_scale, step, seed,
    P: tl.constexpr, G: tl.constexpr, F: tl.constexpr, WRITE: tl.constexpr,
    MAXIMIZE: tl.constexpr, STOCHASTIC: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Elements ``e0 .. e0 + ROWS * 16`` of a chunk; FAST: all there, aligned, write-through in
    units of 16 columns."""
    p_ptr = p_at.to(tl.pointer_type(P))
    g_ptr = g_at.to(tl.pointer_type(G))
    m_ptr = m_at.to(tl.pointer_type(tl.float32))
    v_ptr = v_at.to(tl.pointer_type(tl.float32))
    if FAST:  # the caller has looked
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)
    unit = tl.arange(0, ROWS)
    e = e0 + unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    mask = tl.full([ROWS, UNIT], True, tl.int1) if FAST else e < n  # the constant is folded away
    p = tl.load(p_ptr + e, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + e, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + e, mask=mask, other=0.0)
    v = tl.load(v_ptr + e, mask=mask, other=0.0)
    g = g * inv_scale
    if MAXIMIZE:
        g = -g
    p = p - decay * p
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), root) + eps
    p = p - tl.div_rn(size * m, denominator)
    if STOCHASTIC:
        new = _to_bfloat16(p, _random_words(e0, chunk, step, seed, ROWS), True)
    else:
        new = _cast(p, P)
    tl.store(p_ptr + e, new, mask=mask)
    tl.store(m_ptr + e, m, mask=mask)
    tl.store(v_ptr + e, v, mask=mask)
    if WRITE:
        f_ptr = f_at.to(tl.pointer_type(F))
        value = new if P == F else _cast(new.to(tl.float32), F)
        if FAST:
            f_ptr = tl.multiple_of(f_ptr, 16)
            stride8 = (stride // 8) * 8  # an identity here that tells the compiler of alignment
            units = tl.maximum(block_cols // UNIT, 1)
            q = (local + e0) // UNIT + unit
            base = (q // units).to(tl.int64) * stride8 + (q % units) * UNIT
            tl.store(f_ptr + (base[:, None] + tl.arange(0, UNIT)[None, :]), value)
        else:
            row = (local + e) // block_cols
            col = (local + e) % block_cols
            kept = mask & (row < rows_left) & (col < cols_left)
            tl.store(f_ptr + row.to(tl.int64) * stride + col, value, mask=kept)


@triton.jit(do_not_specialize=["n_steps"])
def adamw_kernel(  # type: ignore[no-untyped-def]
    tensors,  # int64 [n_tensors, FIELDS], see AdamTable
    grads,  # int64 [n_tensors]: addresses of the gradients, 0 for none
    chunks,  # int64 [n_chunks, 5]: tensor, block, first element in it, elements, step count
    steps,  # int64 [n_steps, 2]: as in advance_kernel
    scalars,  # float32 [3, n_steps]: from advance_kernel
    hyper,  # float64 [8]: .., .., .., beta1, 1 - beta1, beta2, 1 - beta2, eps
    grad_scale,
    found_inf,
    seed,
    n_steps,
    P: tl.constexpr,
    G: tl.constexpr,
    F: tl.constexpr,
    WRITE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_INF: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One chunk, a part of one block, per program:
    ``p -= lr wd p``, ``m = β₁m + (1-β₁)g``, ``v = β₂v + (1-β₂)g²``,
    ``p -= lr / (1-β₁ᵗ) · m / (√v / √(1-β₂ᵗ) + ε)``.

    Element e of block b goes to row ``ids[b] // grid_cols * block_rows + e // block_cols`` and
    column ``ids[b] % grid_cols * block_cols + e % block_cols`` of the full weight; what lies
    outside is padding. Bytes per element: 28 with float32 master, bfloat16 gradient and full
    weight; 22 with bfloat16 parameter and gradient, and 2 more to write through.
    """
    row = chunks + tl.program_id(0).to(tl.int64) * 5
    tensor = tl.load(row)
    block = tl.load(row + 1)
    local = tl.load(row + 2)
    n = tl.load(row + 3).to(tl.int32)
    count = tl.load(row + 4)
    table = tensors + tensor * FIELDS_
    g_at = tl.load(grads + tensor)
    n = tl.where(g_at == 0, 0, n)
    if HAS_INF:
        n = tl.where(tl.load(found_inf) == 0.0, n, 0)
    size = tl.load(scalars + count)
    root = tl.load(scalars + n_steps + count)
    decay = tl.load(scalars + 2 * n_steps + count)
    beta1 = tl.load(hyper + 3).to(tl.float32)
    rest1 = tl.load(hyper + 4).to(tl.float32)
    beta2 = tl.load(hyper + 5).to(tl.float32)
    rest2 = tl.load(hyper + 6).to(tl.float32)
    eps = tl.load(hyper + 7).to(tl.float32)
    seed_ = 0
    step = 0
    if STOCHASTIC:
        seed_ = tl.load(seed)
        step = tl.load(tl.load(steps + 2 * count).to(tl.pointer_type(tl.float32))).to(tl.int32)
    inv_scale = 1.0
    if HAS_SCALE:
        inv_scale = tl.div_rn(1.0, tl.load(grad_scale).to(tl.float32))
    per_block = tl.load(table + 5)
    start = block * per_block + local
    p_at = tl.load(table) + start * (P.primitive_bitwidth // 8)
    g_at = g_at + start * (G.primitive_bitwidth // 8)
    m_at = tl.load(table + 1) + start * 4
    v_at = tl.load(table + 2) + start * 4
    fast = (p_at | g_at | m_at | v_at) % 16 == 0
    f_at = p_at
    block_cols = tl.load(table + 6)
    stride = tl.load(table + 10)
    rows_left = per_block
    cols_left = block_cols
    if WRITE:
        ids = tl.load(table + 4)
        if ids == 0:  # the whole weight, one run as long as you like
            f_at = tl.load(table + 3) + start * (F.primitive_bitwidth // 8)
            local = local * 0
            block_cols = local + 1073741824
            rows_left = local + 1
            cols_left = block_cols
        else:
            grid_cols = tl.load(table + 9)
            block_rows = per_block // block_cols
            which = tl.load(ids.to(tl.pointer_type(tl.int64)) + block)
            top = which // grid_cols * block_rows
            left = which % grid_cols * block_cols
            rows_left = tl.load(table + 7) - top
            cols_left = tl.load(table + 8) - left
            f_at = tl.load(table + 3) + (top * stride + left) * (F.primitive_bitwidth // 8)
            fast = fast & (block_rows <= rows_left) & (block_cols <= cols_left)
            fast = fast & (block_cols % 16 == 0) & (stride % 8 == 0) & (local % 16 == 0)
        fast = fast & (f_at % 16 == 0)
    local = local.to(tl.int32)
    block_cols = block_cols.to(tl.int32)
    steps_fast = tl.where(fast, n // (ROWS * UNIT), 0)
    chunk = tl.program_id(0)
    for i in range(steps_fast):
        _update_tile(
            p_at, g_at, m_at, v_at, f_at, i * ROWS * UNIT, n, local, block_cols, stride,
            rows_left, cols_left, chunk,
            beta1, rest1, beta2, rest2, eps, size, root, decay, inv_scale, step, seed_,
            P, G, F, WRITE, MAXIMIZE, STOCHASTIC, True, ROWS,
        )  # fmt: skip
    for i in range(steps_fast * ROWS * UNIT, n, ROWS * UNIT):
        _update_tile(
            p_at, g_at, m_at, v_at, f_at, i, n, local, block_cols, stride,
            rows_left, cols_left, chunk,
            beta1, rest1, beta2, rest2, eps, size, root, decay, inv_scale, step, seed_,
            P, G, F, WRITE, MAXIMIZE, STOCHASTIC, False, ROWS,
        )  # fmt: skip


@dataclass(frozen=True)
class AdamConfig:
    """``chunk``: elements per program at most, a multiple of 16. ``rows`` x 16 elements are one
    step: 4 per thread, 128 bits of float32 and 64 of bfloat16. With 8 per thread Triton passes the
    float32 results through shared memory before it stores them, with barriers in every step."""

    chunk: int = 4096
    rows: int = 32
    num_warps: int = 4
    advance: int = 128


CUDA = AdamConfig()
HIP = AdamConfig(rows=64)  # waves of 64 lanes: the same 4 elements per thread
DEFAULT = HIP if torch.version.hip else CUDA

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_POINTERS = {
    "tensors": "*i64", "grads": "*i64", "chunks": "*i64", "steps": "*i64", "scalars": "*fp32",
    "hyper": "*fp64", "grad_scale": "*fp32", "found_inf": "*fp32", "seed": "*i64",
}  # fmt: skip


def _shipped(
    name: str, p: tl.dtype, g: tl.dtype, f: tl.dtype, config: AdamConfig, targets: tuple[str, ...],
    write: bool = True, stochastic: bool = False,
) -> Shipped:  # fmt: skip
    flags = {"WRITE": write, "HAS_SCALE": True, "HAS_INF": True, "MAXIMIZE": False}
    return Shipped(
        f"sparse_adam/{name}",
        adamw_kernel,
        _POINTERS | {"n_steps": "i64"},
        {"P": p, "G": g, "F": f, "STOCHASTIC": stochastic, "ROWS": config.rows} | flags,
        num_warps=config.num_warps,
        aligned=tuple(_POINTERS),
        targets=targets,
    )


_BF, _F = tl.bfloat16, tl.float32
SHIPPED = (
    *(
        entry
        for config, on, tag in ((CUDA, TARGETS[:3], "cuda"), (HIP, TARGETS[3:], "hip"))
        for entry in (
            _shipped(f"master/{tag}", _F, _F, _BF, config, on),
            _shipped(f"master-bf16-grad/{tag}", _F, _BF, _BF, config, on),
            _shipped(f"fp32/{tag}", _F, _F, _F, config, on, write=False),
            _shipped(f"bf16/{tag}", _BF, _BF, _BF, config, on),
            _shipped(f"bf16-stochastic/{tag}", _BF, _BF, _BF, config, on, stochastic=True),
        )
    ),
    Shipped(
        "sparse_adam/advance",
        advance_kernel,
        {k: _POINTERS[k] for k in ("grads", "steps", "scalars", "hyper", "found_inf")}
        | {"lr": "*fp32", "n_steps": "i64"},
        {"HAS_INF": True, "BLOCK": DEFAULT.advance},
        aligned=("grads", "steps", "scalars", "hyper"),
    ),
)


@dataclass(frozen=True)
class Packed:
    """A trained tensor: ``param`` (whole, or ``[n, block_rows, block_cols]`` with ``ids``), float32
    moments of its shape, ``step`` float32 with one element or one per block, and the matrix
    ``full`` to write through to (``ids``: int64 ``[n]`` block numbers, None for all of it)."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    full: Tensor | None = None
    ids: Tensor | None = None

    def check(self, i: int, grad: Tensor | None) -> None:
        """Raises ValueError that names entry i if something does not fit."""
        p, dense = self.param, [self.param, self.exp_avg, self.exp_avg_sq]
        dense += [] if grad is None else [grad]
        blocks = 1 if self.ids is None else p.shape[0]
        for t in (*dense, self.step, *(x for x in (self.full, self.ids) if x is not None)):
            _refuse(t.device != p.device, f"tensor {i}: {t.device} and {p.device}")
        for t in dense:
            _refuse(t.shape != p.shape, f"tensor {i}: shapes {tuple(t.shape)}, {tuple(p.shape)}")
            _refuse(not t.is_contiguous(), f"tensor {i} has a non-contiguous part: {t.stride()}")
            _refuse(t.dtype not in _TYPES, f"tensor {i}: {t.dtype}; {list(_TYPES)} only")
        for t in (self.exp_avg, self.exp_avg_sq, self.step):
            _refuse(t.dtype != torch.float32, f"tensor {i}: moments and steps must be float32")
        _refuse(
            not self.step.is_contiguous() or self.step.numel() not in (1, blocks),
            f"tensor {i}: {self.step.numel()} step counts for {blocks} blocks",
        )
        full, ids = self.full, self.ids
        if full is not None and ids is None:
            fits = full.is_contiguous() and full.numel() == p.numel()
            _refuse(not fits, f"tensor {i}: full weight {tuple(full.shape)} is not the parameter's")
        if ids is not None:
            _refuse(p.ndim != 3, f"tensor {i}: packed blocks are 3-D, not {p.ndim}-D")
            _refuse(p[0].numel() >= 2**31 if len(p) else False, f"tensor {i}: blocks of >= 2^31")
            fits = ids.dtype == torch.int64 and ids.is_contiguous() and ids.shape == p.shape[:1]
            _refuse(not fits, f"tensor {i}: ids must be contiguous int64 [{len(p)}]")
            fits = full is None or (full.ndim == 2 and full.stride(1) == 1)
            _refuse(not fits, f"tensor {i}: the full weight must be a matrix of contiguous rows")
        _refuse(full is not None and full.dtype not in _TYPES, f"tensor {i}: wrong full dtype")


class AdamTable:
    """Addresses and chunks of one (param, grad, full) dtype group, built once per group.

    A row of ``tensors``: addresses of parameter, first and second moment, full weight (0: none),
    block ids (0: whole); elements per block, block columns, rows and columns of the full weight,
    its grid's columns, its row stride.
    """

    def __init__(self, items: Sequence[Packed], config: AdamConfig) -> None:
        device, rows, chunks = items[0].param.device, [], []
        steps: list[list[int]] = []
        for i, item in enumerate(items):
            p, full, ids = item.param, item.full, item.ids
            blocks, per_block, cols = 1, p.numel(), max(p.numel(), 1)
            matrix = (0, 0, 1, 0)
            if ids is not None:
                blocks, per_block, cols = p.shape[0], p.shape[1] * p.shape[2], p.shape[2]
                if full is not None:
                    matrix = (*full.shape, -(-full.shape[1] // cols), full.stride(0))
            ends = [t.data_ptr() if t is not None else 0 for t in (full, ids)]
            state = [t.data_ptr() for t in (p, item.exp_avg, item.exp_avg_sq)]
            rows.append([*state, *ends, per_block, cols, *matrix])
            pieces = -(-per_block // config.chunk)
            block = np.repeat(np.arange(blocks, dtype=np.int64), pieces)
            local = np.tile(np.arange(pieces, dtype=np.int64) * config.chunk, blocks)
            n = np.minimum(config.chunk, per_block - local)
            count = len(steps) + (block if item.step.numel() > 1 else 0 * block)
            chunks.append(np.stack([np.full_like(n, i), block, local, n, count], 1))
            steps += [[item.step.data_ptr() + 4 * k, i] for k in range(item.step.numel())]
        self.tensors = torch.tensor(rows, dtype=torch.int64).to(device)
        self.chunks = torch.from_numpy(np.concatenate(chunks)).to(device)
        self.steps = torch.tensor(steps, dtype=torch.int64).view(-1, 2).to(device)
        self.scalars = torch.zeros(3, len(steps), dtype=torch.float32, device=device)
        self.grads = torch.zeros(len(items), dtype=torch.int64, device=device)
        self._known: list[int] = []

    def knows(self, grads: Sequence[Tensor | None]) -> bool:
        """The gradients are where they were."""
        return [0 if g is None else g.data_ptr() for g in grads] == self._known

    def refresh(self, grads: Sequence[Tensor | None]) -> None:
        """Take the gradients' present addresses; no copy if they did not move."""
        now = [0 if g is None else g.data_ptr() for g in grads]
        if now != self._known:
            refill(self.grads, now)
            self._known = now


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ValueError(f"fastgrad_kernels: {message}")


class AdamStep:
    """The prepared step of a list of tensors: checked and tabulated once, called many times.

    A call whose gradients have not moved copies nothing to the device and can be captured in a
    CUDA graph; keep this object as long as the graph. It holds addresses, not tensors.

    Args:
        items: what to train; see :class:`Packed`. Their tensors must stay where they are.
        grads: gradients like those to come (None: of the parameter's dtype).

    Raises:
        ValueError: naming the tensor that does not fit.
    """

    def __init__(
        self,
        items: Sequence[Packed],
        grads: Sequence[Tensor | None],
        config: AdamConfig = DEFAULT,
    ) -> None:
        _refuse(len(items) != len(grads), f"{len(items)} tensors but {len(grads)} gradients")
        groups: dict[Any, list[int]] = {}
        for i, (item, grad) in enumerate(zip(items, grads, strict=True)):
            item.check(i, grad)
            _refuse(item.param.device != items[0].param.device, f"tensor {i}: another device")
            full = None if item.full is None else item.full.dtype
            dtype = item.param.dtype if grad is None else grad.dtype
            if item.param.numel():
                groups.setdefault((item.param.dtype, dtype, full), []).append(i)
        self.config = config
        self.kept: list[Tensor] = []  # tensors that nobody else holds
        self.captured = False  # a CUDA graph reads the tables: nothing may be freed
        self._shapes = [item.param.shape for item in items]
        self._device = items[0].param.device if items else torch.device("cpu")
        self._tables = [
            (key, members, AdamTable([items[i] for i in members], config))
            for key, members in groups.items()
        ]
        self._hyper: dict[object, Tensor] = {}

    def knows(self, grads: Sequence[Tensor | None]) -> bool:
        """A call with these gradients copies no address to the device."""
        return all(table.knows([grads[i] for i in m]) for _, m, table in self._tables)

    def __call__(
        self,
        grads: Sequence[Tensor | None],
        lr: Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> None:
        """One step; see :func:`adamw_`."""
        if not self._tables:
            return
        device, config = self._device, self.config
        count = len(self._shapes)
        _refuse(len(grads) != count, f"{count} tensors, {len(grads)} gradients")
        for (_, dtype, _), members, _ in self._tables:
            for i in members:
                g = grads[i]
                shape = self._shapes[i]
                fits = g is None or (g.dtype == dtype and g.shape == shape and g.device == device)
                if g is not None and not (fits and g.is_contiguous()):
                    _refuse(True, f"tensor {i}: gradient {g.dtype} {tuple(g.shape)} {g.stride()} "
                                  f"is not a contiguous {dtype} as prepared")  # fmt: skip
        for t in (t for t in (lr, grad_scale, found_inf, seed) if t is not None):
            _refuse(t.numel() != 1 or t.device != device, "lr, grad_scale, found_inf and seed must "
                    "have one element on the parameters' device")  # fmt: skip
        _refuse(
            device.type == "cpu" and isinstance(adamw_kernel, triton.JITFunction),
            "the Triton kernels need a GPU; on a CPU use fastgrad_kernels.cpu",
        )
        logs = [math.log(b) if b else -math.inf for b in betas]
        values = (*logs, weight_decay, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps)
        hyper = self._hyper.get(values)
        if hyper is None:
            hyper = upload(torch.tensor(values, dtype=torch.float64), device)
            if len(self._hyper) >= _HYPER and not self.captured:  # a schedule changes betas
                del self._hyper[next(iter(self._hyper))]
            self._hyper[values] = hyper
        for (p, g_type, f), members, table in self._tables:
            table.refresh([grads[i] for i in members])
            n_steps, stop = len(table.steps), found_inf is not None
            advance_kernel[(-(-n_steps // config.advance),)](
                table.grads, table.steps, table.scalars, hyper, lr, found_inf if stop else lr,
                n_steps, HAS_INF=stop, BLOCK=config.advance,
            )  # fmt: skip
            adamw_kernel[(len(table.chunks),)](
                table.tensors, table.grads, table.chunks, table.steps, table.scalars, hyper,
                lr if grad_scale is None else grad_scale, found_inf if stop else lr,
                table.steps if seed is None else seed, n_steps,
                P=_TYPES[p], G=_TYPES[g_type], F=_TYPES[f or p], WRITE=f is not None,
                HAS_SCALE=grad_scale is not None, HAS_INF=stop, MAXIMIZE=maximize,
                STOCHASTIC=seed is not None and p == torch.bfloat16,
                ROWS=config.rows, num_warps=config.num_warps,
            )  # fmt: skip


def adamw_(
    items: Sequence[Packed],
    grads: Sequence[Tensor | None],
    lr: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: Tensor | None = None,
    config: AdamConfig = DEFAULT,
) -> None:
    """One AdamW step in place, two launches per dtype group; nothing waits for the device.
    Prepares the step each time: in a training loop keep an :class:`AdamStep` instead.

    Args:
        items: what to train; see :class:`Packed`.
        grads: shaped like each ``param``; an entry of None is skipped, its steps not counted.
        lr: one float element on the device, as are ``grad_scale`` (gradients are divided by it:
            GradScaler's scale, or ``clamp(norm / max_norm, min=1)`` to clip) and ``found_inf``
            (nothing changes, no step is counted, unless it is zero).
        seed: int64 element on the device: round bfloat16 parameters stochastically. The same
            seed, steps and list of tensors give the same bits.

    Raises:
        ValueError: naming the tensor that does not fit; nothing is changed then.
    """
    AdamStep(items, grads, config)(
        grads, lr, betas, eps, weight_decay,
        maximize=maximize, grad_scale=grad_scale, found_inf=found_inf, seed=seed,
    )  # fmt: skip
