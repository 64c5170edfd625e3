"""Many small tensors to the host at once: a GPU is waited for one time, not once per number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Transfer:
    """Collects tensors, then brings them over in one copy per device and dtype.

    ``key = transfer(tensor)`` before :meth:`run`, ``transfer[key]`` after it. float32 and float64
    keep their precision; narrower floats come as float32.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._arrays: list[np.ndarray] = []

    def __call__(self, tensor: Tensor) -> int:
        if tensor.requires_grad:
            tensor = tensor.detach()
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def run(self) -> None:
        """Copy everything that was collected, and let go of the tensors."""
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, t in enumerate(self._tensors):
            groups.setdefault((t.device, t.dtype), []).append(i)
        arrays: list[np.ndarray] = [np.empty(0)] * len(self._tensors)
        for members in groups.values():
            tensors = [self._tensors[i] for i in members]
            flat = torch.cat([t if t.ndim == 1 else t.reshape(-1) for t in tensors]).cpu().numpy()
            start = 0
            for i, t in zip(members, tensors, strict=True):
                end = start + t.numel()
                arrays[i] = flat[start:end].reshape(t.shape).copy()
                start = end
        self._arrays, self._tensors = arrays, []

    def __getitem__(self, key: int) -> np.ndarray:
        return self._arrays[key]
