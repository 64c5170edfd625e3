"""``trainer.train(resume_from_checkpoint=...)`` of a partial run: bit for bit, or refused."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers.integrations
from transformers.trainer_utils import HPSearchBackend

import fastgrad as fg
from fastgrad.errors import PartialError
from fastgrad.integrations.transformers import sparse_adamw
from tests.models import llama, randomised
from tests.training_runs import state, trainer

SAVING = {"save_strategy": "steps", "save_steps": 5}
PARTIAL = "fastgrad_partial.safetensors"


def tiles(**options):
    return sparse_adamw(**({"ranking": "random", "fraction": 0.4, "blocks": "16x16"} | options))


def whole(**options):
    return tiles(blocks="module", **options)


def same_runs(one, two):
    """Weights, trained tensors, optimizer and base of two ``(run, plug)`` are the same bits."""
    (run, plug), (again, other) = one, two
    after = state(again.model)
    for name, value in state(run.model).items():
        assert torch.equal(after[name], value), name
    a, b = plug[0].partial, other[0].partial
    assert a.selection == b.selection
    assert a.base_hash == b.base_hash
    for (name, x), (same, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == same
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name
    moments = [o.optimizer.optimizer.state_dict() for o in (run, again)]
    assert moments[0]["param_groups"] == moments[1]["param_groups"]
    assert moments[0]["state"].keys() == moments[1]["state"].keys()
    for number, x in moments[0]["state"].items():
        y = moments[1]["state"][number]
        assert all(torch.equal(x[key], y[key]) for key in x.keys() | y.keys())


def with_dropout():
    return randomised(lambda: llama(attention_dropout=0.2))


@pytest.mark.parametrize("make", [tiles, whole])
@pytest.mark.parametrize(
    ("dtype", "master", "options"),
    [
        (torch.float32, None, {}),
        (torch.float32, None, {"bf16": True, "gradient_accumulation_steps": 2}),
        (torch.bfloat16, torch.float32, {}),
        (torch.bfloat16, None, {"weight_decay": 0.1}),
    ],
    ids=["fp32", "autocast", "bf16-masters", "bf16"],
)
def test_resumed_is_uninterrupted(tmp_path, make, dtype, master, options):
    def start():
        plug = make(master_dtype=master)
        model = with_dropout().to(dtype)
        return trainer(model, tmp_path, optimizer=plug, **SAVING, **options), plug

    base = with_dropout().to(dtype)
    straight = start()
    straight[0].train()
    shutil.rmtree(tmp_path / "checkpoint-10")
    resumed = start()
    resumed[0].train(resume_from_checkpoint=True)  # the last checkpoint that is there
    assert resumed[0].state.global_step == 10
    same_runs(straight, resumed)

    # The delta is against the weights that the first run began with.
    partial = resumed[1][0].partial
    assert partial.base_hash == fg.weights_hash(base)
    fg.save_delta(partial, tmp_path / "delta.safetensors")
    fg.load_delta(base, tmp_path / "delta.safetensors")
    assert fg.weights_hash(base) == fg.weights_hash(partial.remove())


def test_the_checkpoint_decides_what_is_trained(tmp_path):
    """A blueprint that no longer describes the weights is not read again."""
    first = tiles(seed=1)
    trainer(randomised(llama), tmp_path, optimizer=first, **SAVING).train()
    other = tiles(seed=2)
    run = trainer(randomised(llama), tmp_path, optimizer=other, **SAVING)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert other[0].partial.selection == first[0].partial.selection


def test_a_resumed_run_can_be_resumed_again(tmp_path):
    def start():
        plug = tiles()
        return trainer(randomised(llama), tmp_path, optimizer=plug, save_strategy="steps",
                       save_steps=3), plug  # fmt: skip

    straight = start()
    straight[0].train()
    for step in (3, 6):
        resumed = start()
        resumed[0].train(resume_from_checkpoint=tmp_path / f"checkpoint-{step}")
    same_runs(straight, resumed)


def test_a_folder_without_the_partial_file_is_refused(tmp_path):
    trainer(randomised(llama), tmp_path, optimizer=tiles(), **SAVING).train()
    (tmp_path / "checkpoint-5" / PARTIAL).unlink()
    run = trainer(randomised(llama), tmp_path, optimizer=tiles())
    with pytest.raises(PartialError, match=rf"checkpoint-5 has no {PARTIAL}.*Remedy"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    trainer(randomised(llama), tmp_path / "dense").train()  # the Trainer's own optimizer

    trainer(randomised(llama), tmp_path / "only", optimizer=tiles(), save_only_model=True,
            **SAVING).train()  # fmt: skip
    assert not (tmp_path / "only" / "checkpoint-5" / PARTIAL).exists()
    run = trainer(randomised(llama), tmp_path / "only", optimizer=tiles())
    with pytest.raises(PartialError, match="save_only_model"):
        run.train(resume_from_checkpoint=str(tmp_path / "only" / "checkpoint-5"))


def test_weights_that_changed_since_the_checkpoint_are_refused(tmp_path):
    trainer(randomised(llama), tmp_path, optimizer=tiles(), **SAVING).train()
    model = randomised(llama)
    model.load_state_dict(  # somebody merged other weights into the checkpoint
        {k: v + 1 for k, v in model.state_dict().items()}
    )
    model.save_pretrained(tmp_path / "checkpoint-5")
    run = trainer(randomised(llama), tmp_path, optimizer=tiles())
    with pytest.raises(PartialError, match="changed between save and resume"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("before", ["create_optimizer", "train"])
def test_an_optimizer_built_before_the_resume_is_refused(tmp_path, before):
    """It was built without the checkpoint: its masters, and after a re-selection its blocks, are
    not those that were saved."""
    trainer(randomised(llama), tmp_path, optimizer=tiles(), **SAVING).train()
    run = trainer(randomised(llama), tmp_path, optimizer=tiles(), **SAVING)
    getattr(run, before)()
    with pytest.raises(PartialError, match=r"resumes at step 5.*new Trainer"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    fresh = trainer(randomised(llama), tmp_path, optimizer=tiles(), **SAVING)
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    with pytest.raises(PartialError, match=r"resumes at step 5.*new Trainer"):
        fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_old_folders_in_the_way_are_not_written_to(tmp_path, monkeypatch):
    """Only the checkpoint that is being saved gets a file, also with model_init and two runs."""
    run = trainer(lambda: randomised(llama), tmp_path, optimizer=tiles(), **SAVING)
    run.train()
    first = (tmp_path / "checkpoint-5" / PARTIAL).read_bytes()
    run.train()
    assert (tmp_path / "checkpoint-5" / PARTIAL).read_bytes() == first  # the same run again
    resumed = trainer(lambda: randomised(llama), tmp_path, optimizer=tiles(), **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for name, value in state(run.model).items():
        assert torch.equal(state(resumed.model)[name], value), name


def test_a_trial_of_a_hyperparameter_search_has_its_file_in_its_own_folder(tmp_path, monkeypatch):
    class Trial:  # what the Trainer reads of optuna's
        number, params = 0, {}

    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)
    run = trainer(lambda trial: randomised(llama), tmp_path, optimizer=tiles(), **SAVING)
    run.hp_search_backend, run.hp_name = HPSearchBackend.OPTUNA, None
    run.hp_space = lambda trial: {"learning_rate": 2e-3 * (1 + trial.number)}
    rates = []
    for number in (0, 1):
        trial = Trial()
        trial.number = number
        run.train(trial=trial)
        rates.append(run.optimizer.param_groups[0]["initial_lr"])
        assert (tmp_path / f"run-{number}" / "checkpoint-10" / PARTIAL).is_file()
    assert rates == [2e-3, 4e-3]
    assert not (tmp_path / "checkpoint-10").exists()
