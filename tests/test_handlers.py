"""Functions with handlers of their own: exact, and the user's run stays what it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgrad as fg


class Use(nn.Module):
    """A function of an input and parameters of these shapes."""

    def __init__(self, use, *shapes) -> None:
        super().__init__()
        self.use = use
        self.ws = nn.ParameterList(nn.Parameter(torch.randn(s) * 0.5) for s in shapes)

    def forward(self, x):
        return self.use(x, *self.ws)


class Rnn(nn.Module):
    """A recurrent layer of which all outputs count."""

    def __init__(self, layer, *, states: bool = False, features: int = 4) -> None:
        super().__init__()
        self.layer, self.lead, self.states = layer, nn.Linear(features, features), states

    def forward(self, x):
        x = torch.tanh(self.lead(x))
        first = self.layer.batch_first
        out, last = self.layer(x if first else x.transpose(0, 1))
        out = out if first else out.transpose(0, 1)
        last = last if isinstance(last, tuple) else (last,)
        sums = [s.transpose(0, 1).flatten(1).sum(1) for s in last] if self.states else []
        return out.flatten(1) + sum(s.unsqueeze(1).sin() for s in sums)


def loss_of(model, x):
    """Mean over examples of something that differs from example to example."""
    return torch.sin(model(x)).square().flatten(1).mean(1).mean()


def plain_run(model, x):
    torch.manual_seed(1)
    loss_of(model, x).backward()
    return torch.get_rng_state()


def check(make, x, tolerance=1e-4, missing=(), blocks="module", alone=None, train=False, bits=True,
          autocast=False):  # fmt: skip
    """T against one example at a time, and the run against one without a probe."""
    torch.manual_seed(0)
    model = make().train(train)
    plain = copy.deepcopy(model)
    n = len(x)

    def go(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return plain_run(model, x)

    state = go(plain)
    probed = copy.deepcopy(model)
    with fg.Probe(probed, blocks=blocks) as probe:
        assert torch.equal(go(probed), state)
    same, near = {"rtol": 0, "atol": 0}, {"rtol": 1e-4, "atol": 1e-6}
    for a, b in zip(plain.buffers(), probed.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)
    stats = probe.stats()
    assert {k for k, c in stats.coverage.items() if c.status == "missing"} == set(missing), [
        (k, c.reason) for k, c in stats.coverage.items() if c.reason
    ]
    if not autocast:
        for (k, a), b in zip(plain.named_parameters(), probed.parameters(), strict=True):
            if a.grad is not None:
                how = same if bits and not k.startswith("lead.") else near
                torch.testing.assert_close(b.grad, a.grad, msg=lambda m, k=k: f"{k}: {m}", **how)
    twin = copy.deepcopy(model).double()
    for j in range(n):
        twin.zero_grad()
        one = x[j : j + 1]
        (loss_of(twin, one.double() if one.is_floating_point() else one) / n).backward()
        got = {k: stats.T[i, j] for i, k in enumerate(stats.names) if k not in missing}
        want = {k: float(p.grad.norm()) for k, p in twin.named_parameters() if p.grad is not None}
        scale = max(want.values())
        for k, t in got.items():
            assert abs(t - want[k]) <= tolerance * max(want[k], 1e-2 * scale), (k, j, t, want[k])
    return stats


def images(n, channels=4, size=5, nd=2):
    return torch.randn(n, channels, *[size] * nd, generator=torch.Generator().manual_seed(3))


LAYERS = {
    "batch norm": (lambda: nn.BatchNorm2d(4), images(3)),
    "batch norm, rows": (lambda: nn.BatchNorm1d(4), images(4, nd=0)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), images(4)),
    "instance norm, statistics": (
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), images(4, nd=1)),
    "group norm": (lambda: nn.GroupNorm(2, 4), images(4)),
    "group norm, rows": (lambda: nn.GroupNorm(2, 4), images(4, nd=0)),
    "prelu": (lambda: nn.PReLU(), images(4)),
    "prelu of channels": (lambda: nn.PReLU(4), images(4)),
    "prelu of rows": (lambda: nn.PReLU(), images(4, nd=0)),
    "bilinear": (lambda: Use(lambda x, w, b: F.bilinear(x, x.cos(), w, b), (5, 4, 4), (5,)),
                 torch.randn(4, 3, 4)),
    "bilinear, no bias": (lambda: Use(lambda x, w: F.bilinear(x, x.cos(), w), (4, 4, 4)),
                          torch.randn(4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 3, 3, 2, 1, 1), images(4, nd=1)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 4, 3, (2, 1), bias=False, dilation=(1, 3),
                                                 output_padding=(1, 2)), images(4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 2, (1, 2, 2), padding=(0, 1, 1)),
                      images(3, nd=3, size=3)),
    "transposed, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), images(4)),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("blocks", ["module", "row", "2x3"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer, blocks, inplace):
    make, x = LAYERS[layer]
    after = nn.ReLU(inplace=True) if inplace else nn.Identity()
    check(lambda: nn.Sequential(_randomised(make()), after), x, blocks=blocks)


def _randomised(module):
    for p in module.parameters():
        nn.init.normal_(p)
    for b in module.buffers():
        if b.is_floating_point():
            b.uniform_(0.5, 2)
    return module


PRODUCTS = {
    "addmm": (lambda x, w, b: torch.addmm(b, x[:, 0], w, alpha=0.5, beta=2), (6, 4), (4,)),
    "addmm, matrix": (lambda x, w, b: b.addmm(x.flatten(0, 1), w, beta=3).view(*x.shape[:2], -1),
                      (6, 5), (1, 5)),
    "addmm, on the left": (lambda x, w: torch.addmm(x.new_ones(5, 1), w, x.flatten(1).T).T,
                           (5, 18)),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, x, w.expand(len(x), -1, -1), alpha=0.3),
                (6, 5), (3, 5)),
    "addmv": (lambda x, w, b: torch.addmv(b, x[:, 0], w, beta=0.5)[:, None], (6,), (1,)),
    "mv": (lambda x, w: x[:, 1].mv(w)[:, None], (6,)),
    "matmul with a vector": (lambda x, w: x @ w, (6,)),
    "matmul of stacks": (lambda x, w: x.unsqueeze(1) @ w, (2, 6, 5)),
    "matmul of stacks, on the left": (lambda x, w: w @ x.unsqueeze(1).mT, (2, 5, 6)),
    "bmm": (lambda x, w: torch.bmm(x, w.expand(len(x), -1, -1)), (6, 4)),
    "bmm by place": (lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (3, 6, 4)),
    "inner": (lambda x, w: torch.inner(x, w), (4, 6)),
    "linear with a vector": (lambda x, w: F.linear(x, w), (6,)),
    "einsum": (lambda x, w: torch.einsum("btd,de->bte", x, w), (6, 4)),
    "einsum, heads": (lambda x, w: torch.einsum("btd,hde->bthe", x, w), (2, 6, 4)),
    "einsum, heads last": (lambda x, w: torch.einsum("btd,dhe->bthe", x, w), (6, 2, 4)),
    "einsum, output": (
        lambda x, w: torch.einsum("bthd,hde->bte", x.unflatten(2, (2, 3)), w), (2, 3, 4)),
    "einsum, each head": (
        lambda x, w: torch.einsum("hde,bthd->bthe", w, x.unflatten(2, (2, 3))), (2, 3, 4)),
    "einsum, dots": (lambda x, w: torch.einsum("...d,ed", x, w), (4, 6)),
    "einsum, scales": (lambda x, w: torch.einsum("btd,d->bt", x, w), (6,)),
    "einsum, no sum": (lambda x, w: torch.einsum("btd,td->btd", x, w), (3, 6)),
    "einsum, mixed": (lambda x, w: torch.einsum("bthd,dehf->btef", x.unflatten(2, (2, 3)), w),
                      (3, 4, 2, 2)),
    "einsum, summed": (lambda x, w: torch.einsum("btd,de->be", x, w), (6, 4)),
    "einsum of three": (lambda x, w, v: torch.einsum("btd,de,ef->btf", x, w, v), (6, 4), (4, 4)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, 1), (6, 4)),
    "tensordot of two": (lambda x, w: torch.tensordot(x, w, ([1, 2], [1, 0])), (6, 3, 4)),
    "tensordot, on the left": (lambda x, w: torch.tensordot(w, x, ([0], [2])).movedim(1, 0),
                               (6, 4)),
    "expanded by hand": (lambda x, w: x @ w.unsqueeze(0).expand(len(x), -1, -1), (6, 4)),
    "transposed": (lambda x, w: torch.einsum("btd,ed->bte", x, w.T), (6, 4)),
    "part": (lambda x, w: torch.bmm(x, w[2:8].expand(len(x), -1, -1)), (9, 4)),
    "derived": (lambda x, w: torch.einsum("btd,hde->bthe", x, w.tanh()), (2, 6, 4)),
}  # fmt: skip


@pytest.mark.parametrize("n", [3, 4, 6])
@pytest.mark.parametrize("blocks", ["module", "row"])
@pytest.mark.parametrize("use", PRODUCTS)
def test_products(use, blocks, n):
    x = torch.randn(n, 3, 6, generator=torch.Generator().manual_seed(n))
    check(lambda: Use(*PRODUCTS[use]), x, blocks=blocks, bits=False)


RECURRENT = {
    "lstm": lambda **kw: nn.LSTM(4, 4, **kw),
    "gru": lambda **kw: nn.GRU(4, 4, **kw),
    "rnn": lambda **kw: nn.RNN(4, 4, **kw),
    "relu": lambda **kw: nn.RNN(4, 4, nonlinearity="relu", **kw),
}


@pytest.mark.parametrize("blocks", ["module", "row"])
@pytest.mark.parametrize("how", [
    {}, {"num_layers": 3}, {"bidirectional": True, "num_layers": 2}, {"bias": False},
    {"batch_first": False, "bidirectional": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize(("n", "steps"), [(3, 5), (4, 4), (16, 1)])
def test_recurrent_layers(kind, how, n, steps, blocks):
    x = torch.randn(n, steps, 4, generator=torch.Generator().manual_seed(n))
    check(lambda: Rnn(RECURRENT[kind](**{"batch_first": True} | how)), x, blocks=blocks)


@pytest.mark.parametrize("kind", RECURRENT)
def test_last_states_of_recurrent_layers(kind):
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    how = {"num_layers": 2, "bidirectional": True, "batch_first": False}
    check(lambda: Rnn(RECURRENT[kind](**how), states=True), x)


class Cell(nn.Module):
    def __init__(self, cell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state, outs = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outs, 1)


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(kind, n):
    x = torch.randn(n, 5, 4, generator=torch.Generator().manual_seed(n))
    check(lambda: Cell(kind(4, 4)), x)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 2])
def test_bags(mode, padding):
    ids = torch.randint(0, 6, (4, 5), generator=torch.Generator().manual_seed(0))
    check(lambda: nn.EmbeddingBag(6, 4, mode=mode, padding_idx=padding), ids)


def test_weighted_bags():
    ids = torch.randint(0, 6, (4, 5), generator=torch.Generator().manual_seed(0))

    def use(i, w):
        return F.embedding_bag(i, w, mode="sum", per_sample_weights=i.to(w.dtype).sin())

    check(lambda: Use(use, (6, 4)), ids)
