"""Partial training: the same as full training where selected, bit-identical elsewhere."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.blocks import BlockGrid
from fastgrad.errors import NonFiniteGradientError, PartialError, SelectionError
from fastgrad.identity import model_parameters
from fastgrad.partial import make_partial
from fastgrad.selection import Selection
from fastgrad_kernels.layout import matrix_view
from tests.models import MODELS, batch_of, randomised


def selection_of(model, spec, share=0.3, seed=0, names=None):
    """Random blocks of a model, at least one of each named parameter."""
    rng = np.random.default_rng(seed)
    shapes = {n: tuple(p.shape) for n, p in model_parameters(model).items()}
    blocks = {}
    for name in names or shapes:
        n = BlockGrid.of(shapes[name], spec).n_blocks
        blocks[name] = np.sort(rng.choice(n, max(1, int(share * n)), replace=False))
    return Selection(shapes, spec, blocks)


def masks_of(selection, model):
    """True where an element is selected, per parameter."""
    masks = {}
    for name, p in model_parameters(model).items():
        mask = torch.zeros(p.shape, dtype=torch.bool)
        view = matrix_view(mask) if mask.ndim >= 2 else mask.view(1, -1)
        for block in selection.blocks.get(name, ()):
            r0, r1, c0, c1 = selection.grid(name).bounds(int(block))
            view[r0:r1, c0:c1] = True
        masks[name] = mask
    return masks


@pytest.mark.parametrize("spec", ["module", "row", "column", "16x8"])
@pytest.mark.parametrize("architecture", list(MODELS))
def test_packed_gradient_equals_the_dense_one(architecture, spec):
    model = randomised(MODELS[architecture])
    batch = batch_of(padding="right")
    dense = copy.deepcopy(model)
    dense(**batch).loss.backward()
    grads = {n: p.grad for n, p in model_parameters(dense).items()}
    selection = selection_of(model, spec)
    partial = make_partial(model, selection)
    loss = model(**batch).loss
    assert torch.equal(loss, dense(**batch).loss)
    loss.backward()
    packed = {b.name: b for b in partial.packed}
    for name, p in partial.named_parameters():
        if grads[name] is None:
            assert p.grad is None
            continue
        want = packed[name].gather(grads[name]) if name in packed else grads[name]
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", ["module", "row", "16x8"])
def test_unselected_weights_stay_bit_identical_and_state_dict_is_normal(spec):
    model = randomised(MODELS["gpt2"])
    before = {n: p.detach().clone() for n, p in model_parameters(model).items()}
    keys = list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    names = list(before)[2::3]
    selection = selection_of(model, spec, names=names)
    masks = masks_of(selection, model)
    partial = make_partial(model, selection)
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(20):
        loss = model(**batch_of(seed=step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(partial.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert list(model.state_dict()) == keys
    for name, p in model_parameters(model).items():
        changed = p.detach() != before[name]
        assert not changed[~masks[name]].any(), name
        if masks[name].any():
            assert changed[masks[name]].float().mean() > 0.9, name
    with torch.no_grad():
        trained = model(**batch_of()).logits
    partial.remove()
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(**batch_of()).logits, trained)
    assert all(p.requires_grad for p in model.parameters())
    assert list(dict(model.named_parameters())) == list(before)


def test_full_selection_equals_torch_adamw():
    model = randomised(MODELS["llama"])
    other = copy.deepcopy(model)
    partial = make_partial(model, selection_of(model, "module", share=1.0))
    mine = fg.SparseAdamW(partial.parameters(), lr=3e-3, weight_decay=0.05)
    theirs = torch.optim.AdamW(other.parameters(), lr=3e-3, weight_decay=0.05)
    for step in range(100):
        for m, o in ((model, mine), (other, theirs)):
            m(**batch_of(seed=step)).loss.backward()
            o.step()
            o.zero_grad()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=name)


def test_full_selection_of_tiles_equals_torch_adamw():
    model = randomised(MODELS["llama-tied"])
    other = copy.deepcopy(model)
    partial = make_partial(
        model, selection_of(model, "16x8", share=1.0), master_dtype=torch.float64
    )
    assert partial.packed
    mine = fg.SparseAdamW(partial.parameters(), lr=3e-3, weight_decay=0.05)
    theirs = torch.optim.AdamW(other.parameters(), lr=3e-3, weight_decay=0.05)
    for step in range(30):
        for m, o in ((model, mine), (other, theirs)):
            m(**batch_of(seed=step)).loss.backward()
            o.step()
            o.zero_grad()
    for (name, p), q in zip(model_parameters(model).items(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, msg=name)


def test_bf16_weights_with_fp32_masters_follow_the_fp32_run():
    torch.manual_seed(0)
    x, y = torch.randn(64, 16), torch.randn(64, 8)
    wide = nn.Linear(16, 8)
    narrow = copy.deepcopy(wide).bfloat16()
    with torch.no_grad():
        for p, q in zip(wide.parameters(), narrow.parameters(), strict=True):
            p.copy_(q)
    partial = make_partial(narrow, selection_of(narrow, "module", 1.0), master_dtype=torch.float32)
    mine = fg.SparseAdamW(partial.parameters(), lr=1e-4)
    theirs = torch.optim.AdamW(wide.parameters(), lr=1e-4)
    for _ in range(200):
        # the same gradients for both, so that only the optimizer is compared
        theirs.zero_grad()
        (wide(x) - y).square().mean().backward()
        for p, q in zip(partial.parameters(), wide.parameters(), strict=True):
            p.grad = q.grad.clone()
        mine.step()
        theirs.step()
    for (name, p), q in zip(partial.named_parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)
        assert torch.equal(model_parameters(narrow)[name], q.bfloat16())


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.AdamW(ps, lr=1e-2),
        lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
        lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, foreach=True),
    ],
    ids=["adamw", "adamw-fused", "sgd"],
)
def test_any_optimizer_writes_through(make):
    model = randomised(MODELS["llama"])
    partial = make_partial(model, selection_of(model, "8x8"))
    optimizer = make(list(partial.parameters()))
    model(**batch_of()).loss.backward()
    optimizer.step()
    for blocks in partial.packed:
        assert torch.equal(blocks.gather(blocks.full.detach()), blocks.packed.detach())


def test_deepcopy_and_load_state_dict_of_a_partial_model():
    model = randomised(MODELS["llama"])
    partial = make_partial(model, selection_of(model, "row"))
    twin = copy.deepcopy(model)
    loaded = {
        k: torch.randn_like(v) if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }
    model.load_state_dict(loaded)
    for blocks in partial.packed:
        assert torch.equal(blocks.packed.detach(), blocks.gather(loaded[blocks.name]))
    packed = [p for n, p in twin.named_parameters() if p.requires_grad]
    optimizer = fg.SparseAdamW(packed, lr=1e-1)
    first = twin(**batch_of()).loss
    first.backward()
    optimizer.step()
    assert twin(**batch_of()).loss < first


def test_nan_gradient_is_named_and_nothing_moves():
    model = randomised(MODELS["llama"])
    partial = make_partial(model, selection_of(model, "module", 1.0))
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    model(**batch_of()).loss.backward()
    optimizer.step()
    model(**batch_of(seed=5)).loss.backward()
    name = "model.layers.1.mlp.up_proj.weight"
    dict(partial.named_parameters())[name].grad[3, 4] = float("nan")
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(NonFiniteGradientError, match=r"up_proj.*No parameter") as caught:
        optimizer.step()
    assert caught.value.names == [name]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    for i, s in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, state[i][k]) for k, v in s.items())


def test_optimizer_state_bytes_dtypes_and_reload(tmp_path):
    model = randomised(MODELS["llama"]).bfloat16()
    partial = make_partial(model, selection_of(model, "module", 1.0))
    optimizer = fg.SparseAdamW(partial.named_parameters(), lr=1e-2)
    for step in range(3):
        model(**batch_of(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    count = sum(p.numel() for p in partial.parameters())
    assert optimizer.state_bytes() == 8 * count + 4 * len(list(partial.parameters()))
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    other = fg.SparseAdamW(partial.named_parameters(), lr=1e-2)
    other.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    for p in partial.parameters():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert other.state[p][key].dtype == torch.float32
            assert torch.equal(other.state[p][key], optimizer.state[p][key])


def test_refusals():
    model = randomised(MODELS["llama"])
    selection = selection_of(model, "row")
    unknown = dict(selection.blocks) | {"nope.weight": np.array([0])}
    with pytest.raises(SelectionError, match="nope"):
        make_partial(model, Selection({**selection.shapes, "nope.weight": (2, 2)}, "row", unknown))
    with pytest.raises(SelectionError, match="made for weights"):
        make_partial(
            model, Selection(selection.shapes, "row", selection.blocks, weights_hash="sha256:0")
        )
    partial = make_partial(model, selection)
    with pytest.raises(PartialError, match="already"):
        make_partial(model, selection)
    partial.remove()
    with pytest.raises(PartialError, match="removed"):
        list(partial.parameters())
    with pytest.raises(ValueError, match="learning rate"):
        fg.SparseAdamW([nn.Parameter(torch.zeros(2))], lr=-1.0)


class Borrowed(nn.Module):
    """An embedding whose weight another function reads, as tied output layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(11, 6)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, ids):
        h = self.norm(torch.tanh(self.e(ids)))
        return nn.functional.linear(h, self.e.weight) + h @ self.e.weight.T


@pytest.mark.parametrize("spec", ["row", "2x4"])
def test_a_weight_that_others_read_trains_with_its_whole_gradient(spec):
    torch.manual_seed(0)
    model, ids = Borrowed(), torch.randint(0, 11, (4, 3))
    dense = copy.deepcopy(model)
    dense(ids).square().sum().backward()
    grads = {n: p.grad for n, p in model_parameters(dense).items()}
    partial = make_partial(model, selection_of(model, spec, 0.5))
    model(ids).square().sum().backward()
    for blocks in partial.packed:
        torch.testing.assert_close(blocks.packed.grad, blocks.gather(grads[blocks.name]))


def test_attention_inside_a_composite_function_trains():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    dense = copy.deepcopy(model)
    x = torch.randn(2, 5, 8)
    dense(x).square().sum().backward()
    partial = make_partial(model, selection_of(model, "row", 0.5))
    model(x).square().sum().backward()
    for blocks in partial.packed:
        want = blocks.gather(dict(dense.named_parameters())[blocks.name].grad)
        torch.testing.assert_close(blocks.packed.grad, want, rtol=1e-4, atol=1e-5)


def test_weights_of_any_memory_layout_are_written_through(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last))
    base = copy.deepcopy(model)
    partial = make_partial(model, selection_of(model, "2x5", 0.5))
    optimizer = fg.SparseAdamW(partial.parameters(), lr=0.1)
    model(torch.randn(2, 4, 5, 5)).square().sum().backward()
    optimizer.step()
    assert any(
        not torch.equal(p, q)
        for p, q in zip(model_parameters(model).values(), base.parameters(), strict=True)
    )
    for blocks in partial.packed:
        assert torch.equal(blocks.packed.detach(), blocks.gather(blocks.full.detach()))
    fg.save_delta(partial, tmp_path / "d.safetensors")
    fg.load_delta(base, tmp_path / "d.safetensors")
    for p, q in zip(model_parameters(model).values(), base.parameters(), strict=True):
        assert torch.equal(p, q)


def test_writes_from_outside_are_kept_or_refused():
    model = randomised(MODELS["llama"])
    base = copy.deepcopy(model)
    partial = make_partial(model, selection_of(model, "8x8"))
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    model(**batch_of()).loss.backward()
    optimizer.step()
    twin_partial = make_partial(base, selection_of(base, "8x8"))
    base.load_state_dict(model.state_dict())
    twin_partial.sync()
    for p, q in zip(model_parameters(base).values(), model_parameters(model).values(), strict=True):
        assert torch.equal(p, q)
    blocks = partial.packed[0]
    with torch.no_grad():
        blocks.full.mul_(2)
    with pytest.raises(PartialError, match="changed from outside"):
        partial.sync()
    partial.refresh()
    assert torch.equal(blocks.packed.detach(), blocks.gather(blocks.full.detach()))
    loaded = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    with torch.no_grad():
        plain = model(**batch_of()).loss
    assert torch.equal(model(**batch_of()).loss, plain)
    assert blocks.full is model_parameters(model)[blocks.name]


def test_memory_layouts_do_not_change_the_update():
    torch.manual_seed(0)
    w, g = torch.randn(5, 7), torch.randn(5, 7)
    mine, theirs = (nn.Parameter(w.clone().t()) for _ in range(2))
    optimizers = fg.SparseAdamW([mine], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for step in range(3):
        mine.grad, theirs.grad = (g.T.contiguous() * (step + 1) for _ in range(2))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    other = nn.Parameter(mine.detach().clone(memory_format=torch.preserve_format))
    again = fg.SparseAdamW([other], lr=0.1)
    state = copy.deepcopy(optimizers[1].state_dict())  # a state of torch.optim.AdamW
    for s in state["state"].values():
        s["exp_avg"], s["exp_avg_sq"] = s["exp_avg"].contiguous(), s["exp_avg_sq"].contiguous()
    again.load_state_dict(state)
    other.grad, theirs.grad = g.T.contiguous(), g.T.contiguous()
    again.step()
    optimizers[1].step()
    torch.testing.assert_close(other, theirs, rtol=1e-5, atol=1e-6)


def test_masters_keep_their_digits_over_a_reload(tmp_path):
    model = randomised(MODELS["llama"]).bfloat16()
    partial = make_partial(model, selection_of(model, "8x8"), master_dtype=torch.float32)
    with torch.no_grad():
        for p in partial.parameters():
            p.mul_(1 + 1e-4)
    partial.sync()
    masters = [p.detach().clone() for p in partial.parameters()]
    model.load_state_dict(model.state_dict())
    for p, q in zip(partial.parameters(), masters, strict=True):
        assert torch.equal(p, q)
    torch.save(model, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(again(**batch_of()).logits, model(**batch_of()).logits)
    packed = [p for p in again.parameters() if p.requires_grad]
    assert sorted(p.numel() for p in packed) == sorted(p.numel() for p in masters)


def test_a_child_called_module_keeps_its_name():
    model = nn.Module()
    model.weight, model.module = nn.Parameter(torch.ones(6)), nn.Linear(6, 6)
    assert list(model_parameters(model)) == ["weight", "module.weight", "module.bias"]
    assert list(model_parameters(nn.DataParallel(model))) == list(model_parameters(model))
    make_partial(model, selection_of(model, "row", names=["module.weight"]))
    assert not model.weight.requires_grad


def test_the_signature_of_forward_survives():
    import inspect

    model = nn.Linear(4, 4)
    make_partial(model, selection_of(model, "row"))
    assert list(inspect.signature(model.forward).parameters) == ["input"]
