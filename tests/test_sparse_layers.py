"""The backward pass of partial training: right for every reader, and no more than is needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import fastgrad as fg
from fastgrad.blocks import BlockGrid
from fastgrad.identity import model_parameters
from fastgrad.packed import PackedBlocks
from fastgrad.partial import make_partial
from fastgrad.sparse_layers import SparseRows, linear
from fastgrad_kernels import sparse_wgrad_cpu
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import selection_of


class Largest(TorchDispatchMode):
    """Largest new tensor of a pass, in elements, and the operator that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = (0, "")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    size = storage.nbytes() // tensor.element_size()
                    self.largest = max(self.largest, (size, str(func)))
        return out


def check(model, run, spec, share=0.5, names=None, seed=0, dense_limit=None):
    """Packed gradients equal the dense ones; returns the Partial.

    ``run(model)`` is a scalar loss. ``dense_limit``: no tensor of the backward pass may have as
    many elements.
    """
    loss = run(model)
    loss.backward()
    grads = {n: p.grad for n, p in model_parameters(model).items()}
    partial = make_partial(model, selection_of(model, spec, share, seed, names))
    mine = run(model)
    torch.testing.assert_close(mine, loss)
    with Largest() as made:
        mine.backward()
    packed = {b.name: b for b in partial.packed}
    moved = 0.0
    for name, p in partial.named_parameters():
        want = packed[name].gather(grads[name]) if name in packed else grads[name]
        torch.testing.assert_close(p.grad, want, msg=lambda m, n=name: f"{n}: {m}")
        moved += float(want.abs().max()) if name in packed else 0
    assert moved > 0
    if dense_limit is not None:
        assert made.largest[0] < dense_limit, made.largest
    return partial


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("spec", ["row", "7x*", "column", "*x5", "3x4", "16x16", "20x33", "64x*"])
def test_blocks_of_every_shape_equal_the_dense_gradient(spec, share, transposed):
    """Tiles with a product of their own and tiles without, runs of them, ragged edges."""
    torch.manual_seed(0)
    model = Conv1D(100, 70) if transposed else nn.Linear(70, 100)
    x = torch.randn(3, 6, 70, dtype=torch.float64)
    check(model.double(), lambda m: m(x).square().sum(), spec, share=share, names=["weight"])


@pytest.mark.parametrize("spec", ["row", "8x*", "column", "16x16", "3x4"])
def test_blocks_may_come_in_any_order(spec):
    torch.manual_seed(0)
    grid = BlockGrid.of((40, 48), spec)
    weight, x = nn.Parameter(torch.randn(40, 48)), torch.randn(6, 48)
    ids = torch.randperm(grid.n_blocks)[: max(2, grid.n_blocks // 2)]
    blocks = PackedBlocks("w", weight, grid, ids, torch.float32)
    linear(x, weight, blocks.packed, None, blocks).square().sum().backward()
    F.linear(x, weight).square().sum().backward()
    torch.testing.assert_close(blocks.packed.grad, blocks.gather(weight.grad))
    found = blocks.packed.grad.clone()
    blocks.packed.grad = None
    index = torch.randint(0, 40, (30,))
    SparseRows.apply(blocks.packed, index, weight, blocks, None).square().sum().backward()
    weight.grad = None
    weight[index].square().sum().backward()
    torch.testing.assert_close(blocks.packed.grad, blocks.gather(weight.grad))
    assert not torch.equal(found, blocks.packed.grad)


@pytest.mark.parametrize("part", [1, 2000])
def test_small_tiles_are_formed_in_bounded_parts(part, monkeypatch):
    monkeypatch.setattr(sparse_wgrad_cpu, "PART", part)
    torch.manual_seed(0)
    model, x = nn.Linear(70, 100).double(), torch.randn(6, 70, dtype=torch.float64)
    run = lambda m: m(x).square().sum()  # noqa: E731
    limit = 4000 if part > 1 else 1200  # of 7000: what is selected, one part, one factor
    check(model, run, "3x4", share=0.1, names=["weight"], dense_limit=limit)


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    "1d-unbatched": (lambda: nn.Conv1d(6, 8, 3, dilation=2), (6, 9)),
    "1d-same-uneven": (lambda: nn.Conv1d(6, 8, 4, padding="same"), (2, 6, 9)),
    "2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=(1, 0)), (2, 6, 7, 8)),
    "2d-no-bias": (lambda: nn.Conv2d(6, 8, (1, 3), bias=False, padding="valid"), (2, 6, 7, 8)),
    "2d-circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 5, 5)),
    "2d-same": (lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2), (2, 6, 7, 8)),
    "2d-groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 5)),
    "2d-depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5)),
    "2d-channels-last": (
        lambda: nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last),
        (2, 6, 5, 5),
    ),
    "3d": (lambda: nn.Conv3d(4, 6, 2, padding=1), (2, 4, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2), (2, 6, 4, 4)),
}


@pytest.mark.parametrize("spec", ["row", "3x*", "column", "4x7"])
@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
def test_convolutions_equal_the_dense_gradient(kind, spec):
    torch.manual_seed(0)
    build, shape = CONVOLUTIONS[kind]
    model = build().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = []

    def run(m):
        x.grad = None
        inputs.append(x.detach().clone().requires_grad_())
        return m(inputs[-1]).square().sum()

    check(model, run, spec)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_forms_the_selected_channels_only(groups):
    model = nn.Conv2d(16, 64, 3, groups=groups, bias=False)
    x = torch.randn(1, 16, 4, 4)
    # 64 channels, the first 4 selected: with groups, the first group's 16 are formed
    selection = selection_of(model, "4x*")
    selection = fg.Selection(selection.shapes, "4x*", {"weight": [0]})
    make_partial(model, selection)
    loss = model(x).sum()
    with Largest() as made:
        loss.backward()
    assert made.largest[0] < model.weight.numel() // 3


class Recurrent(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.rnn = cls(5, 6, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


OTHERS = {
    "lstm": (lambda: Recurrent(nn.LSTM), (2, 4, 5)),
    "gru": (lambda: Recurrent(nn.GRU), (2, 4, 5)),
    "gru-cell": (lambda: nn.GRUCell(5, 6), (3, 5)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (2, 5, 8)),
    "bilinear": (lambda: nn.Sequential(nn.Linear(6, 6), Squared(nn.Bilinear(6, 6, 4))), (3, 6)),
    "weight-norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), (3, 6)),
    "weight-norm-old": (lambda: old_weight_norm(nn.Linear(6, 4)), (3, 6)),
    "spectral-norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)).eval(),
        (3, 6),
    ),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.3), (3, 6)),
}


class Squared(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x)


def old_weight_norm(module):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


@pytest.mark.parametrize("spec", ["row", "column", "3x4"])
@pytest.mark.parametrize("kind", list(OTHERS))
def test_other_modules_train_through_the_overlay(kind, spec):
    torch.manual_seed(0)
    build, shape = OTHERS[kind]
    x = torch.randn(shape)
    model = build()
    check(model, lambda m: m(x).square().sum(), spec)


class Readers(nn.Module):
    """Functions that read an embedding's weight as an output layer."""

    def __init__(self, how):
        super().__init__()
        self.e, self.how = nn.Embedding(40, 8, padding_idx=3), how

    def forward(self, ids):
        h, w = self.e(ids).tanh(), self.e.weight
        return {
            "linear": lambda: F.linear(h, w),
            "matmul": lambda: h @ w.T,
            "mT": lambda: torch.matmul(h, w.mT),
            "transpose": lambda: h @ w.transpose(1, 0),
            "mm": lambda: torch.mm(h.flatten(0, 1), w.t()),
            "addmm": lambda: torch.addmm(h.new_ones(40), h.flatten(0, 1), w.t()),
            "linear-of-transposed": lambda: F.linear(h @ w.T, w.T),
            "embedding": lambda: F.embedding(ids, w, padding_idx=-37) * h,
            "index": lambda: w[ids] * h,
            "negative-index": lambda: w[ids - 40] * h,
        }[self.how]()


READERS = ["linear", "matmul", "mT", "transpose", "mm", "addmm", "linear-of-transposed",
           "embedding", "index", "negative-index"]  # fmt: skip


@pytest.mark.parametrize("spec", ["row", "4x*", "column", "7x4"])
@pytest.mark.parametrize("how", READERS)
def test_a_weight_that_others_read_forms_no_dense_gradient(how, spec):
    torch.manual_seed(0)
    ids = torch.tensor([[3, 5, 7], [39, 0, 3]])
    if how in ("embedding", "index", "negative-index"):
        ids = torch.cat([torch.arange(20), torch.arange(4)]).view(2, 12)
    model = Readers(how).double()
    # Nothing but the weight's own gradient has 320 elements: logits of 6 tokens have 240, and
    # looked-up rows of 24 tokens 192.
    limit = 320 if how != "linear-of-transposed" and spec != "column" else None
    check(model, lambda m: m(ids).square().sum(), spec, share=0.3, seed=1, dense_limit=limit)


def test_any_other_function_gets_the_dense_overlay():
    torch.manual_seed(0)
    ids = torch.tensor([[3, 5, 7], [39, 0, 3]])

    def run(m):
        w = m.e.weight
        parts = [w[:4].sum(), w.mean(), torch.cat([w, w]).square().sum(), (w * 2).std(), w[2, 1]]
        return m(ids).square().sum() + sum(parts) + w[w > 0].sum() + torch.stack([*w]).sum()

    check(Readers("linear").double(), run, "3x4")


@pytest.mark.parametrize("spec", ["row", "8x8"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_tied_output_layers_form_no_dense_gradient(name, spec):
    """The largest gradient of a small language model is that of its vocabulary."""
    model = randomised(MODELS[name])
    tied = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is tied
    names = [n for n, p in model_parameters(model).items() if p is tied]
    batch = batch_of(n=2, tokens=6)
    limit = tied.numel()  # activations are smaller: 12 tokens, width 32, 61 words, 48 inside
    partial = check(
        model, lambda m: m(**batch).loss, spec, share=0.2, names=names, dense_limit=limit
    )
    assert len(partial.packed) == 1
