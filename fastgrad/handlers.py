"""How each function that PyTorch offers uses a parameter that meets the examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.handlers_attention import attention
from fastgrad.handlers_bilinear import bilinear
from fastgrad.handlers_common import ownership
from fastgrad.handlers_contractions import added, einsum, inner, tensordot
from fastgrad.handlers_convolutions import conv, conv_transpose
from fastgrad.handlers_elementwise import ELEMENTWISE, INPLACE, broadcast, prelu
from fastgrad.handlers_lookups import embedding, embedding_bag, getitem
from fastgrad.handlers_norms import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
    torch_batch_norm,
)
from fastgrad.handlers_products import addmm, grouped, linear, matmul
from fastgrad.handlers_recurrent import cell, recurrent


def _handlers() -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = {
        F.linear: linear,
        F.bilinear: bilinear,
        F.embedding: embedding,
        F.embedding_bag: embedding_bag,
        F.layer_norm: layer_norm,
        F.rms_norm: rms_norm,
        F.batch_norm: batch_norm,
        torch.batch_norm: torch_batch_norm,
        F.instance_norm: instance_norm,
        F.group_norm: group_norm,
        F.scaled_dot_product_attention: attention,
        torch.tensordot: tensordot,
        torch.einsum: einsum,
        Tensor.__getitem__: getitem,
    }
    places: tuple[Any, ...] = (F, torch, Tensor)
    names: dict[Callable[..., Any], tuple[str, ...]] = {
        grouped: ("grouped_mm", "_grouped_mm"),
        conv: ("conv1d", "conv2d", "conv3d"),
        conv_transpose: ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        prelu: ("prelu",),
        matmul: ("matmul", "mm", "__matmul__", "bmm", "mv", "dot"),
        inner: ("inner",),
        addmm: ("addmm",),
        added: ("baddbmm", "addbmm", "addmv"),
        recurrent: ("lstm", "gru", "rnn_tanh", "rnn_relu"),
        cell: ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        broadcast: (*ELEMENTWISE, *INPLACE),
    }
    for handler, known in names.items():
        for name in known:
            for place in places:
                if hasattr(place, name):
                    table[getattr(place, name)] = handler
    return table


HANDLERS = _handlers()

__all__ = ["HANDLERS", "ownership"]
