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
