"""Updates inside the backward pass: the same run as with ordinary steps, without its gradients."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.errors import NonFiniteGradientError, PartialError
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import selection_of
from tests.test_partial_resume import assert_same, everything, grouped

OPTIMIZERS = {
    "sparse-adamw": lambda groups: fg.SparseAdamW(groups, lr=1e-2),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, foreach=True),
}


def begin(make="sparse-adamw", architecture="llama-tied", spec="16x8", dtype=torch.float32):
    model = randomised(MODELS[architecture]).to(dtype)
    master = torch.float32 if dtype == torch.bfloat16 else None
    partial = fg.make_partial(model, selection_of(model, spec), master)
    optimizer = OPTIMIZERS[make](grouped(partial))
    return partial, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)


def run(partial, optimizer, scheduler, steps):
    for step in steps:
        partial.model(**batch_of(seed=step)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("make", "architecture"),
    [*((make, "llama-tied") for make in OPTIMIZERS), ("sparse-adamw", "gpt2")],
)
def test_without_clipping_it_is_the_ordinary_run_bit_for_bit(make, architecture):
    ordinary = begin(make, architecture, dtype=torch.bfloat16)
    run(*ordinary, range(5))
    early = begin(make, architecture, dtype=torch.bfloat16)
    calls = []
    early[1].register_step_pre_hook(lambda *a: calls.append("pre"))
    early[1].register_step_post_hook(lambda *a: calls.append("post"))
    fg.step_in_backward(early[1])
    run(*early, range(5))
    assert calls == ["pre", "post"] * 5
    assert_same(everything(*early[:2]), everything(*ordinary[:2]))
    assert early[2].get_last_lr() == ordinary[2].get_last_lr()


def test_the_update_happens_before_step_and_removing_restores_ordinary_steps():
    partial, optimizer, _ = begin()
    handle = fg.step_in_backward(optimizer)
    before = {n: p.detach().clone() for n, p in partial.named_parameters()}
    partial.model(**batch_of()).loss.backward()
    after = {n: p.detach().clone() for n, p in partial.named_parameters()}
    assert all(not torch.equal(after[n], before[n]) for n in before)
    assert all(p.grad is None for p in partial.parameters())
    optimizer.step()
    assert all(torch.equal(p, after[n]) for n, p in partial.named_parameters())
    assert {int(optimizer.state[p]["step"]) for p in partial.parameters()} == {1}
    handle.remove()
    partial.model(**batch_of()).loss.backward()
    assert all(p.grad is not None for p in partial.parameters())
    assert all(torch.equal(p, after[n]) for n, p in partial.named_parameters())
    optimizer.step()
    assert {int(optimizer.state[p]["step"]) for p in partial.parameters()} == {2}


def peak_gradient_bytes(partial, early):
    """Most bytes of gradients of trained tensors at the arrival of any of them."""
    params, peak = list(partial.parameters()), 0

    def look(_):
        nonlocal peak
        held = [p.grad for p in params if p.grad is not None]
        peak = max(peak, sum(g.untyped_storage().nbytes() for g in held))

    for p in params:  # before the hooks that update
        p.register_post_accumulate_grad_hook(look)
    optimizer = fg.SparseAdamW(params, lr=1e-2)
    if early:
        fg.step_in_backward(optimizer)
    partial.model(**batch_of()).loss.backward()
    left = sum(p.grad is not None for p in params)
    optimizer.step()
    return peak, left, [4 * p.numel() for p in params]


def test_peak_bytes_of_gradients():
    model = randomised(lambda: MODELS["llama"]())
    partial = fg.make_partial(model, selection_of(model, "16x8"))
    peak, left, sizes = peak_gradient_bytes(partial, early=False)
    assert (peak, left) == (sum(sizes), len(sizes))
    partial.remove()
    partial = fg.make_partial(model, selection_of(model, "16x8"))
    peak, left, sizes = peak_gradient_bytes(partial, early=True)
    assert left == 0
    # one gradient at a time; a function of several parameters makes its gradients together
    assert peak <= 2 * max(sizes) < sum(sizes) / 4


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))).square().sum()


def by_hand(model, xs, max_norm, decay, first):
    """The clipping that is documented, with SGD."""
    norm = first
    for x in xs:
        grads = torch.autograd.grad(model(x), list(model.parameters()))
        own = [float(g.double().norm()) for g in grads]
        total = math.hypot(*own)
        with torch.no_grad():
            for p, g, n in zip(model.parameters(), grads, own, strict=True):
                limit = total if norm is None else max(norm, n)
                factor = min(1.0, max_norm / (limit + 1e-6))
                p -= 0.05 * (g * factor)
        norm = total if norm is None else decay * norm + (1 - decay) * total
    return norm


@pytest.mark.parametrize(("decay", "first"), [(0.0, None), (0.7, None), (0.0, 3.0)])
def test_clipping_is_what_the_documentation_says(decay, first):
    torch.manual_seed(0)
    model = Two()
    reference = copy.deepcopy(model)
    xs = [torch.randn(4, 5) * (20 if i == 3 else 1) for i in range(7)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = fg.step_in_backward(optimizer, max_norm=1.5, decay=decay, first_norm=first)
    for i, x in enumerate(xs):
        model(x).backward()
        kept = [p.grad is not None for p in model.parameters()]
        assert kept == [i == 0 and first is None] * 2
        optimizer.step()
        optimizer.zero_grad()
        if i == 4:  # exact resume of the running norm
            state = handle.state_dict()
            handle.remove()
            handle = fg.step_in_backward(optimizer, max_norm=1.5, decay=decay)
            handle.load_state_dict(state)
    norm = by_hand(reference, xs, 1.5, decay, first)
    assert handle.norm == pytest.approx(norm, rel=1e-5)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_the_first_iteration_is_clipped_as_clip_grad_norm_does():
    ordinary, early = begin(), begin()
    ordinary[0].model(**batch_of()).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(ordinary[0].parameters()), 0.1)
    ordinary[1].step()
    handle = fg.step_in_backward(early[1], max_norm=0.1)
    early[0].model(**batch_of()).loss.backward()
    early[1].step()
    assert handle.norm == pytest.approx(float(norm), rel=1e-5)
    for (n, p), q in zip(early[0].named_parameters(), ordinary[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=n)


@pytest.mark.parametrize("all_inside", [False, True])
def test_accumulation_updates_once_with_the_sums(all_inside):
    ordinary, early = begin(), begin()
    handle = fg.step_in_backward(early[1])
    for step in range(3):
        for micro in range(3):
            ordinary[0].model(**batch_of(seed=3 * step + micro)).loss.backward()
            loss = early[0].model(**batch_of(seed=3 * step + micro)).loss
            if micro < 2 or all_inside:
                with handle.accumulate():
                    loss.backward()
            else:
                loss.backward()
        assert any(p.grad is not None for p in early[0].parameters()) == all_inside
        for _, optimizer, _ in (ordinary, early):
            optimizer.step()
            optimizer.zero_grad()
    assert_same(everything(*early[:2]), everything(*ordinary[:2]))


@pytest.mark.parametrize("held", [False, True])
def test_a_second_backward_pass_is_named(held):
    partial, optimizer, _ = begin()
    handle = fg.step_in_backward(optimizer)
    partial.model(**batch_of()).loss.backward()
    loss = partial.model(**batch_of(seed=3)).loss
    where = handle.accumulate() if held else contextlib.nullcontext()
    with where, pytest.raises(PartialError, match=r"second gradient of .*accumulate\(\)"):
        loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    partial.model(**batch_of(seed=3)).loss.backward()
    optimizer.step()


def test_parameters_that_get_no_gradient_and_those_of_a_later_pass():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    twin = copy.deepcopy(model)
    early, ordinary = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin))
    fg.step_in_backward(early)
    x = torch.randn(2, 3)
    for m, optimizer in ((model, early), (twin, ordinary)):
        for use in ("a", "a", "b"):
            m[use](x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        m["a"](x).square().sum().backward()  # two losses of different parameters, one step
        m["b"](x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert early.state[p]["step"] == ordinary.state[q]["step"]


def test_a_warmup_from_zero_counts_a_zero_gradient_that_comes_first():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    twin = copy.deepcopy(model)
    early, ordinary = (fg.SparseAdamW(m.parameters(), lr=0.0) for m in (model, twin))
    fg.step_in_backward(early)
    x, arrived = torch.randn(2, 3), []
    model["b"].weight.register_post_accumulate_grad_hook(lambda p: arrived.append("b"))
    model["a"].weight.register_post_accumulate_grad_hook(lambda p: arrived.append("a"))
    for m, optimizer in ((model, early), (twin, ordinary)):
        for lr in (0.0, 0.1, 0.2):
            optimizer.param_groups[0]["lr"] = lr
            ((lr > 0) * m["b"](m["a"](x)) + m["a"](x)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert arrived[0] == "b"
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert early.state[p]["step"] == ordinary.state[q]["step"] == 3
        assert torch.equal(p, q)


@pytest.mark.parametrize(  # without a norm nobody looks at SGD's gradients, as in ordinary loops
    ("make", "max_norm"), [("sparse-adamw", None), ("sparse-adamw", 1.0), ("sgd", 1.0)]
)
def test_a_nan_gradient_is_named(make, max_norm):
    partial, optimizer, _ = begin(make, spec="row")
    fg.step_in_backward(optimizer, max_norm, first_norm=None if max_norm is None else 1.0)
    name, p = list(partial.named_parameters())[4]
    before = p.detach().clone()
    hook = p.register_hook(lambda g: g * float("nan"))
    with pytest.raises(NonFiniteGradientError, match=r"earlier in this backward") as caught:
        partial.model(**batch_of()).loss.backward()
    assert caught.value.names == [name]
    assert torch.equal(p, before)
    assert not optimizer.state.get(p) or not optimizer.state[p]["step"]
    hook.remove()
    optimizer.zero_grad()
    partial.model(**batch_of()).loss.backward()  # whoever goes on begins a new iteration
    optimizer.step()
    assert not torch.equal(p, before)


class Shared(torch.optim.Optimizer):
    """Counts its steps for all parameters together."""

    def __init__(self, params, where="group"):
        super().__init__(params, {"lr": 0.1, "k": 0})
        self.where, self.k = where, 0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] / (1 + group["k"] + self.k))
            if self.where == "group":
                group["k"] += 1
        if self.where == "self":
            self.k += 1


def test_refusals():
    model = nn.Linear(3, 2)
    for where in ("group", "self"):
        optimizer = Shared(model.parameters(), where)
        weights = copy.deepcopy(model.state_dict())
        with pytest.raises(PartialError, match="keeps 'k' for all parameters"):
            fg.step_in_backward(optimizer)
        assert optimizer.param_groups[0]["k"] == 0
        assert not optimizer.state
        assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())
    fg.step_in_backward(Shared(model.parameters(), "nowhere")).remove()
    with pytest.raises(PartialError, match="LBFGS"):
        fg.step_in_backward(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(PartialError, match="stochastic rounding"):
        fg.step_in_backward(fg.SparseAdamW(model.parameters(), stochastic_rounding=True))
    with pytest.raises(PartialError, match="takes a torch optimizer"):
        fg.step_in_backward(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong in ({"max_norm": 0.0}, {"max_norm": 1.0, "decay": 1.0}, {"decay": 0.5},
                  {"max_norm": 1.0, "first_norm": math.nan}):  # fmt: skip
        with pytest.raises(ValueError, match=r"norm|decay"):
            fg.step_in_backward(optimizer, **wrong)
    handle = fg.step_in_backward(optimizer)
    with pytest.raises(PartialError, match="already"):
        fg.step_in_backward(optimizer)
    with pytest.raises(PartialError, match="closure"):
        optimizer.step(lambda: 0.0)
    optimizer.step(None)  # as accelerate calls it
    with pytest.raises(PartialError, match="not the state"):
        handle.load_state_dict({})


def test_a_grad_scaler_is_refused_before_any_update():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fg.step_in_backward(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PartialError, match="GradScaler"):
        scaler.scale(model(torch.randn(4, 3)).sum()).backward()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_distributed_data_parallel_is_refused_before_any_update(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.Linear(3, 2)
        wrapped = nn.parallel.DistributedDataParallel(model)
        fg.step_in_backward(torch.optim.SGD(model.parameters(), lr=0.1))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(PartialError, match="DistributedDataParallel"):
            wrapped(torch.randn(4, 3)).sum().backward()
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
        del wrapped
    finally:
        torch.distributed.destroy_process_group()


def test_it_follows_a_reselection_and_leaves_a_suspended_model_alone():
    def train(early):
        partial, optimizer, scheduler = begin(spec="row")
        if early:
            fg.step_in_backward(optimizer)
        run(partial, optimizer, scheduler, range(2))
        with partial.suspended() as model:
            model(**batch_of(seed=9)).loss.backward()
        partial.reselect(selection_of(partial.model, "row", 0.5, seed=2), optimizer)
        run(partial, optimizer, scheduler, range(2, 4))
        return everything(partial, optimizer)

    assert_same(train(early=True), train(early=False))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    def train(early):
        partial, optimizer, scheduler = begin(architecture="llama")
        partial.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        partial.model.enable_input_require_grads()
        partial.model.train()
        if early:
            fg.step_in_backward(optimizer)
        run(partial, optimizer, scheduler, range(3))
        return everything(partial, optimizer)

    assert_same(train(early=True), train(early=False))


def test_a_group_at_rate_zero_counts_a_zero_gradient_in_the_first_step():
    """Beside a group that learns this is a step, not the initialisation of a checkpoint."""

    def train(early):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        optimizer = fg.SparseAdamW(
            [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.0}],
            lr=1e-2,
        )
        if early:
            fg.step_in_backward(optimizer)
        x = torch.ones(2, 3)
        for step in range(3):
            optimizer.param_groups[1]["lr"] = 0.0 if step < 2 else 1e-2
            # the last layer's gradient comes first, and is zero at first
            (model(x) * float(step > 0) + model[0](x)).square().sum().backward()
            if step == 0:
                assert early or not bool(model[1].weight.grad.any())
            optimizer.step()
            optimizer.zero_grad()
        counts = [int(optimizer.state[p]["step"]) for p in model.parameters()]
        return counts, [p.detach().clone() for p in model.parameters()]

    counts, weights = train(early=True)
    expected_counts, expected = train(early=False)
    assert counts == expected_counts == [3, 3, 3, 3]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


@pytest.mark.parametrize("again", [False, True], ids=["removed", "made anew"])
def test_updates_do_not_go_on_after_the_partial_model_is_gone(again):
    """Whole weights live on: the old optimizer would train them beside the new one."""
    model = randomised(MODELS["llama"])
    partial = fg.make_partial(model, selection_of(model, "module"))
    handle = fg.step_in_backward(fg.SparseAdamW(partial.parameters(), lr=1e-2))
    partial.remove()
    if again:
        partial = fg.make_partial(model, selection_of(model, "module"))
        optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(PartialError, match=r"removed or made anew.*Remedy: call remove"):
        model(**batch_of()).loss.backward()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    handle.remove()
    model.zero_grad()
    model(**batch_of()).loss.backward()
    if again:
        optimizer.step()
        assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())
