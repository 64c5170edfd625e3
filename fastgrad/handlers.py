"""How each function that PyTorch offers uses a parameter that meets the examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.handlers_attention import attention
from fastgrad.handlers_common import ownership
from fastgrad.handlers_convolutions import conv
from fastgrad.handlers_elementwise import ELEMENTWISE, INPLACE, broadcast
from fastgrad.handlers_lookups import embedding, getitem
from fastgrad.handlers_norms import layer_norm, rms_norm
from fastgrad.handlers_products import addmm, grouped, linear, matmul


def _handlers() -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = {
        F.linear: linear,
        torch.addmm: addmm,
        F.embedding: embedding,
        F.layer_norm: layer_norm,
        F.rms_norm: rms_norm,
        F.scaled_dot_product_attention: attention,
        Tensor.__getitem__: getitem,
    }
    functions: tuple[Any, ...] = (F, torch)
    for place in functions:
        for name in ("grouped_mm", "_grouped_mm"):
            if hasattr(place, name):
                table[getattr(place, name)] = grouped
        for name in ("conv1d", "conv2d", "conv3d"):
            table[getattr(place, name)] = conv
    for names, handler in (
        (("matmul", "mm", "__matmul__"), matmul),
        ((*ELEMENTWISE, *INPLACE), broadcast),
    ):
        for name in names:
            for owner in (torch, Tensor):
                if hasattr(owner, name):
                    table[getattr(owner, name)] = handler
    return table


HANDLERS = _handlers()

__all__ = ["HANDLERS", "ownership"]
