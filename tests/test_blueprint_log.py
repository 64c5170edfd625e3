"""BlueprintLog in loops of one's own: what it measures, and that training does not notice."""

from __future__ import annotations

import contextlib
import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fastgrad as fg
from fastgrad.errors import FastgradError, NonFiniteGradientError, PartialError
from fastgrad.held_out import HeldOut
from fastgrad.integrations.transformers import measure
from tests.models import bert, llama, randomised
from tests.training_runs import HELD_OUT, Rows, state

ROWS = [{"input_ids": r["input_ids"][None], "labels": r["labels"][None]} for r in Rows(n=10)]


def with_dropout():
    return randomised(lambda: llama(tied=True, attention_dropout=0.2))


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def content(blueprint):
    document = json.loads(blueprint.to_json())
    del document["provenance"]["created"]
    return json.dumps(document)


def train(model, log=None, steps=10, around=contextlib.nullcontext, first=0):
    """``first`` steps are passed over, as a resumed loop does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for batch in ROWS[first:steps]:
        model(**batch).loss.backward()
        optimizer.step()
        if log is not None:
            with around():  # .grad is still there
                log.step()
        optimizer.zero_grad()
    return model


# -- no trace ----------------------------------------------------------------------------


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_a_loop_with_the_log_is_bit_for_bit_the_loop_without(around, tmp_path):
    torch.manual_seed(5)
    plain = state(train(with_dropout()))
    torch.manual_seed(5)
    model = with_dropout()
    with around():
        batches = [{k: v.clone() for k, v in b.items()} for b in HELD_OUT]
    log = fg.BlueprintLog(model, batches, total_steps=10)
    same(plain, state(train(model, log, around=around)))
    with around():
        path = log.save_pretrained(tmp_path)
    assert [(m.label, m.step) for m in log.measurements] == [("50%", 5), ("80%", 8), ("100%", 10)]
    expected, loss = measure(model, HELD_OUT)
    assert log.measurements[-1].loss == loss
    assert log.measurements[-1].stats.grad_norm.tolist() == expected.grad_norm.tolist()
    released = fg.Blueprint.from_pretrained(path.parent)
    assert released.weights_hash == fg.weights_hash(model)
    assert [c.step for c in released.file.checkpoints] == [5, 8, 10]
    assert all(p.requires_grad for p in model.parameters())


class Hostile(nn.Module):
    """Dropout, batch statistics, a counter that evaluation moves, and draws of three kinds."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", None)

    def forward(self, x):
        self.calls += 1
        self.cache = x.detach()[:1]
        noise = 1 + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002
        return self.two(self.drop(self.norm(self.one(x)))) * noise


def mean_square(model, batch):
    return model(batch).square().mean()


def test_optimizers_in_the_backward_pass_buffers_and_draws_notice_nothing():
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(4, 6, generator=generator) for _ in range(6)]

    def run(watched):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = Hostile()
        stepped = []

        def step(p):
            stepped.append(p)
            with torch.no_grad():
                p -= 0.1 * p.grad
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        log = None
        if watched:
            log = fg.BlueprintLog(model, data[4:], every=1, loss=mean_square, total_steps=4)
        model.train()
        model.norm.eval()
        for x in data[:4]:
            mean_square(model, x).backward()
            if log is not None:
                log.step()
        modes = [m.training for m in model.modules()]
        return {**model.state_dict()}, len(stepped), modes, random.random(), np.random.rand(), log  # noqa: NPY002

    plain, watched = run(False), run(True)
    same(plain[0], watched[0])
    assert plain[1:5] == watched[1:5]
    assert len(watched[5].measurements) == 3
    assert watched[5].blueprint().weights_hash == fg.weights_hash(watched[5].model)


def test_recurrent_layers_keep_lists_of_their_weights():
    torch.manual_seed(0)
    model = nn.LSTM(5, 7, batch_first=True)
    x = torch.randn(3, 4, 5)
    log = fg.BlueprintLog(model, [x], every=1, loss=lambda m, b: m(b)[0].square().mean())
    found = log.step()
    assert all(p.grad is None for p in model.parameters())
    model(x)[0].square().mean().backward()  # the layer's own list of weights is the old one
    for name, p in model.named_parameters():
        assert found.grad_norm[name] == pytest.approx(float(p.grad.norm()), rel=1e-5)


def test_weights_that_are_held_elsewhere_too_are_not_taken_for_unused():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.held = [self.two.weight]

        def forward(self, x):
            return self.one(x) @ self.held[0]

    model = Holder()
    log = fg.BlueprintLog(model, [torch.randn(2, 4)], every=1, loss=mean_square)
    with pytest.raises(FastgradError, match=r"two\.weight is used through another reference"):
        log.step()
    assert all(p.grad is None for p in model.parameters())


def test_a_failure_leaves_nothing_behind():
    model = randomised(llama)
    own = dict(model.named_parameters())
    log = fg.BlueprintLog(model, [{"input_ids": HELD_OUT[0]["input_ids"]}], every=1)
    with pytest.raises(FastgradError, match="no loss"):
        log.step()
    assert all(p is own[n] for n, p in model.named_parameters())
    assert model.training
    assert log.steps == 1
    bad = randomised(llama)
    log = fg.BlueprintLog(bad, HELD_OUT, every=1)
    with torch.no_grad():
        bad.lm_head.weight[0] = torch.nan
    with pytest.raises(NonFiniteGradientError):
        log.step()


def test_a_compiled_model_is_measured_through_its_inner_one():
    def run(watched):
        torch.manual_seed(2)
        model = randomised(bert)
        compiled = torch.compile(model, backend="eager")
        log = fg.BlueprintLog(compiled, HELD_OUT, every=2) if watched else None
        return state(train(compiled, log, steps=5)), log

    (plain, _), (watched, log) = run(False), run(True)
    same(plain, watched)
    assert [m.step for m in log.measurements] == [2, 4]
    assert "_orig_mod" not in log.blueprint().names[0]


def test_under_autocast_the_precision_is_that_of_training_and_its_cache_is_not_used():
    model = randomised(llama)
    log = fg.BlueprintLog(model, HELD_OUT, every=1)
    with torch.autocast("cpu", torch.bfloat16):
        model(**ROWS[0])  # fills the cache with casts of the present weights
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        found = log.step()
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = measure(model, HELD_OUT)
    assert list(found.grad_norm.values()) == expected.grad_norm.tolist()
    exact, _ = measure(model, HELD_OUT)
    assert list(found.grad_norm.values()) != exact.grad_norm.tolist()


# -- what is measured --------------------------------------------------------------------


def test_gradients_of_a_partial_model_are_those_of_the_whole():
    model = with_dropout()
    chosen = fg.select(None, model=model, fraction=0.3, ranking="random", blocks="16x16")
    partial = fg.make_partial(model, chosen)
    with pytest.raises(PartialError, match=r"pass partial=\.\.\."):
        fg.BlueprintLog(model, HELD_OUT, every=1)
    log = fg.BlueprintLog(model, HELD_OUT, every=1, partial=partial)
    found = log.step()
    with partial.suspended():
        expected, _ = measure(model, HELD_OUT)
    assert found.grad_norm == dict(zip(expected.names, expected.grad_norm.tolist(), strict=True))
    assert log.blueprint().n_model_parameters == expected.meta["n_model_parameters"]


@pytest.mark.parametrize("frozen", [None, ["*lm_head*"]])
def test_frozen_parameters_are_named_or_measured(frozen):
    model = randomised(llama)
    model.lm_head.weight.requires_grad_(False)
    log = fg.BlueprintLog(model, HELD_OUT, at=[1.0], frozen=frozen)
    entry = {s.name: s for s in log.blueprint().submodules}["lm_head.weight"]
    assert entry.coverage == ("frozen" if frozen is None else "exact")
    assert (entry.grad_norm is None) == (frozen is None)
    assert not model.lm_head.weight.requires_grad
    assert model.lm_head.weight.grad is None


class Stream(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))


@pytest.mark.parametrize(
    "batches",
    [range(40), iter(range(40)), DataLoader(range(40), batch_size=1, collate_fn=sum),
     DataLoader(Stream(40), batch_size=1, collate_fn=sum)],
    ids=["sequence", "iterator", "loader", "stream"],
)  # fmt: skip
def test_batches_are_sampled_evenly_and_always_the_same(batches):
    held_out = HeldOut(batches)
    chosen = held_out.chosen()
    assert len(held_out) == 40
    assert len(chosen) == len(set(chosen)) == 16
    assert set(np.diff(chosen)) == {2, 3}
    assert chosen[0] == 1
    assert chosen[-1] == 38
    for _ in range(2):
        assert list(held_out.read(chosen)) == chosen


@pytest.mark.parametrize(
    ("options", "n"),
    [({}, 10), ({"share": 1.0}, 10), ({"share": 0.3}, 3), ({"share": 0.01}, 1),
     ({"examples": 7}, 4), ({"examples": 8}, 4), ({"examples": 1000}, 10)],
)  # fmt: skip
def test_how_many_batches(options, n):
    """10 batches of 2 examples."""
    batches = [{"labels": torch.zeros(2, 3), "note": "text"} for _ in range(10)]
    chosen = HeldOut(batches, **options).chosen()
    assert len(chosen) == len(set(chosen)) == n
    model = randomised(llama)
    log = fg.BlueprintLog(model, ROWS, at=[1.0], examples=4)
    assert log.blueprint().n_batches == log.blueprint().n_examples == 4
    with pytest.raises(FastgradError, match="under fully_shard each of 11"):
        HeldOut(batches, **options).chosen(11)
    assert len(HeldOut(batches, **options).chosen(3)) in (3, 9)


def test_ends_and_reuse():
    """Weights that were just measured are not measured again; others are."""
    model = randomised(llama)
    log = fg.BlueprintLog(model, HELD_OUT, steps=[2], total_steps=4)
    train(model, log, steps=2)
    stats = log.measurements[0].stats
    assert log.blueprint().weights_hash == fg.weights_hash(model)
    assert [(m.label, m.stats) for m in log.measurements] == [("step 2", stats)]
    best = {n: v.clone() for n, v in model.state_dict().items()}
    train(model, log, steps=4, first=2)
    assert len(log.measurements) == 1  # the end is measured when it is asked for
    log.blueprint()
    log.blueprint()
    model.load_state_dict(best)
    again = log.blueprint(best_step=2)
    assert [(m.label, m.step) for m in log.measurements] == [("step 2", 2), ("100%", 4)]
    assert log.measurements[0].stats is stats
    assert again.weights_hash == log.measurements[0].weights_hash
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    log.blueprint(best_step=2)
    assert [m.label for m in log.measurements] == ["step 2", "100%", "best"]


def test_tokens_and_logs():
    model = randomised(llama)
    log = fg.BlueprintLog(model, HELD_OUT, every=2)
    assert log.step(tokens=100) is None
    found = log.step(tokens=50)
    assert found.tokens_seen == 150
    assert math.isnan(found.fraction)
    entry = found.logs()
    assert entry["blueprint_loss"] == found.loss
    assert set(found.logs(parameters=False)) == {k for k in entry if "/" not in k}
    log.step()
    assert [c.tokens_seen for c in log.blueprint().file.checkpoints] == [150, 150]


# -- resume ------------------------------------------------------------------------------


def stored(state_dict, tmp_path, how):
    if how == "json":
        return json.loads(json.dumps(state_dict, allow_nan=False))
    torch.save(state_dict, tmp_path / "log.pt")
    return torch.load(tmp_path / "log.pt", weights_only=True)


@pytest.mark.parametrize("how", ["json", "torch"])
def test_a_resumed_loop_makes_the_blueprint_of_the_uninterrupted_one(tmp_path, how):
    def sgd(model, log, first, last):  # no momentum: the weights are all there is to resume
        for batch in ROWS[first:last]:
            model(**batch).loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
            log.step(tokens=9)

    model = randomised(llama)
    straight = fg.BlueprintLog(model, HELD_OUT, total_steps=10)
    sgd(model, straight, 0, 10)
    expected = content(straight.blueprint())
    for stop in (4, 5, 10):
        model = randomised(llama)
        first = fg.BlueprintLog(model, HELD_OUT, total_steps=10)
        sgd(model, first, 0, stop)
        if stop == 10:
            first.blueprint()  # measured, and made again after the resume
        resumed = fg.BlueprintLog(model, HELD_OUT, total_steps=10)
        resumed.load_state_dict(stored(first.state_dict(), tmp_path, how))
        sgd(model, resumed, stop, 10)
        assert content(resumed.blueprint()) == expected, stop
        assert resumed.measurements == straight.measurements


def test_a_state_that_is_none_is_refused_and_changes_nothing():
    model = randomised(llama)
    log = fg.BlueprintLog(model, HELD_OUT, every=1)
    log.step()
    good = log.state_dict()
    before = list(log.measurements)
    damaged = [
        {}, {**good, "format": "other"}, {**good, "steps": "x"}, {**good, "names": ["a"]},
        {**good, "measurements": [{}]}, {**good, "measurements": [3]}, [], None,
    ]  # fmt: skip
    for bad in damaged:
        with pytest.raises(FastgradError, match="not the state of a BlueprintLog"):
            log.load_state_dict(bad)
    other = fg.BlueprintLog(randomised(bert), HELD_OUT, every=1)
    with pytest.raises(FastgradError, match="of another model"):
        other.load_state_dict(good)
    assert log.measurements == before
    assert log.steps == 1


# -- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": ()}, r"fractions in \(0, 1\]"),
        ({"at": (0.5, 1.5)}, r"fractions in \(0, 1\]"),
        ({"at": (0.5,), "total_steps": None}, "need its length"),
        ({"total_steps": None}, "need its length"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"steps": [0]}, "measure at is 0"),
        ({"steps": [2.5]}, "measure at is 2.5"),
        ({"every": 0}, "measure at is 0"),
        ({"share": 0.0}, "share must be in"),
        ({"examples": 0}, "examples must be"),
        ({"examples": 3, "share": 0.5}, "give one"),
        ({"blocks": "nonsense"}, "nonsense"),
        ({"frozen": ["nothing*"]}, "matches no parameter"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options, message):
    with pytest.raises(FastgradError, match=message):
        fg.BlueprintLog(randomised(llama), HELD_OUT, **({"total_steps": 10} | options))


def test_models_that_cannot_be_measured_are_refused_at_once():
    with pytest.raises(FastgradError, match="no batch"):
        fg.BlueprintLog(randomised(llama), [], every=1)
    with pytest.raises(FastgradError, match="needs a model"):
        fg.BlueprintLog("my-model/", HELD_OUT, every=1)
    with pytest.raises(FastgradError, match=r"float16.*Remedy"):
        fg.BlueprintLog(randomised(llama).half(), HELD_OUT, every=1)
    log = fg.BlueprintLog(randomised(llama), HELD_OUT, every=1)
    with torch.autocast("cpu", torch.float16), pytest.raises(FastgradError, match="float16"):
        log.step()
    with pytest.raises(FastgradError, match="DataParallel"):
        fg.BlueprintLog(nn.DataParallel(randomised(llama)), HELD_OUT, every=1)
    compiled = randomised(llama)
    compiled.compile(backend="eager")
    with pytest.raises(FastgradError, match="compiled"):
        fg.BlueprintLog(compiled, HELD_OUT, every=1)
    frozen = randomised(llama).requires_grad_(False)
    with pytest.raises(FastgradError, match="none requires a gradient"):
        fg.BlueprintLog(frozen, HELD_OUT, every=1)
