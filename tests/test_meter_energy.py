"""Where joules come from: a made-up powercap folder, and stand-ins for the packages."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from fastgrad import meter_energy
from fastgrad.errors import MissingExtraError, ResourceError
from fastgrad.meter import Meter
from tests.meters import Clock, plain

RANGE = 262_143_328_850  # microjoules, of a real package


class Powercap:
    """A folder as Linux has it, with counters that tests turn."""

    def __init__(self, root):
        self.root = root

    def zone(self, folder, name, value=0, most=RANGE):
        path = self.root / folder
        path.mkdir(parents=True)
        (path / "name").write_text(name + "\n")
        (path / "energy_uj").write_text(f"{value}\n")
        if most is not None:
            (path / "max_energy_range_uj").write_text(f"{most}\n")
        return path / "energy_uj"


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    monkeypatch.setattr(meter_energy, "RAPL", tmp_path)
    return Powercap(tmp_path)


def turn(file, joules):
    """Let a counter go on, around its end if need be."""
    file.write_text(str((int(file.read_text()) + round(joules * 1e6)) % RANGE))


@pytest.fixture
def packages(monkeypatch):
    """Nothing installed, whatever is."""

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("pynvml", "zeus", "codecarbon"):
                raise ImportError(name, name=name)

    for name in [*sys.modules]:
        if name.split(".")[0] in ("pynvml", "zeus", "codecarbon"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
    return monkeypatch


# -- RAPL --------------------------------------------------------------------------------


def test_packages_and_their_memory_count_and_what_overlaps_does_not(powercap):
    counters = {
        folder: powercap.zone(folder, name)
        for folder, name in {
            "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram",
            "intel-rapl:1": "package-1", "intel-rapl:1:0": "dram", "intel-rapl:2": "psys",
            "intel-rapl-mmio:0": "package-0",
        }.items()
    }  # fmt: skip
    meter = plain(energy="auto")
    assert meter.modes["joules"].startswith("measured (RAPL, whole machine: package-0, package-1,")
    turn(counters["intel-rapl:0"], 1000)  # before the step
    with meter.step():
        for number, counter in enumerate(counters.values()):
            turn(counter, 10**number)
    turn(counters["intel-rapl:0"], 1000)
    assert meter.spent["joules"] == pytest.approx(1 + 100 + 1000 + 10_000)


def test_memory_below_its_package_is_counted_once(powercap):
    package = powercap.zone("intel-rapl:0", "package-0")
    memory = powercap.zone("intel-rapl:0/intel-rapl:0:0", "dram")
    meter = plain(energy="rapl")
    with meter.step():
        turn(package, 3)
        turn(memory, 2)
    assert meter.spent["joules"] == 5.0


def test_a_counter_that_wraps_around_is_followed(powercap):
    counter = powercap.zone("intel-rapl:0", "package-0", value=RANGE - 5_000_000)
    meter = plain(energy="rapl")
    for joules in (3.0, 4.0, 5.0):
        with meter.step():
            turn(counter, joules)
    assert int(counter.read_text()) == 7_000_000
    assert meter.spent["joules"] == pytest.approx(12.0)


@pytest.mark.parametrize("missing", ["max_energy_range_uj", "energy_uj"])
def test_a_counter_that_cannot_be_read_whole_is_not_read(powercap, missing):
    counter = powercap.zone("intel-rapl:0", "package-0")
    (counter.parent / missing).unlink()
    meter = plain(energy="auto")
    assert "joules" not in meter.spent
    assert meter.modes["joules"] == "not measured (no readable RAPL counter)"
    with pytest.raises(ResourceError, match=r"intel-rapl:0 cannot be read.*Remedy"):
        plain(energy="rapl")


def test_a_machine_without_counters(powercap):
    assert plain(energy="auto").modes["joules"].startswith("not measured")
    with pytest.raises(ResourceError, match="no RAPL counter"):
        plain(energy="rapl")
    with pytest.raises(ResourceError, match="not measured"):
        plain(energy="auto", resource="joules", eta=1.0)
    with pytest.raises(ResourceError, match="unknown energy source 'sun'"):
        plain(energy="sun")
    assert plain(energy="off").modes["joules"] == "not measured"


# -- stand-ins ---------------------------------------------------------------------------


def test_packages_that_are_missing_are_named_with_their_extra(packages, powercap):
    for choice, extra in (("zeus", "zeus"), ("codecarbon", "codecarbon")):
        with pytest.raises(MissingExtraError, match=rf"fastgrad\[{extra}\]"):
            plain(energy=choice)
    with pytest.raises(ResourceError, match="cpu"):
        plain(energy="nvml")
    packages.setattr(torch.cuda, "get_device_properties", lambda d: Properties)
    with pytest.raises(MissingExtraError, match=r"nvidia-ml-py.*fastgrad\[energy\]"):
        meter_energy.Nvml(torch.device("cuda:0"))
    source, mode = meter_energy.energy_source("auto", torch.device("cuda:0"))
    assert source is None
    assert "nvidia-ml-py" in mode
    powercap.zone("intel-rapl:0", "package-0")
    source, mode = meter_energy.energy_source("auto", torch.device("cuda:0"))
    assert source is not None
    assert mode.startswith("measured (RAPL, whole machine: package-0; the GPU is not included: ")


def test_a_package_that_lacks_another_says_which(monkeypatch, tmp_path):
    (tmp_path / "codecarbon.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "codecarbon", raising=False)
    with pytest.raises(ResourceError, match=r"lacks one.*a_package_that_nobody_has"):
        plain(energy="codecarbon")


class Properties:
    uuid = "6f2c7f1e"


def nvml(monkeypatch, refuses=None):
    """The parts of pynvml that are used, and its counter."""
    module = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.millijoules, module.asked = 5000, []
    module.nvmlInit = lambda: None

    def handle(uuid):
        module.asked.append(uuid)
        return "handle"

    def total(given):
        assert given == "handle"
        if refuses:
            raise module.NVMLError(refuses)
        return module.millijoules

    module.nvmlDeviceGetHandleByUUID = handle
    module.nvmlDeviceGetTotalEnergyConsumption = total
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    return module


def test_nvml_reads_the_counter_of_this_gpu(monkeypatch, powercap):
    module = nvml(monkeypatch)
    package = powercap.zone("intel-rapl:0", "package-0")
    source, mode = meter_energy.energy_source("auto", torch.device("cuda:1"))
    assert mode == "measured (RAPL, whole machine: package-0; NVML, whole GPU GPU-6f2c7f1e)"
    assert module.asked == ["GPU-6f2c7f1e"]
    module.millijoules += 9000
    source.start()
    module.millijoules += 2500
    turn(package, 1)
    assert source.stop() == 3.5
    only, mode = meter_energy.energy_source("nvml", torch.device("cuda:1"))
    assert mode == "measured (NVML, whole GPU GPU-6f2c7f1e)"
    only.start()
    module.millijoules -= 1
    with pytest.raises(ResourceError, match="went back"):
        only.stop()


def test_a_gpu_without_a_counter_is_named(monkeypatch, powercap):
    nvml(monkeypatch, refuses="Not Supported")
    with pytest.raises(ResourceError, match=r"GPU-6f2c7f1e: Not Supported.*Remedy"):
        meter_energy.Nvml(torch.device("cuda:0"))
    source, mode = meter_energy.energy_source("auto", torch.device("cuda:0"))
    assert source is None
    assert "Not Supported" in mode


def zeus(monkeypatch, cpus=(0,), sampled=False):
    class ZeusMonitor:
        def __init__(self, gpu_indices=None):
            self.windows = []
            self.gpu_indices, self.cpu_indices = gpu_indices, list(cpus)
            self.power_monitor = object() if sampled else None

        def begin_window(self, key, sync_execution=True, restart=False):
            assert restart or key not in self.windows
            self.windows.append(key)

        def end_window(self, key):
            self.windows.remove(key)
            found = types.SimpleNamespace(time=1.0, soc_energy=None)
            found.gpu_energy = {i: 10.0 for i in self.gpu_indices}
            found.cpu_energy = {i: 3.0 for i in self.cpu_indices} or None
            found.dram_energy = None
            return found

    module = types.ModuleType("zeus.monitor")
    module.ZeusMonitor = ZeusMonitor
    monkeypatch.setitem(sys.modules, "zeus", types.ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)


def test_zeus_measures_and_its_samples_are_an_estimate(monkeypatch):
    zeus(monkeypatch)
    meter = plain(energy="zeus")
    assert meter.modes["joules"] == "measured (zeus: processor 0 and its memory)"
    for _ in range(2):
        with meter.step():
            pass
    assert meter.spent["joules"] == 6.0
    source = meter_energy.Zeus(torch.device("cuda:2"))
    assert source.mode == "measured (zeus: GPU 2, processor 0 and its memory)"
    source.start()
    assert source.stop() == 13.0
    zeus(monkeypatch, sampled=True)
    assert meter_energy.Zeus(torch.device("cuda:0")).mode.startswith("estimated (zeus, from sam")
    zeus(monkeypatch, cpus=())
    with pytest.raises(ResourceError, match="neither"):
        plain(energy="zeus")


def codecarbon(monkeypatch, busy=False):
    class OfflineEmissionsTracker:
        def __init__(self, **options):
            assert options["save_to_file"] is False
            self._tasks = {}

        def start_task(self, name):
            assert name not in self._tasks
            self._tasks[name] = True

        def stop_task(self):
            return None if busy else types.SimpleNamespace(energy_consumed=2e-6, ram_energy=1e-6)

    module = types.ModuleType("codecarbon")
    module.OfflineEmissionsTracker = OfflineEmissionsTracker
    monkeypatch.setitem(sys.modules, "codecarbon", module)


def test_codecarbon_is_an_estimate_and_never_chosen_unasked(monkeypatch, powercap):
    codecarbon(monkeypatch)
    assert plain(energy="auto").modes["joules"].startswith("not measured")
    meter = plain(energy="codecarbon")
    assert meter.modes["joules"].startswith("estimated (codecarbon")
    for _ in range(3):
        with meter.step():
            pass
    assert meter.spent["joules"] == pytest.approx(3 * 7.2)
    codecarbon(monkeypatch, busy=True)
    with pytest.raises(ResourceError, match="did not track"), plain(energy="codecarbon").step():
        pass


def test_measured_and_estimated_add_up_to_estimated(monkeypatch, powercap, tmp_path):
    counter, log = powercap.zone("intel-rapl:0", "package-0"), tmp_path / "m.json"
    clock = Clock()
    meter = plain(energy="rapl", clock=clock)
    with meter.step():
        turn(counter, 5)
    meter.save(log)
    codecarbon(monkeypatch)
    again = Meter.load(log, energy="codecarbon")
    with again.step():
        pass
    assert again.spent["joules"] == pytest.approx(12.2)
    mode = again.modes["joules"]
    assert mode.startswith("estimated (to step 1: measured (RAPL, whole machine: package-0); then:")
    again.save(log)
    third = Meter.load(log)  # the same way: no longer text
    assert third.modes["joules"] == mode
    back = Meter.load(log, energy="rapl")
    assert back.modes["joules"].startswith("estimated (to step 2: estimated (to step 1: measured")
