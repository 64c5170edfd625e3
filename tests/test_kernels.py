"""Every operator against its float64 definition; shapes from hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad_kernels import checks, cpu, dispatch, ops, reference
from fastgrad_kernels.layout import gather_blocks, scatter_blocks_, sum_of_squares

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int64)


def tolerance(dtype, length):
    """Inputs are exact in float64, so the error is that of accumulating in float32."""
    eps = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    return 16 * eps * max(length, 1) ** 0.5


def close(actual, expected, dtype, length, scale):
    worst = float((actual.double() - expected).abs().max()) if expected.numel() else 0.0
    assert worst <= tolerance(dtype, length) * max(scale, 1e-30), (worst, scale)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
lengths = st.lists(st.integers(0, 12), min_size=1, max_size=6)


@settings(max_examples=120, deadline=None)
@given(
    shapes,
    lengths,
    st.integers(1, 48),
    st.integers(1, 48),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_cross_influence(shape, lengths, br, bc, dtype, want_grad, n_dir, seed):
    torch.manual_seed(seed)
    tokens = sum(lengths)
    left, right = torch.randn(tokens, shape[0]).to(dtype), torch.randn(tokens, shape[1]).to(dtype)
    directions = torch.randn(n_dir, *shape) if n_dir else None
    offsets = offsets_of(lengths)
    grad, sq, dots = ops.cross_influence(left, right, offsets, br, bc, directions, want_grad)
    want, want_sq, want_dots = reference.cross_influence(left, right, offsets, br, bc, directions)
    size = shape[0] * shape[1] * max(tokens, 1)
    scale = float((left.double().norm() * right.double().norm()) ** 2)
    close(sq, want_sq, dtype, size, scale)
    if want_grad:
        close(grad, want, dtype, size, scale**0.5)
    else:
        assert grad.numel() == 0
    if directions is not None:
        close(dots, want_dots, torch.float32, size, scale**0.5 * float(directions.norm()))
    assert sq.shape == want_sq.shape
    assert dots.shape == want_dots.shape
    again = ops.cross_influence(left, right, offsets, br, bc, directions, want_grad)
    assert all(torch.equal(a, b) for a, b in zip(again, (grad, sq, dots), strict=True))


@pytest.mark.parametrize("gram", [True, False])
def test_both_forms_agree_on_tall_tiles(gram, monkeypatch):
    """Weights beyond one scratch tile in both directions, whole and in blocks."""
    monkeypatch.setattr(cpu, "TILE_LIMIT", 64)
    monkeypatch.setattr(cpu, "prefer_gram", lambda *a: gram)
    torch.manual_seed(0)
    left, right = torch.randn(30, 150), torch.randn(30, 130)
    offsets = offsets_of([10, 0, 7, 13])
    for br, bc in ((150, 130), (48, 50), (1, 130), (150, 1), (200, 200)):
        grad, sq, _ = cpu.cross_influence(left, right, offsets.tolist(), br, bc, None, True)
        want, want_sq, _ = reference.cross_influence(left, right, offsets, br, bc)
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sq.double(), want_sq, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("lengths", [[40] * 5, [50, 0, 70, 80]])
@pytest.mark.parametrize("kept", [0.0, 0.15, 0.9])
def test_rows_of_zeros_are_left_out(lengths, kept, gram, side, monkeypatch):
    """Tokens without a label, and padding: fewer products, the same results."""
    seen = []
    monkeypatch.setattr(cpu, "prefer_gram", lambda *a: seen.append(a[2]) or gram)
    torch.manual_seed(0)
    n = sum(lengths)
    factors = {"left": torch.randn(n, 24), "right": torch.randn(n, 40)}
    factors[side][torch.rand(n) >= kept] = 0
    left, right = factors.values()
    direction = torch.randn(1, 24, 40)
    for br, bc in ((24, 40), (8, 16)):
        args = (left, right, offsets_of(lengths), br, bc)
        want = reference.cross_influence(*args, direction)
        numbers = (left, right, args[2].tolist(), br, bc)
        for have in (
            cpu.cross_influence(*numbers, direction, True),
            cpu.cross_influence(*numbers, None, True)[:2],
        ):
            for a, b in zip(have, want, strict=False):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
    assert (seen[-1] < max(lengths)) == (kept <= 0.6)


def test_rows_that_only_begin_with_zeros_stay(monkeypatch):
    """What a few numbers of a row suggest is counted before anything is left out."""
    monkeypatch.setattr(cpu, "prefer_gram", lambda *a: True)
    torch.manual_seed(0)
    left, right = torch.randn(80, 100), torch.randn(80, 20)
    offsets = offsets_of([40, 40])
    for width in (1, cpu.ZERO_WIDTH, 99):
        left[:, :width] = 0
        _, sq, _ = cpu.cross_influence(left, right, offsets.tolist(), 100, 20, None, True)
        _, want, _ = reference.cross_influence(left, right, offsets, 100, 20)
        torch.testing.assert_close(sq.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("half", [1, 2, 1000])
@pytest.mark.parametrize("lengths", [[8] * 5, [9] * 5, [2], [12, 0, 5, 1, 8]])
def test_pairs_in_halves_and_whole(lengths, half, monkeypatch):
    monkeypatch.setattr(cpu, "GRAM_HALF", half)
    monkeypatch.setattr(cpu, "GRAM_PAIR_LIMIT", 200)  # several groups
    torch.manual_seed(0)
    left, right = torch.randn(sum(lengths), 24), torch.randn(sum(lengths), 16)
    sq = cpu.gram_norms(left, right, offsets_of(lengths).tolist())
    _, want, _ = reference.cross_influence(left, right, offsets_of(lengths), 24, 16)
    torch.testing.assert_close(sq.double(), want[0], rtol=1e-5, atol=0)


def test_first_tokens_do_not_pass_for_all(monkeypatch):
    """A query's gradient is zero at each example's first token: no sample is of these alone."""
    counted = []
    real = cpu._zero_rows
    monkeypatch.setattr(cpu, "_zero_rows", lambda m: counted.append(len(m)) or real(m))
    for tokens in (32, 64, 128, 256):
        left, right = torch.randn(2048, 8), torch.randn(2048, 4)
        left[::tokens] = 0
        bounds = list(range(0, 2049, tokens))
        assert cpu.without_zero_rows(left, right, bounds)[0] is left
        assert not counted
        left.view(-1, tokens, 8)[:, tokens // 2 :] = 0  # labels in the first half alone
        assert len(cpu.without_zero_rows(left, right, bounds)[0]) <= 1024
        counted.clear()


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("lengths", [[8] * 4, [9, 5, 8, 10]])
def test_factors_that_are_parts_of_others(gram, lengths, monkeypatch):
    """Views with an offset and strides of their own, as fused projections' gradients are."""
    monkeypatch.setattr(cpu, "prefer_gram", lambda *a: gram)
    monkeypatch.setattr(cpu, "GRAM_HALF", 2)
    torch.manual_seed(0)
    left = torch.randn(sum(lengths) + 3, 40)[3:, 5:29]
    right = torch.randn(16, 2 * sum(lengths))[:, 1::2].T
    offsets = offsets_of(lengths)
    grad, sq, _ = cpu.cross_influence(left, right, offsets.tolist(), 24, 16, None, True)
    want_grad, want, _ = reference.cross_influence(left, right, offsets, 24, 16)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sq.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_damage_is_left_out_with_rows_of_zeros(bad):
    """Zero times infinity is NaN: what the whole product shows must show here too."""
    left, right = torch.randn(100, 8), torch.randn(100, 16)
    left[:80] = 0
    right[3, 5] = bad
    grad, sq, _ = cpu.cross_influence(left, right, [0, 50, 100], 8, 16, None, True)
    torch.testing.assert_close(grad, left.T @ right, equal_nan=True)
    assert grad[:, 5].isnan().all()
    assert sq[0].isnan().tolist() == [True, False]


@pytest.mark.parametrize("mean", [0.0, 30.0, 300.0])
def test_gram_form_survives_cancellation(mean):
    """Inputs with a large common mean against gradients that sum to zero, as keys have."""
    torch.manual_seed(0)
    right = torch.randn(4 * 32, 256) + mean
    left = torch.randn(4, 32, 128)
    left = (left - left.mean(1, keepdim=True)).view(-1, 128)
    offsets = offsets_of([32] * 4)
    _, want, _ = reference.cross_influence(left, right, offsets, 128, 256)
    sq = cpu.gram_norms(left, right, offsets.tolist())
    one_by_one = torch.stack(
        [
            (left[s : s + 32].T @ right[s : s + 32]).double().square().sum()
            for s in range(0, 128, 32)
        ]
    )
    error = float(((sq.double() - want[0]) / want[0]).abs().max())
    plain = float(((one_by_one - want[0]) / want[0]).abs().max())
    assert error <= max(1e-4, 4 * plain)


def test_pairs_of_one_input_are_shared_and_never_stale(monkeypatch):
    """Query, key and value read one activation: its pairs are computed once, unless it changed."""
    torch.manual_seed(0)
    made = []
    pairs = cpu._pairs
    monkeypatch.setattr(cpu, "_pairs", lambda m, k: made.append(m) or pairs(m, k))
    task = [1]
    monkeypatch.setattr(cpu, "backward_pass", lambda: task[0])
    bounds = [0, 40, 80]
    x = torch.randn(80, 24)

    def right_for(left, right):
        found = cpu.gram_norms(left, right, bounds)
        want = reference.cross_influence(left, right, torch.tensor(bounds), 99, 99)[1][0]
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0)
        count, made[:] = len(made), []
        return count

    assert right_for(torch.randn(80, 8), x) == 2
    assert right_for(torch.randn(80, 16), x) == 1
    assert right_for(torch.randn(80, 8), x.view(-1).view(80, 24)) == 1  # another view of the same
    assert right_for(torch.randn(80, 8), x[:, :12]) == 2
    x.mul_(2)
    assert right_for(torch.randn(80, 8), x) == 2
    task[0] = 2  # what was filled without PyTorch's knowledge between two backward passes
    x.numpy()[:] = 1
    assert right_for(torch.randn(80, 8), x) == 2
    for _ in range(20):  # new tensors at the address of old ones
        assert right_for(torch.randn(80, 8), torch.randn(80, 24)) == 2


def test_form_is_chosen_by_shape():
    assert cpu.prefer_gram(512, 512, 32, True)
    assert not cpu.prefer_gram(512, 512, 128, True)
    assert cpu.prefer_gram(512, 512, 128, False)  # no gradient wanted: the product would be extra
    assert not cpu.prefer_gram(64, 64, 2048, False)
    assert cpu.prefer_gram(4096, 4096, 128, True)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 20),
    lengths,
    st.integers(1, 40),
    st.integers(1, 24),
    st.sampled_from(DTYPES),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_embedding_influence(rows, cols, lengths, br, bc, dtype, n_dir, seed):
    torch.manual_seed(seed)
    tokens = sum(lengths)
    ids = torch.randint(0, rows, (tokens,))
    grad_out = torch.randn(tokens, cols).to(dtype)
    directions = torch.randn(n_dir, rows, cols) if n_dir else None
    offsets = offsets_of(lengths)
    sq, dots = ops.embedding_influence(ids, grad_out, offsets, rows, br, bc, directions)
    _, want_sq, want_dots = reference.embedding_influence(
        ids, grad_out.double(), offsets, rows, br, bc, directions
    )
    scale = float(grad_out.double().norm() ** 2) * max(tokens, 1)
    close(sq, want_sq, dtype, tokens * cols, scale)
    close(dots, want_dots, torch.float32, tokens * cols, scale * 10)
    assert dots.shape == want_dots.shape


@settings(max_examples=100, deadline=None)
@given(
    shapes,
    st.integers(0, 25),
    st.integers(1, 44),
    st.integers(1, 44),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_sparse_wgrad(shape, tokens, br, bc, dtype, seed):
    torch.manual_seed(seed)
    left, right = torch.randn(tokens, shape[0]).to(dtype), torch.randn(tokens, shape[1]).to(dtype)
    count = -(-shape[0] // br) * -(-shape[1] // bc)
    ids = torch.randperm(count)[: max(1, count // 3)]
    packed = ops.sparse_wgrad(left, right, ids, br, bc)
    want = reference.sparse_wgrad(left, right, ids, br, bc)
    scale = float(left.double().norm() * right.double().norm())
    close(packed, want, dtype, max(tokens, 1), scale)
    assert packed.shape == want.shape


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(1, 44), st.integers(1, 44), st.booleans(), st.integers(0, 99))
def test_block_stats_with_damage(shape, br, bc, damaged, seed):
    torch.manual_seed(seed)
    x = torch.randn(shape)
    if damaged:
        flat = x.view(-1)
        flat[torch.randint(flat.numel(), (3,))] = torch.tensor([float("nan"), float("inf"), -1e9])
    got = ops.block_stats(x, br, bc)
    torch.testing.assert_close(got.double(), reference.block_stats(x, br, bc), rtol=1e-5, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(1, 44), st.integers(1, 44), st.integers(0, 99))
def test_gather_and_scatter_are_inverse(shape, br, bc, seed):
    torch.manual_seed(seed)
    x = torch.randn(shape)
    count = -(-shape[0] // br) * -(-shape[1] // bc)
    ids = torch.randperm(count)[: max(1, count // 2)]
    packed = gather_blocks(x, ids, br, bc)
    y = torch.full_like(x, 7.0)
    scatter_blocks_(y, ids, packed, br, bc)
    blocks = reference.blocks_of(*shape, br, bc)
    chosen = torch.zeros(shape, dtype=torch.bool)
    for block in ids.tolist():
        chosen[blocks[block]] = True
    assert torch.equal(y[chosen], x[chosen])
    assert (y[~chosen] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adamw_against_its_definition(dtype):
    torch.manual_seed(0)
    params = [torch.randn(s).to(dtype) for s in ((5, 7), (3,), ())]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    m = [torch.zeros(p.shape, dtype=wide) for p in params]
    v = [torch.zeros(p.shape, dtype=wide) for p in params]
    steps = [torch.zeros(()) for _ in params]
    settings_ = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    eps = torch.finfo(dtype).eps
    for t in range(1, 6):
        grads = [torch.randn_like(p) for p in params]
        want = [
            reference.adamw(p, g, a, b, t, lr=1e-2, maximize=True, **settings_)
            for p, g, a, b in zip(params, grads, m, v, strict=True)
        ]
        ops.adamw_(
            params,
            grads,
            m,
            v,
            steps,
            [],
            [],
            torch.tensor(1e-2, dtype=torch.float64),
            0.9,
            0.95,
            1e-8,
            0.1,
            True,
        )
        for p, a, b, (wp, wa, wb), s in zip(params, m, v, want, steps, strict=True):
            torch.testing.assert_close(p.double(), wp, rtol=eps, atol=1e-6 if eps > 1e-9 else 1e-14)
            torch.testing.assert_close(a.double(), wa, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(b.double(), wb, rtol=1e-5, atol=1e-7)
            assert float(s) == t


HYPER = (0.9, 0.95, 1e-8, 0.1, False)


def update(params, grads, m, v, steps, fulls=(), ids=(), lr=1e-2, **kwargs):
    rate = torch.tensor(lr, dtype=torch.float64)
    ops.adamw_(params, grads, m, v, steps, list(fulls), list(ids), rate, *HYPER, **kwargs)


def zeros_like(*params):
    return [[torch.zeros(p.shape) for p in params] for _ in range(2)]


@pytest.mark.parametrize("full_dtype", [torch.float32, torch.bfloat16])
def test_adamw_writes_through_and_counts_steps_per_block(full_dtype):
    """Blocks selected at different times have their own bias correction; nothing outside moves."""
    torch.manual_seed(0)
    full, ids = torch.randn(10, 12).to(full_dtype), torch.tensor([4, 0, 5])
    packed = gather_blocks(full, ids, 4, 5).float()
    whole = torch.randn(6).to(full_dtype)
    master = whole.float()
    steps = [torch.tensor([0.0, 7.0, 2.0]), torch.zeros(())]
    params, before = [packed, master], full.clone()
    grads = [torch.randn_like(p) for p in params]
    m, v = zeros_like(*params)
    parts = [(b, reference.adamw(packed[b], grads[0][b], m[0][b], v[0][b], int(steps[0][b]) + 1,
              lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)[0]) for b in range(3)]
    expected, padding = before.clone(), torch.zeros(10, 12)
    none = torch.empty(0, dtype=torch.int64)
    update(params, grads, m, v, steps, [full, whole], [ids, none])
    for b, want in parts:
        torch.testing.assert_close(packed[b].double(), want, rtol=1e-6, atol=1e-7)
    scatter_blocks_(expected, ids, packed, 4, 5)
    scatter_blocks_(padding, ids, torch.ones(3, 4, 5), 4, 5)
    assert torch.equal(full, expected)
    assert torch.equal(full[padding == 0], before[padding == 0])
    assert torch.equal(whole, master.to(full_dtype))
    assert steps[0].tolist() == [1, 8, 3]
    assert float(steps[1]) == 1


def test_counts_per_block_of_a_whole_weight_survive_the_call():
    """Nothing that a prepared step reads may be freed between two steps."""
    full = torch.randn(6, 5).bfloat16()
    p = full.float()
    (m,), (v,) = zeros_like(p)
    steps, none = torch.arange(6.0), torch.empty(0, dtype=torch.int64)
    for _ in range(3):
        update([p], [torch.randn(6, 5)], [m], [v], [steps], [full], [none])
        [torch.full((6,), 1 << 40, dtype=torch.int64) for _ in range(50)]  # over what was freed
        assert torch.equal(full, p.bfloat16())
    assert steps.tolist() == [3, 4, 5, 6, 7, 8]


def test_boundaries_that_change_under_the_hood_are_seen():
    """Neither a checked nor a moved copy outlives the values it was made from."""
    offsets = torch.tensor([0, 2, 6])
    there = dispatch.moved(offsets, torch.device("meta"))
    assert dispatch.moved(offsets, torch.device("meta")) is there
    offsets.numpy()[1] = 3
    assert dispatch.moved(offsets, torch.device("meta")) is not there
    with torch.inference_mode():
        inside = torch.tensor([0, 2, 6])
        dispatch.moved(inside, torch.device("meta"))
        checks.check_offsets(inside, 6)


def test_adamw_scales_and_skips_like_a_grad_scaler():
    torch.manual_seed(0)
    plain, scaled = torch.randn(33), None
    scaled = plain.clone()
    grad, (m, v) = torch.randn(33), zeros_like(plain)
    m2, v2 = zeros_like(plain)
    steps, steps2 = [torch.zeros(())], [torch.zeros(())]
    kept = grad.clone()
    update([plain], [grad], m, v, steps)
    scale = torch.tensor([4.0])
    update([scaled], [grad * 4], m2, v2, steps2, grad_scale=scale, found_inf=torch.zeros(1))
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-7)
    assert torch.equal(grad, kept)
    before = scaled.clone()
    update([scaled], [grad], m2, v2, steps2, grad_scale=scale, found_inf=torch.ones(1))
    assert torch.equal(scaled, before)
    assert float(steps2[0]) == 1


def test_stochastic_rounding_is_right_on_average():
    """A step of a 64th of a bfloat16 unit is lost by rounding to nearest, kept by chance."""
    n, lr = 1 << 14, 2.0**-14
    nearest, chance = torch.ones(n).bfloat16(), torch.ones(n).bfloat16()
    again, grad = chance.clone(), torch.full((n,), -1.0).bfloat16()
    rate, seed = torch.tensor(lr, dtype=torch.float64), torch.tensor(7)
    for p, key in ((nearest, None), (chance, seed), (again, seed)):
        (m,), (v,) = zeros_like(p)
        ops.adamw_([p], [grad], [m], [v], [torch.zeros(())], [], [], rate, 0.9, 0.95, 1e-8, 0.0,
                   seed=key)  # fmt: skip
    assert (nearest == 1).all()
    assert torch.equal(chance, again)
    unit = 2.0**-7
    assert set(chance.float().unique().tolist()) <= {1.0, 1.0 + unit}
    share = float((chance > 1).float().mean())  # p = lr / unit = 1/128: 128 +- 11 of 16384
    assert abs(share * n - 128) < 6 * 11.3


def test_gradients_are_added_in_place():
    torch.manual_seed(0)
    left, right, offsets = torch.randn(20, 17), torch.randn(20, 24), offsets_of([7, 0, 13])
    before = torch.randn(17, 24)
    grad = before.clone()
    sq, _ = ops.cross_influence_add_(grad, left, right, offsets, 16, 8)
    want, want_sq, _ = reference.cross_influence(left, right, offsets, 16, 8)
    torch.testing.assert_close(grad.double(), before + want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sq.double(), want_sq, rtol=1e-5, atol=1e-5)
    ids, packed = torch.tensor([5, 1]), torch.ones(2, 16, 8)
    ops.sparse_wgrad_add_(packed, left, right, ids)
    want = 1 + reference.sparse_wgrad(left, right, ids, 16, 8)
    torch.testing.assert_close(packed.double(), want, rtol=1e-5, atol=1e-5)


def test_the_gradient_comes_in_the_dtype_asked_for():
    torch.manual_seed(0)
    left, right = torch.randn(20, 17).bfloat16(), torch.randn(20, 24).bfloat16()
    args = (left, right, offsets_of([7, 13]), 17, 24, None, True)
    wide = ops.cross_influence(*args)[0]
    narrow = ops.cross_influence(*args, torch.bfloat16)[0]
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16())


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 999),
)
def test_expert_wgrad(rows, cols, lengths, dtype, seed):
    torch.manual_seed(seed)
    tokens = sum(lengths)
    left, right = torch.randn(tokens, rows).to(dtype), torch.randn(tokens, cols).to(dtype)
    offsets, n = offsets_of(lengths), int(torch.randint(len(lengths) + 1, ()))
    ids = torch.randperm(len(lengths))[:n]
    got = ops.expert_wgrad(left, right, offsets, ids)
    want = reference.expert_wgrad(left, right, offsets, ids)
    assert got.shape == (n, rows, cols)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    total = torch.ones_like(got)
    ops.expert_wgrad_add_(total, left, right, offsets, ids)
    torch.testing.assert_close(total.double(), want + 1, rtol=1e-5, atol=1e-4)
    if n == len(lengths):  # all experts together are the dense gradient of the stack
        torch.testing.assert_close(
            got.double().sum(0), left.double().T @ right.double(), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("lengths", [[3, 3], [5, 0, 1]])
def test_norm_gradients(mean, lengths):
    torch.manual_seed(0)
    tokens = sum(lengths)
    x, g = torch.randn(tokens, 9), torch.randn(tokens, 9)
    mu, rstd = (torch.randn(tokens) if mean else None), torch.rand(tokens) + 0.5
    weight, bias = ops.norm_gradients(x, g, rstd, offsets_of(lengths), mu, mean)
    hat = (x.double() - (0 if mu is None else mu.double()[:, None])) * rstd.double()[:, None]
    want = torch.stack([p.sum(0) for p in (hat * g).split(lengths)])
    torch.testing.assert_close(weight.double(), want, rtol=1e-5, atol=1e-5)
    if mean:
        want = torch.stack([p.sum(0) for p in g.double().split(lengths)])
        torch.testing.assert_close(bias.double(), want, rtol=1e-5, atol=1e-5)
    else:
        assert bias.shape == (0, 9)


def test_grad_stats_of_a_list():
    """Shapes from a scalar to three dimensions, mixed dtypes, empty and damaged tensors."""
    torch.manual_seed(0)
    grads = [torch.randn(()), torch.randn(0, 4), torch.randn(5, 3, 4), torch.randn(40).bfloat16(),
             torch.randn(9, 7).T]  # fmt: skip
    grads[2][1, 2, 3] = torch.nan
    grads[3][5] = torch.inf
    sizes = [(1, 1), (2, 2), (2, 8), (1, 16), (3, 100)]
    blocks, tensors = ops.grad_stats(grads, [r for r, _ in sizes], [c for _, c in sizes])
    start = 0
    for i, (g, (r, c)) in enumerate(zip(grads, sizes, strict=True)):
        matrix = g.reshape(g.shape[0] if g.ndim > 1 else 1, -1) if g.numel() else g
        want = reference.block_stats(matrix, r, c) if g.numel() else torch.zeros(4, 0).double()
        got = blocks[:, start : start + want.shape[1]].double()
        start += want.shape[1]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        total = torch.cat([want[:2].sum(1), want[2].amax()[None] if want.numel() else
                           torch.zeros(1).double(), want[3].sum()[None]])  # fmt: skip
        torch.testing.assert_close(tensors[:, i].double(), total, rtol=1e-5, atol=1e-6)
    assert start == blocks.shape[1]
    assert ops.grad_stats([], [], [])[0].shape == (4, 0)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (
            ops.cross_influence,
            lambda: (
                torch.randn(12, 5),
                torch.randn(12, 6),
                offsets_of([5, 0, 7]),
                2,
                4,
                torch.randn(1, 5, 6),
                True,
            ),
        ),
        (
            ops.cross_influence,
            lambda: (torch.randn(12, 5), torch.randn(12, 6), offsets_of([6, 6]), 9, 9, None, False),
        ),
        (
            ops.embedding_influence,
            lambda: (
                torch.randint(0, 9, (12,)),
                torch.randn(12, 6),
                offsets_of([5, 7]),
                9,
                2,
                4,
                None,
            ),
        ),
        (
            ops.sparse_wgrad,
            lambda: (torch.randn(12, 5), torch.randn(12, 6), torch.tensor([0, 3]), 2, 4),
        ),
        (ops.grad_stats, lambda: ([torch.randn(7, 9), torch.randn(5)], [3, 1], [4, 2])),
        (
            ops.cross_influence_add_,
            lambda: (
                torch.randn(5, 6),
                torch.randn(12, 5),
                torch.randn(12, 6),
                offsets_of([6, 6]),
                9,
                9,
            ),
        ),
        (
            ops.expert_wgrad,
            lambda: (
                torch.randn(12, 5),
                torch.randn(12, 6),
                offsets_of([5, 0, 7]),
                torch.tensor([2, 0]),
            ),
        ),
        (
            ops.expert_wgrad_add_,
            lambda: (
                torch.randn(2, 5, 6),
                torch.randn(12, 5),
                torch.randn(12, 6),
                offsets_of([5, 0, 7]),
                torch.tensor([2, 0]),
            ),
        ),
        (
            ops.sparse_wgrad_add_,
            lambda: (
                torch.randn(2, 2, 4),
                torch.randn(12, 5),
                torch.randn(12, 6),
                torch.tensor([0, 3]),
            ),
        ),
        (
            ops.norm_gradients,
            lambda: (
                torch.randn(12, 5),
                torch.randn(12, 5),
                torch.rand(12),
                offsets_of([6, 6]),
                torch.randn(12),
                True,
            ),
        ),
        (
            ops.adamw_,
            lambda: (
                [torch.randn(2, 2, 2)],
                [torch.randn(2, 2, 2)],
                [torch.zeros(2, 2, 2)],
                [torch.zeros(2, 2, 2)],
                [torch.zeros(2)],
                [torch.randn(4, 4)],
                [torch.tensor([0, 3])],
                torch.tensor(1e-2),
                *HYPER,
            ),
        ),
        (
            ops.adamw_,
            lambda: (
                [torch.randn(3)],
                [torch.randn(3)],
                [torch.zeros(3)],
                [torch.zeros(3)],
                [torch.zeros(())],
                [],
                [],
                torch.tensor(1e-2),
                0.9,
                0.99,
                1e-8,
                0.0,
                False,
            ),
        ),
    ],
    ids=[
        "cross",
        "cross-norms",
        "embedding",
        "wgrad",
        "stats",
        "cross-add",
        "experts",
        "experts-add",
        "wgrad-add",
        "norm",
        "adamw-blocks",
        "adamw",
    ],
)
def test_opcheck(op, args):
    torch.library.opcheck(op, args())


def test_operators_compile():
    def f(left, right, offsets):
        grad, sq, _ = torch.ops.fastgrad.cross_influence(left, right, offsets, 2, 4, None, True)
        return grad.sum() + sq.sum()

    args = (torch.randn(12, 5), torch.randn(12, 6), offsets_of([5, 7]))
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), f(*args))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.cross_influence(torch.ones(3, 2), torch.ones(4, 2), offsets_of([3]), 1, 1),
            "3 tokens, right 4",
        ),
        (
            lambda: ops.cross_influence(
                torch.ones(3, 2), torch.ones(3, 2).half(), offsets_of([3]), 1, 1
            ),
            "same float dtype",
        ),
        (
            lambda: ops.cross_influence(torch.ones(3, 2), torch.ones(3, 2), offsets_of([2]), 1, 1),
            "every token belongs",
        ),
        (
            lambda: ops.cross_influence(
                torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0, 2, 1, 3]), 1, 1
            ),
            "must rise",
        ),
        (
            lambda: ops.cross_influence(
                torch.ones(3, 2), torch.ones(3, 2), offsets_of([3]), 1, 1, torch.ones(1, 3, 3)
            ),
            "do not fit",
        ),
        (
            lambda: ops.embedding_influence(
                torch.tensor([5]), torch.ones(1, 2), offsets_of([1]), 5, 1, 1
            ),
            "outside a table of 5",
        ),
        (
            lambda: ops.sparse_wgrad(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([4]), 1, 1),
            "outside 0..3",
        ),
        (
            # an operator that is given a meta tensor answers with its shapes alone
            lambda: checks.check_directions(
                torch.ones(1, 2, 2, device="meta"), 2, 2, torch.device("cpu")
            ),
            "on meta",
        ),
        (
            lambda: ops.cross_influence_add_(
                torch.ones(2, 2).bfloat16(), torch.ones(3, 2), torch.ones(3, 2), offsets_of([3]),
                1, 1,
            ),
            "cannot add to torch.bfloat16",
        ),
        (
            lambda: ops.sparse_wgrad_add_(
                torch.ones(1, 2, 2).mT, torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0])
            ),
            "strides",
        ),
        (
            lambda: ops.sparse_wgrad(
                torch.ones(3, 2), torch.ones(3, 2), torch.tensor([0], dtype=torch.int32), 1, 1
            ),
            "one-dimensional int64",
        ),
        (
            lambda: ops.expert_wgrad(
                torch.ones(3, 2), torch.ones(3, 2), offsets_of([1, 2]), torch.tensor([2])
            ),
            "blocks 2..2 outside 0..1",
        ),
        (
            lambda: ops.expert_wgrad_add_(
                torch.ones(1, 2, 3), torch.ones(3, 2), torch.ones(3, 2), offsets_of([1, 2]),
                torch.tensor([1]),
            ),
            "cannot add to",
        ),
        (
            lambda: ops.norm_gradients(
                torch.ones(3, 2), torch.ones(3, 2), torch.ones(2), offsets_of([3])
            ),
            "for 3 tokens",
        ),
        (lambda: ops.grad_stats([torch.ones(3).int()], [1], [1]), "gradient 0 is torch.int32"),
        (lambda: ops.grad_stats([torch.ones(3)], [1], [1, 1]), "one each"),
        (
            lambda: checks.check_gradients(
                [torch.ones(3), torch.ones(3, device="meta")], [1] * 2, [1] * 2
            ),
            "gradient 1 is on meta",
        ),
        (lambda: ops.grad_stats([torch.eye(2).to_sparse()], [1], [1]), "dense"),
        (
            lambda: update(
                [torch.ones(2, 2, 2)], [torch.ones(2, 2, 2)], [torch.ones(2, 2, 2)],
                [torch.ones(2, 2, 2)], [torch.zeros(())], [torch.ones(4, 4)],
                [torch.tensor([0, 9])],
            ),
            "blocks 0..9 outside 0..3",
        ),
        (
            lambda: update(
                [torch.ones(4)], [torch.ones(4)], [torch.ones(4)], [torch.ones(4)],
                [torch.zeros(3)],
            ),
            "3 step counts",
        ),
        (lambda: ops.block_stats(torch.ones(3), 1, 1), "needs a float matrix"),
        (lambda: ops.block_stats(torch.ones(3, 3), 0, 1), "is empty"),
        (
            lambda: ops.adamw_(
                [torch.ones(2)],
                [torch.ones(3)],
                [torch.ones(2)],
                [torch.ones(2)],
                [torch.zeros(())],
                [],
                [],
                torch.tensor(0.1),
                0.9,
                0.9,
                1e-8,
                0.0,
                False,
            ),
            "shapes differ",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    left, right = torch.randn(12, 5), torch.randn(12, 6)
    with FlopCounterMode(display=False) as counter:
        ops.cross_influence(left, right, offsets_of([5, 7]), 5, 6)
        ops.sparse_wgrad(left, right, torch.tensor([0, 3]), 2, 4)
        ops.expert_wgrad(left, right, offsets_of([2, 2, 8]), torch.tensor([1]))
    assert counter.get_total_flops() == 2 * 12 * 5 * 6 + 2 * 12 * 2 * 8 + 2 * 12 * 5 * 6 // 3


def test_a_backward_pass_takes_the_short_way_unless_somebody_watches(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    args = torch.randn(12, 5), torch.randn(12, 6), offsets_of([5, 7]), 5, 6
    with torch.no_grad():
        want, have = ops.cross_influence(*args), ops.influence(*args)
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
        with FlopCounterMode(display=False) as counter:
            ops.influence(*args)
    assert counter.get_flop_counts()["Global"] == {
        torch.ops.fastgrad.cross_influence: 2 * 12 * 5 * 6
    }
    called = []
    monkeypatch.setattr(ops, "cross_influence", lambda *a: called.append(a))
    with torch.no_grad():
        ops.influence(*args)
        assert not called
        with FlopCounterMode(display=False):
            ops.influence(*args)
    ops.influence(*args)  # with a graph: the operator says that it has no gradient
    assert len(called) == 2


@pytest.mark.parametrize("n", [0, 1, 4096, 4097, 1 << 21])
def test_sum_of_squares_is_accurate(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    want = float(x.double().square().sum())
    assert abs(float(sum_of_squares(x)) - want) <= 2e-7 * want
    if n == 1 << 21:
        matrix = x.view(1 << 10, -1).T
        assert abs(float(sum_of_squares(matrix)) - want) <= 2e-7 * want
