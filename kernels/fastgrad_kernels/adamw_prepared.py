"""``ops.adamw_`` on a CPU for lists of tensors that stay the same: all but the arithmetic, once.

An update of a few selected blocks is finished in less time than it takes to find out how to make
it: which pieces, which views, which places of the full weights. A training loop asks again and
again with the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad_kernels.layout import write_blocks_

# So many blocks are written one by one in less time than NumPy takes to look at an index of them.
FEW = 4
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Write = Callable[[], object]


class Hyper(NamedTuple):
    """What PyTorch's fused update is told apart from tensors."""

    lr: Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


class _Call(NamedTuple):
    """One call of the fused update, and what writes its results through.

    ``grads``: per row the tensor's place in the list and its flat stretch, None for all of it.
    """

    params: list[Tensor]
    grads: list[tuple[int, slice | None]]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    writes: list[Write]

    def add(self, tensors: Sequence[Tensor], grad: tuple[int, slice | None], step: Tensor) -> None:
        for column, tensor in zip((self.params, *self[2:4]), tensors, strict=True):
            column.append(tensor)
        self.grads.append(grad)
        self.steps.append(step)


def _call() -> _Call:
    return _Call([], [], [], [], [], [])


class Prepared:
    """A step of tensors that all :func:`can_be_prepared`.

    What is written through is cut into calls of about ``piece`` elements, small enough to be in
    cache still when it is written; all else is one call. The tensors are held: drop the object
    when they are exchanged. Lists and hyperparameters are those of ``ops.adamw_``.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        fulls: Sequence[Tensor],
        ids: Sequence[Tensor],
        piece: int,
    ) -> None:
        self.steps = list(steps)
        # Counted up through Python's own view of their memory: to PyTorch each is an operation.
        on_host = all(s.is_cpu and s.dtype == torch.float32 for s in steps)
        self._counts: list[Any] | None = None
        if on_host:
            self._counts = [s.detach().view(-1).numpy().data for s in steps]
        written = [f for f in fulls if f.numel()]
        self._changed = [*params, *exp_avgs, *exp_avg_sqs, *steps, *written]
        self._strides = [p.stride() for p in params]
        self._calls: list[_Call] = []
        alone = _call()
        together, elements = _call(), 0
        rows = zip(params, exp_avgs, exp_avg_sqs, steps, strict=True)
        for i, (p, m, v, step) in enumerate(rows):
            if p.numel() == 0:
                continue
            full = fulls[i] if fulls and fulls[i].numel() else None
            if full is None:
                alone.add((p.detach(), m, v), (i, None), step)
                continue
            unit = p[0].numel() if ids[i].numel() else 1
            size = max(piece // unit, 1) * unit
            write = writer(full, ids[i], p)
            for start in range(0, p.numel(), size):
                where = slice(start, min(start + size, p.numel()))
                whole = where.stop - where.start == p.numel()
                part = [t if whole else t.view(-1)[where] for t in (p.detach(), m, v)]
                together.add(part, (i, None if whole else where), step)
                together.writes.append(write(where))
                elements += where.stop - where.start
                if elements >= piece:
                    self._calls.append(together)
                    together, elements = _call(), 0
        self._calls += [c for c in (together, alone) if c.params]

    def takes(self, grads: Sequence[Tensor]) -> bool:
        """These gradients lie in memory as the parameters do and are as precise."""
        dtype = self._changed[0].dtype
        return [*map(Tensor.stride, grads)] == self._strides and all(
            g.dtype == dtype for g in grads
        )

    def __call__(self, grads: Sequence[Tensor], hyper: Hyper) -> None:
        """One step; ``steps`` are counted up first."""
        if self._counts is None:
            torch._foreach_add_(self.steps, 1.0)
        else:
            for count in self._counts:
                count[0] += 1.0
        for call in self._calls:
            rows = [grads[i] if part is None else grads[i].view(-1)[part] for i, part in call.grads]
            fused(call.params, rows, call.exp_avgs, call.exp_avg_sqs, call.steps, hyper)
            for write in call.writes:
                write()

    def tell_autograd(self) -> None:
        """Count up the versions of all that a step changes; a custom operator does so itself."""
        torch.autograd.graph.increment_version(self._changed)


def fused(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    hyper: Hyper,
) -> None:
    """PyTorch's own update, in place."""
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=hyper.maximize,
    )


def can_be_prepared(
    p: Tensor, m: Tensor, v: Tensor, step: Tensor, full: Tensor | None, ids: Tensor | None
) -> bool:
    """One step count, one precision, all laid out alike without gaps, and written through piece by
    piece if at all."""
    return (
        step.numel() == 1
        and p.dtype == m.dtype == v.dtype
        and p.stride() == m.stride() == v.stride()
        and dense(p)
        and (full is None or ids is None or full.numel() == 0 or by_pieces(full, ids, p))
    )


def dense(tensor: Tensor) -> bool:
    """Its elements fill one stretch of memory, each place once; others are not copied so."""
    return (
        tensor.is_contiguous()
        or torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    )


def by_pieces(full: Tensor, ids: Tensor, packed: Tensor) -> bool:
    """Memory is laid out so that flat stretches of a packed tensor can be written through."""
    return (
        full.device.type == "cpu"
        and packed.is_contiguous()
        and (ids.numel() > 0 or full.is_contiguous())
    )


def writer(full: Tensor, ids: Tensor, packed: Tensor) -> Callable[[slice], Write]:
    """For flat stretches of a packed tensor, what writes them through to its weight."""
    if ids.numel():
        return _blocks_writer(full, ids, packed.detach())
    to, source = full.view(-1), packed.detach().view(-1)

    def whole(where: slice) -> Write:
        target, part = to[where], source[where]
        return lambda: target.copy_(part)

    return whole


def _blocks_writer(full: Tensor, ids: Tensor, packed: Tensor) -> Callable[[slice], Write]:
    """Writes stretches of packed blocks ``[n, h, w]`` into a matrix.

    NumPy copies the rows of a block as bytes; PyTorch's ``index_put_`` and ``index_copy_`` go
    element by element. Where the weight does not fit into cache memory decides: short rows come
    and go at a fraction of the speed of long ones, with two threads as with one.
    """
    _, h, w = packed.shape
    down, across = full.shape[0] // h, full.shape[1] // w  # whole blocks
    bits = _BITS[full.element_size()]
    view = full[: down * h, : across * w].unflatten(1, (-1, w)).unflatten(0, (-1, h))
    target = view.permute(0, 2, 1, 3).view(bits).numpy()
    rows, columns, cut_off = _places(ids, full.shape, h, w)
    ready = packed.view(bits).numpy() if packed.dtype == full.dtype else None

    def blocks(where: slice) -> Write:
        part = slice(where.start // (h * w), where.stop // (h * w))
        to, source = (rows[part], columns[part]), packed[part]
        if cut_off is not None and bool(cut_off[part].any()):
            cut, inside = cut_off[part], ~cut_off[part]
            to = to[0][inside.numpy()], to[1][inside.numpy()]
            at_edge = ids[part][cut]

            def write() -> None:
                write_blocks_(full, at_edge, source[cut], h, w)
                target[to] = source[inside].to(full.dtype).view(bits).numpy()

        elif ready is not None and len(to[0]) <= FEW:
            pairs = [
                *zip((target[i, j] for i, j in zip(*to, strict=True)), ready[part], strict=True)
            ]

            def write() -> None:
                for at, values in pairs:
                    np.copyto(at, values)

        elif ready is not None:
            values = ready[part]

            def write() -> None:
                target[to] = values

        else:

            def write() -> None:
                target[to] = source.to(full.dtype).view(bits).numpy()

        return write

    return blocks


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


__all__ = ["Hyper", "Prepared", "by_pieces", "can_be_prepared", "dense", "fused", "writer"]
