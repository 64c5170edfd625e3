"""Attempts to break the probe: odd views, moved examples, routed rows, functions run too often.

``ONCE_BROKEN`` at the end holds what went wrong at some time, each with a line that says how.
"""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

import fastgrad as fg
from fastgrad.records import Batch
from tests.test_probe_behaviour import Net, assert_exact, data, run

PERM = torch.tensor([2, 0, 3, 1])
BACK = PERM.argsort()
IDS = torch.tensor([7, 0, 3, 3, 1, 2])


class Matrix(nn.Module):
    """One parameter ``w`` that a function uses."""

    def __init__(self, use: Callable, shape=(6, 6)) -> None:
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(shape) * 0.4), use

    def forward(self, x):
        return torch.tanh(self.use(x, self.w))


class Around(nn.Module):
    """Examples are moved, a layer runs, and they are moved back."""

    def __init__(self, go: Callable, back: Callable) -> None:
        super().__init__()
        self.lin, self.go, self.back = nn.Linear(6, 6), go, back

    def forward(self, x):
        return self.back(torch.tanh(self.lin(self.go(x))))


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, between: Callable) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, 6), nn.Linear(6, 6), between

    def forward(self, x):
        return self.b(self.between(torch.tanh(self.a(x))))


def in_the_batch(model, ids, labels):
    """Gradient of each example's own loss, taken within the batch (float64): for models that only
    run on a whole batch but do not mix examples."""
    model, rows = copy.deepcopy(model).double(), []
    for j in range(len(ids)):
        seen = []
        handle = model.head.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
        model.zero_grad()
        run(model, ids, labels)
        handle.remove()
        own = torch.full_like(labels, -100)
        own[j] = labels[j]
        loss = F.cross_entropy(seen[0].flatten(0, 1), own.flatten(), reduction="sum")
        (loss / labels.numel()).backward()
        rows.append({n: p.grad for n, p in model.named_parameters()})
    return rows


def assert_attributed(piece, n=4, tokens=3, **kwargs):
    torch.manual_seed(0)
    model = Net(piece)
    ids, labels = data(n, tokens)
    with fg.Probe(model, **kwargs) as probe:
        run(model, ids, labels).backward()
    stats = probe.stats()
    rows = in_the_batch(model, ids, labels)
    for p, name in enumerate(stats.names):
        if stats.coverage[name].status == "exact":
            want = [0.0 if r[name] is None else float(r[name].norm()) for r in rows]
            np.testing.assert_allclose(stats.T[p], want, rtol=1e-4, atol=1e-6, err_msg=name)
    return stats


def assert_unchanged(make, go):
    """Losses, gradients, buffers and random numbers are what they are without a probe."""
    torch.manual_seed(0)
    plain = make()
    probed = copy.deepcopy(plain)
    torch.manual_seed(1)
    go(plain)
    state = torch.get_rng_state()
    with fg.Probe(probed):
        torch.manual_seed(1)
        go(probed)
    for (name, p), q in zip(plain.named_parameters(), probed.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, p), q in zip(plain.named_buffers(), probed.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6, msg=name)
    assert torch.equal(state, torch.get_rng_state())


# -- views of a parameter ----------------------------------------------------------------

lin = F.linear
VIEWS: dict[str, tuple] = {
    "overlapping": (lambda x, w: lin(lin(x, w[:6]), w[2:8]), (8, 6)),
    "overlapping and whole": (
        lambda x, w: lin(lin(lin(x, w[:6]), w[1:7]), w[2:8]) + lin(x, w).sum(-1, True), (8, 6)),
    "strided rows": (lambda x, w: lin(lin(x, w[::2]), w[1::2]), (12, 6)),
    "strided columns": (lambda x, w: lin(lin(lin(x, w[:, ::2]), w[:, 1::2]), w[:, ::2]), (6, 12)),
    "columns twice": (lambda x, w: lin(lin(lin(x, w[:, :6]), w[:, 6:]), w[:, :6]), (6, 12)),
    "picked columns": (lambda x, w: lin(x, w[:, PERM.repeat(2)[:6]]) + lin(x, w), (6, 6)),
    "negative ids": (lambda x, w: x + w[torch.tensor([-1, -2, 0])], (6, 6)),
    "boolean": (lambda x, w: lin(x, w[torch.tensor([1, 0, 1, 1, 1, 1, 1]).bool()]), (7, 6)),
    "diagonal": (lambda x, w: x * w.diagonal() + w.diag(), (6, 6)),
    "transposed by strides": (lambda x, w: lin(x, w.as_strided((6, 6), (1, 6))), (6, 6)),
    "overlapping strides": (lambda x, w: lin(x, w.view(-1).as_strided((6, 6), (3, 1))), (6, 6)),
    "expanded": (lambda x, w: lin(x, w[:1].expand(6, 6)), (2, 6)),
    "triangles": (lambda x, w: lin(x, w.triu()) + lin(x, w.tril().T), (6, 6)),
    "flat, overlapping": (
        lambda x, w: lin(lin(x, w[:36].view(6, 6)), w[20:56].view(6, 6)), (72,)),
    "experts": (lambda x, w: lin(lin(x, w[0]), w[1]) + lin(x, w[0]), (3, 6, 6)),
    "kron": (lambda x, w: lin(x, torch.kron(w[:2, :3], w[3:6, 4:6])), (6, 6)),
    "outer": (lambda x, w: lin(x, torch.outer(w[0], w[1])), (6, 6)),
    "on the left": (lambda x, w: (w @ x.transpose(1, 2)).transpose(1, 2), (6, 6)),
    "bmm": (lambda x, w: torch.bmm(x, w.expand(x.shape[0], -1, -1)), (6, 6)),
    "in place": (lambda x, w: x.clone().mul_(w[0]).add_(w[1]), (6, 6)),
    "in place on a view": (lambda x, w: (lambda y: (y[:, 0].add_(w[0]), y)[1])(x.clone()), (6, 6)),
    "addcmul": (lambda x, w: torch.addcmul(w[0], x, w[1]), (6, 6)),
    "lerp": (lambda x, w: torch.lerp(x, w[0], w[1].sigmoid()), (6, 6)),
    "put in front": (
        lambda x, w: torch.cat([x, w[:2].expand(x.shape[0], -1, -1)], 1)[:, 1:-1], (6, 6)),
    "looked up by a function": (lambda x, w: lin(x, w.index_select(0, IDS)), (8, 6)),
    "scores": (
        lambda x, w: F.scaled_dot_product_attention(x, x, x, attn_mask=w[:3, :3]), (6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("blocks", ["module", "row", "2x3"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_parameter(view, blocks):
    torch.manual_seed(0)
    assert_exact(Net(Matrix(*VIEWS[view])), *data(), blocks=blocks)


# -- examples that are moved -------------------------------------------------------------


def written(x, ids):
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[ids] = x
    return out


def zeros(x):
    return torch.zeros(x.shape, dtype=x.dtype)


MOVED: dict[str, tuple] = {
    "index": (lambda x: x[PERM], lambda x: x[BACK]),
    "index_select": (lambda x: x.index_select(0, PERM), lambda x: torch.index_select(x, 0, BACK)),
    "flip": (lambda x: x.flip(0), lambda x: x.flip(0)),
    "flip of a list": (lambda x: x.flip([0]), lambda x: torch.flip(x, (0,))),
    "flip of two": (lambda x: x.flip(0, 1), lambda x: x.flip(0, 1)),
    "roll": (lambda x: x.roll(1, 0), lambda x: torch.roll(x, shifts=(-1,), dims=(0,))),
    "index_add": (lambda x: zeros(x).index_add(0, PERM, x), lambda x: x[PERM]),
    "index_add_": (lambda x: zeros(x).index_add_(0, PERM, x), lambda x: x[PERM]),
    "setitem": (lambda x: written(x, PERM), lambda x: x[PERM]),
    "setitem of picked": (lambda x: x[PERM], lambda x: written(x, PERM)),
    "repeat_interleave": (lambda x: x.repeat_interleave(torch.tensor([1, 2, 1, 3]), 0),
                          lambda x: x[torch.tensor([0, 1, 3, 4])]),
    "halves": (lambda x: torch.cat([x[2:], x[:2]]), lambda x: torch.cat([x[2:], x[:2]])),
    "doubled": (lambda x: torch.cat([x, x * 2]), lambda x: sum(x.chunk(2))),
    "expanded": (lambda x: x[None].expand(2, -1, -1, -1).reshape(-1, 3, 6),
                 lambda x: x.view(2, -1, 3, 6).sum(0)),
    "loop": (lambda x: torch.stack([x[i] for i in (3, 2, 1, 0)]),
             lambda x: torch.stack(list(x.unbind(0))[::-1])),
    "permuted matrix": (lambda x: x.movedim(0, 1), lambda x: torch.movedim(x, 0, 1)),
    "einsum": (lambda x: torch.einsum("btd->tbd", x), lambda x: torch.einsum("tbd->btd", x)),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVED)
def test_moved_examples_keep_their_owner(move):
    stats = assert_attributed(Around(*MOVED[move]))
    assert {c.status for c in stats.coverage.values()} == {"exact"}
    assert not stats.meta["mixes_examples"]


class Experts(nn.Module):
    """A mixture of experts with a shared one; eight experts leave some without a token."""

    def __init__(self, experts: int, k: int, how: str) -> None:
        super().__init__()
        self.router, self.shared = nn.Linear(6, experts), nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(experts))
        self.k, self.how = k, how

    def forward(self, x):
        flat = x.reshape(-1, 6)
        weights, chosen = self.router(flat).softmax(-1).topk(self.k, dim=-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, place = (chosen == e).nonzero(as_tuple=True)
            y = torch.tanh(expert(flat[rows])) * weights[rows, place, None]
            if self.how == "index_add":
                out = out.index_add(0, rows, y)
            elif self.how == "index_add_":
                out.index_add_(0, rows, y)
            else:
                out[rows] += y
        return (out + self.shared(flat)).view_as(x)


@pytest.mark.parametrize("how", ["index_add", "index_add_", "setitem"])
@pytest.mark.parametrize(("experts", "k"), [(3, 2), (8, 1)])
def test_mixtures_of_experts(experts, k, how):
    stats = assert_attributed(Experts(experts, k, how))
    assert not stats.meta["mixes_examples"]
    assert "missing" not in {c.status for c in stats.coverage.values()}


class Sorted(nn.Module):
    """Tokens sorted by expert, split, put together and sorted back."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.router, self.written = nn.Linear(6, 3), written
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        flat = x.reshape(-1, 6)
        weight, expert = self.router(flat).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        parts = flat[order].split(expert.bincount(minlength=3).tolist())
        y = torch.cat([torch.tanh(e(p)) for e, p in zip(self.experts, parts, strict=True)])
        y = written(y, order) if self.written else y[order.argsort()]
        return (y * weight[:, None]).view_as(x)


@pytest.mark.parametrize("by_writing", [True, False])
def test_experts_by_sorting(by_writing):
    stats = assert_attributed(Sorted(by_writing))
    assert not stats.meta["mixes_examples"]
    assert "missing" not in {c.status for c in stats.coverage.values()}


@pytest.mark.parametrize("between", [
    lambda x: x + x.max(0, keepdim=True)[0],
    lambda x: x - x.mean(axis=0),
    lambda x: x / x.norm(2, 0),
    lambda x: x + x.flip(0),
    lambda x: x + x.roll(1, 0),
    lambda x: x - torch.cat([x[:1], x[:-1]]),
])  # fmt: skip
def test_mixing_is_reported(between):
    torch.manual_seed(0)
    model = Net(Between(between))
    with fg.Probe(model) as probe:
        run(model, *data()).backward()
    assert probe.stats().meta["mixes_examples"]


# -- images, layers that are called as a whole --------------------------------------------

IMAGES = {
    "padding": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.PReLU(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    "groups": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3, dilation=2, padding=2), nn.Tanh(),
        nn.Conv2d(6, 6, 1, groups=2, stride=2)),
    "norms": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4)),
    "channels last": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last),
}  # fmt: skip


@pytest.mark.parametrize("blocks", ["module", "row", "4x4"])
@pytest.mark.parametrize("kind", IMAGES)
def test_image_models(kind, blocks):
    torch.manual_seed(0)
    model, images = IMAGES[kind]().eval(), torch.randn(4, 3, 5, 5)
    with fg.Probe(model, blocks=blocks, strict=True) as probe:
        model(images).square().flatten(1).mean(1).mean().backward()
    stats, twin = probe.stats(), copy.deepcopy(model).double()
    for j in range(4):
        twin.zero_grad()
        (twin(images[j : j + 1].double()).square().mean() / 4).backward()
        want = [float(p.grad.norm()) for p in twin.parameters()]
        np.testing.assert_allclose(stats.T[:, j], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_user(hook):
    torch.manual_seed(0)
    model = Net(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)))
    for module in model.modules():
        getattr(module, hook)(lambda *_: None)
    assert_exact(model, *data(3, 3), strict=True)


# -- losses that are no sum over examples, and such that are -------------------------------


def of_rows(f):
    """A loss of each row's own, ``[4]``."""
    return lambda o: f(o.square().mean(1))


def _standardised(rows):
    with torch.no_grad():
        return (rows - rows.mean()) / rows.std()


MEETING = {
    "above the mean": of_rows(lambda r: (r * (r > r.mean())).mean()),
    "picked above": of_rows(lambda r: r[r > r.mean()].mean()),
    "where above": of_rows(lambda r: torch.where(r > r.median(), r, 0 * r).mean()),
    "share": of_rows(lambda r: (r * r.detach() / r.detach().sum()).sum()),
    "softmax": of_rows(lambda r: (r * r.detach().softmax(0)).sum()),
    "centred": of_rows(lambda r: (r * (r - r.mean()).detach()).mean()),
    "standardised": of_rows(lambda r: (r * _standardised(r)).mean()),
    "ranks": of_rows(lambda r: (r * r.argsort().argsort().float()).mean()),
    "exponential": of_rows(lambda r: r.mean().exp()),
    "maximum": of_rows(lambda r: r.max()),
    "logsumexp": of_rows(lambda r: r.logsumexp(0)),
    "product": of_rows(lambda r: r.prod()),
    "norm": lambda o: o.norm(),
    "covariance": lambda o: torch.cov(o.T).square().sum(),
    "singular values": lambda o: torch.linalg.svdvals(o).sum(),
    "pairs": lambda o: F.pdist(o).mean(),
    "all pairs": lambda o: torch.einsum("bi,ci->", o, o),
    "pairs in a matrix": lambda o: torch.einsum("bi,ci->bc", o, o).square().mean(),
    "loss of means": lambda o: F.mse_loss(o.mean(0), torch.zeros(5)),
    "picked pairs": lambda o: (
        lambda z: F.cross_entropy(z @ z.T, torch.arange(4)))(o[torch.tensor([2, 0, 3, 1])]),
    "written mean": lambda o: (lambda b: (b.__setitem__(0, o.mean()), b.exp().sum())[1])(
        torch.zeros(2)),
    "scattered": lambda o: torch.zeros(2, 5).scatter_reduce(
        0, torch.zeros(4, 5).long(), o, "sum").square().sum(),
    "weights": lambda o: (lambda w: (w * o.square().mean(1)).sum() / w.sum())(o.sigmoid()[:, 0]),
}
APART = {
    "squares": lambda o: o.square().mean(),
    "cross entropy": lambda o: F.cross_entropy(o, torch.arange(4)),
    "smoothed": lambda o: F.cross_entropy(o, torch.arange(4), label_smoothing=0.1),
    "weighted classes": lambda o: F.cross_entropy(o, torch.arange(4), weight=torch.rand(5)),
    "binary": lambda o: F.binary_cross_entropy_with_logits(o, torch.rand(4, 5)),
    "masked": lambda o: (lambda m: (o.square().mean(1) * m).sum() / m.sum())(torch.eye(4)[0]),
    "counted": lambda o: o.square().sum() / o.numel() * 3 - 1,
    "mean of means": lambda o: o.square().mean(0).mean()[None].sum(),
    "two terms": lambda o: o.square().mean() + 0.1 * o.abs().mean(),
    "own products": lambda o: torch.einsum("bi,bi->", o, o),
    "best class": lambda o: o.max(1)[0].mean() + o.topk(2, 1)[0].sum(),
    "divergence": lambda o: kl_divergence(Normal(o, o.exp()), Normal(0.0, 1.0)).mean(),
    "likelihood": lambda o: -Normal(o, 1.0).log_prob(torch.rand(4, 5)).mean(),
    "policy": lambda o: -(lambda d: (d.log_prob(d.sample())).mean())(Normal(o, 1.0)),
    "poisson": lambda o: (o * torch.poisson(o.detach().exp())).mean(),
    "pooled": lambda o: (torch.rand(5) @ o.unsqueeze(2).expand(-1, -1, 3)).softmax(-1)[:, 0].sum(),
    "ellipsis": lambda o: torch.einsum("...i,...j->...ij", o, o).softmax(-1).square().mean(),
    "no arrow": lambda o: torch.einsum("bi,ij", o, torch.rand(5, 5)).tanh().mean(),
    "cosine": lambda o: F.cosine_embedding_loss(o, torch.rand(4, 5), torch.ones(4)),
    "two means": lambda o: (lambda b: (b.__setitem__(0, o.mean()), b.__setitem__(
        1, o.square().mean()), b.sum())[2])(torch.zeros(2)),
    "transposed mean": lambda o: o.mean(0, keepdim=True).t().narrow(0, 0, 2).flip(0).sum(),
    "stacked": lambda o: torch.hstack([o, o]).square().mean() + torch.tensordot(
        o, torch.rand(5, 5), 1).square().mean(),
    "logged": lambda o: (lambda m: (m, m.detach().exp(), m.item())[0])(o.square().mean()),
}


def met(loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    with fg.Probe(model, strict=True) as probe:
        loss(model(torch.randn(4, 6))).backward()
    return probe.stats().meta["mixes_examples"]


@pytest.mark.parametrize("loss", MEETING)
def test_losses_in_which_examples_meet_are_reported(loss):
    assert met(MEETING[loss])


@pytest.mark.parametrize("loss", APART)
def test_losses_that_sum_over_examples_are_not(loss):
    assert not met(APART[loss])


class Chosen(nn.Module):
    """Each example's column, or elements, of something."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.lin, self.p, self.masked = nn.Linear(6, 6), nn.Parameter(torch.rand(8, 1)), masked
        self.register_buffer("table", torch.rand(8, 10))
        mask = torch.zeros(4, 6, dtype=torch.bool)
        mask[0, :4], mask[1, 2:4], mask[3, 1] = True, True, True
        self.register_buffer("mask", mask)

    def forward(self, x, ids):
        if self.masked:
            return (self.lin(x)[..., self.mask] * self.p[0]).square()
        return (self.table[:, ids] * self.p).square() + self.lin(x).sum(1)


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_picked_along_other_dimensions(masked):
    """The sum of all, so each example's part of p's gradient can be had by leaving out the rest."""
    torch.manual_seed(0)
    model, x, ids = Chosen(masked), torch.rand(4, 6), torch.tensor([3, 0, 3, 7])
    with fg.Probe(model, loss_reduction="sum") as probe:
        model(x, ids).sum().backward()
    stats = probe.stats()
    owner = torch.arange(4)
    if masked:
        owner = model.mask.nonzero()[:, 0]
    for j in range(4):
        model.zero_grad()
        out = model(x, ids)
        out[..., owner == j].sum().backward()
        if stats.coverage["p"].status == "exact":
            want = float(model.p.grad.norm())
            np.testing.assert_allclose(stats.T[stats.index("p"), j], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "first", [nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 6), nn.Softmax(0))]
)
def test_layers_after_examples_have_met_are_covered(first):
    torch.manual_seed(0)
    model = nn.Sequential(first, nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    with fg.Probe(model, strict=True) as probe:
        model(torch.randn(4, 6)).square().mean().backward()
    assert probe.stats().meta["mixes_examples"]


@pytest.mark.parametrize("probed", ["bias", "weight"])
def test_a_layer_whose_weight_is_made_of_all_examples_is_reported(probed):
    """The layer's parameter is the bias alone, or the weight is a parameter times activations."""
    torch.manual_seed(0)

    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.p = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

        def forward(self, x):
            h = self.lin(x)
            mean = h.mean((0, 1)) * torch.ones(6, 1)
            if probed == "bias":
                return torch.nn.functional.linear(h, mean, self.p)
            return torch.nn.functional.linear(h, self.p * mean)

    model = Hyper()
    with fg.Probe(model) as probe:
        model(torch.randn(4, 3, 6)).square().mean().backward()
    assert "torch.nn.functional.linear" in probe.stats().meta["mixes_examples"]


def test_functions_that_write_elsewhere_are_called_once():
    torch.manual_seed(0)
    lin, buffer = nn.Linear(9, 9), torch.zeros(4, 3, 3)
    mean, var = torch.zeros(9), torch.ones(9)
    with fg.Probe(lin):
        out = lin(torch.randn(4, 9))
        with torch.no_grad():
            torch.linalg.inv(out.view(4, 3, 3), out=buffer)
        torch.native_batch_norm(out, None, None, mean, var, True, 0.1, 1e-5)[0].sum().backward()
    assert buffer.shape == (4, 3, 3)
    torch.testing.assert_close(mean, 0.1 * out.mean(0))


def test_calls_by_name_and_targets_filled_in_place():
    torch.manual_seed(0)

    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.p = nn.Linear(6, 6), nn.Parameter(torch.rand(6))

        def forward(self, x):
            torch.repeat_interleave(x[:, 0, 0].abs().long())
            out = torch.zeros(x.shape, dtype=x.dtype)
            out += torch.movedim(input=self.lin(x).movedim(0, 1), source=0, destination=1)
            return out * self.p

    assert_exact(Net(Filled()), *data(3, 3), strict=True)


# -- what went wrong once ------------------------------------------------------------------


def _reported(piece):
    """Mixing of examples is reported, or nothing claims to be exact."""

    def case():
        torch.manual_seed(0)
        model = Net(piece())
        with fg.Probe(model) as probe:
            run(model, *data()).backward()
        stats = probe.stats()
        assert stats.meta["mixes_examples"]

    return case


def _exact(make, **kwargs):
    def case():
        torch.manual_seed(0)
        assert_exact(Net(make()), *data(), **kwargs)

    return case


def _moved(go, back):
    return lambda: assert_attributed(Around(go, back))


def _wide(ids, x):
    return ids.view(-1, *[1] * (x.ndim - 1)).expand_as(x)


def _train(model):
    ids, labels = data()
    run(model, ids, labels).backward()


def _batch_norm():
    x = torch.randn(4, 6)

    def make():
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    assert_unchanged(make, lambda m: m(x).square().mean().backward())


def _dropout():
    def make():
        return Net(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True))

    assert_unchanged(make, _train)


def _gru_dropout():
    class Piece(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(6, 6, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    assert_unchanged(lambda: Net(Piece()), _train)


def _second_order_zero():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(4, 6)
    want = torch.autograd.functional.hessian(lambda v: model(v).sum(), x)
    with fg.Probe(model):
        got = torch.autograd.functional.hessian(lambda v: model(v).sum(), x)
    torch.testing.assert_close(got, want)


def _penalty(make):
    x = torch.randn(4, 6)

    def go(model):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        (grad,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
        (out.square().mean() + (grad.norm(dim=1) - 1).square().mean()).backward()

    return lambda: assert_unchanged(make, go)


class _Complex(nn.Module):
    def __init__(self, real: bool) -> None:
        super().__init__()
        self.real = real
        self.w = nn.Parameter(torch.randn(6, 2) if real else torch.randn(6, dtype=torch.cfloat))

    def forward(self, x):
        return (x * (torch.view_as_complex(self.w) if self.real else self.w)).abs()


def _complex(make):
    x = torch.randn(4, 3, 6)
    return lambda: assert_unchanged(make, lambda m: m(x).square().sum().backward())


class _Checkpointed(nn.Module):
    """A checkpoint around a function that is no module."""

    def __init__(self, use: Callable) -> None:
        super().__init__()
        self.lin, self.scale, self.use = nn.Linear(6, 6), nn.Parameter(torch.randn(6)), use

    def forward(self, x):
        return checkpoint(lambda v: self.use(self, v), x, use_reentrant=False)


def _runs(make, *inputs):
    def case():
        model = make()
        with fg.Probe(model):
            model(*inputs).square().mean().backward()

    return case


def _outside():
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 5)

        def forward(self, ids):
            return torch.tanh(self.embed(ids)).mean(1)

    model, batches, want = Encoder(), [data(4), data(4, seed=1)], []
    with fg.Probe(model) as probe:
        found = [model(ids) for ids, _ in batches]  # both before the parameter is used outside
        sum(
            F.cross_entropy(model.head(h), labels[:, 0])
            for h, (_, labels) in zip(found, batches, strict=True)
        ).backward()
    twin = copy.deepcopy(model).double()
    for ids, labels in batches:
        for j in range(4):
            twin.zero_grad()
            h = twin(ids[j : j + 1])
            (F.cross_entropy(twin.head(h), labels[j : j + 1, 0]) / 4).backward()
            want.append(float(twin.head.weight.grad.norm()))
    stats = probe.stats()
    if stats.coverage["head.weight"].status == "exact":
        np.testing.assert_allclose(stats.T[stats.index("head.weight")], want, rtol=1e-4)


def _contrastive():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    with fg.Probe(model) as probe:
        a, b = model(torch.randn(4, 6)), model(torch.randn(4, 6))
        F.cross_entropy(a @ b.T, torch.arange(4)).backward()
    assert probe.stats().meta["mixes_examples"]


def _loss(of):
    def case():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        with fg.Probe(model) as probe:
            of(model(torch.randn(4, 6))).backward()
        assert probe.stats().meta["mixes_examples"]

    return case


def _leak():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x):
            return self.lin(torch.tanh(self.lin(x)))

    model = Twice()
    with fg.Probe(model) as probe:
        for _ in range(3):
            loss = model(torch.randn(4, 6)).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
    del loss
    gc.collect()
    assert not [b for b in gc.get_objects() if type(b) is Batch and b.samples is probe._samples]


def _saved():
    model, x, file = nn.Linear(6, 1), torch.randn(4, 6), io.BytesIO()
    with fg.Probe(model):
        model(x).sum().backward()
    torch.save(x, file)
    file.seek(0)
    torch.load(file)


def _hooks():
    calls = []

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(6))

        def forward(self, x):
            return x * (1 + self.w)

    model = Scaled()
    model.w.register_hook(lambda g: calls.append(g.shape))
    with fg.Probe(model):
        model(torch.randn(4, 6)).sum().backward()
    assert len(calls) == 1


class _Chunks(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(rows, 6) * 0.3)

    def forward(self, x):
        a, b = self.w[:6], self.w[6:]
        for _ in range(2):
            x = torch.tanh(lin(x, a))
            x = x + torch.tanh(lin(x, b)).sum(-1, keepdim=True)
        return x


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(11))

    def forward(self, x):
        return x + self.b[(x[..., 0] * 10).long().remainder(11)].unsqueeze(-1)


def _recurrent():
    model = nn.LSTM(4, 4, batch_first=True)  # as many examples as hidden units
    with fg.Probe(model, strict=True):
        model(torch.randn(4, 5, 4))[0].square().mean().backward()


def _topk_by_position():
    def between(x):
        flat = x.reshape(-1, 6)
        weights, chosen = flat.softmax(-1).topk(2, -1)  # k and dim by position
        rows, place = (chosen == 0).nonzero(as_tuple=True)
        return flat.index_add(0, rows, flat[rows] * weights[rows, place, None]).view_as(x)

    assert not assert_attributed(Between(between)).meta["mixes_examples"]


def _vmap():
    model = nn.Linear(6, 1)
    with fg.Probe(model):
        torch.func.vmap(model)(torch.randn(4, 1, 6))


def _norm(x):
    return nn.utils.parametrizations.weight_norm(x)


ONCE_BROKEN: list[tuple[str, str, Callable[[], object]]] = [
    # the user's run changes
    ("batch norm", "running statistics are updated n + 2 times (general rule)", _batch_norm),
    ("attention dropout", "the general rule draws random numbers n + 1 times more", _dropout),
    ("gru dropout", "the same", _gru_dropout),
    ("hessian", "taps end second derivatives silently: zero", _second_order_zero),
    ("penalty, one layer", "gradient penalty's gradient is lost silently",
     _penalty(lambda: nn.Linear(6, 1))),
    ("complex parameter", "imaginary part of .grad is dropped", _complex(lambda: _Complex(False))),
    ("view_as_complex", "the same, for a real parameter", _complex(lambda: _Complex(True))),
    ("hooks", "a user's hook on a parameter of a derived tensor runs twice", _hooks),
    # crashes
    ("penalty", "create_graph raises in once_differentiable",
     _penalty(lambda: nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 1)))),
    ("checkpointed linear", "CheckpointError: recomputed without the mode",
     _exact(lambda: _Checkpointed(lambda s, x: lin(x * s.scale, s.lin.weight, s.lin.bias)))),
    ("checkpointed scale", "CheckpointError: recomputed without the mode",
     _exact(lambda: _Checkpointed(lambda s, x: s.lin(x * s.scale)))),
    ("weight norm of conv", "product's gradients are not shaped as the derived weight",
     _runs(lambda: _norm(nn.Conv2d(3, 4, 3)), torch.randn(4, 3, 5, 5))),
    ("sampled softmax", "a looked-up root as a matrix is taken for the parameter",
     _exact(lambda: Matrix(lambda x, w: lin(x, w[IDS]), (8, 6)))),
    ("sampled softmax, permuted", "the same: missing by the self-check",
     _exact(lambda: Matrix(lambda x, w: lin(x, w[torch.arange(5, -1, -1)]), (6, 6)))),
    ("table of numbers", "a one-dimensional parameter looked up", _exact(_Table)),
    ("uneven chunks twice", "cross terms of factors of different regions", _exact(
        lambda: _Chunks(10))),
    ("complex linear", "ValueError in backward", _complex(
        lambda: type("M", (nn.Linear,), {"forward": lambda s, x: nn.Linear.forward(
            s, x.cfloat()).abs()})(6, 6, dtype=torch.cfloat))),
    ("empty batch", "ZeroDivisionError", _runs(lambda: nn.Linear(6, 1), torch.zeros(0, 6))),
    ("vmap", "taps lack setup_context: so do jvp, vjp, jacrev of the probed model", _vmap),
    # silently wrong
    ("chunks twice", "cross terms between disjoint regions are added", _exact(lambda: _Chunks(12))),
    ("index_put", "owners are not moved", _moved(
        lambda x: x[PERM], lambda x: zeros(x).index_put((PERM,), x))),
    ("index_put_", "owners are not moved", _moved(
        lambda x: x[PERM], lambda x: torch.zeros_like(x).index_put_((PERM,), x))),
    ("scatter", "owners are not moved", _moved(
        lambda x: x[PERM], lambda x: zeros(x).scatter(0, _wide(PERM, x), x))),
    ("scatter_", "owners are not moved", _moved(
        lambda x: zeros(x).scatter_(0, _wide(PERM, x), x), lambda x: x[PERM])),
    ("scatter_add_", "owners are not moved", _moved(
        lambda x: zeros(x).scatter_add_(0, _wide(PERM, x), x), lambda x: x[PERM])),
    ("index_copy", "owners are not moved", _moved(
        lambda x: zeros(x).index_copy(0, PERM, x), lambda x: x[PERM])),
    ("flipud", "no rule: position is kept", _moved(torch.flipud, torch.flipud)),
    ("rot90", "no rule: position is kept", _moved(
        lambda x: torch.rot90(x, 2), lambda x: torch.rot90(x, 2))),
    ("linear over the examples", "no product rule for F.linear", _moved(
        lambda x: lin(x.permute(1, 2, 0), torch.eye(4, dtype=x.dtype)[PERM]).permute(2, 0, 1),
        lambda x: x[BACK])),
    ("rows of an activation", "an activation as the table of F.embedding", _moved(
        lambda x: F.embedding(PERM, x.reshape(4, -1)).view(4, 3, 6), lambda x: x[BACK])),
    ("transpose_", "in place: the mark stays; as many examples as tokens",
     lambda: assert_attributed(Around(lambda x: x.clone().transpose_(0, 1),
                                      lambda x: x.clone().transpose_(0, 1)), 3, 3)),
    ("two passes, used outside", "marks of another batch count as none: sizes decide", _outside),
    # mixing that is not reported
    *[(f"mixing by {name}", "position is kept without a report", _reported(
        lambda f=f: Between(f))) for name, f in {
            "cumsum": lambda x: x.cumsum(0),
            "softmax": lambda x: x.softmax(0),
            "normalize": lambda x: F.normalize(x, dim=0),
            "attention": lambda x: F.scaled_dot_product_attention(
                *[x.transpose(0, 1)] * 3).transpose(0, 1),
            "layer norm": lambda x: F.layer_norm(x.permute(1, 2, 0), (4,)).permute(2, 0, 1),
            "pooling": lambda x: F.avg_pool1d(x.permute(1, 2, 0), 3, 1, 1).permute(2, 0, 1),
            "fft": lambda x: torch.fft.fft(x, dim=0).real,
            "detached mean": lambda x: x - x.mean(0, keepdim=True).detach(),
        }.items()],
    ("contrastive, two passes", "a @ b.T of two forward passes", _contrastive),
    *[(f"loss: {name}", "a loss that is no sum over examples", _loss(f)) for name, f in {
        "root mean square": lambda o: o.square().mean().sqrt(),
        "variance": lambda o: o.std(0).mean(),
        "cdist": lambda o: torch.cdist(o, o).mean(),
        "hardest examples": lambda o: o.square().sum(1).topk(2)[0].mean(),
        "tensordot": lambda o: torch.tensordot(o, o, dims=([1], [1])).square().sum(),
    }.items()],
    # memory, and others
    ("two backward passes", "uses of a shared weight keep their graph for ever", _leak),
    ("saved input", "the mark on the user's tensor makes torch.load refuse it", _saved),
    ("lstm, n == hidden", "a weight of the batch's size is taken for repeated", _recurrent),
    ("topk by position", "k is read as dimension: mixing reported in error", _topk_by_position),
]  # fmt: skip


@pytest.mark.parametrize("case", [c for *_, c in ONCE_BROKEN], ids=[n for n, *_ in ONCE_BROKEN])
def test_what_was_broken_once(case):
    torch.manual_seed(0)
    case()
