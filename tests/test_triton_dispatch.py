"""The operators run their Triton kernels where they should, and say so where they cannot.

Without a GPU the kernels run in Triton's interpreter, in a process of their own: the whole of
test_kernels.py passes through them, and a model is probed and trained with them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastgrad as fg
from fastgrad_kernels import dispatch, ops

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="run by the tests below in their own process"
)
not_inside = pytest.mark.skipif(INTERPRETED, reason="this is what runs the others")


def interpret(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "100%" in done.stdout


@not_inside
def test_every_operator_test_passes_through_the_kernels():
    interpret(str(Path(__file__).parent / "test_kernels.py"))


@not_inside
def test_a_model_is_probed_and_trained_by_the_kernels():
    interpret(__file__)


@pytest.fixture
def calls(monkeypatch):
    """Names of the operators that chose their kernel."""
    seen, original = [], dispatch.kernel

    def spy(op, tensor, reason=None):
        chosen = original(op, tensor, reason)
        if chosen:
            seen.append(op)
        return chosen

    monkeypatch.setattr(dispatch, "kernel", spy)
    return seen


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.up = torch.nn.Linear(16, 32)
        self.down = torch.nn.Linear(32, 16, bias=False)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        x = x + self.down(torch.nn.functional.silu(self.up(x)))
        return x @ self.embed.weight.T


def build():
    torch.manual_seed(0)
    model = Model().to(DEVICE)
    ids = torch.randint(0, 11, (3, 6)).to(DEVICE)
    return model, ids


def loss(model, ids):
    logits = model(ids)[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


@runs_kernels
@pytest.mark.parametrize("blocks", ["module", "row", "16x16"])
def test_influence_by_kernels(calls, blocks):
    model, ids = build()
    with fg.Probe(model, blocks, strict=True) as probe:
        loss(model, ids).backward()
    T = probe.stats().T * len(ids)  # the loss is a mean over examples of the same length
    expected = {"cross_influence", "embedding_influence", "norm_gradients"}
    if blocks != "module":
        expected |= {"grad_stats"}
        expected -= {"embedding_influence"}  # the tied weight is taken example by example
    assert expected <= set(calls)
    for j in range(len(ids)):
        model.zero_grad()
        loss(model, ids[j : j + 1]).backward()
        want = [float(p.grad.double().norm()) for p in model.parameters()]
        torch.testing.assert_close(list(T[:, j]), want, rtol=1e-4, atol=1e-7)


@runs_kernels
def test_training_by_kernels_equals_dense_training(calls):
    """Three steps of selected tiles against AdamW on the whole weight with the same gradient."""
    model, ids = build()
    twin, _ = build()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with fg.Probe(model, "16x16") as probe:
        loss(model, ids).backward()
    model.zero_grad()
    selection = fg.select(probe.stats(), model=model, fraction=0.5)
    partial = fg.make_partial(model, selection, master_dtype=torch.float32)
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2, weight_decay=0.1)
    dense = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    masks = {n: selected(selection, n, p) for n, p in twin.named_parameters()}
    for _ in range(3):
        for m, o in ((model, optimizer), (twin, dense)):
            loss(m, ids).backward()
            o.step()
            o.zero_grad()
        with torch.no_grad():
            for n, p in twin.named_parameters():
                p.copy_(torch.where(masks[n], p, start[n]))
    assert {"adamw_", "grad_stats"} <= set(calls)
    full = partial.remove().state_dict()
    for n, p in twin.named_parameters():
        torch.testing.assert_close(full[n], p.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(full[n][~masks[n]], start[n][~masks[n]])


def selected(selection, name, p):
    mask = torch.zeros(p.shape, dtype=torch.bool, device=p.device)
    if name in selection.blocks:
        grid = selection.grid(name)
        for block in selection.blocks[name].tolist():
            r, c = divmod(block, grid.grid_cols)
            rows = slice(r * grid.block_rows, (r + 1) * grid.block_rows)
            cols = slice(c * grid.block_cols, (c + 1) * grid.block_cols)
            mask.view(grid.rows, grid.cols)[rows, cols] = True
    return mask


@runs_kernels
def test_prepared_steps_follow_tensors_that_move(calls):
    """The kept table holds addresses: other tensors, also in recycled memory, get their own."""
    for size in (8, 8, 24):
        p, g = torch.ones(size, device=DEVICE), torch.ones(size, device=DEVICE)
        state = [torch.zeros(size, device=DEVICE) for _ in range(2)]
        count = torch.zeros((), device=DEVICE)
        rate = torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
        ops.adamw_([p], [g], [state[0]], [state[1]], [count], [], [], rate, 0.9, 0.99, 0.0, 0.0)
        torch.testing.assert_close(p, torch.full_like(p, 0.5))
        del p, g, state
    assert calls == ["adamw_"] * 3


@runs_kernels
def test_a_call_the_kernel_cannot_do_is_named_and_still_exact():
    left, right = torch.randn(6, 7, device=DEVICE), torch.randn(6, 9, device=DEVICE)
    offsets = torch.tensor([0, 2, 6])
    dispatch._warn.cache_clear()
    with pytest.warns(dispatch.FallbackWarning, match=r"cross_influence .* blocks of 3x5"):
        _, sq, _ = ops.cross_influence(left, right, offsets, 3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, not at every call
        ops.cross_influence(left, right, offsets, 3, 5)
    grads = [left[a:b].T @ right[a:b] for a, b in ((0, 2), (2, 6))]
    want = torch.stack([g[:3, :5].square().sum() for g in grads])
    torch.testing.assert_close(sq[0], want)


@not_inside
def test_a_cpu_uses_the_cpu_path(calls):
    left = torch.randn(6, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.cross_influence(left, left, torch.tensor([0, 6]), 7, 7)
    assert calls == []


@not_inside
def test_missing_triton_is_named(monkeypatch):
    """A GPU without Triton gets the blocked implementation and is told why."""
    monkeypatch.setattr(dispatch, "takes", lambda tensor: True)
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    dispatch._warn.cache_clear()
    with pytest.warns(dispatch.FallbackWarning, match="Triton is not installed"):
        assert not dispatch.kernel("grad_stats", torch.zeros(1))
    dispatch._warn.cache_clear()
