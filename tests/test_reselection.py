"""Re-selection: what stays goes on, what is new begins like fresh, what leaves is freed."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.errors import PartialError, SelectionError
from fastgrad.identity import model_parameters, weights_hash
from fastgrad.selection import Selection
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import masks_of, selection_of
from tests.test_partial_resume import assert_same, everything, grouped, train

LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.999, 1e-8, 0.1


class ByHand:
    """AdamW on whole float64 weights, element by element: a mask, moments and a count for each."""

    def __init__(self, model):
        self.model = model
        own = model_parameters(model)
        self.mask = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in own.items()}
        self.m = {n: torch.zeros_like(p) for n, p in own.items()}
        self.v = {n: torch.zeros_like(p) for n, p in own.items()}
        self.count = {n: torch.zeros_like(p) for n, p in own.items()}

    def select(self, selection):
        for name, mask in masks_of(selection, self.model).items():
            for kept in (self.m, self.v, self.count):
                kept[name][~(mask & self.mask[name])] = 0  # new or not selected: as if never seen
            self.mask[name] = mask

    def step(self, batch):
        self.model.zero_grad()
        self.model(**batch).loss.backward()
        with torch.no_grad():
            for n, p in model_parameters(self.model).items():
                on, g, m, v, count = (
                    self.mask[n], p.grad, self.m[n], self.v[n], self.count[n]
                )  # fmt: skip
                count[on] += 1
                m[on] = BETA1 * m[on] + (1 - BETA1) * g[on]
                v[on] = BETA2 * v[on] + (1 - BETA2) * g[on] ** 2
                decay = DECAY if p.ndim >= 2 else 0.0
                denominator = (v / (1 - BETA2**count)).sqrt() + EPS
                new = p * (1 - LR * decay) - LR * (m / (1 - BETA1**count)) / denominator
                p[on] = new[on]


def mixed(model, specs, share, seed):
    """A random selection of several granularities; 'none' leaves a parameter out."""
    rng = np.random.default_rng(seed)
    shapes = {n: tuple(p.shape) for n, p in model_parameters(model).items()}
    by_name = {n: specs[i % len(specs)] for i, n in enumerate(shapes)}
    known = {n: s for n, s in by_name.items() if s != "none"}
    empty = Selection(shapes, "module", {n: np.array([0]) for n in known}, specs=known)
    blocks = {}
    for name in known:
        n = empty.grid(name).n_blocks
        blocks[name] = np.sort(rng.choice(n, max(1, int(share * n)), replace=False))
    return Selection(shapes, "module", blocks, specs=known)


# Each weight of the model goes through one column of these phases (grids and shares differ).
PHASES = {
    "rows": [(["row"], 0.3), (["row"], 0.6), (["row"], 0.2)],
    "tiles": [(["16x8"], 0.3), (["16x8"], 0.5), (["16x8"], 1.0), (["16x8"], 0.4)],
    "whole tensors enter and leave": [
        (["module", "none"], 1.0), (["none", "module", "module"], 1.0), (["module", "none"], 1.0)
    ],
    "whole to blocks": [(["module"], 1.0), (["row", "16x8"], 0.5)],
    "blocks to whole and back": [(["row"], 0.4), (["row"], 1.0), (["row"], 0.7)],
    "experts and tiles come and go": [
        (["none", "8x8", "row"], 0.5), (["8x8", "8x8", "none"], 0.5), (["none", "8x8", "row"], 0.9)
    ],
}  # fmt: skip


@pytest.mark.parametrize("phases", PHASES)
def test_a_reselected_run_equals_one_masked_by_hand(phases):
    model = randomised(MODELS["llama-tied"]).double()
    reference = ByHand(copy.deepcopy(model))
    partial = optimizer = None
    step = 0
    for number, (specs, share) in enumerate(PHASES[phases]):
        selection = mixed(model, specs, share, seed=number)
        reference.select(selection)
        if partial is None:
            partial = fg.make_partial(model, selection)
            optimizer = fg.SparseAdamW(grouped(partial), lr=LR, betas=(BETA1, BETA2), eps=EPS)
        else:
            partial.reselect(
                selection, optimizer, group_of=lambda name, p: 0 if p.ndim >= 2 else 1
            )
        assert partial.selection is selection
        named = dict(partial.named_parameters())
        held = [p for g in optimizer.param_groups for p in g["params"]]
        assert {id(p) for p in held} == {id(p) for p in named.values()}
        assert len(held) == len(named)
        assert {id(p) for p in optimizer.state} <= {id(p) for p in held}
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == {id(p) for p in named.values()}
        frozen = {n: p.detach().clone() for n, p in model_parameters(model).items()}
        for _ in range(6):
            batch = batch_of(seed=step)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            reference.step(batch)
            step += 1
        own = model_parameters(reference.model)
        for name, p in model_parameters(model).items():
            torch.testing.assert_close(p, own[name], rtol=1e-9, atol=1e-11, msg=name)
            off = ~reference.mask[name]
            assert torch.equal(p[off], frozen[name][off]), name


def with_gradients(partial, grads):
    for name, p in partial.named_parameters():
        blocks = p.__dict__.get("_fastgrad_blocks")
        p.grad = grads[name].clone() if blocks is None else blocks.gather(grads[name]).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16-masters"])
def test_a_block_that_is_added_after_50_steps_has_the_bits_of_a_fresh_one(dtype):
    """And what stays has the bits of a run in which nothing was ever added."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    base = nn.Linear(24, 20).to(dtype)
    grads = [
        {n: torch.randn(p.shape, generator=g) for n, p in base.named_parameters()}
        for _ in range(90)
    ]

    def begin(rows):
        model = copy.deepcopy(base)
        shapes = {"weight": (20, 24), "bias": (20,)}
        partial = fg.make_partial(
            model, Selection(shapes, "row", {"weight": np.array(rows)}), torch.float32
        )
        return partial, fg.SparseAdamW(partial.parameters(), lr=1e-2, weight_decay=0.1)

    def run(partial, optimizer, steps):
        for s in steps:
            with_gradients(partial, grads[s])
            optimizer.step()
            optimizer.zero_grad()

    partial, optimizer = begin([1, 4, 7])
    run(partial, optimizer, range(50))
    dropped = partial.model.weight[1].detach().clone()
    added_before = partial.model.weight[[2, 11]].detach().clone()
    report = partial.reselect(
        Selection(partial.selection.shapes, "row", {"weight": np.array([2, 4, 7, 11])}), optimizer
    )
    change = report.changes["weight"]
    assert (change.kept, change.added, change.dropped) == (2, 2, 1)
    assert torch.equal(partial.model.weight[[2, 11]], added_before)
    run(partial, optimizer, range(50, 90))
    assert torch.equal(partial.model.weight[1], dropped)

    stays, its = begin([4, 7])
    run(stays, its, range(90))
    fresh, fresh_optimizer = begin([2, 11])  # as if training began here
    run(fresh, fresh_optimizer, range(50, 90))
    (p,), (kept,), (new,) = (list(x.parameters()) for x in (partial, stays, fresh))
    assert torch.equal(p[[1, 2]], kept)
    assert torch.equal(p[[0, 3]], new)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[p][key][[1, 2]], its.state[kept][key])
        assert torch.equal(optimizer.state[p][key][[0, 3]], fresh_optimizer.state[new][key])
    assert optimizer.state[p]["step"].tolist() == [40, 90, 90, 40]


def test_what_leaves_is_freed_and_the_report_counts_it():
    model = randomised(MODELS["llama"]).bfloat16()
    names = [n for n in model_parameters(model) if n.endswith("proj.weight")]
    partial = fg.make_partial(model, selection_of(model, "row", names=names[:6]), torch.float32)
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch_of()).loss.backward()
        optimizer.step()
    old = dict(partial.named_parameters())
    watched = [weakref.ref(t) for p in old.values() for t in optimizer.state[p].values()]
    watched += [weakref.ref(p.grad) for p in old.values()]
    blocks = [weakref.ref(b) for b in partial.packed]

    def bytes_of(names):
        found = [old[n] for n in names] + [old[n].grad for n in names]
        found += [t for n in names for t in optimizer.state[old[n]].values() if t.numel() > 1]
        return sum(t.untyped_storage().nbytes() for t in found)

    freed = bytes_of(names[:6])
    keep = selection_of(model, "row", names=names[4:8], seed=3)
    report = partial.reselect(keep, optimizer)
    assert report.bytes_freed == freed
    assert [n for n, c in report.changes.items() if not c.kept + c.added] == names[:4]
    assert "entered" in report.summary()
    new = [p for n, p in partial.named_parameters() if n in names[4:6]]
    allocated = sum(
        t.untyped_storage().nbytes() for p in new for t in (p, *optimizer.state[p].values())
        if t.numel() > 1
    )  # fmt: skip
    entered = [p for n, p in partial.named_parameters() if n in names[6:8]]
    allocated += sum(p.untyped_storage().nbytes() for p in entered)
    step_counts = sum(4 * optimizer.state[p]["step"].numel() for p in new)
    assert report.bytes_added == allocated
    assert step_counts > 0
    assert not [r for r in watched if r() is not None]  # at once, without the garbage collector
    assert all(p.untyped_storage().nbytes() == 0 and p.grad is None for p in old.values())
    gc.collect()
    assert not [r for r in blocks if r() is not None]
    assert len(optimizer.state) == 2
    moments = sum(8 * p.numel() for p in new)
    assert optimizer.state_bytes() == moments + sum(
        4 * optimizer.state[p]["step"].numel() for p in new
    )
    for p in model_parameters(model).values():
        assert p.grad is None


def snapshot(partial, optimizer):
    model = partial.model
    return (
        weights_hash(model),
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        [(n, id(p), p.detach().clone()) for n, p in partial.named_parameters()],
        [[id(p) for p in g["params"]] + [g.get("param_names")] for g in optimizer.param_groups],
        {id(p): {k: (v.clone() if isinstance(v, torch.Tensor) else v) for k, v in s.items()}
         for p, s in optimizer.state.items()},
        id(partial.selection), id(partial.touched), [id(b) for b in partial.packed],
    )  # fmt: skip


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    return a == b


class Counted(torch.optim.Optimizer):
    """An optimizer of one's own, whose state has another layout than the parameter."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["codes"] = torch.zeros(p.numel() // 2 + 1, dtype=torch.uint8)
                    p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda ps: torch.optim.AdamW(ps, lr=1e-2), r"step.*bias correction.*SparseAdamW"),
        (lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, dampening=0.1), "undamped"),
        (lambda ps: torch.optim.Rprop(ps, lr=1e-2), "step size"),
        (lambda ps: torch.optim.Adagrad(ps, lr=1e-2, lr_decay=0.1), "decay counted"),
        (Counted, "which part of it belongs to which block"),
        (lambda ps: torch.optim.LBFGS([q for g in ps for q in g["params"]]), "one history"),
    ],
    ids=["adamw", "sgd-dampening", "rprop", "adagrad", "unknown-state", "lbfgs"],
)
def test_what_would_not_be_exact_is_refused_and_nothing_changes(make, word):
    model = randomised(MODELS["llama"])
    partial = fg.make_partial(model, selection_of(model, "16x8"))
    optimizer = make(grouped(partial))
    if not isinstance(optimizer, torch.optim.LBFGS):
        model(**batch_of()).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    before = snapshot(partial, optimizer)
    with pytest.raises(PartialError, match=word):
        partial.reselect(selection_of(model, "16x8", share=0.5, seed=5), optimizer)
    assert same(snapshot(partial, optimizer), before)
    if not isinstance(optimizer, torch.optim.LBFGS):
        model(**batch_of()).loss.backward()
        optimizer.step()


def test_refusals_before_anything_changes():
    model = randomised(MODELS["llama"])
    names = [n for n, p in model_parameters(model).items() if p.ndim == 2]
    vectors = [n for n, p in model_parameters(model).items() if p.ndim == 1]
    partial = fg.make_partial(model, selection_of(model, "row", names=names[:4]))
    first, second = (list(partial.parameters())[i::2] for i in (0, 1))
    optimizer = fg.SparseAdamW([{"params": first}, {"params": second}], lr=1e-2)
    other = fg.SparseAdamW(first, lr=1e-2)
    wanted = selection_of(model, "row", names=names[:5], seed=1)
    for seed in range(2):
        model(**batch_of(seed=seed)).loss.backward()
        optimizer.step() if seed == 0 else None  # the second gradient is not used
        before = snapshot(partial, optimizer)
        for attempt, error, word in (
            (lambda: partial.reselect(wanted, optimizer), PartialError, "2 of 2 param groups"),
            (lambda: partial.reselect(
                selection_of(model, "row", names=[*names[:4], *vectors]), optimizer),
             PartialError, "no param group holds"),
            (lambda: partial.reselect(wanted, optimizer, group_of=lambda n, p: 2),
             PartialError, "groups 0 to 1"),
            (lambda: partial.reselect(wanted, other), PartialError, "none of the optimizers"),
            (lambda: partial.reselect(names, optimizer), SelectionError, "takes a Selection"),
            (lambda: partial.reselect(wanted, "adam"), PartialError, "takes the optimizer"),
            (lambda: partial.reselect(
                selection_of(randomised(MODELS["gpt2"]), "row"), optimizer),
             SelectionError, "made for a model with"),
        ):  # fmt: skip
            if seed and error is PartialError and word not in ("takes the optimizer",):
                word = r"no optimizer has made a step.*zero_grad"
            with pytest.raises(error, match=word):
                attempt()
            assert same(snapshot(partial, optimizer), before)
    optimizer.zero_grad(set_to_none=False)  # zeros are no gradient that could be lost
    partial.reselect(wanted, optimizer, group_of=lambda n, p: 1)
    assert len(optimizer.param_groups[1]["params"]) == 3
    partial.remove()
    with pytest.raises(PartialError, match="removed"):
        partial.reselect(wanted, optimizer)


def test_granularity_of_a_weight_that_is_partly_trained_cannot_change_under_counts():
    model = randomised(MODELS["llama"])
    partial = fg.make_partial(model, selection_of(model, "row", share=0.5))
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    model(**batch_of()).loss.backward()
    optimizer.step()
    before = snapshot(partial, optimizer)
    with pytest.raises(PartialError, match=r"granularity '16x8'.*'row'"):
        partial.reselect(selection_of(model, "16x8", share=0.5), optimizer)
    assert same(snapshot(partial, optimizer), before)
    # rows said as stripes are the same blocks
    rows = partial.selection
    stripes = Selection(rows.shapes, "1x*", rows.blocks)
    report = partial.reselect(stripes, optimizer)
    assert (report.added, report.dropped, report.bytes_freed) == (0, 0, 0)


@pytest.mark.parametrize("make", ["sgd", "rmsprop", "adagrad"])
def test_optimizers_without_counts_carry_their_state(make):
    """Against the same optimizer on whole weights whose gradients are masked by hand."""
    build = {
        "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
        "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.5),
        "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    }[make]
    model = randomised(MODELS["llama"]).double()
    dense = copy.deepcopy(model)
    names = [n for n, p in model_parameters(model).items() if p.ndim == 2]
    phases = [selection_of(model, "row", 0.5, seed, names=names) for seed in range(3)]
    partial = fg.make_partial(model, phases[0])
    optimizer, reference = build(list(partial.parameters())), build(list(dense.parameters()))
    step = 0
    for i, selection in enumerate(phases):
        if i:
            partial.reselect(selection, optimizer)
        masks = masks_of(selection, dense)
        for name, p in dense.named_parameters():
            for value in reference.state[p].values():
                if isinstance(value, torch.Tensor) and value.shape == p.shape:
                    value[~masks[name]] = 0
        for _ in range(5):
            batch = batch_of(seed=step)
            step += 1
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            dense(**batch).loss.backward()
            for name, p in dense.named_parameters():
                p.grad[~masks[name]] = 0
            reference.step()
            reference.zero_grad()
    for (name, p), q in zip(model_parameters(model).items(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=name)


def test_adamw_may_drop_blocks_and_take_whole_new_weights():
    model = randomised(MODELS["llama"])
    names = [n for n, p in model_parameters(model).items() if p.ndim == 2]
    partial = fg.make_partial(model, selection_of(model, "row", 0.6, names=names[:4]))
    optimizer = torch.optim.AdamW(partial.parameters(), lr=1e-2)
    model(**batch_of()).loss.backward()
    optimizer.step()
    kept = {n: ids[: len(ids) // 2] for n, ids in partial.selection.blocks.items()}
    kept |= selection_of(model, "row", names=names[4:6]).blocks
    partial.reselect(Selection(partial.selection.shapes, "row", kept), optimizer)
    for name, p in partial.named_parameters():
        assert optimizer.state[p].get("step", 0) == (1 if name in names[:4] else 0)
    model(**batch_of(seed=2)).loss.backward()
    optimizer.step()
    for name, p in partial.named_parameters():
        assert optimizer.state[p]["step"] == (2 if name in names[:4] else 1)


def test_groups_names_and_order_are_those_of_a_new_optimizer():
    model = randomised(MODELS["gpt2"])

    def groups_of(partial):
        full = model_parameters(model)
        named = list(partial.named_parameters())
        return [
            {"params": [(n, p) for n, p in named if full[n].ndim >= 2], "lr": 1e-3},
            {"params": [(n, p) for n, p in named if full[n].ndim < 2], "lr": 1e-2},
        ]

    names = list(model_parameters(model))
    partial = fg.make_partial(model, selection_of(model, "row", names=names[1::3]))
    optimizer = fg.SparseAdamW(groups_of(partial), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model(**batch_of()).loss.backward()
    optimizer.step()
    scheduler.step()
    partial.reselect(selection_of(model, "row", names=names[2::2]), optimizer)
    fresh = fg.SparseAdamW(groups_of(partial), lr=1e-2)
    for mine, new, lr in zip(optimizer.param_groups, fresh.param_groups, (5e-4, 5e-3), strict=True):
        assert [id(p) for p in mine["params"]] == [id(p) for p in new["params"]]
        assert mine["param_names"] == new["param_names"]
        assert mine["lr"] == lr
    fresh.load_state_dict(optimizer.state_dict())
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 2.5e-4


def test_an_optimizer_of_all_parameters_of_the_model():
    model = randomised(MODELS["llama"])
    partial = fg.make_partial(model, mixed(model, ["row", "module", "none"], 0.5, 0))
    optimizer = fg.SparseAdamW(model.parameters(), lr=1e-2)
    model(**batch_of()).loss.backward()
    optimizer.step()
    partial.reselect(mixed(model, ["row", "none", "module"], 0.7, 1), optimizer)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert len(held) == len(set(held))
    assert set(held) >= {id(p) for p in partial.parameters()}
    optimizer.zero_grad()
    before = {n: p.detach().clone() for n, p in partial.named_parameters()}
    model(**batch_of(seed=2)).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in partial.named_parameters())


@pytest.mark.parametrize("master", [None, torch.float32])
def test_a_run_is_resumed_exactly_after_reselections(tmp_path, master):
    choices = [("row", 0.3, 0), ("row", 0.6, 1), ("row", 1.0, 2), ("row", 1.0, 2)]

    def begin():
        model = randomised(MODELS["llama"]).bfloat16()
        partial = fg.make_partial(model, selection_of(model, *choices[0]), master)
        optimizer = fg.SparseAdamW(grouped(partial), lr=1e-2)
        return partial, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)

    def phase(partial, optimizer, scheduler, number):
        if number:
            partial.reselect(selection_of(partial.model, *choices[number]), optimizer)
        train(partial.model, optimizer, scheduler, range(3 * number, 3 * number + 3))

    straight, first = begin(), begin()
    for number in range(4):
        phase(*straight, number)
    for number in range(4):
        phase(*first, number)
        partial, optimizer, scheduler = first
        partial.save(tmp_path / "p.safetensors")
        rest = [partial.model.state_dict(), optimizer.state_dict(), scheduler.state_dict()]
        torch.save(rest, tmp_path / "rest.pt")
        weights, moments, schedule = torch.load(tmp_path / "rest.pt", weights_only=True)
        model = MODELS["llama"]().bfloat16()
        model.load_state_dict(weights)
        resumed = fg.load_partial(model, tmp_path / "p.safetensors")
        assert resumed.base_hash == straight[0].base_hash
        assert resumed.touched.blocks.keys() == partial.touched.blocks.keys()
        optimizer = fg.SparseAdamW(grouped(resumed), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        optimizer.load_state_dict(moments)
        scheduler.load_state_dict(schedule)
        first = resumed, optimizer, scheduler
    assert any(b.by_block for b in resumed.packed)  # whole, with counts per block
    assert_same(everything(*first[:2]), everything(*straight[:2]))


def test_a_delta_after_a_reselection_holds_what_was_dropped(tmp_path):
    model = randomised(MODELS["llama"])
    base = copy.deepcopy(model)
    partial = fg.make_partial(model, mixed(model, ["row", "module", "none"], 0.4, 0))
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    for number, specs in enumerate([["row", "none", "8x8"], ["none", "row", "8x8"]]):
        model(**batch_of()).loss.backward()
        optimizer.step()
        partial.reselect(mixed(model, specs, 0.4, number + 1), optimizer)
        optimizer.zero_grad()
    model(**batch_of()).loss.backward()
    optimizer.step()
    masks = masks_of(partial.touched, model)
    before = model_parameters(base)
    for name, p in model_parameters(model).items():
        assert not (p != before[name])[~masks[name]].any(), name
    fg.save_delta(partial, tmp_path / "d.safetensors")
    fg.load_delta(base, tmp_path / "d.safetensors")
    assert weights_hash(base) == weights_hash(model)


def test_an_optimizer_that_was_not_told_refuses_to_step():
    model = randomised(MODELS["llama"])
    names = [n for n, p in model_parameters(model).items() if p.ndim == 2]
    partial = fg.make_partial(model, selection_of(model, "row", names=names))
    optimizer = torch.optim.SGD(partial.parameters(), lr=1e-2)
    partial.reselect(selection_of(model, "row", names=names, seed=4))
    model(**batch_of()).loss.backward()
    with pytest.raises(PartialError, match="re-selected without this optimizer"):
        optimizer.step()
    torch.optim.SGD(partial.parameters(), lr=1e-2).step()


@pytest.mark.parametrize("after", ["none", "row"])
def test_so_does_one_that_holds_a_whole_weight_which_is_trained_no_more(after):
    model = randomised(MODELS["llama"])
    name, other = [n for n, p in model_parameters(model).items() if p.ndim == 2][:2]
    partial = fg.make_partial(model, selection_of(model, "module", 1.0, names=[name]))
    optimizer = torch.optim.SGD(partial.parameters(), lr=1e-2)
    partial.reselect(selection_of(model, "row", names=[other] if after == "none" else [name]))
    model(**batch_of()).loss.backward()
    with pytest.raises(PartialError, match=r"SGD .*re-selected without it"):
        optimizer.step()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()  # built afterwards
