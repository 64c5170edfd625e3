"""The Trainer's plugs: a callback that leaves no trace, an optimizer that trains a part."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastgrad as fg
from fastgrad.errors import BlueprintError, FastgradError, PartialError
from fastgrad.identity import model_parameters
from fastgrad.integrations.transformers import (
    BlueprintCallback,
    measure,
    sparse_adamw,
    untouched,
)
from tests.models import bert, llama, randomised
from tests.training_runs import HELD_OUT, STEPS, state, trainer


def with_dropout():
    """Dropout draws random numbers: a callback that draws some too would change the run."""
    return randomised(lambda: llama(tied=True, attention_dropout=0.2))


# -- the callback ------------------------------------------------------------------------


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


def test_several_processes_are_refused(tmp_path):
    callback = BlueprintCallback(HELD_OUT)

    class Two:
        world_size = 2

    with pytest.raises(FastgradError, match="one process"):
        callback.on_train_begin(Two(), None, None)


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


# -- measuring ---------------------------------------------------------------------------


def test_measure_equals_a_probe_by_hand_and_changes_nothing():
    model = randomised(bert)
    model.train()
    model.bert.encoder.eval()
    model(**HELD_OUT[0]).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    values = {n: None if g is None else g.clone() for n, g in grads.items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    stats, loss = measure(model, HELD_OUT)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    for name, p in model.named_parameters():
        assert p.grad is grads[name]  # the same tensor, not a copy
        assert p.grad is None or torch.equal(p.grad, values[name])

    model.eval()
    losses = []
    with fg.Probe(model) as probe:
        for batch in HELD_OUT:
            result = model(**batch).loss
            result.backward()
            losses.append(float(result.detach()))
    assert loss == pytest.approx(sum(losses) / 2)
    torch.testing.assert_close(
        torch.tensor(stats.grad_norm), torch.tensor(probe.stats().grad_norm)
    )


def test_a_failure_inside_restores_everything():
    model = randomised(llama)
    model.train()
    model(**HELD_OUT[0]).loss.backward()
    grad = model.lm_head.weight.grad
    with pytest.raises(ZeroDivisionError), untouched(model):
        raise ZeroDivisionError
    assert model.training
    assert model.lm_head.weight.grad is grad


def test_batches_without_labels_or_none_at_all_are_refused():
    model = randomised(llama)
    with pytest.raises(FastgradError, match="labels"):
        measure(model, [{"input_ids": HELD_OUT[0]["input_ids"]}])
    with pytest.raises(FastgradError, match="no batch"):
        measure(model, [])


# -- the optimizer -----------------------------------------------------------------------


def blueprint_of(model, folder):
    stats, _ = measure(model, HELD_OUT, blocks="16x16")
    fg.Blueprint.from_stats(stats, model=model).save_pretrained(folder)
    return stats


@pytest.mark.parametrize("blocks", ["module", "16x16"])
def test_trainer_trains_the_selection_alone_at_its_own_rate(tmp_path, blocks):
    model = randomised(lambda: llama(tied=True))
    blueprint_of(model, tmp_path)
    before, keys = state(model), set(model.state_dict())
    factory, kwargs = sparse_adamw(blueprint=tmp_path, fraction=0.2, blocks=blocks)
    rates = []

    def watch(*args):
        rates.append(run.optimizer.param_groups[0]["lr"])

    run = trainer(model, tmp_path, optimizer=(factory, kwargs), weight_decay=0.1)
    with pytest.raises(PartialError, match="not built"):
        _ = factory.partial
    run.create_optimizer()
    run.optimizer.register_step_pre_hook(watch)
    run.train()

    # 1e-2 and the cosine come from TrainingArguments: nobody repeated them
    assert len(rates) == STEPS
    assert rates[0] == pytest.approx(1e-2)
    assert 0 < rates[-1] < 1e-3
    selection = factory.partial.selection
    assert selection.spec == blocks
    assert 0 < selection.n_parameters <= 0.2 * selection.n_total
    for name, p in model.named_parameters():
        if name not in before:
            continue  # a packed parameter
        changed = p.detach() != before[name]
        if name not in selection.blocks:
            assert not changed.any(), name
        else:
            assert changed.any(), name
            assert int(changed.sum()) <= selection.n_selected(name)
    assert set(model.state_dict()) == keys
    decays = {p: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    for name, p in factory.partial.named_parameters():
        assert decays[p] == (0.1 if len(selection.shapes[name]) >= 2 else 0.0)


def test_the_delta_after_a_trainer_run_restores_the_model(tmp_path):
    model = randomised(llama)
    base = randomised(llama)
    factory, kwargs = sparse_adamw(ranking="last", fraction=0.3)
    trainer(model, tmp_path, optimizer=(factory, kwargs)).train()
    fg.save_delta(factory.partial, tmp_path / "delta.safetensors")
    factory.partial.remove()
    fg.load_delta(base, tmp_path / "delta.safetensors")
    assert fg.weights_hash(base) == fg.weights_hash(model)


def test_a_ready_selection_and_given_hyperparameters_win(tmp_path):
    model = randomised(llama)
    selection = fg.select(None, model=model, fraction=0.5, ranking="random", seed=4)
    factory, kwargs = sparse_adamw(selection=selection, lr=3e-3, betas=(0.8, 0.9), eps=1e-6,
                                   weight_decay=0.3)  # fmt: skip
    run = trainer(model, tmp_path, optimizer=(factory, kwargs))
    run.create_optimizer()
    group = run.optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.9), 1e-6)
    assert factory.partial.selection is selection


def test_wrong_use_of_the_factory(tmp_path):
    with pytest.raises(FastgradError, match="either a selection, or a budget"):
        sparse_adamw(blueprint=tmp_path)
    model = randomised(llama)
    selection = fg.select(None, model=model, fraction=0.5, ranking="last")
    with pytest.raises(FastgradError, match="either a selection, or a budget"):
        sparse_adamw(selection=selection, fraction=0.2)
    factory, _ = sparse_adamw(selection=selection)
    with pytest.raises(FastgradError, match="no learning rate"):
        factory()(model)
    factory, _ = sparse_adamw(blueprint=tmp_path / "nowhere", fraction=0.2, lr=1e-3)
    with pytest.raises(BlueprintError, match="nowhere"):
        factory()(model)
    assert not any("packed" in n for n, _ in model.named_parameters())


def test_outside_a_trainer_a_rate_is_enough():
    model = randomised(llama)
    factory, kwargs = sparse_adamw(ranking="last", fraction=0.3, lr=1e-2)
    optimizer = factory()(model, **kwargs)
    before = state(model)
    model(**HELD_OUT[0]).loss.backward()
    optimizer.step()
    names = set(dict(factory.partial.named_parameters()))
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), before[name]) == (name not in names), name


def test_without_transformers_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import fastgrad as fg\n"
        "integrations = fg.integrations\n"
        "try: integrations.transformers\n"
        "except fg.errors.MissingExtraError as e: assert 'fastgrad[hf]' in str(e)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_integration_is_an_attribute_error():
    assert dir(fg.integrations) == ["transformers"]
    with pytest.raises(AttributeError, match="nothing"):
        _ = fg.integrations.nothing
