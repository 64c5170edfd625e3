"""Tables of which rows are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad.derived import Root, lookup_hook, roots_of, set_root
from fastgrad.handlers_common import constant, example_rows, watch_sinks
from fastgrad.records import Batch
from fastgrad.tap_watch import Sinks, watched


def embedding(
    batch: Batch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    record = batch.lookup(weight)
    if record is None:
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq:
        record.refuse("its embedding uses max_norm or scale_grad_by_freq")
        return func(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    skipped = None if padding_idx is None else padding_idx % weight.shape[0]
    out = func(input, weight, padding_idx, sparse=sparse)
    return _looked_up(batch, Root(record, weight, input, skipped), out)


def getitem(batch: Batch, func: Any, x: Tensor, key: Any) -> Any:
    record = batch.lookup(x)
    ids = isinstance(key, Tensor) and key.ndim > 0 and not key.is_floating_point()
    if record is None or not ids or key.dtype in (torch.bool, torch.uint8):
        return NotImplemented
    return _looked_up(batch, Root(record, x, key), func(x, key))


def _looked_up(batch: Batch, root: Root, out: Tensor) -> Any:
    record, ids = root.record, root.ids
    assert ids is not None
    if constant(ids, batch):  # to be attributed where it meets the examples
        set_root(out, record, ids.long() % root.tensor.shape[0], root.padding)
        return out
    rows = example_rows(ids, batch, 0)
    if rows is None:
        record.refuse(
            f"its embedding was looked up with ids of shape {tuple(ids.shape)}, which cannot be "
            f"assigned to the batch's {batch.n_examples} examples"
        )
        return out
    flat = ids.reshape(-1).long() % root.tensor.shape[0]
    record.expect_lookup(rows.ordered(flat), rows)
    out.register_hook(lookup_hook(root, flat, rows))
    return out


def embedding_bag(
    batch: Batch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Looked-up rows, added up or averaged bag by bag."""
    args = (
        input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
        per_sample_weights, include_last_offset, padding_idx,
    )  # fmt: skip
    record = batch.lookup(weight)
    if record is None or (per_sample_weights is not None and roots_of(per_sample_weights, batch)):
        return NotImplemented
    if not weight.requires_grad:
        return func(*args)
    if max_norm is not None or scale_grad_by_freq or mode not in ("sum", "mean"):
        record.refuse("its embedding bag uses max_norm, scale_grad_by_freq or a maximum")
        return func(*args)
    rows = example_rows(input, batch, 0)
    if rows is None:
        record.refuse(
            f"its embedding bag saw ids of shape {tuple(input.shape)}, which cannot be "
            f"assigned to the batch's {batch.n_examples} examples"
        )
        return func(*args)
    n_rows = weight.shape[0]
    ids, skipped = input.reshape(-1).long(), None if padding_idx is None else padding_idx % n_rows
    record.expect_lookup(rows.ordered(ids), rows)
    place = torch.arange(ids.numel(), device=ids.device)
    if offsets is None:
        bags = place // max(input.shape[1], 1)
    else:
        bags = torch.searchsorted(offsets.to(place.dtype), place, right=True) - 1
    n_bags = input.shape[0] if offsets is None else len(offsets) - include_last_offset
    counted = torch.ones_like(ids) if skipped is None else (ids != skipped).long()
    sizes = torch.zeros(n_bags, dtype=torch.int64, device=ids.device).index_add(0, bags, counted)
    averaged = mode == "mean"

    def measure(
        sinks: Sinks, grads: Sequence[Tensor], saved: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        (grad,), (ids, bags, counted, sizes, *weights) = grads, saved
        found = grad[bags] * counted.unsqueeze(1)
        if averaged:
            found = found / sizes.clamp(min=1)[bags].unsqueeze(1)
        if weights:
            found = found * weights[0].reshape(-1, 1)
        assert sinks[0] is not None
        record = sinks[0].roots[0].record
        record.add_lookup(rows.ordered(ids), rows.ordered(found), rows, grad.dtype)
        return [None]

    saved = [ids, bags, counted, sizes]
    saved += [] if per_sample_weights is None else [per_sample_weights]
    sinks = watch_sinks(batch, weight)
    return watched(lambda w: [func(input, w, *args[2:])], [weight], sinks, measure, *saved)[0]
