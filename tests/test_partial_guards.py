"""A partial model that is suspended, removed, or used in a way that would train nothing."""

from __future__ import annotations

import copy
import hashlib
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.errors import NonFiniteGradientError, PartialError, SelectionError
from fastgrad.identity import model_parameters, weights_hash
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import masks_of, selection_of
from tests.test_partial_resume import assert_same, everything, grouped
from tests.test_reselection import mixed, same, snapshot


def probed(model):
    with fg.Probe(model, blocks="row") as probe:
        for seed in (100, 101):
            model(**batch_of(seed=seed)).loss.backward()
    return probe.stats()


def begin(dtype=torch.bfloat16):
    model = randomised(MODELS["llama-tied"]).to(dtype)
    partial = fg.make_partial(model, mixed(model, ["row", "module", "none"], 0.4, 0),
                              torch.float32 if dtype == torch.bfloat16 else None)  # fmt: skip
    return partial, fg.SparseAdamW(grouped(partial), lr=1e-2)


# -- suspended -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16-masters"])
def test_probes_in_between_do_not_change_a_bit_of_training(dtype):
    """Also in the middle of an accumulation, where gradients are under way."""

    def train(probe):
        partial, optimizer = begin(dtype)
        for step in range(5):
            partial.model(**batch_of(seed=2 * step)).loss.backward()
            if probe:
                before = snapshot(partial, optimizer)
                with partial.suspended() as model:
                    assert model is partial.model
                    stats = probed(model)
                assert stats.grad_norm.shape == (len(model_parameters(model)),)
                assert same(snapshot(partial, optimizer), before)
            partial.model(**batch_of(seed=2 * step + 1)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if probe:
                with partial.suspended() as model, torch.no_grad():
                    model(**batch_of())
        return everything(partial, optimizer)

    assert_same(train(probe=True), train(probe=False))


def test_a_suspended_model_is_the_plain_one_with_the_trained_values():
    model = randomised(MODELS["llama"])
    classes, names = [type(m) for m in model.modules()], list(dict(model.named_parameters()))
    name = names[3]
    model_parameters(model)[name].requires_grad_(False)
    partial = fg.make_partial(model, mixed(model, ["row", "module", "8x8"], 0.4, 0))
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    model(**batch_of()).loss.backward()
    optimizer.step()
    plain = copy.deepcopy(MODELS["llama"]())
    plain.load_state_dict(model.state_dict())
    with partial.suspended():
        assert [type(m) for m in model.modules()] == classes
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        assert flags == {n: n != name for n in names}
        assert all(p.grad is None for p in model.parameters())
        assert weights_hash(model) == weights_hash(plain)
        model(**batch_of()).loss.backward()
        plain(**batch_of()).loss.backward()
        for n, p in model.named_parameters():
            if n != name:
                assert torch.equal(p.grad, dict(plain.named_parameters())[n].grad), n


def test_an_exception_inside_leaves_everything_as_it_was():
    partial, optimizer = begin()
    partial.model(**batch_of()).loss.backward()
    optimizer.step()
    before = snapshot(partial, optimizer)

    def look():
        with partial.suspended() as model:
            model(**batch_of()).loss.backward()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        look()
    assert same(snapshot(partial, optimizer), before)
    partial.model(**batch_of()).loss.backward()
    optimizer.step()


def test_what_is_refused_inside():
    partial, optimizer = begin()
    partial.model(**batch_of()).loss.backward()
    before = snapshot(partial, optimizer)
    with partial.suspended() as model:
        for attempt in (
            partial.suspended().__enter__,
            partial.remove,
            lambda: partial.save("nowhere"),
            lambda: partial.reselect(partial.selection, optimizer),
            lambda: fg.make_partial(model, partial.selection),
            optimizer.step,
        ):
            with pytest.raises(PartialError, match="suspended"):
                attempt()
    assert same(snapshot(partial, optimizer), before)
    optimizer.step()


def test_weights_that_are_changed_inside_are_taken_over():
    partial, optimizer = begin(torch.float32)
    new = {k: torch.randn_like(v) for k, v in partial.model.state_dict().items()}
    new["lm_head.weight"] = new["model.embed_tokens.weight"]  # tied
    with partial.suspended() as model:
        model.load_state_dict(new)
    for blocks in partial.packed:
        assert torch.equal(blocks.packed.detach(), blocks.gather(new[blocks.name]))
    partial.model(**batch_of()).loss.backward()
    optimizer.step()
    with pytest.raises(PartialError, match="replaced inside"), partial.suspended() as model:
        model.load_state_dict(new, assign=True)  # an optimizer holds whole weights themselves
    other, _ = begin(torch.float32)
    with pytest.raises(PartialError, match="replaced inside"), other.suspended() as model:
        model.model.layers[0].mlp = copy.deepcopy(model.model.layers[0].mlp)


# -- optimizers that would train nothing -----------------------------------------------------


def test_an_optimizer_built_before_the_selection_is_refused():
    model = randomised(MODELS["llama"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    of_another = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1e-2)
    partial = fg.make_partial(model, mixed(model, ["row", "module"], 0.3, 0))
    weights = weights_hash(model)
    model(**batch_of()).loss.backward()
    with pytest.raises(PartialError, match=r"AdamW was built .*before make_partial.*Remedy"):
        optimizer.step()
    assert weights_hash(model) == weights
    of_another.step()
    after = torch.optim.AdamW(model.parameters(), lr=1e-2)  # of everything, but built afterwards
    after.step()
    assert weights_hash(model) != weights
    partial.remove()
    model(**batch_of()).loss.backward()
    optimizer.step()  # the model is whole again


def test_training_after_remove_is_refused():
    model = randomised(MODELS["llama"])
    partial = fg.make_partial(model, mixed(model, ["row", "module"], 0.3, 0))
    optimizers = [make(partial.parameters(), lr=1e-2) for make in (fg.SparseAdamW, torch.optim.SGD)]
    model(**batch_of()).loss.backward()
    optimizers[0].step()
    partial.remove()
    weights = weights_hash(model)
    for optimizer in optimizers:
        model(**batch_of()).loss.backward()
        with pytest.raises(PartialError, match=r"was removed.*make_partial again"):
            optimizer.step()
        assert weights_hash(model) == weights
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert weights_hash(model) != weights
    again = fg.make_partial(model, selection_of(model, "module", 1.0))
    again.model(**batch_of()).loss.backward()
    torch.optim.SGD(again.parameters(), lr=1e-2).step()


def test_a_selection_of_another_model_changes_nothing():
    model = randomised(MODELS["llama"])
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(SelectionError, match="lacks"):
        fg.make_partial(model, selection_of(randomised(MODELS["gpt2"]), "row"))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_peft_on_top_is_named():
    peft = pytest.importorskip("peft")
    partial, optimizer = begin(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            partial.model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
    with pytest.raises(PartialError, match=r"get_peft_model.*Remedy"):
        wrapped(**batch_of())
    with pytest.raises(PartialError, match="get_peft_model"):
        optimizer.step()
    with torch.no_grad():
        wrapped(**batch_of())  # to look at it is no harm
    for p in partial.parameters():
        p.requires_grad_(True)
    wrapped(**batch_of()).loss.backward()
    optimizer.step()


def test_a_frozen_copy_of_a_partial_model_may_run():
    """A reference model, an average of weights: nobody trains it."""
    partial, _ = begin(torch.float32)
    frozen = copy.deepcopy(partial.model).requires_grad_(False)
    assert torch.equal(frozen(**batch_of()).logits, partial.model(**batch_of()).logits)


def test_a_nan_gradient_changes_nothing_and_training_goes_on():
    partial, optimizer = begin()
    partial.model(**batch_of()).loss.backward()
    optimizer.step()
    before = snapshot(partial, optimizer)
    next(partial.parameters()).grad.view(-1)[3] = float("nan")
    with pytest.raises(NonFiniteGradientError, match="No parameter and no state"):
        optimizer.step()
    assert same(snapshot(partial, optimizer), before)
    optimizer.zero_grad()
    partial.model(**batch_of()).loss.backward()
    optimizer.step()


# -- unselected weights ----------------------------------------------------------------------


def unselected_hash(model, masks):
    digest = hashlib.sha256()
    for name, p in model_parameters(model).items():
        left = p.detach()[~masks[name]].contiguous()
        digest.update(left.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(17, 24), nn.LayerNorm(24)
        self.conv = nn.Conv1d(24, 24, 3, padding=1)
        self.up, self.down = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, ids):
        h = self.norm(self.embed(ids))
        h = torch.relu(self.conv(h.mT)).mT
        return self.down(torch.tanh(self.up(h))) @ self.embed.weight.T  # tied output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "spec"),
    [("sparse-adamw", "row"), ("sparse-adamw", "5x7"), ("adamw", "5x7"), ("in-backward", "5x7")],
)
def test_unselected_weights_keep_their_bits_over_1000_steps(make, spec):
    """With weight decay, clipping, autocast and accumulation."""
    torch.manual_seed(0)
    model = Small().bfloat16()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    selection = mixed(model, [spec, spec, "none"], 0.3, 1)
    masks = masks_of(selection, model)
    assert sum(int((~m).sum()) for m in masks.values()) > 1000
    before = unselected_hash(model, masks)
    start = weights_hash(model)
    partial = fg.make_partial(model, selection, torch.float32)
    build = torch.optim.AdamW if make == "adamw" else fg.SparseAdamW
    optimizer = build(partial.parameters(), lr=1e-3, weight_decay=0.5)
    handle = fg.step_in_backward(optimizer, max_norm=1.0) if make == "in-backward" else None
    g = torch.Generator().manual_seed(2)
    for _ in range(1000):
        for micro in range(2):
            ids = torch.randint(0, 17, (2, 6), generator=g)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())
            if handle is not None and micro == 0:
                with handle.accumulate():
                    (loss / 2).backward()
            else:
                (loss / 2).backward()
        if handle is None:
            torch.nn.utils.clip_grad_norm_(list(partial.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert unselected_hash(model, masks) == before
    assert weights_hash(model) != start
    for n, p in partial.named_parameters():
        assert optimizer.state[p]["step"].max() == 1000, n
        assert torch.isfinite(p).all()
    partial.remove()
    assert unselected_hash(model, masks) == before


def test_a_pickled_or_copied_partial_trains_and_ends_alike():
    partial, optimizer = begin()
    copies = [pickle.loads(pickle.dumps(partial)), copy.deepcopy(partial)]
    states = []
    for one in (partial, *copies):
        stepping = optimizer if one is partial else fg.SparseAdamW(grouped(one), lr=1e-2)
        for seed in range(3):
            one.model(**batch_of(seed=seed)).loss.backward()
            stepping.step()
            stepping.zero_grad()
        states.append(one.model.state_dict())
        assert one is partial or one.model is not partial.model
    for one in copies:
        one.remove()
        assert all(p.requires_grad for p in one.model.parameters())
    assert not all(p.requires_grad for p in partial.model.parameters())
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
