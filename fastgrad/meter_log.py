"""A meter's log: checks, and the JSON that holds them, format 1 included."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrad.errors import ResourceError

FORMAT, _FORMAT_1 = "fastgrad.meter/2", "fastgrad.meter/1"
#: From the best to the worst that a figure can be called.
KINDS = ("measured", "counted", "estimated", "not measured")


@dataclass(frozen=True)
class Check:
    """One look at the figure of merit.

    Attributes:
        step: steps done.
        psi: figure of merit, more is better.
        spent: resources since the start; a resource that is not measured is absent.
        gain_per: change of psi over the window, per unit of each resource (of ``peak_bytes`` per
            byte of the peak, which is held and not used up); None at the first check, or where
            nothing was spent.
    """

    step: int
    psi: float
    spent: dict[str, float]
    gain_per: dict[str, float | None]


def finite(value: Any) -> bool:
    """Whether it is a number that one can reckon with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mode_kind(mode: str) -> str:
    """``measured``, ``counted``, ``estimated`` or ``not measured``: what a mode begins with."""
    return next((k for k in KINDS if mode.startswith(k)), "not measured")


def joined_mode(before: str, now: str, step: int) -> str:
    """How a sum of two runs is to be called: as the worse of both."""
    if before == now or before.endswith(f"; then: {now})"):
        return before
    kind = max(mode_kind(before), mode_kind(now), key=KINDS.index)
    return f"{kind} (to step {step}: {before}; then: {now})"


def read_file(path: str | os.PathLike[str]) -> Any:
    """What JSON gives, for :func:`read_state`.

    Raises:
        ResourceError: if the file cannot be read, naming it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResourceError(
            f"{path} cannot be read as a meter log: {error}. Remedy: a log that Meter.save wrote, "
            "or begin a new one"
        ) from error


def read_state(state: Any, name: str) -> dict[str, Any]:
    """The parts of a log, checked; ``checks`` as :class:`Check`.

    Args:
        state: what JSON gave.
        name: what to call it in errors.

    Raises:
        ResourceError: naming what is wrong.
    """
    if not isinstance(state, Mapping) or state.get("format") not in (FORMAT, _FORMAT_1):
        found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise ResourceError(
            f"{name} is not a fastgrad meter log of a version that this one reads ({FORMAT}, "
            f"{_FORMAT_1}): it says {found!r}. Remedy: the fastgrad that wrote it, or a new log"
        )
    try:
        steps = _count(state["steps"], "steps")
        spent, modes = _amounts(state["spent"], "spent"), dict(state["modes"])
        if not all(isinstance(m, str) for m in modes.values()) or set(spent) - set(modes):
            raise ValueError("modes do not say how each resource was measured")
        checks = [_check(c, i) for i, c in enumerate(state["checks"])]
        sessions = [dict(s) for s in state.get("sessions", [{"from_step": 0}])]
        for session in sessions:
            _count(session["from_step"], "from_step")
        if not sessions or any(c.step > steps for c in checks):
            raise ValueError("steps, sessions and checks contradict each other")
        return {
            **{k: state[k] for k in ("resource", "eta", "patience", "window", "flops")},
            "energy": state.get("energy", "auto"),
            "steps": steps, "spent": spent, "modes": modes, "checks": checks, "sessions": sessions,
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResourceError(
            f"{name} is damaged and cannot be read as a meter log: {type(error).__name__} {error}. "
            "Remedy: another copy, or begin a new log"
        ) from error


def _check(entry: Any, number: int) -> Check:
    where = f"check {number}"
    if not finite(entry["psi"]):
        raise ValueError(f"{where}: psi is {entry['psi']!r}")
    gain = entry["gain_per"]
    if any(g is not None and not finite(g) for g in gain.values()):
        raise ValueError(f"{where}: gain_per is {gain!r}")
    spent = _amounts(entry["spent"], where)
    return Check(_count(entry["step"], where), float(entry["psi"]), spent, dict(gain))


def _amounts(values: Any, where: str) -> dict[str, float]:
    for name, value in values.items():
        if not finite(value) or value < 0:
            raise ValueError(f"{where}: {name} is {value!r}")
    return {str(n): float(v) for n, v in values.items()}


def _count(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{where} is {value!r}, no count")
    return value
