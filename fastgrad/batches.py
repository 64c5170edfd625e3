"""What a batch looks like: its examples, its label tokens, what the loss divides by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgrad.errors import ProbeError
from fastgrad.records import Batch

Reduction = Literal["token_mean", "row_mean", "sum"]


def input_tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensor inputs, the main ones first, also those inside lists and dictionaries."""
    first = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
    values = [*(kwargs[k] for k in first if k in kwargs), *args, *kwargs.values()]
    return [t for t in _nested(values) if t.ndim >= 1]


def output_tensors(output: Any) -> list[Tensor]:
    return list(_nested([output]))


def _nested(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _nested(value.values())
        elif isinstance(value, list | tuple):
            yield from _nested(value)


def label_tokens(
    labels: Any, n_examples: int, shifted: bool, ignore_index: int, owner: Tensor | None = None
) -> list[int] | None:
    """Label tokens of each example that enter the loss; None if that cannot be told.

    ``owner`` (packed rows): int64 ``[rows, tokens]``, the example of each token.

    Raises:
        ProbeError: if the first token of a packed example is a label: its loss would be taken at
            the last token of another example.
    """
    if owner is not None:
        if not isinstance(labels, Tensor) or labels.shape != owner.shape:
            return None
        counted = labels != ignore_index
        whose = owner
        if shifted:
            counted, whose = counted[:, 1:], owner[:, :-1]
            crossing = counted & (owner[:, 1:] != whose)
            if bool(crossing.any()):
                raise ProbeError(
                    "packed rows: the first token of an example is a label, so its loss is taken "
                    "at the last token of the example before it. Remedy: give the first label of "
                    f"each example the value {ignore_index} (transformers' "
                    "DataCollatorWithFlattening does)"
                )
        whose = whose[counted].reshape(-1).cpu()
        return [int(c) for c in torch.bincount(whose[whose >= 0], minlength=n_examples)]
    if not isinstance(labels, Tensor) or labels.ndim < 1 or labels.shape[0] != n_examples:
        return None
    if n_examples == 0:
        return []
    rows = labels.reshape(n_examples, -1)
    if shifted:
        rows = rows[:, 1:]
    return [int(c) for c in (rows != ignore_index).sum(1).tolist()]


def factors(
    batch: Batch, reduction: Reduction, loss_scale: float = 1.0
) -> tuple[list[float], list[float]]:
    """What turns a contribution into the gradient of the example's own mean and summed loss.

    An example without label tokens contributes nothing: its factor is zero, and so is its norm.
    """
    mean, total = _unscaled(batch, reduction)
    return [f / loss_scale for f in mean], [f / loss_scale for f in total]


def _unscaled(batch: Batch, reduction: Reduction) -> tuple[list[float], list[float]]:
    n, tokens = batch.n_examples, batch.label_tokens
    nan = [float("nan")] * n
    if reduction == "row_mean":
        return [float(n)] * n, [float(n * t) for t in tokens] if tokens else nan
    if tokens is None:
        return (nan, [1.0] * n) if reduction == "sum" else (nan, nan)
    divisor = 1.0 if reduction == "sum" else float(batch.loss_items or sum(tokens))
    return [divisor / t if t else 0.0 for t in tokens], [divisor] * n


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss shifts labels by one, read from its loss function. Models with
    an encoder and a decoder are given shifted inputs instead."""
    loss = getattr(model, "loss_function", None)
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(loss, "__name__", "") == "ForCausalLMLoss" and not both


def packed_owner(kwargs: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """The example of each token of packed rows, int64 ``[rows, tokens]``; None if every row is one
    example. Examples are counted row by row.

    Read from ``cu_seq_lens_q`` (transformers' flattening collator), ``seq_idx``, or position ids
    that fall back to zero inside a row. Padding that repeats a position starts no example.

    Raises:
        ProbeError: if the boundaries do not fit the input of this ``shape``.
    """
    ends = kwargs.get("cu_seq_lens_q", kwargs.get("cu_seqlens"))
    numbers, positions = kwargs.get("seq_idx"), kwargs.get("position_ids")
    if len(shape) < 2:
        return None
    rows, tokens = shape[:2]
    if isinstance(ends, Tensor):
        bounds = ends.reshape(-1).tolist()
        if bounds[:1] != [0] or bounds[-1] != rows * tokens or sorted(bounds) != bounds:
            raise ProbeError(
                f"cu_seq_lens_q {bounds} does not divide the input's {rows * tokens} tokens"
            )
        starts = torch.zeros(rows * tokens + 1, dtype=torch.int64)
        starts[torch.tensor(bounds)] = 1
        owner = (starts[:-1].cumsum(0) - 1).view(rows, tokens).to(ends.device)
        return owner
    if isinstance(numbers, Tensor) and numbers.shape == shape[:2]:
        new = torch.ones_like(numbers, dtype=torch.bool)
        new[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    elif isinstance(positions, Tensor) and positions.shape == shape[:2] and tokens > 1:
        # Left padding repeats a position; only a fall back to zero starts a new sequence.
        new = torch.ones_like(positions, dtype=torch.bool)
        new[:, 1:] = (positions[:, 1:] < positions[:, :-1]) & (positions[:, 1:] == 0)
    else:
        return None
    if not bool(new[:, 1:].any()):
        return None
    return (new.reshape(-1).cumsum(0) - 1).view(rows, tokens)
