"""``ops.adamw_`` in PyTorch: its fused update over pieces that stay in cache until written through.

Written for CPUs and correct on any device. One update reads 16 and writes 12 bytes of each float32
weight: memory sets its speed. What is touched once more (rounded, written through) is therefore
cut into pieces small enough to be in cache still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad_kernels.layout import write_blocks_

# Elements of a piece: 1 MiB of float32, an L2 cache.
PIECE = 1 << 18
# Blocks with step counts of their own: a run of blocks of one count is a tensor of its own to the
# fused update. Where runs have fewer elements than this on average (one costs about 3 µs, as much
# as 8000 elements), blocks are sorted by count first, which costs two copies.
RUN = 8192
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
    queue = _Queue(hyper, grad_scale)
    finish: list[Callable[[], object]] = []
    for i, (p, g, m, v, step) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ):
        if p.numel() == 0:
            continue
        full = fulls[i] if fulls and fulls[i].numel() else None
        write = None if full is None else _writer(full, ids[i], p)
        small = p.numel() <= PIECE and (write is not None or full is None)
        if (
            (full is None or small)
            and step.numel() == 1
            and grad_scale is None
            and _plain(p, g, m, v)
        ):
            queue.add(_Piece(p, g, m, v, step, None, write, slice(0, p.numel())))
            continue
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


class _Queue:
    """Small tensors share a call of the fused update, of about :data:`PIECE` elements."""

    def __init__(self, hyper: _Hyper, grad_scale: Tensor | None) -> None:
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


def _plain(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> bool:
    """The fused update, which walks through all four alike, can take them as they are."""
    strides, dtype = p.stride(), p.dtype
    return (
        dtype == g.dtype == m.dtype == v.dtype
        and strides == g.stride() == m.stride() == v.stride()
        and _dense(p)
    )


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
    alike = not in_order and all(t.stride() == p.stride() and _dense(t) for t in rows)
    if not alike:
        rows = [t.contiguous() for t in rows]
    back = [(a, b) for a, b in zip((p, m, v), (rows[0], *rows[2:]), strict=True) if a is not b]
    return [t.as_strided((t.numel(),), (1,), t.storage_offset()) for t in rows], back


def _dense(tensor: Tensor) -> bool:
    """Its elements fill one stretch of memory, each place once; others are not copied so."""
    return (
        tensor.is_contiguous()
        or torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    )


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


def _writer(full: Tensor, ids: Tensor, packed: Tensor) -> Callable[[slice], None] | None:
    """Writes flat stretches of a packed tensor through to its weight; None where memory is laid
    out so that only all of it can be written at once."""
    if full.device.type != "cpu" or not packed.is_contiguous():
        return None
    if ids.numel():
        return _blocks_writer(full, ids, packed)
    if not full.is_contiguous():
        return None
    to, source = full.view(-1), packed.view(-1)

    def write(where: slice) -> None:
        to[where].copy_(source[where])

    return write


def _write_all(full: Tensor, ids: Tensor, packed: Tensor) -> None:
    if ids.numel():
        write_blocks_(full, ids, packed, packed.shape[1], packed.shape[2])
    else:
        full.copy_(packed.reshape(full.shape))


def _blocks_writer(full: Tensor, ids: Tensor, packed: Tensor) -> Callable[[slice], None]:
    """Writes stretches of packed blocks ``[n, h, w]`` into a matrix.

    NumPy copies the rows of a block as bytes; PyTorch's ``index_put_`` and ``index_copy_`` go
    element by element, which takes up to seven times as long.
    """
    _, h, w = packed.shape
    down, across = full.shape[0] // h, full.shape[1] // w  # whole blocks
    bits = _BITS[full.element_size()]
    view = full[: down * h, : across * w].unflatten(1, (-1, w)).unflatten(0, (-1, h))
    target = view.permute(0, 2, 1, 3).view(bits).numpy()
    rows, columns, cut_off = _places(ids, full.shape, h, w)

    def write(where: slice) -> None:
        part = slice(where.start // (h * w), where.stop // (h * w))
        new, to = packed[part].to(full.dtype), (rows[part], columns[part])
        if cut_off is not None:
            cut, whole = cut_off[part], ~cut_off[part]
            write_blocks_(full, ids[part][cut], new[cut], h, w)
            new, to = new[whole], (to[0][whole.numpy()], to[1][whole.numpy()])
        target[to] = new.view(bits).numpy()

    return write


def _places(
    ids: Tensor, shape: Sequence[int], h: int, w: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], Tensor | None]:
    """Row and column of each block in the grid, ``[n]``, and which ones an edge cuts off, if any.
    They are kept with the block numbers, which stay the same for a training run."""
    key = (*shape, h, w, ids.data_ptr(), 0 if ids.is_inference() else ids._version)
    kept = getattr(ids, "_fastgrad_places", None)
    if kept is None or kept[0] != key or ids.is_inference():
        grid = -(-shape[1] // w)
        i, j = ids // grid, ids % grid
        cut_off = (i >= shape[0] // h) | (j >= shape[1] // w)
        found = i.numpy(), j.numpy(), cut_off if bool(cut_off.any()) else None
        kept = ids._fastgrad_places = (key, found)  # type: ignore[attr-defined]
    return kept[1]


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
