"""Two measurements of the same weights on disjoint data as one: raw sums and counts add up.

What :meth:`fastgrad.Blueprint.from_stats` makes of merged statistics, without the statistics;
formulas of what is derived are those of ``GradientStats`` and ``fastgrad.staleness``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from fastgrad.blueprint_fits import FitOptions, Made, costs_of, finish, warned_share
from fastgrad.blueprint_provenance import provenance
from fastgrad.blueprint_schema import (
    BlueprintFile,
    Checkpoint,
    DataInfo,
    Noise,
    Submodule,
    finite_or_none,
)
from fastgrad.data_sources import joined_datasets
from fastgrad.dead import dead_parameters
from fastgrad.errors import BlueprintError
from fastgrad.resources import CostModel

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint

Array = NDArray[np.float64]

_WORSE = ("frozen", "unused", "exact", "missing")
_OLD = "a source is of a schema before 1.2 and lacks the sums that it follows from"
_LOST_MEDIAN = "a median does not follow from sums"
_LOST_HALVES = "halves of the whole need each batch's or example's own numbers"


def merge(one: Blueprint, other: Blueprint, created: str | None, command: str | None) -> Made:
    """See :meth:`fastgrad.Blueprint.merge`."""
    refuse(one, other)
    a, b = one.file, other.file
    lost: dict[str, str] = {}
    agreed = _Agreed(lost)
    data = _data(a.data, b.data, agreed)
    entries = _submodules(one, other, data, agreed)
    document: dict[str, Any] = {
        **agreed.extras("", a, b),
        "model": {
            **agreed.extras("model.", a.model, b.model),
            "class": agreed("model.class", a.model.class_name, b.model.class_name),
            "name_or_path": agreed(
                "model.name_or_path", a.model.name_or_path, b.model.name_or_path
            ),
            "revision": agreed("model.revision", a.model.revision, b.model.revision),
            "weights_hash": a.model.weights_hash,
            "n_parameters": a.model.n_parameters,
        },
        "data": data,
        "domain_tags": list(dict.fromkeys([*a.domain_tags, *b.domain_tags])),
        "submodules": entries,
        "dead": _dead(entries, data),
        "noise": _noise(a.noise, b.noise, entries, data, lost),
        "checkpoints": _checkpoints(a.checkpoints, b.checkpoints, lost),
        "provenance": provenance(
            created, command,
            agreed("provenance.versions.torch", *(f.provenance.versions.get("torch")
                                                  for f in (a, b))),
        ),
        "merge": {
            "sources": [source for file in (a, b) for source in _sources(file)],
            "not_merged": lost,
        },
    }  # fmt: skip
    assert a.fits is not None  # refused above
    gamma = a.fits.norm.gamma
    options = FitOptions(
        gamma.n_bootstrap, gamma.seed, _tokens_per_step(a, b, data, lost), _costs(a, b, lost),
        max(warned_share(a), warned_share(b)),
    )  # fmt: skip
    weight = [f.data.n_batches / data["n_batches"] for f in (a, b)]
    blocks = {
        name: weight[0] * values + weight[1] * other.block_sq[name]
        for name, values in one.block_sq.items()
    }
    return finish(document, one.spec, one.specs, blocks, options)


# -- what cannot be merged -----------------------------------------------------------------------


def refuse(one: Blueprint, other: Blueprint) -> None:
    """Refuse what does not add up, by name.

    Raises:
        BlueprintError: see :meth:`fastgrad.Blueprint.merge`.
    """
    for blueprint in (one, other):
        file = blueprint.file
        if file.blend is not None:
            raise BlueprintError(
                "a blend's numbers are normalised and cannot be added up. Remedy: merge what it "
                "was made of, then blend"
            )
        if file.fits is None:
            raise BlueprintError(
                f"a release of {file.privacy.released} alone cannot be merged: they do not add up. "
                "Remedy: merge the measurements, then make them coarse"
            )
        if file.privacy.mechanism != "none":
            raise BlueprintError(
                f"a release protected by {file.privacy.mechanism} cannot be merged: its sums hold "
                "noise, and what two releases promise together is another question. Remedy: one "
                "release of both"
            )
        if file.domains:
            raise BlueprintError(
                "a blueprint of several domains is merged domain by domain. Remedy: "
                "bp.domain(tag).merge(...), then with_domain"
            )
    a, b = one.file, other.file
    measured = [{s.name: s.shape for s in f.submodules if s.batch_sum_sq is not None}
                for f in (a, b)]  # fmt: skip
    for what, x, y in (
        ("models", a.model.n_parameters, b.model.n_parameters),
        ("weights", a.model.weights_hash, b.model.weights_hash),
        ("parameters", list(measured[0]), list(measured[1])),
        ("shapes", list(measured[0].items()), list(measured[1].items())),
        ("loss reduction", a.data.loss_reduction, b.data.loss_reduction),
        ("labels (shift_labels)", a.data.shift_labels, b.data.shift_labels),
        ("scale of per-example norms", a.data.example_scale, b.data.example_scale),
        ("kinds: with and without per-example norms", a.data.n_examples > 0, b.data.n_examples > 0),
        ("clipping", (a.data.clip or "none", a.data.clip_norm),
         (b.data.clip or "none", b.data.clip_norm)),
        ("block granularity", _granularity(one), _granularity(other)),
    ):  # fmt: skip
        if x != y:
            raise BlueprintError(
                f"cannot merge blueprints of different {what}: {_first_difference(x, y)}. Remedy: "
                f"{_REMEDIES.get(what, 'measure both in the same way')}"
            )
    lacking = [s.name for f in (a, b) for s in f.submodules
               if s.batch_sum_sq is None and s.grad_norm is not None]  # fmt: skip
    if lacking or not measured[0]:
        raise BlueprintError(
            f"there is no raw sum to add up of {lacking[0] if lacking else 'any parameter'}. "
            "Remedy: make the blueprint from statistics"
        )
    if all(_raw(x) == _raw(y) for x, y in zip(a.submodules, b.submodules, strict=False)):
        raise BlueprintError(
            "both blueprints hold the very same sums: merged they would count their examples "
            "twice. Remedy: merge measurements of different examples"
        )


_REMEDIES = {
    "models": "blueprints of one model",
    "weights": "blueprints of the same weights; `diff` compares those of others",
    "block granularity": "probe both with the same blocks",
}  # fmt: skip


def _granularity(blueprint: Blueprint) -> list[tuple[str, int, int]]:
    grids = ((name, blueprint.grid(name)) for name in sorted(blueprint.block_sq))
    return [(name, grid.block_rows, grid.block_cols) for name, grid in grids]


def _raw(entry: Submodule) -> tuple[Any, ...]:
    return entry.name, entry.batch_sum_sq, entry.n_batches, entry.example_sum_sq


def _first_difference(x: Any, y: Any) -> str:
    if isinstance(x, list) and isinstance(y, list):
        pair = next(((p, q) for p, q in zip(x, y, strict=False) if p != q), None)
        return f"{pair[0]} and {pair[1]}" if pair else (
            f"{len(x)} parameters in the one, {len(y)} in the other"
        )
    return f"{x} and {y}"


class _Agreed:
    """A value where both sources have the same one; else None, and its name in ``lost``."""

    def __init__(self, lost: dict[str, str]) -> None:
        self.lost = lost

    def __call__(self, name: str, x: Any, y: Any) -> Any:
        if x == y:
            return x
        self.lost[name] = "the sources differ: see merge.sources"
        return None

    def extras(self, prefix: str, x: BaseModel, y: BaseModel) -> dict[str, Any]:
        """Keys that the schema does not know, where both have the same value."""
        first, second = x.model_extra or {}, y.model_extra or {}
        for key in [*first, *second]:
            if key not in first or key not in second or first[key] != second[key]:
                self.lost[prefix + key] = "an unknown key, which the sources do not share"
        return {k: v for k, v in first.items() if prefix + k not in self.lost}


# -- data and submodules -------------------------------------------------------------------------


def _added(x: float | None, y: float | None) -> float | None:
    return None if x is None or y is None else finite_or_none(x + y)


def _data(a: DataInfo, b: DataInfo, agreed: _Agreed) -> dict[str, Any]:
    def same(name: str) -> Any:
        return agreed(f"data.{name}", getattr(a, name), getattr(b, name))

    tokens = a.n_label_tokens, b.n_label_tokens
    return {
        **agreed.extras("data.", a, b),
        "n_examples": a.n_examples + b.n_examples,
        "n_batches": a.n_batches + b.n_batches,
        "n_label_tokens": None if None in tokens else sum(t for t in tokens if t is not None),
        "loss_reduction": a.loss_reduction,
        "example_scale": a.example_scale,
        "shift_labels": a.shift_labels,
        "dtypes": sorted({*a.dtypes, *b.dtypes}),
        "attention": same("attention"),
        "skipped_batches": a.skipped_batches + b.skipped_batches,
        "datasets": joined_datasets(*([d.model_dump() for d in x.datasets] for x in (a, b))),
        "clip": a.clip,
        "clip_norm": a.clip_norm,
        "seed": same("seed"),
        "command": same("command"),
        "weight_sum_sq": _added(a.weight_sum_sq, b.weight_sum_sq),
        "weight_pair_sum": _added(a.weight_pair_sum, b.weight_pair_sum),
    }


def _submodules(
    one: Blueprint, other: Blueprint, data: Mapping[str, Any], agreed: _Agreed
) -> list[dict[str, Any]]:
    # Made with or without the model, a file lists parameters that were not measured, or does not.
    longer, shorter = sorted((one, other), key=lambda b: -len(b.names))
    second = {s.name: s for s in shorter.submodules}
    entries = [
        _submodule(s, second.get(s.name), data, agreed) if s.batch_sum_sq is not None
        else s.model_dump()
        for s in longer.submodules
    ]  # fmt: skip
    entries += [s.model_dump() for n, s in second.items() if n not in set(longer.names)]
    whole = math.fsum(e["grad_norm"] ** 2 for e in entries if e.get("grad_norm") is not None)
    for entry in entries:
        if entry.get("grad_norm") is not None:
            entry["share"] = min(entry["grad_norm"] ** 2 / whole, 1.0) if whole > 0 else None
    return entries


def _submodule(
    a: Submodule, b: Submodule | None, data: Mapping[str, Any], agreed: _Agreed
) -> dict[str, Any]:
    assert b is not None  # both measured the same parameters
    assert a.batch_sum_sq is not None
    assert b.batch_sum_sq is not None
    worst = max(a, b, key=lambda s: _WORSE.index(s.coverage))
    known = a.example_sum_sq is not None and b.example_sum_sq is not None
    counts = [a.n_examples, b.n_examples] if known else [0, 0]
    total, n_batches = a.batch_sum_sq + b.batch_sum_sq, a.n_batches + b.n_batches
    norm = math.sqrt(total / n_batches)
    weight = a.weight_norm if a.weight_norm is not None else b.weight_norm
    if a.example_median_norm is not None or b.example_median_norm is not None:
        agreed.lost["submodules.example_median_norm"] = _LOST_MEDIAN
    mean, n_examples = None, counts[0] + counts[1]
    if n_examples and None not in (a.example_mean_norm, b.example_mean_norm):
        parts = ((a.example_mean_norm or 0.0) * counts[0], (b.example_mean_norm or 0.0) * counts[1])
        mean = (parts[0] + parts[1]) / n_examples
    examples = _added(a.example_sum_sq, b.example_sum_sq)
    pairs = data["weight_pair_sum"]
    return {
        **agreed.extras("submodules.", a, b),
        "name": a.name,
        "shape": a.shape,
        "coverage": worst.coverage,
        "coverage_reason": worst.coverage_reason,
        "batch_sum_sq": total,
        "n_batches": n_batches,
        "batch_sum_fourth": _added(a.batch_sum_fourth, b.batch_sum_fourth),
        "batch_sum_with_total": _added(a.batch_sum_with_total, b.batch_sum_with_total),
        "example_sum_sq": examples,
        "example_sum_norm": _added(a.example_sum_norm, b.example_sum_norm) if known else None,
        "n_examples": n_examples,
        "example_mean_norm": mean,
        "signal_sq": None
        if examples is None or pairs is None or pairs <= 1e-12
        else finite_or_none((total - examples) / pairs),
        "grad_norm": norm,
        "rms": norm / math.sqrt(a.numel) if a.numel else None,
        "relative_norm": norm / weight if weight else None,
        "weight_norm": weight,
    }


def _dead(entries: list[dict[str, Any]], data: Mapping[str, Any]) -> list[str]:
    """From the sums of both, as of a measurement that was made in one piece."""
    measured = [e for e in entries if e.get("grad_norm") is not None]
    return dead_parameters(
        *([e[key] for e in measured] for key in ("name", "shape", "grad_norm")),
        dtypes=data["dtypes"],
        batch_sum_sq=[e["batch_sum_sq"] for e in measured],
        example_sum_sq=[e["example_sum_sq"] for e in measured],
        n_examples=data["n_examples"], n_batches=data["n_batches"],
    )  # fmt: skip


# -- noise ---------------------------------------------------------------------------------------


def _noise(
    a: Noise, b: Noise, entries: list[dict[str, Any]], data: Mapping[str, Any],
    lost: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    for key in {**(a.model_extra or {}), **(b.model_extra or {})}:
        lost[f"noise.{key}"] = "an unknown key"
    if a.split_half_reliability is not None or b.split_half_reliability is not None:
        lost["noise.split_half_reliability"] = _LOST_HALVES
    total_fourth = _added(a.total_sum_fourth, b.total_sum_fourth)
    variance = _share_variance(entries, total_fourth, data["n_batches"], lost)
    scale, signal, reason = _noise_scale(a, b, entries, data, lost)
    return {
        "noise_scale": scale,
        "noise_scale_reason": reason,
        "signal": signal,
        "share_variance": variance,
        "total_sum_fourth": total_fourth,
    }


def _share_variance(
    entries: list[dict[str, Any]], total_fourth: float | None, n: int, lost: dict[str, str]
) -> float | None:
    """Into each entry, and their sum: :func:`fastgrad.staleness.share_variance` with its square
    written out, Σ_b (x_ib − m_i X_b)² = Σ x_ib² − 2 m_i Σ x_ib X_b + m_i² Σ X_b²."""
    measured = [e for e in entries if e["batch_sum_sq"] is not None]
    whole = math.fsum(e["batch_sum_sq"] for e in measured)
    sums = [(e["batch_sum_fourth"], e["batch_sum_with_total"]) for e in measured]
    if n < 2 or not whole > 0:
        return None
    if total_fourth is None or any(None in pair for pair in sums):
        lost["submodules.share_variance"] = lost["noise.share_variance"] = _OLD
        return None
    mean, variances = whole / n, []
    for entry, (fourth, crossed) in zip(measured, sums, strict=True):
        m = entry["batch_sum_sq"] / whole
        rest = (fourth - 2 * m * crossed + m * m * total_fourth) / mean / mean
        entry["share_variance"] = finite_or_none(max(rest, 0.0) / (n * (n - 1)))
        variances.append(entry["share_variance"])
    return None if None in variances else math.fsum(variances)


def _noise_scale(
    a: Noise, b: Noise, entries: list[dict[str, Any]], data: Mapping[str, Any],
    lost: dict[str, str],
) -> tuple[float | None, float | None, str]:  # fmt: skip
    squares = data["weight_sum_sq"]
    known = [e for e in entries if None not in (e.get("signal_sq"), e.get("example_sum_sq"))]
    if not squares or not known:
        if a.signal is not None or b.signal is not None:
            lost["submodules.signal_sq"] = lost["noise.noise_scale"] = lost["noise.signal"] = _OLD
            return None, None, _OLD
        return None, None, a.noise_scale_reason or b.noise_scale_reason
    signal = float(np.sum([e["signal_sq"] for e in known]))
    trace = float(np.sum([e["example_sum_sq"] for e in known])) / squares - signal
    if not signal > 0:
        reason = "no signal detected: noise exceeds the gradient in this sample"
        return None, finite_or_none(signal), reason
    return finite_or_none(max(trace, 0.0) / signal), finite_or_none(signal), ""


# -- checkpoints, resources, sources -------------------------------------------------------------


def _checkpoints(
    a: list[Checkpoint], b: list[Checkpoint], lost: dict[str, str]
) -> list[dict[str, Any]]:
    """Those of the same weights on both sides, their squared norms averaged over the batches."""
    def key(c: Checkpoint) -> tuple[Any, ...]:
        return c.label, c.step, c.weights_hash, tuple(c.grad_norm)

    second = {key(c): c for c in b}
    merged = []
    for c in a:
        d = second.get(key(c))
        n = c.n_batches or 0, d.n_batches or 0 if d else 0
        if d is None or c.weights_hash is None or not all(n):
            continue
        merged.append({
            "label": c.label, "step": c.step, "weights_hash": c.weights_hash,
            "fraction": c.fraction, "n_batches": sum(n),
            "tokens_seen": c.tokens_seen if c.tokens_seen == d.tokens_seen else None,
            "n_examples": _added(c.n_examples, d.n_examples),
            "loss": None if c.loss is None or d.loss is None
            else (c.loss * n[0] + d.loss * n[1]) / sum(n),
            "grad_norm": {
                name: math.sqrt((n[0] * x * x + n[1] * d.grad_norm[name] ** 2) / sum(n))
                for name, x in c.grad_norm.items()
            },
        })  # fmt: skip
    if len(merged) < max(len(a), len(b)):
        lost["checkpoints"] = (
            f"{len(merged)} of {len(a)} and {len(b)} were kept: the others are not of the same "
            "weights in both sources, or do not say so"
        )
    return merged


def _tokens_per_step(
    a: BlueprintFile, b: BlueprintFile, data: Mapping[str, Any], lost: dict[str, str]
) -> int | None:
    """What both were told; the label tokens of a batch, if both were told nothing."""
    def default(d: Mapping[str, Any]) -> int | None:
        return d["n_label_tokens"] // d["n_batches"] if d["n_label_tokens"] else None

    told = [f.k_star["flops"].tokens_per_step if "flops" in f.k_star else None for f in (a, b)]
    if told == [default(f.data.model_dump()) for f in (a, b)]:
        return default(data)
    if told[0] != told[1]:
        lost["k_star.flops"] = f"of {told[0]} and {told[1]} tokens per step"
        return None
    return told[0]


def _costs(a: BlueprintFile, b: BlueprintFile, lost: dict[str, str]) -> list[CostModel]:
    named: Callable[[BlueprintFile], dict[str, CostModel]]
    named = lambda f: {c.resource: c for c in costs_of(f)}  # noqa: E731
    first, second = named(a), named(b)
    kept = []
    for resource, cost in {**second, **first}.items():
        if second.get(resource, cost) != cost:
            lost[f"k_star.{resource}"] = "the sources have other coefficients"
        else:
            kept.append(cost)
    return kept


def _sources(file: BlueprintFile) -> list[dict[str, Any]]:
    if file.merge is not None:
        return [s.model_dump(by_alias=True) for s in file.merge.sources]
    return [{
        "model": file.model.model_dump(by_alias=True),
        "data": file.data.model_dump(),
        "domain_tags": file.domain_tags,
        "provenance": file.provenance.model_dump(),
    }]  # fmt: skip
