"""Re-selection by steps and by staleness, resumed exactly."""

from __future__ import annotations

import pytest
import torch

import fastgrad as fg
from fastgrad.errors import PartialError, SelectionError
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import selection_of
from tests.test_partial_resume import assert_same, everything, grouped


def measured(model, seeds=range(100, 108)):
    with fg.Probe(model, blocks="row", per_example=False, hash_weights=False) as probe:
        for seed in seeds:
            model(**batch_of(n=4, seed=seed)).loss.backward()
    return probe.stats()


def chosen(model, stats):
    return fg.select(stats, model=model, fraction=0.3)


def group_of(name, weight):
    return 0 if weight.ndim >= 2 else 1


class Run:
    """A training run with re-selection, which can be saved and built again."""

    def __init__(self, every=3, saved=None, stale=False, choose=chosen, measure=measured):
        self.model = MODELS["llama"]() if saved else randomised(MODELS["llama"])
        if saved:
            rest = torch.load(saved / "rest.pt", weights_only=True)
            self.model.load_state_dict(rest["model"])
            reference = measured(self.model, range(4)) if stale else None  # replaced below
            self.partial = fg.load_partial(self.model, saved / "p.safetensors")
        else:
            first = measured(self.model)
            self.partial = fg.make_partial(self.model, chosen(self.model, first))
            reference = first if stale else None
        self.optimizer = fg.SparseAdamW(grouped(self.partial), lr=1e-2)
        self.again = fg.Reselection(
            self.partial, self.optimizer, choose, every=every, measure=measure,
            reference=reference, group_of=group_of,
        )  # fmt: skip
        self.reports = []
        if saved:
            self.optimizer.load_state_dict(rest["optimizer"])
            self.again.load_state_dict(rest["again"])

    def train(self, steps):
        for step in steps:
            self.model(**batch_of(seed=step)).loss.backward()
            self.optimizer.step()
            self.reports.append(self.again.step())
            self.optimizer.zero_grad()
        return self

    def save(self, folder):
        self.partial.save(folder / "p.safetensors")
        rest = {"model": self.model, "optimizer": self.optimizer, "again": self.again}
        torch.save({k: v.state_dict() for k, v in rest.items()}, folder / "rest.pt")


def test_by_steps_it_measures_and_selects_anew():
    run = Run().train(range(8))
    looked = [r is not None for r in run.reports]
    assert looked == [False, False, True] * 2 + [False, False]
    assert (run.again.steps, run.again.looks, run.again.done) == (8, 2, 2)
    report = run.reports[2]
    assert report.kept > 0
    assert report.added > 0
    assert report.dropped > 0
    assert run.again.verdict is None
    # the same by hand
    other = Run(every=10**6)
    for step in range(8):
        other.train([step])
        if step in (2, 5):
            with other.partial.suspended() as model:
                selection = chosen(model, measured(model))
            other.partial.reselect(selection, other.optimizer, group_of=group_of)
    assert_same(everything(run.partial, run.optimizer), everything(other.partial, other.optimizer))


@pytest.mark.parametrize("stale", [False, True])
def test_it_is_resumed_exactly(tmp_path, stale):
    straight = Run(stale=stale).train(range(8))
    first = Run(stale=stale).train(range(4))
    first.save(tmp_path)
    resumed = Run(saved=tmp_path, stale=stale).train(range(4, 8))
    assert [r and r.summary() for r in resumed.reports] == [
        r and r.summary() for r in straight.reports[4:]
    ]
    assert (resumed.again.steps, resumed.again.looks, resumed.again.done) == (
        straight.again.steps, straight.again.looks, straight.again.done
    )  # fmt: skip
    if stale:
        assert resumed.again.verdict == straight.again.verdict
    assert_same(
        everything(resumed.partial, resumed.optimizer),
        everything(straight.partial, straight.optimizer),
    )


def test_by_staleness_it_selects_anew_only_after_a_drift():
    scale = {"on": False}

    def measure(model):
        if not scale["on"]:
            return measured(model)
        # gradients lie elsewhere now: the model is looked at with other weights
        kept = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.mul_((0.05, 3.0, 1.0, 0.3)[i % 4])
        stats = measured(model)
        model.load_state_dict(kept, strict=False)
        return stats

    run = Run(every=1, stale=True, measure=measure)
    with torch.no_grad():
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-6  # nothing drifts by itself
    before, reference = run.partial.selection, run.again._reference
    run.train([0])
    assert run.again.verdict.verdict == "fresh"
    assert (run.reports, run.again.done, run.again.looks) == ([None], 0, 1)
    assert run.partial.selection is before
    scale["on"] = True
    run.train([1])
    assert run.again.verdict.verdict == "drifted"
    assert run.again.done == 1
    assert run.reports[1].added > 0
    assert run.again._reference is not reference
    run.train([2])  # compared with the measurement that the new selection was made from
    assert run.again.verdict.verdict == "fresh"
    assert run.again.done == 1


def test_random_numbers_of_measuring_do_not_reach_training():
    def measure(model):
        torch.randn(5)
        return measured(model)

    torch.manual_seed(7)
    want = torch.randn(3)
    run = Run(every=1, measure=measure)
    torch.manual_seed(7)
    run.train([0])
    assert torch.equal(torch.randn(3), want)


def test_what_choose_raises_leaves_the_run_as_it_was():
    def choose(model, stats):
        raise KeyError("mine")

    run = Run(every=2, choose=choose)
    packed = [id(b) for b in run.partial.packed]
    run.train([0])
    with pytest.raises(KeyError, match="mine"):
        run.train([1])
    assert (run.again.steps, run.again.looks) == (1, 0)
    assert [id(b) for b in run.partial.packed] == packed
    run.again.choose = lambda model, stats: selection_of(model, "row")
    assert run.again.step() is not None


def test_refusals():
    run = Run()
    make = lambda **more: fg.Reselection(  # noqa: E731
        run.partial, run.optimizer, chosen, **{"every": 2} | more
    )
    for more, word in (
        ({"every": 0}, "every is 0"),
        ({"every": 2.5}, "every is 2.5"),
        ({"reference": measured(randomised(MODELS["llama"]))}, "measure="),
        ({"reference": "blueprint", "measure": measured}, "not str"),
    ):
        with pytest.raises(PartialError, match=word):
            make(**more)
    state = make(measure=measured).state_dict()
    for wrong, word in (
        ({}, "not the state"),
        (state | {"every": 3}, "every=3"),
        (state | {"reference": "{}"}, "not the state"),
        (state | {"steps": None}, "not the state"),
    ):
        with pytest.raises(PartialError, match=word):
            make(measure=measured).load_state_dict(wrong)
    other = randomised(MODELS["gpt2"])
    reference = measured(run.partial.remove())
    partial = fg.make_partial(run.model, chosen(run.model, reference))
    again = fg.Reselection(
        partial, fg.SparseAdamW(partial.parameters()), chosen, every=1,
        measure=lambda model: measured(other), reference=reference,
    )  # fmt: skip
    with pytest.raises(SelectionError, match="another model"):
        again.step()


def test_a_look_that_is_due_at_a_step_that_a_grad_scaler_skipped_comes_later(tmp_path):
    """With an optimizer whose step the scaler leaves out."""

    def begin():
        model = randomised(MODELS["llama"])
        shapes = selection_of(model, "row", 0.3)
        partial = fg.make_partial(model, shapes)
        optimizer = torch.optim.SGD(partial.parameters(), lr=1e-2)
        again = fg.Reselection(
            partial, optimizer, lambda plain, stats: selection_of(plain, "row", 0.3, seed=1),
            every=2,
        )  # fmt: skip
        return partial, optimizer, again, torch.amp.GradScaler("cpu", init_scale=4.0)

    def train(partial, optimizer, again, scaler, steps):
        found = []
        for step in steps:
            scaler.scale(partial.model(**batch_of(seed=step)).loss).backward()
            if step in (1, 2):  # the look of the second step is due, and of the third
                next(partial.parameters()).grad.view(-1)[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            found.append(again.step() is not None)
            optimizer.zero_grad()
        return found

    run = begin()
    assert train(*run, range(5)) == [False, False, False, True, False]
    assert (run[2].steps, run[2].looks, run[2].late) == (5, 1, False)
    run = begin()
    train(*run, range(2))
    state = run[2].state_dict()
    other = begin()
    other[2].load_state_dict(state)
    assert other[2].late
    assert train(*other, range(3, 4)) == [True]


def test_finite_gradients_that_no_step_has_used_are_still_refused():
    model = randomised(MODELS["llama"])
    partial = fg.make_partial(model, selection_of(model, "row", 0.3))
    optimizer = torch.optim.SGD(partial.parameters(), lr=1e-2)
    again = fg.Reselection(
        partial, optimizer, lambda plain, stats: selection_of(plain, "row", 0.3, seed=1), every=1
    )
    model(**batch_of()).loss.backward()
    with pytest.raises(PartialError, match="no optimizer has made a step with"):
        again.step()
    assert again.steps == 0
