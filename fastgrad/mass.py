"""The matrix behind every question about blocks and examples: squared influence, block by example.

Squares are what adds up: over the blocks of a parameter, over parameters, and (in expectation,
for independent examples) over examples. Plain arrays: no model code.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgrad.concentration import FloatArray, IntArray, frozen
from fastgrad.errors import StatsError
from fastgrad.stats import GradientStats, Scale

#: Rows of a large matrix are read in stretches of about this many bytes.
STRETCH = 1 << 25


class Rows(ABC):
    """A matrix of which a stretch of rows is read or made when asked for.

    Attributes:
        shape: ``(rows, columns)``.
        dtype: float32 or float64.
    """

    shape: tuple[int, ...]
    dtype: Any

    def __len__(self) -> int:
        return int(self.shape[0])

    @abstractmethod
    def __getitem__(self, rows: slice) -> npt.NDArray[np.floating]:
        """Some rows, one after the other; those asked for before may be asked for again."""


class NpyRows(Rows):
    """A matrix in an ``.npy`` file of which rows are read when asked for.

    A memory-mapped array would count as memory of the process, page by page, until all of it is;
    this holds one stretch of rows at a time.

    Args:
        path: a two-dimensional C-ordered float32 or float64 array, as :func:`numpy.save` writes it.

    Raises:
        StatsError: if it is missing, damaged or another kind of array.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                version = np.lib.format.read_magic(file)
                header = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                          else np.lib.format.read_array_header_2_0)  # fmt: skip
                self.shape, columns_first, self.dtype = header(file)
                self._start = file.tell()
        except (OSError, ValueError) as error:
            raise StatsError(f"{self.path} cannot be read as an .npy file: {error}") from error
        if len(self.shape) != 2 or columns_first or self.dtype not in (np.float32, np.float64):
            raise StatsError(f"{self.path} holds {self.dtype} {self.shape}; a C-ordered float32 or "
                             "float64 matrix is needed")
        wanted = self._start + self.shape[0] * self.shape[1] * self.dtype.itemsize
        if os.path.getsize(self.path) < wanted:
            raise StatsError(f"{self.path} is cut off: {os.path.getsize(self.path)} bytes of "
                             f"{wanted}")

    def __getitem__(self, rows: slice) -> npt.NDArray[np.floating]:
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise StatsError(f"{self.path} is read in stretches of rows, not by {rows!r}")
        first, last, _ = rows.indices(self.shape[0])
        columns = self.shape[1]
        count = max(0, last - first) * columns
        start = self._start + first * columns * self.dtype.itemsize
        found = np.fromfile(self.path, self.dtype, count, offset=start)
        if found.size != count:
            raise StatsError(f"{self.path} became shorter while it was read")
        return found.reshape(-1, columns)


@dataclass(frozen=True, eq=False)
class MassMatrix:
    """Squared influence ``‖g_ij‖²`` of example j on block i.

    Attributes:
        values: ``[R, E]`` float64 or float32, finite, not negative; in memory, or
            :class:`Rows`.
        sizes: int64 ``[R]`` elements of each block.
        names: parameter of each row.
        blocks: int64 ``[R]`` number of the block within its parameter.
        example_ids: int64 ``[E]``.
        left_out: parameters without a row, because their influence is not known.
        by_block: float64 ``[R]`` mass of each block, all examples together.
        by_example: float64 ``[E]`` mass of each example, all blocks together.
    """

    values: Any
    sizes: IntArray
    names: list[str] = field(default_factory=list)
    blocks: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    example_ids: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    left_out: tuple[str, ...] = ()
    by_block: FloatArray = field(init=False)
    by_example: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        by_block, by_example = np.empty(self.n_blocks), np.zeros(self.n_examples)
        for rows, part in self.stretches():  # margins and check in one reading
            by_block[rows] = part.sum(1, dtype=np.float64)
            by_example += part.sum(0, dtype=np.float64)
            fine = np.isfinite(by_block[rows]) & (part.min(1) >= 0)
            if not fine.all():
                name = self.names[rows.start + int(np.flatnonzero(~fine)[0])]
                raise StatsError(f"{name}: influence must be finite and not negative. Remedy: "
                                 "leave out the examples whose gradient is NaN or infinite")
        object.__setattr__(self, "by_block", frozen(by_block))
        object.__setattr__(self, "by_example", frozen(by_example))
        total = float(self.by_block.sum())
        if not total:
            raise StatsError("there is no influence at all: every gradient is zero")
        if not np.isfinite(total):
            raise StatsError("the sum of all influence overflows. Remedy: divide the values by the "
                             "largest of them; only shares matter")

    @classmethod
    def of(
        cls,
        values: npt.ArrayLike | Rows,
        sizes: npt.ArrayLike | None = None,
        names: Sequence[str] | None = None,
        example_ids: npt.ArrayLike | None = None,
    ) -> MassMatrix:
        """A matrix of squared influences as it is.

        Args:
            values: ``[R, E]``; float32 and float64 arrays (also memory-mapped ones) are not copied.
            sizes: ``[R]`` elements of each block; 1 each by default.
            names: of the rows; ``row 0``, ``row 1``, ... by default.
            example_ids: ``[E]`` whole numbers; 0, 1, ... by default.

        Raises:
            StatsError: if the arrays do not fit each other, there is no row or column, or a value
                is NaN, infinite or negative.
        """
        v: Any = values if isinstance(values, Rows) else np.asarray(values)
        if v.dtype.kind not in "fiub":
            raise StatsError(f"values must be real numbers, got {v.dtype}")
        if v.dtype not in (np.float32, np.float64):
            v = v.astype(np.float64)
        if len(v.shape) != 2 or 0 in v.shape:
            raise StatsError(f"values must be [blocks, examples] with one of each, got {v.shape}")
        rows, columns = v.shape
        n = np.ones(rows, dtype=np.int64) if sizes is None else np.asarray(sizes)
        ids = np.arange(columns) if example_ids is None else np.asarray(example_ids)
        labels = [f"row {i}" for i in range(rows)] if names is None else list(names)
        if n.shape != (rows,) or ids.shape != (columns,) or len(labels) != rows:
            raise StatsError(f"sizes {n.shape}, names [{len(labels)}] and example_ids {ids.shape} "
                             f"do not fit values {v.shape}")
        if not (np.issubdtype(n.dtype, np.integer) and (n > 0).all()):
            raise StatsError("sizes count elements: whole numbers, 1 or more")
        if not np.issubdtype(ids.dtype, np.integer):
            raise StatsError(f"example_ids are whole numbers, got {ids.dtype}")
        numbers = np.zeros(rows, np.int64)
        return cls(v, n.astype(np.int64), labels, numbers, ids.astype(np.int64))

    @classmethod
    def from_stats(
        cls, stats: GradientStats, scale: Scale = "contribution", *, blocks: bool = True
    ) -> MassMatrix:
        """The squared influence that a probe measured.

        Args:
            stats: with examples (``Probe(per_example=True)``).
            scale: see :meth:`GradientStats.influence`.
            blocks: one row for each block where block detail was kept; False: one row for each
                parameter.

        Raises:
            StatsError: without examples, or if no parameter's influence is known.
        """
        factor = stats.influence(scale)  # raises what there is to say about examples and scale
        known = ~np.isnan(factor).any(1)
        known &= stats.numel > 0
        if not known.any():
            raise StatsError("no parameter's influence is known: see stats.coverage")
        parts, sizes, names, numbers = [], [], [], []
        for i in np.flatnonzero(known):
            name = stats.names[i]
            if blocks and name in stats.block_sq:
                part = stats.blocks(name, scale) ** 2
                size = stats.grid(name).sizes()
            else:
                part, size = factor[i : i + 1] ** 2, stats.numel[i : i + 1]
            parts.append(part)
            sizes.append(size)
            names += [name] * len(part)
            numbers.append(np.arange(len(part)))
        left_out = [n for n, k, size in zip(stats.names, known, stats.numel, strict=True)
                    if not k and size]  # fmt: skip
        return cls(np.concatenate(parts), np.concatenate(sizes), names, np.concatenate(numbers),
                   stats.example_ids, tuple(left_out))  # fmt: skip

    @property
    def n_blocks(self) -> int:
        return int(self.values.shape[0])

    @property
    def n_examples(self) -> int:
        return int(self.values.shape[1])

    def stretches(self) -> Iterator[tuple[slice, npt.NDArray[np.floating]]]:
        """Rows of ``values``, as many at a time as fit into ``STRETCH`` bytes."""
        step = max(1, STRETCH // (self.n_examples * self.values.dtype.itemsize))
        for start in range(0, self.n_blocks, step):
            rows = slice(start, min(start + step, self.n_blocks))
            yield rows, self.values[rows]

    def on_examples(self, chosen: npt.NDArray[np.bool_]) -> FloatArray:
        """``[R]`` mass of each block on these examples, ``[E]``."""
        if chosen.all():
            return self.by_block
        out = np.empty(self.n_blocks)
        columns = np.flatnonzero(chosen)
        for rows, part in self.stretches():
            out[rows] = part[:, columns].sum(1, dtype=np.float64)
        return out

    def on_blocks(self, chosen: npt.NDArray[np.bool_]) -> FloatArray:
        """``[E]`` mass of each example on these blocks, ``[R]``."""
        if chosen.all():
            return self.by_example
        out = np.zeros(self.n_examples)
        for rows, part in self.stretches():
            out += part[chosen[rows]].sum(0, dtype=np.float64)
        return out

    def in_memory(self) -> npt.NDArray[np.floating]:
        """``values`` as an array."""
        return self.values if isinstance(self.values, np.ndarray) else self.values[:]


__all__ = ["MassMatrix", "NpyRows", "Rows"]
