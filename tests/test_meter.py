"""The meter's arithmetic, its stopping rule, its memory figures and its file."""

from __future__ import annotations

import json
import math
import types

import pytest
import torch

import fastgrad as fg
from fastgrad.errors import ResourceError
from fastgrad.meter import Meter, peak_memory_bytes
from tests.meters import Clock, plain


def test_meter_ratio_and_stopping(tmp_path):
    meter = Meter(eta=0.5, resource="flops", patience=2, window=1)
    a = torch.randn(4, 4)
    for psi in (0.0, 256.0, 300.0, 310.0):
        with meter.step():
            a @ a
        meter.check(psi)
    flops = 2 * 4**3
    assert meter.spent["flops"] == 4 * flops
    ratios = [c.gain_per["flops"] for c in meter.checks]
    assert ratios == [None, 256 / flops, 44 / flops, 10 / flops]
    assert meter.should_stop
    meter.save(tmp_path / "m.json")
    again = Meter.load(tmp_path / "m.json")
    assert again.checks == meter.checks
    assert again.should_stop
    with meter.step():
        a @ a
    meter.check(1000.0)
    assert not meter.should_stop
    assert "not measured" in meter.modes["joules"] or "RAPL" in meter.modes["joules"]


def test_ratios_over_a_window_by_a_clock_that_is_given():
    clock, cpu = Clock(), Clock()
    meter = plain(window=3, clock=clock, cpu_clock=cpu)
    meter.check(-8.0)
    for psi, seconds in ((-4.0, 2.0), (-3.0, 2.0), (-2.5, 4.0), (-2.5, 1.0)):
        clock.now += 100.0  # outside of steps nothing is spent
        with meter.step():
            clock.now += seconds
            cpu.now += 2 * seconds
        meter.check(psi)
    per_second = [c.gain_per["seconds"] for c in meter.checks]
    assert per_second == [None, 4 / 2, 5 / 4, 5.5 / 8, 1.5 / 7]
    assert [c.gain_per["cpu_seconds"] for c in meter.checks][1:] == [r / 2 for r in per_second[1:]]
    assert meter.spent["seconds"] == 9.0
    assert meter.spent["cpu_seconds"] == 18.0


@pytest.mark.parametrize(("patience", "stops_at"), [(1, 2), (2, 5), (3, 6)])
def test_the_rule_wants_so_many_low_checks_in_a_row(patience, stops_at):
    clock = Clock()
    meter = plain(eta=1.0, patience=patience, window=1, clock=clock)
    stops = []
    for psi in (0.0, 2.0, 2.5, 4.5, 4.75, 4.5, 4.5):  # gains 2, .5, 2, .25, -.25, 0
        with meter.step():
            clock.now += 1
        meter.check(psi)
        stops.append(meter.should_stop)
    assert stops.index(True) == stops_at


def test_a_gain_of_exactly_eta_goes_on_and_nothing_spent_says_nothing():
    clock = Clock()
    meter = plain(eta=1.0, patience=1, window=1, clock=clock)
    meter.check(0.0)
    assert not meter.should_stop  # the first check has no ratio
    with meter.step():
        clock.now += 2
    meter.check(2.0)
    assert not meter.should_stop
    meter.check(-5.0)  # no step in between
    assert meter.checks[-1].gain_per["seconds"] is None
    assert meter.checks[-1].gain_per["peak_bytes"] is None
    assert not meter.should_stop


def test_meter_refuses_nonsense(tmp_path):
    for psi in (math.nan, math.inf, "1", True, None):
        with pytest.raises(ResourceError, match="finite"):
            Meter().check(psi)
    with pytest.raises(ResourceError, match="not measured"):
        Meter(resource="flops", flops="off")
    with pytest.raises(ResourceError, match="at least 1"):
        Meter(window=0)
    with pytest.raises(ResourceError, match="eta"):
        Meter(eta=math.nan)
    with pytest.raises(ResourceError, match="'carbon', which is unknown"):
        Meter(resource="carbon")
    with pytest.raises(ResourceError, match="flops"):
        Meter(flops="sometimes")
    (tmp_path / "m.json").write_text(json.dumps({"format": "x"}))
    with pytest.raises(ResourceError):
        Meter.load(tmp_path / "m.json")


def test_steps_within_steps_and_ends_without_beginnings_are_refused():
    meter = plain()
    with pytest.raises(ResourceError, match="no step"):
        meter.end_step()
    with meter.step(), pytest.raises(ResourceError, match="has begun"):
        meter.begin_step()
    assert meter.steps == 1


def test_a_step_that_raises_took_its_time_and_is_no_step():
    clock = Clock()
    meter = plain(flops="first", clock=clock)
    a = torch.randn(4, 4)

    def fails():
        a @ a
        clock.now += 3
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), meter.step():
        fails()
    assert (meter.steps, meter.spent["seconds"], meter.spent["flops"]) == (0, 3.0, 0.0)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    with meter.step():  # still the one that is counted
        a @ a
    assert meter.spent["flops"] == 128
    meter.begin_step()
    clock.now += 50
    meter.drop_step()
    meter.drop_step()
    assert (meter.steps, meter.spent["seconds"]) == (1, 3.0)


# -- memory ------------------------------------------------------------------------------


def test_the_peak_is_that_of_the_steps(tmp_path):
    meter = plain()
    if "inside step()" not in meter.modes["peak_bytes"]:
        pytest.skip("the peak of resident memory cannot be reset here")
    outside = torch.ones(64 << 20, dtype=torch.uint8)
    del outside
    with meter.step():
        pass
    small = meter.spent["peak_bytes"]
    with meter.step():
        inside = torch.ones(48 << 20, dtype=torch.uint8)
        del inside
    assert 44 << 20 < meter.spent["peak_bytes"] - small < 60 << 20
    with meter.step():
        pass
    assert meter.spent["peak_bytes"] - small > 44 << 20  # the highest, not the last
    assert peak_memory_bytes() > 0
    meter.check(1.0)
    with meter.step():
        pass
    assert meter.check(2.0).gain_per["peak_bytes"] == 1.0 / meter.spent["peak_bytes"]


def test_on_a_gpu_the_peak_is_that_of_its_allocator(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda d: said.append(f"wait {d}"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: said.append(f"reset {d}"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 7e9)
    meter = Meter(energy="off", flops="off")
    assert meter.device == "cuda:1"
    with meter.step():
        said.append("step")
    assert said == ["wait cuda:1", "reset cuda:1", "step", "wait cuda:1"]
    assert meter.spent["peak_bytes"] == 7e9
    assert "max_memory_allocated on cuda:1" in meter.modes["peak_bytes"]
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ResourceError, match=r"lies on cpu.*cuda:1.*Meter\(device='cpu'\)"):
        meter.watch(layer, torch.optim.SGD(layer.parameters()))


def test_of_a_model_on_several_devices_no_peak_is_known():
    class Spread(torch.nn.Module):
        def parameters(self, recurse=True):
            for device in ("cuda:0", "cuda:1"):
                yield types.SimpleNamespace(device=torch.device(device), is_meta=False)

    meter = plain(resource="peak_bytes", eta=1.0)
    meter.watch(Spread(), None)
    assert "peak_bytes" not in meter.spent
    assert meter.modes["peak_bytes"].endswith("not measured, as the model lies on cuda:0, cuda:1)")
    with pytest.raises(ResourceError, match="stopping rule"):
        meter.begin_step()


def test_traffic_is_the_formula_of_the_guide():
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 6, bias=False), torch.nn.Linear(6, 4, bias=False)
    )
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([model[0].weight], lr=0.1, momentum=0.9)
    meter = plain()
    meter.watch(model, optimizer)
    assert meter.modes["traffic_bytes"].startswith("estimated")
    for passes in (1, 3):
        with meter.step(passes):
            for _ in range(passes):
                model(torch.randn(2, 8)).sum().backward()
            optimizer.step()
    weights, trained = 4 * (48 + 24), 4 * 48
    expected = [p * (2 * weights + 2 * trained) + 2 * trained + 2 * trained for p in (1, 3)]
    assert meter.spent["traffic_bytes"] == sum(expected)


def test_traffic_of_a_partial_model_counts_packed_tensors_and_their_way_through():
    model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False)).to(torch.bfloat16)
    selection = fg.Selection({"0.weight": (6, 8)}, "row", {"0.weight": [1, 4]})
    partial = fg.make_partial(model, selection, master_dtype=torch.float32)
    optimizer = fg.SparseAdamW(partial.parameters())
    meter = plain(resource="traffic_bytes")
    meter.watch(model, optimizer)
    with meter.step():
        model(torch.randn(2, 8, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    weights, n = 2 * 48, 16
    state = 2 * 4 * n + sum(
        t.numel() * 4 for s in optimizer.state.values() for k, t in s.items() if k == "step"
    )
    assert meter.spent["traffic_bytes"] == (2 * weights + 2 * 4 * n + 2 * 4 * n + 2 * state + 2 * n)


def test_traffic_needs_a_model_from_the_first_step():
    meter = plain(resource="traffic_bytes")
    with pytest.raises(ResourceError, match="watch"):
        meter.begin_step()
    meter = plain()
    with meter.step():
        pass
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ResourceError, match="unwatched"):
        meter.watch(layer, torch.optim.SGD(layer.parameters()))
    assert "traffic_bytes" not in meter.spent
    assert meter.modes["traffic_bytes"].startswith("not measured")


# -- file --------------------------------------------------------------------------------


def test_a_log_survives_a_restart_and_says_so(tmp_path):
    log, clock = tmp_path / "m.json", Clock()

    def run(seconds, psi):
        meter = Meter.resume(log, energy="off", clock=clock, cpu_clock=clock, eta=1.0, patience=2)
        if not meter.steps:
            meter.check(0.0)
            assert not log.exists()  # nothing was spent yet
        for more in psi:
            with meter.step():
                clock.now += seconds
            meter.check(more)
        return meter

    first = run(2.0, [4.0, 8.0])
    assert not first.resumed
    clock.now = 5.0  # another process has another clock
    second = run(3.0, [8.5, 9.0])
    assert second.resumed
    assert second.sessions == [{"from_step": 0}, {"from_step": 2}]
    assert second.steps == 4
    assert second.spent["seconds"] == 10.0
    assert second.checks[:3] == first.checks
    assert second.checks[3].gain_per["seconds"] == (8.5 - 4.0) / 5.0  # across the restart
    assert second.checks[4].gain_per["seconds"] == (9.0 - 8.0) / 6.0
    assert second.should_stop
    assert not first.should_stop
    saved = json.loads(log.read_text())
    assert saved["sessions"] == second.sessions
    assert len(saved["checks"]) == 5


def test_another_runs_log_is_not_overwritten(tmp_path):
    log = tmp_path / "m.json"
    meter = Meter.resume(log, energy="off")
    with meter.step():
        pass
    meter.check(1.0)
    text = log.read_text()
    with pytest.raises(ResourceError, match=r"there already.*Meter.resume"):
        plain(log=log).begin_step()
    assert log.read_text() == text
    with pytest.raises(ResourceError, match="begun already"):
        meter.load_state_dict(json.loads(text))


def test_what_only_one_run_measured_is_no_total(tmp_path):
    first = plain(flops="every")
    with first.step():
        torch.ones(2, 2) @ torch.ones(2, 2)
    first.save(tmp_path / "m.json")
    second = Meter.load(tmp_path / "m.json", flops="off")
    assert "flops" not in second.spent
    assert second.modes["flops"].startswith("not measured throughout (to step 1: counted")
    with second.step():
        pass
    second.save(tmp_path / "m.json")
    third = Meter.load(tmp_path / "m.json", flops="every")  # a part is missing for ever
    assert "flops" not in third.spent
    assert third.modes["flops"] == second.modes["flops"]
    with pytest.raises(ResourceError, match="throughout"):
        Meter.load(tmp_path / "m.json", resource="flops", flops="every")

    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    third.watch(layer, optimizer)  # only now
    assert "traffic_bytes" not in third.spent
    watched = plain()
    watched.watch(layer, optimizer)
    with watched.step():
        pass
    watched.save(tmp_path / "w.json")
    for again in (True, False):
        resumed = Meter.load(tmp_path / "w.json")
        if again:
            resumed.watch(layer, optimizer)
        with resumed.step():
            pass
        assert ("traffic_bytes" in resumed.spent) == again
        if again:
            assert resumed.spent["traffic_bytes"] == 2 * watched.spent["traffic_bytes"]
            assert resumed.modes["traffic_bytes"] == watched.modes["traffic_bytes"]


FORMAT_1 = {
    "format": "fastgrad.meter/1", "resource": "flops", "eta": 0.5, "patience": 2, "window": 1,
    "flops": "first", "steps": 2, "spent": {"seconds": 0.5, "flops": 256.0},
    "modes": {"seconds": "measured (wall clock inside step())",
              "flops": "counted by torch.utils.flop_counter (first step, times the steps)",
              "joules": "not measured (no readable RAPL counter)"},
    "_flops_per_step": 128.0,
    "checks": [{"step": 1, "psi": 0.0, "spent": {"seconds": 0.25, "flops": 128.0},
                "gain_per": {"seconds": None, "flops": None}},
               {"step": 2, "psi": 1.0, "spent": {"seconds": 0.5, "flops": 256.0},
                "gain_per": {"seconds": 4.0, "flops": 1 / 128}}],
}  # fmt: skip


def test_logs_of_format_1_are_read(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(FORMAT_1))
    meter = Meter.load(path, energy="off", log=path)
    assert (meter.steps, meter.eta, meter.resource) == (2, 0.5, "flops")
    with meter.step():
        torch.ones(4, 4) @ torch.ones(4, 4)
    meter.check(2.0)
    assert meter.spent["flops"] == 384.0
    assert meter.modes["flops"].startswith("counted (to step 2: ")
    assert meter.modes["peak_bytes"].startswith("not measured throughout")
    assert meter.checks[-1].gain_per["flops"] == 1 / 128
    assert json.loads(path.read_text())["format"] == "fastgrad.meter/2"
    assert Meter.load(path, energy="off").checks == meter.checks


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"steps": 1}, "contradict"),
        ({"spent": {"seconds": math.nan, "flops": 1.0}}, "seconds is nan"),
        ({"spent": {"seconds": -1.0}}, "seconds is -1"),
        ({"spent": {"tea": 1.0}}, "modes"),
        ({"checks": [{"step": 1}]}, "KeyError 'psi'"),
        ({"checks": [{**FORMAT_1["checks"][0], "psi": "much"}]}, "psi is 'much'"),
        ({"checks": 3}, "TypeError"),
        ({"modes": None}, "TypeError"),
        ({"format": "fastgrad.meter/3"}, "version"),
        ({"sessions": []}, "contradict"),
    ],
)
def test_damaged_logs_are_named(tmp_path, harm, message):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({**FORMAT_1, **harm}))
    with pytest.raises(ResourceError, match=message) as error:
        Meter.load(path)
    assert "broken.json" in str(error.value)
    assert "Remedy" in str(error.value)


def test_files_that_are_no_log_are_named(tmp_path):
    path = tmp_path / "m.json"
    for text in ("", '{"format": "fastgrad.meter/2", "ste', "[]", "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ResourceError, match=r"m\.json"):
            Meter.load(path)
    with pytest.raises(ResourceError, match=r"none\.json"):
        Meter.load(tmp_path / "none.json")


def test_a_log_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    log = tmp_path / "m.json"
    meter = plain(log=log)
    with meter.step():
        pass
    meter.check(1.0)
    before = log.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        meter.check(2.0)
    monkeypatch.undo()
    assert log.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]
