"""Choosing what to train: a measurement, a ranking and one budget give a selection."""

from __future__ import annotations

import fnmatch
import math
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastgrad.blocks import condensed, grid_of
from fastgrad.errors import SelectionError
from fastgrad.granularity import HEAD, Blocks, check_blocks, resolve
from fastgrad.ranking import CONTROLS, MEASURED, Ranked, block_scores
from fastgrad.selection import Selection
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastgrad.blueprint import Blueprint

# A memory budget is met to this fraction of the parameters: below what a plan can promise.
_MEMORY_RESOLUTION = 1e-4


def select(
    source: Blueprint | GradientStats | None,
    model: nn.Module | None = None,
    *,
    fraction: float | None = None,
    count: int | None = None,
    k_star: str | None = None,
    memory: str | int | None = None,
    blocks: Blocks | None = None,
    ranking: str = "rms",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 0,
    largest: bool = True,
    optimizer: str = "adamw",
    batch_shape: tuple[int, int] | None = None,
    master_dtype: torch.dtype | None = None,
) -> Selection:
    """Choose the blocks to train: rank them, then fill one budget.

    Blocks are taken from the best score down (equal scores in the model's order). A block that
    does not fit into what is left of the budget is skipped and the next ones are tried, so the
    budget is used well and never exceeded.

    Args:
        source: what was measured; None for the controls that need no measurement.
        model: needed by ``memory``, by ``magnitude``, by ``relative`` below module granularity,
            where ``source`` is None, where only part of the model was measured, and for ``blocks``
            that depend on it. If given, parameters that do not require a gradient are left out.
        fraction: budget as a share of *all* elements of the model, 0 < fraction <= 1.
        count: budget as a number of blocks.
        k_star: budget from the blueprint: ``"memory"`` or ``"flops"``.
        memory: budget in bytes or as text such as ``"16GiB"``, for everything that
            :func:`fastgrad.plan_memory` counts.
        blocks: granularity; by default that of the measurement, ``"module"`` without one. Or
            ``"head"``, or a mapping of name patterns to granularities, for which ``model`` is
            needed; see :func:`fastgrad.granularity.resolve`.
        ranking: by gradient: ``norm``, ``rms`` (norm/√n, the default), ``relative``
            (‖g‖/‖w‖; weights that are exactly zero come first), ``alignment`` (signed, mean over
            examples). Controls: ``random``, ``magnitude`` (‖w‖/√n), ``first``, ``last``
            (position in the model).
        include, exclude: name patterns (``fnmatch``) of the parameters that may be chosen.
        seed: of ``random``.
        largest: False takes the lowest scores first, as a control.
        optimizer, batch_shape, master_dtype: for ``memory``, as :func:`fastgrad.plan_memory`.

    Raises:
        SelectionError: for not exactly one budget, an unknown ranking, a pattern that matches
            nothing, a source that does not fit the model or is too coarse, or an empty result.
        BlockSpecError: for an unknown granularity.
    """
    budget = {"fraction": fraction, "count": count, "k_star": k_star, "memory": memory}
    given = {kind: value for kind, value in budget.items() if value is not None}
    if len(given) != 1:
        raise SelectionError(
            "give exactly one budget: fraction, count, k_star or memory; got "
            + (" and ".join(given) or "none")
        )
    if isinstance(source, str | os.PathLike):
        raise SelectionError(
            f"select needs a blueprint or statistics, not a path. Remedy: "
            f"fg.Blueprint.from_pretrained({os.fspath(source)!r})"
        )
    (kind, value), = given.items()
    if ranking not in MEASURED + CONTROLS:
        raise SelectionError(f"unknown ranking {ranking!r}; use one of "
                             f"{', '.join(MEASURED + CONTROLS)}")
    if ranking in MEASURED and source is None:
        raise SelectionError(f"ranking {ranking!r} needs a measurement. Remedy: a Blueprint or "
                             "GradientStats, or use random, magnitude, first or last")
    spec, specs = _granularity(source, model, blocks)
    shapes, candidates = _parameters(source, model, ranking in MEASURED)
    candidates = _filtered(candidates, shapes, include, exclude)
    grids = {name: grid_of(name, shapes[name], spec, specs) for name in candidates}
    scores = block_scores(source, model, ranking, grids, seed)
    ranked = Ranked(grids, scores, largest)
    meta: dict[str, Any] = {
        "ranking": ranking,
        "budget": {"kind": kind, "value": value.item() if isinstance(value, np.generic) else value},
        "source": _describe(source),
        "seed": seed if ranking == "random" else None,
        "largest": largest,
        "include": list(include) if include else None,
        "exclude": list(exclude) if exclude else None,
        "unranked": ranked.unranked,
        "note": "activations are not counted in the memory budget: no batch_shape was given"
        if memory is not None and batch_shape is None
        else None,
    }
    digest = _hash_of(source)

    def made(chosen: Mapping[str, NDArray[np.int64]]) -> Selection:
        return Selection(shapes, spec, chosen, digest, meta, specs)

    total = sum(math.prod(shape) for shape in shapes.values())
    if memory is not None:
        if model is None:
            raise SelectionError("a memory budget needs model=...; one on the meta device will do")
        return _fill_memory(ranked, made, parse_memory(memory), total, model, optimizer,
                            batch_shape, master_dtype)  # fmt: skip
    if count is not None:
        if isinstance(count, bool) or not isinstance(count, int | np.integer):
            raise SelectionError(f"count must be a whole number of blocks; got {count!r}")
        if not 1 <= count <= len(ranked):
            raise SelectionError(f"count must lie in 1..{len(ranked)}, the number of blocks that "
                                 f"can be chosen; got {count}")
        return made(ranked.top(int(count)))
    share = _k_star_value(source, k_star) if k_star is not None else fraction
    return made(ranked.fill(_capacity(share, total)))


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


def parse_memory(text: str | int) -> int:
    """Bytes from a number or from text such as ``16GiB`` (2^30) or ``16GB`` (10^9).

    Raises:
        SelectionError: if it is not a positive amount of memory.
    """
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
             "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", str(text), re.I | re.ASCII)
    size = int(Fraction(match[1]) * units[match[2].lower()]) if match else 0
    if size < 1:
        raise SelectionError(f"{text!r} is not an amount of memory; write for instance '16GiB', "
                             "'500MB' or a number of bytes")
    return size


def _capacity(fraction: Any, total: int) -> int:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float | np.number):
        raise SelectionError(f"fraction must be a number; got {fraction!r}")
    if not 0 < fraction <= 1:
        raise SelectionError(f"fraction must lie in (0, 1]; got {fraction}")
    # As the decimal number that the user wrote: 0.29 of 100 is 29, though 0.29 * 100 < 29.
    return int(Fraction(repr(float(fraction))) * total)


def _k_star_value(source: Blueprint | GradientStats | None, resource: str) -> float:
    if source is None or isinstance(source, GradientStats):
        raise SelectionError("k_star is read from a blueprint. Remedy: pass "
                             "Blueprint.from_stats(stats)")
    if resource not in source.k_star:
        raise SelectionError(f"the blueprint has no k* for {resource!r}; it has "
                             f"{', '.join(source.k_star) or 'none'}")
    return source.k_star[resource].value


def _fill_memory(
    ranked: Ranked,
    made: Any,
    budget: int,
    total: int,
    model: nn.Module,
    optimizer: str,
    batch_shape: tuple[int, int] | None,
    master_dtype: torch.dtype | None,
) -> Selection:
    """The largest filling whose plan stays within ``budget`` bytes, by bisection."""
    import fastgrad

    def attempt(capacity: int) -> tuple[Selection, int]:
        selection: Selection = made(ranked.fill(capacity))
        plan = fastgrad.plan_memory(
            model, selection, optimizer=optimizer, batch_shape=batch_shape,
            master_dtype=master_dtype,
        )  # fmt: skip
        return selection, int(plan.total)

    low, high = int(ranked.sizes.min()), total
    best, needed = attempt(low)
    if needed > budget:
        raise SelectionError(
            f"{budget:,} bytes are not enough: weights and the smallest selection of {low:,} "
            f"elements need {needed:,}. Remedy: a larger memory budget, or finer blocks=..."
        )
    everything, needed = attempt(high)
    if needed <= budget:
        return everything
    # Invariant: what ``low`` gives fits and is in ``best``; what ``high`` gives does not.
    while high - low > max(1, total * _MEMORY_RESOLUTION):
        middle = (low + high) // 2
        selection, needed = attempt(middle)
        if needed <= budget:
            low, best = middle, selection
        else:
            high = middle
    return best


def _parameters(
    source: Blueprint | GradientStats | None, model: nn.Module | None, measured: bool
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of all parameters of the model, and the names of those that may be chosen."""
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
    return {s.name for s in source.submodules if s.grad_norm is not None}


def _filtered(
    candidates: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> list[str]:
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
