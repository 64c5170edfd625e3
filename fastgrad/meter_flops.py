"""Floating-point operations of one training step: those of its products, as PyTorch counts them.

``torch.utils.flop_counter`` counts matrix products, convolutions and attention at two operations
per multiply-add; fastgrad's own operators bring their formulas along. It has none for attention on
a CPU, products by expert and products with a vector: they are added here, for this count alone.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import fastgrad_kernels.ops  # noqa: F401  (brings the formulas of fastgrad's operators along)

#: Said of every count.
LEFT_OUT = "elementwise operations, the optimizer's among them, are not counted"

_aten, _own = torch.ops.aten, torch.ops.fastgrad
# Products and the like that nobody has a formula for; what they take is named, not counted.
_NAMED = {
    "_int_mm", "_scaled_grouped_mm", "_weight_int4pack_mm", "_weight_int8pack_mm", "addbmm",
    "_trilinear", "_cdist_forward", "_cdist_backward", "_cudnn_rnn", "_cudnn_rnn_backward",
    "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "miopen_rnn", "_fft_c2c", "_fft_r2c",
    "_fft_c2r", "linalg_svd", "_linalg_svd", "_linalg_eigh", "linalg_qr", "linalg_inv_ex",
    "linalg_cholesky_ex", "linalg_lu_factor_ex", "_linalg_solve_ex",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_fused_attention_overrideable_backward",
}  # fmt: skip
# Of these namespaces all operators but the named ones are elementwise, look-ups or exchanges.
_ELEMENTWISE = {"aten", "prim", "prims", "fastgrad", "c10d", "_c10d_functional", "profiler",
                "rngprims", "higher_order"}  # fmt: skip


class StepFlops:
    """Counts what runs between :meth:`start` and :meth:`stop`, the backward pass included.

    Kernels that Python launches without an operator are not seen by any counter of this kind.

    Attributes:
        uncounted: names of operators that ran and whose operations are not in the count, although
            they are more than elementwise work, or may be.
    """

    def __init__(self) -> None:
        self._watch = _Unknown()
        self._counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
        self.uncounted: tuple[str, ...] = ()

    def start(self) -> None:
        # Compiled code would be met by a mode that it cannot be compiled under, and never be
        # compiled again; told to run eagerly it is compiled once this has ended.
        self._stance: Any = contextlib.nullcontext()
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            self._stance = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        self._watch.__enter__()
        self._counter.__enter__()

    def stop(self) -> float:
        """The number of operations."""
        self._counter.__exit__(None, None, None)
        self._watch.__exit__(None, None, None)
        self._stance.__exit__(None, None, None)
        self.uncounted = tuple(sorted(self._watch.found))
        return float(self._counter.get_total_flops())


class _Unknown(TorchDispatchMode):
    """Outside the counter, which hands on what it has taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "_overloadpacket", None)
        if packet is not None and packet not in flop_registry and packet not in _FORMULAS:
            if func.namespace not in _ELEMENTWISE:
                self.found.add(f"{func.namespace}::{packet.__name__}")
            elif packet.__name__ in _NAMED:
                self.found.add(packet.__name__)
        return func(*args, **(kwargs or {}))


# -- formulas: of shapes, unless marked to take the tensors themselves ------------------------


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad_out: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad_out, query, key, value))


def _grouped(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """Each row of one factor, or each column, meets one group's matrix: the groups cover all."""
    groups = left[0] if len(left) == len(right) == 3 else 1
    return int(2 * groups * left[-2] * left[-1] * right[-1])


def _matrix_vector(matrix: Any, vector: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * matrix[0] * matrix[1])


def _added_matrix_vector(given: Any, matrix: Any, vector: Any, *args: Any, **kwargs: Any) -> int:
    return _matrix_vector(matrix, vector)


def _dot(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * left[0])


def _experts(left: Any, right: Any, offsets: Any, ids: Any, *args: Any, **kwargs: Any) -> int:
    """Of the tokens that the selected experts really had."""
    tokens = int((offsets[1:] - offsets[:-1])[ids].sum())
    return 2 * tokens * left.shape[1] * right.shape[1]


def _experts_added(packed: Any, *args: Any, **kwargs: Any) -> int:
    return _experts(*args, **kwargs)


_taking_tensors: tuple[Any, ...] = (_experts, _experts_added)
for _formula in _taking_tensors:
    _formula._get_raw = True

_FORMULAS: dict[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._grouped_mm: _grouped,
    _aten.mv: _matrix_vector,
    _aten.addmv: _added_matrix_vector,
    _aten.dot: _dot,
    _aten.vdot: _dot,
    _own.expert_wgrad: _experts,
    _own.expert_wgrad_add_: _experts_added,
}
