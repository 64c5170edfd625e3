"""The Trainer's plugs: measuring that leaves no trace, an optimizer that trains a part."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastgrad as fg
from fastgrad.errors import BlueprintError, FastgradError, PartialError
from fastgrad.integrations.transformers import (
    measure,
    sparse_adamw,
    untouched,
)
from tests.models import bert, llama, randomised
from tests.training_runs import HELD_OUT, STEPS, state, trainer

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
    assert dir(fg.integrations) == ["peft_export", "transformers"]
    with pytest.raises(AttributeError, match="nothing"):
        _ = fg.integrations.nothing
