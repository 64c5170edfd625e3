"""Updates inside the backward pass of a Trainer: the run with ordinary steps, or refused."""

from __future__ import annotations

import shutil

import pytest
import torch

import fastgrad as fg
from fastgrad.errors import PartialError
from fastgrad.integrations.transformers import (
    ReselectionCallback,
    StepInBackwardCallback,
    sparse_adamw,
)
from fastgrad.step_guard import IN_BACKWARD
from tests.models import llama, randomised
from tests.test_trainer_resume import same_runs
from tests.training_runs import HELD_OUT, state, trainer

PARTIAL = {"max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 5}


def start(folder, *callbacks, dtype=torch.float32, master=None, **options):
    plug = sparse_adamw(
        ranking="magnitude", fraction=0.4, blocks="16x16", master_dtype=master, weight_decay=0.1
    )
    model = randomised(lambda: llama(attention_dropout=0.2)).to(dtype)
    return trainer(model, folder, callbacks, plug, **(PARTIAL | options)), plug


class Gone:
    """Gradients that are left when the optimizer's step begins."""

    def __init__(self, optimizer):
        self.left = []
        optimizer.register_step_pre_hook(
            lambda o, *_: self.left.append(
                sum(p.grad is not None for g in o.param_groups for p in g["params"])
            )
        )


@pytest.mark.parametrize(
    ("dtype", "master", "options"),
    [
        (torch.float32, None, {}),
        (torch.bfloat16, torch.float32, {"bf16": True}),
        (torch.float32, None, {"gradient_checkpointing": True}),
    ],
    ids=["fp32", "bf16-masters", "checkpointing"],
)
def test_it_is_the_run_with_ordinary_steps_bit_for_bit(tmp_path, dtype, master, options):
    ordinary = start(tmp_path / "a", dtype=dtype, master=master, **options)
    ordinary[0].train()
    callback = StepInBackwardCallback()
    early = start(tmp_path / "b", callback, dtype=dtype, master=master, **options)
    early[0].create_optimizer()
    seen = Gone(early[0].optimizer)
    early[0].train()
    assert seen.left == [0] * 10
    same_runs(ordinary, early)
    assert callback.handle is None
    assert IN_BACKWARD not in early[0].optimizer.optimizer.__dict__


def test_resumed_is_uninterrupted_with_the_running_norm(tmp_path):
    def begin():
        return start(tmp_path, StepInBackwardCallback(max_norm=0.02, decay=0.5))

    run = begin()
    run[0].train()
    shutil.rmtree(tmp_path / "checkpoint-10")
    again = begin()
    again[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    same_runs(run, again)
    loose = start(tmp_path / "loose", StepInBackwardCallback())
    loose[0].train()
    moved = [not torch.equal(a, b) for a, b in zip(
        state(run[0].model).values(), state(loose[0].model).values(), strict=True
    )]  # fmt: skip
    assert any(moved), "nothing was clipped"


def test_it_follows_a_reselection(tmp_path):
    def begin(*callbacks):
        plug = sparse_adamw(ranking="magnitude", fraction=0.3, blocks="row")
        again = ReselectionCallback(plug, HELD_OUT, every=4, choose=lambda model, stats: fg.select(
            stats, model=model, fraction=0.3
        ))  # fmt: skip
        model = randomised(llama)
        return trainer(model, tmp_path, [again, *callbacks], plug, max_grad_norm=0.0), plug

    ordinary, early = begin(), begin(StepInBackwardCallback())
    ordinary[0].train()
    early[0].train()
    same_runs(ordinary, early)


def test_what_would_be_lost_in_silence_is_refused(tmp_path):
    with pytest.raises(PartialError, match=r"max_grad_norm=1.0 after .*Remedy.*max_norm"):
        start(tmp_path, StepInBackwardCallback(), max_grad_norm=1.0)[0].train()
    with pytest.raises(PartialError, match=r"gradient_accumulation_steps is 2.*Remedy"):
        start(tmp_path, StepInBackwardCallback(), gradient_accumulation_steps=2)[0].train()
