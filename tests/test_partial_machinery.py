"""What surrounds a partial model: checkpoints, autocast, compilation, hooks, copies, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastgrad as fg
from fastgrad.errors import PartialError, SelectionError
from fastgrad.identity import model_parameters
from fastgrad.partial import make_partial
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import selection_of
from tests.test_sparse_experts import mixtral
from tests.test_sparse_layers import Recurrent


class Mixed(nn.Module):
    """A linear layer, a convolution, experts and a tied output."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.up = nn.Linear(16, 16)
        self.experts = nn.Parameter(torch.randn(4, 16, 16) / 4)

    def body(self, h):
        h = torch.tanh(self.conv(h.transpose(1, 2)).transpose(1, 2) + self.up(h))
        return h + sum(torch.tanh(F.linear(h, self.experts[e])) for e in range(4))

    def forward(self, ids):
        return F.linear(self.body(self.embed(ids)), self.embed.weight)


IDS = torch.tensor([[1, 2, 3, 4], [19, 0, 7, 2]])


def mixed(seed=0):
    torch.manual_seed(seed)
    return Mixed()


def gradients(partial, run):
    for p in partial.parameters():
        p.grad = None
    run().backward()
    return {n: p.grad.clone() for n, p in partial.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("spec", ["row", "4x4"])
def test_activation_checkpoints(spec, reentrant):
    model = mixed()
    partial = make_partial(model, selection_of(model, spec, 0.5))
    plain = gradients(partial, lambda: model(IDS).square().sum())

    def run():
        h = model.embed(IDS)
        h = checkpoint(model.body, h, use_reentrant=reentrant)
        return F.linear(h, model.embed.weight).square().sum()

    again = gradients(partial, run)
    assert all(torch.equal(plain[n], again[n]) for n in plain)


@pytest.mark.parametrize("build", [MODELS["llama"], MODELS["gpt2"], mixtral])
def test_gradient_checkpointing_of_transformers(build):
    model = randomised(build)
    spec = "expert" if build is mixtral else "8x8"
    partial = make_partial(model, selection_of(model, spec, 0.5))
    model.train()
    plain = gradients(partial, lambda: model(**batch_of()).loss)
    model.gradient_checkpointing_enable()
    again = gradients(partial, lambda: model(**batch_of()).loss)
    for n in plain:
        torch.testing.assert_close(plain[n], again[n], msg=n)


@pytest.mark.parametrize("spec", ["row", "4x4"])
def test_autocast(spec):
    """The same products in bfloat16, the same dtypes, gradients that agree to its precision."""
    model = mixed()
    dense = copy.deepcopy(model)
    outputs = []

    def run(m):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(m(IDS))
        return outputs[-1].float().square().sum()

    run(dense).backward()
    grads = {n: p.grad for n, p in model_parameters(dense).items()}
    partial = make_partial(model, selection_of(model, spec, 0.5))
    run(model).backward()
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-2, atol=2e-2)
    for blocks in partial.packed:
        assert blocks.packed.grad.dtype == torch.float32
        want = blocks.gather(grads[blocks.name])
        scale = float(want.abs().max())
        torch.testing.assert_close(blocks.packed.grad, want, rtol=3e-2, atol=2e-2 * scale)
    double = nn.Linear(4, 4).double()  # which autocast leaves alone
    make_partial(double, selection_of(double, "row"))
    with torch.autocast("cpu", torch.bfloat16):
        assert double(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["module", "row", "4x4"])
def test_compiled_models_train(spec):
    model = mixed()
    partial = make_partial(model, selection_of(model, spec, 0.5), master_dtype=torch.float64)
    eager = gradients(partial, lambda: model(IDS).square().sum())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        got = gradients(partial, lambda: compiled(IDS).square().sum())
        for n in eager:
            torch.testing.assert_close(got[n].float(), eager[n].float(), msg=n)
        optimizer = torch.optim.SGD(partial.parameters(), lr=0.01)
        optimizer.step()  # the compiled model must see the new values
        eager = gradients(partial, lambda: model(IDS).square().sum())
    torch._dynamo.reset()


def test_compilation_in_one_graph_is_refused_by_pytorch():
    """Looking whether packed values are in sync breaks the graph; ``fullgraph`` says so."""
    model = nn.Linear(4, 4)
    make_partial(model, selection_of(model, "row"))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"sync_if_stale|data-dependent|graph"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(torch.ones(2, 4))
    torch._dynamo.reset()


@pytest.mark.parametrize("part", ["up", "conv", "embed", "experts"])
def test_gradients_of_gradients_are_refused(part):
    model = mixed()
    names = ["experts" if part == "experts" else f"{part}.weight"]
    partial = make_partial(model, selection_of(model, "row", 0.5, names=names))
    (grad,) = torch.autograd.grad(
        model(IDS).square().sum(), list(partial.parameters()), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_autograd_grad_and_accumulation_over_two_passes():
    model = mixed()
    partial = make_partial(model, selection_of(model, "row", 0.5))
    once = gradients(partial, lambda: model(IDS).square().sum())
    found = torch.autograd.grad(model(IDS).square().sum(), list(partial.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(once.values(), found, strict=True))
    held = [p.grad.data_ptr() for p in partial.parameters()]
    model(IDS).square().sum().backward()
    for (n, p), where in zip(partial.named_parameters(), held, strict=True):
        assert p.grad.data_ptr() == where  # added in place
        torch.testing.assert_close(p.grad, 2 * once[n])


def test_module_and_tensor_hooks_run():
    model = mixed()
    partial = make_partial(model, selection_of(model, "row", 0.5))
    seen = []
    model.up.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    model.up.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    model.up.register_full_backward_hook(
        lambda m, gin, gout: seen.append((tuple(gin[0].shape), tuple(gout[0].shape)))
    )
    trained = dict(partial.named_parameters())["up.weight"]
    trained.register_hook(lambda g: g * 2)
    trained.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    twin = mixed()
    other = make_partial(twin, selection_of(twin, "row", 0.5))
    plain = gradients(other, lambda: twin(IDS).square().sum())
    mine = gradients(partial, lambda: model(IDS).square().sum())
    torch.testing.assert_close(mine["up.weight"], 2 * plain["up.weight"])
    torch.testing.assert_close(mine["conv.weight"], plain["conv.weight"])
    assert seen[:2] == ["pre", (2, 4, 16)]
    assert "accumulated" in seen
    assert ((2, 4, 16), (2, 4, 16)) in seen


def test_functional_call_reads_what_it_is_given_or_refuses():
    model = mixed()
    partial = make_partial(model, selection_of(model, "row", 0.5, names=["up.weight", "experts"]))
    call = torch.func.functional_call
    out = model(IDS)
    assert torch.equal(call(model, dict(model.named_parameters()), (IDS,)), out)
    other = {"up.weight": torch.randn(16, 16), "conv.bias": torch.randn(16)}
    want = call(mixed(), {**model.state_dict(), **other}, (IDS,))
    assert torch.equal(call(model, other, (IDS,)), want)  # frozen values, given for one call
    with torch.no_grad():
        assert torch.equal(call(model, other, (IDS,)), want)
    packed = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(packed) == 2
    for n, p in packed.items():
        with pytest.raises(PartialError, match=r"torch\.func.*Remedy"):
            call(model, {n: p.detach() + 1}, (IDS,))
    with pytest.raises(PartialError, match=r"requires a gradient.*Remedy"):
        call(model, {"up.weight": torch.randn(16, 16, requires_grad=True)}, (IDS,))
    with pytest.raises(PartialError, match=r"torch\.func.*Remedy"):
        torch.func.grad(lambda p: call(model, p, (IDS,)).sum())(dict(model.named_parameters()))
    with torch.no_grad():  # nothing is trained: transforms see a plain model
        torch.func.vmap(model.up)(torch.randn(3, 16))
    partial.remove()
    torch.func.grad(lambda p: call(model, p, (IDS,)).sum())(dict(model.named_parameters()))


def test_unfreezing_a_weight_whose_blocks_are_trained_is_refused():
    model = mixed()
    make_partial(model, selection_of(model, "row", 0.5, names=["up.weight"]))
    model.requires_grad_(True)
    with pytest.raises(PartialError, match=r"up\.weight requires a gradient"):
        model(IDS)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_copies_after_a_forward_pass(cls):
    """A recurrent module keeps the tensors that it read last."""
    model, x = Recurrent(cls), torch.randn(2, 4, 5)
    partial = make_partial(model, selection_of(model, "row", 0.5), master_dtype=torch.float64)
    model(x).sum().backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    twin(x).sum().backward()
    mine = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    partial.remove()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for n, p in twin.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, mine[n])


def test_a_reading_is_copied_and_saved_as_a_plain_tensor(tmp_path):
    model = mixed()
    make_partial(model, selection_of(model, "row", 0.5))
    reading = model.up.weight
    assert reading.requires_grad
    torch.save(reading, tmp_path / "w.pt")
    for copied in (copy.deepcopy(reading), torch.load(tmp_path / "w.pt")):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, reading)
        assert copied.data_ptr() != reading.data_ptr()


def test_a_compiled_layer_trains_and_sees_what_a_step_changed():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8)
    partial = make_partial(model, selection_of(model, "row", 0.5))
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        eager = gradients(partial, lambda: model(x).square().sum())
        got = gradients(partial, lambda: compiled(x).square().sum())
        for n in eager:
            torch.testing.assert_close(got[n], eager[n], msg=n)
        torch.optim.SGD(partial.parameters(), lr=0.1).step()
    torch._dynamo.reset()


def test_copies_with_a_live_graph():
    model = mixed()
    make_partial(model, selection_of(model, "row", 0.5))
    loss = model(IDS).square().sum()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS))
    loss.backward()
    twin(IDS).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def test_what_cannot_be_packed_is_refused_by_name():
    scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(PartialError, match=r"weight.*TorchScript.*Remedy"):
        make_partial(scripted, selection_of(scripted, "row", names=["weight"]))
    integers = nn.Linear(4, 4)
    integers.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SelectionError, match=r"weight has dtype torch\.int8"):
        make_partial(integers, selection_of(integers, "row", names=["weight"]))


def test_an_embedding_that_renormalises_itself_is_refused():
    model = nn.Embedding(10, 4, max_norm=0.1)
    partial = make_partial(model, selection_of(model, "row", 0.5))
    optimizer = fg.SparseAdamW(partial.parameters())
    model(torch.arange(10)).sum().backward()
    with pytest.raises(PartialError, match="changed from outside"):
        optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, fg.SparseAdamW], ids=["AdamW", "SparseAdamW"])
@pytest.mark.parametrize("whose", ["partial", "another"])
def test_a_compiled_optimizer_step_is_the_plain_one(make, whose):
    """Also of a model that has nothing to do with the partial one: the guard of steps is asked in
    the whole process."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
        other = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
        partial = make_partial(model, selection_of(model, "2x2"))
        trained, params = (model, partial.parameters()) if whose == "partial" else (
            other, other.parameters()
        )  # fmt: skip
        optimizer = make(params, lr=1e-2)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for seed in range(3):
            optimizer.zero_grad()
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
            trained(x).square().sum().backward()
            step()
        results.append(trained.state_dict())
        partial.remove()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
