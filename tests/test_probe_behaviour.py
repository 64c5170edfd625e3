"""The probe beyond plain training: what is missing is named, what is wrong is refused."""

from __future__ import annotations

import copy
import gc
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgrad as fg
from fastgrad.errors import (
    BlockSpecError,
    CoverageError,
    NonFiniteGradientError,
    ProbeError,
    StatsError,
)
from fastgrad.records import Batch, ParamRecord
from tests.models import MODELS, batch_of, llama, one_example, randomised


class Net(nn.Module):
    """Token classifier built of one piece under test."""

    def __init__(self, piece: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.piece = piece
        self.head = nn.Linear(width, 5)

    def forward(self, input_ids, labels):
        logits = self.head(self.piece(self.embed(input_ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def run(model, ids, labels):
    return model(input_ids=ids, labels=labels)


def data(n=4, tokens=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (n, tokens), generator=g), torch.randint(
        0, 5, (n, tokens), generator=g
    )


def definition(model, ids, labels):
    """Contributions to the token-mean batch loss, example by example, in float64."""
    model = copy.deepcopy(model).double()
    rows = []
    for j in range(len(ids)):
        model.zero_grad()
        (run(model, ids[j : j + 1], labels[j : j + 1]) / len(ids)).backward()
        rows.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return rows


def assert_exact(model, ids, labels, missing=(), **kwargs):
    with fg.Probe(model, **kwargs) as probe:
        run(model, ids, labels).backward()
    stats = probe.stats()
    rows = definition(model, ids, labels)
    found_missing = {n for n, c in stats.coverage.items() if c.status == "missing"}
    assert found_missing == set(missing), [c for c in stats.coverage.values() if c.reason]
    for p, name in enumerate(stats.names):
        want = np.array([float(r[name].norm()) for r in rows])
        if name in missing:
            assert np.isnan(stats.T[p]).all()
            total = sum(r[name] for r in rows)
            assert abs(stats.grad_norm[p] - float(total.norm())) < 1e-5
        else:
            np.testing.assert_allclose(stats.T[p], want, rtol=1e-4, atol=1e-6, err_msg=name)
    return stats


class Twice(nn.Module):
    """The same weight used three times: as a module, as a module again, and by F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        x = torch.tanh(self.lin(x))
        x = torch.tanh(self.lin(x))
        return F.linear(x, self.lin.weight)


class Scales(nn.Module):
    """Bare parameters that broadcast: scale, shift, table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.shift = nn.Parameter(torch.randn(6))
        self.table = nn.Parameter(torch.randn(1, 3, 6))

    def forward(self, x):
        return (x + self.table) * self.scale - self.shift


class Matmul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return x @ self.w


class Prepared(nn.Module):
    """Parameters that are prepared before they meet an activation: Gemma's norm, tied heads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.w = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        x = x * (1.0 + self.scale.float()) + torch.exp(self.scale)
        return torch.tanh(x @ self.w.T) @ self.w.t() + torch.matmul(x, self.w.transpose(0, 1))


class Positions(nn.Module):
    """Position embeddings in their usual forms, added with and without an operator of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, x):
        ids = torch.arange(x.shape[1])[None]
        x = x + self.table(ids).to(x.dtype)
        x += self.table(ids + 1)
        return x * torch.sigmoid(self.table(ids))


class Flattened(nn.Module):
    """Examples and tokens in one dimension, made by reshape and followed through functions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, x):
        flat = x.transpose(1, 2).reshape(x.shape[0], 6, -1).transpose(1, 2).reshape(-1, 6)
        return self.norm(self.b(torch.relu(self.a(flat)))).view(x.shape)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(6), nn.RMSNorm(6)
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("blocks", ["module", "2x4"])
@pytest.mark.parametrize("piece", [Twice, Scales, Matmul, Normed, Prepared, Positions, Flattened])
def test_uses_of_every_kind_are_exact(piece, blocks):
    torch.manual_seed(0)
    assert_exact(Net(piece()), *data(), blocks=blocks, strict=True)


@pytest.mark.parametrize("piece", [Twice, Scales, Matmul, Normed, Prepared, Positions, Flattened])
def test_a_batch_as_large_as_its_rows_are_long(piece):
    """Sizes prove nothing here: 3 examples of 3 tokens, 6 examples at width 6."""
    torch.manual_seed(0)
    assert_exact(Net(piece()), *data(3, 3), strict=True)
    assert_exact(Net(piece()), *data(6, 3), strict=True)
    assert_exact(Net(piece()), *data(8, 3), strict=True)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.back = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = torch.tanh(self.lin(x.transpose(0, 1)))
        return self.back(y.transpose(0, 1))


class Foreign(nn.Module):
    """Parameters that meet something of the batch's size which is no activation."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(n, 6)), nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.register_buffer("mask", torch.randn(n, 6))

    def forward(self, x):
        w = self.a @ self.b
        return F.linear(F.linear(x, w), w.T) + F.linear(x, self.mask * self.scale)[..., :1]


class Relative(nn.Module):
    """A table looked up with ids that do not come from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, x):
        return x + self.table(torch.arange(x.shape[1])) * 0.1


@pytest.mark.parametrize(
    ("make", "n"),
    [(SequenceFirst, 3), (lambda: Foreign(4), 4), (Relative, 3)],
    ids=["sequence-first", "foreign", "relative"],
)
@pytest.mark.parametrize("blocks", ["module", "2x4"])
def test_what_only_looks_like_examples_is_not_taken_for_them(make, n, blocks):
    torch.manual_seed(0)
    assert_exact(Net(make()), *data(n, 3), blocks=blocks, strict=True)


class Picked(nn.Module):
    """As many routed rows as examples."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        flat = x.reshape(-1, 6)
        return x + self.expert(flat[torch.tensor([0, 4])]).sum(0)


def test_as_many_picked_rows_as_examples():
    """Each picked row adds to all examples: what came through one example's rows is exact, but no
    example has a loss of its own."""
    torch.manual_seed(0)
    model = Net(Picked())
    with fg.Probe(model, loss_reduction="row_mean") as probe:
        run(model, *data(2, 3)).backward()
    stats = probe.stats()
    assert stats.coverage["piece.expert.weight"].status == "exact"
    assert np.isfinite(stats.T).all()
    assert len(stats.meta["mixes_examples"]) == 1
    with pytest.raises(StatsError, match=r"mixes examples \(in .*add"):
        stats.influence("example_mean")


class Cancelling(nn.Module):
    """Two uses of one weight that nearly cancel, as a critic's on real minus fake."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.lin, self.eps = nn.Linear(6, 6, bias=False), eps

    def forward(self, x):
        return (self.lin(x) - self.lin(x * (1 + self.eps))) / self.eps


@pytest.mark.parametrize("eps", [0.5, 1e-2, 1e-3])
def test_cross_terms_that_nearly_cancel(eps):
    """One example at a time is itself off by eps(float32)/eps here; ten times that is allowed."""
    torch.manual_seed(0)
    model, (ids, labels) = Net(Cancelling(eps)), data()
    with fg.Probe(model, strict=True) as probe:
        run(model, ids, labels).backward()
    stats = probe.stats()
    row = stats.index("piece.lin.weight")
    want = [float(r["piece.lin.weight"].norm()) for r in definition(model, ids, labels)]
    np.testing.assert_allclose(stats.T[row], want, rtol=1e-4 + 1e-6 / eps)


class Heads(nn.Module):
    """A norm on heads that were moved by a transpose: not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)

    def forward(self, x):
        heads = x.view(*x.shape[:2], 2, 3).transpose(1, 2)
        return self.norm(heads).transpose(1, 2).flatten(2)


class Scalar(nn.Module):
    """A bias of one element, broadcast over all outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(1))

    def forward(self, x):
        return F.linear(x, self.w) + F.linear(x, self.w.detach(), self.b)


def test_odd_but_legal_layers_do_not_crash():
    torch.manual_seed(0)
    assert_exact(Net(Heads()), *data(), strict=True)
    assert_exact(Net(Scalar()), *data(), strict=True)
    ids, labels = data()
    model = Net(Twice())
    with fg.Probe(model, strict=True) as probe:
        run(model, ids.int(), labels).backward()
    assert probe.stats().n_examples == 4
    with fg.Probe(model):
        torch.mm(torch.ones(2, 2), mat2=torch.ones(2, 2))
        with torch.autocast("cpu", torch.bfloat16):
            norm = Net(Normed()).bfloat16()
            run(norm, ids, labels)


def test_one_example_and_one_token():
    torch.manual_seed(0)
    assert_exact(Net(Twice()), *data(1, 3))
    assert_exact(Net(Twice()), *data(5, 1))


class Hidden(nn.Module):
    """A weight of which one use has no tap and is too large for the general rule."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return torch.cdist(self.lin(x), self.lin.weight)


class General(Hidden):
    """The same, small enough; and more functions without a tap."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.table = nn.Parameter(torch.rand(1)), nn.Parameter(torch.randn(1, 1, 6))
        self.left, self.right = nn.Bilinear(6, 6, 6), nn.GroupNorm(2, 6)

    def forward(self, x):
        x = F.prelu(super().forward(x), self.slope)
        x = torch.cat([self.table.expand(len(x), -1, -1), x], 1)[:, 1:] + 0.1 * x
        x = self.left(x, x.flip(1)) + self.table.repeat(len(x), x.shape[1], 1)
        return self.right(x.transpose(1, 2)).transpose(1, 2)


class Smuggled(nn.Module):
    """A use that no function sees: the probed weight enters through a custom Function."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx, a, w):
                ctx.save_for_backward(a, w)
                return a @ w

            @staticmethod
            def backward(ctx, g):
                a, w = ctx.saved_tensors
                return g @ w.T, a.flatten(0, 1).T @ g.flatten(0, 1)

        return Product.apply(self.lin(x), self.lin.weight)


class Routed(nn.Module):
    """Rows picked by index, as a mixture of experts does, and added to all."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        flat = x.reshape(-1, 6)
        picked = flat[flat[:, 0] > 0]
        return x + 0.1 * self.expert(picked).sum(0)


class Convs(nn.Module):
    """Convolutions of one to three dimensions with strides, padding, dilation and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 6, 3, padding="same", dilation=2)
        self.even = nn.Conv1d(6, 6, 2, padding="same")
        self.depth = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.two = nn.Conv2d(1, 6, (1, 3), stride=(1, 2), padding=(0, 1))
        self.three = nn.Conv3d(6, 4, (1, 1, 2), groups=2)
        self.back = nn.ConvTranspose1d(4, 6, 2, stride=2, padding=1)

    def forward(self, x):
        y = self.depth(torch.tanh(self.even(self.one(x.transpose(1, 2)))))
        y = torch.tanh(self.two(y.transpose(1, 2)[:, None]))
        y = self.three(y[:, :, None])[:, :, 0]
        return x + self.back(y.mean(3)).mean(2)[:, None]


@pytest.mark.parametrize("blocks", ["module", "2x4"])
@pytest.mark.parametrize("piece", [General, Convs])
def test_functions_of_every_kind_are_exact(piece, blocks):
    torch.manual_seed(0)
    assert_exact(Net(piece()), *data(3, 5), blocks=blocks, strict=True)


@pytest.mark.parametrize(
    ("piece", "missing", "reason", "options"),
    [
        (Hidden, ["piece.lin.weight"], r"torch.functional.cdist.*dense_limit", {"dense_limit": 9}),
        (Smuggled, ["piece.lin.weight"], "custom autograd function .*Product", {}),
    ],
)
def test_what_is_not_covered_is_named_and_strict_raises(piece, missing, reason, options):
    torch.manual_seed(0)
    stats = assert_exact(Net(piece()), *data(), missing=missing, **options)
    assert all(re.search(reason, stats.coverage[n].reason) for n in missing)
    with pytest.raises(CoverageError, match=missing[0]):
        assert_exact(Net(piece()), *data(), strict=True, **options)


def test_the_self_check_finds_what_nobody_announced(monkeypatch):
    """As it would be with a function that no look into the autograd graph finds."""
    for place in ("taps", "probe"):
        monkeypatch.setattr(f"fastgrad.{place}.refuse_unannounced", lambda tensors, batch: None)
    torch.manual_seed(0)
    stats = assert_exact(Net(Smuggled()), *data(), missing=["piece.lin.weight"])
    assert "self-check" in stats.coverage["piece.lin.weight"].reason


class Complex(nn.Module):
    """A parameter that enters a function together with statistics of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.linalg.solve(self.w, x.flatten(1).T @ x.flatten(1))


def test_a_model_without_any_supported_layer():
    model = Complex()
    with fg.Probe(model) as probe:
        model(torch.randn(2, 8)).square().mean().backward()
    with pytest.raises(CoverageError, match=r"no layer of Complex.*solve.*per_example=False"):
        probe.stats()
    with fg.Probe(model, per_example=False) as probe:
        model(torch.randn(2, 8)).square().mean().backward()
    assert (probe.stats().grad_norm > 0).all()


def test_batch_norm_mixes_examples_unless_it_evaluates():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
                          nn.Linear(27, 2))  # fmt: skip
    images = torch.randn(4, 1, 4, 4)
    model(images)
    for training in (True, False):
        model.train(training)
        with fg.Probe(model, loss_reduction="row_mean") as probe:
            model(images).square().mean().backward()
        stats = probe.stats()
        assert "missing" not in {c.status for c in stats.coverage.values()}
        if training:
            with pytest.raises(StatsError, match="batch_norm"):
                stats.influence("example_mean")
            continue
        for j in range(4):
            model.zero_grad()
            model(images[j : j + 1]).square().mean().backward()
            want = [float(p.grad.norm()) for p in model.parameters()]
            np.testing.assert_allclose(stats.influence("example_mean")[:, j], want, rtol=1e-4)


def test_rows_that_one_example_gives_to_all():
    torch.manual_seed(0)
    model, (ids, labels) = Net(Routed()), data(4, 5)
    with fg.Probe(model, loss_reduction="row_mean") as probe:
        run(model, ids, labels).backward()
    stats = probe.stats()
    assert stats.coverage["piece.expert.weight"].status == "exact"
    assert stats.meta["mixes_examples"]


def test_the_self_check_catches_a_wrong_tap(monkeypatch):
    original = ParamRecord.add_product
    monkeypatch.setattr(
        ParamRecord,
        "add_product",
        lambda self, left, right, *args: original(self, left, right * 1.01, *args) / 1.01,
    )
    model = randomised(MODELS["llama"])
    with fg.Probe(model) as probe:
        model(**batch_of()).loss.backward()
    reasons = [c.reason for c in probe.stats().coverage.values() if c.status == "missing"]
    assert reasons
    assert all("self-check" in r for r in reasons)


def test_the_gradient_itself_is_untouched():
    model = randomised(MODELS["llama-tied"])
    plain = copy.deepcopy(model)
    plain(**batch_of()).loss.backward()
    with fg.Probe(model):
        model(**batch_of()).loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_accumulation_several_batches_and_the_last_smaller_one():
    model = randomised(MODELS["llama"])
    batches = [batch_of(3, seed=1), batch_of(3, masked=True, seed=2), batch_of(1, seed=3)]
    with fg.Probe(model) as probe:
        for batch in batches:
            (model(**batch).loss / 3).backward()  # gradients accumulate, no zero_grad
            with torch.no_grad():
                model(**batch)  # an evaluation in between is not a batch
    stats = probe.stats()
    assert stats.batch.tolist() == [0, 0, 0, 1, 1, 1, 2]
    fresh = copy.deepcopy(model)
    column = 0
    for batch in batches:
        for j in range(batch["input_ids"].shape[0]):
            fresh.zero_grad()
            fresh(**one_example(batch, j)).loss.backward()
            want = [float(p.grad.norm()) for p in fresh.parameters()]
            got = stats.influence("example_mean")[:, column] * 3  # the loss was divided by 3
            np.testing.assert_allclose(got, want, rtol=2e-4)
            column += 1


@pytest.mark.parametrize("reduction", ["token_mean", "row_mean", "sum"])
def test_scales_under_each_reduction(reduction):
    model = randomised(MODELS["llama"])
    batch = batch_of(masked=True)
    labels = batch["labels"]

    def loss_of(b):
        logits = model(input_ids=b["input_ids"], labels=b["labels"]).logits[:, :-1]
        target = b["labels"][:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=-100)
        counts = (target != -100).sum(1)
        if reduction == "sum":
            return each.sum()
        if reduction == "row_mean":
            return (each.sum(1) / counts).mean()
        return each.sum() / counts.sum()

    with fg.Probe(model, loss_reduction=reduction) as probe:
        loss_of(batch).backward()
    stats = probe.stats()
    for j in range(3):
        count = int((labels[j, 1:] != -100).sum())
        model.zero_grad()
        model(**one_example(batch, j)).loss.backward()
        want = np.array([float(p.grad.norm()) for p in model.parameters()])
        np.testing.assert_allclose(stats.influence("example_mean")[:, j], want, rtol=2e-4)
        np.testing.assert_allclose(stats.influence("example_sum")[:, j], want * count, rtol=2e-4)


def test_an_example_without_labels_contributes_nothing():
    model = randomised(MODELS["llama"])
    batch = batch_of()
    batch["labels"][1] = -100
    with fg.Probe(model) as probe:
        model(**batch).loss.backward()
    stats = probe.stats()
    assert stats.label_tokens.tolist() == [8, 0, 8]
    assert (stats.influence("example_mean")[:, 1] == 0).all()
    assert (stats.influence("example_mean")[:, 0] > 0).all()
    assert np.isfinite(stats.signal_sq).all()


def test_num_items_in_batch_is_the_divisor():
    model = randomised(MODELS["llama"])
    batch = batch_of()
    with fg.Probe(model) as probe:
        model(**batch, num_items_in_batch=torch.tensor(100)).loss.backward()
    with fg.Probe(model) as plain:
        model(**batch).loss.backward()
    a, b = probe.stats(), plain.stats()
    np.testing.assert_allclose(
        a.influence("example_mean"), b.influence("example_mean"), rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(a.T * 100, b.T * b.label_tokens.sum(), rtol=1e-4, atol=1e-5)


def test_signed_influence_of_several_directions():
    model = randomised(MODELS["llama-tied"])
    batch = batch_of(masked=True)
    directions = {
        label: {n: torch.randn_like(p) for n, p in model.named_parameters()} for label in "ab"
    }
    del directions["b"]["model.norm.weight"]
    with fg.Probe(model, blocks="8x8", targets=directions) as probe:
        model(**batch).loss.backward()
    stats = probe.stats()
    weight = stats.label_tokens / stats.label_tokens.sum()
    for j in range(3):
        model.zero_grad()
        model(**one_example(batch, j)).loss.backward()
        for k, label in enumerate("ab"):
            for p, (name, q) in enumerate(model.named_parameters()):
                d = directions[label].get(name, torch.zeros_like(q))
                want = float((q.grad * d).sum()) * weight[j]
                scale = float(q.grad.norm() * max(d.norm(), 1)) * weight[j]
                assert abs(stats.alignment[k, p, j] - want) <= 1e-4 * scale, name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_autocast_measures_the_autocast_gradient(architecture):
    model = randomised(MODELS[architecture])
    batch = batch_of()
    with fg.Probe(model) as probe:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    stats = probe.stats()
    assert {c.status for c in stats.coverage.values()} == {"exact"}, stats.coverage
    for j in range(3):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**one_example(batch, j)).loss
        loss.backward()
        largest = max(float(q.grad.norm()) for q in model.parameters() if q.grad is not None)
        for p, q in enumerate(model.parameters()):
            want = float(q.grad.norm())
            got = stats.influence("example_mean")[p, j]
            assert abs(got - want) <= 0.03 * max(want, 1e-2 * largest), stats.names[p]


def test_nan_is_named_and_earlier_batches_are_kept():
    model = randomised(MODELS["llama"])
    probe = fg.Probe(model)
    with probe:
        model(**batch_of()).loss.backward()
        with pytest.raises(NonFiniteGradientError, match=r"lm_head\.weight"):
            (model(**batch_of()).loss * float("nan")).backward()
        assert probe.stats().n_examples == 3
        model.zero_grad()
        model(**batch_of()).loss.backward()
    assert probe.stats().n_examples == 6
    with fg.Probe(model, on_nonfinite="skip") as probe:
        model(**batch_of()).loss.backward()
        (model(**batch_of()).loss * float("inf")).backward()
    assert probe.stats().meta["skipped_batches"] == 1
    assert probe.stats().n_batches == 1


def test_norms_only_need_no_taps():
    model = randomised(MODELS["llama"])
    with fg.Probe(model, blocks="8x8", per_example=False) as probe:
        model(**batch_of()).loss.backward()
    stats = probe.stats()
    assert stats.n_examples == 0
    for p, q in enumerate(model.parameters()):
        assert abs(stats.grad_norm[p] - float(q.grad.norm())) <= 1e-5 * float(q.grad.norm())
        blocks = stats.block_grad_norm(stats.names[p])
        assert abs(float((blocks**2).sum()) - float(q.grad.square().sum())) < 1e-4
    with pytest.raises(StatsError, match="per_example=True"):
        _ = stats.T


def test_frozen_and_unused_parameters_are_reported():
    model = randomised(MODELS["bert"])
    model.bert.embeddings.requires_grad_(False)
    model.extra = nn.Linear(3, 3)
    with fg.Probe(model) as probe:
        model(**batch_of()).loss.backward()
    coverage = probe.stats().coverage
    assert coverage["bert.embeddings.word_embeddings.weight"].status == "frozen"
    assert coverage["extra.weight"].status == "unused"
    assert coverage["bert.encoder.layer.0.output.dense.weight"].status == "exact"


def test_activation_checkpointing_is_exact():
    model = randomised(MODELS["llama"])
    batch = batch_of()
    with fg.Probe(model) as probe:
        model(**batch).loss.backward()
    want = probe.stats()
    for reentrant in (False, True):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        twin.train()
        twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with fg.Probe(twin, strict=True) as probe:
            twin(**batch).loss.backward()
        got = probe.stats()
        assert {c.status for c in got.coverage.values()} == {"exact"}, reentrant
        np.testing.assert_allclose(got.T, want.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: fg.Probe(m, blocks="tile"), BlockSpecError, "unknown block granularity"),
        (lambda m: fg.Probe(m, params=["nothing.*"]), ProbeError, "matches no parameter"),
        (lambda m: fg.Probe(m.requires_grad_(False)), ProbeError, "no parameter to probe"),
        (lambda m: fg.Probe(nn.Flatten()), ProbeError, "no parameter to probe"),
        (lambda m: fg.Probe(m, loss_reduction="mean"), ProbeError, "unknown loss_reduction"),
        (lambda m: fg.Probe(torch.compile(m)), ProbeError, "compiled"),
        (lambda m: fg.Probe(m, targets={"x": torch.zeros(2)}), ProbeError, "which the model lacks"),
        (lambda m: fg.Probe(m).stats(), ProbeError, "no backward pass"),
    ],
)
def test_wrong_use_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(llama())


def test_two_forward_passes_one_backward_pass():
    """Each forward pass has its own examples; the gradient of both is one batch gradient."""
    model = randomised(MODELS["llama"])
    first, second = batch_of(2, seed=1), batch_of(3, seed=2)
    with fg.Probe(model, strict=True) as probe:
        (model(**first).loss + model(**second).loss).backward()
    stats = probe.stats()
    assert stats.n_batches == 1
    assert stats.n_examples == 5
    column = 0
    for batch in (first, second):
        for j in range(len(batch["input_ids"])):
            model.zero_grad()
            model(**one_example(batch, j)).loss.backward()
            want = [float(p.grad.norm()) for p in model.parameters()]
            got = stats.influence("example_mean")[:, column]
            np.testing.assert_allclose(got, want, rtol=2e-4)
            column += 1


def test_gradients_of_inputs_alone_are_no_batch():
    model = randomised(MODELS["llama"])
    plain = fg.Probe(model, hash_weights=False)
    with plain:
        model(**batch_of()).loss.backward()
    model.zero_grad()
    with fg.Probe(model, strict=True) as probe:
        batch = batch_of()
        embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
        model.model.embed_tokens.requires_grad_(True)
        loss = model(inputs_embeds=embedded, **batch).loss
        torch.autograd.grad(loss, embedded, retain_graph=True)
        loss.backward()
    stats = probe.stats()
    assert (stats.n_batches, stats.n_examples) == (1, 3)
    rows = [i for i, n in enumerate(stats.names) if "embed" not in n]
    np.testing.assert_allclose(stats.T[rows], plain.stats().T[rows], rtol=1e-4, atol=1e-6)
    before = probe.stats().grad_norm
    model(**batch_of()).loss.backward()  # after the block: not measured
    assert np.array_equal(probe.stats().grad_norm, before)


def test_the_self_check_covers_several_forward_passes():
    torch.manual_seed(0)
    model = Net(Smuggled())
    with fg.Probe(model) as probe:
        (run(model, *data(2)) + run(model, *data(4, seed=1))).backward()
    coverage = probe.stats().coverage
    assert coverage["piece.lin.weight"].status == "missing"
    assert coverage["head.weight"].status == "exact"


def test_checkpoints_with_other_forward_passes_before_the_backward_pass():
    model = randomised(MODELS["llama"]).train()
    first, second = batch_of(2, seed=1), batch_of(3, seed=2)
    with fg.Probe(model) as probe:
        (model(**first).loss + model(**second).loss).backward()
    want = probe.stats().T
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with fg.Probe(model, strict=True) as probe:
        loss = model(**first).loss + model(**second).loss
        with torch.no_grad():
            model(**batch_of(4))  # a reference model's pass, say
        loss.backward()
    np.testing.assert_allclose(probe.stats().T, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "bert"])
def test_nothing_of_a_measured_batch_stays_in_memory(architecture):
    """No graph may outlive its backward pass: batches are objects that can be counted."""
    model = randomised(MODELS[architecture])
    with fg.Probe(model) as probe:
        for seed in range(3):
            model(**batch_of(seed=seed)).loss.backward()
        with pytest.raises(NonFiniteGradientError):
            (model(**batch_of()).loss * float("nan")).backward()
    gc.collect()
    alive = [b for b in gc.get_objects() if type(b) is Batch and b.samples is probe._samples]
    assert not alive


def test_loss_scale_is_divided_out():
    model = randomised(MODELS["llama"])
    with fg.Probe(model) as plain:
        model(**batch_of()).loss.backward()
    with fg.Probe(model, loss_scale=0.125) as probe:
        (model(**batch_of()).loss / 8).backward()
    a, b = plain.stats(), probe.stats()
    np.testing.assert_allclose(
        a.influence("example_mean"), b.influence("example_mean"), rtol=1e-5, atol=1e-8
    )
    np.testing.assert_allclose(a.T, 8 * b.T, rtol=1e-5, atol=1e-8)


def test_misuse_leaves_nothing_behind():
    model = randomised(MODELS["llama"])
    with fg.Probe(model), pytest.raises(ProbeError, match="another probe"), fg.Probe(model):
        pass
    probe = fg.Probe(model)
    model.lm_head.requires_grad_(False)
    with pytest.raises(ProbeError, match=r"lm_head\.weight was frozen"), probe:
        pass
    assert not model._forward_hooks
    model.lm_head.requires_grad_(True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ProbeError, match="was replaced"), probe:
        pass
    with fg.Probe(model) as probe:
        twin = copy.deepcopy(model)
        twin(**batch_of()).loss.backward()
        model(**batch_of()).loss.backward()
    assert probe.stats().n_examples == 3
    selection = fg.select(None, model=model, fraction=0.3, ranking="random", blocks="row")
    fg.make_partial(model, selection)
    with pytest.raises(ProbeError, match="partial"):
        fg.Probe(model)


def test_a_second_backward_pass_and_an_outside_gradient_are_missing():
    model = randomised(MODELS["llama"])
    with fg.Probe(model) as probe:
        loss = model(**batch_of()).loss
        loss.backward(retain_graph=True)
        loss.backward()
    with pytest.raises(CoverageError, match="second backward pass"):
        probe.stats()
    with fg.Probe(model) as probe:
        penalty = model.lm_head.weight.square().sum()
        (model(**batch_of()).loss + penalty).backward()
    coverage = probe.stats().coverage
    assert coverage["lm_head.weight"].status == "missing"
    assert coverage["model.norm.weight"].status == "exact"


def test_a_broken_backward_pass_does_not_spoil_the_next():
    model = randomised(MODELS["llama"])

    def explode(grad):
        raise KeyboardInterrupt

    with fg.Probe(model) as probe:
        handle = model.model.norm.weight.register_hook(explode)
        with pytest.raises(KeyboardInterrupt):
            model(**batch_of()).loss.backward()
        handle.remove()
        model.zero_grad()
        for _ in range(3):
            assert model(**batch_of()).loss > 0  # forward passes that come to nothing
        model(**batch_of()).loss.backward()
        assert not probe._pending
    stats = probe.stats()
    assert stats.n_examples == 3
    assert {c.status for c in stats.coverage.values()} == {"exact"}


def test_packed_rows_whose_labels_cross_examples_are_refused():
    model = randomised(MODELS["llama"])
    batch = batch_of(1, 8)
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ProbeError, match="first token of an example is a label"), fg.Probe(model):
        model(**batch)
    with (
        pytest.raises(ProbeError, match="does not divide the input's 8 tokens"),
        fg.Probe(model),
    ):
        model(input_ids=batch["input_ids"], cu_seq_lens_q=torch.tensor([0, 4, 9]))


def test_refusals_of_a_batch_that_is_dropped_do_not_count(monkeypatch):
    """Records end before the gradients are known to be finite; what they find counts afterwards."""
    original = ParamRecord.finish

    def finish(self):
        self.refuse("cancels")
        return original(self)

    monkeypatch.setattr(ParamRecord, "finish", finish)
    model = randomised(MODELS["llama"])
    weight = next(model.parameters())
    handle = weight.register_hook(lambda g: g * torch.nan)
    with fg.Probe(model, on_nonfinite="skip") as probe:
        model(**batch_of()).loss.backward()
        assert probe._measured.skipped == 1
        assert not probe._measured.missing
        handle.remove()
        model(**batch_of()).loss.backward()
        assert set(probe._measured.missing.values()) == {"cancels"}
    weight.register_hook(lambda g: g * torch.nan)
    with fg.Probe(model, strict=True), pytest.raises(fg.errors.NonFiniteGradientError):
        model(**batch_of()).loss.backward()
