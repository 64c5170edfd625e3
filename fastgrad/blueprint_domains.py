"""Several domains in one file: the same weights, measured on different data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from fastgrad.blueprint_schema import (
    MAX_DOMAINS,
    SCHEMA_VERSION,
    BlueprintFile,
    Domain,
    Measured,
)
from fastgrad.errors import BlueprintError
from fastgrad.rank_agreement import MIN_SUBMODULES
from fastgrad.staleness import MIN_UNITS, Staleness
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint

Array = NDArray[np.float64]

#: A domain is clearly the nearest if it is so in this share of the resampled local samples.
CLEAR = 0.95

_RESAMPLES = 200
_OF_THE_FILE = ("schema_version", "domains")


@dataclass(frozen=True)
class DomainAgreement:
    """One domain beside a local sample.

    Attributes:
        tags: of the domain.
        staleness: its agreement with the sample.
        support: share of the resampled samples in which it is the nearest one; None if the sample
            is too small to be resampled, or the domain cannot be compared.
    """

    tags: tuple[str, ...]
    staleness: Staleness
    support: float | None


@dataclass(frozen=True)
class NearestDomain:
    """Which domain of a blueprint a local sample is most like.

    Attributes:
        blueprint: that domain, as a blueprint of its own; None if no domain can be compared.
        verdict: ``clear``, ``close`` (the sample does not decide between the nearest ones) or
            ``undecided`` (no domain can be compared, or the sample cannot be resampled).
        reason: the verdict in words.
        domains: every domain, the nearest first; those that cannot be compared come last.
    """

    blueprint: Blueprint | None
    verdict: Literal["clear", "close", "undecided"]
    reason: str
    domains: tuple[DomainAgreement, ...]

    @property
    def tags(self) -> tuple[str, ...] | None:
        """Tags of the nearest domain."""
        return None if self.blueprint is None else self.domains[0].tags

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "tags": None if self.tags is None else list(self.tags),
            "verdict": self.verdict,
            "reason": self.reason,
            "domains": [asdict(d) | {"tags": list(d.tags)} for d in self.domains],
        }


def nearest(domains: Sequence[Blueprint], local: GradientStats) -> NearestDomain:
    """See :meth:`fastgrad.Blueprint.nearest_domain`.

    The nearest domain is the one whose rms scores correlate most with the local ones (Spearman;
    weighted tau where that is equal). How sure that is: 200 times the local batches are drawn anew
    with replacement, the domains' shares with the sampling variance that they state, and it is
    counted how often each domain is the nearest.
    """
    found = [b.staleness(local) for b in domains]
    known = [i for i, s in enumerate(found) if s.spearman is not None]
    known.sort(key=lambda i: (-(found[i].spearman or 0.0), -(found[i].weighted_tau or 0.0)))
    support = _support([domains[i] for i in known], local)
    order = known + [i for i in range(len(found)) if i not in known]
    agreements = tuple(
        DomainAgreement(
            tuple(domains[i].domain_tags), found[i], support[n] if n < len(support) else None
        )
        for n, i in enumerate(order)
    )
    if not known:
        return NearestDomain(
            None, "undecided", f"no domain can be compared: {found[0].reason}", agreements
        )
    name = " + ".join(agreements[0].tags) or "the primary one"
    value = f"{name}, Spearman {found[known[0]].spearman:.2f}"
    best = domains[known[0]]
    if len(known) == 1:
        text = f"{value}; no other domain can be compared"
        return NearestDomain(best, "undecided", text, agreements)
    second = f"{' + '.join(agreements[1].tags)} {found[known[1]].spearman:.2f}"
    if not support:
        text = (
            f"{value} (next: {second}); {local.n_batches} batches and {local.n_examples} examples "
            f"are too few to be resampled: at least {MIN_UNITS} are needed"
        )
        return NearestDomain(best, "undecided", text, agreements)
    text = f"{value} (next: {second}); the nearest in {support[0]:.0%} of the resampled samples"
    verdict: Literal["clear", "close"] = "clear" if support[0] >= CLEAR else "close"
    return NearestDomain(best, verdict, text, agreements)


def _support(domains: Sequence[Blueprint], local: GradientStats) -> list[float]:
    """Share of resampled local samples in which each domain is the nearest; empty if that cannot
    be said."""
    source = local.batch_sq if local.n_batches >= MIN_UNITS else local.sq
    if source.shape[1] < MIN_UNITS or not domains:
        return []
    entries = [{s.name: s for s in b.submodules if s.share and s.numel} for b in domains]
    dead = set(local.dead).intersection(*(b.dead for b in domains))
    rows = [
        p for p, name in enumerate(local.names)
        if name not in dead and local.numel[p] and not np.isnan(source[p]).any()
        and all(name in e for e in entries)
    ]  # fmt: skip
    if len(rows) < MIN_SUBMODULES:
        return []
    names, size = [local.names[p] for p in rows], local.numel[rows]
    share = np.array([[e[n].share or 0.0 for n in names] for e in entries])
    variance = np.array([[e[n].share_variance or 0.0 for n in names] for e in entries])
    error = np.sqrt(np.log1p(variance / share**2))  # of log share, were it lognormal
    energy = source[rows] / size[:, None]
    rng = np.random.default_rng(0)
    wins = np.zeros(len(domains))
    for _ in range(_RESAMPLES):
        drawn = energy[:, rng.integers(0, energy.shape[1], energy.shape[1])].mean(1)
        theirs = share * np.exp(error * rng.standard_normal(share.shape)) / size
        found = [float(_standard(x) @ _standard(drawn)) for x in theirs]
        wins[int(np.argmax(found))] += 1  # a tie counts for the nearest
    return (wins / _RESAMPLES).tolist()


def _standard(values: Array) -> Array:
    """Ranks, centred and of length one: inner products of such are Spearman correlations."""
    ranks = rankdata(values) - (values.size + 1) / 2
    length = float(np.sqrt((ranks**2).sum()))
    standard: Array = ranks / length if length > 0 else ranks
    return standard


# -- in the file ---------------------------------------------------------------------------------


def as_domain(file: BlueprintFile) -> Domain:
    """The measurement of a file as a domain of another; keys that are not known come along."""
    return Domain(**{k: v for k, v in file if k not in _OF_THE_FILE})


def as_file(content: Measured, version: str, domains: Sequence[Domain] = ()) -> BlueprintFile:
    """A measurement as a file of its own, of the schema version given; of this library's one if
    it holds domains and would be of an older one."""
    own = {k: v for k, v in content if k not in _OF_THE_FILE}
    if domains:
        version = max(version, SCHEMA_VERSION, key=lambda v: tuple(map(int, v.split("."))))
    return BlueprintFile(schema_version=version, domains=list(domains), **own)


def find_domain(domains: Sequence[Blueprint], tag: str) -> Blueprint:
    """See :meth:`fastgrad.Blueprint.domain`."""
    found = [b for b in domains if tag in b.domain_tags]
    if len(found) == 1:
        return found[0]
    known = ", ".join(" + ".join(b.domain_tags) or "(no tag)" for b in domains)
    raise BlueprintError(
        f"no domain has the tag {tag!r}; there are: {known}" if not found
        else f"{len(found)} domains have the tag {tag!r}: {known}. Remedy: a tag of one of them"
    )


def refuse_domain(blueprint: Blueprint, other: Blueprint, present: Sequence[Measured]) -> None:
    """Refuse a domain that cannot stand beside those ``present``, by name.

    Raises:
        BlueprintError: see :meth:`fastgrad.Blueprint.with_domain`.
    """
    a, b = blueprint.file.model, other.file.model
    if a.n_parameters != b.n_parameters:
        raise BlueprintError(
            f"the blueprint is of a model with {a.n_parameters:,} parameters, the other domain of "
            f"one with {b.n_parameters:,}"
        )
    if a.weights_hash != b.weights_hash:
        raise BlueprintError(
            f"the blueprint was made for weights {a.weights_hash}, the other domain measured on "
            f"{b.weights_hash}. Remedy: measure both on the same weights"
        )
    for one in (blueprint, other):
        if one.file.privacy.mechanism != "none":
            raise BlueprintError(
                f"{', '.join(one.domain_tags) or 'one domain'} is a private release, and a file of "
                "several domains would show one guarantee for all of them. Remedy: a file of its "
                "own for each private release"
            )
    shapes = dict(zip(blueprint.names, blueprint.shapes, strict=True))
    for name, shape in zip(other.names, other.shapes, strict=True):
        if shapes.get(name, shape) != shape:
            raise BlueprintError(f"{name} has shape {shape} in the other domain and {shapes[name]} "
                                 "in the blueprint")
    if not blueprint.domain_tags:
        raise BlueprintError(
            "the primary domain has no tag, so it could not be told from others. Remedy: "
            "Blueprint.from_stats(..., domain_tags=[...])"
        )
    taken = {tag for content in present for tag in content.domain_tags}
    if not set(other.domain_tags) - taken:
        raise BlueprintError(
            f"the other domain is tagged {other.domain_tags}, which does not tell it from those "
            f"that are there ({', '.join(sorted(taken))}). Remedy: a tag of its own, or merge"
        )
    if len(present) > MAX_DOMAINS:
        raise BlueprintError(f"a blueprint holds {MAX_DOMAINS} domains beside the primary one")
