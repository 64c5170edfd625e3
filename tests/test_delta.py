"""Delta files: round trips bit for bit, refusals, nothing lost when a write fails."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import fastgrad as fg
from fastgrad.errors import DeltaError
from fastgrad.partial import make_partial
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import selection_of


def trained(spec="8x8", architecture="llama", dtype=torch.float32, master=None):
    model = randomised(MODELS[architecture]).to(dtype)
    base = copy.deepcopy(model)
    partial = make_partial(model, selection_of(model, spec), master_dtype=master)
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    for step in range(2):
        model(**batch_of(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, model, partial, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["module", "row", "8x8"])
def test_delta_round_trip_and_revert(tmp_path, spec, dtype):
    base, model, partial, _ = trained(spec, "llama-tied", dtype, torch.float32)
    size = fg.save_delta(partial, tmp_path / "d.safetensors")
    assert size == (tmp_path / "d.safetensors").stat().st_size
    before = copy.deepcopy(base.state_dict())
    applied = fg.load_delta(base, tmp_path / "d.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(base.state_dict()[key], value), key
    applied.revert()
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_delta_refuses_other_weights_and_damage(tmp_path):
    base, _, partial, _ = trained()
    path = tmp_path / "d.safetensors"
    fg.save_delta(partial, path)
    with torch.no_grad():
        other = copy.deepcopy(base)
        other.lm_head.weight[0, 0] += 1
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(DeltaError, match="made for weights"):
        fg.load_delta(other, path)
    with pytest.raises(DeltaError, match="another model"):
        fg.load_delta(randomised(MODELS["gpt2"]), path)
    with pytest.raises(DeltaError, match="no delta file"):
        fg.load_delta(base, tmp_path / "none.safetensors")
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DeltaError, match="damaged"):
            fg.load_delta(other, path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


HOSTILE = [
    {"shapes": {"lm_head.weight": [float("inf"), 2]}},
    {"shapes": {"lm_head.weight": "61"}},
    {"shapes": [1, 2]},
    {"base_hash": 5},
    {"base_hash": None},
    {"spec": "8x8\n"},
    {"spec": 3},
    {"format": None},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_hostile_delta_headers_are_refused(tmp_path, change):
    from safetensors import safe_open
    from safetensors.torch import save_file

    base, _, partial, _ = trained()
    path = tmp_path / "d.safetensors"
    fg.save_delta(partial, path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fastgrad"]) | change
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"fastgrad": json.dumps(header)})
    with pytest.raises(DeltaError):
        fg.load_delta(base, path)


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([0.7, 3.2]),
        torch.tensor([2, 1]),
        torch.tensor([True, False]),
        torch.tensor([[0, 1]]),
        torch.tensor([-1, 1]),
        torch.tensor([0, 99999]),
    ],
    ids=str,
)
def test_hostile_block_numbers_and_values_are_refused(tmp_path, ids):
    from safetensors import safe_open
    from safetensors.torch import save_file

    base, _, partial, _ = trained()
    before = copy.deepcopy(base.state_dict())
    path = tmp_path / "d.safetensors"
    fg.save_delta(partial, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    name = "model.layers.0.mlp.up_proj.weight"
    changed = tensors | {f"blocks/{name}": ids, f"values/{name}": torch.zeros(2, 8, 8)}
    for content in (changed, tensors | {f"values/{name}": tensors[f"values/{name}"] * torch.nan}):
        save_file(content, path, metadata=metadata)
        with pytest.raises(DeltaError):
            fg.load_delta(base, path)
    metadata = {"fastgrad": "[" * 100_000}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(DeltaError):
        fg.load_delta(base, path)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_a_failed_save_leaves_the_old_delta(tmp_path, monkeypatch):
    _, _, partial, _ = trained()
    path = tmp_path / "d.safetensors"
    fg.save_delta(partial, path)
    old = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        fg.save_delta(partial, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]
