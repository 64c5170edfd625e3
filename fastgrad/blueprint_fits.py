"""What follows from a measurement's norms: fits over submodules and blocks, and k* per resource.

Nothing here looks at examples, so a merged measurement goes through the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastgrad
from fastgrad import heavytail
from fastgrad.blocks import grid_of, in_words
from fastgrad.blueprint_schema import SCHEMA_VERSION, BlueprintFile, finite_or_none, validate
from fastgrad.dead import DEAD_RELATIVE
from fastgrad.errors import BlueprintError, ResourceError, StatsError
from fastgrad.resources import OVER_AGGRESSIVE_SHARE, CostModel, k_star

Array = NDArray[np.float64]
# File, granularity, block vectors, granularities of parameters that differ.
Made = tuple[BlueprintFile, str, dict[str, Array], dict[str, str]]

# Points of the Lorenz curve in the file, denser where k is small: that is where the mass is.
LORENZ_K = (np.arange(33) / 32.0) ** 2

#: Resamples of the fits within single submodules, at most: there may be hundreds of them, and
#: with 50 the standard error of a p-value is 0.07 at most.
MOST_BLOCK_RESAMPLES = 50

PAPER_LABEL = "closed forms of arXiv 2511.01077, for comparison only: nothing uses them"


@dataclass(frozen=True)
class FitOptions:
    """How the fits are made.

    Attributes:
        n_bootstrap, seed: of the intervals.
        tokens_per_step: that k* for FLOPs is about; None: there is none.
        costs: further resources, or other coefficients of memory and FLOPs.
        over_aggressive_share: a k* that keeps less of the mass is warned of.
    """

    n_bootstrap: int = 200
    seed: int = 0
    tokens_per_step: int | None = None
    costs: Sequence[CostModel] = ()
    over_aggressive_share: float = OVER_AGGRESSIVE_SHARE


def finish(
    document: dict[str, Any],
    spec: str,
    specs: Mapping[str, str],
    blocks: dict[str, Array],
    options: FitOptions,
) -> Made:
    """Add versions, fits and k* to a document that lacks them, and check all against the schema.

    Raises:
        BlueprintError: if that cannot be done or the content does not fit the schema.
    """
    total = document["model"]["n_parameters"]
    norms, sizes, parts, measured = [], [], [], []
    dead = set(document["dead"])
    for entry in document["submodules"]:
        numel = math.prod(entry["shape"])
        if numel:
            norms.append(entry.get("grad_norm") or 0.0)
            sizes.append(numel)
            parts.append((entry["name"], entry["shape"]))
            if entry.get("grad_norm") is not None:
                # Rounding is no value of a tail; as zero it is counted and left out.
                measured.append(0.0 if entry["name"] in dead else entry["grad_norm"])
    # What was not measured keeps its place on the axis of parameters: k is of the whole model.
    rest = total - sum(sizes)
    if rest > 0:
        norms.append(0.0)
        sizes.append(rest)
    norm, tail = np.array(norms), np.array(measured)
    if not blocks:
        spec, specs = "module", {}
    try:
        fits = {
            "norm": _fit(norm, sizes, tail, options)[0],
            "squared_norm": _fit(norm**2, sizes, tail**2, options, DEAD_RELATIVE**2)[0],
        }
        curve = heavytail.lorenz(norm**2, sizes)
        fit, granularity, block_fit = fits["squared_norm"], "module", None
        if blocks:
            mass = [blocks.get(n, np.array([x])) for (n, _), x in zip(parts, norm**2, strict=False)]
            size = [
                grid_of(n, shape, spec, specs).sizes() if n in blocks
                else np.array([math.prod(shape)])
                for n, shape in parts
            ]
            if rest > 0:
                mass.append(np.zeros(1))
                size.append(np.array([rest]))
            block_fit, curve = _fit(np.concatenate(mass), np.concatenate(size), None, options)
            fit, granularity = block_fit, in_words(spec, specs)
        document["submodules"] = [
            entry | _within(entry, spec, specs, blocks, options) for entry in document["submodules"]
        ]
        tail_fit = fits["norm"]["tail"]
        document |= {
            "schema_version": SCHEMA_VERSION,
            "fastgrad_version": fastgrad.__version__,
            "fits": fits,
            "block_fit": block_fit,
            "k_star": _k_stars(
                fit["gamma"]["gamma"], curve, granularity, total, tail_fit["rank_exponent"], options
            ),
        }
        return validate(document), spec, blocks, dict(specs)
    except (StatsError, ResourceError) as error:
        raise BlueprintError(f"no blueprint can be made of this: {error}") from error
    except ValueError as error:
        raise BlueprintError(f"the content does not fit the blueprint's schema: {error}") from error


def _fit(
    mass: Array, sizes: Any, tail: Array | None, options: FitOptions, floor: float = DEAD_RELATIVE
) -> tuple[dict[str, Any], heavytail.LorenzCurve]:
    n_bootstrap, seed = options.n_bootstrap, options.seed
    curve = heavytail.lorenz(mass, sizes)
    gamma = heavytail.fit_gamma(mass, sizes, n_bootstrap=n_bootstrap, seed=seed)
    found = {
        "lorenz": {"k": LORENZ_K.tolist(), "share": curve.share_at(LORENZ_K).tolist()},
        "gamma": finite_or_none(gamma.to_dict()),
        "tail": None
        if tail is None
        else finite_or_none(heavytail.fit_tail(tail, n_bootstrap, seed, floor=floor).to_dict()),
    }
    return found, curve


# -- within a submodule --------------------------------------------------------------------------


def _within(
    entry: Mapping[str, Any], spec: str, specs: Mapping[str, str], blocks: Mapping[str, Array],
    options: FitOptions,
) -> dict[str, Any]:  # fmt: skip
    """Concentration over one submodule's blocks: gamma of ‖g‖², rank exponent of ‖g‖."""
    name = entry["name"]
    if name not in blocks:
        if entry.get("grad_norm") is None:
            return {"block_fit_reason": "not measured"}
        return {"block_fit_reason": "measured as a whole: no blocks"}
    energy = blocks[name]
    n_bootstrap = min(options.n_bootstrap, MOST_BLOCK_RESAMPLES)
    if not energy.any():
        return {"n_blocks": int(energy.size), "block_fit_reason": "no gradient reached it"}
    sizes = grid_of(name, entry["shape"], spec, specs).sizes()
    gamma = heavytail.fit_gamma(energy, sizes, n_bootstrap=n_bootstrap, seed=options.seed)
    found: dict[str, Any] = {
        "n_blocks": int(energy.size), "gamma": gamma.gamma,
        "gamma_interval": finite_or_none(list(gamma.gamma_interval)),
    }  # fmt: skip
    if energy.size < heavytail.MIN_TAIL:  # its tail cannot have more: the verdict is known
        return found | {
            "rank_exponent_verdict": "too_few",
            "block_fit_reason": f"{energy.size} blocks; a rank exponent needs a tail of "
            f"{heavytail.MIN_TAIL}",
        }
    tail = heavytail.fit_tail(np.sqrt(energy), n_bootstrap=n_bootstrap, seed=options.seed)
    return found | finite_or_none({
        "rank_exponent": tail.rank_exponent,
        "rank_exponent_interval": list(tail.rank_interval),
        "rank_exponent_verdict": tail.verdict,
        "rank_exponent_n_tail": tail.n_tail,
        "block_fit_reason": tail.reason,
    })  # fmt: skip


# -- k* --------------------------------------------------------------------------------------


def _k_stars(
    gamma: float,
    curve: heavytail.LorenzCurve,
    granularity: str,
    total: int,
    rank_exponent: float | None,
    options: FitOptions,
) -> dict[str, Any]:
    """k* from the mass ‖g‖², the one that adds up when blocks are divided further."""
    tokens = options.tokens_per_step
    costs = {"memory": CostModel.memory(total)}
    if tokens:
        costs["flops"] = CostModel.flops(total, tokens)
    given: set[str] = set()
    for cost in options.costs:
        if cost.n_params != total:
            raise ResourceError(
                f"the cost of {cost.resource} is of a model with {cost.n_params:,} parameters, "
                f"the blueprint's has {total:,}. Remedy: CostModel of this model"
            )
        if cost.resource in given:
            raise ResourceError(f"two costs of {cost.resource} are given. Remedy: one of each")
        given.add(cost.resource)
        costs[cost.resource] = cost
    found = {}
    for resource, cost in costs.items():
        best = k_star(gamma, cost, options.over_aggressive_share)
        measured = curve.share_at(best.value)
        found[resource] = best.to_dict() | {
            # The fitted curve may keep more or less than the measured one, which is known here.
            "over_aggressive": measured < options.over_aggressive_share,
            "unit": cost.unit,
            "mass": "squared_norm",
            "granularity": granularity,
            "tokens_per_step": tokens if resource == "flops" and resource not in given else None,
            "curve_share": measured,
            "paper": _paper(rank_exponent, cost, curve),
        }
    return found


def _paper(
    rank_exponent: float | None, cost: CostModel, curve: heavytail.LorenzCurve
) -> dict[str, Any] | None:
    if rank_exponent is None or cost.per_param == 0.0:
        return None
    gamma = heavytail.paper_gamma(rank_exponent)
    value = gamma * cost.fixed / (cost.per_param * (1.0 - gamma)) if gamma < 1.0 else math.inf
    if not math.isfinite(value):
        return None
    return {
        "label": PAPER_LABEL, "rank_exponent": rank_exponent, "gamma": gamma, "value": value,
        "curve_share": curve.share_at(min(value, 1.0)),
    }  # fmt: skip


def warned_share(file: Any) -> float:
    """The ``over_aggressive_share`` of a measurement (``Measured``), where it is one for all."""
    found = {k.over_aggressive_share for k in file.k_star.values()} - {None}
    return float(found.pop()) if len(found) == 1 else OVER_AGGRESSIVE_SHARE


def costs_of(file: Any) -> list[CostModel]:
    """The resources of a blueprint that are not counted anew: all but memory and FLOPs as
    :meth:`CostModel.memory` and :meth:`CostModel.flops` count them by default.

    Args:
        file: a measurement of the schema (``Measured``).
    """
    total, found = file.model.n_parameters, []
    for resource, entry in file.k_star.items():
        try:
            cost = CostModel(
                resource, entry.unit, entry.fixed, entry.per_param, total, entry.mode,
                entry.n_points, entry.residual,
            )  # fmt: skip
        except ResourceError as error:
            raise BlueprintError(f"k_star.{resource}: {error}") from error
        if resource == "memory" and cost == CostModel.memory(total):
            continue
        if resource == "flops" and entry.tokens_per_step:
            continue
        found.append(cost)
    return found
