"""Partial training inside the Hugging Face Trainer: what its users rely on still holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

import fastgrad as fg
from fastgrad.errors import PartialError, SelectionError
from fastgrad.integrations.transformers import measure, sparse_adamw
from tests.models import bert, gpt2, llama, randomised
from tests.training_runs import (
    HELD_OUT,
    STEPS,
    Rows,
    arguments_of,
    assert_only_selected_moved,
    logged,
    state,
    trainer,
)

MODELS = {"llama": llama, "tied": lambda: llama(tied=True), "gpt2": gpt2, "bert": bert}


def tiles(**options):
    """Tiles drawn at random: most parameters are selected in part."""
    return sparse_adamw(
        **({"ranking": "random", "fraction": 0.4, "blocks": "16x16"} | options)
    )  # fmt: skip


def whole(**options):
    return tiles(blocks="module", **options)


class Watch(TrainerCallback):
    """Calls a function with the model at each gradient that is about to be used."""

    def __init__(self, look):
        self.look = look

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.look(model)


# -- what is trained, under the Trainer's options ----------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"max_grad_norm": 0.1, "weight_decay": 0.3},
        {"auto_find_batch_size": True},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize("plug", [tiles, whole], ids=["tiles", "whole"])
def test_only_the_selection_is_trained_under_any_option(tmp_path, options, plug):
    model = randomised(llama)
    before = state(model)
    made = plug()
    run = trainer(model, tmp_path, optimizer=made, max_steps=30, **options)
    run.train()
    assert_only_selected_moved(model, before, made[0].partial.selection)
    first, *_, last = logged(run, "loss")
    assert last < first


@pytest.mark.parametrize("options", [
    {}, {"gradient_accumulation_steps": 3}, {"label_smoothing_factor": 0.1}, {"bf16": True},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
    {"lr_scheduler_type": "linear", "max_grad_norm": 0.05, "weight_decay": 0.3},
], ids=lambda o: "-".join(o) or "plain")  # fmt: skip
def test_everything_selected_is_the_trainers_own_adamw(tmp_path, options):
    """At 100 % nothing but the optimizer's arithmetic differs: its rounding, 1e-6 a step."""
    theirs, ours = randomised(llama), randomised(llama)
    one = trainer(theirs, tmp_path / "a", optim="adamw_torch", **options)
    one.train()
    two = trainer(ours, tmp_path / "b", optimizer=sparse_adamw(ranking="last", fraction=1.0),
                  **options)  # fmt: skip
    two.train()
    assert logged(two, "learning_rate") == logged(one, "learning_rate")
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=1e-4)
    assert logged(two, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-3)
    after = state(ours)
    for name, value in state(theirs).items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_weight_decay_is_for_the_parameters_that_the_trainer_decays(tmp_path, name):
    """Biases and norms are not decayed, whatever their shape: by the Trainer's rule of names."""

    def decays(run, names):
        groups = run.create_optimizer().param_groups
        return {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}

    theirs = randomised(MODELS[name])
    own = {id(p): n for n, p in theirs.named_parameters()}
    expected = decays(trainer(theirs, tmp_path, weight_decay=0.1), own)
    plug = tiles(fraction=1.0, blocks="16x16", master_dtype=torch.float64)  # all of them packed
    run = trainer(randomised(MODELS[name]), tmp_path, optimizer=plug, weight_decay=0.1)
    run.create_optimizer()
    packed = {id(p): n for n, p in plug[0].partial.named_parameters()}
    found = decays(run, packed)
    assert set(expected.values()) == {0.0, 0.1}
    assert found == expected


def test_clipping_measures_and_scales_the_packed_gradients(tmp_path):
    """The norm that is logged and clipped to is that of the selected entries alone."""
    plug = tiles()
    model = randomised(llama)
    seen = []

    def look(inner):
        grads = [p.grad for p in plug[0].partial.parameters()]
        assert all(g is not None for g in grads)
        with_gradient = [n for n, p in inner.named_parameters() if p.grad is not None]
        assert len(with_gradient) == len(grads)
        seen.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))))

    run = trainer(model, tmp_path, [Watch(look)], plug, max_grad_norm=0.05, logging_steps=1)
    run.train()
    reported = logged(run, "grad_norm")
    assert len(seen) == len(reported) == STEPS
    assert min(reported) > 0.05  # so that every step was clipped
    assert seen == pytest.approx([0.05] * STEPS, rel=1e-4)

    # What was reported before clipping is the norm of those entries in a full backward pass.
    full = randomised(llama)
    batch = {k: torch.stack([Rows()[i][k] for i in order(run)]) for k in ("input_ids", "labels")}
    full(**batch).loss.backward()
    selection = plug[0].partial.selection
    total = 0.0
    for name, p in full.named_parameters():
        for block in selection.blocks.get(name, []):
            top, bottom, left, right = selection.grid(name).bounds(int(block))
            matrix = p.grad.reshape(p.shape[0] if p.ndim > 1 else 1, -1)
            total += float(matrix[top:bottom, left:right].double().square().sum())
    assert reported[0] == pytest.approx(total**0.5, rel=1e-4)


def order(run):
    """Row numbers of the first batch of a run with this seed."""
    torch.manual_seed(run.args.seed)
    first = next(iter(run.get_train_dataloader()))["input_ids"]
    rows = Rows().rows
    return [int((rows == row).all(1).nonzero()[0, 0]) for row in first]


# -- evaluation, generation, saving ------------------------------------------------------


def test_evaluation_and_generation_in_the_middle_use_the_values_of_that_moment(tmp_path):
    plug = tiles()
    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, model, metrics, **kwargs):
            again = randomised(llama)
            again.load_state_dict(model.state_dict())
            again.eval()
            was = model.training
            model.eval()
            prompt = HELD_OUT[0]["input_ids"]
            tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
            assert torch.equal(tokens, again.generate(prompt, max_new_tokens=4, do_sample=False))
            with torch.no_grad():
                mean = sum(float(again(**{k: v[None] for k, v in row.items()}).loss)
                           for row in Rows(n=4)) / 4  # fmt: skip
            assert metrics["eval_loss"] == pytest.approx(mean, rel=1e-5)
            model.train(was)
            seen.append(metrics["eval_loss"])

    watched, plain = randomised(llama), randomised(llama)
    options = {"eval_strategy": "steps", "eval_steps": 4}
    trainer(watched, tmp_path / "a", [Look()], plug, **options).train()
    assert len(set(seen)) == 3  # at steps 4, 8 and at the end
    trainer(plain, tmp_path / "b", optimizer=tiles()).train()
    after = state(watched)
    for name, value in state(plain).items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_a_normal_model(tmp_path, name):
    model = randomised(MODELS[name])
    keys = set(load_keys(randomised(MODELS[name]), tmp_path / "plain"))
    run = trainer(model, tmp_path, optimizer=tiles(master_dtype=torch.float64))
    run.train()
    run.save_model(str(tmp_path / "by-trainer"))
    assert set(load_keys(model, tmp_path / "by-model")) == keys
    model.eval()
    for folder in ("by-trainer", "by-model"):
        assert set(load_file(tmp_path / folder / "model.safetensors")) == keys
        again = type(model).__mro__[0].from_pretrained(tmp_path / folder).eval()
        assert torch.equal(again(**HELD_OUT[0]).logits, model(**HELD_OUT[0]).logits)


def load_keys(model, folder):
    model.save_pretrained(folder)
    return load_file(Path(folder) / "model.safetensors")


def test_the_best_weights_come_back_and_training_can_go_on(tmp_path):
    """The Trainer loads the best checkpoint into the model that is still partial."""
    model = randomised(llama).to(torch.bfloat16)
    plug = tiles(master_dtype=torch.float32)
    run = trainer(
        model, tmp_path, optimizer=plug, load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=5, save_strategy="steps", save_steps=5,
        greater_is_better=True,  # so that the earlier checkpoint, of higher loss, counts as best
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-5")
    best = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    assert any(not torch.equal(best[k], last[k]) for k in best)
    for key, value in model.state_dict().items():
        assert torch.equal(value, best[key]), key
    for blocks in plug[0].partial.packed:  # the trained tensors are those weights, to the rounding
        assert torch.equal(blocks.packed.to(torch.bfloat16), blocks.gather(blocks.full.detach()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run.train()
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints", "end"])
def test_what_is_pushed_to_the_hub_is_a_normal_model(tmp_path, monkeypatch, strategy):
    uploads = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return SimpleNamespace(repo_id=f"someone/{name}")

        def upload_folder(self, *, folder_path, ignore_patterns=(), path_in_repo="", **kwargs):
            folder = Path(folder_path)
            files = [p.name for p in folder.iterdir() if p.is_file()]
            uploads.append((path_in_repo, files, load_file(folder / "model.safetensors")))
            assert not files or "checkpoint" in folder.name or ignore_patterns
            return SimpleNamespace(done=lambda: True, result=lambda: None)

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    keys = set(load_keys(randomised(llama), tmp_path / "plain"))
    model = randomised(llama)
    run = trainer(
        model, tmp_path / "run", optimizer=tiles(), push_to_hub=True, save_strategy="steps",
        save_steps=5, hub_strategy=strategy, hub_always_push=True,
    )  # fmt: skip
    run.train()
    monkeypatch.setattr(run, "create_model_card", lambda **kwargs: None)
    run.push_to_hub()
    top = [(files, tensors) for path, files, tensors in uploads if not path]
    assert len(top) == (1 if strategy == "end" else 3)
    for files, tensors in top:
        assert set(tensors) == keys
        assert not any("fastgrad" in f for f in files)
        assert {"config.json", "model.safetensors", "training_args.bin"} <= set(files)
    for key, value in model.state_dict().items():
        assert torch.equal(top[-1][1][key], value)
    kept = [files for path, files, _ in uploads if path]
    assert len(kept) == (2 if strategy == "all_checkpoints" else 0)
    # A checkpoint that is pushed can be resumed from, so the partial file must be in it already.
    assert all("fastgrad_partial.safetensors" in files for files in kept)


# -- building the optimizer, and using the factory again ---------------------------------


def test_building_the_optimizer_twice_builds_it_once(tmp_path):
    plug = tiles()
    run = trainer(randomised(llama), tmp_path, optimizer=plug)
    first = run.create_optimizer()
    partial = plug[0].partial
    assert run.create_optimizer() is first
    run.train()
    assert plug[0].partial is partial
    run.train()  # a second call goes on with the same optimizer, as Trainer's own does
    assert plug[0].partial is partial
    assert {id(p) for g in first.param_groups for p in g["params"]} == set(
        map(id, partial.parameters())
    )


def test_one_factory_serves_several_trainers_and_model_init(tmp_path):
    """As a hyperparameter search does: each run has a model and a partial of its own."""
    plug = tiles()
    alone = randomised(llama)
    trainer(alone, tmp_path / "alone", optimizer=tiles()).train()

    one, two = randomised(llama), randomised(llama, seed=5)
    trainer(one, tmp_path / "one", optimizer=plug).train()
    kept = plug[0].partial
    trainer(two, tmp_path / "two", optimizer=plug).train()
    assert plug[0].partial is not kept
    assert (kept.model, plug[0].partial.model) == (one, two)
    fg.save_delta(kept, tmp_path / "one.safetensors")
    for name, value in state(alone).items():
        assert torch.equal(state(one)[name], value), name

    again = trainer(lambda: randomised(llama), tmp_path / "three", optimizer=plug,
                    save_strategy="steps", save_steps=5)  # fmt: skip
    again.train()
    first, model = plug[0].partial, again.model
    again.train()  # model_init: a new model each time
    assert plug[0].partial is not first
    assert again.model is not model
    for name, value in state(model).items():
        assert torch.equal(state(again.model)[name], value), name
    names = [type(c).__name__ for c in again.callback_handler.callbacks]
    assert names.count("PartialCheckpoints") == 1


@pytest.mark.parametrize("make", [tiles, whole])
def test_a_second_trainer_on_a_partial_model_is_refused(tmp_path, make):
    model = randomised(llama)
    plug = make()
    trainer(model, tmp_path, optimizer=plug).train()
    with pytest.raises(PartialError, match="being trained partially already"):
        trainer(model, tmp_path, optimizer=plug).train()
    plug[0].partial.remove()
    trainer(model, tmp_path, optimizer=plug).train()


def test_a_selection_for_another_model_is_refused(tmp_path):
    model = llama(layers=3)
    chosen = fg.select(None, model=model, fraction=0.3, ranking="last")  # its third layer
    run = trainer(randomised(llama), tmp_path, optimizer=sparse_adamw(selection=chosen))
    with pytest.raises(SelectionError, match="another model"):
        run.train()
    stats, _ = measure(randomised(llama, seed=3), HELD_OUT)
    chosen = fg.select(stats, fraction=0.3)
    run = trainer(randomised(llama), tmp_path, optimizer=sparse_adamw(selection=chosen))
    with pytest.raises(SelectionError, match="made for weights"):
        run.train()


@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_training_after_remove_says_so(tmp_path, when):
    plug = tiles()

    class Remove(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if when == "in the middle" and state.global_step == 3:
                plug[0].partial.remove()

    run = trainer(randomised(llama), tmp_path, [Remove()], optimizer=plug)
    if when == "before":
        run.train()
        plug[0].partial.remove()
    with pytest.raises(PartialError, match=r"removed.*make_partial again"):
        run.train()


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_engines_that_replace_parameters_are_refused(tmp_path, engine):
    run = trainer(randomised(llama), tmp_path, optimizer=tiles())
    setattr(run, f"is_{engine}_enabled", True)
    with pytest.raises(PartialError, match=rf"{engine} engine.*distributed\.md"):
        run.create_optimizer()
    assert not any("packed" in n for n, _ in run.model.named_parameters())


def test_a_subclass_and_nested_calls_find_the_trainer(tmp_path):
    """Hyperparameters come from the Trainer that builds, also where a subclass wraps the call."""

    class Wrapped(Trainer):
        def create_optimizer(self, *args, **kwargs):
            return (lambda: super(Wrapped, self).create_optimizer(*args, **kwargs))()

    plug = tiles()
    run = Wrapped(model=randomised(llama), args=arguments_of(tmp_path, learning_rate=3e-3),
                  train_dataset=Rows(), optimizer_cls_and_kwargs=plug)  # fmt: skip
    assert run.create_optimizer().param_groups[0]["lr"] == 3e-3
