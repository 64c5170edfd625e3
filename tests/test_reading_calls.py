"""Every way to write a call that reads a weight of which blocks are trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgrad as fg


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(6, 4, generator=g))
        self.kernel = nn.Parameter(torch.randn(5, 3, 3, generator=g))
        self.experts = nn.Parameter(torch.randn(3, 8, 8, generator=g))


def given():
    g = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(3, 6, generator=g), "y": torch.randn(3, 4, generator=g),
        "z": torch.randn(2, 3, 9, generator=g), "t": torch.randn(5, 8, generator=g),
        "b": torch.randn(4, generator=g), "ids": torch.tensor([1, 5, 1]),
        "offs": torch.tensor([2, 4, 5], dtype=torch.int32),
    }  # fmt: skip


# call -> the autograd function that computes selected blocks alone, or None for a dense gradient
CALLS = {
    "mm mat2": (lambda m, i: torch.mm(i["x"], mat2=m.matrix), "SparseLinear"),
    "mm all names": (lambda m, i: torch.mm(input=i["x"], mat2=m.matrix), "SparseLinear"),
    "Tensor.mm mat2": (lambda m, i: i["x"].mm(mat2=m.matrix), "SparseLinear"),
    "matmul names": (lambda m, i: torch.matmul(input=i["x"], other=m.matrix), "SparseLinear"),
    "Tensor.matmul other": (lambda m, i: i["x"].matmul(other=m.matrix), "SparseLinear"),
    "transpose names": (
        lambda m, i: i["y"] @ torch.transpose(input=m.matrix, dim0=0, dim1=1), "SparseLinear"
    ),
    "transpose from the end": (
        lambda m, i: i["y"] @ m.matrix.transpose(dim0=-1, dim1=-2), "SparseLinear"
    ),
    "t input": (lambda m, i: i["y"] @ torch.t(input=m.matrix), "SparseLinear"),
    "linear names": (lambda m, i: F.linear(input=i["y"], weight=m.matrix), "SparseLinear"),
    "linear bias name": (
        lambda m, i: F.linear(weight=m.matrix, input=i["y"], bias=None), "SparseLinear"
    ),
    "embedding names": (lambda m, i: F.embedding(input=i["ids"], weight=m.matrix), "SparseRows"),
    "addmm names": (
        lambda m, i: torch.addmm(input=i["b"], mat1=i["x"], mat2=m.matrix), "SparseLinear"
    ),
    "addmm scaled": (lambda m, i: torch.addmm(i["b"], i["x"], m.matrix, alpha=2), None),
    "conv names": (
        lambda m, i: torch.conv1d(input=i["z"], weight=m.kernel, bias=None), "SparseConv"
    ),
    "grouped names": (
        lambda m, i: torch._grouped_mm(input=i["t"], mat2=m.experts, offs=i["offs"]),
        "SparseGroupedMM",
    ),
    "grouped by position": (
        lambda m, i: torch._grouped_mm(i["t"], m.experts, i["offs"]), "SparseGroupedMM"
    ),
    "out_dtype": (lambda m, i: i["x"] @ m.matrix.to(dtype=torch.float32), None),
}  # fmt: skip


def selected(model):
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    blocks = {"matrix": np.array([1, 5]), "kernel": np.array([0, 3]), "experts": np.array([2])}
    specs = {"matrix": "row", "kernel": "row", "experts": "expert"}
    return fg.Selection(shapes, "row", blocks, specs=specs)


@pytest.mark.parametrize("call", CALLS)
def test_each_form_of_a_call_gives_the_gradient_of_the_selected_blocks(call):
    run, kind = CALLS[call]
    plain, model = Weights(), Weights()
    expected = run(plain, given())
    expected.square().sum().backward()
    partial = fg.make_partial(model, selected(model))
    out = run(model, given())
    torch.testing.assert_close(out, expected)
    assert kind is None or out.grad_fn.name() == f"{kind}Backward"
    out.square().sum().backward()
    seen = 0
    for blocks in partial.packed:
        want = dict(plain.named_parameters())[blocks.name].grad
        if want is None:
            assert blocks.packed.grad is None
            continue
        seen += 1
        torch.testing.assert_close(blocks.packed.grad, blocks.gather(want))
    assert seen == 1


def test_calls_that_pytorch_refuses_are_refused_in_its_words():
    model, i = Weights(), given()
    plain = Weights()
    fg.make_partial(model, selected(model))
    for wrong in (
        lambda m: torch.mm(torch.ones(2, 3, 6), m.matrix),
        lambda m: torch.mm(i["x"], mat3=m.matrix),
        lambda m: m.matrix.transpose(0, 5),
        lambda m: torch.mm(i["x"], m.matrix, out_dtype=torch.float32),  # for CUDA alone
    ):
        messages = []
        for m in (plain, model):
            with pytest.raises((RuntimeError, TypeError, IndexError, NotImplementedError)) as error:
                wrong(m)
            messages.append((type(error.value), str(error.value)))
        assert messages[0] == messages[1]
