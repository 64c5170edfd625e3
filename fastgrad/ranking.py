"""Ranking: a score for every block, and the order in which a budget takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastgrad.blocks import BlockGrid
from fastgrad.errors import SelectionError
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    from torch import nn

    from fastgrad.blueprint import Blueprint

Array = NDArray[np.float64]
MEASURED = ("norm", "rms", "relative", "alignment")
CONTROLS = ("random", "magnitude", "first", "last")


class Ranked:
    """Blocks in the order in which they are wanted."""

    def __init__(
        self, grids: Mapping[str, BlockGrid], scores: Mapping[str, Array], largest: bool
    ) -> None:
        self.names = list(grids)
        sizes = [grids[n].sizes() for n in self.names]
        flat = np.concatenate([scores[n] for n in self.names])
        ids = np.concatenate([np.arange(s.size, dtype=np.int64) for s in sizes])
        owner = np.repeat(np.arange(len(sizes)), [s.size for s in sizes])
        known = ~np.isnan(flat)
        self.unranked = [self.names[i] for i in np.unique(owner[~known])]
        if not known.any():
            raise SelectionError(
                "no block has a score: their influence is not known (see stats.coverage)"
            )
        # A stable sort keeps equal scores in the model's order.
        order = np.argsort(-flat if largest else flat, kind="stable")
        order = order[known[order]]
        self.owner, self.ids = owner[order], ids[order]
        self.sizes = np.concatenate(sizes)[order]

    def __len__(self) -> int:
        return int(self.ids.size)

    def top(self, count: int) -> dict[str, NDArray[np.int64]]:
        return self._named(np.arange(count))

    def fill(self, capacity: int) -> dict[str, NDArray[np.int64]]:
        """Greedy: each block in turn, if it fits into what is left of ``capacity`` elements."""
        left = capacity
        waiting = np.flatnonzero(self.sizes <= left)
        taken = []
        while waiting.size:
            # The longest stretch that fits as a whole, then everything that no longer fits goes:
            # the same result as block by block, without a Python step for each of millions.
            fits = int(np.searchsorted(np.cumsum(self.sizes[waiting]), left, side="right"))
            taken.append(waiting[:fits])
            left -= int(self.sizes[waiting[:fits]].sum())
            waiting = waiting[fits:]
            waiting = waiting[self.sizes[waiting] <= left]
        if not taken:
            raise SelectionError(
                f"the selection is empty: the budget is {capacity:,} elements and the smallest "
                f"block has {int(self.sizes.min()):,}. Remedy: a larger budget or finer blocks=..."
            )
        return self._named(np.concatenate(taken))

    def _named(self, positions: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        owner, ids = self.owner[positions], self.ids[positions]
        by_owner = np.lexsort((ids, owner))
        owner, ids = owner[by_owner], ids[by_owner]
        present, starts = np.unique(owner, return_index=True)
        parts = np.split(ids, starts[1:])
        return {self.names[i]: part for i, part in zip(present, parts, strict=True)}


def rank_scores(
    ranking: str, energy: Array, sizes: NDArray[np.int64], weight_sq: Array | None = None
) -> Array:
    """Scores of blocks from their squared gradient norms ``energy``.

    ``norm`` = √energy, ``rms`` = √(energy / size), ``relative`` = √(energy / weight_sq) with
    infinity for a gradient on weights that are exactly zero.

    Raises:
        SelectionError: for another ranking, or ``relative`` without ``weight_sq``.
    """
    if ranking == "norm":
        return np.sqrt(energy)
    if ranking == "rms":
        return np.sqrt(energy / np.maximum(sizes, 1))
    if ranking == "relative" and weight_sq is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(energy > 0, np.sqrt(energy / weight_sq), 0.0)
    if ranking == "relative":
        raise SelectionError("relative ranking needs the norms of the weights. Remedy: pass model=")
    raise SelectionError(f"{ranking!r} is not a gradient norm; use norm, rms or relative")


def block_scores(
    source: Blueprint | GradientStats | None,
    model: nn.Module | None,
    ranking: str,
    grids: Mapping[str, BlockGrid],
    seed: int,
) -> dict[str, Array]:
    """Score of every block; larger is wanted more; NaN where it is not known."""
    if ranking == "random":
        rng = np.random.default_rng(seed)
        return {name: rng.random(grid.n_blocks) for name, grid in grids.items()}
    if ranking in ("first", "last"):
        places = _places(grids)
        return {n: p if ranking == "last" else -p for n, p in places}
    if ranking == "magnitude":
        if model is None:
            raise SelectionError("ranking 'magnitude' reads the weights. Remedy: pass model=...")
        return {
            name: np.sqrt(sq / grids[name].sizes())
            for name, sq in _weight_sq(model, grids).items()
        }
    assert source is not None
    if ranking == "alignment":
        return _alignment(source, grids)
    energies = stats_energy(source, grids) if isinstance(source, GradientStats) else (
        source.energy(grids)
    )  # fmt: skip
    weights: Mapping[str, Array] = {}
    if ranking == "relative":
        if all(grid.is_whole for grid in grids.values()):
            norms = dict(zip(source.names, source.weight_norm, strict=True))
            weights = {name: np.array([norms[name]]) ** 2 for name in grids}
        elif model is not None:
            weights = _weight_sq(model, grids)
    return {
        name: rank_scores(ranking, energies[name], grid.sizes(), weights.get(name))
        for name, grid in grids.items()
    }


def stats_energy(stats: GradientStats, grids: Mapping[str, BlockGrid]) -> dict[str, Array]:
    """Mean squared gradient norm of each block.

    Raises:
        SelectionError: naming the parameters for which the statistics are too coarse.
    """
    whole = dict(zip(stats.names, stats.grad_norm**2, strict=True))
    energies = {}
    for name, grid in grids.items():
        if grid.is_whole:
            energies[name] = np.array([whole[name]])
        elif name in stats.block_batch_sq and stats.grid(name).same_blocks(grid):
            energies[name] = stats.block_batch_sq[name] / stats.n_batches
    refuse_coarse(stats.spec, stats.specs, grids, energies)
    return energies


def refuse_coarse(
    spec: str,
    specs: Mapping[str, str],
    grids: Mapping[str, BlockGrid],
    found: Mapping[str, object],
) -> None:
    """Raise SelectionError if a grid has no entry in ``found``, which a measurement of the
    granularities ``spec`` and ``specs`` gave."""
    if lacking := [name for name in grids if name not in found]:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        have, wanted = specs.get(lacking[0], spec), grids[lacking[0]].spec
        raise SelectionError(
            f"{lacking[0]}{more}: the measurement has granularity {have!r}, not {wanted!r}. "
            f"Remedy: blocks={have!r}, or measure with Probe(model, blocks={wanted!r})"
        )


def _alignment(
    source: Blueprint | GradientStats, grids: Mapping[str, BlockGrid]
) -> dict[str, Array]:
    if not isinstance(source, GradientStats):
        raise SelectionError("a blueprint does not know the direction that alignment refers to. "
                             "Remedy: pass GradientStats of a Probe with targets=...")
    if len(source.directions) != 1:
        raise SelectionError(f"alignment needs exactly one target direction; the statistics have "
                             f"{len(source.directions)}")
    mean = dict(zip(source.names, source.alignment.mean(1), strict=True))
    found = {name: np.array([mean[name]]) for name, grid in grids.items() if grid.is_whole}
    refuse_coarse("module", {}, grids, found)
    return found


def _places(grids: Mapping[str, BlockGrid]) -> Iterator[tuple[str, Array]]:
    start = 0
    for name, grid in grids.items():
        yield name, np.arange(start, start + grid.n_blocks, dtype=np.float64)
        start += grid.n_blocks


def _weight_sq(model: nn.Module, grids: Mapping[str, BlockGrid]) -> dict[str, Array]:
    from fastgrad.identity import model_parameters
    from fastgrad_kernels.layout import block_sums, matrix_view

    own = model_parameters(model)
    squares = {}
    for name, grid in grids.items():
        if own[name].is_meta:
            raise SelectionError(f"{name} is on the meta device: its weights cannot be ranked")
        matrix = matrix_view(own[name].detach().float()).square()
        sums = block_sums(matrix, grid.block_rows, grid.block_cols)
        squares[name] = sums.double().cpu().numpy()
    return squares
