"""Weights of experts, ``[experts, ...]``: gradients of those that selected blocks touch.

Mixture-of-experts layers read such a weight in three ways: one expert after the other
(``weight[e]``, :func:`one_expert`), all at once with the tokens sorted by expert
(``grouped_mm``, :func:`grouped_mm`), or a copy for each token (``weight[index]``,
:class:`~fastgrad.sparse_layers.SparseRows`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrad.sparse_layers import stripes_of
from fastgrad_kernels import ops
from fastgrad_kernels.layout import matrix_view
from fastgrad_kernels.stripes import Stripes

if TYPE_CHECKING:
    from fastgrad.packed import PackedBlocks


class _Gate:
    """Where the gradients of one packed parameter's experts meet.

    Each reading of an expert by itself would have to hand the packed parameter a gradient of full
    size, most of it zeros. Here all readings of one or more forward passes lead to one node, which
    puts their gradients together once. ``tokens`` are its outputs, one for each touched row: of
    the expert's shape, but without memory of their own. The gate lives as long as a graph that
    uses it.
    """

    def __init__(self, packed: Tensor, full: Tensor, stripes: Stripes) -> None:
        self.stripes, self.kind = stripes, _kind(packed, full)
        self.tokens: tuple[Tensor, ...] = _Meet.apply(packed, stripes, full.shape[1:], full.dtype)


def _kind(packed: Tensor, full: Tensor) -> tuple[object, ...]:
    return full.dtype, full.device, packed.dtype, packed.device, packed.requires_grad


_GATES: WeakValueDictionary[int, _Gate] = WeakValueDictionary()  # id(packed), which a gate keeps


def _gate(packed: Tensor, full: Tensor, blocks: PackedBlocks) -> _Gate:
    gate, stripes = _GATES.get(id(packed)), stripes_of(blocks)
    if gate is None or gate.stripes is not stripes or gate.kind != _kind(packed, full):
        gate = _GATES[id(packed)] = _Gate(packed, full, stripes)
    return gate


class _Meet(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, stripes: Stripes, shape: torch.Size, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.stripes, ctx.like = stripes, packed.new_empty(0)
        return tuple(
            packed.new_zeros((), dtype=dtype).expand(shape) for _ in range(stripes.rows.numel())
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        touched = ctx.like.new_zeros(len(grads), ctx.stripes.cols)
        for row, grad in zip(touched, grads, strict=True):
            if grad is not None:
                row.view(grad.shape).copy_(grad)
        return ctx.stripes.cut(touched), None, None, None


class _OneExpert(torch.autograd.Function):
    """Values of one expert, its gradient passed to its token."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, values: Tensor, gate: _Gate) -> Tensor:
        ctx.gate = gate  # keeps it alive for the other experts of this pass
        return values.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


def one_expert(expert: int, full: Tensor, packed: Tensor, blocks: PackedBlocks) -> Tensor:
    """``full[expert]``: a constant where no selected block touches it.

    Raises:
        IndexError: as indexing does.
    """
    values = full.detach()[expert]
    stripes = stripes_of(blocks)
    slot = stripes.slot_of.get(expert % full.shape[0])
    if slot is None:
        # An update inside the backward pass writes other experts of this weight while this one is
        # still needed: its rows stay as they are, so it counts changes by itself.
        return values.data
    gate = _gate(packed, full, blocks)
    return _OneExpert.apply(gate.tokens[slot], values, gate)


def grouped_mm(
    x: Tensor, full: Tensor, packed: Tensor, offs: Tensor, blocks: PackedBlocks, transposed: bool
) -> Tensor:
    """``F.grouped_mm(x, full)`` with tokens sorted by expert.

    Args:
        x: ``[tokens, in]``; expert e has the tokens ``offs[e - 1]:offs[e]``.
        full: ``[experts, in, out]``, or ``[experts, out, in]`` if ``transposed``.
        packed: what receives the gradient.
        offs: int32 ``[experts]``.
    """
    return SparseGroupedMM.apply(x, packed, full, offs, blocks, transposed)


def _tokens_of(experts: Tensor, offs: Tensor) -> Tensor:
    """Numbers of the tokens that these experts have, int64, expert after expert."""
    ends = offs.tolist()
    runs = [torch.arange(ends[e - 1] if e else 0, ends[e]) for e in experts.tolist()]
    return torch.cat(runs)


class SparseGroupedMM(torch.autograd.Function):
    """Grouped product whose backward pass computes the touched experts' gradient only.

    On a CPU the tokens of touched experts alone are saved. On a GPU their number is not known
    without waiting for the device, and all are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        full: Tensor,
        offs: Tensor,
        blocks: PackedBlocks,
        transposed: bool,
    ) -> Tensor:
        weight = full.transpose(-2, -1) if transposed else full
        x_needs, packed_needs = ctx.needs_input_grad[:2]
        ctx.stripes, ctx.transposed, ctx.dtype = stripes_of(blocks), transposed, packed.dtype
        ctx.tokens = None
        kept = None
        if packed_needs:
            kept = x
            if offs.device.type == "cpu":
                ctx.tokens = _tokens_of(ctx.stripes.rows, offs)
                kept = x[ctx.tokens]
        ctx.save_for_backward(kept, full if x_needs else None, offs)
        return F.grouped_mm(x, weight, offs=offs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, full, offs = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_x = grad_packed = None
        if full is not None:
            weight = full if ctx.transposed else full.transpose(-2, -1)
            grad_x = F.grouped_mm(grad_out, weight, offs=offs)
        if x is not None:
            stripes: Stripes = ctx.stripes
            bounds = F.pad(offs.long(), (1, 0))
            experts = stripes.rows
            if ctx.tokens is not None:
                grad_out = grad_out[ctx.tokens]
                bounds = F.pad(bounds.diff()[experts].cumsum(0), (1, 0))
                experts = torch.arange(experts.numel(), device=experts.device)
            else:
                used = int(bounds[-1])  # tokens after the last expert's belong to none
                x, grad_out = x[:used], grad_out[:used]
            left, right = (grad_out, x) if ctx.transposed else (x, grad_out)
            touched = ops.expert_wgrad(left, right, bounds.cpu(), experts)
            grad_packed = stripes.cut(matrix_view(touched)).to(ctx.dtype)
        return grad_x, grad_packed, None, None, None, None


__all__ = ["SparseGroupedMM", "grouped_mm", "one_expert"]
