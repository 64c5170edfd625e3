"""Partial training inside Accelerate loops and TRL's SFTTrainer, on tiny random models."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, load_model
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

import fastgrad as fg
from fastgrad.errors import PartialError
from fastgrad.integrations.transformers import sparse_adamw
from tests.models import batch_of, llama, randomised
from tests.sft import sentences, tokenizer
from tests.training_runs import arguments_of, assert_only_selected_moved, logged, state

STEPS, SAVED = 6, 3
PARTIAL = "partial.safetensors"


# -- Accelerate --------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def accelerated(dtype, precision, folder, first=0, last=STEPS, master=torch.float32):
    """Steps ``first`` to ``last``, each over two accumulated batches; resumes from ``folder``."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=precision
    )  # fmt: skip
    model = randomised(llama).to(dtype)
    if first:
        load_model(model, str(folder / "model.safetensors"))
        partial = fg.load_partial(model, folder / PARTIAL)
    else:
        chosen = fg.select(None, model=model, fraction=0.4, ranking="random", blocks="16x16")
        partial = fg.make_partial(model, chosen, master)
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    accelerator.register_save_state_pre_hook(
        lambda models, weights, path: partial.save(f"{path}/{PARTIAL}")
    )
    if first:
        accelerator.load_state(str(folder))
    for k in range(first, last):
        for j in range(2):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch_of(seed=2 * k + j)).loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    grads = torch.cat([p.grad.flatten() for p in partial.parameters()])
                    assert float(norm) > 0.5
                    assert float(torch.linalg.vector_norm(grads)) == pytest.approx(0.5, rel=1e-2)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if k + 1 == SAVED and not first:
            accelerator.save_state(str(folder))
    return accelerator, partial, optimizer


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "no"), (torch.float32, "bf16"), (torch.bfloat16, "no")],
    ids=["fp32", "autocast", "bf16-masters"],
)
def test_accelerate_resumes_bit_for_bit(tmp_path, dtype, precision):
    before = state(randomised(llama).to(dtype))
    _, straight, optimizer = accelerated(dtype, precision, tmp_path)
    assert_only_selected_moved(straight.model, before, straight.selection)
    assert set(load_file(tmp_path / "model.safetensors")) == set(randomised(llama).state_dict())
    _, resumed, again = accelerated(dtype, precision, tmp_path, first=SAVED)
    assert resumed.base_hash == straight.base_hash
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(),
                                 strict=True):  # fmt: skip
        assert torch.equal(a, b), name
    for a, b in zip(optimizer.state_dict()["state"].values(),
                    again.state_dict()["state"].values(), strict=True):  # fmt: skip
        assert all(torch.equal(a[key], b[key]) for key in a)
    fg.save_delta(resumed, tmp_path / "delta.safetensors")
    base = randomised(llama).to(dtype)
    fg.load_delta(base, tmp_path / "delta.safetensors")
    assert fg.weights_hash(base) == fg.weights_hash(straight.remove())


def test_accelerate_accumulation_is_the_mean_over_both_batches(tmp_path):
    accelerator, partial, _ = accelerated(torch.float32, "no", tmp_path, last=1)
    plain = randomised(llama)
    again = fg.make_partial(plain, partial.selection)
    optimizer = fg.SparseAdamW(again.parameters(), lr=1e-2)
    for j in range(2):
        (plain(**batch_of(seed=j)).loss / 2).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    optimizer.step()
    for (name, a), b in zip(partial.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert accelerator.unwrap_model(partial.model) is partial.model


def test_weights_of_another_checkpoint_are_refused(tmp_path):
    accelerated(torch.bfloat16, "no", tmp_path, last=SAVED)
    with pytest.raises(PartialError, match="changed between save and resume"):
        fg.load_partial(randomised(llama).to(torch.bfloat16), tmp_path / PARTIAL)


# -- TRL ---------------------------------------------------------------------------------


def sft(model, folder, plug=None, callbacks=(), **options):
    arguments = arguments_of(
        folder, SFTConfig, **({"max_steps": 20, "bf16": False, "logging_steps": 10} | options)
    )
    run = SFTTrainer(
        model=model, args=arguments, train_dataset=sentences(), processing_class=tokenizer(),
        optimizer_cls_and_kwargs=plug, callbacks=list(callbacks),
    )  # fmt: skip
    run.pop_callback(PrinterCallback)
    return run


@pytest.mark.parametrize(("blocks", "options"), [
    ("16x16", {}),
    ("module", {"packing": True, "max_length": 16, "padding_free": False}),
    ("16x16", {"gradient_checkpointing": True, "bf16": True, "gradient_accumulation_steps": 2}),
], ids=["plain", "packed-rows", "checkpointing-bf16"])  # fmt: skip
def test_sft_trains_the_selection_alone(tmp_path, blocks, options):
    model = randomised(lambda: llama(tied=True))
    before = state(model)
    plug = sparse_adamw(ranking="random", fraction=0.4, blocks=blocks)
    run = sft(model, tmp_path, plug, **options)
    run.train()
    first, *_, last = logged(run, "loss")
    assert last < 0.9 * first
    assert_only_selected_moved(model, before, plug[0].partial.selection)
    run.save_model(str(tmp_path / "tuned"))
    again = type(randomised(llama)).from_pretrained(tmp_path / "tuned").state_dict()
    saved = model.state_dict()
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)


def test_sft_with_everything_selected_is_sft(tmp_path):
    theirs, ours = randomised(llama), randomised(llama)
    sft(theirs, tmp_path / "a", optim="adamw_torch").train()
    sft(ours, tmp_path / "b", sparse_adamw(ranking="last", fraction=1.0)).train()
    after = state(ours)
    for name, value in state(theirs).items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_sft_resumes_bit_for_bit(tmp_path):
    def start():
        plug = sparse_adamw(ranking="random", fraction=0.4, blocks="16x16",
                            master_dtype=torch.float32)  # fmt: skip
        model = randomised(llama).to(torch.bfloat16)
        return sft(model, tmp_path, plug, save_strategy="steps", save_steps=8)

    straight, resumed = start(), start()
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    for name, value in state(straight.model).items():
        assert torch.equal(state(resumed.model)[name], value), name
