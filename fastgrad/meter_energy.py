"""Joules that a step takes, from whichever counter can be read; an estimate is called one.

* ``rapl``: the processor's own counters in Linux's powercap (packages, and memory where it has
  one), as root or where the files may be read. Of the whole machine, whoever uses it.
* ``nvml``: the total energy counter of an NVIDIA GPU (Volta or newer), package ``nvidia-ml-py``.
* ``zeus``: package ``zeus``, which reads both and others.
* ``codecarbon``: package ``codecarbon``, which models what it cannot read, the memory's power
  always: an estimate.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from fastgrad.errors import MissingExtraError, ResourceError

Energy = Literal["auto", "rapl", "nvml", "zeus", "codecarbon", "off"]
SOURCES = ("auto", "rapl", "nvml", "zeus", "codecarbon", "off")
RAPL = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6


class EnergySource(Protocol):
    """A way to know what a stretch of time took.

    Attributes:
        mode: "measured (...)" or "estimated (...)".
    """

    mode: str

    def start(self) -> None: ...

    def stop(self) -> float:
        """Joules since :meth:`start`."""
        ...


def energy_source(choice: str, device: torch.device) -> tuple[EnergySource | None, str]:
    """What to read, and how its figure is to be called.

    Args:
        choice: see the head of this file. ``auto`` takes what measures and can be read here: RAPL,
            and NVML if training runs on a CUDA device. It never takes an estimate.
        device: where training runs; of GPUs, only this one is read.

    Returns:
        None and the reason if ``auto`` finds nothing, or for ``off``.

    Raises:
        ResourceError: for an unknown choice, or if the one that was asked for cannot be read.
        MissingExtraError: if its package is not installed.
    """
    if choice == "off":
        return None, "not measured"
    if choice == "auto":
        return _automatic(device)
    makers: dict[str, Callable[[], EnergySource]] = {
        "rapl": Rapl, "nvml": lambda: Nvml(device), "zeus": lambda: Zeus(device),
        "codecarbon": CodeCarbon,
    }  # fmt: skip
    if choice not in makers:
        raise ResourceError(f"unknown energy source {choice!r}. Remedy: {', '.join(SOURCES)}")
    source = makers[choice]()
    return source, source.mode


def _automatic(device: torch.device) -> tuple[EnergySource | None, str]:
    found: list[EnergySource] = []
    missing: list[str] = []
    try:
        found.append(Rapl())
    except ResourceError:
        missing.append("no readable RAPL counter")
    if device.type == "cuda":
        try:
            found.append(Nvml(device))
        except (ResourceError, MissingExtraError) as error:
            missing.append(f"the GPU is not included: {error}" if found else str(error))
    if not found:
        return None, f"not measured ({'; '.join(missing)})"
    parts = [s.mode.removeprefix("measured (").removesuffix(")") for s in found] + missing
    return _Several(found), f"measured ({'; '.join(parts)})"


class _Several:
    def __init__(self, sources: list[EnergySource]) -> None:
        self.sources, self.mode = sources, ""

    def start(self) -> None:
        for source in self.sources:
            source.start()

    def stop(self) -> float:
        return sum(source.stop() for source in self.sources)


# -- counters of the machine ----------------------------------------------------------------


class _Zone:
    """One counter, which goes back to zero at ``range`` microjoules (minutes to hours)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = _text(folder / "name", folder.name)
        try:
            self.range = int((folder / "max_energy_range_uj").read_text())
            self.last = self.read()
        except (OSError, ValueError) as error:
            raise ResourceError(
                f"the RAPL counter {folder} cannot be read: {error}. Remedy: run as root or let "
                "the files be read (chmod), or energy='off'"
            ) from error

    def read(self) -> int:
        return int((self.folder / "energy_uj").read_text())

    def since(self) -> int:
        """Microjoules since the reading before, if it went round at most once since."""
        before, self.last = self.last, self.read()
        return self.last - before + (self.range if self.last < before else 0)


class Rapl:
    """Energy of all processor packages, and of their memory where it has a counter of its own.

    Zones of other names overlap with these (``core`` is in a package, ``psys`` holds them all).
    A counter that wraps around once in a step is followed; a step that takes longer than a whole
    round (at 200 W some 20 minutes) would lose the round.

    Raises:
        ResourceError: if there is no such counter, or it cannot be read.
    """

    def __init__(self) -> None:
        top = [p for p in sorted(RAPL.glob("intel-rapl:*")) if re.fullmatch(r"[^:]+:\d+", p.name)]
        packages = [p for p in top if _text(p / "name", "package").startswith("package")]
        below = [p for z in packages for p in sorted(RAPL.glob(f"{z.name}:*"))]
        below += [p for z in packages for p in sorted(z.glob(f"{z.name}:*")) if p not in below]
        memory = {p.name: p for p in below if _text(p / "name", "") == "dram"}
        if not packages:
            raise ResourceError(
                f"{RAPL} has no RAPL counter of a processor package (virtual machines seldom have "
                "one). Remedy: energy='off', or 'codecarbon' for an estimate"
            )
        self.zones = [_Zone(p) for p in (*packages, *memory.values())]
        self.mode = f"measured (RAPL, whole machine: {', '.join(z.name for z in self.zones)})"

    def start(self) -> None:
        for zone in self.zones:
            zone.since()

    def stop(self) -> float:
        return sum(zone.since() for zone in self.zones) / 1e6


def _text(path: Path, default: str) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return default


class Nvml:
    """The total energy counter of one NVIDIA GPU, in millijoules since the driver was loaded.

    The GPU refreshes it some ten times a second: shorter steps are right in the sum alone.

    Raises:
        MissingExtraError: without the package ``nvidia-ml-py``.
        ResourceError: if the device is no CUDA device or has no such counter.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ResourceError(
                f"NVML counts the energy of NVIDIA GPUs, and training runs on {device}. Remedy: "
                "energy='auto', or Meter(device='cuda')"
            )
        self._nvml = _package("pynvml", "nvidia-ml-py", "energy")
        # The process' device numbers are not NVML's: CUDA_VISIBLE_DEVICES.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            self._last = self._read()
        except self._nvml.NVMLError as error:
            raise ResourceError(
                f"NVML does not give the energy of {uuid}: {error}. It takes a Volta GPU or newer, "
                "and a whole one (no MIG slice). Remedy: energy='off', or 'rapl' for the processor"
            ) from error
        self.mode = f"measured (NVML, whole GPU {uuid})"

    def _read(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def start(self) -> None:
        self._last = self._read()

    def stop(self) -> float:
        now = self._read()
        if now < self._last:
            raise ResourceError(
                "NVML's energy counter went back: the driver was loaded anew while a step ran. "
                "Remedy: restore the meter from its log and repeat the step"
            )
        return (now - self._last) / 1e3


# -- other packages -------------------------------------------------------------------------


class Zeus:
    """GPU, processor and memory as ``zeus.monitor.ZeusMonitor`` finds them.

    Older GPUs have no counter; zeus then adds up samples of their power, which is called an
    estimate here. Its figure for systems on a chip is left out.

    Raises:
        MissingExtraError: without the package.
        ResourceError: if zeus finds nothing to measure.
    """

    _WINDOW = "fastgrad.meter"

    def __init__(self, device: torch.device) -> None:
        module = _package("zeus.monitor", "zeus", "zeus")
        gpus = []
        if device.type == "cuda":
            gpus = [torch.cuda.current_device() if device.index is None else device.index]
        self._monitor = module.ZeusMonitor(gpu_indices=gpus)
        parts = [f"GPU {i}" for i in self._monitor.gpu_indices]
        parts += [f"processor {i} and its memory" for i in self._monitor.cpu_indices]
        if not parts:
            raise ResourceError(
                "zeus finds neither a GPU nor a processor counter that it may read here. Remedy: "
                "energy='off', or 'codecarbon' for an estimate"
            )
        sampled = getattr(self._monitor, "power_monitor", None) is not None
        kind = "estimated (zeus, from samples of power: " if sampled else "measured (zeus: "
        self.mode = f"{kind}{', '.join(parts)})"

    def start(self) -> None:
        self._monitor.begin_window(self._WINDOW, restart=True)

    def stop(self) -> float:
        found = self._monitor.end_window(self._WINDOW)
        parts = (found.gpu_energy, found.cpu_energy, found.dram_energy)
        return float(sum(sum(part.values()) for part in parts if part))


class CodeCarbon:
    """Energy as codecarbon's offline tracker has it: no network, no file.

    Raises:
        MissingExtraError: without the package.
    """

    mode = (
        "estimated (codecarbon, whole machine: the memory's power is modelled, and the "
        "processor's where its counters cannot be read)"
    )

    def __init__(self) -> None:
        module = _package("codecarbon", "codecarbon", "codecarbon")
        # The country only weighs the emissions, which are not read.
        self._tracker = module.OfflineEmissionsTracker(
            country_iso_code="USA", save_to_file=False, log_level="error", allow_multiple_runs=True
        )

    def start(self) -> None:
        self._tracker.start_task("fastgrad.meter")

    def stop(self) -> float:
        found = self._tracker.stop_task()
        getattr(self._tracker, "_tasks", {}).clear()  # it keeps a record of each one for ever
        if found is None:
            raise ResourceError(
                "codecarbon did not track the step (another tracker of this machine may hold its "
                "lock). Remedy: end the other tracker, or energy='off'"
            )
        return float(found.energy_consumed) * JOULES_PER_KWH


def _package(module: str, package: str, extra: str) -> Any:
    try:
        return sys.modules.get(module) or importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise ResourceError(
                f"the package {package!r} is installed and lacks one that it needs: {error}. "
                f"Remedy: pip install 'fastgrad[{extra}]'"
            ) from error
        raise MissingExtraError(package, extra) from error
