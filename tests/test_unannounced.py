"""Parameters that a custom autograd function reads besides a tap, and sparse gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgrad as fg
from fastgrad.errors import CoverageError


class Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return weight[ids].clone()

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        found = grad.new_zeros(ctx.shape)
        return found.index_add_(0, ids.reshape(-1), grad.reshape(-1, grad.shape[-1])), None


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


product = Product.apply  # as libraries of kernels keep theirs


class Hidden(nn.Module):
    """A table looked up twice, once where no function mode sees it: at rows so few that the
    self-check's sample hardly ever meets them."""

    def __init__(self, read, rows=20_000):
        super().__init__()
        self.read = read
        self.table = nn.Embedding(rows, 32)
        self.head = nn.Linear(32, 32, bias=False)

    def forward(self, ids):
        other = (ids * 31 + 7) % self.table.num_embeddings
        x = self.table(ids)
        return self.head(self.read(self, x, other))


READS = {
    "directly": lambda m, x, ids: x + Take.apply(m.table.weight, ids),
    "a view": lambda m, x, ids: x + Take.apply(m.table.weight[:15_000].view(-1, 32), ids % 15_000),
    "prepared": lambda m, x, ids: x + Take.apply(1 + m.table.weight.to(torch.float64), ids).float(),
    "one in another": lambda m, x, ids: x + Twice.apply(Take.apply(m.table.weight, ids)),
    "kept": lambda m, x, ids: x + product(x[..., :1].expand_as(x), m.table.weight[:32]),
}
NOTHING_HIDDEN = {
    "activations": lambda m, x, ids: x + Twice.apply(x),
    "of rows looked up": lambda m, x, ids: x + Twice.apply(m.table(ids)),
    "of another's product": lambda m, x, ids: x + Twice.apply(m.head(x)),
    "frozen": lambda m, x, ids: x + product(x, torch.ones(32, 32)),
}


def measured(model, n=4, **options):
    torch.manual_seed(1)
    ids = torch.randint(0, model.table.num_embeddings, (n, 6))
    with fg.Probe(model, loss_reduction="row_mean", **options) as probe:
        model(ids).square().mean().backward()
    return probe.stats(), ids


@pytest.mark.parametrize("read", READS)
def test_a_custom_function_that_reads_a_parameter_is_named(read):
    stats, _ = measured(Hidden(READS[read]))
    coverage = stats.coverage["table.weight"]
    assert coverage.status == "missing"
    assert ("Product" if read == "kept" else "Take") in coverage.reason
    assert stats.coverage["head.weight"].status == "exact"


@pytest.mark.parametrize("read", NOTHING_HIDDEN)
def test_a_custom_function_of_activations_takes_nothing_away(read):
    stats, ids = measured(model := Hidden(NOTHING_HIDDEN[read], 50), strict=True)
    for j in range(4):
        model.zero_grad()
        (model(ids[j : j + 1]).square().mean() / 4).backward()
        for i, name in enumerate(stats.names):
            want = float(model.get_parameter(name).grad.norm())
            assert stats.T[i, j] == pytest.approx(want, rel=1e-4)


def test_the_result_of_the_model_and_the_loss_are_looked_at():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.other = nn.Embedding(3000, 16), nn.Embedding(3000, 16)

        def forward(self, ids):  # fused losses read the output layer so
            return product(self.table(ids) + self.other(ids), self.table.weight)

    torch.manual_seed(0)
    ids = torch.randint(0, 3000, (4, 6))
    with fg.Probe(model := Last()) as probe:
        torch.autograd.backward(model(ids).square().mean())
    assert "Product" in probe.stats().coverage["table.weight"].reason
    with fg.Probe(model := Hidden(NOTHING_HIDDEN["activations"])) as probe:
        product(model(ids), model.head.weight).sum().backward()
    assert "Product" in probe.stats().coverage["head.weight"].reason


def test_a_strict_probe_raises_and_a_single_example_is_exact():
    with pytest.raises(CoverageError, match="custom autograd function Take"):
        measured(Hidden(READS["directly"]), strict=True)
    stats, ids = measured(model := Hidden(READS["directly"]), 1)
    model.zero_grad()
    model(ids).square().mean().backward()
    assert stats.coverage["table.weight"].status == "exact"
    assert stats.T[0, 0] == pytest.approx(float(model.table.weight.grad.norm()), rel=1e-5)


# -- sparse gradients --------------------------------------------------------------------------


class Sparse(nn.Module):
    def __init__(self, kind, tied=False):
        super().__init__()
        torch.manual_seed(0)
        bag = nn.EmbeddingBag(40, 8, sparse=True, mode="mean")
        self.table = bag if kind == "bag" else nn.Embedding(40, 8, sparse=True, padding_idx=3)
        self.head = nn.Linear(8, 40, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


@pytest.mark.parametrize("blocks", ["module", "row", "column", "8x4"])
@pytest.mark.parametrize(("kind", "tied"), [("table", False), ("table", True), ("bag", False)])
def test_sparse_gradients_are_exact_and_stay_sparse(kind, tied, blocks):
    model = Sparse(kind, tied)
    ids = torch.randint(0, 6, (4, 5), generator=torch.Generator().manual_seed(2))
    target = {"table.weight": torch.randn(40, 8)}
    with fg.Probe(model, blocks, loss_reduction="row_mean", targets=target, l1=True) as probe:
        model(ids).square().mean().backward()
    assert model.table.weight.grad.is_sparse == (not tied)
    stats = probe.stats()
    assert {c.status for c in stats.coverage.values()} == {"exact"}
    grid, row = stats.grid("table.weight"), stats.names.index("table.weight")
    total = model.table.weight.grad.to_dense() if not tied else model.table.weight.grad
    assert stats.grad_norm[row] == pytest.approx(float(total.norm()), rel=1e-5)
    for j in range(4):
        model.zero_grad()
        (model(ids[j : j + 1]).square().mean() / 4).backward()
        alone = model.table.weight.grad
        alone = alone.to_dense() if alone.is_sparse else alone
        assert stats.T[row, j] == pytest.approx(float(alone.norm()), rel=1e-4)
        assert stats.alignment[row, j] == pytest.approx(
            float((alone * target["table.weight"]).sum()), rel=1e-3, abs=1e-7
        )
        each = F.pad(alone, (0, 0)).reshape(
            grid.grid_rows, grid.block_rows, grid.grid_cols, grid.block_cols
        )
        norms = each.square().sum((1, 3)).sqrt().reshape(-1)
        torch.testing.assert_close(
            torch.tensor(stats.blocks("table.weight")[:, j]).float(), norms, rtol=1e-4, atol=1e-7
        )
