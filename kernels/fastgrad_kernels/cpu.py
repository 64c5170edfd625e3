"""Blocked PyTorch implementation of every operator: BLAS products, bounded scratch memory.

Written for CPUs, where it is the fast path, and correct on any device. Two forms of the
per-example squared norm of a weight gradient ``left_jᵀ right_j`` (see docs/maths.md):

* *fused*: the weight-gradient product is computed tile by tile, one example after the other,
  into one small scratch tile that stays in cache; its squared sum is taken there, then it is
  added to the running gradient. One pass gives the gradient and ``T``.
* *Gram*: ``‖left_jᵀ right_j‖² = Σ_{s,t} (left_s·left_t)(right_s·right_t)``; cheaper for short
  examples, but only at whole-parameter resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastgrad_kernels.layout import (
    accumulation_dtype,
    block_sums,
    grid_shape,
    matrix_view,
    norm_chunks,
    sum_of_squares,
)
from fastgrad_kernels.sparse_wgrad_cpu import sparse_wgrad

# A scratch tile of about 1024 x 1024 float32 (4 MiB): measured best of 256..2048 on two x86
# cores at widths 512 to 8192; smaller tiles starve the matrix product.
TILE_LIMIT = 1024
# Up to this many columns a tile spans whole rows of the gradient. The first example's product
# then goes straight into the gradient instead of being copied there.
STRIPE_LIMIT = 2048
# Break-even of the two forms, from timings of both at 32 to 512 tokens: the fused form costs
# about 0.28 ns per weight element and example above the plain product, the Gram form about
# 12 ps per token² and feature; 0.28 ns / 12 ps = 23.
GRAM_BREAK_EVEN = 23
# A Gram sum below this share of its terms' magnitudes has lost more than three digits of seven.
CANCELLED = 3e-3
# Elements of a tile below which a thread is not given a product of its own.
ROW_PART = 1 << 16
# Halves of an example's tokens below this length are not worth products of their own: the fourth
# that they save is lost again to smaller products (tried with 16 to 128 tokens at widths 256 to
# 4096, on one and two threads).
GRAM_HALF = 32
# Rows looked at to see whether many are zero, first one number of each, then, if many are, some
# more; and the share of them that makes it worth a count.
ZERO_SAMPLE = 32
ZERO_DRIFT = 0.95  # of the rows between two that are looked at: see _zero_share
ZERO_WIDTH = 64
ZERO_SHARE = 0.25
# The Gram form works on groups of examples with at most this many token pairs at once.
GRAM_PAIR_LIMIT = 1 << 22


def prefer_gram(rows: int, cols: int, tokens: int, want_grad: bool) -> bool:
    """True where the Gram form is expected to be cheaper than the fused one.

    Fused: ``rows·cols·(23 + tokens if the product is made for T alone)``; Gram:
    ``tokens²·(rows + cols)``, both in units of 12 ps per example on the machine above. The
    ratio matters, not the unit.
    """
    product = 0 if want_grad else tokens
    return tokens * tokens * (rows + cols) < rows * cols * (GRAM_BREAK_EVEN + product)


def uniform_length(offsets: Sequence[int]) -> int | None:
    """Tokens per example if all examples are equally long, else None."""
    lengths = {b - a for a, b in pairwise(offsets)}
    return lengths.pop() if len(lengths) == 1 else None


def cross_influence(
    left: Tensor,
    right: Tensor,
    bounds: list[int],
    block_rows: int,
    block_cols: int,
    directions: Tensor | None,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastgrad_kernels.ops.cross_influence`; ``bounds`` are the offsets as numbers."""
    dtype = accumulation_dtype(left)
    if left.dtype != dtype:
        left, right = left.to(dtype), right.to(dtype)
    left, right, bounds = without_zero_rows(left, right, bounds)
    rows, cols, n = left.shape[1], right.shape[1], len(bounds) - 1
    whole = block_rows >= rows and block_cols >= cols
    longest = max((b - a for a, b in pairwise(bounds)), default=0)
    if whole and directions is None and prefer_gram(rows, cols, longest, want_grad):
        grad = left.T @ right if want_grad else left.new_empty(0)
        return grad, gram_norms(left, right, bounds).unsqueeze(0), left.new_empty(0, n)
    return _fused(left, right, bounds, block_rows, block_cols, directions, want_grad)


def without_zero_rows(
    left: Tensor, right: Tensor, bounds: list[int]
) -> tuple[Tensor, Tensor, list[int]]:
    """The same products with fewer tokens, where many rows of one factor are zero.

    The gradient of a token without a label is zero in the output layer (prompts, masked language
    models), that of padding everywhere. Zero rows add nothing to ``left_jᵀ right_j``, provided
    that the other factor is finite; if it is not, or the rows are few, nothing is left out.
    Examples of equal length stay so: each keeps as many rows as the one with the most.
    """
    if not left.is_cpu or len(left) < ZERO_SAMPLE:
        return left, right, bounds  # elsewhere the host would wait for the count
    shares = [_zero_share(f) for f in (left, right)]
    if max(shares) < ZERO_SHARE:
        return left, right, bounds
    sparse, dense = (left, right) if shares[0] >= shares[1] else (right, left)
    zero = _zero_rows(sparse)
    n, length = len(bounds) - 1, uniform_length(bounds)
    if length:
        rows = zero.view(n, length)
        longest = length - int(rows.sum(1).amin())
        keep = rows.to(torch.int8).argsort(stable=True, dim=1)[:, :longest]
        keep = (keep + torch.arange(0, len(zero), length)[:, None]).flatten()
        new = [longest * j for j in range(n + 1)]
    else:
        keep = (~zero).nonzero().flatten()
        new = torch.searchsorted(keep, torch.tensor(bounds)).tolist()
    if len(keep) > (1 - ZERO_SHARE) * len(zero) or not torch.isfinite(dense.sum()):
        return left, right, bounds
    return left[keep], right[keep], new


def _zero_share(matrix: Tensor) -> float:
    """Share of zero rows among some of them, as far as one can see from their first numbers.

    Examples have often as many tokens as lie between two rows that are looked at, or half as many,
    and then all of these would be first tokens, for which a query's gradient is always zero: so
    an odd step, a little shorter, that drifts through the examples.
    """
    step = int(len(matrix) // ZERO_SAMPLE * ZERO_DRIFT) | 1
    if matrix.shape[1]:
        firsts = matrix.as_strided((-(-len(matrix) // step),), (step * matrix.stride(0),)).tolist()
        if firsts.count(0.0) < ZERO_SHARE * len(firsts):
            return 0.0
    return float(_zero_rows(matrix[::step, :ZERO_WIDTH]).float().mean())


def _zero_rows(matrix: Tensor) -> Tensor:
    """``[rows]``: which hold nothing but zeros."""
    if not matrix.shape[1]:
        return torch.zeros(len(matrix), dtype=torch.bool)
    return torch.linalg.vector_norm(matrix, float("inf"), dim=1) == 0


def gram_norms(left: Tensor, right: Tensor, bounds: Sequence[int]) -> Tensor:
    """``‖left_jᵀ right_j‖²`` for every example, ``[n]``, through token-by-token products.

    Where the products nearly cancel (features with a large common mean, gradients that sum to
    zero), their sum has lost digits; those examples are computed from the gradient itself.
    """
    n, length = len(bounds) - 1, uniform_length(bounds)
    if n == 0:
        return left.new_zeros(0)
    if length == 1:
        first, last = bounds[0], bounds[-1]
        return left[first:last].square().sum(1) * right[first:last].square().sum(1)
    if length is not None:
        if length == 0:
            return left.new_zeros(n)
        step = max(1, GRAM_PAIR_LIMIT // (length * length))
        ends = [*bounds[:n:step], bounds[n]]
    else:
        ends = list(bounds)
    # The rest is a few numbers per example: Python's own are the quickest.
    sq: list[float] = []
    sizes: list[float] = []
    for s, e in pairwise(ends):
        every = e - s == len(left)
        a, b = (left, right) if every else (left[s:e], right[s:e])
        totals, magnitudes = _gram(a, b, length if length is not None else e - s)
        sq += totals
        sizes += magnitudes
    for j, size in enumerate(sizes):
        if sq[j] < CANCELLED * size:
            s, e = bounds[j], bounds[j + 1]
            sq[j] = float(sum_of_squares(left[s:e].T @ right[s:e]))
    return torch.tensor(sq, dtype=left.dtype, device=left.device)


def _gram(left: Tensor, right: Tensor, length: int) -> tuple[list[float], list[float]]:
    """Sum and sum of magnitudes of the token-by-token products, ``[n]`` each, of ``[n·length,
    features]``."""
    n = left.shape[0] // length if length else 1
    inputs = _INPUTS.pairs(right, length)
    products = _pairs(left, length).mul_(inputs)
    sums = products.new_empty(2, len(products))
    torch.sum(products, 1, out=sums[0])
    torch.sum(products.abs_(), 1, out=sums[1])  # PyTorch's 1-norm is not vectorised
    total, size = sums.tolist()
    if len(total) == n:
        return total, size
    return _of_halves(total), _of_halves(size)


def _of_halves(sums: list[float]) -> list[float]:
    """``[n]`` from sums over :func:`_pairs` in halves, ``[3n]``."""
    both = len(sums) // 3 * 2
    parts = zip(sums[:both:2], sums[1:both:2], sums[both:], strict=True)
    return [first + 2 * between + second for first, between, second in parts]


def _pairs(matrix: Tensor, length: int) -> Tensor:
    """Products of the tokens of each example with one another, ``[n, length²]``.

    Each pair counts twice. Where halves of the tokens are long enough, the products of the second
    half with the first are computed once: ``[3n, (length / 2)²]``, for each example those within
    the first half and those between the halves in turn, then for each those within the second.
    """
    n, half = len(matrix) // max(length, 1), length // 2
    if length % 2 or half < GRAM_HALF:
        x = matrix.view(n, length, -1) if length else matrix[None]
        return torch.bmm(x, x.transpose(1, 2)).view(len(x), -1)
    row, col = matrix.stride()
    start, strides = matrix.storage_offset(), (length * row, row, col)
    x = matrix.as_strided((n, length, matrix.shape[1]), strides, start)
    first = matrix.as_strided((n, half, matrix.shape[1]), strides, start)
    second = matrix.as_strided((n, half, matrix.shape[1]), strides, start + half * row)
    pairs = matrix.new_empty(3 * n, half * half)
    square = half * half
    with_first = pairs.as_strided((n, length, half), (2 * square, half, 1))
    within_second = pairs.as_strided((n, half, half), (square, half, 1), 2 * n * square)
    torch.bmm(x, first.transpose(1, 2), out=with_first)
    torch.bmm(second, second.transpose(1, 2), out=within_second)
    return pairs


def backward_pass() -> int:
    """A number for the backward pass under way, -1 outside of one."""
    return torch._C._current_graph_task_id()


class _Latest:
    """The pairs of the latest input. The layers that read one activation (query, key and value)
    come one after the other in the backward pass, and these pairs are half of the Gram form's
    work. They serve within one backward pass alone: later, memory may have been filled anew
    without PyTorch's knowledge."""

    def __init__(self) -> None:
        self._known: tuple[StorageWeakRef, tuple[object, ...], Tensor] | None = None

    def pairs(self, matrix: Tensor, length: int) -> Tensor:
        task = backward_pass()
        if task == -1:
            return _pairs(matrix, length)
        key = (
            task, matrix.data_ptr(), matrix.shape, matrix.stride(), matrix.dtype, length,
            0 if matrix.is_inference() else matrix._version,
        )  # fmt: skip
        known = self._known
        # a storage that is gone may have left its address to another
        if known is not None and known[1] == key and not known[0].expired():
            return known[2]
        pairs = _pairs(matrix, length)
        self._known = StorageWeakRef(matrix.untyped_storage()), key, pairs
        return pairs


_INPUTS = _Latest()


def gram_products(left1: Tensor, right1: Tensor, left2: Tensor, right2: Tensor) -> Tensor:
    """``⟨left1_jᵀ right1_j, left2_jᵀ right2_j⟩`` for each example of ``[n, tokens, features]``."""
    pairs = torch.bmm(left1, left2.transpose(1, 2))
    pairs.mul_(torch.bmm(right1, right2.transpose(1, 2)))
    return pairs.sum((1, 2))


def _fused(
    left: Tensor,
    right: Tensor,
    bounds: list[int],
    block_rows: int,
    block_cols: int,
    directions: Tensor | None,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols, n = left.shape[1], right.shape[1], len(bounds) - 1
    block_rows, block_cols = min(block_rows, rows), min(block_cols, cols)
    grid_r, grid_c = grid_shape(rows, cols, block_rows, block_cols)
    whole = grid_r == grid_c == 1
    tile_r, tile_c = _tile_shape(rows, cols, block_rows, block_cols, whole)
    grad = left.new_empty(rows, cols) if want_grad else left.new_empty(0)
    if n == 0:
        grad.zero_()
    scratch = left.new_empty(tile_r * tile_c)
    n_dir = 0 if directions is None else directions.shape[0]
    dots = left.new_zeros(n_dir, n) if n_dir else left.new_empty(0, n)
    length = uniform_length(bounds)
    # With one block the norms of short chunks, one row per example, in the order of the tiles.
    sq = None if whole else left.new_zeros(grid_r, grid_c, n)
    found: list[Tensor] = []
    bmm, norm = torch.bmm, torch.linalg.vector_norm
    for r in range(0, rows, tile_r):
        h = min(tile_r, rows - r)
        for c in range(0, cols, tile_c):
            w = min(tile_c, cols - c)
            full = (h, w) == (rows, cols)  # each view of it would cost as much as a squared sum
            target = (grad if full else grad[r : r + h, c : c + w]) if want_grad else None
            direct = (
                None if directions is None else directions[:, r : r + h, c : c + w].to(left.dtype)
            )
            spare = (scratch if full else scratch[: h * w]).view(h, w)
            straight = target if target is not None and target.is_contiguous() else spare
            # Views are made before the loop: one by one they cost as much as the squared sums.
            parts = _row_parts(h, w)
            lefts = _of_examples(left, bounds, length, r, h, parts, transposed=True)
            rights = _of_examples(right, bounds, length, c, w, parts, transposed=False)
            # the first example's tile may be the target itself
            later = _Tile(spare, parts, whole)
            first = later if straight is spare else _Tile(straight, parts, whole)
            outs: list[tuple[Tensor, ...]] = []
            if whole:
                fresh = [left.new_empty(n, len(piece)) for piece in later.chunks]
                found += fresh
                outs = list(zip(*(sums.unbind() for sums in fresh), strict=True)) or [()] * n
            for j, (a, b) in enumerate(zip(lefts, rights, strict=True)):
                tile = later if j else first
                bmm(a, b, out=tile.stripes)
                if sq is None:
                    for piece, out in zip(tile.chunks, outs[j], strict=True):
                        norm(piece, dim=1, out=out)
                else:
                    sums = _block_squares(tile.values, block_rows, block_cols)
                    sq[
                        r // block_rows : -(-(r + h) // block_rows),
                        c // block_cols : -(-(c + w) // block_cols),
                        j,
                    ] = sums.view(-(-h // block_rows), -(-w // block_cols))
                if direct is not None:
                    dots[:, j] += (direct * tile.values).sum((1, 2))
                if target is not None and tile.values is not target:
                    target.add_(tile.values) if j else target.copy_(tile.values)
    if sq is None:
        norms = found[0] if len(found) == 1 else torch.cat([left.new_empty(n, 0), *found], 1)
        totals = torch.linalg.vector_norm(norms, dim=1, dtype=torch.float64).tolist()
        return grad, left.new_tensor([[total * total for total in totals]]), dots
    return grad, sq.flatten(0, 1), dots


def _of_examples(
    matrix: Tensor,
    bounds: list[int],
    length: int | None,
    start: int,
    width: int,
    parts: int,
    transposed: bool,
) -> tuple[Tensor, ...]:
    """Each example's rows of ``matrix[:, start : start + width]`` as a factor of a batched product:
    in ``parts`` stripes of columns, ``[parts, width / parts, tokens]`` transposed, or all columns
    ``parts`` times over, ``[parts, tokens, width]``."""
    if length is None:
        part = matrix[:, start : start + width]
        lengths = [b - a for a, b in pairwise(bounds)]
        if transposed:
            return part.unflatten(1, (parts, -1)).permute(1, 2, 0).split(lengths, 2)
        return part.expand(parts, -1, -1).split(lengths, 1)
    # the same views by two operators
    row, col = matrix.stride()
    n, offset = len(bounds) - 1, matrix.storage_offset() + bounds[0] * row + start * col
    if transposed:
        stripe = width // parts
        size, stride = (n, parts, stripe, length), (length * row, stripe * col, col, row)
    else:
        size, stride = (n, parts, length, width), (length * row, 0, row, col)
    return matrix.as_strided(size, stride, offset).unbind()


class _Tile:
    """A tile's memory as it is written, one stripe per thread, and as its norm is taken."""

    __slots__ = ("chunks", "stripes", "values")

    def __init__(self, values: Tensor, parts: int, whole: bool) -> None:
        self.values, self.stripes = values, values.view(parts, -1, values.shape[1])
        self.chunks = norm_chunks(values.view(-1)) if whole else []


def _row_parts(rows: int, cols: int) -> int:
    """Into how many stripes of rows the product of one tile is cut: one per thread.

    The squared sum and the addition that follow run over contiguous memory, one stretch per
    thread; a product cut alike leaves each stretch in the cache of the core that reads it next.
    """
    parts = torch.get_num_threads()
    return parts if rows % parts == 0 and rows * cols // parts >= ROW_PART else 1


def _block_squares(tile: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """Squared sum of each block, ``[n_blocks]``; without a squared copy of the tile if blocks are
    wide and divide it."""
    if tile.shape[1] % block_cols or block_cols < 16:
        return block_sums(tile.square(), block_rows, block_cols)
    norms = torch.linalg.vector_norm(tile.unflatten(1, (-1, block_cols)), dim=2)
    return block_sums(norms.square_(), block_rows, 1)


def _tile_shape(
    rows: int, cols: int, block_rows: int, block_cols: int, whole: bool
) -> tuple[int, int]:
    """Rows and columns of a scratch tile."""
    tile_c = cols if cols <= STRIPE_LIMIT else TILE_LIMIT
    tile_r = min(rows, max(TILE_LIMIT * TILE_LIMIT // max(tile_c, 1), tile_c))
    if not whole:  # tiles hold whole blocks, so that no block is summed in two places
        tile_r = max(block_rows, tile_r // block_rows * block_rows)
        if tile_c < cols:
            tile_c = max(block_cols, tile_c // block_cols * block_cols)
    return tile_r, tile_c


def embedding_influence(
    ids: Tensor,
    grad_out: Tensor,
    offsets: Tensor,
    num_rows: int,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastgrad_kernels.ops.embedding_influence`."""
    dtype = accumulation_dtype(grad_out)
    n, cols = offsets.numel() - 1, grad_out.shape[1]
    example = torch.repeat_interleave(
        torch.arange(n, device=ids.device), offsets.diff().to(ids.device)
    )
    # Repeated tokens of one example must add before squaring: one row per (example, token).
    keys, inverse = torch.unique(example * num_rows + ids, return_inverse=True)
    sums = torch.zeros(keys.numel(), cols, dtype=dtype, device=ids.device)
    sums.index_add_(0, inverse, grad_out.to(dtype))
    row, owner = keys % num_rows, keys // num_rows
    block_cols = min(block_cols, cols)
    grid_r, grid_c = grid_shape(num_rows, cols, min(block_rows, num_rows), block_cols)
    per_row = _block_squares(sums, 1, block_cols).view(-1, grid_c)
    sq = torch.zeros(n, grid_r, grid_c, dtype=dtype, device=ids.device)
    sq.view(n * grid_r, grid_c).index_add_(0, owner * grid_r + row // block_rows, per_row)
    n_dir = 0 if directions is None else directions.shape[0]
    dots = torch.zeros(n, n_dir, dtype=dtype, device=ids.device)
    if directions is not None:
        products = torch.stack([(sums * d.to(dtype)[row]).sum(1) for d in directions], 1)
        dots.index_add_(0, owner, products)
    return sq.flatten(1).T.contiguous(), dots.T.contiguous()


def norm_gradients(
    x: Tensor,
    grad_out: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    mean: Tensor | None,
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`fastgrad_kernels.ops.norm_gradients`."""
    dtype = accumulation_dtype(x)
    grad, bounds = grad_out.to(dtype), offsets.tolist()
    normalised = x.to(dtype)
    if mean is not None:
        normalised = normalised - mean.to(dtype)[:, None]
    products = (normalised * rstd.to(dtype)[:, None]).mul_(grad)
    weight = _example_sums(products, bounds)
    return weight, _example_sums(grad, bounds) if want_bias else weight.new_empty(0, x.shape[1])


def _example_sums(matrix: Tensor, bounds: Sequence[int]) -> Tensor:
    """Sum of each example's rows, ``[n_examples, d]``."""
    n, length = len(bounds) - 1, uniform_length(bounds)
    if length:
        return matrix.unflatten(0, (n, length)).sum(1)
    sums = [matrix[a:b].sum(0) for a, b in pairwise(bounds)]
    return torch.stack(sums) if sums else matrix.new_zeros(0, matrix.shape[1])


def expert_wgrad(left: Tensor, right: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    """See :func:`fastgrad_kernels.ops.expert_wgrad`."""
    dtype = accumulation_dtype(left)
    left, right, bounds = left.to(dtype), right.to(dtype), offsets.tolist()
    packed = left.new_empty(ids.numel(), left.shape[1], right.shape[1])
    for i, expert in enumerate(ids.tolist()):
        tokens = slice(bounds[expert], bounds[expert + 1])
        torch.mm(left[tokens].T, right[tokens], out=packed[i])
    return packed


def grad_stats(
    grads: Sequence[Tensor], block_rows: Sequence[int], block_cols: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """See :func:`fastgrad_kernels.ops.grad_stats`."""
    wide = any(g.dtype == torch.float64 for g in grads)
    like = grads[0] if grads else torch.empty(0)
    like = like.new_empty(0, dtype=torch.float64 if wide else torch.float32)
    parts = [
        block_stats(matrix_view(g), r, c)
        for g, r, c in zip(grads, block_rows, block_cols, strict=True)
    ]
    totals = [
        torch.stack([*p[:2].double().sum(1), p[2].amax(), p[3].double().sum()])
        if p.shape[1]
        else like.new_zeros(4, dtype=torch.float64)
        for p in parts
    ]
    return (
        torch.cat([like.new_empty(4, 0), *(p.to(like.dtype) for p in parts)], 1),
        torch.stack(totals, 1).to(like.dtype) if totals else like.new_empty(4, 0),
    )


def block_stats(matrix: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """One gradient's part of :func:`fastgrad_kernels.ops.grad_stats`, ``[4, n_blocks]``."""
    rows, cols = matrix.shape
    x = matrix.to(accumulation_dtype(matrix))
    if x.numel() == 0:
        return x.new_zeros(4, 0)
    block_rows, block_cols = min(block_rows, rows), min(block_cols, cols)
    if grid_shape(rows, cols, block_rows, block_cols) == (1, 1):
        square = sum_of_squares(x)
        if torch.isfinite(square):
            absolute = x.abs()
            values = [square.to(x.dtype), absolute.sum(), absolute.max(), x.new_zeros(())]
            return torch.stack(values).view(4, 1)
    finite = torch.isfinite(x)
    absolute = torch.where(finite, x, 0).abs()
    bad = block_sums((~finite).to(x.dtype), block_rows, block_cols)
    largest = _block_max(absolute, block_rows, block_cols)
    return torch.stack(
        [
            block_sums(absolute.square(), block_rows, block_cols),
            block_sums(absolute, block_rows, block_cols),
            largest,
            bad,
        ]
    )


def _block_max(matrix: Tensor, block_rows: int, block_cols: int) -> Tensor:
    rows, cols = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -cols % block_cols, 0, -rows % block_rows))
    view = padded.unflatten(1, (-1, block_cols)).unflatten(0, (-1, block_rows))
    return view.amax((1, 3)).flatten()


__all__ = [
    "block_stats",
    "cross_influence",
    "embedding_influence",
    "expert_wgrad",
    "grad_stats",
    "gram_norms",
    "gram_products",
    "norm_gradients",
    "prefer_gram",
    "sparse_wgrad",
    "uniform_length",
]
