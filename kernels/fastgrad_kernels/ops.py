"""The operators as ``torch.library`` custom ops: ``torch.ops.fastgrad.*``.

The only file that registers anything. Every op has an eager implementation that runs on any
device, a fake (shape-only) one for ``torch.compile`` and meta tensors, argument checks that
run before any work, and a FLOP formula where it multiplies matrices. On a GPU, and under
``TRITON_INTERPRET=1``, an op runs its Triton kernel; where that cannot do a call, a
:class:`~fastgrad_kernels.dispatch.FallbackWarning` names the reason and blocked PyTorch runs.

Common terms. A weight gradient is ``leftᵀ right`` with ``left [tokens, rows]`` and ``right
[tokens, cols]``. For ``nn.Linear`` left is the gradient of the output and right the input; for
transformers' ``Conv1D``, whose weight is transposed, the other way round. ``offsets`` is int64
``[n_examples + 1]`` and ascending: example j owns tokens ``offsets[j]:offsets[j + 1]``. Keep it
on the CPU: the host looks at its values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastgrad_kernels import adamw_cpu, cpu, dispatch
from fastgrad_kernels.checks import (
    FLOATS,
    check,
    check_block,
    check_blocks,
    check_directions,
    check_factors,
    check_gradients,
    check_lookups,
    check_offsets,
    check_target,
    check_update,
    n_blocks,
)
from fastgrad_kernels.configs import on_device
from fastgrad_kernels.layout import accumulation_dtype, matrix_view


def _influence(
    op: str,
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None,
    want_grad: bool,
    into: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
    bounds: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check, choose and run; the gradient comes in ``grad_dtype`` or is added to ``into``.
    ``bounds``: what ``offsets`` holds, if that is known and rises from 0."""
    check_factors(left, right)
    check_block(block_rows, block_cols)
    if bounds is None or bounds[-1] != left.shape[0]:
        check_offsets(offsets, left.shape[0])
    check_directions(directions, left.shape[1], right.shape[1], left.device)
    if dispatch.takes(left):
        from fastgrad_kernels import cross_influence as fused

        if dispatch.kernel(op, left, fused.unsupported(left, right, block_rows, block_cols)):
            return fused.cross_influence(
                left, right, offsets, block_rows, block_cols, directions, want_grad,
                into=into, grad_dtype=grad_dtype,
            )  # fmt: skip
    if bounds is None:
        bounds = offsets.tolist()
    grad, sq, dots = cpu.cross_influence(
        left, right, bounds, block_rows, block_cols, directions, want_grad
    )
    if into is not None:
        grad = into.add_(grad)
    elif grad_dtype is not None and grad_dtype != grad.dtype:
        grad = grad.to(grad_dtype)
    return grad, sq, dots


@torch.library.custom_op("fastgrad::cross_influence", mutates_args=())
def cross_influence(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None = None,
    want_grad: bool = True,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight gradient and its per-example, per-block squared norms in one pass.

    Args:
        left: ``[tokens, rows]`` float64, float32, bfloat16 or float16.
        right: ``[tokens, cols]``, same dtype and device.
        offsets: example boundaries, see the module's docstring.
        block_rows, block_cols: size of a block; as large as the matrix for one block in all.
        directions: ``[k, rows, cols]`` target directions for signed influence, or None.
        want_grad: False if the gradient itself is not needed.
        grad_dtype: dtype to round the gradient to; by default that of the sums.

    Returns:
        ``grad [rows, cols]`` (empty if not wanted), ``sq [n_blocks, n_examples]`` squared
        Frobenius norms, ``dots [k, n_examples]``; float32 (float64 for float64 inputs),
        accumulated in that precision whatever the input's dtype.

    Raises:
        ValueError: for mismatched shapes, dtypes, devices, or offsets that do not cover the
            tokens; before any work is done.
    """
    return _influence(
        "cross_influence", left, right, offsets, block_rows, block_cols, directions, want_grad,
        grad_dtype=grad_dtype,
    )  # fmt: skip


@cross_influence.register_fake
def _(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None = None,
    want_grad: bool = True,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols, n = left.shape[1], right.shape[1], offsets.shape[0] - 1
    dtype = accumulation_dtype(left)
    grad = left.new_empty((rows, cols) if want_grad else (0,), dtype=grad_dtype or dtype)
    n_dir = 0 if directions is None else directions.shape[0]
    sq = left.new_empty(n_blocks(rows, cols, block_rows, block_cols), n, dtype=dtype)
    return grad, sq, left.new_empty(n_dir, n, dtype=dtype)


def influence(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None = None,
    want_grad: bool = True,
    grad_dtype: torch.dtype | None = None,
    bounds: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cross_influence` for a backward pass that is not traced itself.

    On a CPU and if nobody watches operators (FLOP counters do, and fake tensors) it leaves out
    PyTorch's dispatcher, whose code has left the cache whenever a large product is over.
    ``bounds`` are the numbers that ``offsets`` holds, for whoever has them.
    """
    args = (left, right, offsets, block_rows, block_cols, directions, want_grad)
    plain = type(left) is type(right) is Tensor and left.is_cpu
    if not plain or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
        return cross_influence(*args, grad_dtype)
    return _influence("cross_influence", *args, grad_dtype=grad_dtype, bounds=bounds)


@torch.library.custom_op("fastgrad::cross_influence_add_", mutates_args=("grad",))
def cross_influence_add_(
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`cross_influence` that adds the weight gradient to ``grad`` in place.

    Args:
        grad: contiguous ``[rows, cols]``, float32 (float64 for float64 factors).

    Returns:
        ``sq`` and ``dots`` of this call alone, without what ``grad`` held before.

    Raises:
        ValueError: as :func:`cross_influence`, and for a ``grad`` that does not fit.
    """
    check_factors(left, right)
    check_target(grad, (left.shape[1], right.shape[1]), left)
    return _influence(
        "cross_influence_add_", left, right, offsets, block_rows, block_cols, directions, True,
        into=grad,
    )[1:]  # fmt: skip


@cross_influence_add_.register_fake
def _(grad, left, right, offsets, block_rows, block_cols, directions=None):  # type: ignore[no-untyped-def]
    n, dtype = offsets.shape[0] - 1, accumulation_dtype(left)
    n_dir = 0 if directions is None else directions.shape[0]
    blocks = n_blocks(left.shape[1], right.shape[1], block_rows, block_cols)
    return left.new_empty(blocks, n, dtype=dtype), left.new_empty(n_dir, n, dtype=dtype)


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
    check_lookups(ids, grad_out, num_rows)
    check_block(block_rows, block_cols)
    check_offsets(offsets, ids.shape[0])
    check_directions(directions, num_rows, grad_out.shape[1], grad_out.device)
    args = (ids, grad_out, offsets, num_rows, block_rows, block_cols, directions)
    if dispatch.takes(grad_out):
        from fastgrad_kernels import embedding

        if dispatch.kernel("embedding_influence", grad_out, embedding.unsupported(*args)):
            with on_device(grad_out):
                return embedding.embedding_influence(*args)
    return cpu.embedding_influence(*args)


@embedding_influence.register_fake
def _(ids, grad_out, offsets, num_rows, block_rows, block_cols, directions=None):  # type: ignore[no-untyped-def]
    n, dtype = offsets.shape[0] - 1, accumulation_dtype(grad_out)
    blocks = n_blocks(num_rows, grad_out.shape[1], block_rows, block_cols)
    n_dir = 0 if directions is None else directions.shape[0]
    return grad_out.new_empty(blocks, n, dtype=dtype), grad_out.new_empty(n_dir, n, dtype=dtype)


@torch.library.custom_op("fastgrad::norm_gradients", mutates_args=())
def norm_gradients(
    x: Tensor,
    grad_out: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    mean: Tensor | None = None,
    want_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each example's gradient of the weight and bias of a LayerNorm or (no mean) RMSNorm.

    ``weight[j] = Σ_{t in j} grad_out_t (x_t - mean_t) rstd_t`` and ``bias[j] = Σ grad_out_t``.

    Args:
        x, grad_out: ``[tokens, d]`` floats; their dtypes may differ.
        rstd, mean: ``[tokens]``, as the forward pass has computed them.
        offsets: as in :func:`cross_influence`.
        want_bias: also sum ``grad_out``.

    Returns:
        ``weight [n, d]`` and ``bias [n, d]`` (``[0, d]`` if not wanted), float32 (float64 for
        float64 ``x``).

    Raises:
        ValueError: for mismatched shapes, dtypes, devices or offsets.
    """
    check(
        x.ndim == 2 and x.shape == grad_out.shape,
        f"x {tuple(x.shape)} and grad_out {tuple(grad_out.shape)} must be matrices of one shape",
    )
    for name, t in (("x", x), ("grad_out", grad_out)):
        check(t.dtype in FLOATS, f"{name} is {t.dtype}: a float type is needed")
    for name, s in (("rstd", rstd), ("mean", mean)):
        if s is not None:
            check(s.shape == x.shape[:1], f"{name} {tuple(s.shape)} for {x.shape[0]} tokens")
            check(s.device == x.device, f"{name} is on {s.device}, x on {x.device}")
    check_offsets(offsets, x.shape[0])
    if dispatch.takes(x):
        from fastgrad_kernels import norm_taps

        reason = norm_taps.unsupported(x, grad_out, rstd, mean)
        if dispatch.kernel("norm_gradients", x, reason):
            wide = (x.contiguous(), grad_out.contiguous(), rstd.contiguous())
            mean = None if mean is None else mean.contiguous()
            with on_device(x):
                return norm_taps.norm_taps(
                    *wide, dispatch.moved(offsets, x.device), mean, want_bias
                )
    return cpu.norm_gradients(x, grad_out, rstd, offsets, mean, want_bias)


@norm_gradients.register_fake
def _(x, grad_out, rstd, offsets, mean=None, want_bias=False):  # type: ignore[no-untyped-def]
    n, d, dtype = offsets.shape[0] - 1, x.shape[1], accumulation_dtype(x)
    return x.new_empty(n, d, dtype=dtype), x.new_empty(n if want_bias else 0, d, dtype=dtype)


def _blocks(
    op: str,
    left: Tensor,
    right: Tensor,
    ids: Tensor,
    block_rows: int,
    block_cols: int,
    into: Tensor | None = None,
) -> Tensor:
    check_factors(left, right)
    check_block(block_rows, block_cols)
    check_blocks(ids, left.shape[1], right.shape[1], block_rows, block_cols)
    check(ids.device == left.device, f"block numbers on {ids.device}, factors on {left.device}")
    if dispatch.takes(left):
        from fastgrad_kernels import sparse_wgrad as kernel

        reason = kernel.unsupported(left, right, ids, block_rows, block_cols)
        if dispatch.kernel(op, left, reason):
            return kernel.sparse_wgrad(left, right, ids, block_rows, block_cols, into=into)
    packed = cpu.sparse_wgrad(left, right, ids, block_rows, block_cols)
    return packed if into is None else into.add_(packed)


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
    return _blocks("sparse_wgrad", left, right, ids, block_rows, block_cols)


@sparse_wgrad.register_fake
def _(left, right, ids, block_rows, block_cols):  # type: ignore[no-untyped-def]
    return left.new_empty(ids.shape[0], block_rows, block_cols, dtype=accumulation_dtype(left))


@torch.library.custom_op("fastgrad::sparse_wgrad_add_", mutates_args=("packed",))
def sparse_wgrad_add_(packed: Tensor, left: Tensor, right: Tensor, ids: Tensor) -> None:
    """:func:`sparse_wgrad` that adds to ``packed`` in place.

    Args:
        packed: contiguous ``[n, block_rows, block_cols]``, float32 (float64 for float64 factors).

    Raises:
        ValueError: as :func:`sparse_wgrad`, and for a ``packed`` that does not fit.
    """
    check(packed.ndim == 3, f"packed gradient of shape {tuple(packed.shape)} is not 3-D")
    check_target(packed, (ids.numel(), *packed.shape[1:]), left)
    _blocks("sparse_wgrad_add_", left, right, ids, packed.shape[1], packed.shape[2], into=packed)


@sparse_wgrad_add_.register_fake
def _(packed, left, right, ids):  # type: ignore[no-untyped-def]
    return None


def _experts(
    op: str, left: Tensor, right: Tensor, offsets: Tensor, ids: Tensor, into: Tensor | None = None
) -> Tensor:
    check_factors(left, right)
    check_offsets(offsets, left.shape[0])
    check_blocks(ids, offsets.numel() - 1, 1, 1, 1)
    check(ids.device == left.device, f"expert numbers on {ids.device}, factors on {left.device}")
    if dispatch.takes(left):
        from fastgrad_kernels import sparse_wgrad as kernel

        reason = kernel.unsupported(left, right, ids, left.shape[1], right.shape[1])
        if dispatch.kernel(op, left, reason):
            there = dispatch.moved(offsets, left.device)
            return kernel.expert_wgrad(left, right, there, ids, into=into)
    packed = cpu.expert_wgrad(left, right, offsets, ids)
    return packed if into is None else into.add_(packed)


@torch.library.custom_op("fastgrad::expert_wgrad", mutates_args=())
def expert_wgrad(left: Tensor, right: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    """Weight gradient of the selected experts of a mixture-of-experts weight only.

    Args:
        left, right: ``[tokens, rows]`` and ``[tokens, cols]``, tokens sorted by expert.
        offsets: int64 ``[n_experts + 1]``: expert e has the tokens ``offsets[e]:offsets[e + 1]``.
        ids: int64 ``[n]``, the selected experts, each once.

    Returns:
        ``[n, rows, cols]``, float32 (float64 for float64 inputs); zeros for an expert without
        tokens.

    Raises:
        ValueError: for mismatched factors, offsets that do not cover the tokens, or experts out of
            range.
    """
    return _experts("expert_wgrad", left, right, offsets, ids)


@expert_wgrad.register_fake
def _(left, right, offsets, ids):  # type: ignore[no-untyped-def]
    shape = (ids.shape[0], left.shape[1], right.shape[1])
    return left.new_empty(shape, dtype=accumulation_dtype(left))


@torch.library.custom_op("fastgrad::expert_wgrad_add_", mutates_args=("packed",))
def expert_wgrad_add_(
    packed: Tensor, left: Tensor, right: Tensor, offsets: Tensor, ids: Tensor
) -> None:
    """:func:`expert_wgrad` that adds to ``packed`` in place.

    Args:
        packed: contiguous ``[n, rows, cols]``, float32 (float64 for float64 factors).

    Raises:
        ValueError: as :func:`expert_wgrad`, and for a ``packed`` that does not fit.
    """
    check_factors(left, right)
    check_target(packed, (ids.numel(), left.shape[1], right.shape[1]), left)
    _experts("expert_wgrad_add_", left, right, offsets, ids, packed)


@expert_wgrad_add_.register_fake
def _(packed, left, right, offsets, ids):  # type: ignore[no-untyped-def]
    return None


@torch.library.custom_op("fastgrad::grad_stats", mutates_args=())
def grad_stats(
    grads: Sequence[Tensor], block_rows: Sequence[int], block_cols: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Statistics of a whole list of gradients, per block and per tensor, in one launch.

    Args:
        grads: dense floats on one device, of any shapes: a tensor is seen as a matrix, leading
            dimension by all others; 1-D is one row.
        block_rows, block_cols: block size of each, as large as the matrix for one block in all.

    Returns:
        ``blocks [4, n_blocks of all]``, tensor after tensor, and ``tensors [4, n]``, float32
        (float64 if any gradient is): sum of squares, sum of absolute values and largest absolute
        value over the finite entries, and the number of non-finite entries.

    Raises:
        ValueError: naming the gradient that does not fit.
    """
    check_gradients(grads, block_rows, block_cols)
    if grads and dispatch.takes(grads[0]):
        from fastgrad_kernels import grad_stats as kernel

        if dispatch.kernel("grad_stats", grads[0], kernel.unsupported(grads)):
            grids = list(zip(block_rows, block_cols, strict=True))
            with on_device(grads[0]):
                found = kernel.grad_stats([g.contiguous() for g in grads], grids)
            return found.blocks.clone(), found.tensors.clone()  # two views of one tensor
    return cpu.grad_stats(grads, block_rows, block_cols)


@grad_stats.register_fake
def _(grads, block_rows, block_cols):  # type: ignore[no-untyped-def]
    wide = any(g.dtype == torch.float64 for g in grads)
    dtype = torch.float64 if wide else torch.float32
    matrices = [matrix_view(g) for g in grads]
    count = sum(
        n_blocks(m.shape[0], m.shape[1], r, c)
        for m, r, c in zip(matrices, block_rows, block_cols, strict=True)
        if m.numel()
    )
    like = grads[0] if grads else torch.empty(0)
    return like.new_empty(4, count, dtype=dtype), like.new_empty(4, len(grads), dtype=dtype)


@torch.library.custom_op("fastgrad::adamw_", mutates_args=(
    "params", "exp_avgs", "exp_avg_sqs", "steps", "fulls"
))  # fmt: skip
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    fulls: Sequence[Tensor],
    ids: Sequence[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    """AdamW (arXiv 1711.05101) on a list of tensors, in place; ``steps`` are counted up first.

    Args:
        params: float tensors of any precision up to that of the moments; packed blocks are
            ``[n, block_rows, block_cols]``.
        grads: same shapes.
        exp_avgs, exp_avg_sqs: moments, float32 (or float64 for float64 parameters).
        steps: float32, one element per tensor, or one per block.
        fulls, ids: empty, or per parameter the weight that new values are written through to
            (a matrix for packed blocks, an empty tensor for none) and the int64 ``[n]`` block
            numbers (an empty tensor for the whole weight).
        lr: scalar float tensor, on the host for host parameters, else on their device.
        grad_scale: gradients are divided by it. One element on the parameters' device.
        found_inf: if not zero, nothing is changed and no step is counted; ditto.
        seed: int64 element on that device: parameters in bfloat16 are rounded stochastically, the
            same way for the same seed, steps and list of tensors.

    Raises:
        ValueError: if the lists differ in length or a pair in shape or device; nothing is
            changed then.
    """
    check_update(params, grads, exp_avgs, exp_avg_sqs, steps, fulls, ids)
    args = (params, grads, exp_avgs, exp_avg_sqs, steps, fulls, ids, lr)
    hyper = (beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, seed)
    if params and dispatch.takes(params[0]):
        from fastgrad_kernels import adamw_lists

        if dispatch.kernel("adamw_", params[0], adamw_lists.unsupported(*args[:7])):
            adamw_lists.adamw_lists_(*args, *hyper)
            return
    adamw_cpu.adamw_(*args, *hyper)


@adamw_.register_fake
def _(*args, **kwargs):  # type: ignore[no-untyped-def]
    return None


def block_stats(matrix: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """:func:`grad_stats` of one matrix, ``[4, n_blocks]``.

    Raises:
        ValueError: if ``matrix`` is not a float matrix.
    """
    check(
        matrix.ndim == 2 and matrix.dtype in FLOATS,
        f"block_stats needs a float matrix, got {matrix.ndim}-D {matrix.dtype}",
    )
    check_block(block_rows, block_cols)
    return grad_stats([matrix], [block_rows], [block_cols])[0]


def _product_flops(left_shape, right_shape, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    """The weight-gradient product; the squared sums (3 per weight and example) are not counted,
    as no counter of PyTorch's counts elementwise work."""
    return 2 * left_shape[0] * left_shape[1] * right_shape[1]


@register_flop_formula(torch.ops.fastgrad.cross_influence)
def _cross_influence_flops(left_shape, right_shape, *args, **kwargs):  # type: ignore[no-untyped-def]
    return _product_flops(left_shape, right_shape)


@register_flop_formula(torch.ops.fastgrad.cross_influence_add_)
def _cross_influence_add_flops(grad_shape, left_shape, right_shape, *args, **kwargs):  # type: ignore[no-untyped-def]
    return _product_flops(left_shape, right_shape)


@register_flop_formula(torch.ops.fastgrad.sparse_wgrad)
def _sparse_wgrad_flops(left_shape, right_shape, ids_shape, block_rows, block_cols, **kwargs):  # type: ignore[no-untyped-def]
    return 2 * left_shape[0] * ids_shape[0] * block_rows * block_cols


@register_flop_formula(torch.ops.fastgrad.sparse_wgrad_add_)
def _sparse_wgrad_add_flops(packed_shape, left_shape, *args, **kwargs):  # type: ignore[no-untyped-def]
    return 2 * left_shape[0] * packed_shape[0] * packed_shape[1] * packed_shape[2]


@register_flop_formula(torch.ops.fastgrad.expert_wgrad)
def _expert_wgrad_flops(left_shape, right_shape, offsets_shape, ids_shape, *args, **kwargs):  # type: ignore[no-untyped-def]
    """Shapes do not tell how many tokens an expert has: the selected share of an even load."""
    share = ids_shape[0] / max(1, offsets_shape[0] - 1)
    return int(2 * left_shape[0] * left_shape[1] * right_shape[1] * share)
