"""The meter in a Trainer: what it logs, when it stops, and what a resumed run adds to."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainerControl, TrainerState

from fastgrad.errors import FastgradError, ResourceError
from fastgrad.integrations.transformers import MeterCallback, sparse_adamw
from fastgrad.meter import Meter
from fastgrad.meter_processes import over_processes
from tests.meters import Clock, plain
from tests.models import llama, randomised
from tests.processes import launch
from tests.training_runs import STEPS, Rows, arguments_of, logged, trainer


class Ticks(TrainerCallback):
    """One second for each optimizer step, a minute for what is around it."""

    def __init__(self, clock):
        self.clock = clock

    def on_step_begin(self, *args, **kwargs):
        self.clock.now += 60

    def on_optimizer_step(self, *args, **kwargs):
        self.clock.now += 1


class Losses(TrainerCallback):
    """Evaluation losses as they are given; listed before the meter, whose on_evaluate follows."""

    def __init__(self, losses, key="eval_loss"):
        self.losses, self.key = dict(losses), key

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics[self.key] = self.losses[state.global_step]


def metered(folder, losses, *, clock=None, meter=None, metric="loss", model=None, **arguments):
    """A run that evaluates every second step, with these losses."""
    clock = clock or Clock()
    meter = meter or plain(clock=clock, cpu_clock=clock, window=1, eta=0.5, patience=2)
    callback = MeterCallback(meter, metric=metric)
    others = [Losses(losses), Ticks(clock)]
    options = {"eval_strategy": "steps", "eval_steps": 2} | arguments
    return trainer(model or randomised(llama), folder, [*others, callback], **options), callback


SLOWING = {0: 9.0, 2: 5.0, 4: 2.0, 6: 1.5, 8: 1.2, 10: 1.1}  # gains per step: 1.5, .25, .15, .05


def test_training_stops_when_it_buys_too_little(tmp_path):
    run, callback = metered(tmp_path, SLOWING)
    run.evaluate()
    run.train()
    meter = callback.meter
    assert [c.step for c in meter.checks] == [0, 2, 4, 6, 8]
    assert [c.psi for c in meter.checks] == [-9.0, -5.0, -2.0, -1.5, -1.2]
    gains = [c.gain_per["seconds"] for c in meter.checks]
    assert gains == pytest.approx([None, 2, 1.5, 0.25, 0.15])
    assert run.state.global_step == 8 < STEPS
    assert meter.spent["seconds"] == 8.0  # a minute around each step is not in it
    assert logged(run, "meter/stop") == [1.0]
    # The Trainer begins a new history when it trains; the first evaluation was before.
    assert logged(run, "meter/psi") == [c.psi for c in meter.checks[1:]]
    assert logged(run, "meter/gain_per/seconds") == pytest.approx([2, 1.5, 0.25, 0.15])
    assert logged(run, "meter/spent/seconds") == [2, 4, 6, 8]
    entries = [e for e in run.state.log_history if "meter/psi" in e]
    assert all(isinstance(v, float) for e in entries for k, v in e.items() if "meter/" in k)


def test_without_eta_training_goes_on_and_reports_reach_other_callbacks(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.extend(logs)

    clock = Clock()
    meter = plain(clock=clock, cpu_clock=clock)
    run, callback = metered(tmp_path, SLOWING, clock=clock, meter=meter, max_steps=4)
    run.add_callback(Reporter())
    run.train()
    assert callback.meter.steps == 4
    assert {"meter/psi", "meter/spent/traffic_bytes", "meter/gain_per/traffic_bytes"} <= set(seen)
    assert callback.meter.modes["traffic_bytes"].startswith("estimated")


@pytest.mark.parametrize(
    ("metric", "named", "better", "sign"),
    [("loss", None, None, -1), ("eval_loss", None, None, -1), (None, "loss", None, -1),
     ("quality", None, None, 1), ("loss", None, True, 1), (None, "quality", None, 1),
     ("quality", "loss", None, 1), ("quality", None, False, -1)],
)  # fmt: skip
def test_which_way_is_better(tmp_path, metric, named, better, sign):
    args = arguments_of(tmp_path, eval_strategy="steps", metric_for_best_model=named)
    callback = MeterCallback(plain(), metric=metric, greater_is_better=better)
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control)
    for loss in (3.0, 2.0):
        metrics = {"eval_loss": loss, "eval_quality": loss}
        callback.on_evaluate(args, state, control, metrics=metrics)
    assert [c.psi for c in callback.meter.checks] == [sign * 3.0, sign * 2.0]
    assert [e["meter/psi"] for e in state.log_history] == [sign * 3.0, sign * 2.0]


def eager():
    """Without the fused attention of a CPU, which PyTorch's counter has no formula for."""
    return llama(attn_implementation="eager")


def test_operations_are_those_of_the_step(tmp_path):
    meter = plain(flops="every")
    run, callback = metered(
        tmp_path, SLOWING, meter=meter, model=randomised(eager), max_steps=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    run.train()
    batch = {k: torch.stack([r[k] for r in [Rows()[i] for i in range(4)]]) for k in Rows()[0]}
    with FlopCounterMode(display=False) as counter:
        randomised(eager)(**batch).loss.backward()
    assert callback.meter.spent["flops"] == 2 * 2 * counter.get_total_flops()


def test_a_sparse_run_takes_fewer_operations_and_bytes(tmp_path):
    spent = {}
    for name, plug in {
        "full": None, "sparse": sparse_adamw(fraction=0.1, ranking="random", blocks="row")
    }.items():  # fmt: skip
        callback = MeterCallback(plain(flops="first"), metric="loss")
        run = trainer(randomised(llama), tmp_path / name, [callback], plug, max_steps=3)
        run.train()
        spent[name] = callback.meter.spent
    for resource in ("flops", "traffic_bytes"):
        assert spent["sparse"][resource] < 0.9 * spent["full"][resource]


def test_a_resumed_run_adds_to_what_its_checkpoint_had(tmp_path):
    log, clock = tmp_path / "m.json", Clock()

    def part(steps, resume=None):
        clock.now += 5000
        meter = plain(clock=clock, cpu_clock=clock, log=log, window=1)
        run, callback = metered(tmp_path / "run", SLOWING, clock=clock, meter=meter,
                                save_strategy="steps", save_steps=4)  # fmt: skip

        class Crash(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == steps:
                    raise KeyboardInterrupt

        if steps:
            run.add_callback(Crash())
            with pytest.raises(KeyboardInterrupt):
                run.train()
        else:
            run.train(resume_from_checkpoint=resume)
        return callback.meter

    first = part(7)
    assert first.steps == 7
    second = part(None, str(tmp_path / "run" / "checkpoint-4"))
    assert second.resumed
    assert (second.steps, second.spent["seconds"]) == (10, 10.0)
    assert [c.step for c in second.checks] == [2, 4, 6, 8, 10]
    assert second.sessions[0] == {"from_step": 0}
    assert second.sessions[1]["from_step"] == 4
    lost = second.sessions[1]["discarded"]  # known to the check at step 6
    assert (lost["steps"], lost["seconds"]) == (2, 2.0)
    assert second.checks[2].gain_per["seconds"] == pytest.approx(0.25)
    assert json.loads(log.read_text())["sessions"] == second.sessions
    assert second.modes["traffic_bytes"].startswith("estimated")
    assert second.spent["traffic_bytes"] > 0


def test_a_part_that_ran_without_the_meter_is_named(tmp_path):
    trainer(randomised(llama), tmp_path, max_steps=6, save_strategy="steps", save_steps=6).train()
    run, callback = metered(tmp_path, SLOWING, meter=plain())
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert callback.meter.steps == 4
    assert callback.meter.sessions == [{"from_step": 0, "unmetered_steps": 6}]


def test_a_training_that_raised_leaves_no_counter_and_a_second_one_begins_anew(tmp_path):
    class Crash(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            raise ZeroDivisionError

    current = torch.utils._python_dispatch._get_current_dispatch_mode
    run, callback = metered(tmp_path, SLOWING, meter=plain(flops="first"), max_steps=2)
    crash = Crash()
    run.add_callback(crash)
    with pytest.raises(ZeroDivisionError):
        run.train()
    run.remove_callback(crash)
    run.train()
    assert current() is None
    first = callback.meter
    assert first.steps == 2
    run.train()
    assert callback.meter is not first
    assert callback.meter.steps == first.steps == 2
    assert not callback.meter.resumed


def test_what_cannot_be_done_is_refused(tmp_path):
    run, _ = metered(tmp_path, SLOWING, metric=None)
    with pytest.raises(FastgradError, match="metric_for_best_model"):
        run.train()
    run, _ = metered(tmp_path, SLOWING, eval_strategy="no")
    with pytest.raises(FastgradError, match="eval_strategy"):
        run.train()
    run, _ = metered(tmp_path, SLOWING)
    run.args._n_gpu = 2
    args, state = run.args, run.state
    with pytest.raises(FastgradError, match=r"runs 2 in one.*torchrun"):
        MeterCallback(plain(), metric="loss").on_train_begin(args, state, run.control)
    run, _ = metered(tmp_path, SLOWING, metric="accuracy")
    with pytest.raises(FastgradError, match=r"no 'eval_accuracy'.*eval_loss"):
        run.train()


def test_the_meter_follows_the_trainer_to_its_device_unless_one_was_given(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    run, callback = metered(tmp_path, SLOWING, meter=Meter(energy="off", flops="off"))
    assert callback.meter.device == "cuda:0"
    callback.meter.check(-9.0)
    monkeypatch.undo()
    callback.on_train_begin(run.args, run.state, run.control)
    assert callback.meter.device == "cpu"
    assert [c.psi for c in callback.meter.checks] == [-9.0]
    given = MeterCallback(Meter(energy="off", flops="off", device="cuda:1"), metric="loss")
    with pytest.raises(ResourceError, match=r"lies on cpu.*cuda:1"):
        given.on_train_begin(run.args, run.state, run.control, run.model, object())


def test_a_metric_that_is_no_number_is_no_check(tmp_path):
    losses = SLOWING | {4: math.nan}
    run, callback = metered(tmp_path, losses, meter=plain(), max_steps=6)
    with pytest.warns(UserWarning, match="eval_loss is nan at step 4"):
        run.train()
    assert [c.step for c in callback.meter.checks] == [2, 6]
    run, callback = metered(tmp_path, losses)
    with pytest.warns(UserWarning, match="training stops"):
        run.train()
    assert run.state.global_step == 4


def test_one_of_several_evaluation_sets(tmp_path):
    run, callback = metered(tmp_path, SLOWING, meter=plain(), metric="valid_loss", max_steps=4)
    run.eval_dataset = {"train": Rows(n=4), "valid": Rows(n=5)}
    run.train()
    assert [-c.psi for c in callback.meter.checks] == logged(run, "eval_valid_loss")


@pytest.mark.slow
def test_processes_stop_together_and_add_up(tmp_path):
    launch("tests.meter_worker", tmp_path)
    first, second = (json.loads((tmp_path / f"result-{r}.json").read_text()) for r in (0, 1))
    assert first["stopped_at"] == second["stopped_at"] == 8
    assert first["would_stop"]
    assert not second["would_stop"]
    assert first["sessions"] == [{"from_step": 0, "process": 0, "processes": 2}]
    assert second["log"] == "None"
    for result in (first, second):
        assert result["processes"] == 2
        assert result["together"]["seconds"] == first["together"]["seconds"] == 8.0
        assert result["together"]["flops"] == first["spent"]["flops"] + second["spent"]["flops"]
        assert "once for each" in result["left_out"]["cpu_seconds"]
        assert "[8, 9] steps" in result["refused"]
    assert json.loads((tmp_path / "m.json").read_text())["steps"] == 8


def test_without_processes_there_is_nothing_to_add_up():
    with pytest.raises(ResourceError, match="not running"):
        over_processes(plain())
