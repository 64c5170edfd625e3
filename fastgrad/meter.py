"""Capability gained per resource spent, dΨ/dΓ, and when to stop.

Ψ is any figure of merit where more is better (minus the held-out loss, an accuracy); Γ a
vector of resources spent since the start: seconds, floating-point operations, joules. The
ratio over a window of checks says what the last bit of resource bought; when it stays below
``eta`` for ``patience`` checks, going on is no longer worth it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgrad.errors import ResourceError
from fastgrad.files import write_text

Resource = Literal["seconds", "flops", "joules"]
RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Check:
    """One look at the figure of merit.

    Attributes:
        step: steps done.
        psi: figure of merit, more is better.
        spent: resources since the start; a resource that is not measured is absent.
        gain_per: change of psi over the window, per unit of each resource; None at the first
            check, or where nothing was spent.
    """

    step: int
    psi: float
    spent: dict[str, float]
    gain_per: dict[str, float | None]


@dataclass
class Meter:
    """Adds up what training spends and sets it against what it gains.

        meter = fg.Meter(eta=1e-3, resource="seconds")
        for batch in loader:
            with meter.step():
                ...                                  # your training step
            if evaluate_now:
                meter.check(-validation_loss())
                if meter.should_stop:
                    break

    Args:
        resource: the resource that the stopping rule looks at.
        eta: least gain of psi per unit of that resource; None for no stopping rule.
        patience: number of checks in a row below ``eta`` that end it.
        window: number of checks over which the ratio is taken.
        flops: ``first`` counts the operations of the first step and takes every step to cost
            the same (right for batches of one shape); ``every`` counts each step (slower);
            ``off`` counts none.

    Attributes:
        modes: how each resource was measured; what could not be measured is listed as such and
            never estimated.
    """

    resource: Resource = "seconds"
    eta: float | None = None
    patience: int = 3
    window: int = 2
    flops: Literal["first", "every", "off"] = "first"
    checks: list[Check] = field(default_factory=list)
    steps: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    _flops_per_step: float | None = None

    def __post_init__(self) -> None:
        if self.patience < 1 or self.window < 1:
            raise ResourceError("patience and window must be at least 1")
        self.spent.setdefault("seconds", 0.0)
        self.modes["seconds"] = "measured (wall clock inside step())"
        if self.flops == "off":
            self.modes["flops"] = "not measured"
        else:
            self.spent.setdefault("flops", 0.0)
            scope = "each step" if self.flops == "every" else "first step, times the steps"
            self.modes["flops"] = f"counted by torch.utils.flop_counter ({scope})"
        if _rapl_joules() is not None:
            self.spent.setdefault("joules", 0.0)
            self.modes["joules"] = "measured (RAPL, whole processor package)"
        else:
            self.modes["joules"] = "not measured (no readable RAPL counter)"
        if self.resource not in self.spent:
            raise ResourceError(
                f"the stopping rule looks at {self.resource!r}, which is "
                f"{self.modes.get(self.resource, 'unknown')}"
            )

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measure one training step."""
        count = self.flops == "every" or (self.flops == "first" and self._flops_per_step is None)
        joules, start = _rapl_joules(), time.perf_counter()
        if count:
            counter = FlopCounterMode(display=False)
            with counter:
                yield
            self._flops_per_step = float(counter.get_total_flops())
        else:
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.spent["seconds"] += time.perf_counter() - start
        if self._flops_per_step is not None and self.flops != "off":
            self.spent["flops"] += self._flops_per_step
        now = _rapl_joules()
        if joules is not None and now is not None and now >= joules:  # the counter wraps around
            self.spent["joules"] += now - joules
        self.steps += 1

    def check(self, psi: float) -> Check:
        """Record the figure of merit and what was spent up to now.

        Raises:
            ResourceError: if ``psi`` is not a finite number.
        """
        if not isinstance(psi, int | float) or psi != psi or abs(psi) == float("inf"):
            raise ResourceError(f"the figure of merit must be a finite number, got {psi}")
        gain: dict[str, float | None] = dict.fromkeys(self.spent)
        if self.checks:
            before = self.checks[-min(self.window, len(self.checks))]
            for name, value in self.spent.items():
                spent = value - before.spent.get(name, 0.0)
                gain[name] = (psi - before.psi) / spent if spent > 0 else None
        self.checks.append(Check(self.steps, float(psi), dict(self.spent), gain))
        return self.checks[-1]

    @property
    def should_stop(self) -> bool:
        """True once the last ``patience`` checks each gained less than ``eta`` per unit."""
        last = self.checks[-self.patience :]
        if self.eta is None or len(last) < self.patience:
            return False
        ratios = [c.gain_per.get(self.resource) for c in last]
        return all(r is not None and r < self.eta for r in ratios)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, atomically; :meth:`load` goes on from there."""
        data = {k: v for k, v in asdict(self).items() if k != "checks"}
        data["checks"] = [asdict(c) for c in self.checks]
        write_text(path, json.dumps({"format": "fastgrad.meter/1", **data}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Meter:
        """Read what :meth:`save` wrote.

        Raises:
            ResourceError: if the file is missing or damaged.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.pop("format") != "fastgrad.meter/1":
                raise ResourceError(f"{path} is not a fastgrad meter log of this version")
            checks = [Check(**c) for c in data.pop("checks")]
            return cls(**data, checks=checks)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResourceError(f"{path} cannot be read as a meter log: {error}") from error


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far, as the operating system counts it."""
    with contextlib.suppress(OSError):  # Linux: ru_maxrss would include what the parent held
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rapl_joules() -> float | None:
    """Energy counter of all processor packages, or None where it cannot be read."""
    try:
        files = [p / "energy_uj" for p in RAPL.glob("intel-rapl:?")]
        return sum(int(f.read_text()) for f in files) / 1e6 if files else None
    except (OSError, ValueError):
        return None
