"""Tensors of a partial model that are converted, moved, exchanged or tied after make_partial."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastgrad as fg
from fastgrad.errors import PartialError
from fastgrad.identity import model_parameters, weights_hash
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import masks_of
from tests.test_reselection import mixed

SWAP = torch.__future__.set_swap_module_params_on_conversion
OVERWRITE = torch.__future__.set_overwrite_module_params_on_conversion


@contextlib.contextmanager
def flag(setter):
    if setter is None:
        yield
        return
    setter(True)
    try:
        yield
    finally:
        setter(False)


def begin(specs, dtype=None, start=torch.float32, kind="llama-tied"):
    torch.manual_seed(0)
    model = randomised(MODELS[kind]).to(start)
    selection = mixed(model, specs, 0.4, 0)
    if "module" not in specs:  # blocks alone: nothing is trained as it stands
        blocks = {n: ids for n, ids in selection.blocks.items() if not selection.is_whole(n)}
        selection = fg.Selection(selection.shapes, selection.spec, blocks, specs=selection.specs)
    partial = fg.make_partial(model, selection, dtype)
    return partial, fg.SparseAdamW(partial.parameters(), lr=1e-2)


def train(partial, optimizer, steps=3):
    for seed in range(steps):
        partial.model(**batch_of(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("setter", [None, SWAP, OVERWRITE], ids=["default", "swap", "overwrite"])
def test_packed_blocks_follow_a_conversion(setter):
    """As if the model had had that dtype from the beginning, the optimizer too."""
    partial, optimizer = begin(["row", "8x8", "none"])
    first = [id(p) for p in partial.parameters()]
    order = [n for n, _ in partial.model.named_parameters()]
    names = {id(p): n for n, p in partial.named_parameters()}
    with flag(setter):
        partial.model.double()
    assert [id(p) for p in partial.parameters()] == first
    assert [n for n, _ in partial.model.named_parameters()] == order
    assert all(p._fastgrad_name == names[id(p)] for p in partial.parameters())
    assert all(p.dtype == torch.float64 for p in partial.model.parameters())
    masks = masks_of(partial.selection, partial.model)
    before = {n: p.clone() for n, p in model_parameters(partial.model).items()}
    train(partial, optimizer)

    expected, other = begin(["row", "8x8", "none"], start=torch.float64)
    train(expected, other)
    for name, p in model_parameters(partial.model).items():
        torch.testing.assert_close(p, model_parameters(expected.model)[name], rtol=1e-9, atol=1e-12)
        assert torch.equal(p[~masks[name]], before[name][~masks[name]])
        assert not masks[name].any() or not torch.equal(p, before[name])


@pytest.mark.parametrize("setter", [None, SWAP], ids=["default", "swap"])
def test_whole_weights_follow_a_conversion(setter):
    partial, optimizer = begin(["module", "none"])
    with flag(setter):
        partial.model.double()
    assert all(p._fastgrad_name for p in partial.parameters())
    train(partial, optimizer)
    expected, other = begin(["module", "none"], start=torch.float64)
    train(expected, other)
    for name, p in model_parameters(partial.model).items():
        torch.testing.assert_close(p, model_parameters(expected.model)[name], rtol=1e-9, atol=1e-12)
    # an optimizer step inside suspended() is still refused by name
    with partial.suspended(), pytest.raises(PartialError, match="suspended"):
        optimizer.step()


def test_whole_weights_that_were_exchanged_are_refused_by_name(tmp_path):
    partial, optimizer = begin(["module", "none"])
    name = next(iter(partial.selection.blocks))
    with flag(OVERWRITE):
        partial.model.double()
    partial.model(**batch_of()).loss.backward()
    for attempt in (
        optimizer.step,
        lambda: torch.optim.SGD(optimizer.param_groups[0]["params"], lr=1).step(),
        lambda: partial.save(tmp_path / "p.safetensors"),
        lambda: fg.save_delta(partial, tmp_path / "d.safetensors"),
        lambda: list(partial.parameters()),
        partial.suspended().__enter__,
    ):
        with pytest.raises(PartialError, match=rf"{name} .*another tensor.*Remedy"):
            attempt()
    assert not list(tmp_path.iterdir())
    model = partial.remove()
    again = fg.make_partial(model, mixed(model, ["module", "none"], 0.4, 0))
    train(again, fg.SparseAdamW(again.parameters(), lr=1e-2))


def test_an_assignment_to_a_whole_weight_is_refused_at_the_step():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    partial = fg.make_partial(model, mixed(model, ["module"], 0.9, 0))
    optimizer = torch.optim.SGD(partial.parameters(), lr=0.1)
    name = next(n for n in partial.selection.blocks if n.endswith("weight"))
    model[int(name[0])].weight = nn.Parameter(torch.zeros(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(PartialError, match=rf"{name} .*another tensor"):
        optimizer.step()


def test_an_optimizer_outlives_its_model():
    """Modules that are gone are not asked."""
    model = nn.Linear(4, 4)
    partial = fg.make_partial(model, mixed(model, ["module"], 0.9, 0))
    params = list(partial.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1)
    del model, partial
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("setter", [None, SWAP, OVERWRITE], ids=["default", "swap", "overwrite"])
def test_masters_keep_their_digits(setter, tmp_path):
    partial, optimizer = begin(["row", "8x8", "none"], torch.float32, torch.bfloat16)
    train(partial, optimizer)
    partial.model(**batch_of()).loss.backward()
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in partial.named_parameters()}
    with flag(setter):
        partial.model.half()
    for name, p in partial.named_parameters():
        assert torch.equal(p, before[name][0]), name
        assert torch.equal(p.grad, before[name][1]), name
    for blocks in partial.packed:  # rounded once, not twice
        want = blocks.packed.detach().half()
        assert torch.equal(blocks.gather(blocks.full.detach()), want), blocks.name
    optimizer.step()
    partial.save(tmp_path / "p.safetensors")
    state = {n: p.clone() for n, p in partial.model.state_dict().items()}
    model = randomised(MODELS["llama-tied"]).half()
    model.load_state_dict(state)
    again = fg.load_partial(model, tmp_path / "p.safetensors")
    for (name, p), q in zip(partial.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_packed_float32_blocks_of_a_model_that_becomes_bfloat16_are_masters(tmp_path):
    partial, optimizer = begin(["row", "8x8", "none"], torch.float32)
    train(partial, optimizer)
    before = {n: p.detach().clone() for n, p in partial.named_parameters()}
    partial.model.to(torch.bfloat16)
    assert all(torch.equal(p, before[n]) for n, p in partial.named_parameters())
    train(partial, optimizer)
    partial.save(tmp_path / "p.safetensors")
    model = randomised(MODELS["llama-tied"]).bfloat16()
    model.load_state_dict(partial.model.state_dict())
    fg.load_partial(model, tmp_path / "p.safetensors")


def test_whole_weights_without_a_copy_that_lose_their_digits_are_refused(tmp_path):
    partial, optimizer = begin(["module", "row", "none"], torch.float32)
    partial.model.to(torch.bfloat16)
    partial.model(**batch_of()).loss.backward()
    for attempt in (optimizer.step, lambda: partial.save(tmp_path / "p.safetensors")):
        with pytest.raises(PartialError, match=r"converted to torch.bfloat16.*no master copy"):
            attempt()
    partial.remove()


def test_without_a_wish_for_masters_the_whole_model_changes_its_dtype(tmp_path):
    partial, optimizer = begin(["module", "row", "none"])
    partial.model.to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in partial.parameters())
    train(partial, optimizer)
    partial.save(tmp_path / "p.safetensors")


def test_onto_the_meta_device_is_refused_and_nothing_is_lost():
    partial, optimizer = begin(["row"])
    before = weights_hash(partial.model)
    with pytest.raises(PartialError, match=r"to meta while its blocks are trained.*Remedy"):
        partial.model.model.layers[0].mlp.up_proj.to("meta")
    assert weights_hash(partial.model) == before
    train(partial, optimizer)


def test_a_copy_of_a_partial_model_may_be_converted():
    partial, _ = begin(["row", "module"], torch.float32)
    other = copy.deepcopy(partial.model).to(torch.bfloat16)
    other(**batch_of())
    assert all(p.dtype == torch.float32 for p in partial.model.parameters())


# -- names and ties --------------------------------------------------------------------------


def test_get_parameter_gives_the_parameter_itself():
    partial, _ = begin(["row"])
    for name, p in model_parameters(partial.model).items():
        assert partial.model.get_parameter(name) is p
    module = partial.model.model.layers[0].mlp.up_proj
    assert module.get_parameter("weight") is module._parameters["weight"]
    assert module.weight is not module._parameters["weight"]  # what computes needs a graph


def test_tie_weights_of_a_partial_model():
    partial, optimizer = begin(["row"])
    expected, other = begin(["row"])
    partial.model.tie_weights()
    head, embedding = partial.model.lm_head, partial.model.model.embed_tokens
    head.weight = embedding.weight
    assert head._parameters["weight"] is embedding._parameters["weight"]
    train(partial, optimizer)
    train(expected, other)
    assert weights_hash(partial.model) == weights_hash(expected.model)


def test_another_tie_is_refused(tmp_path):
    partial, _ = begin(["row"], kind="llama")
    if "model.embed_tokens.weight" not in partial.selection.blocks:
        pytest.fail("this test is about the embedding")
    head = partial.model.lm_head
    with pytest.raises(PartialError, match="given another tensor"):
        head.weight = partial.model.get_parameter("model.embed_tokens.weight")
    late = nn.Linear(4, 4, bias=False)
    late.weight = partial.model.get_parameter("model.embed_tokens.weight")
    partial.model.late = late
    with pytest.raises(PartialError, match=r"was tied to another Linear.*Remedy"):
        partial.save(tmp_path / "p.safetensors")


@pytest.mark.parametrize("specs", [["row"], ["module"]])
def test_a_module_that_was_replaced_is_named(tmp_path, specs):
    partial, _ = begin(specs)
    layer = partial.model.model.layers[0]
    layer.mlp.up_proj = nn.Linear(*reversed(layer.mlp.up_proj.weight.shape), bias=False)
    for attempt in (
        partial.sync,
        lambda: partial.save(tmp_path / "p.safetensors"),
        lambda: fg.save_delta(partial, tmp_path / "d.safetensors"),
    ):
        with pytest.raises(PartialError, match=r"up_proj.weight is trained.*replaced.*Remedy"):
            attempt()
    assert not list(tmp_path.iterdir())
    partial.remove()


@pytest.mark.parametrize("specs", [["row"], ["module"]])
@pytest.mark.parametrize("kind", ["replaced", "deleted", "a layer above"])
@pytest.mark.parametrize("optimizer", [fg.SparseAdamW, torch.optim.SGD])
def test_a_step_after_a_module_was_replaced_is_refused_and_changes_nothing(kind, specs, optimizer):
    """Where gradients are zeroed in place it keeps one, as if it were trained."""
    partial, _ = begin(specs)
    made = optimizer(partial.parameters(), lr=1e-2)
    train(partial, made)
    layers = partial.model.model.layers
    kept, mlp = list(partial.parameters()), layers[0].mlp
    before = [p.detach().clone() for p in kept]
    if kind == "replaced":
        mlp.up_proj = nn.Linear(*reversed(mlp.up_proj.weight.shape), bias=False)
    elif kind == "deleted":
        del mlp.up_proj
    else:
        layers[0] = copy.deepcopy(partial.model.model.layers[1])
    with pytest.raises(PartialError, match=r"layers.0.*is trained.*replaced or deleted.*Remedy"):
        made.step()
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    if kind != "deleted":  # as the remedy says
        model = partial.remove()
        again = fg.make_partial(model, partial.selection, hash_base=False)
        train(again, optimizer(again.parameters(), lr=1e-2))


def test_modules_that_are_still_in_the_model_may_be_wrapped_and_moved():
    partial, optimizer = begin(["row", "module"])
    mlp = partial.model.model.layers[0].mlp
    mlp.up_proj = nn.Sequential(mlp.up_proj)
    train(partial, optimizer, 1)
    mlp.wrapped, mlp.up_proj = mlp.up_proj, nn.Identity()
    mlp.up_proj = mlp.wrapped
    del mlp.wrapped
    train(partial, optimizer, 1)
    mlp.up_proj = nn.Linear(*reversed(mlp.up_proj[0].weight.shape), bias=False)  # found anew
    with pytest.raises(PartialError, match=r"up_proj.weight is trained"):
        optimizer.step()


def test_a_re_selected_model_is_watched_too():
    partial, optimizer = begin(["row"])
    train(partial, optimizer, 1)
    optimizer.zero_grad()
    partial.reselect(mixed(partial.model, ["row"], 0.4, 3), optimizer)
    train(partial, optimizer, 1)
    name = next(n for n in partial.selection.blocks if "layers.1" in n)
    parent, _, child = name.removesuffix(".weight").rpartition(".")
    setattr(partial.model.get_submodule(parent), child, nn.Identity())
    with pytest.raises(PartialError, match=f"{name} is trained"):
        optimizer.step()


def test_what_is_watched_keeps_no_model_alive_and_asks_none_that_is_gone():
    partial, optimizer = begin(["row"])
    train(partial, optimizer, 1)
    gone = weakref.ref(partial.model)
    del partial
    gc.collect()
    assert gone() is None
    optimizer.step()


@pytest.mark.parametrize("kind", ["parametrize", "delete"])
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_a_weight_that_is_taken_out_of_its_module_is_named(kind, layer):
    module = nn.Linear(6, 6) if layer == "linear" else nn.Conv1d(6, 6, 1)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    fg.make_partial(module, fg.Selection(shapes, "row", {"weight": np.array([1, 4])}))
    if kind == "parametrize":
        parametrize.register_parametrization(module, "weight", nn.Tanh())
    else:
        del module.weight
    with pytest.raises(PartialError, match=r"weight was taken out of its module.*Remedy"):
        module(torch.ones(2, 6) if layer == "linear" else torch.ones(2, 6, 3))
