"""Which implementation runs: the Triton kernels on a GPU, blocked PyTorch everywhere else.

Triton is imported only where it is used, so that a machine without it, or without a driver, can
import and run everything on its CPU. Under ``TRITON_INTERPRET=1`` the kernels run on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


class FallbackWarning(UserWarning):
    """An operator that has a Triton kernel runs as blocked PyTorch, for the reason it names."""


def interpreted() -> bool:
    """True under ``TRITON_INTERPRET=1``, as Triton itself reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def takes(tensor: Tensor) -> bool:
    """True where the Triton kernels are meant for this tensor's device."""
    return tensor.is_cuda or (interpreted() and tensor.device.type == "cpu")


def kernel(op: str, tensor: Tensor, reason: str | None = None) -> bool:
    """True if the Triton kernel of ``op`` is to run on ``tensor``.

    Args:
        reason: why the kernel cannot do this call, or None if it can.

    Warns:
        FallbackWarning: once per operator and reason, if the device asks for the kernel but it
            cannot run; blocked PyTorch gives the same result, more slowly.
    """
    if not takes(tensor):
        return False
    if not _installed():
        reason = "Triton is not installed"
    if reason is None:
        return True
    _warn(op, str(tensor.device.type), reason)
    return False


@cache
def _warn(op: str, device: str, reason: str) -> None:
    warnings.warn(
        f"fastgrad::{op} on {device} runs as blocked PyTorch, exact but slower: {reason}",
        FallbackWarning,
        stacklevel=4,
    )


def once(tensor: Tensor, key: Any) -> bool:
    """True if ``tensor`` has not been seen with this key since it last changed.

    A check of values on a GPU makes the host wait; block numbers that stay the same for a whole
    training run are looked at once.
    """
    if tensor.device.type == "cpu":
        return True
    mark = (key, tensor._version)
    if getattr(tensor, "_fastgrad_checked", None) == mark:
        return False
    tensor._fastgrad_checked = mark  # type: ignore[attr-defined]
    return True


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on ``device`` that the host does not wait for: an ordinary copy to a
    GPU waits until all work before it is done."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def refill(target: Tensor, values: Sequence[int]) -> None:
    """Overwrite an int64 table in place, in the order of the device's work."""
    target.copy_(upload(torch.tensor(values, dtype=torch.int64), target.device).view_as(target))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the copy is kept with the tensor while that does not change, since
    every layer of a model asks for the same boundaries."""
    if tensor.device == device:
        return tensor
    kept = getattr(tensor, "_fastgrad_copy", None)
    if kept is None or kept[0] != tensor._version or kept[1].device != device:
        kept = (tensor._version, upload(tensor, device))
        tensor._fastgrad_copy = kept  # type: ignore[attr-defined]
    return kept[1]


__all__ = ["FallbackWarning", "interpreted", "kernel", "moved", "once", "refill", "takes", "upload"]
