"""What one forward and backward pass says about each parameter, gathered by the taps.

A parameter may be used several times in one forward pass (tied embeddings, a module called
twice, one expert after the other). Its gradient for example j is the sum over uses, so where uses
overlap the squared norm needs the cross terms ``2⟨use_a, use_b⟩``. They are computed from the
factors (:mod:`fastgrad.cross_terms`), never from a dense per-example gradient; with block detail,
one example's gradient at a time is formed in one scratch buffer.

What arrives is kept without its autograd graph: the graph's nodes refer to the records, and the
circle would keep every graph alive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad.blocks import BlockGrid
from fastgrad.cross_terms import Factors, Lookup, Together
from fastgrad.ownership import Mark, foreign, marked
from fastgrad.regions import Region, whole
from fastgrad.rows import Rows, wide, wide_dtype
from fastgrad_kernels import ops
from fastgrad_kernels.dispatch import keep, upload
from fastgrad_kernels.layout import bare, block_sums

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
    dense_limit: int

    @cached_property
    def region(self) -> Region:
        return whole(self.grid.rows, self.grid.cols)

    @cached_property
    def n_blocks(self) -> int:
        return self.grid.n_blocks


class Use(NamedTuple):
    """A use of the parameter in the forward pass."""

    kind: Literal["product", "lookup", "dense"]
    region: Region


class ParamRecord:
    """One parameter in one batch: squared norms per block and example, summed over its uses."""

    def __init__(self, target: Target, batch: Batch) -> None:
        self.target, self.batch = target, batch
        self.uses: list[Use] = []  # seen in the forward pass
        self._expected_ids: list[tuple[Tensor, Rows]] = []
        self.forget()

    def forget(self) -> None:
        """Back to before the backward pass."""
        self.fired = 0  # uses whose gradient has arrived
        # [n_blocks, n_examples] and [k, n_examples] of the uses that overlap no other
        self.sq: Tensor | None = None
        self.dots: Tensor | None = None
        self.dense: Tensor | None = None  # [n_examples, *shape]
        self.together: dict[Region, Together] = {}
        self.formed: list[Factors | Lookup] = []  # one example at a time at the end
        self.rounded = False  # autograd's gradient went through 16 bits (autocast)
        self.sampled: Tensor | None = None

    @property
    def parameter(self) -> nn.Parameter:
        return self.target.parameter

    def refuse(self, reason: str) -> None:
        """A use of the parameter that no tap covers: its ``T`` will be reported as missing, unless
        the batch is one example."""
        if self.batch.n_examples == 1:
            self.batch.refused.append((self.target.name, reason))
        else:
            self.target.refuse(self.target.name, reason)

    def differentiated(self) -> None:
        """Part of the gradient comes from a backward pass that was itself differentiated: no tap
        sees whose it is."""
        if not self.batch.nested:
            self._arrived(self.parameter.dtype)
        entry = (self.target.name, _DIFFERENTIATED)
        if entry not in self.batch.refused:
            self.batch.refused.append(entry)

    def expect(self, kind: Literal["product", "lookup", "dense"], region: Region | None) -> None:
        if self.batch.counting:
            self.uses.append(Use(kind, region or self.target.region))

    def expect_lookup(self, ids: Tensor, rows: Rows) -> None:
        """``ids`` in example order."""
        if self.batch.counting:
            self.expect("lookup", self.table)
            self._expected_ids.append((ids, rows))

    @property
    def table(self) -> Region:
        """The parameter as lookups see it: a row for each id. One-dimensional, it is a column, and
        not the one row that its matrix view is."""
        grid = self.target.grid
        return whole(grid.cols, 1) if self.parameter.ndim == 1 else whole(grid.rows, grid.cols)

    def _overlapping(self, region: Region) -> list[Use]:
        """Uses that share elements with ``region``, itself among them."""
        if len(self.uses) <= 1:
            return self.uses
        return [u for u in self.uses if not u.region.disjoint(region)]

    # -- gradients arriving from the taps ------------------------------------------------

    def add_product(
        self,
        left: Tensor,
        right: Tensor,
        rows: Rows,
        dtype: torch.dtype | None = None,
        region: Region | None = None,
    ) -> Tensor:
        """A use whose gradient is ``leftᵀ right``, rows in example order; returns that gradient,
        rounded to ``dtype``."""
        if torch.is_grad_enabled():  # elsewhere nothing that is made of them refers to a graph
            left, right = bare(left), bare(right)
        if self.batch.nested:
            return (wide(left).T @ wide(right)).to(dtype or left.dtype)
        self._arrived(left.dtype)
        region = region or self.target.region
        shared = self._overlapping(region)
        crossing = len(shared) > 1
        place = self._place(region)
        by_terms = crossing and self._by_terms(region, shared) and not left.is_complex()
        if place is None or (crossing and not by_terms):
            self.formed.append(Factors(bare(left), bare(right), rows, region))
            grad = (wide(left).T @ wide(right)).to(dtype or left.dtype)
        else:
            block_rows, block_cols, blocks = place
            measure = partial(ops.influence, bounds=rows.bounds)
            influence = _complex_influence if left.is_complex() else measure
            grad, sq, dots = influence(
                left, right, rows.offsets, block_rows, block_cols, self._directions(region), True,
                dtype,
            )  # fmt: skip
            if crossing:
                ids = self._expected_ids if region == self.table else []
                group = self.together.setdefault(region, Together())
                factors = Factors(bare(left), bare(right), rows, region)
                group.add_product(factors, sq, dots, len(shared), ids)
            else:
                self._add(sq, dots, blocks)

        def sampled(index: Tensor) -> Tensor:
            if region == self.target.region:
                return wide(grad.take(index))
            row, col, here = region.entries(index)
            return wide(grad[row, col]) * here

        self._check_in(sampled)
        return grad

    def _by_terms(self, region: Region, shared: Sequence[Use]) -> bool:
        """Whether the cross terms of these uses follow from their factors."""
        same = all(u.kind != "dense" and u.region == region for u in shared)
        return same and self.target.grid.is_whole

    def _place(self, region: Region) -> tuple[int, int, slice] | None:
        """Block size within a region and the blocks that it fills; None if blocks cut it."""
        if self.target.n_blocks == 1:
            return region.rows, region.cols, slice(0, 1)
        grid = self.target.grid
        if region == self.target.region:
            return grid.block_rows, grid.block_cols, slice(0, grid.n_blocks)
        first, last = region.offset // grid.cols, (region.end - 1) // grid.cols
        if first == last:  # inside one row of the matrix view: an expert
            if grid.block_cols < grid.cols:
                return None
            return region.rows, region.cols, slice(first // grid.block_rows,
                                                   first // grid.block_rows + 1)  # fmt: skip
        if (region.row_stride, region.cols, region.col_stride) != (grid.cols, grid.cols, 1):
            return None
        aligned = first % grid.block_rows == 0 and (
            region.rows % grid.block_rows == 0 or last + 1 == grid.rows
        )
        if not aligned:
            return None
        rows = slice(first // grid.block_rows, last // grid.block_rows + 1)
        blocks = slice(rows.start * grid.grid_cols, rows.stop * grid.grid_cols)
        return grid.block_rows, grid.block_cols, blocks

    def _directions(self, region: Region) -> Tensor | None:
        directions = self.target.directions
        if directions is None or region == self.target.region:
            return directions
        return torch.stack([region.of(d) for d in directions.contiguous()])

    def add_lookup(
        self, ids: Tensor, grad_out: Tensor, rows: Rows, dtype: torch.dtype | None = None
    ) -> None:
        """A use as embedding: ``grad_out [tokens, cols]`` arrives at the rows ``ids``, both in
        example order. ``dtype`` as in :meth:`add_dense`."""
        if self.batch.nested:
            return
        self._arrived(dtype or grad_out.dtype)
        grad_out = bare(grad_out)
        grid, table = self.target.grid, self.table
        shared = self._overlapping(table)
        crossing = len(shared) > 1
        if crossing and not self._by_terms(table, shared):
            self.formed.append(Lookup(ids, grad_out, rows))
        else:
            directions, block = self.target.directions, (grid.block_rows, grid.block_cols)
            if table.cols != grid.cols:  # a column of numbers: blocks are counted alike
                block = (grid.block_cols, 1)
                directions = None if directions is None else directions.transpose(1, 2)
            values = grad_out
            if values.is_complex():  # real and imaginary parts side by side
                values = torch.view_as_real(values.resolve_conj().contiguous()).flatten(1)
                block = (block[0], 2 * block[1])
                if directions is not None:
                    directions = torch.stack([directions, torch.zeros_like(directions)], -1)
                    directions = directions.flatten(2)
            sq, dots = ops.embedding_influence(
                ids, values, rows.offsets, table.rows, *block, directions
            )
            if crossing:
                group = self.together.setdefault(table, Together())
                group.add_lookup(Lookup(ids, grad_out, rows), sq, dots)
            else:
                self._add(sq, dots, slice(0, grid.n_blocks))

        def sampled(index: Tensor) -> Tensor:
            row, col = index // table.cols, index % table.cols
            tokens, values = ids, wide(grad_out)
            if ids.device.type == "cpu":  # elsewhere the host would wait for their number
                met = torch.isin(ids, row).nonzero().squeeze(1)
                tokens, values = ids[met], values[met]
            hit = (tokens.unsqueeze(0) == row.unsqueeze(1)).to(values.dtype)
            return (hit * values[:, col].T).sum(1)

        self._check_in(sampled)

    def add_dense(self, per_example: Tensor, dtype: torch.dtype | None = None) -> None:
        """A use whose per-example gradient ``[n_examples, *shape]`` is small enough to keep.

        ``dtype`` is that in which the gradient goes on to autograd, if it differs.
        """
        if self.batch.nested:
            return
        self._arrived(dtype or per_example.dtype)
        per_example = wide(bare(per_example))
        self.dense = per_example if self.dense is None else self.dense + per_example
        self._check_in(lambda index: per_example.sum(0).reshape(-1).index_select(0, index))

    def _arrived(self, dtype: torch.dtype) -> None:
        self.fired += 1
        self.rounded |= dtype in (torch.bfloat16, torch.float16)
        self.batch.arrived[self.target.name] = self
        self.batch.on_arrival(self.batch)

    def _add(self, sq: Tensor, dots: Tensor, blocks: slice) -> None:
        n_blocks = self.target.n_blocks
        if self.sq is None or self.dots is None:
            if sq.shape[0] == n_blocks:
                self.sq, self.dots = sq, dots
                return
            self.sq = sq.new_zeros(n_blocks, sq.shape[1])
            self.dots = torch.zeros_like(dots)
        elif sq.shape[0] == n_blocks:
            self.sq, self.dots = self.sq + sq, self.dots + dots
            return
        self.sq[blocks] += sq
        self.dots += dots

    # -- the end of the backward pass ----------------------------------------------------

    def finish(self) -> tuple[Tensor, Tensor] | None:
        """``(sq [n_blocks, n_examples], dots [k, n_examples])``, or None if it is not covered."""
        formed, groups = list(self.formed), [(self.sq, self.dots)]
        for group in self.together.values():
            total = group.total()
            if total is not None:
                groups.append((total, group.dots))
            elif group.uses is not None:
                formed += group.uses
            else:
                self.refuse("its uses as output layer and as embedding cancel each other")
                return None
        if formed:
            groups.append(self._finish_formed(formed))
        elif self.dense is not None:
            groups.append(self._finish_dense(self.dense))
        known = [(sq, dots) for sq, dots in groups if sq is not None and dots is not None]
        if not known:
            return None
        sq, dots = known[0]
        for more_sq, more_dots in known[1:]:
            sq, dots = sq + more_sq, dots + more_dots
        return sq, dots

    def _finish_dense(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        grid, n = self.target.grid, dense.shape[0]
        if grid.is_whole:
            sq = squares(dense.reshape(n, -1)).sum(1).unsqueeze(0)
        else:
            matrix = dense.reshape(n, grid.rows, grid.cols)
            sq = block_sums(squares(matrix), grid.block_rows, grid.block_cols).T.contiguous()
        if self.target.directions is None:
            return sq, sq.new_zeros(0, n)
        directions = self.target.directions.to(dense.dtype).flatten(1)
        return sq, (directions @ dense.reshape(n, -1).T).real

    def _finish_formed(self, formed: Sequence[Factors | Lookup]) -> tuple[Tensor, Tensor]:
        """Uses together that overlap, or that blocks cut: one example's gradient at a time. All
        others share no element with them."""
        grid, n = self.target.grid, self.batch.n_examples
        device, table = self.parameter.device, self.table
        tensors = [u.right if isinstance(u, Factors) else u.grad_out for u in formed]
        tensors += [] if self.dense is None else [self.dense]
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, wide_dtype(tensor.dtype))
        scratch = torch.zeros(grid.rows, grid.cols, device=device, dtype=dtype)
        sq = scratch.real.new_zeros(grid.n_blocks, n)
        directions = self.target.directions
        dots = sq.new_zeros(0 if directions is None else directions.shape[0], n)
        parts = [list(use.rows.parts()) for use in formed]
        for j in range(n):
            scratch.zero_()
            for use, own in zip(formed, parts, strict=True):
                part = own[j]
                if isinstance(use, Factors):
                    into = use.region.of(scratch)
                    into.addmm_(use.left[part].to(dtype).T, use.right[part].to(dtype))
                else:
                    rows = scratch.view(table.rows, table.cols)
                    rows.index_add_(0, use.ids[part], use.grad_out[part].to(dtype))
            if self.dense is not None:
                scratch += self.dense[j].view_as(scratch)
            sq[:, j] = block_sums(squares(scratch), grid.block_rows, grid.block_cols)
            if directions is not None:
                dots[:, j] = (directions.to(sq.dtype) * scratch.real).sum((1, 2))
        return sq, dots

    # -- self-check ----------------------------------------------------------------------

    def sample(self) -> Tensor:
        """Fixed pseudo-random entries of the gradient, half of them in rows known to be used; all
        entries of a parameter that has no more."""
        samples, name = self.batch.samples, self.target.name
        if name not in samples:
            grid, device = self.target.grid, self.parameter.device
            index = _random_entries(grid.numel, device, min(SAMPLE, max(grid.numel, 1)))
            ids = [i.reshape(-1) for i, _ in self._expected_ids]
            ids = [i for i in ids if i.numel()]
            if ids and grid.numel > SAMPLE:
                used = torch.cat(ids)
                half = len(index) // 2
                rows = used[_random_entries(used.numel(), device, half)].long()
                cols = self.table.cols
                index = torch.cat([rows * cols + index[:half] % cols, index[half:]])
            samples[name] = index
        return samples[name]

    def _check_in(self, entries: Callable[[Tensor], Tensor]) -> None:
        if not self.target.self_check:
            return
        part = entries(self.sample())
        self.sampled = part if self.sampled is None else self.sampled + part


@keep
def _random_entries(numel: int, device: torch.device, count: int) -> Tensor:
    """``count`` numbers below ``numel``, the same each time; all of them if there are no more."""
    if numel <= SAMPLE and count == numel:
        return torch.arange(numel, device=device)
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


def squares(tensor: Tensor) -> Tensor:
    """``|x|²`` of real or complex numbers."""
    if not tensor.is_complex():
        return tensor.square()
    return torch.view_as_real(tensor.resolve_conj()).square().sum(-1)


def _complex_influence(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    block_rows: int,
    block_cols: int,
    directions: Tensor | None,
    want_grad: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`ops.cross_influence` of complex factors, as two products of real ones: of twice as
    many rows, real and imaginary parts in turn."""
    re, im = torch.view_as_real(right.resolve_conj()).unbind(-1)
    both = torch.view_as_real(left.resolve_conj()).movedim(-1, 1).flatten(0, 1)

    def product(first: Tensor, second: Tensor, against: Tensor | None) -> tuple[Tensor, ...]:
        pairs = torch.stack((first, second), 1).flatten(0, 1)
        return ops.cross_influence(
            both, pairs, 2 * offsets, block_rows, block_cols, against, want_grad
        )

    real, imaginary = product(re, -im, directions), product(im, re, None)
    grad = torch.complex(real[0], imaginary[0]).to(dtype or left.dtype)
    return grad, real[1] + imaginary[1], real[2]


_DIFFERENTIATED = "its layer's backward pass was itself differentiated (create_graph=True)"


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
    owner: Tensor | None = None  # packed rows: int64 [rows, tokens], the example of each token
    ids: list[int] | None = None  # of the examples, if they were given
    refused: list[tuple[str, str]] = field(default_factory=list)  # one example: see Measurement
    # brings the taps back while a checkpoint computes again; uses are counted or were before
    again: Callable[[Batch, bool], AbstractContextManager[None]] | None = None
    mixing: set[str] = field(default_factory=set)  # functions in which examples met each other
    autocast: set[torch.dtype] = field(default_factory=set)  # that parameters were used under
    counting: bool = True
    nested: bool = False  # meanwhile: a backward pass in there is no part of the one around it
    inputs: list[tuple[ref[Tensor], Mark]] = field(default_factory=list)  # of the model
    # where checkpoints are not found: ids of the modules that ran, and whose their inputs' rows are
    modules: set[int] = field(default_factory=set)
    given: dict[int, list[Mark | None]] = field(default_factory=dict)
    recomputed: set[int] = field(default_factory=set)
    records: WeakValueDictionary[str, ParamRecord] = field(default_factory=WeakValueDictionary)
    arrived: dict[str, ParamRecord] = field(default_factory=dict)
    # earlier forward passes whose backward pass had not come when this one began
    earlier: Mapping[int, ref[Batch]] = field(default_factory=dict)
    known_rows: dict[tuple[object, ...], tuple[Tensor, Rows]] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop what the backward pass brought."""
        for record in self.arrived.values():
            record.forget()
        self.arrived.clear()

    def meant_by(self, tensors: Sequence[Tensor]) -> Batch:
        """The batch whose activations a function is given, the latest if there are several: a loss
        may be computed after the next forward pass, with parameters in it."""
        return max(self.makers(tensors), key=lambda batch: batch.index)

    def makers(self, tensors: Sequence[Tensor]) -> list[Batch]:
        """The batches whose forward passes made the activations among ``tensors``; this one if
        there are none."""
        if not self.earlier:
            return [self]
        found = {}
        for tensor in tensors:
            if not tensor.requires_grad:
                continue
            if marked(tensor, self.index) is not None:
                found[self.index] = self
            elif (other := foreign(tensor, self.index)) is not None and other.batch in self.earlier:
                found[other.batch] = self.earlier[other.batch]() or self
        return list(found.values()) or [self]

    def lookup(self, tensor: Tensor) -> ParamRecord | None:
        target = self.targets.get(id(tensor))
        return None if target is None else self.record_of(target)

    def record_of(self, target: Target) -> ParamRecord:
        record = self.records.get(target.name)
        if record is None:
            record = self.records[target.name] = ParamRecord(target, self)
            # Here and not when the model is called: its own forward may be what sets autocast.
            kind = target.parameter.device.type
            if torch.is_autocast_enabled(kind):
                self.autocast.add(torch.get_autocast_dtype(kind))
        return record

    def rows_of(self, owner: Tensor, shape: torch.Size) -> Rows:
        """Rows of a tensor of this leading shape with these owners (dimensions of size one count
        for all). Kept for the batch: every layer of a packed batch asks for the same."""
        key = (owner.data_ptr(), owner.shape, owner.stride(), shape)
        if key not in self.known_rows:
            rows = Rows.of(owner.expand(shape).reshape(-1), self.n_examples)
            self.known_rows[key] = (owner, rows)  # kept, so that its address stays its own
        return self.known_rows[key][1]


__all__ = ["Batch", "ParamRecord", "Target"]
