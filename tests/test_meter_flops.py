"""Operations of a step: fastgrad's own operators, attention, and what is named as not counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastgrad as fg
from fastgrad_kernels import ops
from tests.meters import plain
from tests.models import batch_of, llama, randomised


def counted(function, **options):
    meter = plain(flops="every", **options)
    with meter.step():
        function()
    return meter.spent["flops"], meter.modes["flops"]


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_a_sparse_backward_pass_costs_its_blocks(fraction):
    rows, width, out, tokens = 2, 32, 64, 8
    model = nn.Linear(width, out, bias=False)
    x = torch.randn(rows, tokens, width, requires_grad=True)
    n = round(fraction * out)
    selection = fg.Selection({"weight": (out, width)}, "row", {"weight": list(range(n))})
    partial = fg.make_partial(model, selection)
    optimizer = fg.SparseAdamW(partial.parameters())

    def step():
        model(x).square().sum().backward()
        optimizer.step()

    product = 2 * rows * tokens * width
    flops, mode = counted(step)
    assert flops == product * (out + out + n)  # forward, to the input, selected rows alone
    assert "the optimizer's among them, are not counted" in mode
    assert "not counted: " not in mode


def test_a_partial_step_is_what_the_plan_says():
    torch.manual_seed(0)
    model = randomised(lambda: llama(attn_implementation="eager", layers=1))
    batch = batch_of(n=2)
    with fg.Probe(model, blocks="16x16") as probe:
        model(**batch).loss.backward()
    model.zero_grad()
    selection = fg.select(probe.stats(), model=model, fraction=0.2)
    shape = tuple(batch["input_ids"].shape)
    plan = fg.plan_flops(model, selection, batch_shape=shape)
    partial = fg.make_partial(model, selection)
    optimizer = fg.SparseAdamW(partial.parameters())

    def step():
        model(**batch).loss.backward()
        optimizer.step()

    flops, _ = counted(step)
    assert flops == sum(v for name, v in plan.terms.items() if name != "optimizer")


def test_experts_cost_the_tokens_that_they_had():
    left, right = torch.randn(10, 6), torch.randn(10, 4)
    offsets, ids = torch.tensor([0, 7, 7, 10]), torch.tensor([0, 1])
    flops, _ = counted(lambda: ops.expert_wgrad(left, right, offsets, ids))
    assert flops == 2 * 7 * 6 * 4
    packed = torch.zeros(1, 6, 4)
    flops, _ = counted(
        lambda: ops.expert_wgrad_add_(packed, left, right, offsets, torch.tensor([2]))
    )
    assert flops == 2 * 3 * 6 * 4


def test_attention_costs_the_same_however_it_is_computed():
    query, key, value = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3))

    def fused():
        F.scaled_dot_product_attention(query, key, value).sum().backward()

    with FlopCounterMode(display=False) as unaware:
        fused()
    flops, mode = counted(fused)
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert flops == 7 * product  # two forward; the scores once more, and four gradients
    assert flops > unaware.get_total_flops()  # PyTorch has no formula for it on a CPU
    assert "not counted: " not in mode


def test_products_by_group_and_with_a_vector():
    left = torch.randn(16, 8, dtype=torch.bfloat16)
    right = torch.randn(2, 8, 8, dtype=torch.bfloat16)
    offsets = torch.tensor([4, 16], dtype=torch.int32)
    flops, _ = counted(lambda: F.grouped_mm(left, right, offs=offsets))
    assert flops == 2 * 16 * 8 * 8
    matrix, vector = torch.randn(5, 7), torch.randn(7)
    assert counted(lambda: matrix @ vector)[0] == 70
    assert counted(lambda: vector @ vector)[0] == 14


def test_what_nobody_can_count_is_named():
    @torch.library.custom_op("fastgrad_test_meter::product", mutates_args=())
    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    x = torch.eye(4)
    flops, mode = counted(lambda: product(x))
    assert flops == 0
    assert "; not counted: fastgrad_test_meter::product" in mode
    _, mode = counted(lambda: torch.linalg.qr(x))
    assert "not counted: linalg_qr" in mode


def test_first_counts_once_and_again_when_asked():
    meter = plain(flops="first")
    for size in (4, 8):
        for _ in range(2):
            with meter.step():
                torch.ones(size, size) @ torch.ones(size, size)
        if size == 4:
            assert meter.spent["flops"] == 2 * 128
            meter.recount()
    assert meter.spent["flops"] == 2 * 128 + 2 * 1024


def test_a_resumed_run_counts_its_own_first_step(tmp_path):
    meter = plain(flops="first")
    with meter.step():
        torch.ones(4, 4) @ torch.ones(4, 4)
    meter.save(tmp_path / "m.json")
    again = fg.Meter.load(tmp_path / "m.json")
    with again.step():  # batches of another shape
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert again.spent["flops"] == 128 + 1024


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_compiled_model_is_counted_and_compiled_all_the_same():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = torch.compile(nn.Linear(8, 8, bias=False), backend=backend)
    meter = plain(flops="first")
    for step in range(3):
        with meter.step():
            model(torch.ones(4, 8)).sum().backward()
        assert len(graphs) == (step > 0)
    assert meter.spent["flops"] == 3 * 2 * (2 * 4 * 8 * 8)
