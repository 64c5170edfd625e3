"""Gradient statistics of a model in the middle of its training, without leaving a trace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.errors import FastgradError, PartialError
from fastgrad.granularity import Blocks
from fastgrad.integrations.known import known
from fastgrad.partial import Partial
from fastgrad.probe import Probe, Reduction
from fastgrad.stats import GradientStats
from fastgrad.step_guard import NAME


@contextlib.contextmanager
def whole_model(model: nn.Module, partial: Partial | None, optimizer: Any) -> Iterator[None]:
    """Inside, every weight of ``model`` is an ordinary one, so that all can be measured.

    Args:
        model: partial or not.
        partial: what is trained, if it is known.
        optimizer: asked for it otherwise.

    Raises:
        PartialError: if the model is partial and by whom is not known.
    """
    partial = partial or known(optimizer).partial
    if partial is None:
        if any(NAME in p.__dict__ for p in model.parameters()):
            raise PartialError(
                "the gradient of whole weights is to be measured, and this run trains blocks of "
                "them. Remedy: pass partial=... to the callback, so that it can suspend it"
            )
        yield
        return
    with partial.suspended():
        yield


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; gradients, modes and random state are what they were afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            for p, _ in grads:
                p.grad = None
            yield
        finally:
            for p, grad in grads:
                p.grad = grad
            for module, training in modes:
                module.training = training


def measure(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    blocks: Blocks = "module",
    per_example: bool = True,
    loss_reduction: Reduction = "token_mean",
) -> tuple[GradientStats, float]:
    """Gradient statistics and mean loss over batches; nothing about the model changes.

    Block detail is kept for the batch gradients, not for each example.

    Args:
        model: a transformers model, whose forward pass returns an output with ``loss``.
        batches: keyword arguments of the model, labels among them.
        blocks: granularity, see :class:`fastgrad.Probe`.
        per_example: measure the cross-influence too, not the gradient norms alone.
        loss_reduction: see :class:`fastgrad.Probe`.

    Raises:
        FastgradError: if there is no batch, or the model returns no loss.
    """
    device = next(model.parameters()).device
    losses = []
    probe = Probe(
        model, blocks, per_example=per_example, detail=(), loss_reduction=loss_reduction
    )
    with untouched(model), probe, torch.enable_grad():
        for batch in batches:
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            loss = model(**inputs).loss
            if loss is None:
                raise FastgradError("the model returned no loss. Remedy: put 'labels' into the "
                                    "batches to measure on")
            loss.backward()
            losses.append(float(loss.detach()))
            for p in model.parameters():
                p.grad = None
    if not losses:
        raise FastgradError("there was no batch to measure on")
    return probe.stats(), math.fsum(losses) / len(losses)
