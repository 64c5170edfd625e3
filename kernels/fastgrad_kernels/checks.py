"""Argument checks of the operators: every one runs before any work and names what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastgrad_kernels.dispatch import checked, mark_checked

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, message: str) -> None:
    if not condition:
        fail(message)


def fail(message: str) -> NoReturn:
    """Where a message would cost as much as the check: these run once per layer and step."""
    raise ValueError(f"fastgrad_kernels: {message}")


def check_factors(left: Tensor, right: Tensor) -> None:
    if not left.ndim == right.ndim == 2:
        fail(
            f"factors must be matrices, got {left.ndim}-D and "
            f"{right.ndim}-D; flatten examples and tokens first"
        )
    if left.shape[0] != right.shape[0]:
        fail(
            f"left has {left.shape[0]} tokens, right "
            f"{right.shape[0]}; both factors of a gradient have one row per token"
        )
    if left.dtype not in FLOATS or left.dtype != right.dtype:
        fail(f"dtypes {left.dtype} and {right.dtype}: both factors must have the same float dtype")
    if left.device != right.device:
        fail(f"left is on {left.device}, right on {right.device}")


def check_offsets(offsets: Tensor, tokens: int) -> None:
    """Offsets on a GPU are read by the host, which waits for them; pass them on the CPU."""
    if offsets.ndim != 1 or offsets.dtype != torch.int64 or offsets.numel() < 1:
        fail("offsets must be a one-dimensional int64 tensor [n_examples + 1]")
    if checked(offsets, tokens):
        return
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        fail(
            f"offsets {bounds[:1]}..{bounds[-1:]} must rise from 0 to the {tokens} tokens given: "
            "every token belongs to exactly one example"
        )
    mark_checked(offsets, tokens)


def check_block(block_rows: int, block_cols: int) -> None:
    if block_rows <= 0 or block_cols <= 0:
        fail(f"block {block_rows}x{block_cols} is empty")


def check_directions(directions: Tensor | None, rows: int, cols: int, device: torch.device) -> None:
    if directions is None:
        return
    check(
        directions.ndim == 3 and directions.shape[1:] == (rows, cols),
        f"directions {tuple(directions.shape)} do not fit a gradient of shape {(rows, cols)}",
    )
    check(
        directions.dtype in FLOATS and directions.device == device,
        f"directions are {directions.dtype} on {directions.device}; a float type on {device} is "
        "needed",
    )


def check_blocks(ids: Tensor, rows: int, cols: int, block_rows: int, block_cols: int) -> None:
    """Block numbers of a ``rows x cols`` matrix; those on a GPU are looked at once."""
    check(
        ids.ndim == 1 and ids.dtype == torch.int64,
        f"block numbers must be one-dimensional int64, got {ids.ndim}-D {ids.dtype}",
    )
    count = n_blocks(rows, cols, block_rows, block_cols)
    if ids.numel() and not checked(ids, count):
        low, high = int(ids.min()), int(ids.max())
        check(low >= 0 and high < count, f"blocks {low}..{high} outside 0..{count - 1}")
        mark_checked(ids, count)


def check_lookups(ids: Tensor, grad_out: Tensor, num_rows: int) -> None:
    check(ids.ndim == 1 and ids.dtype == torch.int64, "ids must be one-dimensional int64")
    check(
        grad_out.ndim == 2 and grad_out.shape[0] == ids.shape[0],
        f"{ids.shape[0]} ids but grad_out of shape {tuple(grad_out.shape)}",
    )
    check(
        grad_out.dtype in FLOATS and ids.device == grad_out.device,
        f"ids on {ids.device}, grad_out {grad_out.dtype} on {grad_out.device}: one device and a "
        "float type are needed",
    )
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        check(low >= 0 and high < num_rows, f"ids {low}..{high} outside a table of {num_rows}")


def check_target(into: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """What a gradient is added to: contiguous, in the precision of the sums."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    check(
        tuple(into.shape) == shape
        and into.dtype == wide
        and into.is_contiguous()
        and into.device == like.device,
        f"cannot add to {into.dtype} {tuple(into.shape)} with strides {into.stride()} on "
        f"{into.device}: a contiguous {wide} tensor {shape} on {like.device} is needed",
    )


def check_gradients(grads: Sequence[Tensor], rows: Sequence[int], cols: Sequence[int]) -> None:
    check(
        len(grads) == len(rows) == len(cols),
        f"{len(grads)} gradients, {len(rows)} and {len(cols)} block sizes: one each is needed",
    )
    for i, (g, r, c) in enumerate(zip(grads, rows, cols, strict=True)):
        check(g.dtype in FLOATS, f"gradient {i} is {g.dtype}: a float type is needed")
        check(g.layout == torch.strided, f"gradient {i} is {g.layout}: a dense tensor is needed")
        check(
            g.device == grads[0].device,
            f"gradient {i} is on {g.device}, gradient 0 on {grads[0].device}",
        )
        check(r > 0 and c > 0, f"gradient {i}: block {r}x{c} is empty")


def check_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    fulls: Sequence[Tensor],
    ids: Sequence[Tensor],
) -> None:
    lengths = {len(params), len(grads), len(exp_avgs), len(exp_avg_sqs), len(steps)}
    check(len(lengths) == 1, f"lists of different lengths: {sorted(lengths)}")
    check(
        len(fulls) == len(ids) and len(fulls) in (0, len(params)),
        f"{len(fulls)} full weights and {len(ids)} lists of block numbers for {len(params)} "
        "parameters: none or one each is needed",
    )
    # A step makes these checks for each of its tensors: words are found for those that fail only.
    for i, (p, g, m, v, s) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ):
        shape, device = p.shape, p.device
        if not (shape == g.shape == m.shape == v.shape):
            check(
                False,
                f"shapes differ: parameter {tuple(shape)}, gradient {tuple(g.shape)}, moments "
                f"{tuple(m.shape)} and {tuple(v.shape)}",
            )
        if not (g.device == m.device == v.device == device):
            for name, t in (("gradient", g), ("first moment", m), ("second moment", v)):
                check(t.device == device, f"parameter {i} is on {device}, its {name} on {t.device}")
        if not (s.numel() == 1 or (p.ndim > 0 and s.shape == shape[:1])):
            check(
                False,
                f"parameter {i} of shape {tuple(shape)} has {s.numel()} step counts: one, or one "
                "per block, is needed",
            )
    for i, (p, full, blocks) in enumerate(zip(params, fulls, ids, strict=False)):
        if full.numel() == 0:
            continue
        if blocks.numel() == 0:
            if full.numel() != p.numel():
                check(
                    False,
                    f"parameter {i} of {p.numel()} elements is written through to a weight of "
                    f"{full.numel()}",
                )
            continue
        if not (p.ndim == 3 and full.ndim == 2 and blocks.shape == p.shape[:1]):
            check(
                False,
                f"parameter {i} of shape {tuple(p.shape)} with {blocks.numel()} block numbers and "
                f"a full weight of shape {tuple(full.shape)}: packed blocks [n, rows, cols], [n] "
                "and a matrix are needed",
            )
        check_blocks(blocks, full.shape[0], full.shape[1], p.shape[1], p.shape[2])


def n_blocks(rows: int, cols: int, block_rows: int, block_cols: int) -> int:
    return -(-rows // block_rows) * -(-cols // block_cols)
