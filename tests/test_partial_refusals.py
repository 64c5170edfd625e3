"""What cannot be trained in part is refused by name before anything changes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.errors import PartialError, ProbeError, SelectionError


def whole(model, *names):
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return fg.Selection(shapes, "module", {n: np.array([0]) for n in names})


def test_a_model_whose_trained_parameters_are_all_whole_is_partial_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    partial = fg.make_partial(model, whole(model, "0.weight"))
    with pytest.raises(PartialError, match="partial already"):
        fg.make_partial(model, whole(model, "1.weight"))
    partial.remove()
    assert all(p.requires_grad for p in model.parameters())
    fg.make_partial(model, whole(model, "1.weight")).remove()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor")
def test_sparse_layouts_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = nn.Parameter(model[1].weight.detach().to_sparse_csr())
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SelectionError, match=r"1\.weight .*sparse_csr.*exclude"):
        fg.make_partial(model, whole(model, "1.weight"), hash_base=False)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_quantised_tensor_subclasses_are_refused_by_name():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantization.quantize_(model[1], quantization.Int8WeightOnlyConfig())
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SelectionError, match=r"1\.weight is a .*Tensor.*exclude"):
        fg.make_partial(
            model, whole(model, "1.weight"), master_dtype=torch.float64, hash_base=False
        )
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_probe_on_a_partial_model_names_suspended():
    model = nn.Sequential(nn.Linear(4, 4))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    partial = fg.make_partial(model, fg.Selection(shapes, "row", {"0.weight": np.array([1])}))
    with pytest.raises(ProbeError, match="suspended"):
        fg.Probe(model)
    with partial.suspended() as plain:
        fg.Probe(plain)


def test_a_partial_recurrent_layer_is_pickled():
    model = nn.LSTM(3, 4)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    rows = {"weight_ih_l0": np.array([1, 5])}
    fg.make_partial(model, fg.Selection(shapes, "row", rows))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(2, 1, 3)
    assert torch.equal(model(x)[0], again(x)[0])
    model(x)[0].sum().backward()
    again(x)[0].sum().backward()
    grads = [[p.grad for n, p in m.named_parameters() if p.requires_grad] for m in (model, again)]
    assert len(grads[0]) == len(grads[1]) == 1
    assert torch.equal(grads[0][0], grads[1][0])


def rows_of(model, name, rows):
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return fg.make_partial(model, fg.Selection(shapes, "row", {name: np.array(rows)}))


def test_a_weight_that_is_exchanged_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    partial = rows_of(model, "0.weight", [1])
    old = model[0].weight
    with pytest.raises(PartialError, match=r"0\.weight was given another tensor"):
        model[0].weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    assert torch.equal(model[0].weight, old)
    state = {n: torch.ones_like(p) for n, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert torch.equal(next(partial.parameters()), torch.ones(1, 1, 4))


def test_no_ids_no_gradient():
    model = nn.Sequential(nn.Embedding(8, 4))
    partial = rows_of(model, "0.weight", [1, 3])
    model(torch.zeros(0, dtype=torch.long)).sum().backward()
    (packed,) = partial.parameters()
    assert torch.equal(packed.grad, torch.zeros(2, 1, 4))


def test_an_embedding_with_sparse_gradients_trains_its_blocks():
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True))
    partial = rows_of(model, "0.weight", [1, 3])
    model(torch.tensor([1, 1, 5])).sum().backward()
    (packed,) = partial.parameters()
    assert torch.equal(packed.grad, torch.tensor([2.0, 0.0]).view(2, 1, 1).expand(2, 1, 4))


def test_other_readers_see_packed_values_without_gradients():
    model = nn.Sequential(nn.Embedding(8, 4))
    (packed,) = rows_of(model, "0.weight", [1]).parameters()
    with torch.no_grad():
        packed.fill_(7.0)
        assert torch.equal(nn.functional.linear(torch.ones(1, 4), model[0].weight)[0, 1],
                           torch.tensor(28.0))  # fmt: skip


def test_weights_assigned_while_suspended_stay_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    partial = rows_of(model, "0.weight", [1])
    with partial.suspended() as plain:
        plain.load_state_dict({n: p.clone() for n, p in plain.state_dict().items()}, assign=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 1
    assert "packed" in trained[0]


@pytest.mark.parametrize("make", [torch.optim.AdamW, fg.SparseAdamW])
def test_experts_that_ran_before_the_trained_one_are_kept_during_updates(make):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, 5))

        def forward(self, x):
            return sum((x * 1.0) @ self.w[e] for e in range(4))

    model = Experts()
    shapes = {"w": (4, 3, 5)}
    partial = fg.make_partial(model, fg.Selection(shapes, "expert", {"w": np.array([3])}))
    fg.step_in_backward(make(partial.parameters(), lr=0.1))
    x, before = torch.randn(2, 3, requires_grad=True), model.w.detach().clone()
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, before.sum(0).sum(1).expand(2, 3))
    after = model.w.detach()
    assert torch.equal(after[:3], before[:3])
    assert not torch.equal(after[3], before[3])
