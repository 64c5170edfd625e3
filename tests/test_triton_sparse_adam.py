"""sparse_adam: the update interpreted against float64, and what the compiler makes of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad_kernels import compile_check, reference
from fastgrad_kernels.layout import gather_blocks, scatter_blocks_
from fastgrad_kernels.sparse_adam import AdamConfig, AdamStep, Packed, adamw_

# The flag is read when a kernel is decorated: without a GPU, the tests of TestKernels run in a
# process of their own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
SMALL = AdamConfig(chunk=64, rows=2, advance=4)
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
ARGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "config": SMALL}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(param, steps=1, full=None, ids=None):
    zeros = torch.zeros(param.shape)
    return Packed(param, zeros, zeros.clone(), torch.zeros(steps), full, ids)


def state(items):
    return [t.clone() for x in items for t in (x.param, x.exp_avg, x.exp_avg_sq, x.step)]


class TestKernels:
    __test__ = INTERPRETED or DEVICE == "cuda"

    @pytest.fixture(autouse=True)
    def _device(self):
        with torch.device(DEVICE):
            yield

    def test_everything_selected_is_adamw(self):
        """20 steps over whole tensors and over a matrix packed in all of its tiles."""
        torch.manual_seed(0)
        start = [torch.randn(s) for s in ((5, 12), (3,), ())] + [torch.randn(20, 32)]
        theirs = [p.clone().requires_grad_() for p in start]
        optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        matrix, tiles = start[3].clone(), torch.arange(4)
        items = [packed(p.clone()) for p in start[:3]]
        items.append(packed(gather_blocks(matrix, tiles, 16, 16), 4, matrix, tiles))
        lr, step = torch.tensor(1e-2), None
        for _ in range(20):
            grads = [torch.randn(p.shape) for p in start]
            for t, g in zip(theirs, grads, strict=True):
                t.grad = g
            optimizer.step()
            mine = [*grads[:3], gather_blocks(grads[3], tiles, 16, 16)]
            step = step or AdamStep(items, mine, SMALL)
            step(mine, lr, (0.9, 0.95), weight_decay=0.1)
        # Each step rounds a few times and moves by about lr: errors of a few units in the last
        # place per step.
        for got, t in zip([*(x.param for x in items[:3]), matrix], theirs, strict=True):
            torch.testing.assert_close(got, t.detach(), rtol=20 * 2.0**-23, atol=20 * 2.0**-23)
        for x, t in zip(items[:3], theirs, strict=False):
            for key in ("exp_avg", "exp_avg_sq"):
                want = optimizer.state[t][key]
                torch.testing.assert_close(getattr(x, key), want, rtol=1e-5, atol=1e-6)
        assert items[3].step.tolist() == [20] * 4

    @settings(max_examples=8, deadline=None)
    @given(
        st.sampled_from([(16, 16), (5, 7), (1, 24), (20, 1), (16, 32), (99, 16)]),
        st.sampled_from(DTYPES),
        st.sampled_from(DTYPES),
        st.sampled_from(DTYPES),
        st.booleans(),
        st.booleans(),
        st.integers(0, 99),
    )
    def test_packed_blocks_by_definition(self, block, p, g, f, per_block, maximize, seed):
        torch.manual_seed(seed)
        full = torch.randn(20, 24).to(f)
        before, blocks = full.clone(), reference.blocks_of(20, 24, *block)
        ids = torch.randperm(len(blocks))[: max(1, len(blocks) // 2)]
        ids = ids[:3]
        inside = gather_blocks(torch.ones(20, 24), ids, *block)
        item = packed(
            gather_blocks(full, ids, *block).to(p), len(ids) if per_block else 1, full, ids
        )
        item.step.copy_(torch.arange(item.step.numel()) + 2.0)  # blocks selected at other times
        item.exp_avg.copy_(torch.randn(item.param.shape) * inside)
        item.exp_avg_sq.copy_(torch.rand(item.param.shape) * inside)
        grad = (torch.randn(item.param.shape) * inside).to(g)
        counts = [int(s) + 1 for s in item.step.expand(len(ids)).tolist()]
        want = [
            reference.adamw(
                item.param[b], grad[b] / 4, item.exp_avg[b], item.exp_avg_sq[b], step,
                maximize=maximize, **HYPER,
            )
            for b, step in enumerate(counts)
        ]  # fmt: skip
        scale = torch.tensor([4.0])
        adamw_([item], [grad], torch.tensor([1e-2]), grad_scale=scale, maximize=maximize, **ARGS)
        wp, wm, wv = (torch.stack(part) for part in zip(*want, strict=True))
        eps = torch.finfo(p).eps
        torch.testing.assert_close(item.param.double(), wp, rtol=0.51 * eps, atol=2.0**-21)
        torch.testing.assert_close(item.exp_avg.double(), wm, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(item.exp_avg_sq.double(), wv, rtol=1e-6, atol=1e-7)
        assert [int(s) for s in item.step.expand(len(ids)).tolist()] == counts
        # Selected blocks hold the new values rounded to the full weight's dtype, bit by bit;
        # nothing else has changed.
        scatter_blocks_(before, ids, item.param, *block)
        assert torch.equal(full, before)

    def test_strided_full_weight_and_unaligned_state(self):
        """A full weight that is a view of wider rows; tensors that start at odd addresses."""
        torch.manual_seed(1)
        wide = torch.randn(40, 41)
        full, kept = wide[:, 3:35], wide.clone()
        ids = torch.tensor([1, 2])
        buffer = torch.full((2 * 256 + 1,), float("nan"))
        item = packed(gather_blocks(full, ids, 16, 16), 1, full, ids)
        buffer[1:].copy_(item.param.flatten())
        item = Packed(
            buffer[1:].view(2, 16, 16), item.exp_avg, item.exp_avg_sq, item.step, full, ids
        )
        grad = torch.randn(2, 16, 16)
        want, _, _ = reference.adamw(item.param, grad, item.exp_avg, item.exp_avg_sq, 1, **HYPER)
        adamw_([item], [grad], torch.tensor(1e-2), **ARGS)
        torch.testing.assert_close(item.param.double(), want, rtol=2.0**-21, atol=2.0**-21)
        scatter_blocks_(kept[:, 3:35], ids, item.param, 16, 16)
        assert torch.equal(wide, kept)
        assert buffer[0].isnan()

    def test_whole_master_writes_through(self):
        torch.manual_seed(2)
        for shape in ((9, 11), (8, 40), (64,)):
            full = torch.randn(shape).bfloat16()
            item = packed(full.float(), 1, full)
            adamw_([item], [torch.randn(shape).bfloat16()], torch.tensor(1e-2), **ARGS)
            assert torch.equal(full, item.param.bfloat16())

    def test_each_block_has_its_own_step_count(self):
        """Bias correction by a count that is not the block's would be off by a factor."""
        item = packed(torch.ones(3, 5, 7), 3, ids=torch.tensor([4, 0, 2]))
        item.step.copy_(torch.tensor([0.0, 3.0, 99.0]))
        adamw_([item], [torch.ones(3, 5, 7)], torch.tensor(1e-2), **ARGS)
        assert item.step.tolist() == [1, 4, 100]
        for b, step in enumerate((1, 4, 100)):
            zero = torch.zeros(5, 7)
            want, _, _ = reference.adamw(zero + 1, zero + 1, zero, zero, step, **HYPER)
            torch.testing.assert_close(item.param[b].double(), want, rtol=1e-6, atol=0)

    def test_found_inf_changes_nothing(self):
        torch.manual_seed(3)
        full = torch.randn(8, 8).bfloat16()
        items = [packed(torch.randn(40)), packed(full.float(), 1, full)]
        grads = [torch.full((40,), float("inf")), torch.full((8, 8), float("nan"))]
        before, kept = state(items), full.clone()
        flag, lr = torch.ones(1), torch.tensor(1e-2)
        adamw_(items, grads, lr, found_inf=flag, **ARGS)
        assert all(torch.equal(a, b) for a, b in zip(state(items), before, strict=True))
        assert torch.equal(full, kept)
        flag.zero_()
        adamw_(items, [torch.ones(40), torch.ones(8, 8)], lr, found_inf=flag, **ARGS)
        assert [x.step.item() for x in items] == [1, 1]
        assert not torch.equal(items[0].param, before[0])

    def test_missing_and_empty_gradients_are_skipped(self):
        items = [packed(torch.ones(5)), packed(torch.ones(5)), packed(torch.ones(0))]
        adamw_(items, [None, torch.ones(5), torch.ones(0)], torch.tensor(1e-2), **ARGS)
        assert [x.step.item() for x in items[:2]] == [0, 1]
        assert (items[0].param == 1).all()
        assert (items[1].param < 1).all()
        adamw_([], [], torch.tensor(1e-2), **ARGS)

    def test_zero_beta1_and_no_decay(self):
        item, g = packed(torch.ones(3)), torch.tensor([1.0, -2.0, 0.0])
        adamw_([item], [g], torch.tensor(0.5), (0.0, 0.9), 0.0 + 1e-8, 0.0, config=SMALL)
        torch.testing.assert_close(item.param, torch.tensor([0.5, 1.5, 1.0]))

    def test_bitwise_twice_and_nan_stays_in_its_place(self):
        torch.manual_seed(4)
        start, g = torch.randn(150).bfloat16(), torch.randn(150).bfloat16()
        g[7], start[9] = float("nan"), float("inf")
        got = []
        for _ in range(2):
            item = packed(start.clone())
            for _ in range(2):
                adamw_([item], [g], torch.tensor(1e-2), seed=torch.tensor([5]), **ARGS)
            got.append(item)
        for a, b in zip(state(got[:1]), state(got[1:]), strict=True):
            assert torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5))
        bad = ~got[0].param.isfinite()
        assert bad.nonzero().flatten().tolist() == [7, 9]

    def test_stochastic_rounding(self):
        """Between two neighbours, unbiased, another pattern for another seed and step, the same
        for the same; round-to-nearest would lose each of these steps."""
        n, lr = 4096, torch.tensor(1e-3)
        config = AdamConfig(chunk=2048, rows=64)
        draws = {}
        for seed, steps in ((7, 1), (7, 1), (8, 1), (7, 2)):
            item = packed(torch.full((n,), 1.0).bfloat16())
            item.step.fill_(steps - 1.0)
            item.exp_avg.fill_(1 - 0.9 ** (steps - 1))
            item.exp_avg_sq.fill_(1 - 0.95 ** (steps - 1))
            adamw_([item], [torch.ones(n).bfloat16()], lr, (0.9, 0.95), 1e-8, 0.0,
                   seed=torch.tensor(seed), config=config)  # fmt: skip
            assert item.param.unique().tolist() == [1 - 2.0**-8, 1.0]
            p = 1e-3 * 2**8  # how often the lower neighbour is right
            low = (item.param < 1).float()
            # five standard deviations, in all and in every quarter of the elements
            for part in (low, *low.view(4, -1), low[::4], low[1::4], low[2::4], low[3::4]):
                assert abs(part.mean() - p) < 5 * (p * (1 - p) / part.numel()) ** 0.5
            if (seed, steps) in draws:
                assert torch.equal(draws[seed, steps], low)
            draws[seed, steps] = low
        for a, b in (((7, 1), (8, 1)), ((7, 1), (7, 2))):  # as far apart as independent draws
            agree = (draws[a] == draws[b]).float().mean()
            assert abs(agree - (p * p + (1 - p) ** 2)) < 0.05
        item = packed(torch.full((64,), 1.0).bfloat16())
        adamw_([item], [torch.ones(64).bfloat16()], lr, weight_decay=0.0, config=SMALL)
        assert (item.param == 1).all()


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


def item(**changes):
    parts = {
        "param": torch.ones(2, 4, 4),
        "exp_avg": torch.ones(2, 4, 4),
        "exp_avg_sq": torch.ones(2, 4, 4),
        "step": torch.zeros(2),
        "full": torch.ones(8, 8),
        "ids": torch.tensor([0, 1]),
    }
    return Packed(**parts | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_avg": torch.ones(2, 4, 5)}, "tensor 0: shapes"),
        ({"exp_avg": torch.ones(2, 4, 4).bfloat16()}, "must be float32"),
        ({"param": torch.ones(2, 4, 4).mT}, "non-contiguous"),
        ({"param": torch.ones(2, 4, 4).double()}, "torch.float64"),
        ({"step": torch.zeros(3)}, "3 step counts for 2 blocks"),
        ({"ids": torch.tensor([0])}, r"int64 \[2\]"),
        ({"ids": torch.tensor([0, 1], dtype=torch.int32)}, "int64"),
        ({"full": torch.ones(8, 8).T[::2].T}, "contiguous rows"),
        ({"full": torch.ones(64)}, "contiguous rows"),
        ({"full": torch.ones(8, 8).double()}, "full dtype"),
        ({"full": torch.ones(8, 8, device="meta")}, "meta"),
        ({"ids": None, "step": torch.zeros(1)}, r"full weight \(8, 8\)"),
    ],
)
def test_refused_by_name_before_anything_changes(changes, message):
    with pytest.raises(ValueError, match=message):
        adamw_([item(**changes)], [torch.ones(2, 4, 4)], torch.tensor(0.1))


def test_a_prepared_step_refuses_other_gradients():
    step = AdamStep([item()], [torch.ones(2, 4, 4)])
    for wrong in (torch.ones(2, 4, 4).bfloat16(), torch.ones(2, 4, 4).mT, torch.ones(2, 16)):
        with pytest.raises(ValueError, match="as prepared"):
            step([wrong], torch.tensor(0.1))


@pytest.mark.parametrize(
    ("grads", "kwargs", "message"),
    [
        ([], {}, "1 tensors but 0 gradients"),
        ([torch.ones(2, 4, 5)], {}, "shapes"),
        ([torch.ones(2, 4, 4)], {"found_inf": torch.zeros(2)}, "one element"),
    ],
)
def test_arguments_are_checked(grads, kwargs, message):
    with pytest.raises(ValueError, match=message):
        adamw_([item()], grads, torch.tensor(0.1), **kwargs)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no need of a GPU")
def test_a_compiled_kernel_refuses_the_cpu():
    with pytest.raises(ValueError, match="need a GPU"):
        adamw_([item()], [torch.ones(2, 4, 4)], torch.tensor(0.1))


@pytest.mark.parametrize(
    "targets",
    [("cuda:90",), pytest.param(("cuda:80", "cuda:100", "hip:gfx942"), marks=pytest.mark.slow)],
    ids=["default", "others"],
)
def test_compiles_without_spills_and_with_wide_loads(targets):
    facts = compile_check.check(["sparse_adam"], targets)
    assert len(facts) == 6 * len(targets)
    # moments are always float32: two wide loads; a float32 parameter or gradient adds one
    wide = {"master": 4, "fp32": 4, "master-bf16-grad": 3, "bf16": 2, "bf16-stochastic": 2}
    for f in facts:
        assert f.stack == 0, f
        assert f.fits, f
        name = f.name.split("/")[1]
        if name in wide:
            assert f.wide_loads == wide[name], f
            assert f.registers <= 80, f
