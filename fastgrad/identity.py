"""Which weights is a file about: a content hash that does not depend on where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

PACKED_SUFFIX = "_fastgrad_packed"  # parameters that fastgrad itself adds to a model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        elif type(inner).__name__ == "OptimizedModule" and hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner


def model_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters by name, each shared one once, without fastgrad's packed ones.

    Wrappers are looked through, so that a name means the same parameter everywhere.
    """
    return {
        name: p
        for name, p in unwrapped(model).named_parameters()
        if not name.endswith(PACKED_SUFFIX)
    }


def _bytes(tensor: Tensor) -> bytes | memoryview:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def weights_hash(model: nn.Module) -> str:
    """``sha256:...`` over name, dtype, shape and bytes of every parameter, sorted by name.

    Two models with bit-identical weights under the same names hash alike, wherever they were
    loaded from; one changed bit changes the hash. Costs one read of the weights.

    Raises:
        ValueError: if the model holds meta tensors, which have no content.
    """
    return tensors_hash(sorted(model_parameters(model).items()))


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """``sha256:...`` over name, dtype, shape and bytes of every tensor, in the order given.

    Raises:
        ValueError: for a meta tensor, which has no content.
    """
    digest = hashlib.sha256()
    for name, p in tensors:
        if p.is_meta:
            raise ValueError(f"{name} is on the meta device and has no content to hash")
        digest.update(f"{name}|{p.dtype}|{tuple(p.shape)}|".encode())
        if p.numel():
            digest.update(_bytes(p))
    return "sha256:" + digest.hexdigest()
