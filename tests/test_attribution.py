"""Index arithmetic of attribution: regions of parameters, rows of examples, owners of indices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad.ownership import NOBODY, Mark, mark, marked
from fastgrad.ownership_explicit import picked
from fastgrad.propagation import propagate
from fastgrad.regions import Region, region_of, whole
from fastgrad.rows import Rows

FEW = settings(max_examples=150, deadline=None)


@st.composite
def slices(draw, size):
    start = draw(st.integers(0, size - 1))
    stop = draw(st.integers(start + 1, size))
    return slice(start, stop, draw(st.integers(1, 3)))


@st.composite
def views(draw):
    """A parameter and a matrix that shows a part of it."""
    ndim = draw(st.integers(2, 3))
    shape = [draw(st.integers(1, 6)) for _ in range(ndim)]
    p = torch.arange(float(torch.Size(shape).numel())).view(shape)
    keys = [draw(slices(k)) for k in shape]
    if ndim == 3:
        keys[draw(st.integers(0, 2))] = draw(st.integers(0, min(shape) - 1))
    view = p[tuple(keys)]
    return p, view.T if draw(st.booleans()) else view


@FEW
@given(views())
def test_a_region_is_what_the_view_shows(pair):
    p, view = pair
    found = region_of(view, p)
    assert found is not None
    region, flipped = found
    shown = view.T if flipped else view
    assert torch.equal(region.of(p), shown)
    assert region.end <= p.numel()
    index = torch.arange(p.numel())
    row, col, here = region.entries(index)
    assert here.sum() == shown.numel()
    assert torch.equal(shown[row, col][here], p.reshape(-1)[here])
    inside = torch.zeros(p.numel(), dtype=torch.bool)
    inside[shown.reshape(-1).long()] = True
    assert torch.equal(here, inside)


@FEW
@given(st.data())
def test_disjoint_regions_share_nothing(data):
    rows, cols = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    p = torch.arange(float(rows * cols)).view(rows, cols)
    parts = []
    for _ in range(2):
        view = p[data.draw(slices(rows)), data.draw(slices(cols))]
        parts.append((region_of(view, p)[0], set(view.reshape(-1).tolist())))
    (a, one), (b, two) = parts
    if a.disjoint(b):
        assert not one & two
    assert a.disjoint(b) == b.disjoint(a)


def test_stripes_rows_and_experts_are_known_to_be_disjoint():
    p = torch.zeros(6, 8)
    stripes = [region_of(p[:, c : c + 2], p)[0] for c in range(0, 8, 2)]
    halves = [region_of(h, p)[0] for h in p.chunk(2)]
    experts = torch.zeros(3, 4, 5)
    of_experts = [region_of(e.T, experts)[0] for e in experts]
    for group in (stripes, halves, of_experts):
        for i, a in enumerate(group):
            assert [a.disjoint(b) for b in group] == [j != i for j in range(len(group))]
    assert not stripes[0].disjoint(halves[0])
    assert not whole(6, 8).disjoint(stripes[3])


def test_what_is_no_view_has_no_region():
    p = torch.zeros(4, 4)
    for other in (p + 1, p[:1].expand(3, 4), p.T.contiguous(), p.view(2, 2, 4), p.double(),
                  p[:0], torch.zeros(8, 4)[4:]):  # fmt: skip
        assert region_of(other, p) is None
    assert region_of(p.as_strided((3, 3), (1, 1)), p) is None  # elements shown more than once
    assert region_of(p[0], p) is None
    assert region_of(p, p.T) is None  # the parameter itself is laid out otherwise
    assert region_of(p, p) == (Region(0, 4, 4, 4, 1), False)


@FEW
@given(st.lists(st.integers(-1, 4), max_size=12), st.integers(1, 3))
def test_rows_of_owners(owner, features):
    n = 5
    rows = Rows.of(torch.tensor(owner, dtype=torch.int64), n)
    matrix = torch.randn(len(owner), features, dtype=torch.float64)
    want = torch.zeros(n, features, dtype=torch.float64)
    for j, row in zip(owner, matrix, strict=True):
        if j >= 0:
            want[j] += row
    torch.testing.assert_close(rows.sums(matrix), want)
    ordered = rows.ordered(matrix)
    assert rows.offsets[-1] == len(ordered) == sum(j >= 0 for j in owner)
    for j, part in enumerate(rows.parts()):
        own = [i for i, o in enumerate(owner) if o == j]
        torch.testing.assert_close(ordered[part], matrix[own])
    rest = [i for i, o in enumerate(owner) if o < 0]
    assert ([] if rows.rest is None else sorted(rows.rest.tolist())) == rest


def test_uniform_rows_equal_rows_of_owners():
    uniform, other = Rows.uniform(3, 4), Rows.of(torch.arange(3).repeat_interleave(4), 3)
    assert torch.equal(uniform.offsets, other.offsets)
    assert uniform.per_example == other.per_example == 4
    assert uniform.order is other.order is None


KEYS = [
    (slice(None), 1),
    (slice(1, 3),),
    1,
    (Ellipsis, 0),
    (None, slice(None), None, 2),
    torch.tensor([3, 0, 0]),
    (slice(None), torch.tensor([2, 1])),
    (torch.tensor([1, 2]), torch.tensor([0, 2])),
    torch.tensor([True, False, True, True]),
    torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) > 0.4,
    (torch.tensor([0, 3]), slice(None), torch.tensor([4, 1])),
    ([0, 2],),
    (slice(None), slice(None, None, 2), [1, 1, 0]),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 3, 1), (4, 3, 1), (4, 3, 5), (1, 1, 1)], ids=str)
def test_owners_are_picked_as_the_tensor_was(key, shape):
    x = torch.arange(60).view(4, 3, 5)
    owner = torch.arange(torch.Size(shape).numel()).view(shape)
    want, got = owner.expand(x.shape)[key], picked(x, owner, key)
    assert got.ndim == x[key].ndim
    assert torch.equal(got.expand(want.shape), want)


N = 3
MOVES = {
    "transpose": lambda x: x.transpose(0, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "T": lambda x: x.mT,
    "movedim": lambda x: x.movedim(0, 1),
    "flatten": lambda x: x.flatten(0, 1),
    "view": lambda x: x.view(x.shape[0], -1),
    "unflatten": lambda x: x.unflatten(0, (-1, 2)),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "unbind": lambda x: x.unbind(1)[0],
    "rows": lambda x: x[[4, 0, 1]],
    "mask": lambda x: x[torch.tensor([True, False, True, True, False, True])],
    "select": lambda x: x[2],
    "repeat": lambda x: x.repeat_interleave(2, 0),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "roll all": lambda x: x.roll(16),
    "roll two": lambda x: x.roll((1, 2), (0, 1)),
    "roll by name": lambda x: x.roll(shifts=-1, dims=0),
    "flip two": lambda x: x.flip((0, 2)),
    "flip others": lambda x: x.flip(1, 2),
    "repeat others": lambda x: x.repeat_interleave(2, dim=1),
    "repeats": lambda x: x.repeat_interleave(torch.tensor([1, 0, 2, 1, 1, 3]), 0),
    "roll others": lambda x: x.roll((1, 1), (1, 2)),
    "index_select": lambda x: x.index_select(0, torch.tensor([5, 5, 0])),
    "cat": lambda x: torch.cat([x, x.flip(0)]),
    "cat others": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x[4], x[0]]),
    "mean": lambda x: x.mean(1),
    "kept": lambda x: x.sum(2, keepdim=True),
    "product": lambda x: x @ torch.ones(4, 2, dtype=x.dtype),
    "first factor": lambda x: torch.ones(2, 4, dtype=x.dtype) @ x,
    "einsum": lambda x: torch.einsum("ntd,de->nte", x, torch.ones(4, 2, dtype=x.dtype)),
    "sorted": lambda x: x[:, 0, 0].sort(descending=True)[0],
    "embedding": lambda x: torch.nn.functional.embedding(x.long(), torch.eye(24).double()),
    "softmax": lambda x: (x * 1.0).softmax(-1),
}


class Following(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        propagate(func, args, kwargs or {}, out, 1, N)
        return out


@pytest.mark.parametrize("explicit", [False, True], ids=["uniform", "explicit"])
@pytest.mark.parametrize("name", MOVES)
def test_marks_follow_the_data(name, explicit):
    """Every element carries its example's number; where the mark is kept it must say the same."""
    number = torch.arange(N).repeat_interleave(2)  # two rows of each example
    number = number[torch.tensor([3, 0, 5, 1, 2, 4])] if explicit else number
    x = number.view(6, 1, 1).expand(6, 4, 4).contiguous().double()
    mark(x, 1, Mark(-1, number.view(6, 1, 1)) if explicit else Mark(0))
    with Following():
        out = MOVES[name](x)
    found = marked(out, 1)
    assert found is not None
    assert found.owned, "the mark was lost"
    owner = found.explicit(out, N)
    assert owner.ndim == out.ndim
    example = out
    if name in ("first factor", "product", "einsum", "kept"):
        example = out / 4  # sums of four equal numbers
    if name == "embedding":
        example = out.argmax(-1, keepdim=True).expand(out.shape)
    if name == "softmax":
        example = x
    assert torch.equal(owner.expand(out.shape).double(), example.double())


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.mean(0),
        lambda x: x[0, 0].clone() @ x[1].T,
        lambda x: x.flatten(),
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda x: x.unique(),
        lambda x: torch.tensordot(x, x, ([0], [0])),
    ],
)
def test_marks_are_lost_rather_than_wrong(move):
    number = torch.arange(N).repeat_interleave(2)
    x = number.view(6, 1, 1).expand(6, 4, 4).contiguous().double()
    mark(x, 1, Mark(0))
    with Following():
        out = move(x)
    found = marked(out, 1) or NOBODY
    if found.owned:
        owner = found.explicit(out, N).expand(out.shape)
        assert torch.equal(owner.double(), out.double())


def test_rows_written_back_must_be_their_owners():
    number = torch.arange(N).repeat_interleave(2)
    for rows, fits in (([4, 0], True), ([0, 4], False)):
        x, zeros, fresh = torch.randn(6, 4), torch.zeros(6, 4), torch.zeros(6, 4)
        mark(x, 1, Mark(0))
        mark(zeros, 1, Mark(0))
        with Following():
            own = x[torch.tensor([4, 0])]
            zeros.index_add_(0, torch.tensor(rows), own)
            fresh[torch.tensor(rows)] = own
        assert marked(zeros, 1).owned == fits
        there = marked(fresh, 1).explicit(fresh, N).reshape(-1)
        assert there.tolist() == [-1 if i not in rows else int(number[[4, 0][rows.index(i)]])
                                  for i in range(6)]  # fmt: skip


@pytest.mark.slow
def test_no_function_of_pytorch_is_misunderstood():
    """Every function that PyTorch's own tests have inputs for: what the marks say of its results
    is compared with what changes when one example does."""
    pytest.importorskip("expecttest")
    done = subprocess.run(
        [sys.executable, "-m", "tests.attribution_oracle", "2"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
