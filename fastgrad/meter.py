"""Capability gained per resource spent, dΨ/dΓ, and when to stop.

Ψ is any figure of merit where more is better (minus the held-out loss, an accuracy); Γ a vector of
resources: seconds, processor seconds, floating-point operations, joules, bytes moved, and the bytes
held at the peak. The ratio over a window of checks says what the last bit of resource bought; when
it stays below ``eta`` for ``patience`` checks, going on is no longer worth it. ``docs/meter.md``
says what each figure is and is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from fastgrad.errors import ResourceError
from fastgrad.files import write_text
from fastgrad.meter_energy import Energy, EnergySource, energy_source
from fastgrad.meter_flops import LEFT_OUT, StepFlops
from fastgrad.meter_log import FORMAT, Check, finite, joined_mode, read_file, read_state
from fastgrad.meter_memory import TRAFFIC, PeakMemory, peak_memory_bytes, step_traffic

__all__ = ["Check", "Meter", "peak_memory_bytes"]

Resource = Literal["seconds", "cpu_seconds", "flops", "joules", "traffic_bytes", "peak_bytes"]
#: Units, in the order of tables.
UNITS = {
    "seconds": "s", "cpu_seconds": "s", "flops": "FLOP", "joules": "J", "traffic_bytes": "B",
    "peak_bytes": "B",
}  # fmt: skip
_UNWATCHED = "not measured (no model and optimizer were given: Meter.watch)"


@dataclass
class Meter:
    """Adds up what training spends and sets it against what it gains.

        meter = fg.Meter(eta=1e-3, resource="seconds", log="meter.json")
        meter.watch(model, optimizer)                # for the traffic estimate; may be left out
        meter.check(-validation_loss())              # where it begins
        for batch in loader:
            with meter.step():
                ...                                  # your training step
            if evaluate_now:
                meter.check(-validation_loss())
                if meter.should_stop:
                    break

    Only what happens inside :meth:`step` is spent: neither evaluation nor the loading of data
    between steps. Each process meters itself; :func:`fastgrad.meter_processes.over_processes` adds
    them up.

    Args:
        resource: the resource that the stopping rule looks at.
        eta: least gain of psi per unit of that resource; None for no stopping rule.
        patience: number of checks in a row below ``eta`` that end it.
        window: number of checks over which the ratio is taken.
        flops: ``first`` counts the operations of the first step and takes every step to cost
            the same (right for batches of one shape; :meth:`recount` counts anew); ``every``
            counts each step (slower); ``off`` counts none.
        energy: where joules come from, see :mod:`fastgrad.meter_energy`. ``auto`` takes what
            measures and can be read, or nothing; ``codecarbon`` estimates.
        device: where training runs, for memory, energy and waiting for the device; by default the
            current CUDA device if there is one, else the CPU.
        log: file that each :meth:`check` after a step writes, as :meth:`save` does. One that is
            there already is not overwritten: see :meth:`resume`.
        clock, cpu_clock: read wall and processor time in seconds; for tests.

    Attributes:
        checks: what :meth:`check` found.
        steps: steps done, those before a restart included.
        spent: resources up to now, by name; of ``peak_bytes`` the highest so far. One that is not
            measured, or was not throughout, is absent.
        modes: how each resource was measured: begins with ``measured``, ``counted``,
            ``estimated`` or ``not measured``, and is never called better than its worst part.
        sessions: one entry for each run that added to this log, with the step that it began at.

    Raises:
        ResourceError: for impossible options, or a stopping rule on what is not measured.
        MissingExtraError: if the package of an energy source that was asked for is missing.
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
    energy: Energy = "auto"
    device: str | torch.device | None = None
    log: str | os.PathLike[str] | None = None
    sessions: list[dict[str, Any]] = field(default_factory=list)
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False, compare=False)
    cpu_clock: Callable[[], float] = field(default=time.process_time, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("patience", "window"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ResourceError(
                    f"{name} is {getattr(self, name)!r}; patience and window must be at least 1"
                )
        if self.flops not in ("first", "every", "off"):
            raise ResourceError(f"flops is {self.flops!r}. Remedy: 'first', 'every' or 'off'")
        if self.eta is not None and not finite(self.eta):
            raise ResourceError(f"eta must be a finite number or None, got {self.eta}")
        if self.resource not in UNITS:
            raise ResourceError(
                f"the stopping rule looks at {self.resource!r}, which is unknown. Remedy: one of "
                f"{', '.join(UNITS)}"
            )
        #: Else it was chosen here.
        self.device_given = self.device is not None
        self._device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self.device = str(self._device)
        self._watched: tuple[nn.Module, Any] | None = None
        self._flops_per_step: float | None = None
        self._step: _Step | None = None
        self._log_is_own = False
        self._peak = PeakMemory(self._device)
        self._source: EnergySource | None
        self._source, self.modes["joules"] = energy_source(self.energy, self._device)
        self.modes["seconds"] = "measured (wall clock inside step())"
        self.modes["cpu_seconds"] = "measured (processor time of this process inside step())"
        self.modes["peak_bytes"] = self._peak.mode
        self.modes["traffic_bytes"] = _UNWATCHED
        self.modes["flops"] = "not measured"
        if self.flops != "off":
            scope = "each step" if self.flops == "every" else "first step, times the steps"
            self.modes["flops"] = f"counted by torch.utils.flop_counter ({scope}; {LEFT_OUT})"
        for name, mode in self.modes.items():
            if not mode.startswith("not measured"):
                self.spent.setdefault(name, 0.0)
        if not self.sessions:
            self.sessions.append({"from_step": self.steps})
        if self.resource != "traffic_bytes":  # watch() is still to come
            self._check_resource()

    def _check_resource(self) -> None:
        if self.resource not in self.spent:
            raise ResourceError(
                f"the stopping rule looks at {self.resource!r}, which is "
                f"{self.modes[self.resource]}. Remedy: another resource"
                + (", or Meter.watch before the first step" if "traffic" in self.resource else "")
            )

    def watch(self, model: nn.Module, optimizer: Any) -> None:
        """Estimate the bytes that steps move, see :func:`fastgrad.meter_memory.step_traffic`.

        Before the first step, and again after a restart. Where the model lies on several devices,
        the peak and a GPU's energy, which are those of one, are not measured any more.

        Args:
            model: the model that is trained; a partial one too.
            optimizer: its optimizer.

        Raises:
            ResourceError: after a step that was not watched, or if the model lies on another
                device than the meter looks at.
        """
        self._check_devices(model)
        if self._watched is None:
            if self.steps > self.sessions[-1]["from_step"]:
                raise ResourceError(
                    f"{self.steps} steps were taken unwatched, so that the bytes moved would be "
                    "too few. Remedy: Meter.watch before the first step"
                )
            if self.steps == 0:
                self.spent["traffic_bytes"], self.modes["traffic_bytes"] = 0.0, TRAFFIC
            elif "traffic_bytes" in self.spent:
                self._joined("traffic_bytes", TRAFFIC)
            else:
                self._lose("traffic_bytes", self.modes["traffic_bytes"], TRAFFIC)
        self._watched = model, optimizer

    def _check_devices(self, model: nn.Module) -> None:
        devices = sorted({str(p.device) for p in model.parameters() if not p.is_meta})
        if len(devices) == 1 and devices != [self.device]:
            raise ResourceError(
                f"the model lies on {devices[0]}, and this meter looks at {self.device}. Remedy: "
                f"Meter(device={devices[0]!r})"
            )
        if len(devices) > 1:
            for name in ("peak_bytes", "joules"):
                if name in self.spent and (name == "peak_bytes" or "GPU" in self.modes[name]):
                    self._lose(
                        name, self.modes[name],
                        f"not measured, as the model lies on {', '.join(devices)}",
                    )  # fmt: skip

    def recount(self) -> None:
        """Count the operations of the next step anew: the batch's shape, or what is trained, has
        changed."""
        self._flops_per_step = None

    # -- steps -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def step(self, passes: int = 1) -> Iterator[None]:
        """Measure one training step.

        What a step that raises has taken of time, energy and memory is spent; it is not counted
        as a step, and neither are its operations and its traffic.

        Args:
            passes: forward and backward passes in it (gradient accumulation), for the traffic
                estimate.

        Raises:
            ResourceError: inside another step.
        """
        self.begin_step()
        try:
            yield
        except BaseException:
            self.end_step(failed=True)
            raise
        self.end_step(passes)

    def begin_step(self) -> None:
        """A step begins, for loops that cannot use :meth:`step`; :meth:`end_step` must follow."""
        if self._step is not None:
            raise ResourceError("a step of this meter has begun and not ended. Remedy: end_step")
        if self.steps == self.sessions[-1]["from_step"]:
            self._first_step()
        counter = None
        if self.flops == "every" or (self.flops == "first" and self._flops_per_step is None):
            counter = StepFlops()
        self._wait()
        self._peak.start()
        if self._source is not None:
            self._source.start()
        step = self._step = _Step(counter, self.clock(), self.cpu_clock())
        if step.counter is not None:
            step.counter.start()

    def end_step(self, passes: int = 1, *, failed: bool = False) -> None:
        """The step has ended, see :meth:`step`.

        Raises:
            ResourceError: if none has begun.
        """
        step, self._step = self._step, None
        if step is None:
            raise ResourceError("no step has begun. Remedy: begin_step, or with meter.step()")
        flops = None if step.counter is None else step.counter.stop()
        if not failed:
            self._wait()
        self._add("seconds", self.clock() - step.clock)
        self._add("cpu_seconds", self.cpu_clock() - step.cpu_clock)
        if self._source is not None:
            self._add("joules", self._source.stop())
        if "peak_bytes" in self.spent:
            self.spent["peak_bytes"] = max(self.spent["peak_bytes"], self._peak.stop())
        if failed:
            return
        if step.counter is not None:
            self._flops_per_step = flops
            self._name_uncounted(step.counter.uncounted)
        if self._flops_per_step is not None:
            self._add("flops", self._flops_per_step)
        if self._watched is not None and "traffic_bytes" in self.spent:
            self._add("traffic_bytes", step_traffic(*self._watched, passes))
        self.steps += 1

    def drop_step(self) -> None:
        """Forget a step that has begun and will not end, and what it took; nothing if none has."""
        step, self._step = self._step, None
        if step is None:
            return
        if step.counter is not None:
            step.counter.stop()
        if self._source is not None:
            self._source.stop()

    def _first_step(self) -> None:
        """Of this run."""
        if self._watched is None and "traffic_bytes" in self.spent:
            self._lose("traffic_bytes", self.modes["traffic_bytes"], _UNWATCHED)
        self._check_resource()
        self._claim_log()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.sessions[-1] |= {"process": dist.get_rank(), "processes": dist.get_world_size()}

    def _claim_log(self) -> None:
        if self.log is not None and not self._log_is_own and os.path.exists(self.log):
            raise ResourceError(
                f"{self.log} is there already and would be overwritten. Remedy: "
                "Meter.resume(path) to add to it, or another log"
            )
        self._log_is_own = True

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _add(self, name: str, amount: float) -> None:
        if name in self.spent:
            self.spent[name] += amount

    def _name_uncounted(self, names: tuple[str, ...]) -> None:
        mode = self.modes["flops"]
        new = [n for n in names if n not in mode]
        if new:
            self.modes["flops"] = f"{mode}; not counted: {', '.join(new)}"

    # -- checks ----------------------------------------------------------------------------

    def check(self, psi: float) -> Check:
        """Record the figure of merit and what was spent up to now; write the log, if there is one.

        Raises:
            ResourceError: if ``psi`` is not a finite number.
        """
        if not finite(psi):
            raise ResourceError(f"the figure of merit must be a finite number, got {psi}")
        gain: dict[str, float | None] = dict.fromkeys(self.spent)
        if self.checks:
            before = self.checks[-min(self.window, len(self.checks))]
            for name, value in self.spent.items():
                if name == "peak_bytes":  # held, not used up: the gain is set against all of it
                    spent = value if self.steps > before.step else 0.0
                else:
                    spent = value - before.spent.get(name, value)
                gain[name] = (psi - before.psi) / spent if spent > 0 else None
        self.checks.append(Check(self.steps, float(psi), dict(self.spent), gain))
        if self.log is not None and self.steps:
            self._claim_log()
            self.save(self.log)
        return self.checks[-1]

    @property
    def should_stop(self) -> bool:
        """True once the last ``patience`` checks each gained less than ``eta`` per unit."""
        last = self.checks[-self.patience :]
        if self.eta is None or len(last) < self.patience:
            return False
        ratios = [c.gain_per.get(self.resource) for c in last]
        return all(r is not None and r < self.eta for r in ratios)

    @property
    def resumed(self) -> bool:
        """Whether earlier runs added to what was spent."""
        return len(self.sessions) > 1

    # -- file ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return {
            "format": FORMAT, "resource": self.resource, "eta": self.eta,
            "patience": self.patience, "window": self.window, "flops": self.flops,
            "energy": self.energy, "steps": self.steps, "spent": dict(self.spent),
            "modes": dict(self.modes), "sessions": [dict(s) for s in self.sessions],
            "checks": [
                {"step": c.step, "psi": c.psi, "spent": c.spent, "gain_per": c.gain_per}
                for c in self.checks
            ],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: what was spent before is added to, a new session begins, and the
        options stay those of this meter.

        A resource that was measured in one of the runs only is no total: it is dropped, and
        ``modes`` says so.

        Raises:
            ResourceError: for a state that is not one, after the first step of this meter, or if
                the stopping rule looks at a resource that was dropped.
        """
        if self.steps or self.checks or self._step is not None:
            raise ResourceError("this meter has begun already. Remedy: a new Meter for the state")
        old = read_state(state, "the state")
        self._log_is_own = True
        self.steps, self.checks = old["steps"], old["checks"]
        self.sessions = [*old["sessions"], {"from_step": self.steps}]
        now, self.spent = self.spent, dict(old["spent"])
        modes, self.modes = self.modes, dict(old["modes"])
        for name, mode in modes.items():
            before = self.modes.setdefault(name, "not measured")
            if name in self.spent and name in now:
                self._joined(name, mode)
            elif name in now and self.steps == 0:
                self.spent[name], self.modes[name] = 0.0, mode
            elif name in now or (name in self.spent and name != "traffic_bytes"):
                self._lose(name, before, mode)  # traffic waits for watch()
        if self.resource != "traffic_bytes":
            self._check_resource()

    def _joined(self, name: str, mode: str) -> None:
        self.modes[name] = joined_mode(self.modes[name], mode, self.sessions[-1]["from_step"])

    def _lose(self, name: str, before: str, now: str) -> None:
        """Known of a part of the steps only: no total."""
        self.spent.pop(name, None)
        step = self.sessions[-1]["from_step"]
        if not before.startswith("not measured throughout"):
            self.modes[name] = f"not measured throughout (to step {step}: {before}; then: {now})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, atomically; :meth:`load` goes on from there."""
        write_text(path, json.dumps(self.state_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> Meter:
        """Read what :meth:`save` or ``log=`` wrote, and go on from there.

        Args:
            path: the file, of this version or of format 1.
            options: arguments of :class:`Meter` that are to differ from the file's. The device,
                the log and the clocks are not in the file.

        Raises:
            ResourceError: if the file is missing or damaged, naming it, or as
                :meth:`load_state_dict`.
        """
        state = read_file(path)
        old = read_state(state, str(path))
        kept = {k: old[k] for k in ("resource", "eta", "patience", "window", "flops", "energy")}
        meter = cls(**(kept | options))
        meter.load_state_dict(state)
        return meter

    @classmethod
    def resume(cls, path: str | os.PathLike[str], **options: Any) -> Meter:
        """:meth:`load` with ``log=path`` if the file is there, else a new meter that writes it.

        What was spent after the last check in the file is not known and not in the sum.

        Raises:
            ResourceError: as :meth:`load`.
        """
        if os.path.exists(path):
            return cls.load(path, log=path, **options)
        return cls(log=path, **options)


@dataclass
class _Step:
    """A step under way: its counter, and the clocks when it began."""

    counter: StepFlops | None
    clock: float
    cpu_clock: float
