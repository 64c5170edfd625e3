"""What a partial layer keeps for its backward pass, and what it does not wait for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgrad as fg
from fastgrad import sparse_layers
from fastgrad.sparse_layers import sum_rows
from fastgrad_kernels.layout import gather_blocks, scatter_blocks_
from tests.test_partial import selection_of

#: Operators whose result has a shape, or a number for the host, that depends on values.
WAITS = ("aten::nonzero", "aten::_local_scalar_dense", "aten::_unique2", "aten::unique_dim",
         "aten::masked_select", "aten::equal", "aten::is_nonzero", "aten::item")  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes operators for which the host of a GPU would wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = name == "aten::index" and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if name in WAITS or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Layers(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.embed = nn.Embedding(19, 12, padding_idx=0)
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=groups)
        self.linear = nn.Linear(12, 10)

    def forward(self, ids):
        return self.linear(torch.tanh(self.conv(torch.tanh(self.embed(ids)).mT)).mT)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("spec", ["row", "column", "5x7", "expert"])
def test_after_the_first_pass_no_layer_asks_for_what_depends_on_the_selection(
    spec, groups, monkeypatch
):
    """As on a GPU, where rows that belong nowhere are added to spare rows."""
    monkeypatch.setattr(
        sparse_layers, "sum_rows", lambda g, s, n, filtered: sum_rows(g, s, n, filtered=False)
    )
    # products have a kernel of their own there
    monkeypatch.setattr(
        sparse_layers.ops, "sparse_wgrad",
        lambda left, right, ids, rows, cols: left.new_zeros(ids.numel(), rows, cols),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Layers(groups)
    partial = fg.make_partial(model, selection_of(model, spec), torch.float64)
    ids = torch.tensor([[0, 3, 18, 3], [5, 5, 0, 1]])
    model(ids).sum().backward()
    partial.sync()
    with Waits() as waits:
        model(ids).sum().backward()
        partial.sync()
    assert waits.found == []
    assert any(b.packed.grad is not None for b in partial.packed)


def test_the_detector_sees_a_wait():
    with Waits() as waits:
        x = torch.tensor([1.0, 0.0])
        x.nonzero()
        x[x > 0]
        x.sum().item()
    assert waits.found == ["aten::nonzero", "aten::index", "aten::_local_scalar_dense"]


def test_block_numbers_that_change_are_looked_at_anew():
    """Numbers changed in place, another matrix, another size of block: nothing old is used."""
    torch.manual_seed(0)
    ids, matrix = torch.tensor([0, 3, 5]), torch.randn(7, 10)

    def expected(m, numbers, h, w):
        out = torch.zeros(len(numbers), h, w)
        across = -(-m.shape[1] // w)
        for k, b in enumerate(numbers):
            r, c = b // across * h, b % across * w
            part = m[r : r + h, c : c + w]
            out[k, : part.shape[0], : part.shape[1]] = part
        return out

    for _ in range(2):
        assert torch.equal(gather_blocks(matrix, ids, 3, 4), expected(matrix, [0, 3, 5], 3, 4))
    assert torch.equal(gather_blocks(matrix, ids, 2, 6), expected(matrix, [0, 3, 5], 2, 6))
    wide = torch.randn(9, 14)
    assert torch.equal(gather_blocks(wide, ids, 3, 4), expected(wide, [0, 3, 5], 3, 4))
    ids[0] = 8
    got = gather_blocks(matrix, ids, 3, 4)
    assert torch.equal(got, expected(matrix, [8, 3, 5], 3, 4))
    back = torch.zeros_like(matrix)
    scatter_blocks_(back, ids, got, 3, 4)
    assert torch.equal(gather_blocks(back, ids, 3, 4), got)
    none = gather_blocks(matrix, ids[:0], 3, 4)
    assert none.shape == (0, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_summed_alike_with_and_without_filtering(dtype):
    torch.manual_seed(0)
    grad, slots = torch.randn(300, 5).to(dtype), torch.randint(-3, 7, (300,))
    slots = slots.clamp_min(-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.zeros(9, 5, dtype=torch.float64)
    for row, slot in zip(grad.double(), slots.tolist(), strict=True):
        if slot >= 0:
            expected[slot] += row
    for filtered in (True, False):
        got = sum_rows(grad, slots, 9, filtered=filtered)
        assert got.dtype == wide
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    empty = sum_rows(grad[:0], slots[:0], 9, filtered=False)
    assert torch.equal(empty, torch.zeros(9, 5, dtype=wide))


def saved_by(module, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = module(x)
    return out, {t.data_ptr() for t in kept}


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_saves_only_what_its_gradients_need(groups):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    module = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    module.load_state_dict(plain.state_dict())
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    partial = fg.make_partial(module, fg.Selection(shapes, "row", {"weight": np.array([1, 4])}))
    weight = module._parameters["weight"].data_ptr()
    x = torch.randn(2, 4, 5, 5)
    out, kept = saved_by(module, x)  # the first layer: nobody wants a gradient of x
    assert x.data_ptr() in kept
    assert weight not in kept
    out.square().sum().backward()
    plain(x).square().sum().backward()
    packed = next(partial.parameters())
    torch.testing.assert_close(packed.grad, partial.packed[0].gather(plain.weight.grad))

    packed.requires_grad_(False)
    partial.packed[0].watched = False  # as in a frozen copy
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, kept = saved_by(module, a)
    assert weight in kept
    assert a.data_ptr() not in kept
    out.square().sum().backward()
    plain(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
