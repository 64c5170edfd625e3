"""``ops.adamw_`` in PyTorch: its fused update over pieces that stay in cache until written through.

Written for CPUs and correct on any device. One update reads 16 and writes 12 bytes of each float32
weight: memory sets its speed. What is touched once more (rounded, written through) is therefore
cut into pieces small enough to be in cache still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrad_kernels.layout import write_blocks_

# Elements of a piece: 1 MiB of float32, an L2 cache.
PIECE = 1 << 18
# Blocks with step counts of their own: a run of blocks of one count is a tensor of its own to the
# fused update. Where runs have fewer elements than this on average (one costs about 3 µs, as much
# as 8000 elements), blocks are sorted by count first, which costs two copies.
RUN = 8192
# Rows of a block shorter than this many bytes are left to the general way.
WIDE = 64
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Hyper(NamedTuple):
    lr: Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


class _Piece(NamedTuple):
    """Flat stretches ``[m]`` of parameter, gradient and moments; one step count, or ``[k]``, one
    per block of ``m / k`` elements; what writes it through, and where it lies in its tensor."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    dice: torch.Generator | None
    write: Callable[[slice], None] | None
    where: slice


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    fulls: Sequence[Tensor],
    ids: Sequence[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: Tensor | None,
) -> None:
    """See :func:`fastgrad_kernels.ops.adamw_`."""
    if not params or (found_inf is not None and bool(found_inf != 0)):
        return
    # PyTorch's kernel reads float32 on a GPU
    hyper = _Hyper(lr.float() if lr.is_cuda else lr, beta1, beta2, eps, weight_decay, maximize)
    torch._foreach_add_(list(steps), 1.0)
    waiting: list[_Piece] = []
    elements = 0
    finish: list[Callable[[], object]] = []
    for i, row in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)):
        p, counts = row[0].detach(), row[4].reshape(-1)
        if p.numel() == 0:
            continue
        full, write = fulls[i] if fulls else p.new_empty(0), None
        flat, back = _flat(p, *row[1:4], in_order=full.numel() > 0 or counts.numel() > 1)
        finish += [partial(target.copy_, result) for target, result in back]
        if full.numel() and ids[i].numel():
            write = _rows_writer(full.detach(), ids[i], p)
            if write is None:
                finish.append(partial(write_blocks_, full, ids[i], p, p.shape[1], p.shape[2]))
        elif full.numel() and full.is_contiguous() and not back:
            write = _stretch_writer(full.detach(), flat[0])
        elif full.numel():
            finish.append(partial(full.copy_, p.reshape(full.shape)))
        dice = None
        if seed is not None and p.dtype == torch.bfloat16:
            dice = _generator(p.device, (int(seed), int(counts[0]), i))
        unit = p[0].numel() if p.ndim == 3 or counts.numel() > 1 else 1
        once = write is None and grad_scale is None and p.dtype == row[1].dtype == row[2].dtype
        piece = p.numel() if once else PIECE
        for start, stop, count in _stretches(p.numel(), unit, counts, piece):
            where = slice(start, stop)
            fp, fg, fm, fv = (t[where] for t in flat)
            waiting.append(_Piece(fp, fg, fm, fv, count, dice, write, where))
            elements += stop - start
            if elements >= PIECE:
                _advance(waiting, hyper, grad_scale)
                waiting, elements = [], 0
    _advance(waiting, hyper, grad_scale)
    for call in finish:
        call()


def _flat(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, in_order: bool
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The four tensors as flat views that walk through memory alike, in the order of elements if
    that is wanted; and pairs (tensor, copy) where a copy had to be made."""
    if g.stride() != p.stride():
        g = torch.empty_like(p, dtype=g.dtype).copy_(g)
    rows = [p, g, m, v]
    if all(t.is_contiguous() for t in rows):
        return [t.detach().view(-1) for t in rows], []
    alike = not in_order and all(t.stride() == p.stride() and _dense(t) for t in rows)
    if not alike:
        rows = [t.contiguous() for t in rows]
    back = [(a, b) for a, b in zip((p, m, v), (rows[0], *rows[2:]), strict=True) if a is not b]
    return [t.detach().as_strided((t.numel(),), (1,), t.storage_offset()) for t in rows], back


def _dense(tensor: Tensor) -> bool:
    """Its elements fill one stretch of memory, each place once; others are not copied so."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _stretches(n: int, unit: int, counts: Tensor, piece: int) -> Iterator[tuple[int, int, Tensor]]:
    """Flat ranges of whole units, of about ``piece`` elements, with their step counts."""
    size = max(piece // unit, 1) * unit
    if counts.numel() <= 1 or bool((counts == counts[0]).all()):
        for start in range(0, n, size):
            yield start, min(start + size, n), counts[:1].view(())
        return
    values, lengths = torch.unique_consecutive(counts, return_counts=True)
    if n < RUN * len(values):  # short runs; sorting makes copies
        size = max(PIECE // unit, 1) * unit
        for start in range(0, n, size):
            stop = min(start + size, n)
            yield start, stop, counts[start // unit : stop // unit]
        return
    first = 0
    for value, length in zip(values.unbind(), lengths.tolist(), strict=True):
        last = first + length * unit
        for start in range(first, last, size):
            yield start, min(start + size, last), value
        first = last


def _advance(pieces: Sequence[_Piece], hyper: _Hyper, grad_scale: Tensor | None) -> None:
    """One step of all pieces, written through while they are in cache."""
    work = [x.param.to(x.exp_avg.dtype) for x in pieces]
    grads = [x.grad.to(x.exp_avg.dtype) for x in pieces]
    if grad_scale is not None:
        grads = [g / grad_scale.to(g.dtype) for g in grads]
    rows: list[tuple[Tensor, ...]] = []
    sorted_: list[tuple[Tensor, Tensor, Tensor]] = []  # target, sorted copy, the way back
    for x, w, grad in zip(pieces, work, grads, strict=True):
        if x.step.ndim == 0:
            rows.append((w, grad, x.exp_avg, x.exp_avg_sq, x.step))
            continue
        order = x.step.argsort(stable=True)
        into = [t.view(len(order), -1) for t in (w, grad, x.exp_avg, x.exp_avg_sq)]
        copies = [t.index_select(0, order) for t in into]
        steps, lengths = torch.unique_consecutive(x.step[order], return_counts=True)
        cut = [t.split(lengths.tolist()) for t in copies]
        rows += zip(*cut, steps.unbind(), strict=True)
        back = order.argsort()
        sorted_ += [(into[k], copies[k], back) for k in (0, 2, 3)]
    if rows:
        p, g, m, v, count = (list(ts) for ts in zip(*rows, strict=True))
        torch._fused_adamw_(
            p,
            g,
            m,
            v,
            [],
            count,
            lr=hyper.lr,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            weight_decay=hyper.weight_decay,
            eps=hyper.eps,
            amsgrad=False,
            maximize=hyper.maximize,
        )
    for target, copy, back in sorted_:
        torch.index_select(copy, 0, back, out=target)
    for x, w in zip(pieces, work, strict=True):
        if x.dice is not None:
            x.param.copy_(_rounded_stochastically(w, x.dice))
        elif w is not x.param:
            x.param.copy_(w)
        if x.write is not None:
            x.write(x.where)


def _rows_writer(full: Tensor, ids: Tensor, packed: Tensor) -> Callable[[slice], None] | None:
    """Writes stretches of packed blocks ``[n, h, w]`` into a matrix; None where it cannot.

    Blocks of the same width that fill the columns are rows of a matrix ``[rows · cols / w, w]``.
    NumPy copies such rows as bytes; PyTorch's ``index_put_`` and ``index_copy_`` go element by
    element, which takes two to seven times as long.
    """
    _, h, w = packed.shape
    bits = _BITS[full.element_size()]
    if not (
        full.is_contiguous()
        and full.shape[1] % w == 0
        and w * full.element_size() >= WIDE
        and full.device.type == packed.device.type == "cpu"
    ):
        return None
    across = full.shape[1] // w
    numbers = (ids // across * (h * across) + ids % across)[:, None] + torch.arange(h) * across
    target, n = full.view(bits).view(-1, w).numpy(), full.numel() // w
    rows, source = numbers.view(-1).numpy(), packed.reshape(-1)

    def write(where: slice) -> None:
        new = source[where].to(full.dtype).view(bits).view(-1, w).numpy()
        to = rows[where.start // w : where.stop // w]
        if to.max() >= n:  # blocks of the last row reach beyond the matrix
            inside = to < n
            new, to = new[inside], to[inside]
        target[to] = new

    return write


def _stretch_writer(full: Tensor, packed: Tensor) -> Callable[[slice], None]:
    """Writes stretches of a whole weight, flat in the same order."""
    flat = full.view(-1)

    def write(where: slice) -> None:
        flat[where].copy_(packed[where])

    return write


def _generator(device: torch.device, key: tuple[int, int, int]) -> torch.Generator:
    return torch.Generator(device).manual_seed(hash(key) & (2**63 - 1))


def _rounded_stochastically(x: Tensor, dice: torch.Generator) -> Tensor:
    """float32 to bfloat16, up with the probability of the part cut off; finite stays finite."""
    x = x.float()
    bits = x.view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, generator=dice, dtype=torch.int32, device=x.device)
    largest = (bits & 0x7FFF0000) == 0x7F7F0000
    moved = (bits + noise.masked_fill_(largest, 0)) & -0x10000
    return torch.where(torch.isfinite(x), moved.view(torch.float32), x).to(torch.bfloat16)


__all__ = ["adamw_"]
