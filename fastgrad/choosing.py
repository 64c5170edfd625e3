"""Choosing what to train: a measurement, a ranking and one budget give a selection."""

from __future__ import annotations

import fnmatch
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgrad.blocks import BlockGrid, condensed, grid_of
from fastgrad.budgets import Budget, filled, one_budget, price_of, searched
from fastgrad.errors import SelectionError
from fastgrad.filling import Filling
from fastgrad.granularity import HEAD, Blocks, check_blocks, resolve
from fastgrad.ranking import CONTROLS, MEASURED, SUMS, Ranked, block_scores
from fastgrad.release_noise import above_noise, in_noise, is_noised
from fastgrad.selection import Selection
from fastgrad.spread import Shares, plan_spread
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastgrad.blueprint import Blueprint


def select(
    source: Blueprint | GradientStats | None,
    model: nn.Module | None = None,
    *,
    fraction: float | None = None,
    count: int | None = None,
    submodules: int | None = None,
    memory: str | int | None = None,
    flops: str | float | None = None,
    k_star: str | None = None,
    blocks: Blocks | None = None,
    ranking: str = "rms",
    direction: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    floor: Shares | None = None,
    cap: Shares | None = None,
    spread_by: str | None = None,
    seed: int = 0,
    largest: bool = True,
    optimizer: str = "adamw",
    batch_shape: tuple[int, int] | None = None,
    master_dtype: torch.dtype | None = None,
    hash_weights: bool = True,
) -> Selection:
    """Choose the blocks to train: rank them, then fill one budget.

    Blocks are taken from the best score down (equal scores in the model's order). A block that
    does not fit into what is left of the budget, or of its group's cap, is skipped and the next
    ones are tried, so the budget is used well and never exceeded. Floors come first: the best
    blocks of each group that meet its floor, or where those do not fit the blocks of least
    expense.

    Args:
        source: what was measured; None for the controls that need no measurement.
        model: needed by ``memory`` and ``flops``, by ``magnitude``, by ``relative`` below module
            granularity, where ``source`` is None, where only part of the model was measured, and
            for ``blocks`` that depend on it. If given, parameters that do not require a gradient
            are left out.
        fraction: budget as a share of *all* elements of the model, 0 < fraction <= 1.
        count: budget as a number of blocks.
        submodules: budget as a number of parameters (weights, biases: the submodules of a
            blueprint) of which blocks may be chosen; without a cap, all of their blocks are.
        memory: budget in bytes or as text such as ``"16GiB"``, for everything that
            :func:`fastgrad.plan_memory` counts: weights, packed copies, gradients, moments and,
            with ``batch_shape``, activations. What is chosen was planned itself and fits. Memory
            does not rise with every block (a parameter chosen whole may take less than most of
            it), so a larger choice that fits too may be overlooked.
        flops: budget of one step as a number or text such as ``"2.5T"``, of what
            :func:`fastgrad.flops.plan_flops` counts; needs ``batch_shape``.
        k_star: budget from the blueprint: ``"memory"`` or ``"flops"``.
        blocks: granularity; by default that of the measurement, ``"module"`` without one. Or
            ``"head"``, or a mapping of name patterns to granularities, for which ``model`` is
            needed; see :func:`fastgrad.granularity.resolve`.
        ranking: by gradient: ``norm``, ``rms`` (norm/√n, the default), ``relative``
            (‖g‖/‖w‖; weights that are exactly zero come first), ``l1`` (mean absolute value;
            statistics of ``Probe(l1=True)``), ``alignment`` (signed inner product with a target
            direction, mean over examples) and ``alignment_density`` (that by number of elements).
            Controls: ``random``, ``magnitude`` (‖w‖/√n), ``first``, ``last`` (position in the
            model). ``norm`` and ``alignment`` add up over a block; the others compare blocks of
            different sizes and granularities element by element.
        direction: name of the target direction, where the statistics have several.
        include, exclude: name patterns (``fnmatch``) of the parameters that may be chosen.
        floor, cap: share of each group's elements that may be chosen which is chosen at least, at
            most: a number, or a mapping of patterns of group names to numbers (the first pattern
            that matches counts; without one there is no floor or cap).
        spread_by: what makes a group for ``floor`` and ``cap``: ``layer`` (the default),
            ``parameter`` or ``kind`` (the same parameter of all layers), named as in
            :meth:`Selection.summary`.
        seed: of ``random``.
        largest: False takes the lowest scores first, as a control.
        optimizer, batch_shape, master_dtype: for ``memory`` and, but for the last, ``flops``, as
            :func:`fastgrad.plan_memory` has them.
        hash_weights: where the source names no weights, let the selection name those of the
            model, so that it is not used on others by mistake. Reads all weights once; under
            ``fully_shard`` every process has to call this.

    Raises:
        SelectionError: for not exactly one budget, an unknown ranking, a pattern that matches
            nothing, a source that does not fit the model or is too coarse, floors and caps that
            cannot be met, or an empty result.
        BlockSpecError: for an unknown granularity.
    """
    budget = one_budget({"fraction": fraction, "count": count, "submodules": submodules,
                         "memory": memory, "flops": flops, "k_star": k_star})  # fmt: skip
    if isinstance(source, str | os.PathLike):
        raise SelectionError(
            f"select needs a blueprint or statistics, not a path. Remedy: "
            f"fg.Blueprint.from_pretrained({os.fspath(source)!r})"
        )
    if ranking not in MEASURED + CONTROLS:
        raise SelectionError(f"unknown ranking {ranking!r}; use one of "
                             f"{', '.join(MEASURED + CONTROLS)}")
    if ranking in MEASURED and source is None:
        raise SelectionError(f"ranking {ranking!r} needs a measurement. Remedy: a Blueprint or "
                             "GradientStats, or use random, magnitude, first or last")
    price = price_of(budget, model, optimizer, batch_shape, master_dtype)
    spec, specs = _granularity(source, model, blocks)
    shapes, candidates = parameters_of(source, model, ranking in MEASURED)
    candidates = filtered_names(candidates, shapes, include, exclude)
    grids = {name: grid_of(name, shapes[name], spec, specs) for name in candidates}
    scores = block_scores(source, model, ranking, grids, seed, direction)
    ranked = Ranked(grids, scores, largest)
    spread = plan_spread(ranked, spread_by, floor, cap)
    meta: dict[str, Any] = {
        "ranking": ranking,
        "budget": {"kind": budget.kind, "value": _plain(budget.value)},
        "source": _describe(source),
        "seed": seed if ranking == "random" else None,
        "largest": largest,
        "include": list(include) if include else None,
        "exclude": list(exclude) if exclude else None,
        "unranked": ranked.unranked,
        "note": _note(budget, batch_shape, ranking, grids),
    }
    if direction is not None:
        meta["direction"] = direction
    release = _release_noise(source, ranking)
    if release is not None:
        meta["release_noise"] = release
    digest = _hash_of(source)
    total = sum(math.prod(shape) for shape in shapes.values())

    def made(filling: Filling) -> Selection:
        return Selection(shapes, spec, ranked.named(filling.ranks), digest, meta, specs)

    if price is None:
        filling = filled(budget, source, ranked, spread, total)
    else:
        filling, needed = searched(budget, ranked, spread, made, price, total)
        meta["needs"] = {"unit": price.unit, "value": needed}
    if spread is not None:
        meta["spread"] = {
            "by": spread_by or "layer",
            "floor": _plain(floor),
            "cap": _plain(cap),
            "floors_by": filling.floors_by,
            "groups": spread.to_meta(),
        }
    if digest is None and hash_weights and model is not None:
        digest = _hash_of_weights(model)
    chosen = made(filling)
    if release is not None and (said := _in_noise(source, chosen.names)):
        meta["note"] = "; ".join(filter(None, [meta["note"], said]))
        warnings.warn(said, stacklevel=2)
        chosen = made(filling)
    return chosen


def _release_noise(
    source: Blueprint | GradientStats | None, ranking: str
) -> dict[str, Any] | None:
    """Of a ranking by a private release: how many of its norms are above the noise, and which are
    not; both null if the release does not say."""
    if source is None or isinstance(source, GradientStats) or ranking not in MEASURED:
        return None
    if not is_noised(source.file):
        return None
    above = above_noise(source.file)
    return {
        "noise_std": source.file.privacy.noise_std,
        "n": len(source.measured_names) if above is None else len(above),
        "n_above": None if above is None else sum(above.values()),
        "not_above": None if above is None else [n for n, a in above.items() if not a],
    }


def _in_noise(source: Any, names: Sequence[str]) -> str | None:
    """What to say of a choice by a private release; nothing where all norms are above the noise."""
    above = above_noise(source.file)
    said = f"the blueprint is a private release: {in_noise(source.file)}"
    if above is None:
        return said
    if all(above.values()):
        return None
    lost = [n for n in names if not above.get(n, True)]
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    return said + (f"; of those chosen {', '.join(lost[:3])}{more}" if lost else "; none is chosen")


def _plain(value: Any) -> Any:
    """As JSON knows it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _note(
    budget: Budget,
    batch_shape: tuple[int, int] | None,
    ranking: str,
    grids: Mapping[str, BlockGrid],
) -> str | None:
    notes = []
    if budget.kind == "memory" and batch_shape is None:
        notes.append("activations are not counted in the memory budget: no batch_shape was given")
    if ranking in SUMS and len({g.spec for g in grids.values() if len(g.shape) > 1}) > 1:
        better = "rms" if ranking == "norm" else "alignment_density"
        notes.append(f"{ranking} adds up over a block, so that of several granularities the "
                     f"coarser comes first; {better} compares element by element")
    return "; ".join(notes) or None


def _granularity(
    source: Blueprint | GradientStats | None, model: nn.Module | None, blocks: Blocks | None
) -> tuple[str, Mapping[str, str]]:
    if blocks is None:
        return ("module", {}) if source is None else (source.spec, source.specs)
    check_blocks(blocks)
    if isinstance(blocks, str) and blocks != HEAD:
        return blocks, {}
    if model is None:
        raise SelectionError(f"blocks={blocks!r} depends on the model. Remedy: pass model=..., or "
                             "leave blocks out to take those of the measurement")
    return condensed(resolve(model, blocks))


def parameters_of(
    source: Blueprint | GradientStats | None, model: nn.Module | None, measured: bool = True
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of all parameters of the model, and the names of those that may be chosen:
    measured ones, if ``measured``, that require a gradient."""
    known = {} if source is None else dict(zip(source.names, source.shapes, strict=True))
    if model is None:
        if source is None:
            raise SelectionError("without a measurement the shapes must come from model=...")
        total = source.n_model_parameters if not isinstance(source, GradientStats) else (
            source.meta.get("n_model_parameters")
        )  # fmt: skip
        have = sum(math.prod(s) for s in known.values())
        if total is not None and total != have:
            raise SelectionError(
                f"only {have:,} of the model's {total:,} parameters were measured, and the shapes "
                "of the others are not known here. Remedy: pass model=..."
            )
        return known, [n for n in known if n in _measured_names(source)]
    from fastgrad.identity import PACKED_SUFFIX, model_parameters

    if any(n.endswith(PACKED_SUFFIX) for n, _ in model.named_parameters()):
        raise SelectionError("the model is being trained partially, so most of its weights are "
                             "frozen. Remedy: call .remove() on that Partial first")
    own = model_parameters(model)
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    for name, shape in known.items():
        if name not in shapes:
            raise SelectionError(f"{name!r} was measured, but this model lacks it; the measurement "
                                 "is of another model")
        if shapes[name] != tuple(shape):
            raise SelectionError(f"{name} has shape {shapes[name]} here and {tuple(shape)} in the "
                                 "measurement; it is of another model")
    trainable = [n for n, p in own.items() if p.requires_grad and p.is_floating_point()]
    if source is not None and measured:
        wanted = _measured_names(source)
        trainable = [n for n in trainable if n in wanted]
    return shapes, trainable


def _measured_names(source: Blueprint | GradientStats) -> set[str]:
    if isinstance(source, GradientStats):
        return set(source.names)
    return source.measured_names


def filtered_names(
    candidates: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> list[str]:
    """The candidates that pass both lists of patterns."""
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise SelectionError(f"{argument} is a list of patterns; write [{patterns!r}]")
        for pattern in patterns or ():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in shapes):
                raise SelectionError(
                    f"{argument}: the pattern {pattern!r} matches no parameter; names look like "
                    f"{', '.join(list(shapes)[:3])}"
                )

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in patterns)

    left = [
        name
        for name in candidates
        if (include is None or matches(name, include))
        and not matches(name, exclude or ())
        and math.prod(shapes[name]) > 0
    ]
    if not left:
        raise SelectionError(
            "no parameter can be chosen: none is left that was measured, requires a gradient and "
            "passes include and exclude. Remedy: wider patterns, or requires_grad_(True)"
        )
    return left


def _describe(source: Blueprint | GradientStats | None) -> dict[str, Any] | None:
    if source is None:
        return None
    return {
        "kind": "stats" if isinstance(source, GradientStats) else "blueprint",
        "n_examples": source.n_examples,
        "n_batches": source.n_batches,
        "domain_tags": [] if isinstance(source, GradientStats) else list(source.domain_tags),
    }


def _hash_of(source: Blueprint | GradientStats | None) -> str | None:
    if isinstance(source, GradientStats):
        return source.meta.get("weights_hash")
    return None if source is None else source.weights_hash


def _hash_of_weights(model: nn.Module) -> str | None:
    """Hash of the weights that the model has; None on the meta device, where there are none."""
    from fastgrad.identity import model_parameters, weights_hash

    if any(p.is_meta for p in model_parameters(model).values()):
        return None
    return weights_hash(model)
