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
MEASURED = ("norm", "rms", "relative", "l1", "alignment", "alignment_density")
#: Sums over a block, in which large blocks come first; the others compare element by element.
SUMS = ("norm", "alignment")
CONTROLS = ("random", "magnitude", "first", "last")


class Ranked:
    """Blocks in the order in which they are wanted.

    Attributes:
        names: the parameters.
        owner, ids, sizes: int64 ``[n]``, for each rank the parameter's number, the block's number
            in it and its elements.
        unranked: parameters of which a block has no score.
    """

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

    def named(self, ranks: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Parameter name -> ascending numbers of the blocks at these ranks."""
        owner, ids = self.owner[ranks], self.ids[ranks]
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
        raise SelectionError(
            "ranking 'relative' below whole parameters divides by norms of the weights' blocks, "
            "which neither statistics nor a blueprint hold. Remedy: pass model=... with its "
            "weights (--model on the command line), or blocks='module', or ranking 'rms'"
        )
    raise SelectionError(f"{ranking!r} is not a gradient norm; use norm, rms or relative")


def block_scores(
    source: Blueprint | GradientStats | None,
    model: nn.Module | None,
    ranking: str,
    grids: Mapping[str, BlockGrid],
    seed: int,
    direction: str | None = None,
) -> dict[str, Array]:
    """Score of every block; larger is wanted more; NaN where it is not known.

    Raises:
        SelectionError: if source or model do not know what the ranking needs.
    """
    if direction is not None and not ranking.startswith("alignment"):
        raise SelectionError(f"direction={direction!r} is for ranking='alignment' or "
                             f"'alignment_density', not {ranking!r}")
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
    if ranking.startswith("alignment"):
        sums = _alignment(source, grids, direction)
        if ranking == "alignment":
            return sums
        return {n: s / np.maximum(grids[n].sizes(), 1) for n, s in sums.items()}
    if ranking == "l1":
        return _mean_abs(source, grids)
    if not isinstance(source, GradientStats):
        source.refuse_ranking(ranking)
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
    source: Blueprint | GradientStats, grids: Mapping[str, BlockGrid], direction: str | None
) -> dict[str, Array]:
    """Inner product of each block's part of the contributions with the direction, mean over
    examples."""
    if not isinstance(source, GradientStats):
        raise SelectionError("a blueprint does not know the direction that alignment refers to. "
                             "Remedy: pass GradientStats of a Probe with targets=...")
    known = source.directions
    if not known:
        raise SelectionError("the statistics have no target direction to be aligned with. Remedy: "
                             "measure with Probe(model, targets=...)")
    if direction is None and len(known) > 1:
        raise SelectionError(f"the statistics have {len(known)} target directions. Remedy: "
                             f"direction=... with one of {', '.join(known)}")
    if direction is not None and direction not in known:
        raise SelectionError(f"the statistics have no direction {direction!r}; they have "
                             f"{', '.join(known)}")
    if source.n_examples == 0:
        raise SelectionError("alignment needs examples. Remedy: measure with per_example=True")
    k = 0 if direction is None else known.index(direction)
    mean = dict(zip(source.names, source.alignment_by_direction[k].mean(1), strict=True))
    found, unrecorded = {}, []
    for name, grid in grids.items():
        if grid.is_whole:
            found[name] = np.array([mean[name]])
        elif source.grid(name).same_blocks(grid):
            if name in source.block_alignment:
                found[name] = source.block_alignment[name][k] / source.n_examples
            else:
                unrecorded.append(name)
    if unrecorded:
        raise SelectionError(f"{unrecorded[0]}: these statistics hold no alignment of its blocks; "
                             "they were made by an older version. Remedy: blocks='module', or "
                             "measure anew")
    refuse_coarse(source.spec, source.specs, grids, found)
    return found


def _mean_abs(
    source: Blueprint | GradientStats, grids: Mapping[str, BlockGrid]
) -> dict[str, Array]:
    """Mean absolute gradient of each block."""
    if not isinstance(source, GradientStats) or not source.block_batch_abs:
        what = "these statistics do" if isinstance(source, GradientStats) else "a blueprint does"
        raise SelectionError(f"{what} not hold absolute gradients. Remedy: pass GradientStats of "
                             "Probe(model, l1=True), or rank by rms")
    found = {}
    for name, grid in grids.items():
        own = source.grid(name)
        if own.same_blocks(grid):
            found[name] = source.mean_abs(name)
        elif grid.is_whole:
            mean = (source.mean_abs(name) * own.sizes()).sum() / max(own.numel, 1)
            found[name] = np.array([mean])
    refuse_coarse(source.spec, source.specs, grids, found)
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
