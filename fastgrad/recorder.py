"""What a probe has seen so far, backward pass by backward pass, on its way to statistics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgrad.blocks import BlockGrid
from fastgrad.errors import StatsError
from fastgrad.stats import Array, Coverage, GradientStats
from fastgrad.stats_shards import ShardReader, ShardWriter


@dataclass(frozen=True)
class Column:
    """The examples of one forward pass.

    ``sq[name] [n]``, ``dots[name] [k, n]`` and ``blocks[name] [n_blocks, n]`` are there for the
    parameters that were covered; the others had no influence, or their coverage says that it is
    missing.
    """

    n_examples: int
    sq: Mapping[str, NDArray[Any]]
    dots: Mapping[str, NDArray[Any]]
    blocks: Mapping[str, NDArray[Any]]
    label_tokens: Sequence[int]
    mean_factor: Sequence[float]
    sum_factor: Sequence[float]
    example_ids: Sequence[int] | None = None


class Recorder:
    """Collects columns and the norms of backward passes; makes :class:`GradientStats` of them.

    Args:
        grids: parameter name -> how it divides, for the probed parameters in order.
        spec, specs: the granularities of which the grids were made.
        detail: parameters whose per-example block influence is kept.
        directions: names of the target directions.
        weight_sq: squared norms of the weights.
        per_example: whether there will be columns.
        writer: where pieces go when ``writer.every`` examples (or passes) have come together, so
            that memory does not grow with their number.
        l1: whether sums of absolute gradients are kept.
    """

    def __init__(
        self,
        grids: Mapping[str, BlockGrid],
        spec: str,
        specs: Mapping[str, str],
        *,
        detail: Collection[str],
        directions: Sequence[str],
        weight_sq: Array,
        per_example: bool = True,
        writer: ShardWriter | None = None,
        l1: bool = False,
    ) -> None:
        self.grids, self.spec, self.specs = dict(grids), spec, dict(specs)
        self.directions, self.weight_sq = list(directions), weight_sq
        self.writer, self.per_example, self.l1 = writer, per_example, l1
        self._detail = [
            n for n, g in self.grids.items() if per_example and n in detail and not g.is_whole
        ]
        self._skipped = 0  # batches that are counted in pieces already written
        self.n_passes = 0
        self._forget()

    def _forget(self) -> None:
        self._columns: list[tuple[int, Column]] = []  # with the number of the pass
        self._passes: list[dict[str, float]] = []
        # Of the passes' blocks only the sum is wanted: kept apart they would grow with each pass.
        several = {n: g.n_blocks for n, g in self.grids.items() if not g.is_whole}
        self._blocks = {name: np.zeros(n) for name, n in several.items()}
        self._absolute = (
            {n: np.zeros(g.n_blocks) for n, g in self.grids.items()} if self.l1 else {}
        )
        k = len(self.directions) if self.per_example else 0
        self._aligned = {name: np.zeros((k, n)) for name, n in several.items() if k}

    def add(
        self,
        columns: Sequence[Column],
        norms: Mapping[str, Array],
        absolute: Mapping[str, Array] | None = None,
        aligned: Sequence[Mapping[str, Array]] = (),
    ) -> None:
        """One backward pass: its forward passes, and of the gradient that autograd accumulated
        the squared norms ``norms[name] [n_blocks]`` and, for ``l1``, the sums of absolute values
        ``absolute[name] [n_blocks]``. ``aligned`` holds ``[k, n_blocks]`` inner products of
        the directions with parts of that gradient, for parameters of several blocks."""
        number = len(self._passes)
        self._columns += [(number, column) for column in columns]
        self._passes.append({name: float(sq.sum()) for name, sq in norms.items()})
        for name, total in self._blocks.items():
            if name in norms:
                total += norms[name]
        for name, total in self._absolute.items():
            if absolute and name in absolute:
                total += absolute[name]
        for part in aligned:
            for name, products in part.items():
                self._aligned[name] += products
        self.n_passes += 1

    @property
    def is_due(self) -> bool:
        """Enough came together for a file."""
        if self.writer is None:
            return False
        waiting = sum(c.n_examples for _, c in self._columns)
        return max(waiting, len(self._passes)) >= self.writer.every

    def write(self, coverage: Sequence[Coverage], meta: Mapping[str, Any]) -> None:
        """Hand what came together to the writer, and forget it.

        Raises:
            OSError: if the disk refuses; the piece waits in the writer then.
        """
        assert self.writer is not None
        skipped = int(meta.get("skipped_batches") or 0)
        if self._passes or skipped > self._skipped:
            own = {**meta, "skipped_batches": skipped - self._skipped}
            self.writer.accept(self._piece(coverage, own))
            self._skipped = skipped
            self._forget()
        self.writer.flush()

    def stats(self, coverage: Sequence[Coverage], meta: Mapping[str, Any]) -> GradientStats:
        """Everything recorded so far. Where pieces go to disk, what waits is written first, and
        per-example block detail stays there."""
        if self.writer is None:
            return self._piece(coverage, meta)
        self.write(coverage, meta)
        return ShardReader(self.writer.directory).load(blocks=False)

    def _piece(self, coverage: Sequence[Coverage], meta: Mapping[str, Any]) -> GradientStats:
        names, columns = list(self.grids), [c for _, c in self._columns]
        n_examples = sum(c.n_examples for c in columns)
        sq = np.zeros((len(names), n_examples))
        alignment = np.zeros((len(self.directions), len(names), n_examples))
        block_sq = {
            n: np.zeros((self.grids[n].n_blocks, n_examples), dtype=np.float32)
            for n in self._detail
        }
        start = 0
        for column in columns:
            span = slice(start, start + column.n_examples)
            start = span.stop
            for p, name in enumerate(names):
                if name in column.sq:
                    sq[p, span] = column.sq[name]
                    alignment[:, p, span] = column.dots[name]
                if name in column.blocks:
                    block_sq[name][:, span] = column.blocks[name]
        aligned = {n: v.copy() for n, v in self._aligned.items()}
        missing = {c.name for c in coverage if c.status == "missing"}
        for p, name in enumerate(names):
            if name in missing:
                sq[p], alignment[:, p] = np.nan, np.nan
                if name in block_sq:
                    block_sq[name][:] = np.nan
                if name in aligned:
                    aligned[name][:] = np.nan
        sizes = [c.n_examples for c in columns]
        made = GradientStats(
            names=names,
            shapes=[g.shape for g in self.grids.values()],
            spec=self.spec,
            specs=dict(self.specs),
            sq=sq,
            batch=np.repeat(np.array([k for k, _ in self._columns], np.int64), sizes),
            label_tokens=_joined([c.label_tokens for c in columns], np.int64),
            mean_factor=_joined([c.mean_factor for c in columns], np.float64),
            sum_factor=_joined([c.sum_factor for c in columns], np.float64),
            batch_sq=np.array([[b.get(n, 0.0) for b in self._passes] for n in names]).reshape(
                len(names), len(self._passes)
            ),
            weight_sq=self.weight_sq,
            block_sq=block_sq,
            block_batch_sq={n: v.copy() for n, v in self._blocks.items()},
            block_batch_abs={n: v.copy() for n, v in self._absolute.items()},
            block_alignment=aligned,
            directions=list(self.directions),
            alignment_by_direction=alignment,
            coverage_list=list(coverage),
            meta=dict(meta),
        )
        ids = _ids(columns)
        if ids is not None:
            made.example_ids, made.running_ids = ids, False
        return made


def _joined(parts: Sequence[Sequence[float]], dtype: Any) -> NDArray[Any]:
    return np.array([x for part in parts for x in part], dtype=dtype)


def _ids(columns: Sequence[Column]) -> NDArray[np.int64] | None:
    """Ids of the examples, if they were given; without them GradientStats numbers."""
    given = [c.example_ids for c in columns if c.example_ids is not None]
    if not given:
        return None
    if len(given) < len(columns):
        raise StatsError(
            f"{len(columns) - len(given)} of {len(columns)} forward passes came without example "
            "ids. Remedy: give them for all, or for none"
        )
    return _joined(given, np.int64)
