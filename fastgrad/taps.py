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
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from fastgrad.ownership import NONE, marked, propagate
from fastgrad.tap_functions import ExpandTap, LayerNormTap, LinearTap, Rows

if TYPE_CHECKING:
    from fastgrad.records import Batch, ParamRecord

# A broadcast parameter's per-example gradient is kept until the end of the backward pass:
# [n_examples, *shape]. Above this many elements it would no longer be "almost free".
DENSE_LIMIT = 1 << 24


def example_rows(x: Tensor, batch: Batch) -> Rows | None:
    """How the rows of ``x [..., features]`` belong to examples; None if that cannot be known.

    The mark that the tensor carries decides (:mod:`fastgrad.ownership`): examples come first, or
    examples and their tokens flattened together. Without a mark, an activation's leading
    dimension counts as examples only if no other dimension of the batch has that size.
    """
    n = batch.n_examples
    features = x.shape[-1] if x.ndim else 0
    if x.ndim < 2 or features == 0:
        return None
    rows = x.numel() // features
    if n == 1:
        return Rows(1, rows)
    dim = marked(x, batch.index)
    if dim is None and x._base is not None:
        dim = _mark_of_base(x, batch)
    if dim is None:
        plausible = x.requires_grad and not isinstance(x, torch.nn.Parameter)
        dim = 0 if plausible and x.shape[0] == n and n not in batch.other_sizes else NONE
    if dim != 0 or x.shape[0] % n:
        return None
    return Rows(n, rows // n)


def _mark_of_base(x: Tensor, batch: Batch) -> int | None:
    """A view that covers a marked tensor, one example after the other in memory."""
    base = x._base
    if base is None or marked(base, batch.index) != 0 or not x.is_contiguous():
        return None
    ordered = base.stride(0) * base.shape[0] == x.numel() == base.numel()
    return 0 if ordered and x.shape[0] % batch.n_examples == 0 else None


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
        batch = self.batch()
        if batch is None:
            return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        out = NotImplemented
        if handler is not None:
            out = handler(self, batch, func, *args, **kwargs)
        if out is NotImplemented:
            out = self._watch(func, args, kwargs)
        propagate(func, args, kwargs, out, batch.index, batch.n_examples)
        return out

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func``; if a probed parameter enters it, note that no tap covers this use."""
        out = func(*args, **kwargs)
        if not (isinstance(out, Tensor | tuple | list)):
            return out
        for record in self._records_in((*args, *kwargs.values())):
            fresh = [o for o in _tensors(out) if not any(o is a for a in args)]
            if any(o.requires_grad for o in fresh):
                if self._follow(func, args, kwargs, out, record):
                    continue
                record.refuse(f"used by {resolve_name(func) or func}, which has no tap")
        return out

    def _follow(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        record: ParamRecord,
    ) -> bool:
        """A parameter that is prepared for its use, as in ``1 + w`` or ``w.T``: remember how, and
        decide where it meets an activation."""
        before: Callable[[Tensor], Tensor] = _same
        p: Tensor = record.parameter
        for a in args:
            if isinstance(a, Tensor) and hasattr(a, "_fastgrad_derived"):
                p, before = a, a._fastgrad_derived[1]
            elif isinstance(a, Tensor) and hasattr(a, "_fastgrad_shared"):
                p, before = a, a._fastgrad_shared[-1]
        if not isinstance(out, Tensor) or not any(a is p for a in args):
            return False
        if func in _TRANSPOSES and p.ndim == 2 and out.shape == p.shape[::-1]:
            out._fastgrad_transposed = record  # type: ignore[attr-defined]
            return True
        others = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a is not p]
        if func in _ELEMENTWISE and not others and out.shape == p.shape:

            def again(q: Tensor) -> Tensor:
                q = before(q)
                return func(*(q if a is p else a for a in args), **kwargs)

            if hasattr(p, "_fastgrad_shared"):
                shared = p._fastgrad_shared
                rows = p if shared[3] is None else shared[3]
                out._fastgrad_shared = (*shared[:3], rows, again)  # type: ignore[attr-defined]
            else:
                out._fastgrad_derived = (record, again)  # type: ignore[attr-defined]
            return True
        return False

    def _records_in(self, values: tuple[Any, ...]) -> list[ParamRecord]:
        found = []
        for value in values:
            for item in value if isinstance(value, list | tuple) else (value,):
                if not isinstance(item, Tensor):
                    continue
                record = self.lookup(item) or getattr(item, "_fastgrad_transposed", None)
                record = record or getattr(item, "_fastgrad_derived", (None,))[0]
                record = record or getattr(item, "_fastgrad_shared", (None,))[0]
                if record is not None:
                    found.append(record)
        return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


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
    if bias is not None and bias.shape != weight.shape[int(transposed) :][:1]:
        return NotImplemented  # a broadcast bias is not what layers have
    rows = example_rows(x, batch)
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
        return LinearTap.apply(x, weight, bias, transposed, rows, weight_record, bias_record)


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


def _matmul(mode: TapMode, batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 2 or not all(isinstance(a, Tensor) for a in args):
        return NotImplemented
    x, weight = args
    if (record := getattr(weight, "_fastgrad_transposed", None)) is not None:
        return _product(mode, batch, x, record.parameter, None, transposed=False)
    if mode.lookup(weight) is None:
        return NotImplemented
    return _product(mode, batch, x, weight, None, transposed=True)


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
    skipped = None if padding_idx is None else padding_idx % weight.shape[0]
    n, dim = batch.n_examples, marked(input, batch.index)
    if input.ndim >= 2 and input.shape[0] == 1 and n > 1:
        # Position ids that all examples share: to be expanded where they meet the examples.
        out = func(input, weight, padding_idx)
        out._fastgrad_shared = (record, input, skipped, None, _same)
        return out
    if n == 1 or (
        dim is None and input.ndim >= 2 and input.shape[0] == n and n not in batch.other_sizes
    ):
        dim = 0
    if dim != 0 or input.ndim < 1 or input.shape[0] % n:
        record.refuse(
            f"its embedding was looked up with ids of shape {tuple(input.shape)}, which cannot be "
            f"assigned to the batch's {n} examples"
        )
        return NotImplemented
    record.expect_use(ids=input.reshape(n, -1))
    out = func(input, weight, padding_idx)
    out.register_hook(_lookup_hook(record, input, skipped, n))
    return out


def _lookup_hook(
    record: ParamRecord, ids: Tensor, skipped: int | None, n: int
) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        flat_ids, flat = ids.reshape(-1).long(), grad.reshape(-1, grad.shape[-1])
        if skipped is not None:
            flat = flat.masked_fill((flat_ids == skipped).unsqueeze(1), 0)
        record.add_lookup(flat_ids, flat, Rows(n, flat_ids.numel() // n))

    return hook


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
    rows = example_rows(input, batch)
    if rows is None or input.ndim <= len(normalized_shape):
        for record in known:
            record.refuse(
                f"its layer norm saw an input of shape {tuple(input.shape)} without an "
                f"example dimension of {batch.n_examples}"
            )
        return NotImplemented
    for record in known:
        record.expect_use()
    if torch.is_autocast_enabled(input.device.type):  # autocast runs layer norm in float32
        input, weight = input.float(), weight.float()
        bias = None if bias is None else bias.float()
    return LayerNormTap.apply(
        input, list(normalized_shape), weight, bias, eps, rows.n_examples, *records
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
    propagate(func, (input,), {}, normalised, batch.index, batch.n_examples)
    result = _broadcast(mode, batch, torch.mul, normalised, weight)
    if result is NotImplemented:
        return NotImplemented
    return result.to(input.dtype)


def _broadcast(mode: TapMode, batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Elementwise functions: the parameter is expanded over the examples of its partner."""
    special = [a if isinstance(a, Tensor) and _source(mode, a) is not None else None for a in args]
    if not any(s is not None for s in special):
        return NotImplemented
    n = batch.n_examples
    partners = [
        a for a, s in zip(args, special, strict=True) if isinstance(a, Tensor) and s is None
    ]
    depth = max((p.ndim for p in partners), default=0)
    owned = [p for p in partners if p.ndim == depth >= 2 and p.shape[0] == n]
    if kwargs or not any(example_rows(p, batch) is not None for p in owned):
        return NotImplemented
    if func in _INPLACE and special[0] is not None:
        return NotImplemented
    new = list(args)
    for i, tensor in enumerate(special):
        if tensor is None:
            continue
        if tensor.ndim < depth:
            shape = torch.Size((n, *(1,) * (depth - 1 - tensor.ndim), *tensor.shape))
        elif tensor.ndim == depth and tensor.shape[0] == 1:
            shape = torch.Size((n, *tensor.shape[1:]))
        else:
            return NotImplemented
        expanded = _expanded(mode, batch, tensor, shape)
        if expanded is None:
            return NotImplemented
        new[i] = expanded
    return func(*new)


def _source(mode: TapMode, tensor: Tensor) -> ParamRecord | None:
    """The record of a parameter, of what was made of one alone, or of a shared lookup."""
    record = mode.lookup(tensor) or getattr(tensor, "_fastgrad_derived", (None,))[0]
    return record or getattr(tensor, "_fastgrad_shared", (None,))[0]


def _expanded(mode: TapMode, batch: Batch, tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """``tensor`` with an example dimension, and a tap on it; None if it would be too large."""
    n = batch.n_examples
    if hasattr(tensor, "_fastgrad_shared"):
        record, ids, skipped, looked_up, again = tensor._fastgrad_shared
        rows = tensor if looked_up is None else looked_up  # no tensor may refer to itself
        ids = ids.expand(n, *ids.shape[1:])
        record.expect_use(ids=ids.reshape(n, -1))
        expanded = rows.expand(shape)
        expanded.register_hook(_lookup_hook(record, ids, skipped, n))
        return again(expanded)
    record = _source(mode, tensor)
    assert record is not None
    if n * tensor.numel() > DENSE_LIMIT:
        record.refuse(
            f"used elementwise with {tensor.numel()} elements: its gradients of {n} examples "
            f"exceed {DENSE_LIMIT} elements"
        )
        return None
    record.expect_use()
    expanded = ExpandTap.apply(record.parameter, shape, record)
    derived = getattr(tensor, "_fastgrad_derived", None)
    return expanded if derived is None else derived[1](expanded)


INPLACE = ("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__")
_INPLACE = {getattr(Tensor, name) for name in INPLACE}


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
        *INPLACE,
    ):
        for owner in (torch, Tensor):
            if hasattr(owner, name):
                table[getattr(owner, name)] = _broadcast
    return table


HANDLERS = _handlers()
_TRANSPOSES = {torch.t, Tensor.t, torch.transpose, Tensor.transpose}
_TRANSPOSES |= {getattr(Tensor, name).__get__ for name in ("T", "mT")}
_ELEMENTWISE = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in (
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "exp",
        "float",
        "to",
        "type",
        "type_as",
        "bfloat16",
        "half",
        "double",
        "__add__",
        "__radd__",
        "__sub__",
        "__rsub__",
        "__mul__",
        "__rmul__",
        "__truediv__",
        "__neg__",
        "sigmoid",
        "tanh",
        "softplus",
        "abs",
        "square",
        "clamp",
    )
    if hasattr(owner, name)
}

__all__ = ["HANDLERS", "Rows", "TapMode", "example_rows"]
