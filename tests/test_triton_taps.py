"""Norm-layer and embedding kernels: interpreted against float64, and what the compiler makes."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad_kernels import compile_check, reference
from fastgrad_kernels.embedding import EmbeddingConfig, embedding_influence
from fastgrad_kernels.norm_taps import NormConfig, norm_taps

# The flag is read when a kernel is decorated: without a GPU, the tests of TestKernels run in a
# process of their own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
NORM = NormConfig(tokens=2, cols=16)
EMBEDDING = EmbeddingConfig(tokens=2, cols=8, segments=4)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 2.0**-24

lengths_ = st.lists(st.integers(0, 7), min_size=1, max_size=4)


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int64)


@pytest.fixture
def nan_buffers(monkeypatch):
    """Fresh buffers are NaN, so that an entry no program wrote shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def close(actual, expected, terms, scale):
    """Error of adding ``terms`` products in float32, relative to the size of the sum's parts."""
    assert actual.shape == expected.shape
    worst = (actual.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert worst <= 8 * EPS * max(terms, 1) ** 0.5 * max(scale, 1e-30)


def check_norm(lengths, d, x_dtype, g_dtype, layer, config, seed):
    torch.manual_seed(seed)
    tokens, offsets = sum(lengths), offsets_of(lengths)
    x, g = torch.randn(tokens, d).to(x_dtype), torch.randn(tokens, d).to(g_dtype)
    rstd, mean = torch.rand(tokens) + 0.5, torch.randn(tokens) if layer else None
    weight, bias = norm_taps(x, g, rstd, offsets, mean, layer, config)
    centred = x.double() - (mean.double()[:, None] if mean is not None else 0)
    product = g.double() * centred * rstd.double()[:, None]
    bounds = list(pairwise(offsets.tolist()))
    zero = torch.zeros(0, d, dtype=torch.float64)
    close(weight, torch.stack([product[a:b].sum(0) for a, b in bounds]), tokens, 30.0)
    want_bias = torch.stack([g[a:b].double().sum(0) for a, b in bounds]) if layer else zero
    close(bias, want_bias, tokens, 10.0)
    again = norm_taps(x, g, rstd, offsets, mean, layer, config)
    assert torch.equal(again[0], weight)
    assert torch.equal(again[1], bias)


def check_embedding(rows, cols, lengths, br, bc, dtype, n_dir, config, seed):
    torch.manual_seed(seed)
    tokens, offsets = sum(lengths), offsets_of(lengths)
    ids, g = torch.randint(0, rows, (tokens,)), torch.randn(tokens, cols).to(dtype)
    directions = torch.randn(n_dir, rows, cols) if n_dir else None
    sq, dots = embedding_influence(ids, g, offsets, rows, br, bc, directions, config)
    _, want, want_dots = reference.embedding_influence(
        ids, g.double(), offsets, rows, br, bc, directions
    )
    scale = float(g.double().norm() ** 2)
    close(sq, want, tokens * cols, scale * max(tokens, 1))
    close(dots, want_dots, tokens * cols, scale * 10)
    again = embedding_influence(ids, g, offsets, rows, br, bc, directions, config)
    assert torch.equal(again[0], sq)
    assert torch.equal(again[1], dots)
    return sq


class TestKernels:
    __test__ = INTERPRETED or DEVICE == "cuda"

    @pytest.fixture(autouse=True)
    def _device(self):
        with torch.device(DEVICE):
            yield

    @settings(max_examples=8, deadline=None)
    @given(
        lengths_,
        st.integers(1, 40),
        st.sampled_from(DTYPES),
        st.sampled_from(DTYPES),
        st.booleans(),
        st.integers(0, 99),
    )
    def test_norm_taps(self, lengths, d, x_dtype, g_dtype, layer, seed):
        check_norm(lengths, d, x_dtype, g_dtype, layer, NORM, seed)

    @pytest.mark.usefixtures("nan_buffers")
    def test_norm_taps_write_everything(self):
        for lengths, d in (([0, 3, 0], 17), ([0], 16), ([1], 1), ([40, 5], 130)):
            check_norm(lengths, d, torch.bfloat16, torch.bfloat16, True, NormConfig(), 0)

    def test_norm_taps_equal_autograd(self):
        torch.manual_seed(0)
        layer = torch.nn.LayerNorm(24)
        x, g = torch.randn(9, 24), torch.randn(9, 24)
        out, mean, rstd = torch.native_layer_norm(x, [24], layer.weight, layer.bias, layer.eps)
        weight, bias = norm_taps(
            x, g, rstd.flatten().contiguous(), offsets_of([4, 5]), mean.flatten(), True, NORM
        )
        out.backward(g)
        torch.testing.assert_close(weight.sum(0), layer.weight.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias.sum(0), layer.bias.grad, rtol=1e-5, atol=1e-5)

    @settings(max_examples=8, deadline=None)
    @given(
        st.integers(1, 12),
        st.integers(1, 20),
        lengths_,
        st.integers(1, 14),
        st.integers(1, 24),
        st.sampled_from(DTYPES),
        st.integers(0, 2),
        st.integers(0, 99),
    )
    def test_embedding(self, rows, cols, lengths, br, bc, dtype, n_dir, seed):
        check_embedding(rows, cols, lengths, br, bc, dtype, n_dir, EMBEDDING, seed)

    @pytest.mark.usefixtures("nan_buffers")
    def test_embedding_writes_everything(self):
        default = EmbeddingConfig()
        check_embedding(3, 600, [30, 0, 9], 3, 600, torch.bfloat16, 1, default, 0)
        check_embedding(50, 16, [5, 4], 1, 16, torch.float32, 0, default, 1)
        check_embedding(5, 8, [0, 0], 2, 4, torch.float32, 2, default, 2)
        check_embedding(5, 8, [1], 9, 9, torch.float16, 0, default, 3)

    def test_repeated_tokens_add_before_squaring(self):
        ids, g = torch.tensor([2, 2, 2, 2]), torch.ones(4, 3)
        sq, _ = embedding_influence(ids, g, offsets_of([3, 1]), 4, 4, 3, None, EMBEDDING)
        assert sq.tolist() == [[27.0, 3.0]]

    def test_damage_stays_in_its_example_and_block(self):
        ids, g = torch.tensor([0, 1, 2, 0]), torch.ones(4, 8)
        g[1, 5] = float("nan")
        sq, _ = embedding_influence(ids, g, offsets_of([2, 2]), 3, 1, 4, None, EMBEDDING)
        assert sq.isnan().nonzero().tolist() == [[3, 0]]
        g[1, 5] = float("inf")
        weight, _ = norm_taps(g, g, torch.ones(4), offsets_of([2, 2]), config=NORM)
        assert (~weight.isfinite()).nonzero().tolist() == [[0, 5]]


@pytest.mark.skipif(INTERPRETED, reason="this is what runs the others")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "TestKernels"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(4, 3)}, "matrices of one shape"),
        ({"x": torch.ones(4, 2).double()}, "x is torch.float64"),
        ({"grad_out": torch.ones(2, 4).T}, "grad_out is not contiguous"),
        ({"rstd": torch.ones(3)}, r"rstd must be contiguous float32 \[4\]"),
        ({"mean": torch.ones(4).half()}, "mean must be"),
        ({"offsets": torch.tensor([0, 4], dtype=torch.int32)}, "offsets must be"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "offsets must be"),
        ({"rstd": torch.ones(4, device="meta")}, "one device"),
    ],
)
def test_norm_taps_refuse(changes, message):
    args = {"x": torch.ones(4, 2), "grad_out": torch.ones(4, 2), "rstd": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        norm_taps(**{**args, "offsets": torch.tensor([0, 4]), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_out": torch.ones(2, 3).double()}, "torch.float64"),
        ({"grad_out": torch.ones(3, 3)}, "ids, grad_out"),
        ({"ids": torch.tensor([0, 1], dtype=torch.int32)}, "ids must be int64"),
        ({"block_cols": 0}, "is empty"),
        ({"directions": torch.ones(1, 5, 4)}, "directions"),
        ({"ids": torch.zeros(2, dtype=torch.int64, device="meta")}, "ids on meta"),
    ],
)
def test_embedding_refuses(changes, message):
    args = {
        "ids": torch.tensor([0, 1]),
        "grad_out": torch.ones(2, 3),
        "offsets": torch.tensor([0, 2]),
        "num_rows": 5,
        "block_rows": 1,
        "block_cols": 3,
        "directions": None,
    }
    with pytest.raises(ValueError, match=message):
        embedding_influence(**args | changes)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no need of a GPU")
def test_a_compiled_kernel_refuses_the_cpu():
    with pytest.raises(ValueError, match="need a GPU"):
        norm_taps(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="need a GPU"):
        embedding_influence(
            torch.tensor([0]), torch.ones(1, 1), torch.tensor([0, 1]), 1, 1, 1, None
        )


@pytest.mark.parametrize(
    "targets",
    [("cuda:90",), pytest.param(("cuda:80", "cuda:100", "hip:gfx942"), marks=pytest.mark.slow)],
    ids=["default", "others"],
)
def test_compiles_without_spills_and_with_wide_loads(targets):
    facts = compile_check.check(["norm_taps", "embedding"], targets)
    assert len(facts) == 9 * len(targets)
    for f in facts:
        assert f.stack == 0, f
        assert f.fits, f
        if f.target.startswith("cuda") and f.name != "embedding/sums":
            assert f.wide_loads > 0, f
