"""Activation checkpoints around anything: what they compute again is measured as if they were not.

Each case is compared with one example at a time (``assert_exact``). Three examples of three tokens:
sizes prove nothing, so a mark that is lost shows.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastgrad as fg
from fastgrad import checkpoints as own
from fastgrad.errors import CoverageError
from fastgrad.ownership import Mark, marked
from fastgrad.records import Batch, ParamRecord
from tests.models import MODELS, batch_of, randomised
from tests.test_probe_behaviour import Net, data, definition, run

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])


class Piece(nn.Module):
    """Parameters of several shapes, and a function of them and of the activation."""

    def __init__(self, use: Callable, reentrant: bool = False, **options) -> None:
        super().__init__()
        self.lin, self.norm, self.w = nn.Linear(6, 6), nn.LayerNorm(6), nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(7, 6) * 0.4)
        self.use, self.options = use, {"use_reentrant": reentrant, **options}

    def again(self, function: Callable, *args, **kwargs):
        return checkpoint(function, *args, **self.options, **kwargs)

    def forward(self, x):
        used = torch.tanh(self.use(self, x))
        if self.options["use_reentrant"]:  # other uses would come with gradients of their own
            return used
        return self.lin(self.norm(used * self.w)) + F.linear(used, self.matrix[:6])


def cat(x):
    return torch.cat([x, x * 2], 1)[:, : x.shape[1]]


FUNCTIONS: dict[str, Callable] = {
    "linear": lambda s, x: s.again(lambda v: F.linear(v, s.lin.weight, s.lin.bias), x),
    "product": lambda s, x: s.again(lambda v: torch.tanh(v @ s.matrix[1:].T) @ s.matrix[1:], x),
    "scale": lambda s, x: s.again(lambda v: v * s.w + s.lin.bias, x),
    "norm": lambda s, x: s.again(lambda v: F.layer_norm(v, (6,), s.norm.weight, s.norm.bias), x),
    "prepared": lambda s, x: s.again(lambda v: v * (1 + s.w) + torch.exp(s.w) - s.matrix[0], x),
    "looked up": lambda s, x: s.again(lambda v: v + s.matrix[torch.tensor([2, 0, 2])], x),
    "without a tap": lambda s, x: s.again(lambda v: torch.logaddexp(v, s.w), x),
    "modules": lambda s, x: s.again(lambda v: s.norm(torch.tanh(s.lin(v))) * s.w, x),
    "a module": lambda s, x: s.again(s.lin, x),
    "moved": lambda s, x: s.again(lambda v: s.lin(v) * s.w, x.transpose(0, 1)).transpose(0, 1),
    "moved inside": lambda s, x: s.again(lambda v: s.lin(v.transpose(0, 1)).transpose(0, 1), x),
    "parameters given": lambda s, x: s.again(
        lambda v, w, b: F.linear(v, w, b) * b, x, s.lin.weight, s.lin.bias),
    "derived given": lambda s, x: s.again(lambda v, w: v * w + w, x, 1 + torch.exp(s.w)),
    "derived given twice": lambda s, x: s.again(
        lambda v, w, k: v * (w + k.sin()), x, torch.exp(s.w), 1 + s.w),
    "matrix given": lambda s, x: s.again(F.linear, x, s.matrix[1:] * 2),
    "view given": lambda s, x: s.again(lambda v, w: F.linear(v, w) * w[0], x, s.matrix[1:]),
    "lookup given": lambda s, x: s.again(torch.mul, x, s.matrix[torch.tensor([2, 0, 2])]),
    "twice": lambda s, x: s.again(torch.tanh, s.again(s.lin, x)) + s.again(torch.sin, x * s.w),
    "nested": lambda s, x: s.again(lambda v: s.again(s.lin, torch.sin(v) * s.w), x),
    "nested, nothing else": lambda s, x: s.again(lambda v: s.again(lambda u: u * s.w, v), x),
    "nested, moved": lambda s, x: s.again(
        lambda v: s.again(lambda u: s.lin(u) * s.w, v.transpose(0, 1)), x).transpose(0, 1),
    "nested, parameters given": lambda s, x: s.again(
        lambda v: s.again(F.linear, v * s.w, s.lin.weight, s.lin.bias), x),
    "nested, derived given": lambda s, x: s.again(
        lambda v: s.again(lambda u, w: torch.sin(u * w) + w, v, 1 + torch.exp(s.w)), x),
    "nested thrice": lambda s, x: s.again(
        lambda v: s.again(lambda u: s.again(s.norm, s.lin(u)) * s.w, cat(v)) + s.matrix[0], x),
    "nested, prepared inside": lambda s, x: s.again(
        lambda v, w: s.again(lambda u, k: u * k + k[:, None].exp().sum(1), v, 1 / w) + w.sin(),
        x, 2 + s.w.tanh()),
    "nested twice": lambda s, x: s.again(
        lambda v: s.again(s.lin, v) + s.again(lambda u: u * s.w, torch.sin(v)), x),
}  # fmt: skip


def assert_like_single_examples(model, probe, *batches):
    stats = probe.stats()
    assert {c.status for c in stats.coverage.values()} <= {"exact", "unused", "frozen"}, [
        c for c in stats.coverage.values() if c.reason
    ]
    rows = [row for batch in batches for row in definition(model, *batch)]
    assert stats.n_examples == len(rows)
    for p, name in enumerate(stats.names):
        want = [float(r[name].norm()) if name in r else 0.0 for r in rows]
        np.testing.assert_allclose(stats.T[p], want, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("blocks", ["module", "2x4"])
@KINDS
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_every_kind(function, reentrant, blocks):
    torch.manual_seed(0)
    model, batch = Net(Piece(FUNCTIONS[function], reentrant)), data(3, 3)
    with fg.Probe(model, blocks) as probe:
        run(model, *batch).backward()
    assert_like_single_examples(model, probe, batch)


FEW = ["scale", "modules", "moved", "nested, moved", "nested, derived given", "nested thrice"]


@pytest.mark.parametrize("function", FEW)
def test_checkpoints_that_compute_everything_again(function):
    """Without an early stop what follows the last saved tensor runs too."""
    torch.manual_seed(0)
    model, batch = Net(Piece(FUNCTIONS[function], early_stop=False)), data(3, 3)
    with fg.Probe(model) as probe:
        run(model, *batch).backward()
    assert_like_single_examples(model, probe, batch)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_several_forward_passes_before_one_backward_pass(function):
    torch.manual_seed(0)
    model, batches = Net(Piece(FUNCTIONS[function])), [data(3, 3), data(3, 3, seed=1), data(2, 3)]
    with fg.Probe(model) as probe:
        sum(run(model, *batch) for batch in batches).backward()
    assert_like_single_examples(model, probe, *batches)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_several_forward_passes_of_reentrant_checkpoints(function):
    """Their parameters' gradients come in parts, of which the probe sees one: they are missing.
    Nothing is taken for the other forward pass's."""
    torch.manual_seed(0)
    model, batches = Net(Piece(FUNCTIONS[function], reentrant=True)), [data(3, 3), data(3, 3, 1)]
    with fg.Probe(model) as probe:
        sum(run(model, *batch) for batch in batches).backward()
    stats = probe.stats()
    rows = [row for batch in batches for row in definition(model, *batch)]
    for p, name in enumerate(stats.names):
        if stats.coverage[name].status == "missing":
            assert name.startswith("piece.")
        elif stats.coverage[name].status == "exact":
            want = [float(r[name].norm()) for r in rows]
            np.testing.assert_allclose(stats.T[p], want, rtol=1e-4, atol=1e-6, err_msg=name)
    one_after_the_other = fg.Probe(model)
    with one_after_the_other as probe:
        for batch in batches:
            run(model, *batch).backward()
    assert_like_single_examples(model, probe, *batches)


class Raw(nn.Module):
    """The model's own input enters the checkpoint: once given, once seen from inside."""

    def __init__(self, given: bool) -> None:
        super().__init__()
        self.lin, self.w, self.given = nn.Linear(3, 3), nn.Parameter(torch.randn(3)), given

    def forward(self, x):
        if self.given:
            return checkpoint(lambda v: self.lin(v * self.w).tanh(), x, use_reentrant=False)
        return checkpoint(lambda: self.lin(x * self.w).tanh(), use_reentrant=False)


@pytest.mark.parametrize("given", [True, False])
def test_the_same_input_in_two_forward_passes(given):
    torch.manual_seed(0)
    model, x = Raw(given), torch.randn(3, 3, 3).transpose(0, 1)
    with fg.Probe(model, strict=True) as probe:
        (model(x).square().mean() + model(x).cos().mean()).backward()
    stats = probe.stats()
    for j in range(3):
        for k, of in enumerate((torch.square, torch.cos)):
            model.zero_grad()
            (of(model(x[j : j + 1])).mean() / 3).backward()
            want = [float(p.grad.norm()) for p in model.parameters()]
            np.testing.assert_allclose(stats.T[:, 3 * k + j], want, rtol=1e-4)
    assert marked(x, 2) == Mark(0, None, 2)  # the later forward pass's, as before


@pytest.mark.parametrize("function", FEW)
def test_two_backward_passes(function):
    """The first asks for the gradient of the embeddings alone."""
    torch.manual_seed(0)
    model, (ids, labels) = Net(Piece(FUNCTIONS[function])), data(3, 3)
    with fg.Probe(model, params=["piece.*", "head.*"], strict=True) as probe:
        seen = []
        model.embed.register_forward_hook(lambda m, i, o: seen.append(o))
        loss = run(model, ids, labels)
        torch.autograd.grad(loss, seen[0], retain_graph=True)
        loss.backward()
    model.embed._forward_hooks.clear()
    assert_like_single_examples(model, probe, (ids, labels))
    with fg.Probe(model) as probe:
        loss = run(model, ids, labels)
        loss.backward(retain_graph=True)
        loss.backward()
    with pytest.raises(CoverageError, match="second backward pass"):
        probe.stats()


def with_slope(s, x):
    """A gradient is taken inside the checkpoint, and enters what it gives."""

    def function(v):
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            out = torch.tanh(s.lin(leaf * s.matrix[0]))
            (slope,) = torch.autograd.grad(out.sum(), leaf)
        return v * s.w + slope

    return s.again(function, x)


@KINDS
def test_a_backward_pass_inside_a_checkpoint(reentrant):
    torch.manual_seed(0)
    model, batch = Net(Piece(with_slope, reentrant)), data(3, 3)
    with fg.Probe(model) as probe:
        run(model, *batch).backward()
    assert_like_single_examples(model, probe, batch)


def loss_and_gradients(model, batch):
    torch.manual_seed(1)
    loss = run(model, *batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@KINDS
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_run_is_what_it_is_without_a_probe(function, reentrant):
    torch.manual_seed(0)

    def dropped(s, x):
        return FUNCTIONS[function](s, s.again(lambda v: F.dropout(v, 0.3), x))

    model, batch = Net(Piece(dropped, reentrant)), data(3, 3)
    twin = copy.deepcopy(model)
    want = loss_and_gradients(twin, batch)
    state = torch.get_rng_state()
    with fg.Probe(model):
        got = loss_and_gradients(model, batch)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def keep_products(ctx, op, *args, **kwargs):
    return op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def test_checkpoints_that_keep_some_results():
    torch.manual_seed(0)

    def contexts():
        return checkpoints.create_selective_checkpoint_contexts(keep_products)

    for function in FEW:
        model, batch = Net(Piece(FUNCTIONS[function], context_fn=contexts)), data(3, 3)
        with fg.Probe(model) as probe:
            run(model, *batch).backward()
        assert_like_single_examples(model, probe, batch)


@pytest.mark.parametrize("inside", [False, True])
def test_other_hooks_for_saved_tensors(inside):
    torch.manual_seed(0)

    def use(s, x):
        def function(v):
            with torch.autograd.graph.save_on_cpu():
                return v * s.w

        return s.again(function, x) if inside else FUNCTIONS["nested thrice"](s, x)

    model, batch = Net(Piece(use)), data(3, 3)
    with fg.Probe(model) as probe, torch.autograd.graph.save_on_cpu():
        run(model, *batch).backward()
    assert_like_single_examples(model, probe, batch)


@KINDS
def test_checkpoints_in_a_row(reentrant):
    torch.manual_seed(0)

    class Row(nn.Sequential):
        def forward(self, x):
            return checkpoint_sequential(list(self), 3, x, use_reentrant=reentrant)

    piece = Row(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6))
    model, batch = Net(piece), data(3, 3)
    with fg.Probe(model) as probe:
        run(model, *batch).backward()
    assert_like_single_examples(model, probe, batch)


def test_a_checkpoint_made_of_hooks():
    from torch.distributed._composable import checkpoint as composable

    torch.manual_seed(0)
    model, batch = Net(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))), data(3, 3)
    composable(model.piece)
    composable(model.piece[2])
    with fg.Probe(model) as probe:
        run(model, *batch).backward()
    assert any("checkpoint" in repr(h) for h in model.piece._forward_hooks.values())
    plain = Net(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    plain.load_state_dict(model.state_dict())
    assert_like_single_examples(plain, probe, batch)


@KINDS
@pytest.mark.parametrize("before", [False, True])
def test_a_checkpoint_around_the_model(reentrant, before):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(3, 3, 3)
    x.requires_grad_()  # or a reentrant checkpoint has no gradient at all
    with fg.Probe(model, loss_reduction="row_mean", strict=True) as probe:
        if before:
            model(x[:2]).square().mean().backward()
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    stats = probe.stats()
    assert stats.n_examples == 3 + 2 * before
    assert {c.status for c in stats.coverage.values()} == {"exact"}
    for j in range(3):
        model.zero_grad()
        model(x[j : j + 1]).square().mean().backward()
        want = [float(p.grad.norm()) for p in model.parameters()]
        np.testing.assert_allclose(stats.influence("example_mean")[:, j - 3], want, rtol=1e-4)


@KINDS
def test_a_checkpoint_around_two_calls_of_the_model(reentrant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    x, y = torch.randn(2, 3, 3, 3).requires_grad_()

    def both(a, b):
        return model(a).square().mean() + model(b).cos().mean()

    with fg.Probe(model, strict=True) as probe:
        checkpoint(both, x, y, use_reentrant=reentrant).backward()
    stats = probe.stats()
    for k, (inputs, of) in enumerate(((x, torch.square), (y, torch.cos))):
        for j in range(3):
            model.zero_grad()
            (of(model(inputs[j : j + 1])).mean() / 3).backward()
            want = [float(p.grad.norm()) for p in model.parameters()]
            np.testing.assert_allclose(stats.T[:, 3 * k + j], want, rtol=1e-4)


@KINDS
def test_both_kinds_in_each_other(reentrant):
    torch.manual_seed(0)

    def use(s, x):
        return checkpoint(
            lambda v: checkpoint(
                lambda u, w: s.lin(u.transpose(0, 1)) * w, v * s.w, s.matrix[0].exp(),
                use_reentrant=not reentrant,
            ).transpose(0, 1),
            x, use_reentrant=reentrant,
        )  # fmt: skip

    piece = Piece(use)
    piece.options["use_reentrant"] = True  # no other uses
    model, batch = Net(piece), data(3, 3)
    with fg.Probe(model) as probe:
        run(model, *batch).backward()
    assert_like_single_examples(model, probe, batch)


def test_uses_are_counted_once(monkeypatch):
    """Uses that a record waits for in vain would have it keep what it need not."""
    found, finish = [], ParamRecord.finish

    def counted(self):
        found[-1][self.target.name] = len(self.uses)
        return finish(self)

    monkeypatch.setattr(ParamRecord, "finish", counted)
    for function in FUNCTIONS:
        for again in (lambda f, *args, **kwargs: f(*args), checkpoint):
            torch.manual_seed(0)
            model = Net(Piece(FUNCTIONS[function]))
            model.piece.again = lambda f, *a, again=again: again(f, *a, use_reentrant=False)
            found.append({})
            with fg.Probe(model):
                run(model, *data(3, 3)).backward()
    assert found[::2] == found[1::2]


@KINDS
def test_a_backward_pass_after_the_probe(reentrant):
    for function in FEW:
        torch.manual_seed(0)
        model, batch = Net(Piece(FUNCTIONS[function], reentrant)), data(3, 3)
        run(model, *batch).backward()
        want = [p.grad for p in model.parameters()]
        model.zero_grad()
        with fg.Probe(model):
            loss = run(model, *batch)
        loss.backward()
        for got, grad in zip((p.grad for p in model.parameters()), want, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


@KINDS
def test_nothing_stays_in_memory(reentrant):
    for function in FEW:
        torch.manual_seed(0)
        model = Net(Piece(FUNCTIONS[function], reentrant))
        with fg.Probe(model) as probe:
            for seed in range(3):
                run(model, *data(3, 3, seed)).backward()
            run(model, *data(3, 3))  # never followed by a backward pass
        gc.collect()
        latest = probe._under_way.batch
        batches = [b for b in gc.get_objects() if type(b) is Batch]
        assert not [b for b in batches if b.samples is probe._samples and b is not latest]


@pytest.fixture
def not_found(monkeypatch):
    """As in another version of PyTorch, or another library's."""
    monkeypatch.setattr(own, "_REENTRANT", None)
    monkeypatch.setattr(own, "_NOT_REENTRANT", None)
    monkeypatch.setattr(own, "_kept_by", lambda hook: None)


@KINDS
def test_modules_of_checkpoints_that_are_not_found(reentrant, not_found):
    model, batch = randomised(MODELS["llama"]).train(), batch_of()
    with fg.Probe(model) as probe:
        model(**batch).loss.backward()
    want = probe.stats()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fg.Probe(model, strict=True) as probe:
        model(**batch).loss.backward()
    np.testing.assert_allclose(probe.stats().T, want.T, rtol=1e-4, atol=1e-6)
