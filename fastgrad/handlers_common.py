"""What all handlers ask: whose rows a tensor has, and where a parameter's gradients go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad.derived import Sink
from fastgrad.ownership import NOBODY, Mark, foreign, marked
from fastgrad.records import Batch
from fastgrad.rows import Rows, wide_dtype


def ownership(x: Tensor, batch: Batch) -> Mark:
    """Which of an activation's dimensions tell examples apart.

    The mark that the tensor carries decides (:mod:`fastgrad.ownership`). Without a mark, an
    activation's leading dimension counts as examples only if no other dimension of the batch has
    that size.
    """
    n = batch.n_examples
    found = marked(x, batch.index)
    if found is None and foreign(x, batch.index) is not None:
        return NOBODY  # another forward pass made it, whose examples are not these
    if found is None and x._base is not None:
        found = _mark_of_base(x, batch)
    plausible = x.requires_grad and not isinstance(x, torch.nn.Parameter) and x.ndim > 0
    if found is None and plausible:
        if batch.owner is not None:
            if x.shape[:2] == batch.owner.shape:
                found = Mark(-1, batch.owner.view(*batch.owner.shape, *[1] * (x.ndim - 2)))
        elif n == 1 or (x.shape[0] == n and n not in batch.other_sizes):
            found = Mark(0)
    if n == 1 and (found is None or not found.owned) and x.ndim > 0 and (plausible or found):
        return Mark(0)  # all that is of one example
    return found or NOBODY


def _mark_of_base(x: Tensor, batch: Batch) -> Mark | None:
    """A view that covers a marked tensor, one example after the other in memory."""
    base = x._base
    of_base = None if base is None else marked(base, batch.index)
    if base is None or of_base is None or of_base.dim != 0 or not x.is_contiguous() or x.ndim == 0:
        return None
    ordered = base.stride(0) * base.shape[0] == x.numel() == base.numel()
    return Mark(0) if ordered and x.shape[0] % batch.n_examples == 0 else None


def example_rows(x: Tensor, batch: Batch, features: int = 1) -> Rows | None:
    """How the rows of ``x [..., *features]`` (the last ``features`` dimensions) belong to
    examples; None if that cannot be known."""
    lead = x.shape[: x.ndim - features]
    if not lead or 0 in x.shape[x.ndim - features :]:
        return None
    n, rows = batch.n_examples, math.prod(lead)
    if n == 1:
        return Rows.uniform(1, rows)
    found = ownership(x, batch)
    if found.owner is None:
        if not 0 <= found.dim < len(lead) or lead[found.dim] % n:
            return None
        if found.dim == 0:
            return Rows.uniform(n, rows // n)
    owner = found.explicit(x, n)
    if math.prod(owner.shape[len(lead) :]) != 1:
        return None
    return batch.rows_of(owner.reshape(owner.shape[: len(lead)]), lead)


def cast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, cast as the function itself would; autograd sees the casts."""
    if not torch.is_autocast_enabled(x.device.type):
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))


def sinks_of(batch: Batch, *tensors: Tensor | None) -> list[Sink | None]:
    return [None if t is None else Sink.of(t, batch) for t in tensors]


def watch_sinks(batch: Batch, *tensors: Tensor | None) -> list[Sink | None]:
    """As :func:`sinks_of`, for functions that are watched: what gets no gradient has no part."""
    return sinks_of(batch, *(t if t is not None and t.requires_grad else None for t in tensors))


def too_large(
    batch: Batch, sinks: Sequence[Sink | None], tensors: Sequence[Tensor | None]
) -> str | None:
    """Why the gradients of one of the tensors cannot be formed for each example."""
    for sink, tensor in zip(sinks, tensors, strict=True):
        if sink is not None and tensor is not None:
            large = sink.too_large(tensor, batch.n_examples)
            if large is not None:
                return large
    return None


def expect_dense(sinks: Sequence[Sink | None], tensors: Sequence[Tensor | None]) -> None:
    for sink, tensor in zip(sinks, tensors, strict=True):
        if sink is not None and tensor is not None:
            sink.expect_dense(tensor)


def refuse(sinks: Sequence[Sink | None], reason: str) -> Any:
    for sink in sinks:
        if sink is not None:
            sink.refuse(reason)
    return NotImplemented


def constant(x: Tensor, batch: Batch) -> bool:
    """No activation: something that does not depend on the examples."""
    return not x.requires_grad and marked(x, batch.index) is None


Sums = Callable[[Tensor], Tensor]


def shares(batch: Batch, found: Mark, x: Tensor, shape: Sequence[int]) -> Sums | None:
    """What sums a tensor of the shape of ``x``, whose examples ``found`` tells apart, over
    everything but examples and the dimensions that ``shape`` has; None if these are entangled.

    The sums are ``[n_examples, numel of shape]``; ``shape`` is aligned from the right.
    """
    n, nd = batch.n_examples, x.ndim
    full = [1] * (nd - len(shape)) + list(shape)
    if len(full) != nd or any(k not in (1, x.shape[d]) for d, k in enumerate(full)):
        return None
    kept = [d for d in range(nd) if full[d] > 1]
    if n == 1:
        return lambda t: t.sum_to_size(full).reshape(1, -1).to(wide_dtype(t.dtype))
    if not found.owned:
        return None
    if found.owner is None:
        dim = found.dim
        if dim in kept or x.shape[dim] % n:
            return None

        def uniform(t: Tensor) -> Tensor:
            t = t.unflatten(dim, (n, -1))  # from here on, dimensions behind come one later
            over = [d + (d > dim) for d in range(nd) if d not in kept and d != dim] + [dim + 1]
            t = t.sum(over, dtype=wide_dtype(t.dtype), keepdim=True)
            return t.movedim(dim, 0).reshape(n, -1)

        return uniform
    owner = found.owner
    if any(owner.shape[d] > 1 for d in kept):
        return None
    order = [d for d in range(nd) if d not in kept]
    lead = torch.Size(x.shape[d] for d in order)
    rows = batch.rows_of(
        owner.permute(*order, *kept).reshape([owner.shape[d] for d in order]), lead
    )

    def explicit(t: Tensor) -> Tensor:
        t = t.permute(*order, *kept).reshape(max(math.prod(lead), 1), -1)
        return rows.sums(t)

    return explicit


def per_channel(batch: Batch, found: Mark, x: Tensor, size: int) -> Sums | None:
    """:func:`shares` of the channels, which are dimension one."""
    return shares(batch, found, x, [size if d == 1 else 1 for d in range(x.ndim)])
