"""Coarse blueprints: the order of the submodules, or tenths of it, and no number on the gradient.

Coarse is not private: an order can depend on one example. It is private if what was ranked was
(:meth:`fastgrad.PrivateNorms.blueprint`); the file's ``privacy`` says which it is.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from fastgrad.blueprint_schema import BlueprintFile, Measured, Submodule, validate
from fastgrad.errors import BlueprintError

Coarseness = Literal["ranks", "deciles"]

_EXACT = (
    "Of exact aggregates over the examples only the {} of the submodules' rms are given. That is "
    "less than the numbers, and no privacy guarantee."
)


def is_coarse(file: Measured) -> bool:
    """Whether ranks or deciles are all that a measurement says."""
    return file.privacy.released in get_args(Coarseness)


def coarsened(file: BlueprintFile, kind: Coarseness) -> BlueprintFile:
    """The file with ranks or deciles of rms in place of all that was measured.

    Rank 1 is the highest rms, equal ones in the model's order; decile 1 is the first tenth of the
    ranks. Kept beside them is what says nothing on the gradient: model, data sets, tags, privacy.

    Raises:
        BlueprintError: for another kind, a file of several domains, a blend, or a coarse file.
    """
    if kind not in get_args(Coarseness):
        raise BlueprintError(f"coarse={kind!r}: use {' or '.join(get_args(Coarseness))}")
    if file.domains or file.blend is not None or is_coarse(file):
        what = "several domains" if file.domains else "a blend" if file.blend else "a coarse file"
        raise BlueprintError(f"{what} cannot be made coarse. Remedy: make each measurement coarse")
    measured = [s for s in file.submodules if s.grad_norm is not None and s.numel]
    order = sorted(measured, key=lambda s: -_rms(s))
    rank = {s.name: r for r, s in enumerate(order, 1)}
    entries = []
    for s in file.submodules:
        entry: dict[str, Any] = {"name": s.name, "shape": s.shape, "weight_norm": s.weight_norm}
        if s.name not in rank:
            entries.append(entry | {"coverage": "frozen", "coverage_reason": "not measured"})
        elif kind == "ranks":
            entries.append(entry | {"coverage": "exact", "rank": rank[s.name]})
        else:
            tenth = 1 + 10 * (rank[s.name] - 1) // len(order)
            entries.append(entry | {"coverage": "exact", "decile": tenth})
    data, privacy = file.data, file.privacy.model_dump() | {"released": kind}
    if file.privacy.mechanism == "none":
        privacy["statement"] = _EXACT.format(kind)
    else:
        privacy |= {"n_above_noise": None}
        privacy["statement"] += f" Only their {kind} are in this file."
    return validate({
        "schema_version": file.schema_version,
        "fastgrad_version": file.fastgrad_version,
        "model": file.model.model_dump(by_alias=True),
        "data": {
            "n_examples": data.n_examples, "n_batches": data.n_batches, "n_label_tokens": None,
            "loss_reduction": data.loss_reduction, "example_scale": data.example_scale,
            "dtypes": data.dtypes, "attention": data.attention, "clip": data.clip,
            "clip_norm": data.clip_norm, "datasets": [d.model_dump() for d in data.datasets],
        },
        "domain_tags": file.domain_tags,
        "submodules": entries,
        "dead": [],
        "fits": None,
        "block_fit": None,
        "k_star": {},
        "noise": {"noise_scale_reason": f"{kind} alone were released"},
        "privacy": privacy,
        "provenance": file.provenance.model_dump(),
    })  # fmt: skip


def norms_by_name(file: Measured) -> dict[str, float]:
    """Gradient norm of each submodule that was measured.

    Of a coarse measurement, numbers whose rms are in the right order and mean nothing else.
    """
    if not is_coarse(file):
        return {s.name: s.grad_norm for s in file.submodules if s.grad_norm is not None}
    known = [s for s in file.submodules if s.rank is not None or s.decile is not None]
    last = max((s.rank or s.decile or 0 for s in known), default=0)
    return {s.name: (last + 1 - (s.rank or s.decile or 0)) * math.sqrt(s.numel) for s in known}


def _rms(s: Submodule) -> float:
    norm = s.grad_norm if s.noised_norm is None else s.noised_norm
    return (norm or 0.0) / math.sqrt(s.numel)
