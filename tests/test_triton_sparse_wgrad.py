"""The sparse weight gradient's kernel against its float64 definition, interpreted or on a GPU.

Without a GPU the tests run in a process of their own, as in test_triton_cross_influence.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad_kernels import reference
from fastgrad_kernels.configs import Tile

sparse = pytest.importorskip("fastgrad_kernels.sparse_wgrad")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="run by test_in_the_interpreter in its own process"
)

EPS = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Tile(16, 16, 16, 1, 1, group=2)


@pytest.mark.skipif(INTERPRETED, reason="already there")
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def poisoned(x):
    """A view into a larger matrix of NaN: whatever is read and not masked shows."""
    rows, cols = x.shape
    buffer = torch.full((rows + 5, cols + 7), float("nan"), dtype=x.dtype, device=DEVICE)
    buffer[2 : rows + 2, 3 : cols + 3] = x
    return buffer[2 : rows + 2, 3 : cols + 3]


@pytest.fixture
def nan_buffers(monkeypatch):
    """Fresh buffers are NaN, so that an entry no program wrote shows."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        fresh = plain(self, *args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def check(tokens, rows, cols, br, bc, dtype, seed=0, **options):
    """Against the definition, within the bound of float32 accumulation in any order."""
    torch.manual_seed(seed)
    left, right = torch.randn(tokens, rows).to(dtype), torch.randn(tokens, cols).to(dtype)
    count = -(-rows // br) * -(-cols // bc)
    ids = torch.randperm(count)[: max(1, min(12, count // 2))]
    args = (poisoned(left), poisoned(right), ids.to(DEVICE), br, bc)
    got = sparse.sparse_wgrad(*args, tile=SMALL, **options)
    want = reference.sparse_wgrad(left, right, ids, br, bc)
    bound = reference.sparse_wgrad(left.abs(), right.abs(), ids, br, bc) * (tokens + 8) * EPS
    assert got.shape == want.shape
    assert got.is_contiguous()
    assert ((got.cpu().double() - want).abs() <= bound).all()
    assert torch.equal(got, sparse.sparse_wgrad(*args, tile=SMALL, **options))
    into = torch.full_like(got, 3.0)
    added = sparse.sparse_wgrad(*args, tile=SMALL, into=into, **options)
    assert added.data_ptr() == into.data_ptr()
    assert (
        (into.cpu().double() - want - 3).abs() <= bound + 3 * 3 * EPS + 2 * EPS * want.abs()
    ).all()


SHAPES = [
    (16, 16),  # tiles
    (8, 4),
    (3, 5),
    (1, 37),  # rows, gathered
    (1, 50),  # rows, padded beyond the matrix
    (2, 37),
    (17, 37),  # tall stripes
    (45, 1),  # columns, gathered
    (60, 1),
    (45, 3),
    (45, 18),
    (45, 37),  # all of it
    (64, 64),
    (40, 20),  # several tiles per block, edges
    (1, 1),
]


@runs_kernels
@pytest.mark.parametrize(
    ("block", "dtype"),
    [(block, torch.float32) for block in SHAPES]
    + [(block, dtype) for block in SHAPES[::4] for dtype in DTYPES[1:]],
    ids=str,
)
def test_against_the_definition(block, dtype, nan_buffers):
    check(21, 45, 37, *block, dtype)


@runs_kernels
@pytest.mark.parametrize("tokens", [0, 1, 16, 47])
@pytest.mark.parametrize("splits", [1, 3])
def test_splits_over_tokens(tokens, splits, nan_buffers):
    check(tokens, 20, 35, 16, 16, torch.float32, splits=splits)
    check(tokens, 20, 35, 1, 35, torch.bfloat16, splits=splits)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_experts(splits, dtype, nan_buffers):
    """Loads from nothing to many chunks; a NaN in one expert's tokens stays with that expert."""
    torch.manual_seed(0)
    lengths = [40, 0, 1, 17, 16]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    left = torch.randn(sum(lengths), 21).to(dtype)
    right = torch.randn(sum(lengths), 35).to(dtype)
    left[41] = torch.nan  # expert 3 (and none before it)
    ids = torch.tensor([4, 1, 0, 2])
    args = [t.to(DEVICE) for t in (left, right, offsets, ids)]
    got = sparse.expert_wgrad(*args, tile=SMALL, splits=splits)
    want = reference.expert_wgrad(left, right, offsets, ids)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got, sparse.expert_wgrad(*args, tile=SMALL, splits=splits))


@runs_kernels
@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 48),
    st.integers(1, 48),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_on_any_shape(tokens, rows, cols, br, bc, dtype, seed):
    check(tokens, rows, cols, br, bc, dtype, seed)


@runs_kernels
def test_a_broken_row_stays_alone(nan_buffers):
    left, right = torch.ones(9, 20), torch.ones(9, 20)
    left[4, 3] = float("nan")
    ids = torch.arange(20).to(DEVICE)
    rows = sparse.sparse_wgrad(left.to(DEVICE), right.to(DEVICE), ids, 1, 20, tile=SMALL)
    assert rows.isnan().flatten(1).all(1).tolist() == [i == 3 for i in range(20)]
    assert (rows[4:] == 9).all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"left": torch.zeros(3, 4).double(), "right": torch.zeros(3, 4).double()}, "float32"),
        ({"into": torch.zeros(1, 2, 3)}, "cannot add to"),
        ({"into": torch.zeros(1, 2, 2).double()}, "cannot add to"),
        (
            {
                "left": torch.empty(3, 2**31 - 8, device="meta"),
                "right": torch.empty(3, 4, device="meta"),
            },
            "2\\^31",
        ),
    ],
)
def test_refused_by_name(args, message):
    plain = {"left": torch.zeros(3, 4), "right": torch.zeros(3, 4), "ids": torch.zeros(1).long()}
    with pytest.raises(ValueError, match=message):
        sparse.sparse_wgrad(**(plain | args), block_rows=2, block_cols=2)


def test_nothing_selected_needs_no_launch():
    empty = sparse.sparse_wgrad(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(0).long(), 2, 2)
    assert empty.shape == (0, 2, 2)


def test_token_splits_fill_waves():
    # 205 tiles on 132 units: two waves; three programs per tile need 5/3 of one.
    assert sparse.token_splits(205, 100e-6, 1e-6, 132, 16) in (3, 5, 7)
    assert sparse.token_splits(132, 100e-6, 1e-6, 132, 16) == 1  # already a full wave
    assert sparse.token_splits(8, 100e-6, 1e-6, 132, 16) >= 8
    assert sparse.token_splits(8, 100e-6, 1e-6, 132, 0) == 1  # too few tokens to share
    assert sparse.token_splits(205, 1e-6, 50e-6, 132, 16) == 1  # copies would cost more
