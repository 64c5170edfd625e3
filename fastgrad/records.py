"""What one forward and backward pass says about each parameter, gathered by the taps.

A parameter may be used several times in one forward pass (tied embeddings, a module called
twice). Its gradient for example j is the sum over uses, so the squared norm needs the cross
terms ``2⟨use_a, use_b⟩``. They are computed from the factors, never from a dense per-example
gradient; with block detail, one example's gradient at a time is formed in one scratch buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad.blocks import BlockGrid
from fastgrad.tap_functions import Rows
from fastgrad_kernels import ops
from fastgrad_kernels.cpu import gram_products
from fastgrad_kernels.dispatch import keep, upload
from fastgrad_kernels.layout import block_sums

CANCELLED = 1e-3  # below this share of the uses' own energy, cross terms have lost digits
SAMPLE = 256  # entries compared by the self-check


@dataclass(frozen=True)
class Target:
    """What the probe wants to know about one parameter."""

    name: str
    parameter: nn.Parameter
    grid: BlockGrid
    directions: Tensor | None  # [k, rows, cols], or None
    refuse: Callable[[str, str], None]
    self_check: bool


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class ParamRecord:
    """One parameter in one batch: squared norms per block and example, summed over its uses."""

    def __init__(self, target: Target, batch: Batch) -> None:
        self.target, self.batch = target, batch
        self.expected = 0  # uses seen in the forward pass
        self.fired = 0  # uses whose gradient has arrived
        self.sq: Tensor | None = None  # [n_blocks, n_examples], without cross terms
        self.dots: Tensor | None = None  # [k, n_examples]
        self.dense: Tensor | None = None  # [n_examples, *shape]
        self.products: list[tuple[Tensor, Tensor, Rows]] = []
        self.gathered: list[tuple[list[Tensor], Tensor]] = []
        self.lookups: list[tuple[Tensor, Tensor, Rows]] = []
        self._expected_ids: list[Tensor] = []
        self._factored = 0
        self.rounded = False  # autograd's gradient went through 16 bits (autocast)
        self.sampled: Tensor | None = None

    @property
    def parameter(self) -> nn.Parameter:
        return self.target.parameter

    def forget(self) -> None:
        """Back to before the backward pass.

        What was kept for cross terms belongs to the autograd graph, and the graph's nodes refer
        to this record: without this, the circle would keep every graph alive.
        """
        self.fired = self._factored = 0
        self.sq = self.dots = self.dense = self.sampled = None
        self.products, self.gathered, self.lookups = [], [], []

    def refuse(self, reason: str) -> None:
        """A use of the parameter that no tap covers: its ``T`` will be reported as missing."""
        self.target.refuse(self.target.name, reason)

    def expect_use(self, ids: Tensor | None = None) -> None:
        self.expected += 1
        if ids is not None:
            self._expected_ids.append(ids.reshape(ids.shape[0], -1))

    # -- gradients arriving from the taps ------------------------------------------------

    def add_product(
        self, left: Tensor, right: Tensor, rows: Rows, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A use whose gradient is ``leftᵀ right``; returns that gradient, rounded to ``dtype``."""
        self._arrived(left.dtype)
        self._factored += 1
        grid, directions = self.target.grid, self.target.directions
        if self.expected > 1 and not grid.is_whole:
            grad = (_wide(left).T @ _wide(right)).to(dtype or left.dtype)
            self.products.append((left, right, rows))
        else:
            grad, sq, dots = ops.cross_influence(
                left, right, rows.offsets, grid.block_rows, grid.block_cols, directions, True, dtype
            )
            self._add(sq, dots)
            if self.expected > 1:
                self._keep_factors(left, right, rows)
        self._check_in(lambda index: _wide(grad.reshape(-1)[index]))
        return grad

    def add_lookup(self, ids: Tensor, grad_out: Tensor, rows: Rows) -> None:
        """A use as embedding: ``grad_out [tokens, cols]`` arrives at the rows ``ids``."""
        self._arrived(grad_out.dtype)
        self._factored += 1
        grid = self.target.grid
        if self.expected == 1 or grid.is_whole:
            sq, dots = ops.embedding_influence(
                ids,
                grad_out,
                rows.offsets,
                grid.rows,
                grid.block_rows,
                grid.block_cols,
                self.target.directions,
            )
            self._add(sq, dots)
        if self.expected > 1:
            self.lookups.append((ids, grad_out, rows))

        def sampled(index: Tensor) -> Tensor:
            row, col = index // grid.cols, index % grid.cols
            hit = (ids.unsqueeze(0) == row.unsqueeze(1)).to(_wide(grad_out).dtype)
            return (hit * _wide(grad_out)[:, col].T).sum(1)

        self._check_in(sampled)

    def add_dense(self, per_example: Tensor, dtype: torch.dtype | None = None) -> None:
        """A use whose per-example gradient ``[n_examples, *shape]`` is small enough to keep.

        ``dtype`` is that in which the gradient goes on to autograd, if it differs.
        """
        self._arrived(dtype or per_example.dtype)
        per_example = _wide(per_example)
        self.dense = per_example if self.dense is None else self.dense + per_example
        self._check_in(lambda index: per_example.sum(0).reshape(-1)[index])

    def _arrived(self, dtype: torch.dtype) -> None:
        self.fired += 1
        self.rounded |= dtype in (torch.bfloat16, torch.float16)
        self.batch.arrived[self.target.name] = self
        self.batch.on_arrival(self.batch)

    def _add(self, sq: Tensor, dots: Tensor) -> None:
        self.sq = sq if self.sq is None else self.sq + sq
        self.dots = dots if self.dots is None else self.dots + dots

    def _keep_factors(self, left: Tensor, right: Tensor, rows: Rows) -> None:
        """Keep what the cross terms need. Against a lookup that is only the columns of ``left``
        that the looked-up ids name: ``[tokens, tokens]`` instead of ``[tokens, vocabulary]``."""
        if self.expected > 1 + len(self._expected_ids):
            self.products.append((left, right, rows))
            return
        split = left.unflatten(0, (rows.n_examples, rows.per_example))
        pairs = [
            split.gather(2, ids.unsqueeze(1).expand(-1, rows.per_example, -1))
            for ids in self._expected_ids
        ]
        self.gathered.append((pairs, right.unflatten(0, (rows.n_examples, rows.per_example))))

    # -- the end of the backward pass ----------------------------------------------------

    def finish(self) -> tuple[Tensor, Tensor] | None:
        """``(sq [n_blocks, n_examples], dots [k, n_examples])``, or None if it is not covered."""
        if self.dense is not None and self._factored:
            self.refuse("used both as a matrix and elementwise in one forward pass")
            return None
        if self.dense is not None:
            return self._finish_dense(self.dense)
        if self.fired > 1 and not self.target.grid.is_whole:
            return self._finish_blocks()
        if self.sq is None or self.dots is None:
            return self._finish_blocks() if self.fired else None
        sq = self.sq
        if self.fired > 1:
            total = sq + 2 * self._cross_terms().unsqueeze(0)
            if bool((total < CANCELLED * sq).any()):
                # The uses nearly cancel: a difference of large numbers is not exact any more.
                if self.gathered:
                    self.refuse("its uses as output layer and as embedding cancel each other")
                    return None
                return self._finish_blocks()
            sq = total
        return sq, self.dots

    def _finish_dense(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        grid, n = self.target.grid, dense.shape[0]
        matrix = dense.reshape(n, grid.rows, grid.cols)
        sq = block_sums(matrix.square(), grid.block_rows, grid.block_cols).T.contiguous()
        if self.target.directions is None:
            return sq, sq.new_zeros(0, n)
        directions = self.target.directions.to(dense.dtype).flatten(1)
        return sq, directions @ dense.reshape(n, -1).T

    def _cross_terms(self) -> Tensor:
        """``Σ_{a<b} ⟨use_a, use_b⟩`` for each example, ``[n_examples]`` (docs/maths.md)."""
        total = torch.zeros(self.batch.n_examples, device=self.parameter.device)
        products = [(_split(p, r), _split(q, r)) for p, q, r in self.products]
        lookups = [(i.view(r.n_examples, -1), _split(g, r)) for i, g, r in self.lookups]
        for (l1, r1), (l2, r2) in combinations(products, 2):
            total = total + gram_products(l1, r1, l2, r2)
        for (i1, g1), (i2, g2) in combinations(lookups, 2):
            same = i1.unsqueeze(2) == i2.unsqueeze(1)
            total = total + (same * torch.bmm(g1, g2.transpose(1, 2))).sum((1, 2))
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        for ids, g in lookups:
            for left, right in products:
                index = ids.unsqueeze(1).expand(-1, left.shape[1], -1)
                pairs.append((left.gather(2, index), right, g))
            for kept, right in self.gathered:
                # lookups fire in any order: find this lookup's columns by its ids
                for expected, columns in zip(self._expected_ids, kept, strict=True):
                    if expected.data_ptr() == ids.data_ptr() or torch.equal(expected, ids):
                        pairs.append((_wide(columns), _wide(right), g))
                        break
        for columns, right, g in pairs:
            total = total + (columns * torch.bmm(right, g.transpose(1, 2))).sum((1, 2))
        return total

    def _finish_blocks(self) -> tuple[Tensor, Tensor]:
        """All uses together with block detail: one example's gradient at a time."""
        grid, n = self.target.grid, self.batch.n_examples
        device = self.parameter.device
        scratch = torch.zeros(grid.rows, grid.cols, device=device)
        sq = torch.zeros(grid.n_blocks, n, device=device)
        directions = self.target.directions
        dots = torch.zeros(0 if directions is None else directions.shape[0], n, device=device)
        for j in range(n):
            scratch.zero_()
            for left, right, rows in self.products:
                part = slice(j * rows.per_example, (j + 1) * rows.per_example)
                scratch.addmm_(left[part].float().T, right[part].float())
            for ids, g, rows in self.lookups:
                part = slice(j * rows.per_example, (j + 1) * rows.per_example)
                scratch.index_add_(0, ids[part], g[part].float())
            sq[:, j] = block_sums(scratch.square(), grid.block_rows, grid.block_cols)
            if directions is not None:
                dots[:, j] = (directions.float() * scratch).sum((1, 2))
        return sq, dots

    # -- self-check ----------------------------------------------------------------------

    def sample(self) -> Tensor:
        """Fixed pseudo-random entries of the gradient, half of them in rows known to be used."""
        samples, name = self.batch.samples, self.target.name
        if name not in samples:
            grid, device = self.target.grid, self.parameter.device
            index = _random_entries(grid.numel, device, min(SAMPLE, max(grid.numel, 1)))
            if self._expected_ids:
                ids = torch.cat([i.reshape(-1) for i in self._expected_ids])
                half = len(index) // 2
                rows = ids[_random_entries(ids.numel(), device, half)].long()
                index = torch.cat([rows * grid.cols + index[:half] % grid.cols, index[half:]])
            samples[name] = index
        return samples[name]

    def _check_in(self, entries: Callable[[Tensor], Tensor]) -> None:
        if not self.target.self_check:
            return
        part = entries(self.sample())
        self.sampled = part if self.sampled is None else self.sampled + part


@keep
def _random_entries(numel: int, device: torch.device, count: int) -> Tensor:
    """``count`` numbers below ``numel``, the same each time."""
    generator = torch.Generator().manual_seed(numel)
    index = torch.randint(max(numel, 1), (count,), generator=generator, device="cpu")
    return upload(index, device)


def mismatch(
    entries: np.ndarray, sums: Sequence[np.ndarray], rms: float, rounded: bool
) -> float | None:
    """Self-check of one parameter after a backward pass: relative difference between what the
    taps of all its batches summed up and autograd's gradient, if it is too large.

    ``entries`` are the gradient's values at the records' common sample, ``rms`` its root mean
    square, ``rounded`` says that either went through 16 bits.
    """
    summed = np.sum(sums, axis=0) if sums else np.zeros_like(entries)
    scale = max(float(np.linalg.norm(entries)), rms * len(entries) ** 0.5)
    error = float(np.linalg.norm(summed - entries))
    return error / scale if scale > 0 and error > (2e-2 if rounded else 1e-3) * scale else None


def _split(matrix: Tensor, rows: Rows) -> Tensor:
    return _wide(matrix).unflatten(0, (rows.n_examples, rows.per_example))


@dataclass(eq=False)
class Batch:
    """One forward pass of the probed model and what its backward pass brought.

    The autograd graph keeps the records and these the batch, so that a forward pass that is never
    followed by a backward pass is forgotten together with its graph.
    """

    index: int  # counts forward passes
    n_examples: int
    other_sizes: frozenset[int]  # sizes of dimensions that do not count examples
    label_tokens: list[int] | None
    loss_items: float | None  # what a token-mean loss divides by, if the caller gave it
    targets: Mapping[int, Target]
    on_arrival: Callable[[Batch], None]
    samples: dict[str, Tensor]  # of the self-check, shared by the batches of a backward pass
    modules: set[int] = field(default_factory=set)  # ids of the modules that ran
    recomputed: set[int] = field(default_factory=set)
    records: WeakValueDictionary[str, ParamRecord] = field(default_factory=WeakValueDictionary)
    arrived: dict[str, ParamRecord] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop what the backward pass brought."""
        for record in self.arrived.values():
            record.forget()
        self.arrived.clear()

    def lookup(self, tensor: Tensor) -> ParamRecord | None:
        target = self.targets.get(id(tensor))
        if target is None:
            return None
        record = self.records.get(target.name)
        if record is None:
            record = self.records[target.name] = ParamRecord(target, self)
        return record


__all__ = ["Batch", "ParamRecord", "Target"]
