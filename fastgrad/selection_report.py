"""Where the budget of a selection went, as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastgrad.blocks import in_words

if TYPE_CHECKING:
    from fastgrad.selection import Selection


def report(selection: Selection) -> str:
    """See :meth:`fastgrad.Selection.summary`."""
    from fastgrad.selection import kind_of, layer_of

    meta = selection.meta
    spread = _mapping(meta.get("spread"))
    whole = sum(selection.is_whole(name) for name in selection.blocks)
    lines = [
        f"{selection.n_parameters:,} of {selection.n_total:,} parameters "
        f"({selection.fraction:.1%}) in {selection.n_blocks:,} blocks of granularity "
        f"{in_words(selection.spec, selection.specs)}",
        f"{len(selection.blocks)} of {len(selection.shapes)} parameter tensors touched, "
        f"{whole} whole",
        *_how(meta),
    ]
    if spread:
        lines.append(_in_words(spread))
    if meta.get("note"):
        lines.append(f"note: {meta['note']}")
    tables: list[tuple[str, Callable[[str], str], str]] = [
        ("layer", layer_of, "layer"),
        ("kind of parameter", kind_of, "kind"),
    ]
    if selection.specs:
        tables.insert(0, ("granularity", lambda name: selection.grid(name).spec, ""))
    if spread.get("by") == "parameter":
        tables.append(("parameter", lambda name: name, "parameter"))
    for title, group, by in tables:
        bounds = _mapping(spread.get("groups")) if spread.get("by") == by else {}
        lines += ["", *_table(selection, title, group, bounds)]
    return "\n".join(lines)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _how(meta: Mapping[str, Any]) -> list[str]:
    """Ranking and budget: one line, if they are known."""
    parts = []
    if "ranking" in meta:
        direction = f" along {meta['direction']}" if meta.get("direction") else ""
        lowest = ", lowest first" if meta.get("largest") is False else ""
        parts.append(f"ranking {meta['ranking']}{direction}{lowest}")
    if budget := _mapping(meta.get("budget")):
        parts.append(f"budget {budget.get('kind')} = {budget.get('value')}")
    if needs := _mapping(meta.get("needs")):
        parts.append(f"a step needs {needs.get('value'):,.0f} {needs.get('unit')}")
    return ["; ".join(parts)] if parts else []


def _in_words(spread: Mapping[str, Any]) -> str:
    asked = []
    for bound in ("floor", "cap"):
        value = spread.get(bound)
        if isinstance(value, Mapping):
            asked.append(f"{bound} " + ", ".join(f"{p} {share:g}" for p, share in value.items()))
        elif value is not None:
            asked.append(f"{bound} {value:g}")
    met = {
        "score": "; floors met with the best blocks",
        "size": "; the best blocks for the floors did not fit, so the smallest (under a budget of "
        "blocks or submodules the largest) meet them",
    }.get(str(spread.get("floors_by")), "")
    return f"spread by {spread.get('by')}: {', '.join(asked)}{met}"


def _table(
    selection: Selection,
    title: str,
    group: Callable[[str], str],
    bounds: Mapping[str, Mapping[str, int]],
) -> Sequence[str]:
    """One row for each group of parameters; floors and caps in elements, where there are any."""
    chosen: dict[str, int] = {}
    total: dict[str, int] = {}
    for name, shape in selection.shapes.items():
        key = group(name)
        chosen[key] = chosen.get(key, 0) + selection.n_selected(name)
        total[key] = total.get(key, 0) + math.prod(shape)
    width = max(len(title), *(len(key) for key in total))
    head = f"{title:<{width}}  {'selected':>14}  {'of it':>6}  {'of budget':>9}"
    lines = [head + (f"  {'floor':>14}  {'cap':>14}" if bounds else "")]
    for key in total:
        line = (
            f"{key:<{width}}  {chosen[key]:>14,}  {chosen[key] / max(total[key], 1):>6.1%}  "
            f"{chosen[key] / selection.n_parameters:>9.1%}"
        )
        if key in bounds:
            line += f"  {bounds[key]['floor']:>14,}  {bounds[key]['cap']:>14,}"
        elif bounds:  # nothing of it could be chosen
            line += f"  {'-':>14}  {'-':>14}"
        lines.append(line)
    return lines
