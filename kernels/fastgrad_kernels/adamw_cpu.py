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

from fastgrad_kernels.adamw_prepared import (
    Hyper,
    Prepared,
    Write,
    by_pieces,
    can_be_prepared,
    dense,
    fused,
    writer,
)
from fastgrad_kernels.layout import write_blocks_

# Elements of a piece: 2 MiB of float32, with gradient and moments 8, part of an L3 cache. Smaller
# ones lose more at the ends of calls, where threads wait for each other, than an L2 cache gains.
# Prepared steps, which make no copies, take two at a time.
PIECE = 1 << 19
# Blocks with step counts of their own: a run of blocks of one count is a tensor of its own to the
# fused update. Where runs have fewer elements than this on average (one costs about 3 µs, as much
# as 8000 elements), blocks are sorted by count first, which costs two copies.
RUN = 8192


class _Piece(NamedTuple):
    """Flat stretches ``[m]`` of parameter, gradient and moments; one step count, or ``[k]``, one
    per block of ``m / k`` elements; what writes it through, and where it lies in its tensor."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    dice: torch.Generator | None
    write: Callable[[slice], Write] | None
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
    hyper = hyper_of(lr, beta1, beta2, eps, weight_decay, maximize)
    tensors = params, exp_avgs, exp_avg_sqs, steps, fulls, ids
    simple: list[int] = []
    if grad_scale is None:
        simple = [
            i
            for i in _simple(*tensors)
            if grads[i].dtype == params[i].dtype and grads[i].stride() == params[i].stride()
        ]
    if simple:
        p, m, v, s, f, b = ([column[i] for i in simple] if column else [] for column in tensors)
        Prepared(p, m, v, s, f, b, PIECE)([grads[i] for i in simple], hyper)
    slow = sorted({*range(len(params))} - {*simple})
    if not slow:
        return
    torch._foreach_add_([steps[i] for i in slow], 1.0)
    queue = _Queue(hyper, grad_scale)
    finish: list[Callable[[], object]] = []
    for i in slow:
        p, g, m, v, step = params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], steps[i]
        if p.numel() == 0:
            continue
        full = fulls[i] if fulls and fulls[i].numel() else None
        write = None
        if full is not None and by_pieces(full, ids[i], p):
            write = writer(full, ids[i], p)
        flat, back = _flat(p, g, m, v, in_order=full is not None or step.numel() > 1)
        finish += [partial(target.copy_, result) for target, result in back]
        if full is not None and (back or write is None):
            write = None
            finish.append(partial(_write_all, full, ids[i], p))
        counts = step.reshape(-1)
        dice = None
        if seed is not None and p.dtype == torch.bfloat16:
            dice = _generator(p.device, (int(seed), int(counts[0]), i))
        unit = p[0].numel() if p.ndim == 3 or counts.numel() > 1 else 1
        once = write is None and grad_scale is None and p.dtype == g.dtype == m.dtype
        piece = p.numel() if once else PIECE
        for start, stop, count in _stretches(p.numel(), unit, counts, piece):
            where = slice(start, stop)
            fp, fg, fm, fv = (t[where] for t in flat)
            queue.add(_Piece(fp, fg, fm, fv, count, dice, write, where))
    queue.flush()
    for call in finish:
        call()


def prepare(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    fulls: Sequence[Tensor],
    ids: Sequence[Tensor],
) -> Prepared | None:
    """A step of these tensors with all but the arithmetic done, or None where :func:`adamw_` has
    to look at some tensor each time."""
    tensors = params, exp_avgs, exp_avg_sqs, steps, fulls, ids
    return Prepared(*tensors, 2 * PIECE) if len(_simple(*tensors)) == len(params) else None


def _simple(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    fulls: Sequence[Tensor],
    ids: Sequence[Tensor],
) -> list[int]:
    """Places of the tensors that the fused update can take as they are."""
    return [
        i
        for i, row in enumerate(zip(params, exp_avgs, exp_avg_sqs, steps, strict=True))
        if can_be_prepared(*row, *((fulls[i], ids[i]) if fulls else (None, None)))
    ]


def hyper_of(
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float, maximize: bool
) -> Hyper:
    """PyTorch's kernel reads float32 on a GPU."""
    return Hyper(lr.float() if lr.is_cuda else lr, beta1, beta2, eps, weight_decay, maximize)


class _Queue:
    """Small tensors share a call of the fused update, of about :data:`PIECE` elements."""

    def __init__(self, hyper: Hyper, grad_scale: Tensor | None) -> None:
        self.hyper, self.grad_scale = hyper, grad_scale
        self.pieces: list[_Piece] = []
        self.elements = 0

    def add(self, piece: _Piece) -> None:
        self.pieces.append(piece)
        self.elements += piece.where.stop - piece.where.start
        if self.elements >= PIECE:
            self.flush()

    def flush(self) -> None:
        if self.pieces:
            _advance(self.pieces, self.hyper, self.grad_scale)
        self.pieces, self.elements = [], 0


def _flat(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, in_order: bool
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The four tensors as flat views that walk through memory alike, in the order of elements if
    that is wanted; and pairs (tensor, copy) where a copy had to be made."""
    if g.stride() != p.stride():
        g = torch.empty_like(p, dtype=g.dtype).copy_(g)
    rows = [p, g, m, v]
    if all(t.is_contiguous() for t in rows):
        return [t.view(-1) for t in rows], []
    alike = not in_order and all(t.stride() == p.stride() and dense(t) for t in rows)
    if not alike:
        rows = [t.contiguous() for t in rows]
    back = [(a, b) for a, b in zip((p, m, v), (rows[0], *rows[2:]), strict=True) if a is not b]
    return [t.as_strided((t.numel(),), (1,), t.storage_offset()) for t in rows], back


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


def _advance(pieces: Sequence[_Piece], hyper: Hyper, grad_scale: Tensor | None) -> None:
    """One step of all pieces, written through while they are in cache."""
    work = [x.param.to(x.exp_avg.dtype) for x in pieces]
    grads = [x.grad.to(x.exp_avg.dtype) for x in pieces]
    if grad_scale is not None:
        grads = [g / grad_scale.to(g.dtype) for g in grads]
    rows: list[tuple[Tensor, ...]] = []
    sorted_: list[tuple[Tensor, Tensor, Tensor]] = []  # target, sorted copy, the way back
    for x, w, grad in zip(pieces, work, grads, strict=True):
        if x.step.numel() == 1:
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
        fused(p, g, m, v, count, hyper)
    for target, copy, back in sorted_:
        torch.index_select(copy, 0, back, out=target)
    for x, w in zip(pieces, work, strict=True):
        if x.dice is not None:
            x.param.copy_(_rounded_stochastically(w, x.dice))
        elif w is not x.param:
            x.param.copy_(w)
        if x.write is not None:
            x.write(x.where)()


def _write_all(full: Tensor, ids: Tensor, packed: Tensor) -> None:
    if ids.numel():
        write_blocks_(full, ids, packed, packed.shape[1], packed.shape[2])
    else:
        full.copy_(packed.reshape(full.shape))


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


__all__ = ["adamw_", "hyper_of", "prepare"]
