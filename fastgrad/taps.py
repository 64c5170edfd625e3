"""Taps: for each use of a parameter in a forward pass, what its gradient is made of.

A :class:`TapMode` watches every PyTorch function that the model calls. Where a probed parameter
takes part, the function is recognised by what it computes, not by the module it stands in:

====================================  =====================================================
use of parameter ``w``                per-example gradient
====================================  =====================================================
``F.linear``, ``addmm``, ``x @ w``    product of two factors, ``left_jᵀ right_j``
``F.conv1d`` to ``conv3d``            the same, with the patches that each output place saw
``grouped_mm``, ``linear(x, w[e])``   the same, in one expert's part of the weight
``F.embedding``, ``w[ids]``           rows of the output's gradient, added up by token
``F.layer_norm``, ``F.rms_norm``      sum over tokens of normalised input times gradient
``w * x``, ``w + x``, ... (broadcast) ``w`` is expanded over examples; autograd does the rest
bias of a linear layer, convolution   sum over tokens of the output's gradient
a function of parameters alone        attributed where its result meets the examples
any other function, if ``w`` is small the function once for each example, with a ``w`` of its own
====================================  =====================================================

Anything else is written down by name, so that coverage can report it. So functional calls,
modules that are used twice and weights shared by several modules need no special care.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from fastgrad.checkpoints import under_checkpoint
from fastgrad.derived import Root, kept_from_checkpoints, may_have_roots, roots_of, set_derived
from fastgrad.handlers import HANDLERS, ownership
from fastgrad.one_by_one import one_by_one
from fastgrad.ownership import marked, tensors_in
from fastgrad.propagation import Meeting, propagate
from fastgrad.records import Batch
from fastgrad.unannounced import refuse_unannounced


class TapMode(TorchFunctionMode):
    """Routes each function that touches a probed parameter through its tap.

    ``batch`` gives the batch under way, or None outside a forward pass of the model.
    """

    def __init__(self, batch: Callable[[], Batch | None]) -> None:
        super().__init__()
        self.batch = batch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        batch = None if func in _QUESTIONS else self.batch()
        if batch is None:
            return func(*args, **kwargs)
        under_checkpoint(batch)
        if not torch.is_grad_enabled():  # a reentrant checkpoint: only whose rows are whose counts
            out = func(*args, **kwargs)
            propagate(func, args, kwargs, out, batch.index, batch.n_examples)
            return out
        tensors = tensors_in(args)
        if kwargs:
            tensors_in(kwargs.values(), tensors)
        if batch.earlier:
            batch = batch.meant_by(tensors)
        refuse_unannounced(tensors, batch)
        out = NotImplemented
        if not may_have_roots(tensors, batch):
            out = func(*args, **kwargs)
        elif (handler := HANDLERS.get(func)) is not None:
            out = handler(batch, func, *args, **kwargs)
            if _is_marked(out, batch.index, tensors):
                return out
        if out is NotImplemented:
            roots = [(t, r) for t in tensors if (r := roots_of(t, batch))]
            out = _general(batch, func, args, kwargs, roots) if roots else func(*args, **kwargs)
        how = propagate(func, args, kwargs, out, batch.index, batch.n_examples, tensors)
        if how:
            _report(batch.makers(tensors), func, args[0] if out is None and args else out, how)
        return out


def _is_marked(out: Any, batch: int, tensors: Sequence[Tensor]) -> bool:
    """By the handler that made it, which then knows all that there is to know."""
    known = isinstance(out, Tensor) and marked(out, batch) is not None
    return known and not any(out is t for t in tensors)


def _report(batches: Sequence[Batch], func: Any, out: Any, how: Meeting) -> None:
    """Examples met in a function: that counts if a gradient flows through it."""
    name = resolve_name(func) or str(func)
    if how == "choices":
        name += " with counts of the examples' choices, as in a router's balancing loss"

    def hook(grad: Tensor) -> None:
        if how == "choices" and not bool(grad.any()):
            return  # the loss is logged alone: its coefficient is zero
        for batch in batches:
            batch.mixing.add(name)

    for tensor in tensors_in((out,)):
        if tensor.requires_grad:
            tensor.register_hook(hook)


def _general(
    batch: Batch,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    parametric: list[tuple[Tensor, tuple[Root, ...]]],
) -> Any:
    """A function without a tap of its own that a parameter enters, or what was made of one."""
    known = {id(t) for t, _ in parametric}
    roots = [r for _, found in parametric for r in found]
    others = [t for t in tensors_in((args, kwargs)) if id(t) not in known]
    if any(ownership(t, batch).owned for t in others):
        name = resolve_name(func) or str(func)
        out = one_by_one(batch, func, args, kwargs, known)
        if not isinstance(out, str):
            return out
        reason = f"used by {name}, which has no tap: {out}"
        out = func(*args, **kwargs)
        if func is Tensor.__setitem__ or any(t.requires_grad for t in tensors_in((out,))):
            for root in roots:
                root.record.refuse(reason)
        return out
    with kept_from_checkpoints():
        out = func(*args, **kwargs)
    fresh = [t for t in tensors_in((out,)) if t.requires_grad and batch.lookup(t) is None]
    if not fresh:
        return out
    # which expert is meant says nothing about whose rows it will meet
    numbers = [t for t in others if t.ndim == 0 and not t.is_floating_point()]
    others = [t for t in others if not any(t is k for k in numbers)]
    if any(t.requires_grad or marked(t, batch.index) is not None for t in others):
        for root in roots:
            root.record.refuse(
                f"used by {resolve_name(func) or func} together with something of which it is "
                "not known whether and how it belongs to the examples"
            )
        return out
    for tensor in fresh:
        set_derived(tensor, roots)
    return out


# What a model asks of a tensor all the time without computing anything.
_PROPERTIES = (
    "shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "grad_fn", "is_cuda",
    "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "_version", "grad", "itemsize",
    "_base", "output_nr", "is_inference", "names", "nbytes", "layout", "grad_dtype",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "element_size", "data_ptr", "register_hook", "get_device",
    "__len__", "__bool__", "__int__", "__float__", "item", "tolist",
)  # fmt: skip
_QUESTIONS = {getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)}
_QUESTIONS |= {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}

__all__ = ["HANDLERS", "TapMode"]
