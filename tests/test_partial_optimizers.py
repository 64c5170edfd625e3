"""Any optimizer trains the selected blocks: they move as in full training, the rest does not move.

Elementwise optimizers give each selected entry the value that full training with the same
gradients gives it. Those that look at a whole tensor (factored moments, orthogonalised updates,
block-wise quantised states) are checked against themselves on the packed tensor.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from fastgrad.identity import model_parameters
from fastgrad.partial import make_partial
from tests.test_partial import masks_of, selection_of

HERE = {name: importlib.util.find_spec(name) is not None for name in
        ("bitsandbytes", "torchao", "transformers")}  # fmt: skip


def needs(package):
    return pytest.mark.skipif(not HERE[package], reason=f"{package} is not installed")


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (arXiv 2302.06675), as a user may write it: through
    ``.data``, which PyTorch's version counters do not see."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
                p.data.add_((b1 * m + (1 - b1) * p.grad).sign(), alpha=-group["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


class Bare:
    """An optimizer that is no ``torch.optim.Optimizer``: its owner calls ``partial.sync()``."""

    def __init__(self, params):
        self.params = list(params)

    def step(self):
        for p in self.params:
            if p.grad is not None:
                p.data.sub_(p.grad, alpha=0.05)

    def zero_grad(self):
        for p in self.params:
            p.grad = None


ELEMENTWISE = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True),
    "adamw-tensor-lr": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(1e-2)),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "sgd-nesterov": lambda ps: torch.optim.SGD(
        ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "sgd-fused": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, fused=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.5, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "lion": Lion,
    "bare": Bare,
}


class Tiny(nn.Module):
    """One of each: embedding, convolution, linear layers, norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.up, self.out = nn.Linear(16, 40), nn.Linear(40, 8)

    def forward(self, ids):
        h = self.embed(ids)
        h = self.norm(h + self.conv(h.transpose(1, 2)).transpose(1, 2))
        return self.out(torch.tanh(self.up(h)))


def tiny(seed=0):
    torch.manual_seed(seed)
    return Tiny()


def batches(n):
    g = torch.Generator().manual_seed(7)
    return [torch.randint(0, 24, (4, 6), generator=g) for _ in range(n)]


def loss_of(model, ids):
    return (model(ids) - 1).square().mean()


def assert_written(partial, model, before, masks):
    """The full weights show the packed values; what is not selected has its old bits."""
    for blocks in partial.packed:
        values = blocks.gather(blocks.full.detach())
        assert torch.equal(values, blocks.packed.detach().to(values.dtype)), blocks.name
    for name, p in model_parameters(model).items():
        same = p.detach().view(torch.uint8) == before[name].view(torch.uint8)
        assert same.unflatten(-1, (-1, p.element_size())).all(-1)[~masks[name]].all(), name
        if masks[name].any():
            assert (p != before[name])[masks[name]].any(), name


@pytest.mark.parametrize("spec", ["module", "row", "8x8"])
@pytest.mark.parametrize("name", list(ELEMENTWISE))
def test_elementwise_optimizers_equal_full_training_where_selected(name, spec):
    """The reference trains everything and gets back, after each step, what is not selected."""
    model, other = tiny().double(), tiny().double()
    before = {n: p.detach().clone() for n, p in model_parameters(model).items()}
    selection = selection_of(model, spec, 0.4)
    masks = masks_of(selection, model)
    partial = make_partial(model, selection)
    mine = ELEMENTWISE[name](partial.parameters())
    theirs = ELEMENTWISE[name](other.parameters())
    for ids in batches(6):
        for m, optimizer in ((model, mine), (other, theirs)):
            loss_of(m, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        if name == "bare":
            partial.sync()
        with torch.no_grad():
            for n, q in model_parameters(other).items():
                q.copy_(torch.where(masks[n], q, before[n]))
    assert_written(partial, model, before, masks)
    for n, p in model_parameters(model).items():
        torch.testing.assert_close(p, model_parameters(other)[n], rtol=1e-9, atol=1e-11, msg=n)


def test_capturable_works_where_it_works_in_full_training():
    model, plain = tiny(), tiny()
    partial = make_partial(model, selection_of(model, "row", 0.4))
    outcomes = []
    for m, ps in ((plain, plain.parameters()), (model, partial.parameters())):
        optimizer = torch.optim.AdamW(ps, lr=torch.tensor(1e-2), capturable=True, foreach=False)
        loss_of(m, batches(1)[0]).backward()
        try:
            optimizer.step()
            outcomes.append("works")
        except AssertionError as error:  # on a CPU: "capturable=True, params must be on ..."
            outcomes.append(str(error)[:40])
    assert outcomes[0] == outcomes[1]


def adamw_8bit_bnb(ps):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(ps, lr=1e-2, min_8bit_size=16)


def lion_8bit_bnb(ps):
    import bitsandbytes

    return bitsandbytes.optim.Lion8bit(ps, lr=1e-2, min_8bit_size=16)


def adafactor_transformers(ps):
    from transformers.optimization import Adafactor

    return Adafactor(ps, lr=1e-2, scale_parameter=False, relative_step=False)


def torchao(kind):
    def make(ps):
        from torchao import optim

        return getattr(optim, kind)(ps, lr=1e-2)

    return make


WHOLE_TENSOR = {
    "adafactor": (lambda ps: torch.optim.Adafactor(ps, lr=1e-2), ()),
    "adafactor-transformers": (adafactor_transformers, needs("transformers")),
    "bnb-adamw8bit": (adamw_8bit_bnb, needs("bitsandbytes")),
    "bnb-lion8bit": (lion_8bit_bnb, needs("bitsandbytes")),
    "torchao-adamw8bit": (torchao("AdamW8bit"), [needs("torchao"), pytest.mark.slow]),
    "torchao-adamw4bit": (torchao("AdamW4bit"), [needs("torchao"), pytest.mark.slow]),
    "torchao-adamwfp8": (torchao("AdamWFp8"), [needs("torchao"), pytest.mark.slow]),
}


class Wide(nn.Module):
    """Weights large enough for states of 8 and 4 bits, which small tensors do not get."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("spec", ["row", "32x32"])
@pytest.mark.parametrize(
    "make", [pytest.param(m, marks=marks, id=n) for n, (m, marks) in WHOLE_TENSOR.items()]
)
def test_optimizers_of_whole_tensors_train_the_packed_ones(make, spec):
    torch.manual_seed(0)
    model, x = Wide(), torch.randn(8, 128)
    before = {n: p.detach().clone() for n, p in model_parameters(model).items()}
    selection = selection_of(model, spec, 0.5)
    masks = masks_of(selection, model)
    partial = make_partial(model, selection)
    alone = [nn.Parameter(p.detach().clone()) for p in partial.parameters()]
    mine, theirs = make(list(partial.parameters())), make(alone)
    losses = []
    for _ in range(4):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        losses.append(float(loss))
        for p, q in zip(partial.parameters(), alone, strict=True):
            q.grad = p.grad.clone()
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert_written(partial, model, before, masks)
    for p, q in zip(partial.parameters(), alone, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("master", [None, torch.float64])
def test_muon_trains_whole_matrices(master):
    """With a master copy the trained tensor is packed, but of the weight's own shape."""
    model, other = tiny(), tiny()
    names = ["up.weight", "out.weight"]
    partial = make_partial(
        model, selection_of(model, "module", 1.0, names=names), master_dtype=master
    )
    assert len(partial.packed) == (2 if master else 0)
    mine = torch.optim.Muon(partial.parameters(), lr=1e-2)
    theirs = torch.optim.Muon([dict(other.named_parameters())[n] for n in names], lr=1e-2)
    for ids in batches(4):
        for m, optimizer in ((model, mine), (other, theirs)):
            loss_of(m, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            m.zero_grad()
    for n, p in model_parameters(model).items():
        q = dict(other.named_parameters())[n]
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=n)
        assert torch.equal(p, dict(tiny().named_parameters())[n]) == (n not in names)


def test_muon_itself_refuses_blocks():
    model = tiny()
    partial = make_partial(model, selection_of(model, "row", 0.5, names=["up.weight"]))
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon(partial.parameters(), lr=1e-2)


def test_changes_through_data_need_sync_only_without_an_optimizer_step():
    model = tiny()
    partial = make_partial(model, selection_of(model, "row", 0.5, names=["up.weight"]))
    (p,) = partial.parameters()
    blocks = partial.packed[0]
    p.data.add_(1)  # seen by nobody
    assert not torch.equal(blocks.gather(blocks.full.detach()), p)
    partial.sync()
    assert torch.equal(blocks.gather(blocks.full.detach()), p)
    with torch.no_grad():
        p.add_(1)  # seen at the next forward pass
    loss_of(model, batches(1)[0])
    assert torch.equal(blocks.gather(blocks.full.detach()), p)
