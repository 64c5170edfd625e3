"""Which data a measurement was made on, when two measurements become one.

``meta["data"]`` of :class:`fastgrad.GradientStats` and ``data`` of a blueprint hold the same keys:
``datasets`` (a list of mappings with ``name`` and perhaps ``revision``, ``subset``, ``split``,
``n_examples``), ``seed`` of whatever was drawn, and ``command``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_WHICH = ("name", "revision", "subset", "split")


def joined_datasets(*lists: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each data set once, in the order they come, its examples added up; None if not counted."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in (e for one in lists for e in one):
        key = tuple(entry.get(k) for k in _WHICH)
        before = found.get(key)
        if before is None:
            found[key] = dict(entry)
            continue
        counts = before.get("n_examples"), entry.get("n_examples")
        found[key] = {
            k: v for k, v in before.items() if k in _WHICH or entry.get(k) == v
        } | {"n_examples": None if None in counts else sum(c for c in counts if c is not None)}
    return list(found.values())


def joined_data(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> dict[str, Any]:
    """``meta["data"]`` of two measurements together: what differs between them is left out."""
    a, b = one or {}, other or {}
    joined = {k: v for k, v in a.items() if k != "datasets" and k in b and b[k] == v}
    if "datasets" in a or "datasets" in b:
        joined["datasets"] = joined_datasets(a.get("datasets") or (), b.get("datasets") or ())
    return joined
