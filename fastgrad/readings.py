"""What a module sees when it reads a weight of which blocks are trained.

A :class:`Reading` is the weight's values with a graph that leads to the packed parameter: any
function of PyTorch may take it, and then the weight's gradient is formed densely and cut. The
functions in the table below know how to form the selected blocks' gradient alone. Thus a tied
output layer that calls ``F.linear`` on another module's weight, a convolution, and experts that
are read one by one or all at once are served without knowing the modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrad.errors import PartialError
from fastgrad.sparse_conv import conv
from fastgrad.sparse_experts import grouped_mm, one_expert
from fastgrad.sparse_layers import Overlay, SparseRows, linear

if TYPE_CHECKING:
    from fastgrad.packed import PackedBlocks


@dataclass(frozen=True)
class Source:
    """Where a reading comes from.

    Attributes:
        full: the frozen weight.
        packed: the trained blocks.
        transposed: the reading has the weight's last two dimensions exchanged.
    """

    full: Tensor
    packed: Tensor
    blocks: PackedBlocks
    transposed: bool = False


class Reading(Tensor):
    """The values of a weight, which remember where they were read."""

    _source: Source | None  # None: the whole weight is trained, its gradient is dense
    _blocks: PackedBlocks

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            if rule is not None and (torch.is_grad_enabled() or rule in (_deepcopy, _reduce)):
                named = _named(rule, args, kwargs)
                out = NotImplemented if named is None else rule(*args, **named)
                if out is not NotImplemented:
                    return out
            return func(*args, **kwargs)


def read(full: Any, packed: Any, blocks: PackedBlocks) -> Tensor:
    """The weight ``full`` for a reader whose gradient goes to ``packed``.

    Raises:
        PartialError: if either is not the tensor that is trained.
    """
    check_own(full, packed, blocks)
    values = Overlay.apply(packed, full, blocks)
    if torch.compiler.is_compiling():  # no subclass to trace
        return values
    reading = values.as_subclass(Reading)
    reading._source = None if blocks.whole else Source(full, packed, blocks)
    reading._blocks = blocks
    return reading


def is_reading_of(value: Any, blocks: PackedBlocks) -> bool:
    """What :func:`read` has returned for these blocks, not something computed from it."""
    return isinstance(value, Reading) and value.__dict__.get("_blocks") is blocks


def check_own(full: Any, packed: Any, blocks: PackedBlocks) -> None:
    """Refuse gradients that would not arrive, or would arrive at a value that was not used.

    Raises:
        PartialError: if the weight was unfrozen, or ``torch.func`` is at work.
    """
    swapped = packed is not blocks.packed and not isinstance(packed, nn.Parameter)
    if swapped or (
        not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack()
    ):
        raise PartialError(
            f"{blocks.name}: torch.func does not see which blocks of this weight are trained, so "
            "its packed parameter cannot be replaced for a call or transformed. Remedy: call "
            "remove() on the Partial first, or functional_call with other parameters only and "
            "loss.backward()"
        )
    if full.requires_grad:
        raise PartialError(
            f"{blocks.name} requires a gradient, but only its selected blocks are trained. Remedy: "
            "leave requires_grad as make_partial has set it, or call remove() on the Partial"
        )


def _source(value: Any, *others: Any) -> Source | None:
    """The source of a reading, if it is the only one among the arguments."""
    if not isinstance(value, Reading) or any(isinstance(o, Reading) for o in others):
        return None
    return value.__dict__.get("_source")  # a result of .to(), say, is a reading of nothing


def _named(
    rule: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Keyword arguments by the rule's names; None for a form of the call that it does not know,
    which is left to PyTorch (``out_dtype=``, deprecated orders, a mistake)."""
    signature, positional = _FORMS[rule]
    if not kwargs and len(args) in positional:  # the usual one
        return kwargs
    names = signature.parameters
    named = {k if k in names else _ALSO_CALLED.get(k, k): v for k, v in kwargs.items()}
    try:
        signature.bind(*args, **named)
    except TypeError:
        return None
    return named


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    source = _source(weight, input)
    if source is None or source.full.ndim != 2:
        return NotImplemented
    return linear(input, source.full, source.packed, _plain(bias), source.blocks, source.transposed)


def _matmul(input: Tensor, other: Tensor) -> Any:
    source = _source(other, input)
    if source is None or source.full.ndim != 2 or input.ndim == 0:
        return NotImplemented
    straight = not source.transposed
    return linear(input, source.full, source.packed, None, source.blocks, straight)


def _mm(input: Tensor, other: Tensor) -> Any:
    return _matmul(input, other) if input.ndim == 2 else NotImplemented


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    source = _source(mat2, mat1)
    columns = mat2.shape[-1:]
    if source is None or (beta, alpha) != (1, 1) or input.shape != columns or mat1.ndim != 2:
        return NotImplemented
    return linear(
        mat1, source.full, source.packed, _plain(input), source.blocks, not source.transposed
    )


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    source = _source(weight, input)
    if source is None or source.transposed or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += source.full.shape[0]
    return SparseRows.apply(source.packed, input, source.full, source.blocks, padding_idx)


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    source = _source(weight, input)
    if source is None or source.transposed:
        return NotImplemented
    return conv(
        input, source.full, source.packed, _plain(bias), source.blocks,
        stride, padding, dilation, groups,
    )  # fmt: skip


def _getitem(input: Tensor, index: Any) -> Any:
    source = _source(input)
    if source is None or source.transposed or source.full.ndim < 2:
        return NotImplemented
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32):
        if index.ndim:
            index = torch.where(index < 0, index + source.full.shape[0], index).long()
            return SparseRows.apply(source.packed, index, source.full, source.blocks, None)
        index = int(index)
    if source.full.ndim < 3 or isinstance(index, bool) or not isinstance(index, int):
        return NotImplemented
    return one_expert(index, source.full, source.packed, source.blocks)


def _grouped_mm(
    input: Tensor, other: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    source = _source(other, input)
    if source is None or source.full.ndim != 3 or input.ndim != 2:
        return NotImplemented
    if offs is None or bias is not None or out_dtype is not None:
        return NotImplemented
    return grouped_mm(input, source.full, source.packed, offs, source.blocks, source.transposed)


def _flipped(input: Tensor) -> Any:
    """The weight with its last two dimensions exchanged, still a reading."""
    source = _source(input)
    if source is None:
        return NotImplemented
    flipped = input.as_subclass(Tensor).transpose(-2, -1).as_subclass(Reading)
    flipped._source = replace(source, transposed=not source.transposed)
    return flipped


def _flipped_matrix(input: Tensor) -> Any:
    return _flipped(input) if input.ndim == 2 else NotImplemented


def _transpose(input: Tensor, dim0: Any, dim1: Any) -> Any:
    n = input.ndim
    if not all(isinstance(d, int) and -n <= d < n for d in (dim0, dim1)):
        return NotImplemented
    last_two = {dim0 % n, dim1 % n} == {n - 2, n - 1}
    return _flipped(input) if last_two else NotImplemented


def _deepcopy(self: Tensor, memo: Any) -> Tensor:
    """Modules may keep what they read last (recurrent ones do): a copy needs its values alone."""
    return memo.setdefault(id(self), self.as_subclass(Tensor).detach().clone())


def _reduce(self: Tensor, protocol: Any) -> Any:
    return self.as_subclass(Tensor).detach().__reduce_ex__(protocol)


def _plain(tensor: Tensor | None) -> Tensor | None:
    """A bias that is a reading itself is taken as it is, by its graph."""
    return tensor.as_subclass(Tensor) if isinstance(tensor, Reading) else tensor


_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    F.embedding: _embedding,
    Tensor.__getitem__: _getitem,
    Tensor.__deepcopy__: _deepcopy,
    Tensor.__reduce_ex__: _reduce,
    torch._grouped_mm: _grouped_mm,
    torch.transpose: _transpose,
    Tensor.transpose: _transpose,
    Tensor.T.__get__: _flipped_matrix,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _flipped,  # type: ignore[attr-defined]
    torch.t: _flipped_matrix,
    Tensor.t: _flipped_matrix,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, Tensor.mm), _mm),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _conv),
}


def _form(rule: Callable[..., Any]) -> tuple[inspect.Signature, range]:
    """The rule's arguments, and how many of them may come by position."""
    signature = inspect.signature(rule)
    ordinary = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    least = sum(p.default is p.empty for p in ordinary)
    return signature, range(least, len(ordinary) + 1)


_FORMS = {rule: _form(rule) for rule in set(_RULES.values())}
#: Names that some functions have for an argument that others call differently.
_ALSO_CALLED = {"mat2": "other", "self": "input"}

__all__ = ["Reading", "check_own", "is_reading_of", "read"]
