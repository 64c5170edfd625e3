"""What a batch looks like: its examples, its label tokens, what the loss divides by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

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
    labels: Any, n_examples: int, shifted: bool, ignore_index: int
) -> list[int] | None:
    if not isinstance(labels, Tensor) or labels.ndim < 1 or labels.shape[0] != n_examples:
        return None
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
    """Whether the model's own loss shifts labels by one, read from its loss function."""
    loss = getattr(model, "loss_function", None)
    return getattr(loss, "__name__", "") == "ForCausalLMLoss"


def refuse_packed(kwargs: Mapping[str, Any]) -> None:
    packed = [k for k in ("cu_seq_lens_q", "cu_seqlens", "seq_idx") if kwargs.get(k) is not None]
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] > 1:
        step = positions[:, 1:] - positions[:, :-1]
        # Left padding repeats a position; only a fall back to zero starts a new sequence.
        if bool(((step < 0) & (positions[:, 1:] == 0)).any()):
            packed.append("position_ids")
    if packed:
        raise ProbeError(
            f"packed rows ({', '.join(packed)}): several examples share a row, and this version "
            "tells examples apart by rows only. Remedy: probe with one example per row (padded)"
        )
