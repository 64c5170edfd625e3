"""Attention: shared scores, and the layer that PyTorch calls as one function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgrad.derived import Sink, roots_of, spread_over
from fastgrad.handlers_common import ownership, refuse
from fastgrad.records import Batch


def attention(
    batch: Batch,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Scores that all examples share, as relative positions are, added inside attention."""
    found = ownership(query, batch)
    if attn_mask is None or any(roots_of(t, batch) for t in (query, key, value)):
        return NotImplemented
    roots, scores = roots_of(attn_mask, batch), query.new_empty(1).expand(*query.shape[:-1], 1)
    if not found.owned or found.dim >= query.ndim - 2 or not roots:
        return NotImplemented
    if attn_mask.ndim == query.ndim and attn_mask.shape[max(found.dim, 0)] > 1:
        return NotImplemented
    spread = spread_over(attn_mask, roots, scores, found, batch)
    if isinstance(spread, str):
        return refuse([Sink(roots, False)], f"used by {func.__name__}: {spread}")
    return func(query, key, value, spread, *args, **kwargs)
