"""The plan of operations against what PyTorch counts in the real step."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

import fastgrad as fg
from fastgrad.errors import ResourceError
from fastgrad.flops import FlopPlanner
from fastgrad.resources import ADAMW_FLOPS_PER_PARAM
from tests.models import MODELS, VOCAB, llama, randomised
from tests.test_partial import selection_of

SHAPE = (3, 16)


def mixtral(**kwargs: object) -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=64,
            **kwargs,
        )
    )


def eager_llama() -> nn.Module:
    """Attention scores as products that PyTorch's counter sees."""
    return llama(attn_implementation="eager")


def counted(model, selection):
    if selection is not None:
        fg.make_partial(model, selection)
    ids = torch.randint(3, VOCAB, SHAPE, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "architecture",
    [
        name if name in ("llama", "gpt2") else pytest.param(name, marks=pytest.mark.slow)
        for name in [*MODELS, "eager"]
    ],
)
def test_the_plan_is_what_pytorch_counts(architecture):
    make = MODELS.get(architecture, eager_llama)
    model = randomised(make)
    planner = FlopPlanner(model, SHAPE)
    full = planner.plan()
    assert full.total == full.full_total
    assert full.total - full.terms["optimizer"] == counted(randomised(make), None)
    names = [name for name, _ in model.named_parameters()]
    for spec in ("module", "row", "16x16"):
        for seed in range(2):
            some = sorted(random.Random(seed).sample(names, 5), key=names.index)
            selection = selection_of(model, spec, names=names if seed == 0 else some)
            plan = planner.plan(selection)
            assert plan.total - plan.terms["optimizer"] == counted(randomised(make), selection)
            assert plan.terms["optimizer"] == int(ADAMW_FLOPS_PER_PARAM * selection.n_parameters)
            assert plan.full_terms == full.terms
    assert len(planner._measured) == 0  # all of it followed from a few runs


@pytest.mark.parametrize("spec", ["5x5", *(pytest.param(s, marks=pytest.mark.slow)
                                          for s in ("24x20", "40x*"))])  # fmt: skip
def test_blocks_at_the_edge_and_small_ones(spec):
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    selection = selection_of(randomised(llama), spec, share=0.4, names=names)
    plan = fg.plan_flops(randomised(llama), selection, batch_shape=SHAPE)
    assert plan.total - plan.terms["optimizer"] == counted(randomised(llama), selection)


def test_a_plan_needs_no_data_and_leaves_the_model_alone():
    with torch.device("meta"):
        model = llama()
    classes = [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    selection = selection_of(model, "row", names=["model.layers.1.mlp.up_proj.weight"])
    plan = fg.plan_flops(model, selection, batch_shape=SHAPE)
    assert plan.total - plan.terms["optimizer"] == counted(randomised(llama), selection)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert plan.terms["activation_gradients"] < plan.full_terms["activation_gradients"]
    assert json.loads(json.dumps(plan.to_dict()))["total_flops"] == plan.total
    assert "attention scores" in plan.table()


@pytest.mark.parametrize(
    ("implementation", "spec"),
    [
        ("grouped_mm", "expert"),
        ("eager", "16x16"),
        pytest.param("eager", "expert", marks=pytest.mark.slow),
        pytest.param("grouped_mm", "16x16", marks=pytest.mark.slow),
    ],
)
def test_experts_that_are_chosen_evenly(implementation, spec):
    make = lambda: mixtral(  # noqa: E731
        experts_implementation=implementation, num_experts_per_tok=4  # of 4: even for certain
    )
    selection = selection_of(randomised(make), spec)
    plan = fg.plan_flops(randomised(make), selection, batch_shape=SHAPE)
    assert plan.total - plan.terms["optimizer"] == counted(randomised(make), selection)
    assert ("grouped products" in plan.table()) == (implementation == "grouped_mm")


def test_a_recomputed_forward_pass_is_counted():
    def make():
        model = llama()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    model = randomised(make)
    for spec in ("module", "row"):
        selection = selection_of(model, spec)
        plan = fg.plan_flops(model, selection, batch_shape=SHAPE)
        real = counted(randomised(make), selection)
        assert real > counted(randomised(llama), selection)
        assert plan.total - plan.terms["optimizer"] == real


def test_what_cannot_be_planned_is_refused_by_name():
    model = llama()
    with pytest.raises(ResourceError, match="unknown optimizer 'adamv'"):
        FlopPlanner(model, SHAPE, optimizer="adamv")
    with pytest.raises(ResourceError, match=r"batch_shape is \(rows, tokens\)"):
        fg.plan_flops(model, batch_shape=(3, 0))
    with pytest.raises(ResourceError, match=r"cannot be planned.*Remedy"):
        fg.plan_flops(nn.Linear(2, 2), batch_shape=SHAPE)
