"""Bytes of a training step: the most that it held, measured, and those that it moved, estimated."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.identity import model_parameters
from fastgrad.sharded import local

#: What is in the estimate of :func:`step_traffic`.
TRAFFIC = (
    "estimated (per pass twice the weights and twice the gradients; per step twice the trained "
    "tensors and the optimizer's state, and what is written through; activations are left out)"
)


class PeakMemory:
    """Most bytes held between :meth:`start` and :meth:`stop`.

    On a CUDA device the tensors that PyTorch's allocator gave out: :meth:`start` resets its peak
    counter, for everybody. Else the memory of this process that is resident, code and caches
    included; Linux resets that peak, and where it does not, it is that of the whole process.

    Attributes:
        mode: how it is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.mode = f"measured (torch.cuda.max_memory_allocated on {device}, inside step())"
        elif device.type != "cpu":
            self.mode = f"not measured (no peak counter for {device.type})"
        elif _restart_resident_peak():
            self.mode = "measured (resident memory of this process, highest inside step())"
        else:
            self.mode = "measured (resident memory of this process, highest since it began)"

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _restart_resident_peak()

    def stop(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return float(peak_memory_bytes())


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far, as the operating system counts it; on Linux
    since a :class:`fastgrad.Meter` last began a step, if any did."""
    with contextlib.suppress(OSError):  # Linux: ru_maxrss would include what the parent held
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _restart_resident_peak() -> bool:
    """Whether Linux let us (proc(5): 5 resets the peak and nothing else)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def step_traffic(model: nn.Module, optimizer: Any, passes: int = 1) -> float:
    """Bytes that a training step moves to and from memory, estimated.

    ``passes * (2 W + 2 G) + 2 P + 2 S + F``: each forward and backward pass reads the weights once
    (W, all of them), and the backward pass reads and writes the gradients (G; the first one need
    not read them, and the optimizer then does). The optimizer reads and writes the trained tensors
    (P) and its state (S), and a partial model writes through to its full weights (F). Left out are
    activations, and whatever caches save. Of tensors sharded over processes G, P, S and F are this
    process' shards; W is whole, as each process reads all weights.

    Args:
        model: whose weights are read; tied ones count once.
        optimizer: a ``torch.optim.Optimizer``, or a wrapper with its ``param_groups`` and
            ``state``, after a step, so that its state is there.
        passes: forward and backward passes of the step (gradient accumulation).
    """
    weights = _bytes(model_parameters(model).values())
    trained = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    parameters = _bytes(map(local, trained))
    gradients = sum(
        local(p).numel() * (p if p.grad is None else p.grad).element_size() for p in trained
    )
    state = _bytes(
        local(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)
    )
    through = sum(
        local(p).numel() * b.full.element_size()
        for p in trained
        if (b := getattr(p, "_fastgrad_blocks", None)) is not None
    )
    return float(passes * (2 * weights + 2 * gradients) + 2 * parameters + 2 * state + through)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
