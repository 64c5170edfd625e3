"""Deltas that must not be written, and models that cannot take one: nothing is half done."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import fastgrad as fg
from fastgrad import delta as deltas
from fastgrad.errors import DeltaError
from fastgrad.identity import model_parameters, weights_hash
from tests.models import MODELS, randomised
from tests.test_delta import trained
from tests.test_partial import selection_of


def saved(tmp_path, spec="row"):
    base, _, partial, _ = trained(spec)
    fg.save_delta(partial, tmp_path / "d.safetensors")
    return base, partial


@pytest.mark.parametrize("spec", ["row", "module"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_partial_model_is_refused(tmp_path, spec, inside):
    base, _ = saved(tmp_path)
    partial = fg.make_partial(base, selection_of(base, spec))
    before = weights_hash(base)

    def load():
        with pytest.raises(DeltaError, match=r"trained partially.*Remedy.*remove"):
            fg.load_delta(base, tmp_path / "d.safetensors")

    if inside:
        with partial.suspended():
            load()
    else:
        load()
    assert weights_hash(base) == before
    partial.remove()
    applied = fg.load_delta(base, tmp_path / "d.safetensors")
    partial = fg.make_partial(base, selection_of(base, spec))
    with pytest.raises(DeltaError, match="trained partially"):
        applied.revert()
    partial.remove()
    applied.revert()
    assert weights_hash(base) == before


@pytest.mark.parametrize("spec", ["row", "module"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_delta_that_nobody_could_load_is_not_written(tmp_path, spec, value):
    _, partial = saved(tmp_path, spec)
    before = (tmp_path / "d.safetensors").read_bytes()
    name, ids = list(partial.selection.blocks.items())[-2]
    grid = partial.selection.grid(name)
    packed = dict(partial.named_parameters())[name]
    with torch.no_grad():
        packed.view(-1)[-1] = value  # in the last block
    partial.sync()
    where = name if grid.is_whole else f"{name}, block {ids[-1]} of '{grid.spec}'"
    with pytest.raises(DeltaError, match=rf"^{where} holds NaN or infinity.*Remedy"):
        fg.save_delta(partial, tmp_path / "d.safetensors")
    assert (tmp_path / "d.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.mark.parametrize("error", [RuntimeError("no memory left"), KeyboardInterrupt()])
def test_an_error_between_two_parameters_leaves_the_model_as_it_was(tmp_path, monkeypatch, error):
    base, _ = saved(tmp_path)
    before, write = weights_hash(base), deltas._write
    calls = []

    def failing(p, grid, ids, values):
        calls.append(1)
        if len(calls) == 3:
            p.detach().view(-1)[0] += 1  # half written
            raise error
        write(p, grid, ids, values)

    monkeypatch.setattr(deltas, "_write", failing)
    with pytest.raises(type(error)):
        fg.load_delta(base, tmp_path / "d.safetensors")
    assert weights_hash(base) == before
    monkeypatch.setattr(deltas, "_write", write)
    applied = fg.load_delta(base, tmp_path / "d.safetensors")
    with_delta = weights_hash(base)
    calls.clear()
    monkeypatch.setattr(deltas, "_write", failing)
    with pytest.raises(type(error)):
        applied.revert()
    assert weights_hash(base) == with_delta
    monkeypatch.setattr(deltas, "_write", write)
    applied.revert()  # as if nothing had been
    assert weights_hash(base) == before


@pytest.mark.parametrize("check_base", [True, False])
def test_a_model_without_content_is_refused_with_the_remedy(tmp_path, check_base):
    saved(tmp_path)
    with torch.device("meta"):
        empty = MODELS["llama"]()
    with pytest.raises(DeltaError, match=r"meta device and has no content.*Remedy"):
        fg.load_delta(empty, tmp_path / "d.safetensors", check_base=check_base)


def test_make_partial_and_load_partial_of_a_model_without_content(tmp_path):
    _, partial = saved(tmp_path)
    partial.save(tmp_path / "p.safetensors")
    with torch.device("meta"):
        empty = MODELS["llama"]()
    with pytest.raises(fg.errors.PartialError, match=r"meta device.*Remedy"):
        fg.make_partial(empty, selection_of(empty, "row"))
    with pytest.raises(fg.errors.PartialError, match=r"meta device.*Remedy"):
        fg.load_partial(empty, tmp_path / "p.safetensors")
    planned = fg.make_partial(empty, selection_of(empty, "row"), hash_base=False)
    assert planned.n_parameters > 0
    assert all(p.is_meta for p in planned.parameters())
    planned.remove()
    assert list(model_parameters(empty))


def test_infinity_where_nothing_was_trained_is_no_obstacle(tmp_path):
    """A mask among the weights, say."""
    base = randomised(MODELS["llama"])
    with torch.no_grad():
        model_parameters(base)["model.norm.weight"][0] = float("inf")
    shapes = {n: tuple(p.shape) for n, p in model_parameters(base).items()}
    blocks = {"model.layers.0.mlp.up_proj.weight": np.array([1])}
    model = copy.deepcopy(base)
    partial = fg.make_partial(model, fg.Selection(shapes, "row", blocks))
    with torch.no_grad():
        next(partial.parameters()).add_(1)
    fg.save_delta(partial, tmp_path / "d.safetensors")
    fg.load_delta(base, tmp_path / "d.safetensors")
    assert weights_hash(base) == weights_hash(model)
