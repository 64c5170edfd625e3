"""grad_stats: the table, the arithmetic in Triton's interpreter, what the compiler makes of it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad_kernels import compile_check, grad_stats, reference
from fastgrad_kernels.grad_stats import StatsConfig, TensorTable, _chunks_of
from fastgrad_kernels.layout import matrix_view

# The flag is read when a kernel is decorated: without a GPU, the tests of TestKernels run in a
# process of their own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
SMALL = StatsConfig(chunk=64, rows=2, unroll=2, reduce=4)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run_interpreted(file):
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run([*command, "-k", "TestKernels"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


def same_as_definition(tensors, grids, config=SMALL):
    got = grad_stats.grad_stats(tensors, grids, config=config)
    for i, (t, grid) in enumerate(zip(tensors, grids, strict=True)):
        if t.numel() == 0:
            assert got.of(i).shape == (4, 0)
            assert (got.tensors[:, i] == 0).all()
            continue
        m = matrix_view(t)
        # Each of at most n terms is added in float32: relative error below sqrt(n) roundings.
        exact = {"rtol": 4 * 2.0**-24 * t.numel() ** 0.5, "atol": 0.0}
        want = reference.block_stats(m, *(grid or m.shape))
        torch.testing.assert_close(got.of(i).double(), want, **exact)
        torch.testing.assert_close(
            got.tensors[:, i : i + 1].double(), reference.block_stats(m, *m.shape), **exact
        )
    again = grad_stats.grad_stats(tensors, grids, config=config)
    assert torch.equal(got.blocks, again.blocks)
    assert torch.equal(got.tensors, again.tensors)
    return got


class TestKernels:
    __test__ = INTERPRETED or DEVICE == "cuda"

    @pytest.fixture(autouse=True)
    def _device(self):
        with torch.device(DEVICE):
            yield

    def test_a_list_of_everything(self, monkeypatch):
        """Mixed shapes and dtypes, an empty tensor, a scalar, an unaligned view, damage."""
        torch.manual_seed(0)
        tensors = [
            torch.randn(7, 33).bfloat16(),
            torch.randn(5),
            torch.randn(0, 4),
            torch.randn(3, 32, 4).half(),
            torch.randn(130)[1:],
            torch.randn(9, 64),
            torch.randn(()),
            torch.randn(64, 4),
        ]
        tensors[0][3, 3], tensors[5][3, 3] = float("nan"), float("-inf")
        tensors[5][8, 60:] = float("nan")
        grids = [(2, 8), None, None, (1, 999), None, (4, 32), None, (64, 1)]
        empty = torch.empty
        monkeypatch.setattr(  # whatever is not written shows
            torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan"))
        )
        got = same_as_definition(tensors, grids)
        assert got.tensors[3].tolist() == [1, 0, 0, 0, 0, 5, 0, 0]

    @settings(max_examples=8, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.integers(1, 12),
                st.integers(1, 40),
                st.one_of(st.none(), st.tuples(st.integers(1, 8), st.integers(1, 40))),
                st.sampled_from(DTYPES),
                st.booleans(),
            ),
            min_size=1,
            max_size=2,
        ),
        st.integers(0, 99),
    )
    def test_any_list(self, specs, seed):
        torch.manual_seed(seed)
        tensors, grids = [], []
        for rows, cols, grid, dtype, damaged in specs:
            t = torch.randn(rows, cols).to(dtype)
            if damaged:
                t.view(-1)[torch.randint(t.numel(), (2,))] = torch.tensor(
                    [float("nan"), float("inf")], dtype=dtype
                )
            tensors.append(t)
            grids.append(grid)
        same_as_definition(tensors, grids, StatsConfig(chunk=128, rows=2, unroll=2, reduce=4))

    def test_the_shipped_sizes(self):
        torch.manual_seed(1)
        same_as_definition(
            [torch.randn(70000), torch.randn(40, 256).bfloat16()],
            [None, (16, 128)],
            grad_stats.CUDA,
        )

    def test_missing_and_moved_gradients(self):
        shapes = [(4, 8), (20,)]
        g = [torch.randn(s) for s in shapes]
        one = grad_stats.grad_stats([None, g[1]], shapes=shapes, config=SMALL)
        assert one.tensors[:, 0].tolist() == [0, 0, 0, 0]
        g2 = [(2 * x).half() for x in g]  # the same table serves another dtype and address
        two = grad_stats.grad_stats(g2, shapes=shapes, config=SMALL)
        for i, x in enumerate(g2):
            want = reference.block_stats(matrix_view(x), 99, 99)
            torch.testing.assert_close(two.of(i).double(), want, rtol=1e-6, atol=0)

    def test_sums_beyond_float32_are_infinite_and_the_maximum_is_not(self):
        x = torch.full((64,), 1e30)
        got = grad_stats.grad_stats([x], config=SMALL).tensors[:, 0]
        assert got[0] == float("inf")
        assert got[1:].tolist() == pytest.approx([6.4e31, 1e30, 0])

    def test_nothing_at_all(self):
        assert grad_stats.grad_stats([]).tensors.shape == (4, 0)


@pytest.mark.skipif(INTERPRETED, reason="this is what runs the others")
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.parametrize("config", [SMALL, StatsConfig(chunk=16), grad_stats.CUDA])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (40, 16), (3, 300), (129, 1)])
@pytest.mark.parametrize("grid", [None, (1, 999), (999, 1), (2, 8), (16, 16), (5, 7)])
def test_chunks_cover_each_block_once_and_in_order(shape, grid, config):
    chunks, counts = _chunks_of(*shape, grid, config.chunk)
    seen = np.full(shape, -1)
    blocks = reference.blocks_of(*shape, *(grid or shape))
    assert counts.sum() == len(chunks)
    assert len(counts) == len(blocks)
    owner = np.repeat(np.arange(len(counts)), counts)
    for block, (start, n, width, stride) in zip(owner, chunks, strict=True):
        e = np.arange(n)
        at = start + e // width * stride + e % width
        assert (seen.ravel()[at] == -1).all()
        seen.ravel()[at] = block
        assert 0 < n <= config.chunk
    for b, block in enumerate(blocks):
        assert (seen[block] == b).all()


def test_more_elements_than_32_bits_count():
    chunks, counts = _chunks_of(70000, 70000, (35000, 70000), 1 << 26)
    assert chunks[-1, 0] + chunks[-1, 1] == 70000**2 > 2**32
    assert (chunks[1:, 0] == chunks[:-1, 0] + chunks[:-1, 1]).all()
    assert counts.tolist() == [37, 37]
    tiles, _ = _chunks_of(70000, 70000, (35000, 35000), 1 << 26)
    assert tiles[:, 1].sum() == 70000**2
    last = tiles[-1]
    assert last[0] + (last[1] - 1) // last[2] * last[3] + (last[1] - 1) % last[2] == 70000**2 - 1


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.ones(4, 3).T], r"tensor 0 of shape \(3, 4\) is not contiguous"),
        ([torch.ones(3), torch.ones(3, dtype=torch.float64)], "tensor 1 is torch.float64"),
        ([None], "needs shapes"),
        ([torch.ones(3), torch.ones(3, device="meta")], "tensor 1: .* on meta"),
    ],
)
def test_refused_by_name(tensors, message):
    with pytest.raises(ValueError, match=message):
        grad_stats.grad_stats(tensors)
    table = TensorTable([(3,)], [None], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"tensor 0: .*table has"):
        table.refresh([torch.ones(4)])
    with pytest.raises(ValueError, match=r"block .* is empty"):
        TensorTable([(3,)], [(0, 1)], torch.device("cpu"))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no need of a GPU")
def test_a_compiled_kernel_refuses_the_cpu():
    with pytest.raises(ValueError, match="need a GPU"):
        grad_stats.grad_stats([torch.ones(3)])


@pytest.mark.parametrize(
    "targets",
    [("cuda:90",), pytest.param(("cuda:80", "cuda:100", "hip:gfx942"), marks=pytest.mark.slow)],
    ids=["default", "others"],
)
def test_compiles_without_spills_and_with_wide_loads(targets):
    facts = compile_check.check(["grad_stats"], targets)
    assert len(facts) == 2 * len(targets)
    for f in facts:
        assert f.stack == 0, f
        assert f.fits, f
        if "chunks" in f.name:  # all of: three dtypes, two forms, four steps in flight
            assert f.wide_loads == 32, f
            assert f.registers <= 128, f
