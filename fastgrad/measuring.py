"""Gradient statistics of a model in the middle of its training, without leaving a trace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.errors import FastgradError, PartialError
from fastgrad.granularity import Blocks
from fastgrad.partial import Partial
from fastgrad.probe import Probe, Reduction
from fastgrad.random_state import unnoticed_draws
from fastgrad.stats import GradientStats
from fastgrad.step_guard import NAME

#: ``(model, batch) -> loss``, a scalar with a graph.
Loss = Callable[[nn.Module, Any], Tensor]

# Buffers up to this size are put back as they were; larger ones are quantised weights.
_SMALL = 1 << 20


@contextlib.contextmanager
def whole_weights(model: nn.Module, partial: Partial | None) -> Iterator[None]:
    """Inside, every weight of ``model`` is an ordinary one, so that all can be measured.

    Args:
        model: partial or not.
        partial: what is trained, if the model is partial; it is suspended.

    Raises:
        PartialError: if the model is partial and by whom is not known.
    """
    if partial is None:
        if any(NAME in p.__dict__ for p in model.parameters()):
            raise PartialError(
                "the gradient of whole weights is to be measured, and this run trains blocks of "
                "them. Remedy: pass partial=..., so that it can be suspended"
            )
        yield
        return
    with partial.suspended():
        yield


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside. Gradients, modes, small buffers (up to 2**20 elements) and the
    random state of PyTorch, NumPy and Python are what they were afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [
        (m, name, b, b.detach().clone())
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None and b.numel() <= _SMALL and not b.is_meta
    ]
    try:
        model.eval()
        for p, _ in grads:
            p.grad = None
        with unnoticed_draws([p for p, _ in grads]):
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def stand_ins(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, other parameters with the same memory stand where the trained ones were. Yields
    those that were replaced.

    So their gradients reach none of what hangs on the trained ones: accumulated gradients, hooks
    of optimizers that step in the backward pass, the reduction of DistributedDataParallel.
    Distributed tensors stay where they are: ``fully_shard`` works with them.

    Raises:
        FastgradError: if something hangs on a parameter that has to stay.
    """
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    replaced: dict[str, nn.Parameter] = {}
    try:
        for prefix, module in model.named_modules():
            for name, p in list(module._parameters.items()):
                if p is None or not p.requires_grad:
                    continue
                full = f"{prefix}.{name}" if prefix else name
                if type(p) is not nn.Parameter:
                    _refuse_hooks(full, p)
                    continue
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(p.detach())
                    made[id(p)].__dict__.update(p.__dict__)
                    replaced[full] = p
                places.append((module, name, p))
                setattr(module, name, made[id(p)])  # recurrent layers keep lists of their own
        yield replaced
    finally:
        for module, name, p in reversed(places):
            setattr(module, name, p)


def _refuse_hooks(name: str, p: Tensor) -> None:
    if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
        raise FastgradError(
            f"{name} is a {type(p).__name__} with hooks on its gradient, which measuring would set "
            "off: an optimizer that steps in the backward pass would train on held-out data. "
            "Remedy: remove the hooks while measuring, or measure the saved model with fg.Probe"
        )


def check_reached(replaced: Mapping[str, nn.Parameter]) -> None:
    for name, p in replaced.items():
        if p.grad is not None:
            raise FastgradError(
                f"{name} is used through another reference than its module's attribute, so its "
                "gradient cannot be measured during training. Remedy: use the attribute in "
                "forward, or measure the saved model with fg.Probe"
            )


@contextlib.contextmanager
def gradients_on() -> Iterator[None]:
    """Whatever surrounds the call, and without autocast's cache, which keeps casts of weights."""
    cached = torch.is_autocast_cache_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a transformers model returns for its keyword arguments.

    Raises:
        FastgradError: if it returns none.
    """
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise FastgradError("the model returned no loss. Remedy: put 'labels' into the batches to "
                            "measure on, or pass loss=...")
    return loss


def losses_and_stats(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    blocks: Blocks = "module",
    per_example: bool = True,
    loss_reduction: Reduction = "token_mean",
    frozen: Sequence[str] | None = None,
    loss: Loss = own_loss,
) -> tuple[list[float], GradientStats]:
    """As :func:`measure`, with the loss of each batch."""
    device = next(model.parameters()).device
    found: list[Tensor] = []
    with gradients_on(), untouched(model), stand_ins(model) as replaced:
        probe = Probe(
            model, blocks, per_example=per_example, detail=(), loss_reduction=loss_reduction,
            frozen=frozen,
        )  # fmt: skip
        parameters = list(model.parameters())
        with probe:
            for batch in batches:
                value = loss(model, on_device(device, batch))
                value.backward()
                found.append(value.detach())
                for p in parameters:
                    p.grad = None
        check_reached(replaced)
        if not found:
            raise FastgradError("there was no batch to measure on")
        return [float(value) for value in found], probe.stats()


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    blocks: Blocks = "module",
    per_example: bool = True,
    loss_reduction: Reduction = "token_mean",
    frozen: Sequence[str] | None = None,
    loss: Loss = own_loss,
) -> tuple[GradientStats, float]:
    """Gradient statistics and mean loss over batches; nothing about the model changes.

    The model is in evaluation mode meanwhile. It may be called under ``no_grad`` and
    ``inference_mode``. Block detail is kept for the batch gradients, not for each example.

    Args:
        model: a transformers model, whose forward pass returns an output with ``loss``, or any
            with ``loss`` given.
        batches: keyword arguments of the model, labels among them; with ``loss`` anything.
            Tensors of a mapping are moved to the model's device.
        blocks: granularity, see :class:`fastgrad.Probe`.
        per_example: measure the cross-influence too, not the gradient norms alone.
        loss_reduction: see :class:`fastgrad.Probe`.
        frozen: name patterns of frozen parameters to measure too, see :class:`fastgrad.Probe`.
        loss: ``(model, batch) -> loss``.

    Raises:
        FastgradError: if there is no batch, the model returns no loss, or hooks hang on
            distributed parameters.
    """
    losses, stats = losses_and_stats(
        model, batches, blocks=blocks, per_example=per_example, loss_reduction=loss_reduction,
        frozen=frozen, loss=loss,
    )  # fmt: skip
    return stats, math.fsum(losses) / len(losses)


def on_device(device: torch.device, batch: Any) -> Any:
    """A batch's tensors on a device; those made under ``inference_mode`` as ordinary ones."""
    if isinstance(batch, Tensor):
        moved = batch.to(device)
        return moved.clone() if moved.is_inference() else moved
    if isinstance(batch, Mapping):
        return {k: on_device(device, v) for k, v in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(on_device(device, v) for v in batch)
    return batch
