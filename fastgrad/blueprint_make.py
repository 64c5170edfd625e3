"""How a blueprint's content comes about from a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastgrad.blueprint_fits import FitOptions, Made, finish
from fastgrad.blueprint_provenance import provenance, public_name
from fastgrad.blueprint_schema import finite_or_none
from fastgrad.errors import BlueprintError, StatsError
from fastgrad.resources import CostModel
from fastgrad.staleness import share_variance, split_half
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[np.float64]
CheckpointLike = Mapping[str, Any] | tuple[str, int, GradientStats]
DataSetLike = str | Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """What is known about a measurement beside its numbers; see
    :meth:`fastgrad.Blueprint.from_stats`."""

    name_or_path: str | None = None
    revision: str | None = None
    datasets: Sequence[DataSetLike] = ()
    created: str | None = None
    command: str | None = None


def from_stats(
    stats: GradientStats,
    model: nn.Module | None,
    domain_tags: Sequence[str],
    checkpoints: Iterable[CheckpointLike],
    origin: Origin,
    *,
    tokens_per_step: int | None,
    n_bootstrap: int,
    seed: int,
    costs: Sequence[CostModel],
    over_aggressive_share: float,
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
            "name_or_path": public_name(origin.name_or_path or meta.get("name_or_path")),
            "revision": origin.revision or meta.get("model_revision") or None,
            "weights_hash": meta.get("weights_hash"),
            "n_parameters": total,
        },
        "data": _data(stats, tokens, origin),
        "domain_tags": list(domain_tags),
        "submodules": entries,
        "dead": stats.dead,
        "noise": _noise(stats),
        "checkpoints": [_checkpoint(c) for c in checkpoints],
        "provenance": provenance(origin.created, origin.command, meta.get("torch")),
    }
    blocks = {
        name: np.asarray(sq / stats.n_batches, dtype=np.float64)
        for name, sq in stats.block_batch_sq.items()
        if not stats.grid(name).is_whole
    }
    per_step = tokens_per_step or (tokens // stats.n_batches if tokens else None)
    options = FitOptions(n_bootstrap, seed, per_step, costs, over_aggressive_share)
    return finish(document, stats.spec, stats.specs, blocks, options)


def _data(stats: GradientStats, tokens: int | None, origin: Origin) -> dict[str, Any]:
    meta = stats.meta
    about = meta.get("data") or {}
    if not isinstance(about, Mapping):
        raise BlueprintError("meta['data'] of the statistics is not a mapping")
    datasets: list[dict[str, Any]] = [
        {"name": d} if isinstance(d, str) else dict(d)
        for d in origin.datasets or about.get("datasets") or ()
    ]
    for entry in datasets:
        entry["name"] = public_name(entry.get("name"))
    squares, pairs = _loss_weights(stats)
    return {
        "n_examples": stats.n_examples,
        "n_batches": stats.n_batches,
        "n_label_tokens": tokens,
        "loss_reduction": meta.get("loss_reduction"),
        "example_scale": _example_norms(stats)[0],
        "shift_labels": meta.get("shift_labels"),
        "dtypes": list(meta.get("dtypes") or []),
        "attention": meta.get("attention") or None,
        "skipped_batches": meta.get("skipped_batches") or 0,
        "datasets": datasets,
        # A probe's hooks see each gradient in the backward pass, before a loop clips anything.
        "clip": meta.get("clip") or "none",
        "clip_norm": meta.get("clip_norm"),
        "seed": about.get("seed"),
        "command": about.get("command"),
        "weight_sum_sq": squares,
        "weight_pair_sum": pairs,
    }


def _loss_weights(stats: GradientStats) -> tuple[float | None, float | None]:
    if stats.n_examples == 0:
        return None, None
    try:
        squares, pairs = stats._loss_weights()
    except StatsError:
        return None, None
    return finite_or_none(squares), finite_or_none(max(pairs, 0.0))


# -- entries of a measurement ------------------------------------------------------------------


def _measured(stats: GradientStats) -> list[dict[str, Any]]:
    batch_sum = stats.batch_sq.sum(1)
    energy = stats.grad_norm**2
    whole = float(energy.sum())
    variance = share_variance(stats.batch_sq)
    together = stats.batch_sq.sum(0)
    with np.errstate(over="ignore"):  # beyond float64 they are unknown, and the file says null
        fourth = (stats.batch_sq**2).sum(1)
        crossed = (stats.batch_sq * together).sum(1)
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
            "batch_sum_fourth": float(fourth[p]),
            "batch_sum_with_total": float(crossed[p]),
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
        "total_sum_fourth": finite_or_none(float((stats.batch_sq.sum(0) ** 2).sum())),
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
    return {
        "label": label, "step": step, "grad_norm": norms, "n_batches": stats.n_batches,
        "n_examples": stats.n_examples, "weights_hash": stats.meta.get("weights_hash"),
    }  # fmt: skip
