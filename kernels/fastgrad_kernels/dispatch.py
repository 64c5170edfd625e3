"""Which implementation runs: the Triton kernels on a GPU, blocked PyTorch everywhere else.

Triton is imported only where it is used, so that a machine without it, or without a driver, can
import and run everything on its CPU. Under ``TRITON_INTERPRET=1`` the kernels run on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


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
    return tensor.is_cuda or (interpreted() and tensor.is_cpu)


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


def checked(tensor: Tensor, key: Any) -> bool:
    """True if :func:`mark_checked` was called for this tensor and key and it has not changed.

    A check of values on a GPU makes the host wait; block numbers that stay the same for a whole
    training run are looked at once.
    """
    if tensor.is_cpu or tensor.is_inference():
        return False
    return getattr(tensor, "_fastgrad_checked", None) == (key, tensor._version)


def mark_checked(tensor: Tensor, key: Any) -> None:
    """Remember a check that has passed."""
    if not tensor.is_cpu and not tensor.is_inference():
        tensor._fastgrad_checked = (key, tensor._version)  # type: ignore[attr-defined]


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor on ``device``; from the host without waiting: an ordinary copy to a GPU
    waits until all work before it is done.

    Raises:
        RuntimeError: during the capture of a CUDA graph, which would hold the copy's source, and
            tables that are marked filled although nothing ran.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    if capturing(device):
        raise RuntimeError(
            "fastgrad_kernels: a table must be copied to the device, which a CUDA graph cannot "
            "hold. Remedy: before the capture run the same call once with the same tensors"
        )
    return tensor.pin_memory().to(device, non_blocking=True)


def keep(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Keep the tensors that ``make`` returns, by its arguments; not those of a fake or inference
    mode, which would not serve outside it."""
    made: OrderedDict[Any, Tensor] = OrderedDict()

    @wraps(make)
    def again(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        key = (args, tuple(kwargs.items()))
        found = made.get(key)
        if found is None:
            found = make(*args, **kwargs)
            if type(found) is Tensor and not found.is_inference():
                made[key] = found
            if len(made) > 4096:
                made.popitem(last=False)
        return found

    return again


def refill(target: Tensor, values: Sequence[int]) -> None:
    """Overwrite an int64 table in place, in the order of the device's work."""
    target.copy_(upload(torch.tensor(values, dtype=torch.int64), target.device).view_as(target))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. The copy of a host tensor is kept with it and serves as long as
    the values are the same: every layer of a model asks for the same boundaries."""
    if tensor.device == device or tensor.device.type != "cpu":
        return tensor.to(device)
    kept = getattr(tensor, "_fastgrad_copy", None)
    if kept is None or kept[1].device != device or not torch.equal(kept[0], tensor):
        kept = (tensor.clone(), upload(tensor, device))
        tensor._fastgrad_copy = kept  # type: ignore[attr-defined]
    return kept[1]


__all__ = [
    "FallbackWarning",
    "capturing",
    "checked",
    "interpreted",
    "keep",
    "kernel",
    "mark_checked",
    "moved",
    "refill",
    "takes",
    "upload",
]
