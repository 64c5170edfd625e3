"""Plain definitions of every operator, in float64 and one example at a time: the oracle.

Nothing here is fast. Tests compare each implementation against these.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def blocks_of(rows: int, cols: int, br: int, bc: int) -> list[tuple[slice, slice]]:
    return [
        (slice(r, min(r + br, rows)), slice(c, min(c + bc, cols)))
        for r in range(0, rows, br)
        for c in range(0, cols, bc)
    ]


def cross_influence(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad = Σ_j left_jᵀ right_j``, ``sq[b, j] = ‖block b of left_jᵀ right_j‖²`` and
    ``dots[k, j] = ⟨left_jᵀ right_j, directions_k⟩``."""
    left, right = left.double(), right.double()
    bounds = offsets.tolist()
    parts = [left[a:b].T @ right[a:b] for a, b in pairwise(bounds)]
    rows, cols = left.shape[1], right.shape[1]
    grad = torch.zeros(rows, cols, dtype=torch.float64)
    blocks = blocks_of(rows, cols, block_rows, block_cols)
    sq = torch.zeros(len(blocks), len(parts), dtype=torch.float64)
    n_dir = 0 if directions is None else directions.shape[0]
    dots = torch.zeros(n_dir, len(parts), dtype=torch.float64)
    for j, part in enumerate(parts):
        grad += part
        for b, (rs, cs) in enumerate(blocks):
            sq[b, j] = part[rs, cs].square().sum()
        for k in range(n_dir):
            assert directions is not None
            dots[k, j] = (part * directions[k].double()).sum()
    return grad, sq, dots


def embedding_influence(
    ids: Tensor,
    grad_out: Tensor,
    offsets: Tensor,
    num_rows: int,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for an embedding: its left factor is the one-hot matrix of ``ids``."""
    onehot = torch.nn.functional.one_hot(ids.long(), num_rows)
    return cross_influence(onehot, grad_out, offsets, block_rows, block_cols, directions)


def sparse_wgrad(
    left: Tensor, right: Tensor, ids: Tensor, block_rows: int, block_cols: int
) -> Tensor:
    """Selected blocks of ``leftᵀ right``, packed ``[n, block_rows, block_cols]``."""
    grad = left.double().T @ right.double()
    blocks = blocks_of(grad.shape[0], grad.shape[1], block_rows, block_cols)
    packed = torch.zeros(ids.numel(), block_rows, block_cols, dtype=torch.float64)
    for n, block in enumerate(ids.tolist()):
        part = grad[blocks[block]]
        packed[n, : part.shape[0], : part.shape[1]] = part
    return packed


def expert_wgrad(left: Tensor, right: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    """``left_eᵀ right_e`` over the tokens of each expert e in ``ids``, ``[n, rows, cols]``."""
    bounds, products = offsets.tolist(), []
    for e in ids.tolist():
        a, b = bounds[e], bounds[e + 1]
        products.append(left[a:b].double().T @ right[a:b].double())
    empty = torch.zeros(0, left.shape[1], right.shape[1], dtype=torch.float64)
    return torch.stack(products) if products else empty


def block_stats(matrix: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """Rows: sum of squares, sum of absolute values, largest absolute value, non-finite count."""
    out = []
    for block in blocks_of(matrix.shape[0], matrix.shape[1], block_rows, block_cols):
        x = matrix[block].double()
        finite = x[torch.isfinite(x)].abs()
        out.append(
            [
                finite.square().sum().item(),
                finite.sum().item(),
                finite.max().item() if finite.numel() else 0.0,
                float((~torch.isfinite(x)).sum().item()),
            ]
        )
    return torch.tensor(out, dtype=torch.float64).T


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2); ``step`` >= 1."""
    param, grad = param.double(), grad.double()
    grad = -grad if maximize else grad
    param = param * (1 - lr * weight_decay)
    exp_avg = exp_avg.double() * beta1 + grad * (1 - beta1)
    exp_avg_sq = exp_avg_sq.double() * beta2 + grad.square() * (1 - beta2)
    denom = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    return param - lr / (1 - beta1**step) * exp_avg / denom, exp_avg, exp_avg_sq
