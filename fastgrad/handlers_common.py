"""What all handlers ask: whose rows a tensor has, and where a parameter's gradients go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad.derived import Sink
from fastgrad.ownership import NOBODY, Mark, marked
from fastgrad.records import Batch
from fastgrad.rows import Rows


def ownership(x: Tensor, batch: Batch) -> Mark:
    """Which of an activation's dimensions tell examples apart.

    The mark that the tensor carries decides (:mod:`fastgrad.ownership`). Without a mark, an
    activation's leading dimension counts as examples only if no other dimension of the batch has
    that size.
    """
    n = batch.n_examples
    found = marked(x, batch.index)
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


def refuse(sinks: Sequence[Sink | None], reason: str) -> Any:
    for sink in sinks:
        if sink is not None:
            sink.refuse(reason)
    return NotImplemented


def constant(x: Tensor, batch: Batch) -> bool:
    """No activation: something that does not depend on the examples."""
    return not x.requires_grad and marked(x, batch.index) is None
