"""Selection: which blocks of which parameters are to be trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgrad.blocks import BlockGrid


@dataclass(frozen=True)
class Selection:
    """A set of blocks of a model's parameters.

    Attributes:
        shapes: shape of *every* parameter of the model, in the model's order.
        spec: block granularity, see :class:`fastgrad.blocks.BlockGrid`.
        blocks: parameter name -> sorted int64 block numbers; parameters without a selected
            block are absent.
        weights_hash: content hash of the weights the selection was made for, if known.
        meta: how it was made (ranking, budget, source); JSON values only.
    """

    shapes: Mapping[str, tuple[int, ...]]
    spec: str
    blocks: Mapping[str, NDArray[np.int64]]
    weights_hash: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def grid(self, name: str) -> BlockGrid:
        return BlockGrid.of(self.shapes[name], self.spec)

    def is_whole(self, name: str) -> bool:
        """True if every block of the parameter is selected."""
        return name in self.blocks and len(self.blocks[name]) == self.grid(name).n_blocks

    def n_selected(self, name: str) -> int:
        """Number of selected elements of one parameter."""
        if name not in self.blocks:
            return 0
        return int(self.grid(name).sizes()[self.blocks[name]].sum())
