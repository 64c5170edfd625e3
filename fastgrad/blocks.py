"""How a parameter divides into blocks: the unit of scores, selections and packed tensors.

Every parameter is looked at as a matrix: its leading dimension indexes rows, all others
together index columns. A :class:`BlockGrid` lays a regular grid over that matrix. Blocks are
numbered row by row. Blocks at the lower and right edge may be smaller than the block shape;
packed tensors pad them with zeros, which no optimizer moves.

Statistics, selections and files say the granularity of their parameters in two fields: ``spec``
for all, and ``specs`` for those that differ. The functions below read that pair in one way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastgrad.errors import BlockSpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TILE = re.compile(r"^([1-9]\d{0,17}|\*)x([1-9]\d{0,17}|\*)$", re.ASCII)
NAMED_SPECS = ("module", "row", "column", "expert")


def check_spec(spec: str) -> str:
    """Return ``spec`` if it names a granularity.

    Raises:
        BlockSpecError: for anything but ``module``, ``row``, ``column``, ``expert``, a tile
            such as ``128x128`` or a stripe such as ``64x*`` (64 rows, all columns).
    """
    if isinstance(spec, str) and (spec in NAMED_SPECS or _TILE.fullmatch(spec)) and spec != "*x*":
        return spec
    raise BlockSpecError(
        f"unknown block granularity {spec!r}; use one of {', '.join(NAMED_SPECS)}, a tile size "
        "such as '128x128' or a stripe such as '64x*'"
        + (
            ". Heads depend on the model: fastgrad.granularity.resolve(model, 'head') says which "
            "stripes they are"
            if spec == "head"
            else "; a whole parameter is 'module'"
            if spec == "*x*"
            else ""
        )
    )


def check_specs(specs: object, names: Iterable[str]) -> dict[str, str]:
    """``specs`` if it maps some of ``names`` to granularities.

    Raises:
        BlockSpecError: naming what does not fit.
    """
    if not isinstance(specs, Mapping):
        raise BlockSpecError(f"granularities by name are a mapping, not {type(specs).__name__}")
    if unknown := set(specs) - set(names):
        raise BlockSpecError(
            f"a granularity is given for {min(map(str, unknown))!r}, which is no parameter here"
        )
    return {name: check_spec(spec) for name, spec in specs.items()}


def grid_of(
    name: str, shape: Sequence[int], spec: str, specs: Mapping[str, str] | None
) -> BlockGrid:
    """The grid of the parameter ``name``: its own granularity if it has one, else ``spec``."""
    return BlockGrid.of(shape, (specs or {}).get(name, spec))


def condensed(by_name: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """``(spec, specs)`` that say the same: one granularity if all agree, else ``module`` and
    those that differ from it."""
    found = set(by_name.values())
    if len(found) == 1:
        return found.pop(), {}
    return "module", {name: spec for name, spec in by_name.items() if spec != "module"}


def in_words(spec: str, specs: Mapping[str, str] | None) -> str:
    """A pair of fields for a reader: ``module (24 parameters 64x*, 12 parameters *x64)``."""
    counts: dict[str, int] = {}
    for own in (specs or {}).values():
        counts[own] = counts.get(own, 0) + 1
    shown = sorted(counts.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{n} parameter{'s' * (n > 1)} {own}" for own, n in shown[:4])
    rest = sum(n for _, n in shown[4:])
    return spec + (f" ({listed}{f', {rest} others' if rest else ''})" if shown else "")


@dataclass(frozen=True)
class BlockGrid:
    """A regular grid of blocks over a parameter's matrix view.

    Attributes:
        shape: the parameter's shape.
        spec: the granularity asked for: ``module``, ``row``, ``column``, ``expert``, ``RxC``;
            ``Rx*`` and ``*xC`` are stripes of whole rows and columns.
        rows, cols: size of the matrix view (leading dimension, product of the others).
        block_rows, block_cols: size of a full block.

    One-dimensional parameters (biases, norm weights) are always one block: a bias is cheap, and
    a selection of single scalars would cost more in bookkeeping than it saves. ``expert`` means
    the leading index of a parameter with three or more dimensions, and one block otherwise.
    """

    shape: tuple[int, ...]
    spec: str
    rows: int
    cols: int
    block_rows: int
    block_cols: int

    @classmethod
    def of(cls, shape: Sequence[int], spec: str = "module") -> BlockGrid:
        """The grid of granularity ``spec`` over a parameter of this shape.

        Raises:
            BlockSpecError: if ``spec`` is not a granularity.
        """
        check_spec(spec)
        shape = tuple(int(n) for n in shape)
        rows = shape[0] if len(shape) >= 2 else 1
        cols = math.prod(shape[1:]) if len(shape) >= 2 else math.prod(shape)
        block_rows, block_cols = rows, cols
        if len(shape) >= 2:
            if spec == "row" or (spec == "expert" and len(shape) >= 3):
                block_rows = 1
            elif spec == "column":
                block_cols = 1
            elif match := _TILE.match(spec):
                block_rows, block_cols = (
                    n if g == "*" else min(int(g), n)
                    for g, n in zip(match.groups(), (rows, cols), strict=True)
                )
        return cls(shape, spec, rows, cols, max(block_rows, 1), max(block_cols, 1))

    @property
    def grid_rows(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def grid_cols(self) -> int:
        return -(-self.cols // self.block_cols)

    @property
    def n_blocks(self) -> int:
        return self.grid_rows * self.grid_cols

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def is_whole(self) -> bool:
        """True if the whole parameter is one block."""
        return self.n_blocks == 1

    def same_blocks(self, other: BlockGrid) -> bool:
        """True if both divide alike, however it was said (``row`` and ``1x*``)."""
        return (self.shape, self.block_rows, self.block_cols) == (
            other.shape,
            other.block_rows,
            other.block_cols,
        )

    def bounds(self, block: int) -> tuple[int, int, int, int]:
        """Half-open matrix ranges ``(row0, row1, col0, col1)`` of one block."""
        if not 0 <= block < self.n_blocks:
            raise BlockSpecError(f"block {block} is outside 0..{self.n_blocks - 1}")
        i, j = divmod(block, self.grid_cols)
        r0, c0 = i * self.block_rows, j * self.block_cols
        return r0, min(r0 + self.block_rows, self.rows), c0, min(c0 + self.block_cols, self.cols)

    def sizes(self) -> NDArray[np.int64]:
        """Number of parameters in each block, int64 ``[n_blocks]``; they sum to ``numel``."""
        heights = (
            np.minimum(np.arange(1, self.grid_rows + 1) * self.block_rows, self.rows)
            - np.arange(self.grid_rows) * self.block_rows
        )
        widths = (
            np.minimum(np.arange(1, self.grid_cols + 1) * self.block_cols, self.cols)
            - np.arange(self.grid_cols) * self.block_cols
        )
        return np.multiply.outer(heights, widths).reshape(-1).astype(np.int64)

    def check_ids(self, ids: Sequence[int] | NDArray[np.int64], name: str) -> NDArray[np.int64]:
        """Block numbers as a sorted int64 array, refused if out of range or repeated."""
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and (array.min() < 0 or array.max() >= self.n_blocks):
            raise BlockSpecError(
                f"{name}: block numbers {array.min()}..{array.max()} do not fit its "
                f"{self.n_blocks} blocks of granularity {self.spec!r}"
            )
        if array.size > self.n_blocks // 64:  # marks are quicker than sorting many numbers
            marked = np.zeros(self.n_blocks, dtype=np.bool_)
            marked[array] = True
            unique = np.flatnonzero(marked)
        else:
            unique = np.unique(array)
        if unique.size != array.size:
            raise BlockSpecError(f"{name}: the same block is listed twice")
        return unique
