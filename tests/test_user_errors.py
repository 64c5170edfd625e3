"""What a user gets to read who hands over the wrong thing: the thing by name, and the remedy."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastgrad as fg
from fastgrad.cli import main
from fastgrad.errors import (
    DeltaError,
    PartialError,
    ProbeError,
    ResourceError,
    SelectionError,
)
from fastgrad.partial import make_partial
from tests.models import MODELS, randomised
from tests.test_partial import selection_of


def partial_of(spec="16x8"):
    model = randomised(MODELS["llama"])
    return make_partial(model, selection_of(model, spec))


def test_one_changed_byte_of_a_delta_is_found(tmp_path):
    partial, path = partial_of(), tmp_path / "delta.safetensors"
    base = randomised(MODELS["llama"])
    fg.save_delta(partial, path)
    fg.load_delta(base, path).revert()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    name = next(n for n in tensors if n.startswith("values/"))
    tensors[name].view(-1).view(torch.int32)[0] ^= 1
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(DeltaError, match="not those that were saved"):
        fg.load_delta(base, path)
    assert "content_hash" in json.loads(metadata["fastgrad"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fg.Probe("gpt2"), ProbeError, "not str 'gpt2'.*load it first"),
        (lambda: fg.select("my-model/", fraction=0.2), SelectionError, "from_pretrained"),
        (
            lambda: make_partial(torch.nn.Linear(2, 2), None, master_dtype="float32"),
            PartialError,
            "torch.float32",
        ),
        (lambda: fg.save_delta(torch.nn.Linear(2, 2), "x"), DeltaError, "make_partial returned"),
        (
            lambda: fg.plan_memory(torch.nn.Linear(2, 2), batch_shape=8),
            ResourceError,
            r"\(rows, tokens\)",
        ),
        (
            lambda: fg.Blueprint.from_pretrained("meta-llama/none"),
            fg.errors.BlueprintError,
            "cannot be fetched from the hub",
        ),
    ],
)
def test_the_wrong_thing_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_memory_budget_without_a_batch_says_what_it_leaves_out():
    model = randomised(MODELS["llama"])
    small = fg.select(None, model=model, memory="1GiB", ranking="first")
    assert "activations are not counted" in small.summary()
    assert "note" not in fg.select(None, model=model, fraction=0.2, ranking="first").summary()


def test_damaged_weights_are_one_line_on_the_command_line(tmp_path, capsys):
    folder = tmp_path / "model"
    model = randomised(MODELS["llama"])
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "text.txt").write_text("a b c " * 50)
    with pytest.raises(SystemExit) as stopped:
        main(["probe", str(folder), str(tmp_path / "text.txt")])
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert "error:" in told
    assert "Traceback" not in told
    assert len(told) < 600


def test_blueprint_callback_refuses_a_run_that_trains_blocks():
    from fastgrad.integrations.transformers import BlueprintCallback

    class Arguments:
        world_size = 1

    callback = BlueprintCallback([{"input_ids": torch.ones(1, 2, dtype=torch.long)}])
    with pytest.raises(PartialError, match=r"blocks of them.*Remedy"):
        callback.on_train_begin(Arguments(), None, None, model=partial_of().model)

    class State:
        max_steps, stateful_callbacks = 10, {}

    model = randomised(MODELS["llama"])
    next(model.parameters()).requires_grad_(False)
    with pytest.warns(UserWarning, match="1 parameters are frozen"):
        callback.on_train_begin(Arguments(), State(), None, model=model)
