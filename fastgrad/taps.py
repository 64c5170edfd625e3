"""Taps: for each use of a parameter in a forward pass, what its gradient is made of.

A :class:`TapMode` watches every PyTorch function that the model calls. Where a probed parameter
takes part, the function is recognised by what it computes, not by the module it stands in:

====================================  =====================================================
use of parameter ``w``                per-example gradient
====================================  =====================================================
``F.linear``, ``addmm``, ``x @ w``    product of two factors, ``left_jᵀ right_j``
``F.embedding``                       rows of the output's gradient, added up by token
``F.layer_norm``, ``F.rms_norm``      sum over tokens of normalised input times gradient
``w * x``, ``w + x``, ... (broadcast) ``w`` is expanded over examples; autograd does the rest
bias of ``F.linear``, ``addmm``       sum over tokens of the output's gradient
====================================  =====================================================

Anything else is written down by name, so that coverage can report it. So functional calls,
modules that are used twice and weights shared by several modules need no special care.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode, resolve_name

if TYPE_CHECKING:
    from fastgrad.records import Batch, ParamRecord

# A broadcast parameter's per-example gradient is kept until the end of the backward pass:
# [n_examples, *shape]. Above this many elements it would no longer be "almost free".
DENSE_LIMIT = 1 << 24


class Rows(NamedTuple):
    """How a tensor's rows belong to examples: ``per_example`` consecutive rows each."""

    n_examples: int
    per_example: int

    @property
    def offsets(self) -> Tensor:
        return torch.arange(self.n_examples + 1, dtype=torch.int64) * self.per_example


def example_rows(x: Tensor, n_examples: int) -> Rows | None:
    """How the rows of ``x [..., features]`` belong to examples; None if that cannot be known.

    Known cases: a leading example dimension; or a flattened ``[examples * tokens, features]``
    that is a plain view of such a tensor. A matrix that was made by indexing (as a
    mixture-of-experts layer does with its routed tokens) tells nothing, and is refused.
    """
    if x.ndim >= 3:
        rows = x.shape[1:-1].numel()
        return Rows(n_examples, rows) if x.shape[0] == n_examples else None
    if x.ndim != 2:
        return None
    base = x._base
    if (
        base is not None
        and base.ndim >= 3
        and base.shape[0] == n_examples
        and base.numel() == x.numel()
        and x.is_contiguous()
        # memory holds one example after the other, whatever the order within an example
        and base.stride(0) * n_examples == x.numel()
        and sum((n - 1) * s for n, s in zip(base.shape, base.stride(), strict=True)) < x.numel()
        and x.shape[0] % n_examples == 0
    ):
        return Rows(n_examples, x.shape[0] // n_examples)
    return Rows(n_examples, 1) if x.shape[0] == n_examples else None


class _LinearTap(torch.autograd.Function):
    """``y = x Wᵀ + b`` (or ``x W + b``); its backward pass takes gradient and ``T`` in one go."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        rows: Rows,
        weight_record: ParamRecord | None,
        bias_record: ParamRecord | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.rows = transposed, rows
        ctx.weight_record, ctx.bias_record = weight_record, bias_record
        if not transposed:
            return F.linear(x, weight, bias)
        if bias is not None and x.ndim == 2:
            return torch.addmm(bias, x, weight)
        out = x @ weight
        return out if bias is None else out + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows: Rows = ctx.rows
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_out @ (weight.T if ctx.transposed else weight)
        x2, g2 = x.reshape(-1, x.shape[-1]), grad_out.reshape(-1, grad_out.shape[-1])
        left, right = (x2, g2) if ctx.transposed else (g2, x2)
        if ctx.needs_input_grad[1]:
            if ctx.weight_record is None:
                grad_weight = left.T @ right
            else:
                grad_weight = ctx.weight_record.add_product(left, right, rows)
            grad_weight = grad_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            wide = torch.float64 if g2.dtype == torch.float64 else torch.float32
            per_example = g2.view(rows.n_examples, rows.per_example, -1).sum(1, dtype=wide)
            if ctx.bias_record is not None:
                ctx.bias_record.add_dense(per_example, grad_out.dtype)
            grad_bias = per_example.sum(0).to(grad_out.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


class _LayerNormTap(torch.autograd.Function):
    """Layer norm whose backward pass keeps the scale's and shift's gradient of each example."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: list[int],
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        weight_record: ParamRecord | None,
        bias_record: ParamRecord | None,
    ) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.shape, ctx.records = shape, (weight_record, bias_record)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad_out.contiguous(), x, ctx.shape, mean, rstd, weight, None, [True, False, False]
            )[0]
        n, shape = x.shape[0], tuple(ctx.shape)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        grad = grad_out.to(wide)
        if ctx.needs_input_grad[2]:
            normalised = (x.to(wide) - mean.to(wide)) * rstd.to(wide)
            per_example = normalised.mul_(grad).view(n, -1, *shape).sum(1)
            if ctx.records[0] is not None:
                ctx.records[0].add_dense(per_example)
            grad_weight = per_example.sum(0).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            per_example = grad.reshape(n, -1, *shape).sum(1)
            if ctx.records[1] is not None:
                ctx.records[1].add_dense(per_example)
            grad_bias = per_example.sum(0).to(weight.dtype)
        return grad_x, None, grad_weight, grad_bias, None, None, None


class _ExpandTap(torch.autograd.Function):
    """A parameter expanded over examples (no copy), so that its gradient comes per example."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shape: torch.Size, record: ParamRecord) -> Tensor:
        ctx.record, ctx.shape = record, parameter.shape
        return parameter.expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        per_example = grad_out.reshape(grad_out.shape[0], *ctx.shape)
        ctx.record.add_dense(per_example)
        return per_example.sum(0), None, None


class TapMode(TorchFunctionMode):
    """Routes each function that touches a probed parameter through its tap.

    ``lookup`` maps a tensor to the record of this batch for the probed parameter that it is, or
    None; ``batch`` gives the batch under way, or None outside a forward pass of the model.
    """

    def __init__(
        self, batch: Callable[[], Batch | None], lookup: Callable[[Tensor], ParamRecord | None]
    ) -> None:
        super().__init__()
        self.batch, self.lookup = batch, lookup

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is None:
            return self._watch(func, args, kwargs)
        batch = self.batch()
        if batch is None:
            return func(*args, **kwargs)
        result = handler(self, batch, func, *args, **kwargs)
        return self._watch(func, args, kwargs) if result is NotImplemented else result

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func``; if a probed parameter enters it, note that no tap covers this use."""
        out = func(*args, **kwargs)
        if not (isinstance(out, Tensor | tuple | list)):
            return out
        for record in self._records_in((*args, *kwargs.values())):
            if any(o.requires_grad and o is not record.parameter for o in _tensors(out)):
                record.refuse(f"used by {resolve_name(func) or func}, which has no tap")
        return out

    def _records_in(self, values: tuple[Any, ...]) -> list[ParamRecord]:
        found = []
        for value in values:
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Tensor) and (record := self.lookup(item)) is not None:
                    found.append(record)
        return found


def _tensors(value: Any) -> list[Tensor]:
    items = value if isinstance(value, list | tuple) else (value,)
    return [item for item in items if isinstance(item, Tensor)]


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, cast as the function itself would; autograd sees the casts."""
    if not torch.is_autocast_enabled(x.device.type):
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))


def _product(
    mode: TapMode, batch: Batch, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> Any:
    weight_record = mode.lookup(weight)
    bias_record = None if bias is None else mode.lookup(bias)
    if (weight_record is None and bias_record is None) or weight.ndim != 2:
        return NotImplemented
    rows = example_rows(x, batch.n_examples)
    if rows is None:
        for record in (weight_record, bias_record):
            if record is not None:
                record.refuse(
                    f"its layer saw an input of shape {tuple(x.shape)}, whose rows cannot be "
                    f"assigned to the batch's {batch.n_examples} examples"
                )
        return NotImplemented
    for record in (weight_record, bias_record):
        if record is not None:
            record.expect_use()
    x, weight, bias = _autocast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return _LinearTap.apply(x, weight, bias, transposed, rows, weight_record, bias_record)


def _linear(
    mode: TapMode,
    batch: Batch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Any:
    return _product(mode, batch, input, weight, bias, transposed=False)


def _addmm(
    mode: TapMode, batch: Batch, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any
) -> Any:
    if kwargs or input.ndim != 1:  # scaled sums are not what layers compute
        return NotImplemented
    return _product(mode, batch, mat1, mat2, input, transposed=True)


def _matmul(mode: TapMode, batch: Batch, func: Any, input: Tensor, other: Tensor, **kw: Any) -> Any:
    if kw or not isinstance(other, Tensor) or mode.lookup(other) is None:
        return NotImplemented
    return _product(mode, batch, input, other, None, transposed=True)


def _embedding(
    mode: TapMode,
    batch: Batch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    record = mode.lookup(weight)
    if record is None:
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq or sparse:
        record.refuse("its embedding uses max_norm, scale_grad_by_freq or sparse gradients")
        return NotImplemented
    n = batch.n_examples
    if input.ndim >= 2 and input.shape[0] == 1 and n > 1:
        # Position ids shared by all examples: looked up once, added to each. Looking them up
        # per example gives the same numbers, and a gradient for each example.
        input = input.expand(n, *input.shape[1:])
    if input.ndim < 1 or input.shape[0] != n:
        record.refuse(
            f"its embedding was looked up with ids of shape {tuple(input.shape)}, which have no "
            f"example dimension of {n}"
        )
        return NotImplemented
    record.expect_use(ids=input)
    out = func(input, weight, padding_idx)
    skipped = None if padding_idx is None else padding_idx % weight.shape[0]
    rows = Rows(n, input.shape[1:].numel())

    def hook(grad: Tensor) -> None:
        ids, flat = input.reshape(-1), grad.reshape(-1, grad.shape[-1])
        if skipped is not None:
            flat = flat.masked_fill((ids == skipped).unsqueeze(1), 0)
        record.add_lookup(ids, flat, rows)

    out.register_hook(hook)
    return out


def _layer_norm(
    mode: TapMode,
    batch: Batch,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
) -> Any:
    if weight is None:
        return NotImplemented
    records = [mode.lookup(weight), None if bias is None else mode.lookup(bias)]
    known = [r for r in records if r is not None]
    if not known:
        return NotImplemented
    if input.ndim <= len(normalized_shape) or input.shape[0] != batch.n_examples:
        for record in known:
            record.refuse(
                f"its layer norm saw an input of shape {tuple(input.shape)} without an "
                f"example dimension of {batch.n_examples}"
            )
        return NotImplemented
    for record in known:
        record.expect_use()
    if torch.is_autocast_enabled(input.device.type):  # autocast runs layer norm in float32
        input = input.float()
    return _LayerNormTap.apply(
        input, list(normalized_shape), weight, bias, eps, records[0], records[1]
    )


def _rms_norm(
    mode: TapMode,
    batch: Batch,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if weight is None or mode.lookup(weight) is None:
        return NotImplemented
    normalised = func(input, normalized_shape, None, eps)
    result = _broadcast(mode, batch, torch.mul, normalised, weight)
    if result is NotImplemented:
        return NotImplemented
    return result.to(input.dtype)


def _broadcast(mode: TapMode, batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Elementwise functions: the parameter is expanded over the examples of its partner."""
    records = [mode.lookup(a) if isinstance(a, Tensor) else None for a in args]
    if not any(r is not None for r in records):
        return NotImplemented
    n = batch.n_examples
    partners = [
        a for a, r in zip(args, records, strict=True) if isinstance(a, Tensor) and r is None
    ]
    depth = max((p.ndim for p in partners), default=0)
    if kwargs or depth < 1 or not any(p.ndim == depth and p.shape[0] == n for p in partners):
        return NotImplemented
    new = list(args)
    for i, record in enumerate(records):
        if record is None:
            continue
        p: Tensor = args[i]
        if p.ndim < depth:
            shape = torch.Size((n, *(1,) * (depth - 1 - p.ndim), *p.shape))
        elif p.ndim == depth and p.shape[0] == 1:
            shape = torch.Size((n, *p.shape[1:]))
        else:
            return NotImplemented
        if n * p.numel() > DENSE_LIMIT:
            record.refuse(
                f"used elementwise with {p.numel()} elements: its gradients of {n} "
                f"examples exceed {DENSE_LIMIT} elements"
            )
            return NotImplemented
        record.expect_use()
        new[i] = _ExpandTap.apply(p, shape, record)
    return func(*new)


def _handlers() -> dict[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = {
        F.linear: _linear,
        torch.addmm: _addmm,
        F.embedding: _embedding,
        F.layer_norm: _layer_norm,
        F.rms_norm: _rms_norm,
    }
    for name in ("matmul", "mm", "__matmul__"):
        for owner in (torch, Tensor):
            if hasattr(owner, name):
                table[getattr(owner, name)] = _matmul
    for name in (
        "mul",
        "add",
        "sub",
        "div",
        "true_divide",
        "__mul__",
        "__rmul__",
        "__add__",
        "__radd__",
        "__sub__",
        "__rsub__",
        "__truediv__",
    ):
        for owner in (torch, Tensor):
            if hasattr(owner, name):
                table[getattr(owner, name)] = _broadcast
    return table


HANDLERS = _handlers()

__all__ = ["HANDLERS", "Rows", "TapMode", "example_rows"]
