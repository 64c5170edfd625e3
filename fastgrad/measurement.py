"""What a probe has measured so far: backward passes become columns of the statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, float64

from fastgrad.batches import Reduction, factors
from fastgrad.blocks import BlockGrid, condensed
from fastgrad.errors import CoverageError, NonFiniteGradientError
from fastgrad.recorder import Column, Recorder
from fastgrad.records import Batch, Target, mismatch, squares
from fastgrad.stats import Coverage
from fastgrad.stats_shards import ShardWriter
from fastgrad.transfer import Transfer
from fastgrad_kernels import ops
from fastgrad_kernels.layout import bare, block_sums, matrix_view, sum_of_squares


def squared_blocks(grad: Tensor, grid: BlockGrid) -> Tensor:
    """``[n_blocks]`` squared sums of a gradient, NaN where it is not finite."""
    if grid.is_whole and not grad.is_cuda:
        return sum_of_squares(grad).view(1)
    matrix = matrix_view(bare(grad))
    if matrix.is_complex():
        sums = block_sums(squares(matrix), grid.block_rows, grid.block_cols)
        return torch.where(torch.isfinite(sums), sums, torch.nan)
    stats = ops.block_stats(matrix, grid.block_rows, grid.block_cols)
    return torch.where(stats[3] > 0, torch.nan, stats[0])


def absolute_blocks(grad: Tensor, grid: BlockGrid) -> Tensor:
    """``[n_blocks]`` sums of a gradient's absolute values; of a complex one's magnitudes."""
    matrix = matrix_view(bare(grad))
    if grid.is_whole:  # in float64: float32 lanes that add up millions are off by 1e-4
        wide = torch.complex128 if matrix.is_complex() else float64
        return torch.linalg.vector_norm(matrix, 1, dtype=wide).view(1).double()
    if matrix.is_complex():
        return block_sums(matrix.abs(), grid.block_rows, grid.block_cols)
    return ops.block_stats(matrix, grid.block_rows, grid.block_cols)[1]


def aligned_blocks(grad: Tensor, directions: Tensor, grid: BlockGrid) -> Tensor:
    """``[k, n_blocks]`` inner products of a gradient with directions ``[k, rows, cols]``."""
    matrix = matrix_view(bare(grad)).float()
    # One direction at a time: a product with all would take k copies of the gradient.
    return torch.stack([block_sums(d * matrix, grid.block_rows, grid.block_cols)
                        for d in directions])  # fmt: skip


class Arrival(NamedTuple):
    """A parameter's gradient in one backward pass."""

    sq: Tensor  # [n_blocks] squared sums
    entries: Tensor  # values at the records' common sample
    narrow: bool  # it came in 16 bits
    numel: int
    parts: int  # how often it came: more than once, the last part alone is known
    dots: Tensor | None  # [k] products with the directions, for a batch of one example
    absolute: Tensor | None = None  # [n_blocks] sums of absolute values, if they are wanted
    aligned: Tensor | None = None  # [k, n_blocks] products, for a parameter of several blocks


class Reduced(NamedTuple):
    """What a reduction over processes made of the gradients of a backward pass."""

    norms: Mapping[str, Tensor] | None  # [n_blocks] squared sums; None: it is still to come
    divisor: float  # what the processes' sum is divided by
    absolute: Mapping[str, Tensor] | None = None  # [n_blocks] sums of absolute values, if wanted


@dataclass
class _Taken:
    """A backward pass, read out and not yet recorded."""

    columns: list[Column]
    refusals: list[tuple[str, str]]
    used: set[str]
    mixing: set[str]
    aligned: dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """How the numbers are to be understood."""

    per_example: bool
    reduction: Reduction
    loss_scale: float | Callable[[], float]
    strict: bool
    on_nonfinite: Literal["raise", "skip"]
    l1: bool = False


class Measurement:
    """Raw sums of all backward passes, and what could not be measured.

    Args:
        targets: what is probed, in the order of the statistics.
        frozen: names of the model's other parameters.
        detail: names of the parameters whose per-example block influence is kept.
        directions: names of the target directions.
        weight_sq: squared norm of each probed parameter.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        frozen: Sequence[str],
        detail: set[str],
        directions: Sequence[str],
        weight_sq: np.ndarray,
        settings: Settings,
        writer: ShardWriter | None = None,
    ) -> None:
        self.targets, self.frozen, self.detail = targets, frozen, detail
        self.settings = settings
        grids = {t.name: t.grid for t in targets}
        self.recorder = Recorder(
            grids,
            *condensed({n: g.spec for n, g in grids.items()}),
            detail=detail,
            directions=directions,
            weight_sq=weight_sq,
            per_example=settings.per_example,
            writer=writer,
            l1=settings.l1,
        )
        self.missing: dict[str, str] = {}
        self.used: set[str] = set()
        self.mixing: set[str] = set()
        self.skipped = 0
        self._waiting: list[_Taken] = []  # passes whose gradients are still to be reduced
        self._deferred: list[tuple[str, str]] | None = None

    def refuse(self, name: str, reason: str) -> None:
        """A use of a parameter that no tap covers.

        Raises:
            CoverageError: if the probe is strict.
        """
        if self._deferred is not None:
            self._deferred.append((name, reason))
            return
        if self.settings.strict:
            raise CoverageError(
                f"{name}: {reason}. Its cross-influence cannot be measured exactly. "
                "Remedy: strict=False reports it as missing instead"
            )
        self.missing.setdefault(name, reason)

    # -- one backward pass ---------------------------------------------------------------

    def take(
        self,
        batches: Sequence[Batch],
        arrived: Mapping[str, Arrival],
        reduced: Reduced | None = None,
    ) -> bool:
        """Take in a backward pass; False if it was skipped for NaN or infinity, or if its
        gradients will be ``reduced`` over processes together with those of a later pass.

        Raises:
            NonFiniteGradientError: naming the parameters, if such passes are not skipped.
        """
        transfer = Transfer()
        local = {name: transfer(a.sq) for name, a in arrived.items()}
        norms = local
        if reduced is not None:
            norms = {name: transfer(sq) for name, sq in (reduced.norms or {}).items()}
        whole = {n: a.absolute for n, a in arrived.items()} if reduced is None else (
            reduced.absolute or {}
        )  # fmt: skip
        absolute = {name: transfer(s) for name, s in whole.items() if s is not None}
        aligned = {n: transfer(a.aligned) for n, a in arrived.items() if a.aligned is not None}
        # What is refused here counts only if the batches do: they may hold NaN.
        self._deferred = [r for b in batches for r in b.refused]
        alone = len(batches) == 1 and batches[0].n_examples == 1
        spare: dict[str, tuple[int, ...]] = {}
        try:
            checks = self._prepare_checks(batches, arrived, transfer)
            columns = [self._prepare_column(batch, transfer) for batch in batches]
            if alone:
                spare = self._of_gradient(arrived, transfer)
            transfer.run()
        finally:
            refusals, self._deferred = self._deferred, None
        if self.settings.per_example:
            seen = set().union(*(b.arrived for b in batches))
            refusals += [(n, _UNSEEN) for n in arrived if n not in seen]
        with np.errstate(invalid="ignore"):  # infinity: whether that counts is seen below
            refusals += self._mismatches(checks, arrived, local, transfer)
        if alone:  # the batch's gradient is the example's: what no tap covers is known too
            lacking = [n for n, _ in refusals if n in spare and arrived[n].parts == 1]
            columns[0] |= {n: spare[n] for n in lacking}
            refusals = [(n, r) for n, r in refusals if n not in lacking]
        refusals += [(n, _PARTS) for n, a in arrived.items() if a.parts > 1]
        made = []
        divisor = 1.0 if reduced is None else reduced.divisor
        if self.settings.per_example:
            made = [
                self._column(b, k, transfer, divisor)
                for b, k in zip(batches, columns, strict=True)
            ]
        mixing = set().union(*(b.mixing for b in batches))
        products = {n: transfer[k].astype(np.float64) / divisor for n, k in aligned.items()}
        self._waiting.append(_Taken(made, refusals, set(arrived), mixing, products))
        if reduced is not None and reduced.norms is None:
            return False
        return self._record(
            {name: transfer[key] for name, key in norms.items()},
            {name: transfer[key].astype(np.float64) for name, key in absolute.items()},
        )

    def forget_waiting(self) -> None:
        """Passes whose gradients were never reduced are no part of anything."""
        self._waiting.clear()

    def _record(
        self, norms: Mapping[str, np.ndarray], absolute: Mapping[str, np.ndarray]
    ) -> bool:
        """The passes that waited, as one whose gradient has these squared sums and, where they
        are wanted, sums of absolute values."""
        taken, self._waiting = self._waiting, []
        bad = [name for name, sq in norms.items() if not np.isfinite(sq).all()]
        if bad:
            if self.settings.on_nonfinite == "raise":
                raise NonFiniteGradientError(
                    bad, "This batch was left out of the statistics; earlier batches are kept."
                )
            self.skipped += 1
            return False
        self.used |= {name for name, sq in norms.items() if sq.any()}
        for one in taken:
            self.used |= one.used
            self.mixing |= one.mixing
            for name, reason in one.refusals:
                self.refuse(name, reason)
        columns = [column for one in taken for column in one.columns]
        squares = {n: sq.astype(np.float64) for n, sq in norms.items()}
        self.recorder.add(columns, squares, absolute, [one.aligned for one in taken])
        return True

    def _prepare_checks(
        self, batches: Sequence[Batch], arrived: Mapping[str, Arrival], transfer: Transfer
    ) -> dict[str, tuple[int, list[int], bool]]:
        """What the self-check compares, per parameter: autograd's entries, the taps' sums and
        whether 16 bits lie between them."""
        found = {}
        for name, arrival in arrived.items():
            records = [b.arrived[name] for b in batches if name in b.arrived]
            if records and records[0].target.self_check:
                sums = [transfer(r.sampled) for r in records if r.sampled is not None]
                rounded = arrival.narrow or any(r.rounded for r in records)
                found[name] = (transfer(arrival.entries), sums, rounded)
        return found

    def _mismatches(
        self,
        checks: Mapping[str, tuple[int, list[int], bool]],
        arrived: Mapping[str, Arrival],
        norms: Mapping[str, int],
        transfer: Transfer,
    ) -> list[tuple[str, str]]:
        found = []
        for name, (entries, sums, rounded) in checks.items():
            norm = float(np.sqrt(transfer[norms[name]].sum()))
            rms = norm / max(arrived[name].numel, 1) ** 0.5
            error = mismatch(transfer[entries], [transfer[k] for k in sums], rms, rounded)
            if error is not None:
                found.append((name, _MISMATCH.format(error)))
        return found

    def _prepare_column(self, batch: Batch, transfer: Transfer) -> dict[str, tuple[int, ...]]:
        """Keys of each parameter's squared sums, signed influences and, if kept, blocks."""
        keys = {}
        for target in self.targets:
            name = target.name
            record = batch.arrived.get(name)
            result = record.finish() if record is not None else None
            if result is None:
                continue
            values, products = result
            one = values.shape[0] == 1
            total = values.reshape(-1) if one else values.sum(0, dtype=float64)
            found = [transfer(total), transfer(products)]
            if name in self.detail and not target.grid.is_whole:
                found.append(transfer(values.float()))
            keys[name] = tuple(found)
        return keys

    def _of_gradient(
        self, arrived: Mapping[str, Arrival], transfer: Transfer
    ) -> dict[str, tuple[int, ...]]:
        """The same from the gradient, if that is one example's."""
        keys = {}
        for target in self.targets:
            arrival = arrived.get(target.name)
            if arrival is None or not self.settings.per_example:
                continue
            dots = arrival.sq.new_zeros(0) if arrival.dots is None else arrival.dots
            found = [transfer(arrival.sq.sum().view(1)), transfer(dots[:, None])]
            if target.name in self.detail and not target.grid.is_whole:
                found.append(transfer(arrival.sq[:, None].float()))
            keys[target.name] = tuple(found)
        return keys

    def _column(
        self,
        batch: Batch,
        keys: Mapping[str, tuple[int, ...]],
        transfer: Transfer,
        divisor: float,
    ) -> Column:
        scale = self.settings.loss_scale
        scale = float(scale() if callable(scale) else scale) / divisor
        mean, total = factors(batch, self.settings.reduction, scale)
        return Column(
            batch.n_examples,
            {name: transfer[k[0]].astype(np.float64) / divisor**2 for name, k in keys.items()},
            {name: transfer[k[1]].astype(np.float64) / divisor for name, k in keys.items()},
            {name: transfer[k[2]] / divisor**2 for name, k in keys.items() if len(k) > 2},
            batch.label_tokens or [-1] * batch.n_examples,
            mean,
            total,
            batch.ids,
        )

    # -- result --------------------------------------------------------------------------

    def covers_something(self) -> bool:
        return not (self.settings.per_example and self.used and self.used <= set(self.missing))

    def coverage(self) -> list[Coverage]:
        """One entry for each parameter of the model."""
        report = []
        for name in (t.name for t in self.targets):
            if name not in self.used:
                report.append(Coverage(name, "unused", "no gradient reached it"))
            elif not self.settings.per_example:
                report.append(Coverage(name, "exact", "gradient norm only"))
            elif name in self.missing:
                report.append(Coverage(name, "missing", self.missing[name]))
            else:
                report.append(Coverage(name, "exact"))
        return report + [Coverage(n, "frozen", "not probed") for n in self.frozen]


_PARTS = (
    "its gradient arrived in several parts in one backward pass (reentrant activation "
    "checkpointing of a shared weight)"
)
_UNSEEN = (
    "it received a gradient that no tap saw: from a function without a tap, from outside the "
    "probed model's forward pass, or in a second backward pass"
)
_MISMATCH = (
    "the self-check found that the taps' sum differs from autograd's gradient by {:.1%}: part of "
    "its uses is not covered"
)
