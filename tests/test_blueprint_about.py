"""What a run says of itself in its blueprint: provenance, and the tokens it was trained on."""

from __future__ import annotations

import re
import shutil
import sys
import warnings

import pytest

import fastgrad as fg
from fastgrad.errors import FastgradError
from fastgrad.integrations.transformers import BlueprintCallback
from tests.models import llama, randomised
from tests.training_runs import HELD_OUT, trainer

DATA = [{"name": "org/code", "revision": "v3", "split": "test", "n_examples": 6}, "law"]
PER_STEP = 4 * 9  # rows times tokens of training_runs.Rows


def named(document):
    return [(d["name"], d["revision"], d["n_examples"]) for d in document["data"]["datasets"]]


@pytest.fixture
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "/secret/place/rows"])


def test_a_callback_states_where_the_run_came_from(tmp_path, argv):
    callback = BlueprintCallback(
        HELD_OUT, at=(0.5,), datasets=DATA, revision="9c1f0b2", name_or_path="org/model",
        tokens_per_step=64, n_bootstrap=50,
    )  # fmt: skip
    trainer(randomised(llama), tmp_path, [callback], max_steps=2, seed=5).train()
    found = fg.Blueprint.from_pretrained(tmp_path).file.model_dump(by_alias=True)
    assert named(found) == [("org/code", "v3", 6), ("law", None, None)]
    assert found["data"]["seed"] == 5
    assert found["data"]["command"] == "train.py --data rows"
    assert found["model"]["revision"] == "9c1f0b2"
    assert found["model"]["name_or_path"] == "org/model"
    assert found["k_star"]["flops"]["fixed"] == 4 * found["model"]["n_parameters"] * 64
    # The statistics say it too, for whoever makes another blueprint of them.
    assert callback.measurements[0].stats.meta["data"]["datasets"][1] == {"name": "law"}
    assert fg.Blueprint.from_stats(callback.measurements[0].stats).file.data.seed == 5


def test_a_loop_states_it_too_and_the_last_word_is_that_of_blueprint(argv):
    log = fg.BlueprintLog(
        randomised(llama), HELD_OUT, at=(1.0,), datasets=["law"], seed=3, revision="main",
        command="mine",
    )  # fmt: skip
    found = log.blueprint(revision="v2", created="2026-01-02").file
    assert (found.model.revision, found.provenance.created) == ("v2", "2026-01-02")
    assert (found.data.seed, found.data.command, found.provenance.command) == (3, "mine", "mine")
    assert [d.name for d in found.data.datasets] == ["law"]
    plain = fg.BlueprintLog(randomised(llama), HELD_OUT, at=(1.0,)).blueprint().file
    assert (plain.data.seed, plain.model.revision, plain.data.datasets) == (None, None, [])
    assert plain.data.command == "train.py --data rows"


@pytest.mark.parametrize(("options", "said"), [
    ({"dataset": ["law"]}, r"'dataset' is no argument.*Remedy: one of name_or_path"),
    ({"checkpoints": []}, r"'checkpoints' is no argument"),
    ({"datasets": "law"}, r"datasets is a list\. Remedy: datasets=\['law'\]"),
    ({"datasets": {"name": "law"}}, r"datasets is a list"),
    ({"datasets": [{"revision": "v1"}]}, r"does not name a data set\. Remedy"),
    ({"datasets": [7]}, r"datasets: 7 does not name a data set\. Remedy"),
    ({"domain_tags": "law"}, r"domain_tags is a list"),
    ({"seed": "5"}, r"seed is '5'\. Remedy"),
    ({"seed": True}, r"seed is True\. Remedy"),
    ({"revision": 3}, r"revision is 3\. Remedy"),
])  # fmt: skip
def test_what_no_file_could_say_is_refused_before_the_run(options, said):
    with pytest.raises(FastgradError, match=said):
        fg.BlueprintLog(randomised(llama), HELD_OUT, **options)
    with pytest.raises(FastgradError, match=said):
        BlueprintCallback(HELD_OUT, **options)


# -- tokens ----------------------------------------------------------------------------------


def tokens(callback):
    return [(c.step, c.tokens_seen) for c in callback.blueprint.file.checkpoints]


def test_tokens_are_those_that_the_trainer_counts_also_after_resume(tmp_path):
    def start(folder, kind="all", **more):
        callback = BlueprintCallback(HELD_OUT)
        return callback, trainer(
            randomised(llama), folder, [callback], save_strategy="steps", save_steps=6,
            include_num_input_tokens_seen=kind, **more,
        )  # fmt: skip

    expected = [(step, PER_STEP * step) for step in (5, 8, 10)]
    straight, run = start(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tokens.*")
        run.train()
        assert tokens(straight) == expected
        shutil.rmtree(tmp_path / "checkpoint-10")
        resumed, run = start(tmp_path)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert tokens(resumed) == expected
    # A part that does not count leaves the Trainer's number where it was: it would be too small.
    uncounted, run = start(tmp_path, "no", max_steps=9)
    with pytest.warns(UserWarning, match=r"counts no tokens.*null\. Remedy: include_num_input"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert tokens(uncounted)[-1] == (9, None)


def test_a_run_that_counts_from_the_middle_on_says_null(tmp_path):
    first = BlueprintCallback(HELD_OUT, at=(1.0,))
    with pytest.warns(UserWarning, match="counts no tokens") as caught:
        trainer(randomised(llama), tmp_path, [first], save_strategy="steps", save_steps=6).train()
    assert len([w for w in caught if re.search("tokens_seen.*Remedy", str(w.message))]) == 1
    assert tokens(first) == [(10, None)]
    callback = BlueprintCallback(HELD_OUT, at=(1.0,))
    run = trainer(randomised(llama), tmp_path, [callback], include_num_input_tokens_seen="all")
    with pytest.warns(UserWarning, match=r"tokens of the first 6 steps were not counted.*Remedy"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert tokens(callback)[-1] == (10, None)


def test_the_best_weights_have_the_tokens_of_their_step(tmp_path):
    callback = BlueprintCallback(HELD_OUT)
    run = trainer(
        randomised(llama), tmp_path, [callback], load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        greater_is_better=True, include_num_input_tokens_seen="non_padding",
    )  # fmt: skip
    run.train()
    assert run.state.best_global_step == 2
    assert tokens(callback)[-1] == (2, PER_STEP * 2)
    assert tokens(callback)[0] == (5, PER_STEP * 5)
    log = fg.BlueprintLog(randomised(llama), HELD_OUT, at=(1.0,))
    for _ in range(3):
        log.step(tokens=10)
    last = log.blueprint(best_step=2).file.checkpoints[-1]
    assert (last.label, last.tokens_seen) == ("best", None)  # not those of the third step
