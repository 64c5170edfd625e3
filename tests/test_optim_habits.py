"""SparseAdamW is a ``torch.optim.Optimizer`` in every habit: groups, schedules, hooks, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.identity import model_parameters
from fastgrad.optim_arguments import OptimizerError
from fastgrad.partial import make_partial
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import selection_of


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).to(dtype)


def data(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 12, generator=generator).to(dtype)


def train(model, optimizer, steps, first=0, scheduler=None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(data(step, next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def tiles(dtype=torch.float32, master=None, share=0.4, **kwargs):
    """A model trained in tiles, and its optimizer."""
    model = net(dtype)
    partial = make_partial(model, selection_of(model, "4x4", share), master)
    return model, partial, fg.SparseAdamW(partial.parameters(), **{"lr": 1e-2, **kwargs})


def same(one, other):
    """State, groups and weights have the same bits."""
    a, b = one.state_dict(), other.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        for name, tensor in state.items():
            assert tensor.dtype == b["state"][key][name].dtype
            assert torch.equal(tensor, b["state"][key][name]), (key, name)


# -- at 100 % --------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["as they stand", "packed"])
def test_all_weights_in_float32_equal_adamw_over_100_steps(packed, fused):
    """The same gradients for both; 1e-6 of each weight's size, and of the largest for those near
    zero."""
    model, other = net(), net()
    partial = make_partial(model, selection_of(model, "4x4", 1.0))
    trained = dict(partial.named_parameters())
    views = {n: p.data for n, p in trained.items()}
    if packed:  # in blocks: what all blocks of a weight make up is trained as it stands otherwise
        views = {n: p.data.reshape(-1, 2, 2) for n, p in trained.items() if p.numel() % 4 == 0}
    mine = fg.SparseAdamW([nn.Parameter(v) for v in views.values()], lr=3e-3, weight_decay=0.05)
    theirs = torch.optim.AdamW(other.parameters(), lr=3e-3, weight_decay=0.05, fused=fused)
    if packed:
        for group in mine.param_groups:
            for p in group["params"]:
                mine._state(p)["step"] = torch.zeros(p.shape[0])
    generator = torch.Generator().manual_seed(3)
    for _ in range(100):
        for name, p in other.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            if name in views:
                q = mine.param_groups[0]["params"][list(views).index(name)]
                q.grad = p.grad.reshape(q.shape)
        mine.step()
        theirs.step()
    for name, view in views.items():
        want = dict(other.named_parameters())[name].detach()
        bound = 1e-6 * float(want.abs().max())
        torch.testing.assert_close(view.view(want.shape), want, rtol=1e-6, atol=bound, msg=name)


@pytest.mark.parametrize("spec", ["module", "4x4"])
def test_bfloat16_with_masters_is_the_float32_run_rounded(spec):
    """Bit for bit: the masters are the float32 run, the weights what they round to."""
    narrow, wide = net(torch.bfloat16), net(torch.bfloat16).float()
    partial = make_partial(narrow, selection_of(narrow, spec, 1.0), torch.float32)
    mine = fg.SparseAdamW(partial.parameters(), lr=1e-3)
    theirs = torch.optim.AdamW(wide.parameters(), lr=1e-3, fused=True)
    for step in range(100):
        theirs.zero_grad()
        wide(data(step)).square().mean().backward()
        grads = {n: p.grad for n, p in wide.named_parameters()}
        for blocks in partial.packed:
            blocks.packed.grad = blocks.gather(grads[blocks.name]).view_as(blocks.packed)
        mine.step()
        theirs.step()
    for (name, p), q in zip(model_parameters(narrow).items(), wide.parameters(), strict=True):
        (blocks,) = (b for b in partial.packed if b.name == name)
        torch.testing.assert_close(
            blocks.packed.detach(), blocks.gather(q.detach()).view_as(blocks.packed),
            rtol=1e-6, atol=1e-7,
        )  # fmt: skip
        assert torch.equal(blocks.gather(p), blocks.packed.bfloat16().view_as(blocks.gather(p)))
        # one unit in the last place where the two runs lie on both sides of a rounding boundary
        torch.testing.assert_close(p.float(), q.bfloat16().float(), rtol=2**-7, atol=0)
        assert (p == q.bfloat16()).float().mean() > 0.99


# -- state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_is_eight_bytes_per_element_and_four_per_tensor_or_block(dtype):
    _, partial, optimizer = tiles(dtype)
    assert optimizer.state_bytes() == 0
    for p in partial.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    elements = sum(p.numel() for p in partial.parameters())
    tensors = len(list(partial.parameters()))
    assert optimizer.state_bytes() == 8 * elements + 4 * tensors
    optimizer.count_by_block()
    blocks = sum(len(b.ids) for b in partial.packed)
    assert optimizer.state_bytes() == 8 * elements + 4 * (tensors - len(partial.packed) + blocks)


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize(
    ("dtype", "master"), [(torch.float32, None), (torch.bfloat16, None),
                          (torch.bfloat16, torch.float32)],
)  # fmt: skip
def test_a_saved_state_goes_on_bit_for_bit(dtype, master, by_block, tmp_path):
    model, partial, optimizer = tiles(dtype, master)
    train(model, optimizer, 3)
    if by_block:
        optimizer.count_by_block()
        counts = [optimizer.state[p]["step"] for p in partial.parameters()]
        assert max(c.numel() for c in counts) > 1
        for c in counts:  # as after a re-selection
            c.view(-1)[-1] -= 2
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(copy.deepcopy(model.state_dict()), tmp_path / "model.pt")
    masters = [p.detach().clone() for p in partial.parameters()]

    fresh_model, fresh_partial, fresh = tiles(dtype, master, lr=0.5)
    fresh_model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for p, m in zip(fresh_partial.parameters(), masters, strict=True):
        p.data.copy_(m)
    fresh.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    same(optimizer, fresh)
    wide = torch.float32
    for p in fresh_partial.parameters():
        state = fresh.state[p]
        assert {k: t.dtype for k, t in state.items()} == dict.fromkeys(state, wide)
        assert state["step"].shape == (p.shape[:1] if by_block and p.ndim == 3 else ())
    train(model, optimizer, 3, first=3)
    train(fresh_model, fresh, 3, first=3)
    same(optimizer, fresh)
    for (name, p), q in zip(
        model.state_dict().items(), fresh_model.state_dict().values(), strict=True
    ):
        assert torch.equal(p, q), name


def test_states_pass_between_adamw_and_this_optimizer():
    a, b = net(), net()
    mine, theirs = fg.SparseAdamW(a.parameters()), torch.optim.AdamW(b.parameters(), fused=True)
    train(a, mine, 3)
    train(b, theirs, 3)
    c, d = copy.deepcopy(b), copy.deepcopy(a)
    from_theirs, from_mine = fg.SparseAdamW(c.parameters()), torch.optim.AdamW(d.parameters())
    from_theirs.load_state_dict(theirs.state_dict())
    from_mine.load_state_dict(copy.deepcopy(mine.state_dict()))  # PyTorch would share its tensors
    train(a, mine, 3, first=3)
    train(b, theirs, 3, first=3)
    train(c, from_theirs, 3, first=3)
    train(d, from_mine, 3, first=3)
    for p, *others in zip(*(m.parameters() for m in (a, b, c, d)), strict=True):
        for q in others:
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_state_of_another_selection_is_named_and_nothing_is_lost():
    model, _, optimizer = tiles()
    train(model, optimizer, 2)
    _, _, other = tiles(share=0.7)
    state, before = optimizer.state_dict(), copy.deepcopy(other.state_dict())
    with pytest.raises(OptimizerError, match=r"0\.weight: the saved exp_avg has shape.*selection"):
        other.load_state_dict(state)
    assert str(before) == str(other.state_dict())
    bad = copy.deepcopy(state)
    bad["state"][0]["step"] = torch.ones(3)
    with pytest.raises(OptimizerError, match="counts the steps of 3 blocks"):
        optimizer.load_state_dict(bad)
    same(optimizer, fg_like(optimizer, state))


def fg_like(optimizer, state):
    """Another optimizer of the same tensors with this state."""
    made = fg.SparseAdamW([p for g in optimizer.param_groups for p in g["params"]])
    made.load_state_dict(state)
    return made


def test_deepcopy_of_model_and_optimizer_goes_on_by_itself():
    model, partial, optimizer = tiles()
    train(model, optimizer, 2)
    other, twin = copy.deepcopy((model, optimizer))
    same(optimizer, twin)
    assert not set(map(id, twin.state)) & set(map(id, optimizer.state))
    before = copy.deepcopy(model.state_dict())
    train(other, twin, 2, first=2)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    train(model, optimizer, 2, first=2)
    same(optimizer, twin)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert partial.packed


def test_pickled_with_its_model_it_goes_on_bit_for_bit():
    model, _, optimizer = tiles(betas=(0.8, 0.95), maximize=True)
    train(model, optimizer, 2)
    other, twin = pickle.loads(pickle.dumps((model, optimizer)))
    same(optimizer, twin)
    train(model, optimizer, 2, first=2)
    train(other, twin, 2, first=2)
    same(optimizer, twin)
    for (name, p), q in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    buffer = io.BytesIO()
    torch.save((model, optimizer), buffer)
    buffer.seek(0)
    _, third = torch.load(buffer, weights_only=False)
    same(optimizer, third)


# -- groups, schedules, closures -------------------------------------------------------------


SCHEDULES = {
    "warmup": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 4)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=30),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "chained": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [3],
    ),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_act_as_on_adamw(schedule, tensor):
    """A warm-up begins at zero: that step is counted, since its gradients are not zero."""
    runs = []
    for cls, options in ((fg.SparseAdamW, {}), (torch.optim.AdamW, {"fused": True})):
        model = net()
        rate = torch.tensor(1e-2) if tensor else 1e-2
        optimizer = cls(model.parameters(), lr=rate, **options)
        train(model, optimizer, 12, scheduler=SCHEDULES[schedule](optimizer))
        runs.append((model, optimizer))
    (mine, a), (theirs, b) = runs
    assert a.param_groups[0]["betas"] == b.param_groups[0]["betas"]
    torch.testing.assert_close(float(a.param_groups[0]["lr"]), float(b.param_groups[0]["lr"]))
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert float(a.state[p]["step"]) == float(b.state[q]["step"]) == 12


def test_groups_have_rates_of_their_own_and_may_come_later():
    runs = []
    for cls in (fg.SparseAdamW, torch.optim.AdamW):
        model = net()
        first, last = model[0], model[2]
        optimizer = cls([{"params": first.parameters(), "lr": 1e-1}], lr=1e-2, weight_decay=0.3)
        train(model, optimizer, 3)
        optimizer.add_param_group({"params": list(last.parameters()), "weight_decay": 0.0})
        train(model, optimizer, 3, first=3)
        runs.append(model)
    for p, q in zip(*(m.parameters() for m in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    model, _, optimizer = tiles()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(data(0)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert calls == [True]
    assert optimizer.step(closure).item() < first.item()
    assert optimizer.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model, partial, optimizer = tiles()
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for p in partial.parameters()]
    if set_to_none:
        assert grads == [None] * len(grads)
    else:
        assert all(not g.any() for g in grads)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.step()  # zero gradients are a step, missing ones are none
    steps = [float(s["step"]) for s in optimizer.state_dict()["state"].values()]
    assert steps == [float(s["step"]) + (not set_to_none) for s in before["state"].values()]


# -- hooks -----------------------------------------------------------------------------------


def test_step_and_state_hooks_are_called_in_their_order():
    model, _, optimizer = tiles()
    seen = []
    optimizer.register_step_pre_hook(lambda o, a, k: seen.append(("pre", len(o.state))))
    optimizer.register_step_post_hook(lambda o, a, k: seen.append(("post", len(o.state) > 0)))
    train(model, optimizer, 1)
    assert seen == [("pre", 0), ("post", True)]
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    assert optimizer.state_dict()["extra"] == 1
    assert seen[-1] == "before"


def test_hooks_of_loading_see_and_change_what_is_loaded():
    """The state that a hook hands on is what is restored, in full precision, and hooks that come
    after loading see it restored."""
    model, _, optimizer = tiles(torch.bfloat16)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    _, partial, other = tiles(torch.bfloat16)

    def tripled(_, found):
        changed = copy.deepcopy(found)
        for s in changed["state"].values():
            s["exp_avg"] *= 3.3
        return changed

    seen = {}
    other.register_load_state_dict_pre_hook(tripled)
    other.register_load_state_dict_post_hook(
        lambda o: seen.update({id(p): s["exp_avg"].clone() for p, s in o.state.items()})
    )
    other.load_state_dict(state)
    for p, s in zip(partial.parameters(), state["state"].values(), strict=True):
        assert other.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(other.state[p]["exp_avg"], s["exp_avg"] * 3.3)
        assert torch.equal(seen[id(p)], other.state[p]["exp_avg"])
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1
    assert len(other._optimizer_load_state_dict_post_hooks) == 1


def test_a_step_that_fails_leaves_no_trace_whatever_the_group():
    """NaN in the last of two groups: the first has not moved either, nor been counted."""
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = fg.SparseAdamW(groups, lr=0.1)
    train(model, optimizer, 1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.zero_grad()
    model(data(1)).square().mean().backward()
    for bad in (float("nan"), float("inf"), -float("inf")):
        model[2].bias.grad[-1] = bad
        with pytest.raises(fg.errors.NonFiniteGradientError) as caught:
            optimizer.step()
        assert caught.value.names == ["parameter 1 of group 1, shape (6,)"]
        assert str(before) == str((model.state_dict(), optimizer.state_dict()))
    model[2].bias.grad.fill_(1.7e38)  # finite: a sum that overflows is no infinity
    optimizer.step()


def test_infinities_that_cancel_are_found():
    p = nn.Parameter(torch.ones(64))
    p.grad = torch.zeros(64)
    p.grad[3], p.grad[40] = torch.inf, -torch.inf
    with pytest.raises(fg.errors.NonFiniteGradientError):
        fg.SparseAdamW([p]).step()


def test_llama_in_rows_survives_all_of_it():
    """Groups by name, scheduler, save, resume: one run through, one interrupted."""
    runs = []
    for stop in (None, 3):
        model = randomised(MODELS["llama"])
        partial = make_partial(model, selection_of(model, "row"))
        optimizer = fg.SparseAdamW(partial.named_parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        for step in range(6):
            if step == stop:
                kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(),
                                      schedule.state_dict()))  # fmt: skip
                model = randomised(MODELS["llama"])
                partial = make_partial(model, selection_of(model, "row"))
                optimizer = fg.SparseAdamW(partial.named_parameters(), lr=1e-2)
                schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
                for target, state in zip((model, optimizer, schedule), kept, strict=True):
                    target.load_state_dict(state)
            optimizer.zero_grad()
            model(**batch_of(seed=step)).loss.backward()
            torch.nn.utils.clip_grad_norm_(partial.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        runs.append(model.state_dict())
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name
