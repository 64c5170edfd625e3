"""How two blueprints differ, and what in their making may explain it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastgrad.blocks import in_words
from fastgrad.printable import printable
from fastgrad.rank_agreement import Agreement, agreement
from fastgrad.release_noise import (
    ReleaseNoise,
    above_noise,
    effect,
    is_noised,
    is_read_exactly,
)
from fastgrad.staleness import HIDDEN, LABELS, expected_of, limits_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from fastgrad.blueprint import Blueprint

Kind = Literal["model", "data", "measurement", "software", "file"]

#: A change of a share is told from noise when it is beyond this many standard errors (two-sided
#: 95 %); of many submodules a twentieth is so by chance.
Z = 1.96

_MISSING = "(not there)"

# What a field of the provenance is about; the first prefix that fits counts.
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("model.", "model"),
    ("data.loss_reduction", "measurement"),
    ("data.example_scale", "measurement"),
    ("data.shift_labels", "measurement"),
    ("data.dtypes", "measurement"),
    ("data.attention", "measurement"),
    ("data.clip", "measurement"),
    ("data.weight_", "data"),
    ("data.command", "software"),
    ("data.", "data"),
    ("domain_tags", "data"),
    ("blend", "measurement"),
    ("merge", "data"),
    ("privacy", "measurement"),
    ("granularity", "measurement"),
    ("provenance.", "software"),
    ("fastgrad_version", "software"),
)
_COMPARED = ("model", "data", "domain_tags", "blend", "merge", "privacy", "provenance",
             "fastgrad_version", "schema_version")  # fmt: skip


@dataclass(frozen=True)
class FieldDifference:
    """A field of the provenance that the two files give differently.

    Attributes:
        field: its place in the file, dotted.
        kind: what it is about: ``model``, ``data``, ``measurement`` (how it was measured),
            ``software``, or ``file`` (of no consequence for the numbers).
        one, other: both values, as JSON has them; ``(not there)`` for a key that is missing.
    """

    field: str
    kind: Kind
    one: Any
    other: Any


@dataclass(frozen=True)
class ShareChange:
    """A submodule's share of the squared gradient norm in both blueprints.

    Attributes:
        name: of the submodule.
        one, other: shares.
        change: ``other - one``.
        z: change over its standard error; None if a sampling variance is not known.
        rank_one, rank_other: place by rms, 1 being the highest.
    """

    name: str
    one: float
    other: float
    change: float
    z: float | None
    rank_one: int
    rank_other: int


@dataclass(frozen=True)
class BlueprintDiff:
    """Comparison of two blueprints, of their primary domains.

    Attributes:
        identical: the files say the very same.
        verdict: ``identical``, ``agree`` (as well as each with itself), ``differ`` (by more than
            their noise), ``unknown`` (no halves to compare with, too few submodules, or a private
            release whose noise hides it) or ``different model``.
        reason: the verdict in words, with what may explain a difference.
        provenance: fields that differ, of the model first.
        only_one, only_other: submodules that one of them measured alone.
        shapes: name -> both shapes, where they differ.
        spearman, weighted_tau, top_jaccard: agreement of rms scores; None if not to be had. Of a
            private release among the norms above its noise.
        halves_one, halves_other: the same three between halves of each sample, where known.
        distance: total variation between the shares: the part of the squared gradient norm that
            lies elsewhere, 0 to 1.
        changes: every submodule that both measured, the largest change of share first.
        fits: name of a number (gamma, rank exponent, k* per resource) -> both values.
        noise: what the noise of a private release, or deciles, leave of the agreement, where one of
            the two is such a release and the other is none.
    """

    identical: bool
    verdict: Literal["identical", "agree", "differ", "unknown", "different model"]
    reason: str
    provenance: tuple[FieldDifference, ...]
    only_one: tuple[str, ...]
    only_other: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    spearman: float | None
    weighted_tau: float | None
    top_jaccard: float | None
    halves_one: tuple[float, float, float] | None
    halves_other: tuple[float, float, float] | None
    distance: float | None
    changes: tuple[ShareChange, ...]
    fits: Mapping[str, tuple[Any, Any]]
    noise: ReleaseNoise | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        found: dict[str, Any] = _plain(asdict(self))
        return found | {"noise": None if self.noise is None else self.noise.to_dict()}

    def text(self, most: int = 10) -> str:
        """The comparison for people, with the ``most`` largest changes."""
        lines = [f"{self.verdict}: {self.reason}"]
        if self.provenance:
            lines += ["", "what differs in how they were made"]
            width = max(len(d.field) for d in self.provenance)
            lines += [
                f"  {d.field:<{width}}  {_short(d.one)} -> {_short(d.other)}  ({d.kind})"
                for d in self.provenance
            ]
        for label, names in (("only in the first", self.only_one),
                             ("only in the second", self.only_other)):  # fmt: skip
            if names:
                lines += ["", f"measured {label}: {len(names)}, such as {', '.join(names[:3])}"]
        if self.shapes:
            lines.append("")
            lines += [f"{name} has shape {a} and {b}" for name, (a, b) in self.shapes.items()]
        if self.distance is not None:
            lines += ["", f"{self.distance:.1%} of the squared gradient norm lies elsewhere"]
        if self.spearman is not None:
            lines += ["", f"{'':<18}{'Spearman':>14}{'weighted tau':>14}{'top 20 %':>14}"]
            rows = (
                ("agreement", (self.spearman, self.weighted_tau, self.top_jaccard)),
                ("halves, first", self.halves_one),
                ("halves, second", self.halves_other),
            )
            lines += [f"{label:<18}" + "".join(f"{v:>14.2f}" for v in values)
                      for label, values in rows if values is not None]  # fmt: skip
        changed = [(n, a, b) for n, (a, b) in self.fits.items() if a != b]
        if changed:
            lines.append("")
            lines += [f"{name:<24} {_short(a)} -> {_short(b)}" for name, a, b in changed]
        shown = [c for c in self.changes if c.change][:most]
        if shown:
            width = max(len(c.name) for c in shown)
            head = f"{'largest changes':<{width}}"
            lines += ["", f"{head}  {'share':>15}  {'change':>8}  {'z':>6}  {'rank':>11}"]
            lines += [
                f"{c.name:<{width}}  {c.one:>6.1%} -> {c.other:>6.1%} {c.change:>+8.1%}  "
                f"{'-' if c.z is None else format(c.z, '+.1f'):>6}  "
                f"{c.rank_one:>4} -> {c.rank_other:>3}"
                for c in shown
            ]
        return "\n".join(printable(line) for line in lines)

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        colour = {"identical": "green", "agree": "green", "unknown": "yellow"}
        yield Text.assemble((self.verdict, f"bold {colour.get(self.verdict, 'red')}"),
                            f": {printable(self.reason)}")  # fmt: skip
        if self.provenance:
            table = Table("what differs", "first", "second", "about")
            for d in self.provenance:
                cells = (d.field, _short(d.one), _short(d.other), d.kind)
                table.add_row(*(Text(printable(cell)) for cell in cells))
            yield table
        if self.spearman is not None:
            table = Table("", "Spearman", "weighted tau", "top 20 %")
            for label, values in (
                ("agreement", (self.spearman, self.weighted_tau, self.top_jaccard)),
                ("halves, first", self.halves_one), ("halves, second", self.halves_other),
            ):  # fmt: skip
                if values is not None:
                    table.add_row(label, *(f"{v:.2f}" for v in values))
            yield table
        shown = [c for c in self.changes if c.change][:10]
        if shown:
            table = Table("largest changes", "first", "second", "change", "z", "ranks")
            for c in shown:
                table.add_row(
                    Text(printable(c.name)), f"{c.one:.1%}", f"{c.other:.1%}", f"{c.change:+.1%}",
                    "-" if c.z is None else f"{c.z:+.1f}", f"{c.rank_one} -> {c.rank_other}",
                )  # fmt: skip
            yield table


def diff(one: Blueprint, other: Blueprint) -> BlueprintDiff:
    """See :meth:`fastgrad.Blueprint.diff`."""
    provenance = tuple(_provenance(one, other))
    shapes = [dict(zip(b.names, b.shapes, strict=True)) for b in (one, other)]
    measured = [{n: n for n in b.names if n in b.measured_names} for b in (one, other)]
    common = [n for n in measured[0] if n in measured[1] and shapes[0][n] == shapes[1][n]]
    differing = {
        n: (shape, shapes[1][n]) for n, shape in shapes[0].items()
        if n in shapes[1] and shapes[1][n] != shape
    }  # fmt: skip
    alone = [tuple(n for n in measured[i] if n not in measured[1 - i]) for i in (0, 1)]
    changes, distance = _changes(one, other, common)
    found, noise = _agreement(one, other, common)
    halves = [_halves(b) for b in (one, other)]
    identical = one.to_json() == other.to_json()
    different = bool(differing) or one.n_model_parameters != other.n_model_parameters
    verdict, reason = _judge(
        identical, different, found, halves, provenance, noise,
        sum(not is_read_exactly(b.file) for b in (one, other)),
    )  # fmt: skip
    spearman, tau, jaccard = found or (None, None, None)
    return BlueprintDiff(
        identical, verdict, reason, provenance, alone[0], alone[1], differing, spearman, tau,
        jaccard, halves[0], halves[1], distance, changes, _fits(one, other), noise,
    )  # fmt: skip


def _judge(
    identical: bool, different: bool, found: Agreement | None,
    halves: list[Agreement | None], provenance: tuple[FieldDifference, ...],
    noise: ReleaseNoise | None, n_inexact: int,
) -> tuple[Literal["identical", "agree", "differ", "unknown", "different model"], str]:  # fmt: skip
    if identical:
        return "identical", "the files say the very same"
    if different:
        return "different model", "parameters of other names, shapes or number"
    named = [d.field for d in provenance if d.kind in ("model", "data", "measurement")]
    told = (
        f"They were made with different {', '.join(named[:4])}"
        + (f" and {len(named) - 4} more" if len(named) > 4 else "")
        if named else "Nothing in how they were made differs"
    )  # fmt: skip
    if noise is not None and noise.too_few:
        return "unknown", (
            f"{HIDDEN}: {noise.n_above} of {noise.n} norms lie above twice the noise, which is too "
            f"few. {told}"
        )
    if found is None:
        return "unknown", f"too few submodules can be compared, or their scores are equal. {told}"
    known = [h for h in halves if h is not None]
    if not known:
        return "unknown", (
            f"ranks agree to Spearman {found.spearman:.2f}, and neither file says how well halves "
            f"of its sample agree. {told}"
        )
    if n_inexact and noise is None:
        return "unknown", (
            f"ranks agree to Spearman {found.spearman:.2f}, and neither file holds norms without "
            f"noise, by which what noise does to ranks could be told. {told}"
        )
    bars = expected_of(known, noise)
    limits = limits_of(bars, noise)
    of = "halves" if noise is None else "halves and noise" if noise.std != 0 else "halves, deciles"
    texts = [f"{label} {value:.2f} ({of} {bar:.2f})"
             for label, value, bar in zip(LABELS, found, bars, strict=True)]  # fmt: skip
    low = [t for t, v, limit in zip(texts, found, limits, strict=True) if v < limit]
    # It leaves too little to call them alike, or how much it leaves is not known.
    hidden = noise is not None and (noise.expected is None if low else not noise.settles)
    if hidden:
        return "unknown", f"{HIDDEN}: {', '.join(low or texts)}. {told}"
    if low:
        return "differ", f"ranks agree less than halves of a sample do: {', '.join(low)}. {told}"
    return "agree", f"ranks agree as well as halves of a sample do: {', '.join(texts)}. {told}"


def _agreement(
    one: Blueprint, other: Blueprint, common: list[str]
) -> tuple[Agreement | None, ReleaseNoise | None]:
    """Agreement of rms scores, among the norms above noise; and what noise leaves of it, by the
    norms of the other file where that has them exactly."""
    dead = set(one.dead) & set(other.dead)
    scores = [b.scores("rms", "module") for b in (one, other)]
    names = [n for n in common if n not in dead and n in scores[0] and n in scores[1]]
    noise = None
    for noisy, exact in ((one, other), (other, one)):
        if not is_noised(exact.file) and exact.file.privacy.released is None:
            known = {s.name: s for s in exact.submodules}
            truth = np.array([known[n].grad_norm or 0.0 for n in names])
            size = np.array([known[n].numel for n in names])
            noise = noise or effect(noisy.file, names, truth, size)
    for above in (above_noise(one.file), above_noise(other.file)):
        names = names if above is None else [n for n in names if above[n]]
    a, b = (np.array([s[n][0] for n in names]) for s in scores)
    return agreement(a, b), noise


def _halves(blueprint: Blueprint) -> Agreement | None:
    h = blueprint.split_half
    return None if h is None else Agreement(h.spearman, h.weighted_tau, h.top_jaccard)


def _changes(
    one: Blueprint, other: Blueprint, common: list[str]
) -> tuple[tuple[ShareChange, ...], float | None]:
    entries = [{s.name: s for s in b.submodules} for b in (one, other)]
    names = [n for n in common if all(e[n].share is not None for e in entries)]
    ranks = [
        {n: i + 1 for i, n in enumerate(sorted(names, key=lambda n: -(e[n].rms or 0.0)))}
        for e in entries
    ]  # fmt: skip
    found = []
    for n in names:
        x, y = entries[0][n].share or 0.0, entries[1][n].share or 0.0
        a, b = entries[0][n].share_variance, entries[1][n].share_variance
        z = None
        if a is not None and b is not None and a + b > 0:
            z = (y - x) / math.sqrt(a + b)
        found.append(ShareChange(n, x, y, y - x, z, ranks[0][n], ranks[1][n]))
    found.sort(key=lambda c: -abs(c.change))
    distance = 0.5 * math.fsum(abs(c.change) for c in found) if found else None
    return tuple(found), distance


def _fits(one: Blueprint, other: Blueprint) -> dict[str, tuple[Any, Any]]:
    def numbers(b: Blueprint) -> dict[str, Any]:
        fits = b.file.fits
        if fits is None:
            return {}
        tail = fits.norm.tail
        found: dict[str, Any] = {
            "gamma of ‖g‖": fits.norm.gamma.gamma,
            "gamma of ‖g‖²": fits.squared_norm.gamma.gamma,
            "rank exponent": None if tail is None else tail.rank_exponent,
            "verdict on a power law": None if tail is None else tail.verdict,
            "noise scale": b.noise.noise_scale,
        }
        return found | {f"k* for {name}": entry.value for name, entry in b.k_star.items()}

    a, b = numbers(one), numbers(other)
    return {name: (a.get(name), b.get(name)) for name in [*a, *(n for n in b if n not in a)]}


# -- provenance ----------------------------------------------------------------------------------


def _provenance(one: Blueprint, other: Blueprint) -> list[FieldDifference]:
    a, b = (
        dict(_flat({k: v for k, v in bp.file.model_dump(by_alias=True).items() if k in _COMPARED}))
        | {"granularity": in_words(bp.spec, bp.specs)}
        for bp in (one, other)
    )
    found = [
        FieldDifference(field, _kind(field), a.get(field, _MISSING), b.get(field, _MISSING))
        for field in [*a, *(f for f in b if f not in a)]
        if a.get(field, _MISSING) != b.get(field, _MISSING)
    ]
    order = ("model", "data", "measurement", "software", "file")
    return sorted(found, key=lambda d: order.index(d.kind))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted places of what is no mapping; lists are compared as a whole."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flat(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _kind(field: str) -> Kind:
    return next((kind for prefix, kind in _KINDS if field.startswith(prefix)), "file")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
