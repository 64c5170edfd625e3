"""The state of random numbers, so that a probe never changes those that a model draws."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states(tensors: Sequence[Tensor]) -> dict[torch.device, Tensor]:
    """Of the processor and of the tensors' devices."""
    devices = {torch.device("cpu"), *(t.device for t in tensors)}
    found = {}
    for device in sorted(devices, key=str):
        if device.type == "cpu":
            found[device] = torch.get_rng_state()
        elif hasattr(_module(device), "get_rng_state"):
            found[device] = _module(device).get_rng_state(device)
    return found


def restore(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            _module(device).set_rng_state(state, device)


@contextlib.contextmanager
def unnoticed_draws(tensors: Sequence[Tensor] = ()) -> Iterator[None]:
    """What PyTorch, NumPy and Python draw inside is drawn again afterwards.

    Args:
        tensors: whose devices' generators are meant, beside the processor's.
    """
    states = random_states(tensors)
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 (what collators draw from)
    try:
        yield
    finally:
        restore(states)
        random.setstate(others[0])
        np.random.set_state(others[1])  # noqa: NPY002


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type, None)
