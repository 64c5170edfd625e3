"""Norms of the mean of clipped per-example gradients, exactly, in two passes over the data.

The first pass measures the norm of each example's gradient of the whole model: the columns of the
cross-influence ``T``, summed over all parameters. The second weighs each example's loss so that no
gradient is longer than the clip, and sums them up. Nothing of size examples x parameters exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastgrad.batches import shifts_labels
from fastgrad.errors import CoverageError, PrivacyError
from fastgrad.identity import model_parameters, unwrapped
from fastgrad.measuring import check_reached, gradients_on, on_device, stand_ins, untouched
from fastgrad.probe import Probe
from fastgrad.stats import GradientStats

Array = NDArray[np.float64]

#: ``(model, batch) -> losses [B]``, one of each example, each a function of that example alone.
ExampleLosses = Callable[[nn.Module, Any], Tensor]

#: Examples are cut to this share below the clip. It pays for what single precision does to a
#: gradient, so that the bound holds for the numbers that were really added up: a relative 1e-6 or
#: so for an example's own gradient, and as much for each other example of its batch.
SLACK = 1e-3

_IGNORED = -100

_OWN = (
    "Remedy: batches made of tensors whose first dimension counts the examples, and one loss of "
    "its own for each of them"
)

# A loss in float32 depends on the size of its batch through the order of sums alone.
_ALONE = 1e-4


class ClippedNorms(NamedTuple):
    """Exact, and so not to be released.

    Attributes:
        names: parameters that were measured, in the model's order.
        norms: ``[P]`` float64, ``‖Σ_j clipped g_j‖`` of each parameter, not divided by anything.
        n_examples: how many examples there were.
        stats: of the first pass, before clipping.
    """

    names: list[str]
    norms: Array
    n_examples: int
    stats: GradientStats


def example_losses(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of each example of a transformers model, ``[B]``, float32.

    The mean over the example's own label tokens (those that are not -100, after the shift that the
    model's loss makes); for a classifier the example's loss. Other terms that the model's own loss
    may have, such as a router's balancing loss, are not in it.

    Raises:
        PrivacyError: for a model whose examples' losses are not known in this way.
    """
    try:
        labels, rest = batch["labels"], {k: v for k, v in batch.items() if k != "labels"}
    except (TypeError, KeyError, IndexError, AttributeError):
        raise PrivacyError(
            "the batches hold no 'labels'. Remedy: pass loss=..., a function (model, batch) -> "
            "losses [B] that returns each example's own loss"
        ) from None
    if getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False):
        raise PrivacyError(
            "the losses of single examples of an encoder-decoder model are not known. Remedy: pass "
            "loss=..., a function (model, batch) -> losses [B]"
        )
    logits = model(**rest).logits.float()
    if logits.ndim == 3 and labels.shape == logits.shape[:2]:
        if shifts_labels(unwrapped(model)):
            logits, labels = logits[:, :-1], labels[:, 1:]
        tokens = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="none"
        ).view(labels.shape)
        return tokens.sum(1) / (labels != _IGNORED).sum(1).clamp(min=1)
    if logits.ndim == 2 and labels.shape == logits.shape[:1] and not labels.is_floating_point():
        return F.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction="none")
    raise PrivacyError(
        f"logits {tuple(logits.shape)} with labels {tuple(labels.shape)} are no classification of "
        "tokens or rows. Remedy: pass loss=..., a function (model, batch) -> losses [B]"
    )


def clipped_norms(
    model: nn.Module,
    batches: Iterable[Any],
    clip: float,
    loss: ExampleLosses = example_losses,
) -> ClippedNorms:
    """``‖Σ_j min(1, C/‖g_j‖) g_j‖`` of each parameter, ``g_j`` the gradient of example j's loss.

    ``‖g_j‖`` is over all parameters that require a gradient. The model is in evaluation mode
    meanwhile, and nothing about it changes. Sums are kept in float64: 8 bytes per parameter.

    Args:
        model: with weights in float32 or float64.
        batches: read twice, in the same order.
        clip: C, positive.
        loss: each example's own loss.

    Raises:
        CoverageError: if examples meet in the model or in the loss, or a parameter's
            influence is not known exactly: the clip would bound nothing.
        PrivacyError: if the losses do not fit the batch, the two passes differ, the precision is
            too low, or the model runs in several processes.
    """
    _check_precision(model)
    if iter(batches) is batches:
        batches = list(batches)  # a generator could be read only once
    with gradients_on(), untouched(model), stand_ins(model) as replaced:
        _check_alone(model, batches, loss)
        stats = _pass(model, batches, loss)
        norms = np.sqrt(_covered(stats).sum(0))
        limit = clip * (1.0 - SLACK)
        factors = limit / np.maximum(norms, limit)
        sums = {
            name: torch.zeros_like(p, dtype=torch.float64)
            for name, p in model_parameters(model).items()
            if p.requires_grad
        }
        again = _pass(model, batches, loss, factors, sums)
        check_reached(replaced)
        _check_clipped(np.sqrt(_covered(again).sum(0)), factors * norms, limit)
        names = list(sums)
        total = [float(sums[name].square().sum().sqrt()) for name in names]
    return ClippedNorms(names, np.array(total), int(norms.size), stats)


def _pass(
    model: nn.Module,
    batches: Iterable[Any],
    loss: ExampleLosses,
    factors: Array | None = None,
    sums: dict[str, Tensor] | None = None,
) -> GradientStats:
    """Statistics of the sum of all losses, each times its factor; gradients are added to sums."""
    probe = Probe(model, loss_reduction="sum", detail=(), hash_weights=False)
    parameters = model_parameters(model)
    device = next(iter(parameters.values())).device
    seen = 0
    with probe:
        for batch in batches:
            losses = _losses(loss(model, on_device(device, batch)))
            end = seen + losses.numel()
            if factors is not None:
                if end > factors.size:
                    raise _differ(f"{end} examples or more, then {factors.size}")
                losses = losses * torch.as_tensor(
                    factors[seen:end], dtype=losses.dtype, device=losses.device
                )
            losses.sum().backward()
            for name, p in parameters.items():
                if sums is not None and p.grad is not None:
                    sums[name] += p.grad
                p.grad = None
            seen = end
    if seen == 0:
        raise PrivacyError("there was no example to measure")
    stats = probe.stats()
    if stats.meta.get("processes"):
        raise PrivacyError(
            "the model runs in several processes, each of which sees a part of the examples. "
            "Remedy: measure in one process, without DistributedDataParallel or fully_shard"
        )
    if stats.n_examples != seen:
        raise PrivacyError(
            f"the losses are of {seen} examples, and {stats.n_examples} entered the model: a "
            "packed row holds several, and an example's loss has to be its own. Remedy: one "
            "example a row, one loss for each"
        )
    if factors is not None and seen != factors.size:
        raise _differ(f"{factors.size} examples, then {seen}")
    return stats


def _losses(losses: Any) -> Tensor:
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise PrivacyError(
            f"the loss function returned {shape}; each example's own loss is needed, as a tensor "
            "[B]. Remedy: reduction='none', then a mean over each example's tokens"
        )
    if losses.dtype not in (torch.float32, torch.float64):
        raise PrivacyError(f"the losses are {losses.dtype}. {_PRECISION}")
    return losses


def _covered(stats: GradientStats) -> Array:
    """``[P, E]`` squared norms of contributions that are known to be each example's own."""
    if mixing := stats.meta.get("mixes_examples"):
        raise CoverageError(
            f"examples meet in {', '.join(mixing)}: what one of them changes is not bounded by "
            "cutting each one's gradient. Remedy: a loss that is a sum over examples, and no "
            "normalisation over the batch"
        )
    for name in stats.names:
        found = stats.coverage[name]
        if found.status == "missing":
            raise CoverageError(
                f"{name}: {found.reason}. The norms of the examples' gradients are not known, so "
                "they cannot be cut. Remedy: requires_grad_(False) leaves it out of the release"
            )
    return stats.sq


def _check_alone(model: nn.Module, batches: Iterable[Any], loss: ExampleLosses) -> None:
    """The losses of each batch are those of its examples alone, without their padding.

    The probe reports where activations of examples meet. It cannot see what a loss takes from the
    other examples' raw data (targets that serve as each other's negatives), nor inside a custom
    autograd function; and padding to the longest row of a batch lets one example move all others,
    where the model counts positions from the padding on. This sees all three.
    """
    device = next(model.parameters()).device
    for batch in batches:
        batch = on_device(device, batch)
        with torch.no_grad():
            together = _losses(loss(model, batch))
            n = together.numel()
            try:
                alone = torch.cat([_losses(loss(model, _only(batch, j, n))) for j in range(n)])
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
                raise PrivacyError(
                    f"an example cannot be computed without its batch: {error}. {_OWN}"
                ) from error
        if alone.numel() != n:
            raise PrivacyError(
                f"a batch has {n} losses, and its examples one by one {alone.numel()}. {_OWN}"
            )
        near = (alone - together).abs() <= _ALONE * together.abs().clamp(min=1.0)
        if not bool(near.all()):
            raise CoverageError(
                "examples meet, or are random: the loss of an example alone and without padding "
                "is not the one it has in its batch. What one example changes is then not bounded "
                "by cutting each one's gradient. Remedy: a loss that is a sum over examples, no "
                "randomness in the model, and padding that changes nothing: on the right, or on "
                "the left with position_ids and no label for a row's first token"
            )


def _only(batch: Any, j: int, n: int) -> Any:
    """Example ``j`` of a batch of ``n``: a batch of one, without the places that its
    ``attention_mask`` leaves out."""
    if isinstance(batch, Tensor):
        return batch[j : j + 1] if batch.ndim and batch.shape[0] == n else batch
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != n:
            return {k: _only(v, j, n) for k, v in batch.items()}
        inside = mask[j] != 0
        return {
            k: v[j : j + 1, inside]
            if isinstance(v, Tensor) and v.shape[:2] == mask.shape
            else _only(v, j, n)
            for k, v in batch.items()
        }
    if type(batch) in (tuple, list):
        return type(batch)(_only(v, j, n) for v in batch)
    return batch


def _check_clipped(found: Array, expected: Array, limit: float) -> None:
    """The examples that were added up are those that were measured, cut as they were meant to be.

    This is what the bound rests on, so it is looked at rather than believed: batches in another
    order, dropout, or a loss that bypasses the factor would show here.
    """
    near = np.abs(found - expected) <= 0.5 * SLACK * limit
    if not near.all():  # NaN is not near either
        j = int(np.flatnonzero(~near)[0])
        raise _differ(f"example {j} had the norm {expected[j]:.6g}, then {found[j]:.6g}")


def _differ(what: str) -> PrivacyError:
    return PrivacyError(
        f"the two passes over the data differ: {what}. Remedy: batches that are the same each time "
        "they are read (a list, or a DataLoader with shuffle=False), and no randomness in the model"
    )


_PRECISION = (
    "Rounding to 16 bits, or TF32, changes sums by more than one example may. Remedy: "
    "model.float(), no autocast, torch.set_float32_matmul_precision('highest')"
)


def _check_precision(model: nn.Module) -> None:
    for name, p in model_parameters(model).items():
        if p.dtype not in (torch.float32, torch.float64):
            raise PrivacyError(f"{name} is {p.dtype}. {_PRECISION}")
        if torch.is_autocast_enabled(p.device.type):
            raise PrivacyError(f"autocast is on. {_PRECISION}")
        if p.device.type == "cuda" and (
            torch.get_float32_matmul_precision() != "highest" or torch.backends.cudnn.allow_tf32
        ):
            raise PrivacyError(
                f"TF32 is allowed. {_PRECISION}, torch.backends.cudnn.allow_tf32 = False"
            )
