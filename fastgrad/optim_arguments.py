"""What SparseAdamW is built with and loads: AdamW's own checks, and refusals by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad.errors import FastgradError

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerError(FastgradError, ValueError):
    """An option that the optimizer does not have, or a state that does not fit its parameters."""


def checked(
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    **options: Any,
) -> tuple[float | Tensor, float | Tensor]:
    """``betas`` as a param group holds them, if ``torch.optim.AdamW`` takes these arguments.

    AdamW itself is asked, so that its errors are those of the PyTorch that is installed.

    Raises:
        ValueError, RuntimeError: AdamW's.
        OptimizerError: for what AdamW takes and SparseAdamW does not.
    """
    judge = torch.optim.AdamW([torch.empty(0)], lr, betas, eps, weight_decay, amsgrad, **options)
    refuse(judge.defaults)
    return judge.defaults["betas"]


def refuse(group: Mapping[str, Any]) -> None:
    """Raises OptimizerError for options of a param group that SparseAdamW does not have."""
    if group.get("amsgrad"):
        raise OptimizerError(
            "SparseAdamW has no amsgrad: it would keep 12 bytes per trained weight instead of 8. "
            "Remedy: amsgrad=False, or torch.optim.AdamW(partial.parameters(), amsgrad=True)"
        )
    if group.get("differentiable"):
        raise OptimizerError(
            "SparseAdamW updates in place and is not differentiable. Remedy: "
            "differentiable=False, or torch.optim.AdamW(..., differentiable=True)"
        )
    for i, beta in enumerate(group.get("betas", ())):
        if isinstance(beta, Tensor) and beta.device.type != "cpu":
            raise OptimizerError(
                f"betas[{i}] is a tensor on {beta.device}: every step would wait for the device "
                "to read it. Remedy: a float, or a tensor on the CPU"
            )


def moment_dtype(p: Tensor) -> torch.dtype:
    """What the moments of a parameter are kept in, at least float32."""
    if p.is_complex():
        return torch.complex128 if p.dtype == torch.complex128 else torch.complex64
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def pairs(
    saved: Mapping[str, Any], groups: Sequence[dict[str, Any]]
) -> Iterator[tuple[Tensor, Any]]:
    """Parameters of ``groups`` with their saved state, in order, as PyTorch matches them."""
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    for key, p in zip(keys, (p for g in groups for p in g["params"]), strict=False):
        if key in saved["state"]:
            yield p, saved["state"][key]


def check_fits(saved: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Raises OptimizerError if a saved state is of other options or other tensors."""
    for group in saved["param_groups"]:
        refuse(group)
    for i, (p, state) in enumerate(pairs(saved, groups)):
        name = getattr(p, "_fastgrad_name", f"parameter {i}")
        for key in MOMENTS:
            if key in state and tuple(state[key].shape) != tuple(p.shape):
                raise OptimizerError(
                    f"{name}: the saved {key} has shape {tuple(state[key].shape)}, the parameter "
                    f"{tuple(p.shape)}; the state was saved for another selection or model. "
                    "Remedy: make the model partial with the selection of the saved run, then "
                    "load. Nothing was changed."
                )
        counts = torch.as_tensor(state["step"]) if "step" in state else torch.zeros(())
        if counts.numel() != 1 and tuple(counts.shape) != tuple(p.shape[:1]):
            raise OptimizerError(
                f"{name}: the saved state counts the steps of {counts.numel()} blocks, the "
                f"parameter has shape {tuple(p.shape)}. Remedy: make the model partial with the "
                "selection of the saved run, then load. Nothing was changed."
            )
