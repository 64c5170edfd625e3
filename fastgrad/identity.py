"""Which weights is a file about: a content hash that does not depend on where they came from."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
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


def sharded_modules(model: nn.Module) -> Iterator[Any]:
    """Modules that ``fully_shard`` (FSDP2) was applied to."""
    api = sys.modules.get("torch.distributed.fsdp")  # not loaded: nothing is sharded
    kind: Any = getattr(api, "FSDPModule", ())
    return (m for m in model.modules() if isinstance(m, kind))


def reshard(model: nn.Module) -> None:
    """Let ``fully_shard``'s parameters be shards again, where a forward pass left them whole."""
    for module in sharded_modules(model):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A distributed tensor put together from its shards, on every process, which all have to
    call this; any other tensor as it is."""
    collect: Any = getattr(tensor.detach(), "full_tensor", None)
    return tensor if collect is None else collect()


def model_class(model: nn.Module) -> str:
    """Name of the class that the model was written as."""
    kind = type(unwrapped(model))
    if next(sharded_modules(model), None) is not None:
        names = [k.__name__ for k in kind.__mro__]
        if "FSDPModule" in names:  # fully_shard makes a class of both
            return names[names.index("FSDPModule") + 1]
    return kind.__name__


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
    loaded from; one changed bit changes the hash. Costs one read of the weights. Under
    ``fully_shard`` every process has to call it; each tensor is put together once.

    Raises:
        ValueError: if the model holds meta tensors, which have no content.
    """
    reshard(model)
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
            digest.update(_bytes(whole(p)))
    return "sha256:" + digest.hexdigest()
