"""``ops.adamw_`` on a CPU: pieces, step counts per block, and what is written through."""

from __future__ import annotations

import pytest
import torch

from fastgrad_kernels import adamw_cpu, ops, reference
from fastgrad_kernels.layout import gather_blocks, scatter_blocks_

HYPER = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
RATE = 1e-2


def blocks_of(n, height, width, counts, dtype=torch.float32):
    """Parameter, gradient, moments and counts of ``n`` packed blocks; moments as after a step."""
    torch.manual_seed(n)
    p, g, m = (torch.randn(n, height, width) for _ in range(3))
    return [p.to(dtype), g, m * 0.1, m.square(), torch.tensor(counts, dtype=torch.float32)]


def wanted(p, g, m, v, counts, **kwargs):
    """Each block on its own in float64."""
    rows = zip(p, g, m, v, counts, strict=True)
    parts = [reference.adamw(*r[:4], int(r[4]) + 1, lr=RATE, **HYPER, **kwargs) for r in rows]
    return [torch.stack(t) for t in zip(*parts, strict=True)]


def step(row, fulls=(), ids=(), **kwargs):
    columns = [[t] for t in row]
    ops.adamw_(*columns, list(fulls), list(ids), torch.tensor(RATE), **HYPER, **kwargs)


COUNTS = {
    "alike": lambda n: [3] * n,
    "two ages": lambda n: [7] * (n // 2) + [0] * (n - n // 2),
    "all different": lambda n: list(range(n)),
    "in turns": lambda n: [i % 3 for i in range(n)],
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("block", [(1, 3), (2, 5), (50, 64)], ids=str)
def test_each_block_is_corrected_for_its_own_age(counts, block, maximize, monkeypatch):
    monkeypatch.setattr(adamw_cpu, "PIECE", 7000)  # several pieces of every kind
    n = 41
    row = blocks_of(n, *block, COUNTS[counts](n))
    want = wanted(*row, maximize=maximize)
    before = row[4].clone()
    step(row, maximize=maximize)
    assert torch.equal(row[4], before + 1)
    for name, got, expected in zip(("p", "m", "v"), (row[0], *row[2:4]), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-7, msg=name)


def test_counts_that_agree_give_the_bits_of_one_count():
    """A run that never re-selects does not depend on how its steps are counted."""
    one, many = (blocks_of(9, 4, 8, c) for c in ([3] * 9, [3] * 9))
    one[4] = torch.tensor(3.0)
    step(one)
    step(many)
    assert all(torch.equal(a, b) for a, b in zip(one[:4], many[:4], strict=True))


def test_a_new_block_moves_like_one_of_a_fresh_optimizer():
    """A moment of zero under an old count would make a step of 2.5 lr and more."""
    row = blocks_of(6, 4, 8, [500] * 3 + [0] * 3)
    for moment in row[2:4]:
        moment[3:] = 0
    before = row[0].clone()
    step(row)
    decayed = before[3:] * (1 - RATE * HYPER["weight_decay"])
    torch.testing.assert_close(row[0][3:], decayed - RATE * row[1][3:].sign(), rtol=0, atol=2e-5)


SHAPES = {  # matrix, block
    "tiles": ((64, 96), (16, 32)),
    "short last row": ((50, 96), (16, 32)),
    "short last column": ((64, 90), (16, 32)),
    "narrow tiles": ((64, 96), (8, 4)),
    "rows": ((40, 24), (1, 24)),
    "columns": ((40, 24), (40, 1)),
}


@pytest.mark.parametrize("piece", [1 << 18, 700])
@pytest.mark.parametrize("full_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_written_through_and_nothing_else_is(shape, full_dtype, piece, monkeypatch):
    monkeypatch.setattr(adamw_cpu, "PIECE", piece)
    (rows, cols), (h, w) = SHAPES[shape]
    total = -(-rows // h) * -(-cols // w)
    torch.manual_seed(1)
    ids = torch.randperm(total)[: max(2, total // 3)]  # in no order
    full = torch.randn(rows, cols, dtype=full_dtype)
    p = gather_blocks(full, ids, h, w).float()
    row = [p, torch.randn_like(p), torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())]
    version, before, want = full._version, full.clone(), full.clone()
    step(row, [full], [ids])
    scatter_blocks_(want, ids, row[0], h, w)
    assert torch.equal(full, want)
    assert not torch.equal(full, before)
    assert full._version > version  # autograd is told of it


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_weight_is_written_through_in_any_layout(layout, dtype, monkeypatch):
    monkeypatch.setattr(adamw_cpu, "PIECE", 100)

    def laid_out(t):
        if layout == "contiguous":
            return t.contiguous()
        return t.t().contiguous().t() if layout == "transposed" else t.repeat(1, 2)[:, : t.shape[1]]

    torch.manual_seed(2)
    plain = [torch.randn(12, 30), torch.randn(12, 30), torch.zeros(12, 30), torch.zeros(12, 30)]
    row = [*(laid_out(t) for t in plain), torch.zeros(())]
    want, *_ = reference.adamw(*plain, 1, lr=RATE, **HYPER)
    full = laid_out(torch.zeros(12, 30, dtype=dtype))
    step(row, [full], [torch.empty(0, dtype=torch.int64)])
    torch.testing.assert_close(row[0].double(), want, rtol=2e-6, atol=2e-7)
    assert torch.equal(full, row[0].to(dtype))


def test_many_tensors_share_pieces_and_none_is_missed(monkeypatch):
    monkeypatch.setattr(adamw_cpu, "PIECE", 64)
    rows = [blocks_of(n, 3, 5, [n] * n) for n in (1, 2, 9, 30)]
    want = [wanted(*row) for row in rows]
    columns = [list(c) for c in zip(*rows, strict=True)]
    ops.adamw_(*columns, [], [], torch.tensor(RATE), **HYPER)
    for row, expected in zip(rows, want, strict=True):
        torch.testing.assert_close(row[0].double(), expected[0], rtol=2e-6, atol=2e-7)


def test_an_empty_tensor_is_counted_and_left_alone():
    row = [torch.empty(0, 4, 4) for _ in range(4)] + [torch.zeros(())]
    step(row)
    assert int(row[4]) == 1


def test_block_numbers_that_change_in_place_are_read_anew():
    """Where they lie is kept with them."""
    full, ids = torch.zeros(8, 8), torch.tensor([0, 3])
    for new in (None, torch.tensor([1, 2])):
        if new is not None:
            ids.copy_(new)
        p = torch.randn(2, 4, 4)
        row = [p, torch.randn_like(p), torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())]
        want = full.clone()
        step(row, [full], [ids])
        scatter_blocks_(want, ids, row[0], 4, 4)
        assert torch.equal(full, want)
    other = torch.zeros(16, 4)  # the same numbers in a matrix of another shape
    step(row, [other], [ids])
    assert torch.equal(gather_blocks(other, ids, 4, 4), row[0])


def test_moments_of_other_strides_than_the_parameter():
    torch.manual_seed(4)
    p, g, m = torch.randn(6, 10), torch.randn(6, 10), torch.randn(6, 10)
    want, *_ = reference.adamw(p, g, m, m.square(), 1, lr=RATE, **HYPER)
    v = m.square().t().contiguous().t()
    step([p, g, m, v, torch.zeros(())])
    torch.testing.assert_close(p.double(), want, rtol=2e-6, atol=2e-7)
