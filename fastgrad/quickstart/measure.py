"""What a process used: memory and losses, measured from inside."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _status(field: str) -> int | None:
    """A memory line of this process in bytes, or None where /proc does not have it."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def current_memory() -> int | None:
    """Resident memory now, in bytes; None where the system does not tell."""
    return _status("VmRSS")


def restart_peak() -> bool:
    """Make :func:`peak_memory` count from now on. False where the system cannot."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of all tensors among ``tensors``."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


@torch.no_grad()
def row_losses(model: nn.Module, rows: Tensor, batch: int) -> Tensor:
    """Mean loss per token of each row, ``[n]``, in evaluation mode."""
    training = model.training
    model.eval()
    parts = []
    for part in rows.split(batch):
        logits = model(input_ids=part).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        parts.append(losses.view(len(part), -1).mean(1))
    model.train(training)
    return torch.cat(parts)
