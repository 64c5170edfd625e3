"""Directions to measure examples against: a gradient, and what Adam would make of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastgrad.errors import NonFiniteGradientError, ProbeError
from fastgrad.identity import model_parameters
from fastgrad.optim import SparseAdamW

Direction = dict[str, Tensor]
_KINDS = (torch.optim.Adam, torch.optim.AdamW, SparseAdamW)


def gradient_direction(model: nn.Module, *, allow_missing: bool = False) -> Direction:
    """A copy of the gradient that lies in ``.grad``, by parameter name.

    After ``backward()`` on the examples that matter (a validation batch, a capability), give it to
    ``Probe(model, targets=...)``: a positive signed influence says that a step of gradient descent
    on the training example lowers their loss too.

    Args:
        model: wrappers such as DistributedDataParallel are looked through.
        allow_missing: leave parameters without ``.grad`` out of the direction, which counts them
            as zero, instead of raising.

    Raises:
        ProbeError: naming the parameters that require a gradient and have none, or if none has.
        NonFiniteGradientError: naming those that hold NaN or infinity.
    """
    own = {n: p for n, p in model_parameters(model).items() if p.requires_grad}
    found = {n: p.grad.detach() for n, p in own.items() if p.grad is not None}
    missing = [n for n in own if n not in found]
    if not found:
        raise ProbeError(
            "no parameter has a gradient. Remedy: call backward() on the loss to measure against, "
            "before zero_grad()"
        )
    if missing and not allow_missing:
        raise ProbeError(
            f"{_listed(missing)} have no .grad: the loss does not depend on them, or zero_grad() "
            "came first. Remedy: allow_missing=True counts them as zero"
        )
    direction = {n: g.to_dense() if g.is_sparse else g.clone() for n, g in found.items()}
    bad = [n for n, g in direction.items() if not bool(torch.isfinite(g).all())]
    if bad:
        raise NonFiniteGradientError(bad, "No direction can be made of it.")
    return direction


@torch.no_grad()
def adam_preconditioned(
    direction: Mapping[str, Tensor], optimizer: Optimizer, model: nn.Module
) -> Direction:
    """``direction / (√v̂ + ε)``, with ``v̂ = v / (1 - β₂ᵗ)`` from the optimizer's state.

    Adam moves a parameter not along its gradient but along ``m̂ / (√v̂ + ε)``. To first order, an
    example with gradient g_j adds a multiple of ``g_j / (√v̂ + ε)`` to that step, the same multiple
    for all examples, and so changes a loss with gradient d in proportion to

        -⟨d, g_j / (√v̂ + ε)⟩ = -⟨d / (√v̂ + ε), g_j⟩.

    The preconditioner moves over to the direction, so that the probe's signed influence needs no
    change. It is taken as it stands: that g_j itself would enter v is left out, as is the momentum
    of earlier batches. LESS (arXiv 2402.04333, section 3.1) keeps both, at the price of the whole
    gradient of every example. Under ``amsgrad`` v̂ is the largest v so far, divided alike.

    Args:
        direction: as :func:`gradient_direction` gives it.
        optimizer: ``torch.optim.Adam`` or ``AdamW``, or :class:`fastgrad.SparseAdamW`, after at
            least one step.
        model: the model that it trains; wrappers are looked through.

    Returns:
        float32 tensors (float64 for float64 directions), where the direction's were.

    Raises:
        ProbeError: naming the parameters that the model lacks, that the optimizer does not train
            or trains only in part, or that have no state yet; or for another optimizer.
    """
    optimizer = _adam(optimizer)
    own = model_parameters(model)
    if unknown := [n for n in direction if n not in own]:
        raise ProbeError(f"the direction names {_listed(unknown)}, which the model lacks")
    if other := [n for n, d in direction.items() if d.shape != own[n].shape]:
        raise ProbeError(
            f"the direction has another shape than the model for {_listed(other)}: "
            f"{tuple(direction[other[0]].shape)}, not {tuple(own[other[0]].shape)}"
        )
    trained, in_part = _trained(optimizer, own)
    if cut := [n for n in direction if n in in_part]:
        raise ProbeError(
            f"only selected blocks of {_listed(cut)} are trained, so v is not known for the rest. "
            "Remedy: leave them out of the direction"
        )
    without = [n for n in direction if not _stepped(optimizer, trained.get(n))]
    if without:
        raise ProbeError(
            f"the optimizer has no state for {_listed(without)}: it does not train them, or has "
            "not made a step with their gradient. Remedy: leave them out of the direction, or "
            "train a few steps first"
        )
    return {n: _divided(d, optimizer, *trained[n]) for n, d in direction.items()}


Trained = tuple[Tensor, dict[str, Any]]  # the optimizer's tensor, and its group


def _adam(optimizer: Optimizer) -> Optimizer:
    inner: Any = optimizer
    while not isinstance(inner, _KINDS) and hasattr(inner, "optimizer"):
        inner = inner.optimizer  # accelerate wraps the optimizers that it prepares
    if not isinstance(inner, _KINDS):
        raise ProbeError(
            f"{type(optimizer).__name__} keeps no second moment as Adam does. Remedy: "
            "torch.optim.Adam, torch.optim.AdamW or SparseAdamW, or the plain direction"
        )
    return inner


def _trained(
    optimizer: Optimizer, own: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Trained], set[str]]:
    """By parameter name, what the optimizer trains in whole; and the names of what in part."""
    names = {id(p): n for n, p in own.items()}
    whole: dict[str, Trained] = {}
    in_part: set[str] = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            blocks = getattr(p, "_fastgrad_blocks", None)
            if blocks is not None and not blocks.whole:
                in_part.add(blocks.name)
            elif (name := names.get(id(p)) if blocks is None else blocks.name) is not None:
                whole[name] = (p, group)
    return whole, in_part


def _stepped(optimizer: Optimizer, trained: Trained | None) -> bool:
    state = {} if trained is None else optimizer.state.get(trained[0], {})
    return "exp_avg_sq" in state and float(state["step"]) > 0


def _divided(
    direction: Tensor, optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any]
) -> Tensor:
    state = optimizer.state[parameter]
    dtype = torch.promote_types(direction.dtype, torch.float32)
    largest = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    v = largest.to(direction.device, dtype)
    corrected = v / (1 - float(group["betas"][1]) ** float(state["step"]))
    return direction.detach().to(dtype) / (corrected.sqrt() + group["eps"])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
