"""Two measurements as one by weight: a released blueprint and a local sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastgrad.blueprint_fits import FitOptions, Made, costs_of, finish, warned_share
from fastgrad.blueprint_schema import Submodule
from fastgrad.dead import DEAD_RELATIVE
from fastgrad.errors import BlueprintError
from fastgrad.staleness import auto_weight

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint

Array = NDArray[np.float64]


def blend(
    released: Blueprint, local: Blueprint, weight: float | Literal["auto"], allow_other: bool
) -> Made:
    """See :meth:`fastgrad.Blueprint.blend`."""
    ours = {s.name: s for s in local.submodules}
    if released.file.fits is None or local.file.fits is None:
        raise BlueprintError(
            "ranks or deciles alone cannot be blended with norms. Remedy: select by one of the two"
        )
    _check_same_model(released, local, allow_other)
    measured = [s.name for s in released.submodules if s.grad_norm is not None]
    theirs = {s.name: s for s in released.submodules}
    r = np.array([theirs[n].share or 0.0 for n in measured])
    m = np.array([ours[n].share or 0.0 for n in measured])
    distance = float(((r - m) ** 2).sum())
    var_r, var_l = released.noise.share_variance, local.noise.share_variance
    w, rule = _weight(weight, distance, var_r, var_l)
    share = dict(zip(measured, np.minimum(w * r + (1 - w) * m, 1.0).tolist(), strict=True))
    top = max(share.values())
    dead = set(released.dead) & set(local.dead)
    hashes = released.weights_hash, local.weights_hash
    a, b = released.file.data, local.file.data
    document: dict[str, Any] = {
        "model": released.file.model.model_dump(by_alias=True)
        | {"weights_hash": hashes[1] or hashes[0]},
        "data": {
            "n_examples": a.n_examples + b.n_examples,
            "n_batches": a.n_batches + b.n_batches,
            "n_label_tokens": None
            if a.n_label_tokens is None or b.n_label_tokens is None
            else a.n_label_tokens + b.n_label_tokens,
            "loss_reduction": a.loss_reduction if a.loss_reduction == b.loss_reduction else None,
            "example_scale": "contribution",
            "shift_labels": a.shift_labels if a.shift_labels == b.shift_labels else None,
            "dtypes": sorted({*a.dtypes, *b.dtypes}),
            "attention": a.attention if a.attention == b.attention else None,
            "skipped_batches": a.skipped_batches + b.skipped_batches,
            "datasets": [d.model_dump() for d in [*a.datasets, *b.datasets]],
            "clip": a.clip if a.clip == b.clip else None,
            "clip_norm": a.clip_norm if a.clip_norm == b.clip_norm else None,
            "seed": a.seed if a.seed == b.seed else None,
        },
        "domain_tags": list(dict.fromkeys([*released.domain_tags, *local.domain_tags])),
        "submodules": [
            _blended_entry(s, ours.get(s.name), share.get(s.name), w) for s in released.submodules
        ],
        # Alive on either side is alive: there the gradient was told from rounding.
        "dead": [n for n in measured if n in dead or share[n] <= DEAD_RELATIVE**2 * top],
        "noise": {
            "share_variance": None
            if var_l is None or var_r is None
            else w * w * var_r + (1 - w) ** 2 * var_l,
            "noise_scale_reason": "not defined for a blend",
        },
        "checkpoints": [c.model_dump() for c in released.file.checkpoints],
        "provenance": local.file.provenance.model_dump(),
        "blend": {
            "blend_weight": w,
            "rule": rule,
            "squared_distance": distance,
            "released": _source(released, w),
            "local": _source(local, 1 - w),
        },
    }
    spec, specs, blocks = _blended_blocks(released, local, share, w)
    flops = local.k_star.get("flops")  # of the training that is to come
    gamma = local.file.fits.norm.gamma
    own = costs_of(local.file)
    known = {cost.resource for cost in own}
    costs = own + [cost for cost in costs_of(released.file) if cost.resource not in known]
    options = FitOptions(
        gamma.n_bootstrap, gamma.seed, flops.tokens_per_step if flops else None, costs,
        warned_share(released.file),
    )  # fmt: skip
    return finish(document, spec, specs, blocks, options)


def _check_same_model(released: Blueprint, local: Blueprint, allow_other: bool) -> None:
    if released.n_model_parameters != local.n_model_parameters:
        raise BlueprintError(
            f"the blueprint is of a model with {released.n_model_parameters:,} parameters, the "
            f"local sample of one with {local.n_model_parameters:,}"
        )
    theirs, ours = (
        {s.name: s.shape for s in b.submodules if s.grad_norm is not None}
        for b in (released, local)
    )
    for name in [*theirs, *ours]:
        if theirs.get(name) != ours.get(name):
            if name in theirs and name in ours:
                what = f"has shape {ours[name]} in the local sample and {theirs[name]} in"
            else:
                what = "was not measured in the local sample, but is in" if name in theirs else (
                    "was measured locally, but not in"
                )  # fmt: skip
            raise BlueprintError(f"{name} {what} the blueprint: they are of different models, or "
                                 "different parameters of it were probed")
    a, b = released.weights_hash, local.weights_hash
    if a is not None and b is not None and a != b and not allow_other:
        raise BlueprintError(
            f"the blueprint was made for weights {a}, the local sample measured on {b}. Remedy: "
            "measure on the released weights, or pass allow_other_weights=True"
        )


def _weight(
    weight: float | Literal["auto"], distance: float, released: float | None, local: float | None
) -> tuple[float, str]:
    if weight == "auto":
        if local is None:
            raise BlueprintError(
                "weight='auto' needs the sampling variance of the local measurement, and so at "
                "least two local batches. Remedy: measure more batches, or pass weight=0.5"
            )
        return auto_weight(distance, local, released), "auto: inverse variance with squared bias"
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise BlueprintError(f"weight must be 'auto' or a number in [0, 1]; got {weight!r}. "
                             "Remedy: 1 is the blueprint alone, 0 the local sample alone")
    return float(weight), "given"


def _blended_entry(
    released: Submodule, local: Submodule | None, share: float | None, w: float
) -> dict[str, Any]:
    frame = {"name": released.name, "shape": released.shape}
    if share is None or local is None:
        return frame | {
            "coverage": released.coverage, "coverage_reason": released.coverage_reason,
            "weight_norm": released.weight_norm,
        }  # fmt: skip
    rank = ("frozen", "unused", "exact", "missing")
    worst = max(released, local, key=lambda s: rank.index(s.coverage))
    weight = local.weight_norm if local.weight_norm is not None else released.weight_norm
    norm = math.sqrt(share)
    variances = released.share_variance, local.share_variance
    return frame | {
        "coverage": worst.coverage,
        "coverage_reason": worst.coverage_reason,
        "n_batches": released.n_batches + local.n_batches,
        "n_examples": released.n_examples + local.n_examples,
        "grad_norm": norm,
        "rms": norm / math.sqrt(released.numel) if released.numel else None,
        "relative_norm": norm / weight if weight else None,
        "weight_norm": weight,
        "share": share,
        "share_variance": None
        if variances[0] is None or variances[1] is None
        else w * w * variances[0] + (1 - w) ** 2 * variances[1],
    }


def _blended_blocks(
    released: Blueprint, local: Blueprint, share: Mapping[str, float], w: float
) -> tuple[str, dict[str, str], dict[str, Array]]:
    if not released.block_sq and not local.block_sq:
        return "module", {}, {}
    finer = local if local.block_sq else released
    shares = [{s.name: s.share or 0.0 for s in b.submodules} for b in (released, local)]
    blocks: dict[str, Array] = {}
    for name, mass in share.items():
        parts = [
            (weight * own[name], source.block_sq[name])
            for weight, own, source in ((w, shares[0], released), (1 - w, shares[1], local))
            if name in source.block_sq and source.grid(name).same_blocks(finer.grid(name))
        ]
        if len(parts) == 2:
            (a, theirs), (b, ours) = parts
            blocks[name] = a * _distribution(theirs) + b * _distribution(ours)
        elif parts:
            blocks[name] = mass * _distribution(parts[0][1])
    return finer.spec, finer.specs, blocks


def _distribution(values: Array) -> Array:
    total = values.sum()
    return values / total if total > 0 else np.full(values.shape, 1 / values.size)


def _source(blueprint: Blueprint, weight: float) -> dict[str, Any]:
    return {
        "weight": weight,
        "share_variance": blueprint.noise.share_variance,
        "model": blueprint.file.model.model_dump(by_alias=True),
        "data": blueprint.file.data.model_dump(),
        "domain_tags": blueprint.domain_tags,
        "provenance": blueprint.file.provenance.model_dump(),
    }
