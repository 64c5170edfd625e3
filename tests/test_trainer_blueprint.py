"""BlueprintCallback: a Trainer that measures as it trains, which training does not notice."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

import fastgrad as fg
from fastgrad.errors import FastgradError, PartialError
from fastgrad.identity import model_parameters
from fastgrad.integrations.transformers import BlueprintCallback, measure, sparse_adamw
from tests.models import llama, randomised
from tests.training_runs import HELD_OUT, arguments_of, logged, state, trainer


def with_dropout():
    """Dropout draws random numbers: a callback that draws some too would change the run."""
    return randomised(lambda: llama(tied=True, attention_dropout=0.2))


def same_weights(one, other):
    after = state(other)
    for name, value in state(one).items():
        assert torch.equal(value, after[name]), name


def content(blueprint):
    """The file's text but for the day."""
    document = json.loads(blueprint.to_json())
    del document["provenance"]["created"]
    return json.dumps(document)


def points(callback):
    return [(m.label, m.step) for m in callback.measurements]


def test_training_with_the_callback_is_bit_for_bit_training_without(tmp_path):
    plain, watched = with_dropout(), with_dropout()
    trainer(plain, tmp_path / "a").train()
    callback = BlueprintCallback(HELD_OUT)
    trainer(watched, tmp_path / "b", [callback]).train()
    after = state(watched)
    for name, value in state(plain).items():
        assert torch.equal(value, after[name]), name
    assert watched.training == plain.training
    assert all(p.grad is None for p in watched.parameters())


def test_it_measures_at_the_fractions_and_describes_the_saved_weights(tmp_path):
    model = randomised(lambda: llama(tied=True))
    callback = BlueprintCallback(
        iter(HELD_OUT), at=(0.8, 0.5, 1.0), blocks="16x16", domain_tags=["noise"]
    )
    run = trainer(model, tmp_path, [callback])
    run.train()
    run.save_model(str(tmp_path))
    assert [(m.fraction, m.step) for m in callback.measurements] == [(0.5, 5), (0.8, 8), (1.0, 10)]
    logged = [e for e in run.state.log_history if "blueprint_loss" in e]
    assert [e["step"] for e in logged] == [5, 8, 10]
    norm = callback.measurements[0].stats.grad_norm[0]
    assert logged[0]["grad_norm/model.embed_tokens.weight"] == pytest.approx(norm)

    released = fg.Blueprint.from_pretrained(tmp_path)
    assert released.domain_tags == ["noise"]
    assert [c.step for c in released.file.checkpoints] == [5, 8, 10]
    assert (tmp_path / "model.safetensors").exists()
    saved = type(model).from_pretrained(tmp_path)
    assert released.weights_hash == fg.weights_hash(saved)
    chosen = fg.select(released, model=saved, fraction=0.3, blocks="16x16")
    assert 0 < chosen.n_parameters <= 0.3 * chosen.n_total


def test_the_best_weights_are_the_ones_described(tmp_path):
    """With load_best_model_at_end, training ends with other weights than its last step's."""
    model = randomised(llama)
    callback = BlueprintCallback(HELD_OUT)
    run = trainer(
        model, tmp_path, [callback], load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=5, save_strategy="steps", save_steps=5,
        greater_is_better=True,  # so that the earlier checkpoint, of higher loss, counts as best
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-5")
    assert callback.blueprint is not None
    assert callback.blueprint.weights_hash == fg.weights_hash(model)


def test_a_generator_is_read_once_and_kept():
    callback = BlueprintCallback(batch for batch in HELD_OUT)
    assert len(list(callback.batches)) == len(list(callback.batches)) == 2


@pytest.mark.parametrize("at", [(), (0.0,), (0.5, 1.5)])
def test_fractions_outside_training_are_refused(at):
    with pytest.raises(FastgradError, match=r"fractions in \(0, 1\]"):
        BlueprintCallback(HELD_OUT, at=at)


@pytest.mark.parametrize("blocks", ["module", "16x16"])
@pytest.mark.parametrize("master", [None, torch.float64])
def test_a_partial_run_is_measured_whole_and_trained_as_without(tmp_path, blocks, master):
    def plug():
        return sparse_adamw(ranking="random", fraction=0.3, blocks=blocks, master_dtype=master)

    plain, watched = with_dropout(), with_dropout()
    trainer(plain, tmp_path / "a", optimizer=plug()).train()
    callback, known = BlueprintCallback(HELD_OUT), plug()
    trainer(watched, tmp_path / "b", [callback], known).train()
    after = state(watched)
    for name, value in state(plain).items():
        assert torch.equal(value, after[name]), name
    # What it saw is what a probe sees of a plain model with these weights, all of them.
    saved = with_dropout()
    saved.load_state_dict(watched.state_dict())
    expected, loss = measure(saved, HELD_OUT)
    last = callback.measurements[-1]
    assert last.stats.names == expected.names == list(model_parameters(saved))
    torch.testing.assert_close(
        torch.tensor(last.stats.grad_norm), torch.tensor(expected.grad_norm)
    )
    assert last.loss == pytest.approx(loss)
    assert callback.blueprint.weights_hash == fg.weights_hash(saved)
    assert not callback.blueprint.file.model_dump()["dead"]
    known[0].partial.remove()
    assert all(p.requires_grad for p in watched.parameters())


def test_a_partial_model_made_by_hand_has_to_be_named(tmp_path):
    def run(**options):
        model = randomised(llama)
        chosen = fg.select(None, model=model, fraction=0.3, ranking="random", blocks="16x16")
        partial = fg.make_partial(model, chosen)
        optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
        if options:
            options["partial"] = partial
        callback = BlueprintCallback(HELD_OUT, **options)
        made = trainer(model, tmp_path, [callback])
        made.optimizer = optimizer
        made.train()
        return callback, model

    with pytest.raises(PartialError, match=r"pass partial=\.\.\."):
        run()
    callback, model = run(partial=True)
    assert callback.blueprint.weights_hash == fg.weights_hash(model)


# -- when --------------------------------------------------------------------------------


def test_steps_are_optimizer_steps_and_epochs_count(tmp_path):
    """24 rows, 4 at a time, 2 batches a step: 3 steps in each of 2 epochs."""
    callback = BlueprintCallback(HELD_OUT, at=(0.5, 0.7))
    model = randomised(llama)
    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = fg.weights_hash(model)

    run = trainer(
        model, tmp_path, [Watch(), callback], max_steps=-1, num_train_epochs=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    run.train()
    assert points(callback) == [("50%", 3), ("70%", 4), ("100%", 6)]
    assert [m.weights_hash for m in callback.measurements] == [seen[3], seen[4], seen[6]]
    assert callback.blueprint.weights_hash == seen[6]


def test_steps_and_every_so_many(tmp_path):
    callback = BlueprintCallback(HELD_OUT, steps=(1, 10), every=4)
    trainer(randomised(llama), tmp_path, [callback]).train()
    assert points(callback) == [("step 1", 1), ("step 4", 4), ("step 8", 8), ("100%", 10)]


def test_a_run_that_stops_early_is_measured_at_its_end(tmp_path):
    callback = BlueprintCallback(HELD_OUT)
    model = randomised(llama)
    run = trainer(
        model, tmp_path, [EarlyStoppingCallback(2), callback], load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        greater_is_better=True,  # loss falls: the first evaluation stays the best
    )  # fmt: skip
    run.train()
    assert run.state.global_step == 6
    assert points(callback) == [("50%", 5), ("best", 2)]
    assert callback.blueprint.weights_hash == fg.weights_hash(model)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 7

    callback = BlueprintCallback(HELD_OUT)
    trainer(model, tmp_path, [Stop(), callback]).train()
    assert points(callback) == [("50%", 5), ("end", 7)]
    assert callback.blueprint.weights_hash == fg.weights_hash(model)


# -- resume ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [False, True], ids=["whole", "partial"])
@pytest.mark.parametrize(
    "stop", [pytest.param(4, marks=pytest.mark.slow), 6, pytest.param(8, marks=pytest.mark.slow)]
)
def test_a_resumed_run_writes_the_blueprint_of_the_uninterrupted_one(tmp_path, part, stop):
    def start(folder):
        plug = sparse_adamw(ranking="random", fraction=0.3) if part else None
        callback = BlueprintCallback(HELD_OUT, blocks="16x16", domain_tags=["noise"])
        return callback, trainer(
            with_dropout(), folder, [callback], plug, save_strategy="steps", save_steps=2
        )

    straight, run = start(tmp_path)
    run.train()
    first = run.state.log_history
    for folder in tmp_path.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > stop:
            shutil.rmtree(folder)
    resumed, run = start(tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert points(resumed) == points(straight) == [("50%", 5), ("80%", 8), ("100%", 10)]
    assert resumed.measurements == straight.measurements
    assert content(resumed.blueprint) == content(straight.blueprint)
    assert [e for e in first if "blueprint_loss" in e] == [
        e for e in run.state.log_history if "blueprint_loss" in e
    ]
    same_weights(straight.log.model, resumed.log.model)
    if stop == 6:
        with pytest.raises(FastgradError, match="before this run was resumed"):
            _ = resumed.measurements[0].stats


def test_a_first_part_without_the_callback(tmp_path):
    trainer(randomised(llama), tmp_path, save_strategy="steps", save_steps=6).train()
    callback = BlueprintCallback(HELD_OUT)
    run = trainer(randomised(llama), tmp_path, [callback])
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert points(callback) == [("80%", 8), ("100%", 10)]


def test_the_same_callback_serves_two_runs(tmp_path):
    callback = BlueprintCallback(HELD_OUT)
    for folder in "ab":
        trainer(randomised(llama), tmp_path / folder, [callback]).train()
        assert points(callback) == [("50%", 5), ("80%", 8), ("100%", 10)]


# -- logs --------------------------------------------------------------------------------


class Logger(TrainerCallback):
    """What an integration of the Trainer is given."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append((state.global_step, dict(logs)))


def test_loggers_are_given_flat_numbers_and_lose_nothing(tmp_path):
    plain, logger = Logger(), Logger()
    trainer(randomised(llama), tmp_path, [plain]).train()
    callback = BlueprintCallback(HELD_OUT)
    run = trainer(randomised(llama), tmp_path, [callback, logger])
    run.train()
    ours = [(step, entry) for step, entry in logger.entries if "blueprint_loss" in entry]
    assert [step for step, _ in ours] == [5, 8, 10]
    for (_, entry), measured in zip(ours, callback.measurements, strict=True):
        assert all(type(v) in (int, float) for v in entry.values()), entry
        assert entry["blueprint_loss"] == measured.loss
        assert entry["blueprint_batches"] == 2
        assert entry["blueprint_examples"] == 6
        norms = measured.stats.grad_norm
        assert entry["blueprint_grad_norm"] == pytest.approx((norms**2).sum() ** 0.5)
        for name, norm in zip(measured.stats.names, norms, strict=True):
            assert entry[f"grad_norm/{name}"] == norm
    # The training loss is logged at step 5 and 10 as it is without.
    others = [(s, e["loss"]) for s, e in logger.entries if "loss" in e]
    assert others == [(s, e["loss"]) for s, e in plain.entries if "loss" in e]
    assert [s for s, _ in others] == [5, 10]
    json.dumps(run.state.log_history, allow_nan=False)


@pytest.mark.parametrize("wanted", [None, True, False])
def test_parameters_are_logged_up_to_a_number(tmp_path, monkeypatch, wanted):
    monkeypatch.setattr("fastgrad.blueprint_log.MOST_LOGGED", 5)
    callback = BlueprintCallback(HELD_OUT, at=(1.0,), log_parameters=wanted)
    run = trainer(randomised(llama), tmp_path, [callback], max_steps=1)
    run.train()
    (entry,) = (e for e in run.state.log_history if "blueprint_loss" in e)
    names = [k for k in entry if k.startswith("grad_norm/")]
    assert len(names) == (len(callback.measurements[0].grad_norm) if wanted else 0)


def test_a_trainer_of_trl_keeps_its_own_metrics(tmp_path):
    """They are means since the last log, which a log in between would empty."""
    from tests.sft import sentences, tokenizer

    def run(callbacks):
        made = SFTTrainer(
            model=randomised(llama),
            args=arguments_of(tmp_path, SFTConfig, max_length=16),
            train_dataset=sentences(12), processing_class=tokenizer(), callbacks=callbacks,
        )  # fmt: skip
        made.train()
        return made

    plain, watched = run([]), run([BlueprintCallback(HELD_OUT, steps=[3, 8])])
    for key in ("loss", "entropy", "mean_token_accuracy"):
        assert logged(plain, key)
        assert logged(plain, key) == logged(watched, key), key
    assert len(logged(watched, "blueprint_loss")) == 3
    same_weights(plain.model, watched.model)


# -- how models are trained --------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"optim": "adafactor"},
    ],
    ids=lambda a: next(iter(a)),
)
def test_a_run_of_another_kind_is_left_alone(tmp_path, arguments):
    plain, watched = with_dropout(), with_dropout()
    trainer(plain, tmp_path / "a", max_steps=4, **arguments).train()
    callback = BlueprintCallback(HELD_OUT, steps=[1])
    trainer(watched, tmp_path / "b", [callback], max_steps=4, **arguments).train()
    same_weights(plain, watched)
    # What it saw is what a probe of the saved weights sees, at the precision of training.
    saved = with_dropout()
    saved.load_state_dict(watched.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in arguments):
        expected, loss = measure(saved, HELD_OUT)
    last = callback.measurements[-1]
    assert list(last.grad_norm.values()) == expected.grad_norm.tolist()
    assert last.loss == pytest.approx(loss, rel=1e-6)
    assert {s.coverage for s in callback.blueprint.submodules} == {"exact"}


def adapted():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(with_dropout(), config)


@pytest.mark.parametrize("frozen", [None, ["*layers.0*"]], ids=["adapters", "base"])
def test_adapters_are_measured_and_the_base_is_named(tmp_path, frozen):
    plain, watched = adapted(), adapted()
    trainer(plain, tmp_path / "a", max_steps=4).train()
    callback = BlueprintCallback(HELD_OUT, frozen=frozen)
    run = trainer(watched, tmp_path / "b", [callback], max_steps=4)
    if frozen is None:
        with pytest.warns(UserWarning, match="are frozen: the blueprint will name them"):
            run.train()
    else:
        run.train()
    same_weights(plain, watched)
    for s in callback.blueprint.submodules:
        measured = "lora" in s.name or (frozen is not None and "layers.0" in s.name)
        assert s.coverage == ("exact" if measured else "frozen"), s.name
        assert (s.grad_norm is not None) == measured
    assert not any(p.requires_grad for n, p in watched.named_parameters() if "lora" not in n)


def test_what_cannot_be_measured_is_refused_before_training(tmp_path):
    class Arguments:
        fp16, deepspeed, distributed_state = False, None, None

    arguments = Arguments()
    arguments.fp16 = True
    callback, model = BlueprintCallback(HELD_OUT), randomised(llama)
    with pytest.raises(FastgradError, match="float16"):
        callback.on_train_begin(arguments, None, None, model=model)
    for engine in ("DEEPSPEED", "MEGATRON_LM", "TP"):
        class State:
            distributed_type = engine

        arguments.distributed_state = State()
        with pytest.raises(FastgradError, match=rf"under {engine}.*Remedy"):
            callback.on_train_begin(arguments, None, None, model=model)
    with pytest.raises(FastgradError, match="not given the model"):
        callback.on_train_begin(arguments, None, None)
    model.compile(backend="eager")
    with pytest.raises(FastgradError, match=r"compiled with torch\.compile"):
        trainer(model, tmp_path, [callback]).train()


def test_a_step_before_the_beginning():
    with pytest.raises(FastgradError, match="training has not begun"):
        BlueprintCallback(HELD_OUT).on_step_end(None, None, None)
