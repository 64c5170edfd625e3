"""How a blueprint's content comes about: from a measurement, or from two by blending."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy
from numpy.typing import NDArray

import fastgrad
from fastgrad import heavytail
from fastgrad.blocks import grid_of, in_words
from fastgrad.blueprint_schema import (
    SCHEMA_VERSION,
    BlueprintFile,
    Submodule,
    finite_or_none,
    validate,
)
from fastgrad.errors import BlueprintError, ResourceError, StatsError
from fastgrad.resources import CostModel, k_star
from fastgrad.staleness import auto_weight, share_variance, split_half
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    from torch import nn

    from fastgrad.blueprint import Blueprint

Array = NDArray[np.float64]
CheckpointLike = Mapping[str, Any] | tuple[str, int, GradientStats]
# File, granularity, block vectors, granularities of parameters that differ.
Made = tuple[BlueprintFile, str, dict[str, Array], dict[str, str]]

# Points of the Lorenz curve in the file, denser where k is small: that is where the mass is.
_LORENZ_K = (np.arange(33) / 32.0) ** 2

_DEAD = heavytail.DEAD_RELATIVE  # of the largest norm, as GradientStats.dead


def from_stats(
    stats: GradientStats,
    model: nn.Module | None,
    domain_tags: Sequence[str],
    checkpoints: Iterable[CheckpointLike],
    *,
    name_or_path: str | None,
    tokens_per_step: int | None,
    created: str | None,
    command: str | None,
    n_bootstrap: int,
    seed: int,
) -> Made:
    """See :meth:`fastgrad.Blueprint.from_stats`."""
    if isinstance(domain_tags, str):
        raise BlueprintError(f"domain_tags is a list; write [{domain_tags!r}]")
    if stats.n_batches == 0:
        raise BlueprintError("the statistics hold no backward pass: nothing to describe")
    if not np.isfinite(stats.batch_sq).all():
        bad = [n for n, x in zip(stats.names, stats.batch_sq, strict=True) if not
               np.isfinite(x).all()]  # fmt: skip
        raise BlueprintError(f"the gradient norm of {bad[0]} is not finite")
    total = int(stats.meta.get("n_model_parameters") or stats.numel.sum())
    entries = _measured(stats)
    if model is not None:
        entries, total = _all_parameters(entries, model)
    tokens = None if (stats.label_tokens < 0).any() else int(stats.label_tokens.sum())
    meta = stats.meta
    document: dict[str, Any] = {
        "model": {
            "class": meta.get("model_class") or None,
            "name_or_path": _public_name(name_or_path or meta.get("name_or_path")),
            "weights_hash": meta.get("weights_hash"),
            "n_parameters": total,
        },
        "data": {
            "n_examples": stats.n_examples,
            "n_batches": stats.n_batches,
            "n_label_tokens": tokens,
            "loss_reduction": meta.get("loss_reduction"),
            "example_scale": _example_norms(stats)[0],
            "shift_labels": meta.get("shift_labels"),
            "dtypes": list(meta.get("dtypes") or []),
            "attention": meta.get("attention") or None,
            "skipped_batches": meta.get("skipped_batches") or 0,
        },
        "domain_tags": list(domain_tags),
        "submodules": entries,
        "dead": stats.dead,
        "noise": _noise(stats),
        "checkpoints": [_checkpoint(c) for c in checkpoints],
        "provenance": _provenance(created, command, meta.get("torch")),
    }
    blocks = {
        name: np.asarray(sq / stats.n_batches, dtype=np.float64)
        for name, sq in stats.block_batch_sq.items()
        if not stats.grid(name).is_whole
    }
    per_step = tokens_per_step or (tokens // stats.n_batches if tokens else None)
    return _finish(document, stats.spec, stats.specs, blocks, per_step, n_bootstrap, seed)


def blend(
    released: Blueprint, local: Blueprint, weight: float | Literal["auto"], allow_other: bool
) -> Made:
    """See :meth:`fastgrad.Blueprint.blend`."""
    ours = {s.name: s for s in local.submodules}
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
        },
        "domain_tags": list(dict.fromkeys([*released.domain_tags, *local.domain_tags])),
        "submodules": [
            _blended_entry(s, ours.get(s.name), share.get(s.name), w) for s in released.submodules
        ],
        "dead": [n for n in measured if math.sqrt(share[n]) <= _DEAD * math.sqrt(top)],
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
    return _finish(
        document, spec, specs, blocks, flops.tokens_per_step if flops else None, gamma.n_bootstrap,
        gamma.seed,
    )  # fmt: skip


# -- entries of a measurement ------------------------------------------------------------------


def _measured(stats: GradientStats) -> list[dict[str, Any]]:
    batch_sum = stats.batch_sq.sum(1)
    energy = stats.grad_norm**2
    whole = float(energy.sum())
    variance = share_variance(stats.batch_sq)
    norms = _example_norms(stats)[1]
    signal = _signal(stats)[0]
    coverage = stats.coverage
    entries = []
    for p, (name, shape) in enumerate(zip(stats.names, stats.shapes, strict=True)):
        known = stats.n_examples > 0 and not np.isnan(stats.sq[p]).any()
        numel = math.prod(shape)
        norm, weight = math.sqrt(energy[p]), math.sqrt(stats.weight_sq[p])
        found = coverage.get(name)
        entries.append({
            "name": name,
            "shape": [int(n) for n in shape],
            "coverage": found.status if found else "exact",
            "coverage_reason": found.reason if found else "",
            "batch_sum_sq": float(batch_sum[p]),
            "n_batches": stats.n_batches,
            "example_sum_sq": float(stats.sq[p].sum()) if known else None,
            "example_sum_norm": float(np.sqrt(stats.sq[p]).sum()) if known else None,
            "n_examples": stats.n_examples if known else 0,
            "example_mean_norm": float(norms[p].mean()) if known else None,
            "example_median_norm": float(np.median(norms[p])) if known else None,
            "signal_sq": None if signal is None else float(signal[p]),
            "grad_norm": norm,
            "rms": norm / math.sqrt(numel) if numel else None,
            "relative_norm": norm / weight if weight > 0 else None,
            "weight_norm": weight,
            "share": float(energy[p]) / whole if whole > 0 else None,
            "share_variance": None if variance is None else float(variance[p]),
        })  # fmt: skip
    return [finite_or_none(entry) for entry in entries]


def _all_parameters(
    entries: Sequence[dict[str, Any]], model: nn.Module
) -> tuple[list[dict[str, Any]], int]:
    """Entries for every parameter of the model, in its order, and the number of elements."""
    from fastgrad.identity import model_parameters

    measured = {entry["name"]: entry for entry in entries}
    own = {name: list(p.shape) for name, p in model_parameters(model).items()}
    for name, entry in measured.items():
        if own.get(name) != entry["shape"]:
            raise BlueprintError(
                f"{name} was measured with shape {tuple(entry['shape'])}, this model "
                + (f"has {tuple(own[name])}" if name in own else "lacks it")
            )
    frozen = {"coverage": "frozen", "coverage_reason": "not probed"}
    everything = [
        measured.get(name) or {"name": name, "shape": shape} | frozen for name, shape in own.items()
    ]
    return everything, sum(math.prod(shape) for shape in own.values())


def _example_norms(stats: GradientStats) -> tuple[str, Array]:
    """Per-example norms at the scale that does not depend on the batch size, if it is known."""
    if stats.n_examples == 0:
        return "contribution", np.zeros((len(stats.names), 0))
    try:
        return "example_mean", stats.influence("example_mean")
    except StatsError:
        return "contribution", stats.influence("contribution")


def _signal(stats: GradientStats) -> tuple[Array | None, str]:
    if stats.n_examples == 0:
        return None, "per-example norms were not measured"
    try:
        return stats.signal_sq, ""
    except StatsError as error:
        return None, str(error)


def _noise(stats: GradientStats) -> dict[str, Any]:
    signal, reason = _signal(stats)
    variance = share_variance(stats.batch_sq)
    halves = split_half(stats)
    scale = None
    if signal is not None:
        scale = stats.noise_scale
        if math.isinf(scale):
            scale, reason = None, "no signal detected: noise exceeds the gradient in this sample"
    return {
        "noise_scale": scale,
        "noise_scale_reason": reason,
        "signal": None if signal is None else float(signal[~np.isnan(signal)].sum()),
        "share_variance": None if variance is None else float(variance.sum()),
        "split_half_reliability": None if halves is None else finite_or_none(vars(halves)),
    }


def _checkpoint(entry: CheckpointLike) -> dict[str, Any]:
    if isinstance(entry, Mapping):
        norms = entry.get("grad_norm")
        if not isinstance(norms, Mapping):
            raise BlueprintError("a checkpoint needs grad_norm, a mapping of name to norm")
        return dict(entry) | {"grad_norm": {n: float(x) for n, x in norms.items()}}
    label, step, stats = entry
    norms = dict(zip(stats.names, stats.grad_norm.tolist(), strict=True))
    return {"label": label, "step": step, "grad_norm": norms}


# -- fits ----------------------------------------------------------------------------------------


def _finish(
    document: dict[str, Any],
    spec: str,
    specs: Mapping[str, str],
    blocks: dict[str, Array],
    tokens: int | None,
    n_bootstrap: int,
    seed: int,
) -> Made:
    """Add versions, fits and k*, and check everything against the schema."""
    total = document["model"]["n_parameters"]
    norms, sizes, parts, measured = [], [], [], []
    for entry in document["submodules"]:
        numel = math.prod(entry["shape"])
        if numel:
            norms.append(entry.get("grad_norm") or 0.0)
            sizes.append(numel)
            parts.append((entry["name"], entry["shape"]))
            if entry.get("grad_norm") is not None:
                measured.append(entry["grad_norm"])
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
            "norm": _fit(norm, sizes, tail, n_bootstrap, seed),
            "squared_norm": _fit(norm**2, sizes, tail**2, n_bootstrap, seed),
        }
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
            flat = np.concatenate(mass), np.concatenate(size)
            block_fit = _fit(*flat, None, n_bootstrap, seed)
            fit, granularity = block_fit, in_words(spec, specs)
        document |= {
            "schema_version": SCHEMA_VERSION,
            "fastgrad_version": fastgrad.__version__,
            "fits": fits,
            "block_fit": block_fit,
            "k_star": _k_stars(fit["gamma"]["gamma"], granularity, total, tokens),
            "privacy": {},
        }
        return validate(document), spec, blocks, dict(specs)
    except (StatsError, ResourceError) as error:
        raise BlueprintError(f"no blueprint can be made of this: {error}") from error
    except ValueError as error:
        raise BlueprintError(f"the content does not fit the blueprint's schema: {error}") from error


def _fit(
    mass: Array, sizes: Any, tail: Array | None, n_bootstrap: int, seed: int
) -> dict[str, Any]:
    curve = heavytail.lorenz(mass, sizes)
    gamma = heavytail.fit_gamma(mass, sizes, n_bootstrap=n_bootstrap, seed=seed)
    return {
        "lorenz": {"k": _LORENZ_K.tolist(), "share": curve.share_at(_LORENZ_K).tolist()},
        "gamma": finite_or_none(gamma.to_dict()),
        "tail": None
        if tail is None
        else finite_or_none(heavytail.fit_tail(tail, n_bootstrap=n_bootstrap, seed=seed).to_dict()),
    }


def _k_stars(gamma: float, granularity: str, total: int, tokens: int | None) -> dict[str, Any]:
    """k* from the mass ‖g‖², the one that adds up when blocks are divided further."""
    costs = [CostModel.memory(total)]
    if tokens:
        costs.append(CostModel.flops(total, tokens))
    return {
        cost.resource: k_star(gamma, cost).to_dict()
        | {
            "unit": cost.unit,
            "mass": "squared_norm",
            "granularity": granularity,
            "tokens_per_step": tokens if cost.resource == "flops" else None,
        }
        for cost in costs
    }


# -- blending ------------------------------------------------------------------------------------


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
        raise BlueprintError(f"weight must be 'auto' or a number in [0, 1]; got {weight!r}")
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


# -- provenance ----------------------------------------------------------------------------------


def _provenance(created: str | None, command: str | None, torch: Any) -> dict[str, Any]:
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
    return {
        "created": created or datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": public_command(sys.argv) if command is None else command,
        "versions": versions | ({"torch": str(torch)} if torch else {}),
    }


def public_command(argv: Sequence[str]) -> str:
    """A command line without the folders of the machine it ran on."""
    # A URL stays, without its user; an absolute path, or one below a home folder, does not.
    url = r"(?P<scheme>\b(?!file:)\w+://)(?:[^/@\s]*@)?(?P<rest>\S*)"
    path = r"(?<![\w.~/\\-])(?:file:/*|~\w*|[A-Za-z]:)?(?:[/\\]+[^/\\:=,;'\"]+)+[/\\]?"

    def shown(match: re.Match[str]) -> str:
        scheme = match["scheme"]
        return scheme + match["rest"] if scheme else _last(match[0])

    return shlex.join(re.sub(f"{url}|{path}", shown, arg) for arg in argv)


def _public_name(name: Any) -> str | None:
    """A hub id as it is; of a local folder only its own name."""
    if not name:
        return None
    text = str(name)
    local = os.path.isabs(text) or text.startswith((".", "~")) or "\\" in text
    return _last(text) if local else text


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
