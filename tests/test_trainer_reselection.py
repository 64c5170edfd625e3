"""Re-selection inside a Trainer: by steps, by staleness, and resumed exactly."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

import fastgrad as fg
from fastgrad.errors import FastgradError, PartialError
from fastgrad.identity import model_parameters
from fastgrad.integrations.transformers import (
    BlueprintCallback,
    ReselectionCallback,
    measure,
    sparse_adamw,
)
from tests.models import batch_of, llama, randomised
from tests.sft import sentences, tokenizer
from tests.test_trainer_resume import same_runs
from tests.training_runs import (
    HELD_OUT,
    arguments_of,
    assert_only_selected_moved,
    logged,
    state,
    trainer,
)

MANY = [batch_of(n=4, seed=s) for s in range(20, 32)]


def start(folder, *, dtype=torch.float32, master=None, every=4, callbacks=(), **options):
    """A run with its plug and its callback; ``max_steps`` 12 by default."""
    model = randomised(lambda: llama(attention_dropout=0.2)).to(dtype)
    stats, _ = measure(model, HELD_OUT, blocks="16x16")
    plug = sparse_adamw(stats, fraction=0.3, master_dtype=master, weight_decay=0.1)
    again = ReselectionCallback(plug, HELD_OUT, every=every)
    options = {"max_steps": 12, "learning_rate": 3e-2} | options
    return trainer(model, folder, [again, *callbacks], plug, **options), plug, again


def test_every_so_many_steps_the_budget_goes_where_the_gradient_is(tmp_path):
    before = state(randomised(lambda: llama(attention_dropout=0.2)))
    seen = []
    run, plug, again = start(tmp_path)
    choose = plug[0].choice.again

    def watch(model, stats):  # what the callback would do, with a look at it
        # the measurement is one of the plain model with the weights of that moment
        plain = randomised(lambda: llama(attention_dropout=0.2))
        plain.load_state_dict(model.state_dict())
        expected, _ = measure(plain, HELD_OUT, blocks="16x16")
        np.testing.assert_allclose(stats.grad_norm, expected.grad_norm, rtol=1e-5)
        chosen = choose(model, stats)
        seen.append(chosen)
        return chosen

    again.choose = watch
    run.train()
    assert sorted(again.reports) == [4, 8, 12]
    assert plug[0].partial.selection is seen[-1]
    assert all(0.25 < s.fraction <= 0.3 for s in seen)
    assert all(r.kept and r.added and r.dropped for r in list(again.reports.values())[:2])
    first = plug[0].choice.first(randomised(lambda: llama(attention_dropout=0.2)))
    assert_only_selected_moved_at_most(run.model, before, [first, *seen])
    entries = [e for e in run.state.log_history if "blocks_added" in e]
    assert [e["step"] for e in entries] == [4, 8, 12]
    assert [e["blocks_added"] for e in entries] == [r.added for r in again.reports.values()]
    # Each weight is in the group that the Trainer would put it into.
    decays = {id(p): g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    trained = dict(plug[0].partial.named_parameters())
    assert {id(p) for p in trained.values()} == decays.keys()
    assert {n: decays[id(p)] for n, p in trained.items()} == {
        n: 0.0 if "norm" in n else 0.1 for n in trained
    }


def assert_only_selected_moved_at_most(model, before, selections):
    """As the helper, for parameters that the last selection may have entered without a step."""
    moved = {
        n for n, old in before.items()
        if not torch.equal(old, model_parameters(model)[n].detach())
    }  # fmt: skip
    ever = {n for s in selections for n in s.blocks}
    assert moved <= ever
    assert_only_selected_moved(
        model,
        {n: old for n, old in before.items() if n in moved},
        *selections,
    )


def test_looking_alone_changes_nothing(tmp_path):
    """A callback that chooses what is trained already leaves the run bit for bit as it is."""
    run, plug, again = start(tmp_path / "a", every=3)
    again.choose = lambda model, stats: plug[0].partial.selection
    run.train()
    model = randomised(lambda: llama(attention_dropout=0.2))
    stats, _ = measure(model, HELD_OUT, blocks="16x16")
    without = sparse_adamw(stats, fraction=0.3, weight_decay=0.1)
    plain = trainer(model, tmp_path / "b", optimizer=without, max_steps=12, learning_rate=3e-2)
    plain.train()
    same_runs((plain, without), (run, plug))
    assert [r.added for r in again.reports.values()] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("dtype", "master"),
    [(torch.float32, None), (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16-masters"],
)
def test_a_run_resumed_after_a_reselection_is_the_uninterrupted_one(tmp_path, dtype, master):
    options = {"dtype": dtype, "master": master, "save_strategy": "steps", "save_steps": 6}
    base = randomised(lambda: llama(attention_dropout=0.2)).to(dtype)
    run, plug, again = start(tmp_path, **options)
    run.train()
    assert again.reports[4].added
    shutil.rmtree(tmp_path / "checkpoint-12")
    resumed, other, callback = start(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(callback.reports) == [8, 12]
    same_runs((run, plug), (resumed, other))
    partial = other[0].partial
    assert partial.touched.n_parameters > partial.selection.n_parameters
    assert partial.base_hash == fg.weights_hash(base)
    fg.save_delta(partial, tmp_path / "delta.safetensors")
    fg.load_delta(base, tmp_path / "delta.safetensors")
    assert fg.weights_hash(base) == fg.weights_hash(partial.remove())


def test_the_best_weights_come_back_after_a_reselection(tmp_path):
    """Blocks of the best checkpoint that are no longer trained come back too."""
    run, plug, again = start(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=6,
        save_strategy="steps", save_steps=6, greater_is_better=True, every=5,
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-6")
    best = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert again.reports[10].dropped
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, best[key]), key
    base = randomised(lambda: llama(attention_dropout=0.2))
    fg.save_delta(plug[0].partial, tmp_path / "delta.safetensors")
    fg.load_delta(base, tmp_path / "delta.safetensors")
    assert fg.weights_hash(base) == fg.weights_hash(run.model)


@pytest.mark.parametrize("stale", [False, True])
def test_only_where_the_ranks_have_drifted(tmp_path, stale):
    """One measurement is of these weights and this data; in the other the ranks are shuffled."""
    model = randomised(llama)
    stats, _ = measure(model, MANY)
    if stale:
        shuffled = np.random.default_rng(0).permutation(len(stats.names))
        stats = copy.copy(stats)
        stats.__dict__["batch_sq"] = stats.batch_sq[shuffled]
    plug = sparse_adamw(stats, fraction=0.3)
    again = ReselectionCallback(plug, MANY, every=2, when_stale=True)
    run = trainer(model, tmp_path, [again], plug, max_steps=4, learning_rate=1e-4)
    run.train()
    first, second = logged(run, "staleness")
    assert second == "fresh"  # in the second case: against a measurement of this very run
    assert all(logged(run, "staleness_reason"))
    assert run.state.stateful_callbacks["fastgrad_reselection"]["looks"] == 2
    if stale:
        assert first in ("drifted", "different model")
        assert list(again.reports) == [2]
        assert again.reports[2].added
    else:
        assert first == "fresh"
        assert not again.reports


def test_it_stands_beside_the_blueprint_callback(tmp_path):
    writer = BlueprintCallback(HELD_OUT)
    run, plug, again = start(tmp_path, callbacks=[writer])
    run.train()
    assert len(again.reports) == 3
    assert writer.blueprint.weights_hash == fg.weights_hash(plug[0].partial.remove())


def test_sft_with_reselection(tmp_path):
    words = tokenizer()
    rows = [words(t["text"], return_tensors="pt")["input_ids"] for t in sentences(6)]
    batches = [{"input_ids": r, "labels": r} for r in rows]
    model = randomised(llama)
    before = state(model)
    stats, _ = measure(model, batches, blocks="16x16")
    plug = sparse_adamw(stats, fraction=0.3)
    again = ReselectionCallback(plug, batches, every=5)
    arguments = arguments_of(tmp_path, SFTConfig, max_steps=14, bf16=False, logging_steps=7)
    run = SFTTrainer(
        model=model, args=arguments, train_dataset=sentences(), processing_class=words,
        optimizer_cls_and_kwargs=plug, callbacks=[again],
    )  # fmt: skip
    run.pop_callback(PrinterCallback)
    run.train()
    assert sorted(again.reports) == [5, 10]
    first, last = logged(run, "loss")
    assert last < 0.9 * first
    assert_only_selected_moved(
        model,
        {n: v for n, v in before.items() if n not in plug[0].partial.touched.blocks},
        plug[0].partial.touched,
    )


# -- refused -----------------------------------------------------------------------------


def test_what_cannot_be_chosen_again_is_refused(tmp_path):
    model = randomised(llama)
    chosen = fg.select(None, model=model, fraction=0.3, ranking="last")
    for plug, word in (
        (sparse_adamw(selection=chosen), "ready selection"),
        (sparse_adamw(ranking="random", fraction=0.3), "'random' would choose the same"),
    ):
        again = ReselectionCallback(plug, HELD_OUT, every=2)
        with pytest.raises(FastgradError, match=word):
            trainer(randomised(llama), tmp_path, [again], plug).train()
    plug = sparse_adamw(ranking="magnitude", fraction=0.3)
    again = ReselectionCallback(plug, HELD_OUT, every=2, when_stale=True)
    with pytest.raises(FastgradError, match="was given none"):
        trainer(randomised(llama), tmp_path, [again], plug).train()


def test_wrong_arguments_are_refused(tmp_path):
    plug = sparse_adamw(ranking="magnitude", fraction=0.3)
    with pytest.raises(FastgradError, match="what sparse_adamw returned"):
        ReselectionCallback(object(), HELD_OUT, every=2)
    with pytest.raises(FastgradError, match="whole number of steps"):
        ReselectionCallback(plug, HELD_OUT, every=0)
    with pytest.raises(FastgradError, match="fresh measurement"):
        ReselectionCallback(plug, None, every=2, when_stale=True)
    again = ReselectionCallback(sparse_adamw(ranking="magnitude", fraction=0.3), None, every=2)
    with pytest.raises(PartialError, match=r"not built|not of the plug"):
        trainer(randomised(llama), tmp_path, [again], plug).train()
    with pytest.raises(FastgradError, match="one process"):
        again.on_train_begin(SimpleNamespace(world_size=2), None, None)


def test_magnitude_needs_no_batches(tmp_path):
    plug = sparse_adamw(ranking="magnitude", fraction=0.3, blocks="16x16")
    again = ReselectionCallback(plug, None, every=5)
    run = trainer(randomised(llama), tmp_path, [again], plug, learning_rate=0.1)
    run.train()
    assert sorted(again.reports) == [5, 10]
    assert not logged(run, "reselection_loss")
