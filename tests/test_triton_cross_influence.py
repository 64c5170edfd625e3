"""The fused and the Gram kernel against float64 definitions, interpreted or on a GPU.

The interpreter is switched on when Triton itself is imported, so without a GPU these tests run in
a process of their own, which the first test starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad_kernels import reference
from fastgrad_kernels.configs import Tile

fused = pytest.importorskip("fastgrad_kernels.cross_influence")
gram = pytest.importorskip("fastgrad_kernels.gram")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="run by test_in_the_interpreter in its own process"
)

EPS = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Interpreted programs cost half a millisecond each: small tiles need small matrices for an edge.
SMALL = Tile(16, 16, 16, 1, 1, group=2)
TILES = [
    SMALL,
    Tile(32, 16, 16, 4, 2, group=1),
    Tile(16, 32, 32, 4, 2, group=3),
    Tile(16, 32, 16, 4, 2, group=2, total="memory"),
]
if DEVICE == "cuda":
    TILES.append(None)  # the default, too large to interpret


@pytest.mark.skipif(INTERPRETED, reason="already there")
def test_in_the_interpreter():
    run_interpreted(__file__)


def run_interpreted(path, *options):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", path, "-p", "no:cacheprovider", *options],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def poisoned(x):
    """The same matrix as a view into a larger one whose every other entry is NaN: whatever the
    kernel reads and does not mask shows."""
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


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int64)


def make(lengths, rows, cols, dtype, n_dir=0, seed=0):
    torch.manual_seed(seed)
    tokens = sum(lengths)
    left, right = torch.randn(tokens, rows).to(dtype), torch.randn(tokens, cols).to(dtype)
    return left, right, offsets_of(lengths), torch.randn(n_dir, rows, cols) if n_dir else None


def check_fused(got, left, right, offsets, br, bc, directions, want_grad):
    """Within the bounds of float32 accumulation: a sum of L products p_l is off by at most
    L·eps·Σ|p_l| (L + 8 covers the conversions), whatever the order."""
    grad, sq, dots = (x.cpu().double() for x in got)
    want, want_sq, want_dots = reference.cross_influence(left, right, offsets, br, bc, directions)
    rows, cols, n = left.shape[1], right.shape[1], offsets.numel() - 1
    size = left.double().abs().T @ right.double().abs()
    if want_grad:
        assert ((grad - want).abs() <= (left.shape[0] + n + 8) * EPS * size).all()
    else:
        assert grad.numel() == 0
    assert sq.shape == want_sq.shape
    assert dots.shape == want_dots.shape
    blocks = reference.blocks_of(rows, cols, br, bc)
    for j, (a, b) in enumerate(pairwise(offsets.tolist())):
        part = left[a:b].double().T @ right[a:b].double()
        error = (b - a + 8) * EPS * (left[a:b].double().abs().T @ right[a:b].double().abs())
        for i, block in enumerate(blocks):
            e, p = error[block], part[block]
            bound = (2 * p.abs() * e + e * e).sum() + (p.numel() + 8) * EPS * want_sq[i, j]
            assert abs(sq[i, j] - want_sq[i, j]) <= bound, (i, j)
        for d in range(dots.shape[0]):
            v = directions[d].double().abs()
            bound = (error * v).sum() + (part.numel() + 8) * EPS * (part.abs() * v).sum()
            assert abs(dots[d, j] - want_dots[d, j]) <= bound, (d, j)


def launch(left, right, offsets, br, bc, directions=None, want_grad=True, **options):
    return fused.launch_fused(
        poisoned(left),
        poisoned(right),
        offsets.to(DEVICE),
        br,
        bc,
        None if directions is None else directions.to(DEVICE),
        want_grad,
        **options,
    )


CASES = [
    ([5, 0, 18, 1], 37, 21, (37, 21)),  # ragged, one without tokens, one token; odd sizes
    ([16, 32], 32, 32, (16, 16)),  # exact multiples of every tile size
    ([0, 7, 0], 17, 33, (16, 32)),
    ([1], 1, 1, (1, 1)),
    ([3, 9], 20, 35, (1, 35)),  # rows
    ([3, 9], 35, 20, (35, 1)),  # columns
    ([11, 6], 24, 40, (8, 20)),
    ([4, 4], 9, 10, (64, 64)),  # a block larger than the matrix
    ([0, 0], 5, 6, (5, 6)),
]


@runs_kernels
@pytest.mark.parametrize(
    ("lengths", "rows", "cols", "block", "dtype"),
    [(*case, torch.float32) for case in CASES]
    + [(*case, dtype) for case in CASES[::2] for dtype in DTYPES[1:]],
    ids=str,
)
def test_fused(lengths, rows, cols, block, dtype, nan_buffers):
    left, right, offsets, directions = make(lengths, rows, cols, dtype, n_dir=1)
    got = launch(left, right, offsets, *block, directions, tile=SMALL)
    check_fused(got, left, right, offsets, *block, directions, True)
    again = launch(left, right, offsets, *block, directions, tile=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@runs_kernels
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("splits", [2, 5])
def test_splits_over_examples(tile, splits, nan_buffers):
    """Whole examples per program, partial gradients added in order; more splits than examples
    with tokens leave some programs without work."""
    left, right, offsets, _ = make([9, 0, 20, 3, 0], 36, 34, torch.float32)
    got = launch(left, right, offsets, 8, 34, tile=tile, splits=splits)
    check_fused(got, left, right, offsets, 8, 34, None, True)
    again = launch(left, right, offsets, 8, 34, tile=tile, splits=splits)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@runs_kernels
def test_the_sums_do_not_depend_on_the_splits(nan_buffers):
    left, right, offsets, directions = make([9, 4, 20, 3], 33, 18, torch.bfloat16, n_dir=1)
    once = launch(left, right, offsets, 33, 18, directions, tile=SMALL, splits=1)
    many = launch(left, right, offsets, 33, 18, directions, tile=SMALL, splits=4)
    assert torch.equal(once[1], many[1])
    assert torch.equal(once[2], many[2])


@runs_kernels
def test_norms_alone_and_more_directions_than_one_launch_takes(nan_buffers):
    left, right, offsets, directions = make(
        [5, 2], 18, 20, torch.float32, n_dir=fused.MAX_DIRECTIONS[False] + 3
    )
    got = launch(left, right, offsets, 18, 20, directions, False, tile=SMALL)
    check_fused(got, left, right, offsets, 18, 20, directions, False)
    got = launch(left, right, offsets, 18, 20, directions, True, tile=SMALL)
    check_fused(got, left, right, offsets, 18, 20, directions, True)


@runs_kernels
def test_a_broken_example_stays_alone(nan_buffers):
    """NaN in one example must not reach the sums of its neighbours through a masked product."""
    left, right, offsets, _ = make([5, 6, 7], 20, 20, torch.float32)
    clean = launch(left, right, offsets, 16, 16, tile=SMALL)[1]
    left[5:11] = float("nan")
    right[5:11] = float("inf")
    sq = launch(left, right, offsets, 16, 16, tile=SMALL)[1]
    assert sq[:, 1].isnan().all()
    assert torch.equal(sq[:, [0, 2]], clean[:, [0, 2]])


@runs_kernels
@pytest.mark.parametrize("splits", [1, 2])
def test_adds_to_an_existing_gradient(splits, nan_buffers):
    left, right, offsets, _ = make([5, 6, 7], 20, 19, torch.float32)
    into = torch.full((20, 19), 3.0, device=DEVICE)
    grad, _, _ = launch(left, right, offsets, 20, 19, tile=SMALL, splits=splits, into=into)
    assert grad.data_ptr() == into.data_ptr()
    want = reference.cross_influence(left, right, offsets, 20, 19)[0] + 3
    size = left.double().abs().T @ right.double().abs() + 3
    assert ((into.cpu().double() - want).abs() <= 30 * EPS * size).all()


@runs_kernels
def test_strides_and_transposed_factors(nan_buffers):
    left, right, offsets, _ = make([5, 6], 20, 19, torch.float32)
    plain = launch(left, right, offsets, 20, 19, tile=SMALL)
    turned = fused.launch_fused(
        left.T.contiguous().T.to(DEVICE),  # unit stride along tokens: copied
        right.repeat_interleave(2, 0).to(DEVICE)[::2],
        offsets.to(DEVICE),
        20,
        19,
        None,
        True,
        tile=SMALL,
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, turned, strict=True))


@runs_kernels
def test_more_than_two_to_the_31_elements(tmp_path, nan_buffers):
    """Token offsets beyond 32 bits, on factors that lie in a sparse file: rows far apart."""
    left, right, offsets, _ = make([20, 25], 17, 18, torch.float16)
    stride = 1 << 26
    path = tmp_path / "sparse"
    with open(path, "wb") as f:
        f.truncate(2 * 45 * stride)
    far = torch.from_file(str(path), shared=True, size=45 * stride, dtype=torch.float16)
    assert far.numel() > 2**31
    far = far.view(45, stride)
    far[:, :17], far[:, 100:118] = left, right
    args = far[:, :17].to(DEVICE), far[:, 100:118].to(DEVICE), offsets.to(DEVICE)
    got = fused.launch_fused(*args, 17, 18, None, True, tile=SMALL)
    check_fused(got, left, right, offsets, 17, 18, None, True)
    check_gram(gram.gram_norms(*args, tile=SMALL), left, right, offsets)


@runs_kernels
@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.integers(0, 20), min_size=1, max_size=5),
    st.sampled_from([1, 2, 4, 7, 8, 16, 24, 48]),
    st.sampled_from([1, 2, 4, 7, 8, 16, 24, 48]),
    st.sampled_from(DTYPES),
    st.sampled_from(TILES),
    st.booleans(),
    st.integers(0, 2),
    st.integers(1, 3),
)
def test_fused_on_any_shape(rows, cols, lengths, br, bc, dtype, tile, want_grad, n_dir, splits):
    left, right, offsets, directions = make(lengths, rows, cols, dtype, n_dir)
    if fused.unsupported(left, right, br, bc, tile) is not None:
        with pytest.raises(ValueError, match="share no pieces"):
            launch(left, right, offsets, br, bc, tile=tile)
        return
    got = launch(left, right, offsets, br, bc, directions, want_grad, tile=tile, splits=splits)
    check_fused(got, left, right, offsets, br, bc, directions, want_grad)


def check_gram(got, left, right, offsets):
    n_values = left.shape[1] + right.shape[1] + 8
    left, right = left.double(), right.double()
    for j, (a, b) in enumerate(pairwise(offsets.tolist())):
        want = (left[a:b].T @ right[a:b]).square().sum()
        size = (left[a:b].abs() @ left[a:b].abs().T) * (right[a:b].abs() @ right[a:b].abs().T)
        assert abs(got[j].cpu().double() - want) <= (n_values + (b - a) ** 2) * EPS * size.sum()


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("programs", [1, 3, None])
def test_gram(dtype, programs, nan_buffers):
    left, right, offsets, _ = make([5, 0, 40, 1, 16, 33], 37, 21, dtype)
    args = (poisoned(left), poisoned(right), offsets.to(DEVICE))
    got = gram.gram_norms(*args, tile=SMALL, programs=programs)
    check_gram(got, left, right, offsets)
    assert torch.equal(got, gram.gram_norms(*args, tile=SMALL, programs=programs))
    assert got[1] == 0


@runs_kernels
def test_gram_finds_every_pair_of_blocks(nan_buffers):
    """Many blocks per example: each pair of the triangle must be met exactly once."""
    left, right, offsets, _ = make([16 * 9 + 3], 3, 2, torch.float32)
    check_gram(
        gram.gram_norms(left.to(DEVICE), right.to(DEVICE), offsets, tile=SMALL, programs=7),
        left,
        right,
        offsets,
    )


@runs_kernels
def test_the_whole_operator(nan_buffers, monkeypatch):
    """Both forms through the function that the op calls, boundaries as plain numbers too."""
    left, right, offsets, _ = make([5, 2, 9], 18, 20, torch.bfloat16)
    for choice in (True, False):
        monkeypatch.setattr(gram, "prefer_gram", lambda *a, choice=choice: choice)
        for bounds in (offsets, offsets.tolist()):
            for want_grad in (True, False):
                grad, sq, dots = fused.cross_influence(
                    left.to(DEVICE), right.to(DEVICE), bounds, 18, 20, None, want_grad
                )
                want, want_sq, _ = reference.cross_influence(left, right, offsets, 18, 20)
                assert dots.shape == (0, 3)
                torch.testing.assert_close(sq.cpu().double(), want_sq, rtol=1e-5, atol=1e-4)
                assert grad.dtype == torch.float32
                if want_grad:
                    torch.testing.assert_close(grad.cpu().double(), want, rtol=1e-5, atol=1e-5)


def test_empty_shapes_need_no_launch():
    none = torch.zeros(0, 4)
    for args in (
        (none, none, offsets_of([]), 16, 16),
        (torch.zeros(3, 0), torch.zeros(3, 4), offsets_of([3]), 16, 16),
    ):
        grad, sq, dots = fused.launch_fused(*args, None, True)
        want, want_sq, want_dots = reference.cross_influence(*args)
        assert grad.shape == want.shape
        assert sq.shape == want_sq.shape
        assert dots.shape == want_dots.shape
        assert not grad.any()


@pytest.mark.parametrize(
    ("left", "block", "options", "message"),
    [
        (torch.zeros(4, 8).double(), (8, 8), {}, "accumulates in float32"),
        (torch.zeros(4, 300), (3, 5), {}, "share no pieces larger than 1x1"),
        (torch.zeros(4, 8), (8, 8), {"into": torch.zeros(8, 7)}, "cannot add to"),
        (torch.zeros(4, 8), (8, 8), {"into": torch.zeros(8, 8).half()}, "cannot add to"),
        (torch.empty(4, 2**31, device="meta"), (2**31, 8), {}, "2\\^31"),
    ],
)
def test_refused_by_name(left, block, options, message):
    right = torch.zeros(4, 8, dtype=left.dtype, device=left.device)
    with pytest.raises(ValueError, match=message):
        fused.launch_fused(left, right, offsets_of([4]), *block, None, True, **options)


def test_form_is_chosen_by_shape():
    """The Gram form's extra work grows with T (R + C), the fused form's with R C / T."""
    bf16, h200 = torch.bfloat16, "sm_90"

    def gram_wins(width, examples, length, want_grad):
        tokens = examples * length
        return gram.prefer_gram(width, width, examples, tokens, want_grad, bf16, h200)

    assert gram_wins(4096, 64, 128, True)
    assert not gram_wins(4096, 8, 2048, True)
    assert not gram_wins(768, 8, 1024, True)
    assert gram_wins(4096, 8, 512, False)  # frozen weight: the fused form's product is extra
    assert not gram_wins(512, 8, 2048, False)
    assert not gram.prefer_gram(64, 64, 0, 0, True, bf16, h200)
    # Longer examples never bring the Gram form back, and it always comes at some length.
    wins = [gram_wins(4096, 8, 2**k, True) for k in range(4, 14)]
    assert wins == sorted(wins, reverse=True)
    assert wins[0]
    assert not wins[-1]


def test_tf32_only_where_it_was_asked_for():
    assert gram.precision(torch.float32) == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert gram.precision(torch.float32) == "tf32"
        assert gram.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    assert gram.precision(torch.float32) == "ieee"


def test_sub_blocks_make_up_blocks_and_tiles_exactly():
    tile = Tile(128, 128, 64, 8, 4)
    for br, bc in ((128, 128), (256, 64), (1, 999), (999, 1), (48, 96), (1000, 1000)):
        sub_r, sub_c = fused.sub_block(tile, 999, 999, br, bc)
        assert tile.rows % sub_r == tile.cols % sub_c == 0
        assert br >= 999 or br % sub_r == 0
        assert bc >= 999 or bc % sub_c == 0


def test_split_bounds_share_out_the_tokens():
    offsets = offsets_of([10, 0, 10, 10, 10, 0])
    assert fused._split_bounds(offsets, 40, 1).tolist() == [0, 6]
    assert fused._split_bounds(offsets, 40, 2).tolist() == [0, 3, 6]
    assert fused._split_bounds(offsets_of([0, 0]), 0, 2).tolist() == [0, 0, 2]
    bounds = fused._split_bounds(offsets_of([100, 1, 1, 1]), 103, 3).tolist()
    assert bounds == sorted(bounds)
    assert bounds[0] == 0
    assert bounds[-1] == 4
