"""How much is measured where that is a share of what the run evaluates."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

import fastgrad as fg
from fastgrad.blueprint_schedule import Schedule
from fastgrad.errors import FastgradError
from fastgrad.evaluation_budget import COST, EvaluationBudget
from fastgrad.held_out import HeldOut
from fastgrad.integrations.trainer_evaluations import evaluated_in_all
from fastgrad.integrations.transformers import BlueprintCallback
from tests.models import llama, randomised
from tests.training_runs import HELD_OUT, Rows, state, trainer

VALIDATION = [{k: v[None] for k, v in row.items()} for row in Rows(n=20)]  # of one row each
THREE = int(3 * COST / 0.02)  # examples that pay for one in each of three measurements, at 2 %


def with_dropout():
    return randomised(lambda: llama(tied=True, attention_dropout=0.2))


def log_of(batches=VALIDATION, **options):
    options = {"total_steps": 10, "evaluation_share": 0.02} | options
    return fg.BlueprintLog(randomised(llama), batches, **options)


# -- how many ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "total"),
    [(Schedule.of(None, (), None), 10), (Schedule.of((0.01, 0.04, 0.99), (), None), 10),
     (Schedule.of((0.5,), (5, 6, 7, 99), None), 10), (Schedule.of((0.5, 0.3), (4, 5), 3), 12),
     (Schedule.of(None, (), 1), 7), (Schedule.of(None, (), 20), 10), (Schedule.of(None, (), 3), 1)],
)  # fmt: skip
def test_measurements_are_counted_as_they_are_made(schedule, total):
    made = sum(schedule.label(step, total) is not None for step in range(1, total + 5))
    assert schedule.count(total) == made + 1  # the end


def test_what_needs_the_length_of_the_run_to_be_counted_says_so():
    assert Schedule.of((1.0,), (), None).count(None) == 1
    assert Schedule.of(None, (3, 50), None).count(None) == 3
    with pytest.raises(FastgradError, match=r"every 5 steps needs its length.*Remedy"):
        Schedule.of(None, (), 5).count(None)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_as_many_batches_as_fit_and_no_more(rows, n):
    batches = [torch.zeros(rows, 2) for _ in range(40)]
    budget = EvaluationBudget(0.02, THREE * rows * n, 3)
    chosen = HeldOut(batches, at_most=budget.examples).chosen()
    assert len(chosen) == len(set(chosen)) == n
    assert budget.share_of(n * rows) == pytest.approx(0.02)
    less = EvaluationBudget(0.02, THREE * rows * n - 1, 3)
    assert len(HeldOut(batches, at_most=less.examples).chosen()) == max(n - 1, 1)
    more = EvaluationBudget(1.0, 10**15, 3)
    assert HeldOut(batches, at_most=more.examples).chosen() == list(range(40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        budget.warn(n, rows)
    with pytest.warns(UserWarning, match="evaluation_share"):
        less.warn(n, rows)


# -- a loop of one's own -----------------------------------------------------------------


def test_a_loop_measures_its_share_the_same_every_time():
    def run(stop=None):
        log = log_of(evaluated_examples=4 * THREE + 5)
        for step in range(10):
            if step == stop:
                state = json.loads(json.dumps(log.state_dict()))
                log = log_of(evaluated_examples=4 * THREE + 5)
                log.load_state_dict(state)
            log.step()
        log.blueprint()
        return log

    log = run()
    assert [(m.n_batches, m.n_examples) for m in log.measurements] == [(4, 4)] * 3
    assert log.evaluation_share == pytest.approx(0.02, rel=0.01)
    assert log.evaluation_share <= 0.02
    # The weights never change here: were it other batches, it would be other norms.
    assert len({tuple(m.grad_norm.values()) for m in log.measurements}) == 1
    assert run(stop=6).measurements == log.measurements
    by_hand, _ = fg.integrations.transformers.measure(
        log.model, [VALIDATION[i] for i in (2, 7, 12, 17)]
    )
    assert list(log.measurements[0].grad_norm.values()) == by_hand.grad_norm.tolist()


def test_the_least_is_one_batch_and_what_that_costs_is_said():
    with pytest.warns(UserWarning, match=r"room for 0\.5 in each of 3.*one batch of 3.*0\.12 of"):
        log = log_of(HELD_OUT, evaluated_examples=THREE // 2)
    assert log.evaluation_share == pytest.approx(3 * 0.04)
    assert log.step() is None
    assert log.blueprint().n_batches == 1


def test_nobody_asks_nobody_is_told():
    assert fg.BlueprintLog(randomised(llama), HELD_OUT, 10).evaluation_share is None


@pytest.mark.parametrize(
    "options",
    [{"evaluated_examples": 10 * THREE}, {"evaluation_share": None, "examples": 4}],
    ids=["share", "n"],
)
def test_reading_batches_to_count_draws_no_random_number(options):
    """A DataLoader draws a seed whenever it is read."""
    for data, n in ((Rows(n=20), 10), (Endless(20), 10)):
        model, loader = randomised(llama), DataLoader(data, batch_size=2)
        before = torch.get_rng_state()
        log = fg.BlueprintLog(model, loader, 10, **({"evaluation_share": 0.02} | options))
        for _ in range(5):
            log.step()
        assert torch.equal(torch.get_rng_state(), before)
        assert log.measurements[0].n_examples == options.get("examples", n)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"is not known.*Remedy: evaluated_examples="),
        ({"evaluated_examples": 0}, r"evaluates nothing.*Remedy"),
        ({"evaluated_examples": 2.5}, r"evaluated_examples must be a whole number"),
        ({"evaluated_examples": -1}, r"evaluated_examples must be a whole number"),
        ({"evaluated_examples": 9, "evaluation_share": 0}, r"evaluation_share must be in"),
        ({"evaluated_examples": 9, "evaluation_share": 1.5}, r"evaluation_share must be in"),
        ({"evaluated_examples": 9, "evaluation_share": None}, r"Remedy: evaluation_share="),
        ({"evaluated_examples": 9, "examples": 3}, r"examples and evaluation_share.*give one"),
        ({"evaluated_examples": 9, "share": 0.5}, r"share and evaluation_share.*give one"),
        ({"evaluated_examples": 9, "total_steps": None, "every": 2}, r"total_steps="),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options, message):
    with pytest.raises(FastgradError, match=message):
        log_of(**options)


def test_examples_that_cannot_be_counted_are_refused():
    with pytest.raises(FastgradError, match=r"holds no tensor.*Remedy: share="):
        log_of([{"text": "words"}], evaluated_examples=9)


# -- in a Trainer ------------------------------------------------------------------------


class Endless(IterableDataset):
    """Rows without a length."""

    def __init__(self, n):
        self.rows = Rows(n=n)

    def __iter__(self):
        return iter(self.rows[i] for i in range(len(self.rows.rows)))


class Counts(TrainerCallback):
    """What was planned, and what was evaluated."""

    run, planned, seen = None, None, 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.planned = evaluated_in_all(self.run, state, train_dataloader)

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen += 1


STEPS = {"max_steps": 7, "eval_strategy": "steps"}
EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"}  # of 6 batches each
ARGUMENTS = [
    STEPS | {"eval_steps": 2},
    STEPS | {"eval_steps": 7},
    STEPS | {"eval_steps": 9},
    STEPS | {"eval_steps": 0.3},
    STEPS | {"eval_steps": 2, "eval_on_start": True, "eval_delay": 4},
    STEPS | {"logging_steps": 3},
    {"max_steps": 3, "eval_on_start": True},
    EPOCHS,
    EPOCHS | {"num_train_epochs": 1.5, "gradient_accumulation_steps": 4},
    EPOCHS | {"eval_delay": 2},
    EPOCHS | {"max_steps": 8, "eval_delay": 1.3},
    EPOCHS | {"max_steps": 8, "eval_delay": 1.4, "eval_on_start": True},
]


@pytest.mark.parametrize("sets", [{"prose": 4, "code": 3}, 4], ids=["two", "one"])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_planned_evaluations_are_those_that_are_made(tmp_path, arguments, sets):
    counts = Counts()
    counts.run = made = trainer(randomised(llama), tmp_path, [counts], **arguments)
    if isinstance(sets, dict):
        made.eval_dataset = {name: Rows(n=n) for name, n in sets.items()}
    made.train()
    assert counts.seen > 0
    assert counts.planned == (counts.seen * 4 if sets == 4 else counts.seen // 2 * 7)


def test_examples_that_are_dropped_are_not_evaluated(tmp_path):
    arguments = STEPS | {"eval_steps": 3, "per_device_eval_batch_size": 3}
    run = trainer(randomised(llama), tmp_path, dataloader_drop_last=True, **arguments)
    run.state.max_steps, run.state.eval_steps = 7, 3
    assert evaluated_in_all(run, run.state, None) == 3 * 3
    assert run.evaluate()["eval_samples_per_second"] > 0
    assert len(run.get_eval_dataloader()) == 1


def test_a_run_measures_its_share_unnoticed_and_the_same_when_it_is_resumed(tmp_path):
    """10 evaluations of 4 examples, 3 measurements: 0.95 pays for 3 examples in each."""
    arguments = {"eval_strategy": "steps", "eval_steps": 1}

    def run(folder, resume=None, **more):
        callback = BlueprintCallback(DataLoader(Rows(n=20), batch_size=1), evaluation_share=0.95)
        made = trainer(with_dropout(), tmp_path / folder, [callback], **arguments, **more)
        made.train(resume_from_checkpoint=resume)
        return callback, made

    callback, watched = run("watched", save_strategy="steps", save_steps=6)
    assert [(m.step, m.n_examples) for m in callback.measurements] == [(5, 3), (8, 3), (10, 3)]
    assert callback.log.evaluation_share == pytest.approx(3 * 3 * COST / 40)
    plain = trainer(with_dropout(), tmp_path / "plain", **arguments)
    plain.train()
    after = state(watched.model)
    for name, value in state(plain.model).items():
        assert torch.equal(value, after[name]), name
    again, _ = run("again", str(tmp_path / "watched" / "checkpoint-6"))
    assert again.measurements == callback.measurements
    assert again.log.evaluation_share == callback.log.evaluation_share


def test_a_run_that_evaluates_nothing_or_cannot_be_counted_is_refused_before_training(tmp_path):
    def run(dataset=None, callback=None, **arguments):
        callback = callback or BlueprintCallback(HELD_OUT, evaluation_share=0.02)
        made = trainer(randomised(llama), tmp_path, [callback], **arguments)
        if dataset is not None:
            made.eval_dataset = dataset
        made.train()
        return callback

    with pytest.raises(FastgradError, match=r"eval_strategy='no'.*Remedy: eval_strategy='steps'"):
        run()
    with pytest.raises(FastgradError, match=r"eval_strategy='steps', eval_delay=20"):
        run(**STEPS, eval_delay=20)
    with pytest.raises(FastgradError, match=r"without a length \(code\).*Remedy: evaluated_exam"):
        run({"prose": Rows(n=4), "code": Endless(4)}, **STEPS)
    with pytest.raises(FastgradError, match=r"the Trainer that runs is not known"):
        evaluated_in_all(None, None, None)
    made = trainer(randomised(llama), tmp_path, eval_strategy="epoch")
    made.state.max_steps = 5
    with pytest.raises(FastgradError, match=r"epochs of training data without a length"):
        evaluated_in_all(made, made.state, DataLoader(Endless(4)))
    # How much it is may be said instead, for evaluations that the Trainer does not make.
    told = BlueprintCallback(HELD_OUT, evaluation_share=0.02, evaluated_examples=6 * THREE)
    assert run(callback=told).measurements[-1].n_examples == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [({"evaluation_share": 0.02, "examples": 3}, "give one"),
     ({"evaluation_share": 2.0}, "must be in"), ({"evaluated_examples": 3}, "Remedy")],
)  # fmt: skip
def test_the_callback_refuses_what_makes_no_sense_at_once(options, message):
    with pytest.raises(FastgradError, match=message):
        BlueprintCallback(HELD_OUT, **options)
