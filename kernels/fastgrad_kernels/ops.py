"""The operators as ``torch.library`` custom ops: ``torch.ops.fastgrad.*``.

The only file that registers anything. Every op has an eager implementation that runs on any
device, a fake (shape-only) one for ``torch.compile`` and meta tensors, argument checks that
run before any work, and a FLOP formula where it multiplies matrices.

Common terms. A weight gradient is ``leftᵀ right`` with ``left [tokens, rows]`` and ``right
[tokens, cols]``. For ``nn.Linear`` left is the gradient of the output and right the input; for
transformers' ``Conv1D``, whose weight is transposed, the other way round. ``offsets`` is int64
``[n_examples + 1]`` and ascending: example j owns tokens ``offsets[j]:offsets[j + 1]``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastgrad_kernels import cpu

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"fastgrad_kernels: {message}")


def _check_factors(left: Tensor, right: Tensor) -> None:
    _check(
        left.ndim == right.ndim == 2,
        f"factors must be matrices, got {left.ndim}-D and "
        f"{right.ndim}-D; flatten examples and tokens first",
    )
    _check(
        left.shape[0] == right.shape[0],
        f"left has {left.shape[0]} tokens, right "
        f"{right.shape[0]}; both factors of a gradient have one row per token",
    )
    _check(
        left.dtype in _FLOATS and left.dtype == right.dtype,
        f"dtypes {left.dtype} and {right.dtype}: both factors must have the same float dtype",
    )
    _check(left.device == right.device, f"left is on {left.device}, right on {right.device}")


def _check_offsets(offsets: Tensor, tokens: int) -> None:
    _check(
        offsets.ndim == 1 and offsets.dtype == torch.int64 and offsets.numel() >= 1,
        "offsets must be a one-dimensional int64 tensor [n_examples + 1]",
    )
    bounds = offsets.tolist()
    _check(
        bounds[0] == 0 and bounds[-1] == tokens and bounds == sorted(bounds),
        f"offsets {bounds[:1]}..{bounds[-1:]} must rise from 0 to the {tokens} tokens given: "
        "every token belongs to exactly one example",
    )


def _check_block(block_rows: int, block_cols: int) -> None:
    _check(block_rows > 0 and block_cols > 0, f"block {block_rows}x{block_cols} is empty")


def _n_blocks(rows: int, cols: int, block_rows: int, block_cols: int) -> int:
    return -(-rows // block_rows) * -(-cols // block_cols)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@torch.library.custom_op("fastgrad::cross_influence", mutates_args=())
def cross_influence(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None = None,
    want_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight gradient and its per-example, per-block squared norms in one pass.

    Args:
        left: ``[tokens, rows]`` float64, float32, bfloat16 or float16.
        right: ``[tokens, cols]``, same dtype and device.
        offsets: example boundaries, see the module's docstring.
        block_rows, block_cols: size of a block; as large as the matrix for one block in all.
        directions: ``[k, rows, cols]`` target directions for signed influence, or None.
        want_grad: False if the gradient itself is not needed.

    Returns:
        ``grad [rows, cols]`` (empty if not wanted), ``sq [n_blocks, n_examples]`` squared
        Frobenius norms, ``dots [k, n_examples]``; float32 (float64 for float64 inputs),
        accumulated in that precision whatever the input's dtype.

    Raises:
        ValueError: for mismatched shapes, dtypes, devices, or offsets that do not cover the
            tokens; before any work is done.
    """
    _check_factors(left, right)
    _check_block(block_rows, block_cols)
    _check_offsets(offsets, left.shape[0])
    if directions is not None:
        _check(
            directions.shape[1:] == (left.shape[1], right.shape[1]),
            f"directions {tuple(directions.shape)} do not fit a gradient of shape "
            f"{(left.shape[1], right.shape[1])}",
        )
    return cpu.cross_influence(left, right, offsets, block_rows, block_cols, directions, want_grad)


@cross_influence.register_fake
def _(left, right, offsets, block_rows, block_cols, directions=None, want_grad=True):  # type: ignore[no-untyped-def]
    rows, cols, n = left.shape[1], right.shape[1], offsets.shape[0] - 1
    dtype = _wide(left)
    grad = left.new_empty((rows, cols) if want_grad else (0,), dtype=dtype)
    n_dir = 0 if directions is None else directions.shape[0]
    sq = left.new_empty(_n_blocks(rows, cols, block_rows, block_cols), n, dtype=dtype)
    return grad, sq, left.new_empty(n_dir, n, dtype=dtype)


@torch.library.custom_op("fastgrad::embedding_influence", mutates_args=())
def embedding_influence(
    ids: Tensor,
    grad_out: Tensor,
    offsets: Tensor,
    num_rows: int,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-example, per-block squared norms of an embedding's gradient.

    Args:
        ids: int64 ``[tokens]``, the rows looked up.
        grad_out: ``[tokens, cols]``, gradient of the rows that came out.
        offsets, block_rows, block_cols, directions: as in :func:`cross_influence`.
        num_rows: size of the table.

    Returns:
        ``sq [n_blocks, n_examples]`` and ``dots [k, n_examples]``. A token that occurs twice in
        an example is added up before squaring.

    Raises:
        ValueError: for mismatched shapes or ids outside the table.
    """
    _check(ids.ndim == 1 and ids.dtype == torch.int64, "ids must be one-dimensional int64")
    _check(
        grad_out.ndim == 2 and grad_out.shape[0] == ids.shape[0],
        f"{ids.shape[0]} ids but grad_out of shape {tuple(grad_out.shape)}",
    )
    _check_block(block_rows, block_cols)
    _check_offsets(offsets, ids.shape[0])
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        _check(low >= 0 and high < num_rows, f"ids {low}..{high} outside a table of {num_rows}")
    return cpu.embedding_influence(
        ids, grad_out, offsets, num_rows, block_rows, block_cols, directions
    )


@embedding_influence.register_fake
def _(ids, grad_out, offsets, num_rows, block_rows, block_cols, directions=None):  # type: ignore[no-untyped-def]
    n, dtype = offsets.shape[0] - 1, _wide(grad_out)
    blocks = _n_blocks(num_rows, grad_out.shape[1], block_rows, block_cols)
    n_dir = 0 if directions is None else directions.shape[0]
    return grad_out.new_empty(blocks, n, dtype=dtype), grad_out.new_empty(n_dir, n, dtype=dtype)


@torch.library.custom_op("fastgrad::sparse_wgrad", mutates_args=())
def sparse_wgrad(
    left: Tensor, right: Tensor, ids: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    """Weight gradient of the selected blocks only.

    Args:
        left, right: ``[tokens, rows]`` and ``[tokens, cols]``.
        ids: int64 ``[n]``, block numbers (row by row), each once.
        block_rows, block_cols: size of a block.

    Returns:
        ``[n, block_rows, block_cols]``, float32 (float64 for float64 inputs); edge blocks are
        padded with zeros.

    Raises:
        ValueError: for mismatched factors or block numbers out of range.
    """
    _check_factors(left, right)
    _check_block(block_rows, block_cols)
    count = _n_blocks(left.shape[1], right.shape[1], block_rows, block_cols)
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        _check(low >= 0 and high < count, f"blocks {low}..{high} outside 0..{count - 1}")
    return cpu.sparse_wgrad(left, right, ids, block_rows, block_cols)


@sparse_wgrad.register_fake
def _(left, right, ids, block_rows, block_cols):  # type: ignore[no-untyped-def]
    return left.new_empty(ids.shape[0], block_rows, block_cols, dtype=_wide(left))


@torch.library.custom_op("fastgrad::block_stats", mutates_args=())
def block_stats(matrix: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """Per block: sum of squares, sum of absolute values, largest absolute value (all over the
    finite entries) and the number of non-finite entries; ``[4, n_blocks]`` float32.

    Args:
        matrix: ``[rows, cols]`` of any float dtype.
        block_rows, block_cols: size of a block.

    Raises:
        ValueError: if ``matrix`` is not a float matrix.
    """
    _check(
        matrix.ndim == 2 and matrix.dtype in _FLOATS,
        f"block_stats needs a float matrix, got {matrix.ndim}-D {matrix.dtype}",
    )
    _check_block(block_rows, block_cols)
    return cpu.block_stats(matrix, block_rows, block_cols)


@block_stats.register_fake
def _(matrix, block_rows, block_cols):  # type: ignore[no-untyped-def]
    blocks = _n_blocks(matrix.shape[0], matrix.shape[1], block_rows, block_cols)
    return matrix.new_empty(4, blocks, dtype=_wide(matrix))


@torch.library.custom_op(
    "fastgrad::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps")
)
def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """AdamW (arXiv 1711.05101) on a list of tensors, in place; ``steps`` are counted up first.

    Args:
        params: float tensors of any precision up to that of the moments.
        grads: same shapes.
        exp_avgs, exp_avg_sqs: moments, float32 (or float64 for float64 parameters).
        steps: float32 scalars, one per tensor.
        lr: scalar float tensor on the host.

    Raises:
        ValueError: if the lists differ in length or a pair in shape.
    """
    lengths = {len(params), len(grads), len(exp_avgs), len(exp_avg_sqs), len(steps)}
    _check(len(lengths) == 1, f"lists of different lengths: {sorted(lengths)}")
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        _check(
            p.shape == g.shape == m.shape == v.shape,
            f"shapes differ: parameter {tuple(p.shape)}, gradient {tuple(g.shape)}, moments "
            f"{tuple(m.shape)} and {tuple(v.shape)}",
        )
    cpu.adamw_(
        params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, maximize
    )


@adamw_.register_fake
def _(params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, maximize):  # type: ignore[no-untyped-def]
    return None


@register_flop_formula(torch.ops.fastgrad.cross_influence)
def _cross_influence_flops(left_shape, right_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    """The weight-gradient product; the squared sums (3 per weight and example) are not counted,
    as no counter of PyTorch's counts elementwise work."""
    return 2 * left_shape[0] * left_shape[1] * right_shape[1]


@register_flop_formula(torch.ops.fastgrad.sparse_wgrad)
def _sparse_wgrad_flops(left_shape, right_shape, ids_shape, block_rows, block_cols, **kwargs):  # type: ignore[no-untyped-def]
    return 2 * left_shape[0] * ids_shape[0] * block_rows * block_cols
