"""Tables of which rows are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad.derived import Root, lookup_hook, set_root
from fastgrad.handlers_common import constant, example_rows
from fastgrad.records import Batch


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
    if max_norm is not None or scale_grad_by_freq or sparse:
        record.refuse("its embedding uses max_norm, scale_grad_by_freq or sparse gradients")
        return func(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    skipped = None if padding_idx is None else padding_idx % weight.shape[0]
    return _looked_up(batch, Root(record, weight, input, skipped), func(input, weight, padding_idx))


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
