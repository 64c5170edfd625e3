"""Granularity by parameter: patterns, and attention heads that really are heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastgrad.blocks import BlockGrid
from fastgrad.errors import BlockSpecError
from fastgrad.granularity import check_blocks, resolve
from fastgrad.heads import find_heads
from fastgrad.identity import model_parameters
from fastgrad_kernels.layout import block_sums, matrix_view
from tests.models import MODELS, batch_of, llama, randomised
from tests.zoo import ZOO

WITH_HEADS = [n for n, c in ZOO.items() if c.family != "ssm" and n != "convnext"]


# -- patterns ------------------------------------------------------------------------------------


def test_one_granularity_holds_for_all():
    model = llama()
    names = list(model_parameters(model))
    for spec in ("module", "row", "8x8", "4x*"):
        assert resolve(model, spec) == dict.fromkeys(names, spec)
    assert set(resolve(model).values()) == {"module"}
    assert resolve(nn.ReLU(), "row") == {}  # no parameter, but no pattern that missed one either


def test_the_first_pattern_that_matches_counts():
    model = llama()
    found = resolve(model, {"*.0.*": "row", "*.q_proj.weight": "8x*", "*_proj.*": "head"})
    assert found["model.layers.0.self_attn.q_proj.weight"] == "row"
    assert found["model.layers.1.self_attn.q_proj.weight"] == "8x*"
    assert found["model.layers.1.self_attn.o_proj.weight"] == "*x8"
    assert found["model.layers.1.mlp.up_proj.weight"] == "module"  # no head there
    assert found["lm_head.weight"] == "module"  # no pattern
    assert list(found) == list(model_parameters(model))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("heads", "unknown block granularity 'heads'"),
        ({"*": "8x"}, "unknown block granularity '8x'"),
        ({"*.nope.*": "row"}, "'\\*.nope.\\*' matches no parameter; names are like model.embed"),
        ({}, "mapping of name patterns"),
        (None, "mapping of name patterns"),
        ({"*": 8}, "'\\*': 8 is not a name pattern"),
        ({"*norm*": "head"}, "no attention heads.*among model.layers.0.input.*Remedy"),
    ],
)
def test_what_cannot_be_meant_is_refused(blocks, message):
    with pytest.raises(BlockSpecError, match=message):
        resolve(llama(), blocks)


def test_blocks_are_checked_without_a_model():
    for good in ("head", "row", "3x*", {"*": "head", "a": "2x2"}):
        assert check_blocks(good) is good


def test_a_model_without_attention_is_refused():
    with pytest.raises(BlockSpecError, match=r"no attention heads were found in Linear\. Remedy"):
        resolve(nn.Linear(4, 4), "head")
    assert resolve(nn.Linear(4, 4), {"weight": "2x*"}) == {"weight": "2x*", "bias": "module"}


# -- heads ---------------------------------------------------------------------------------------


def _heads(name):
    """Heads, and heads of keys and values, by the name of an attention module."""
    config = ZOO[name].make().config
    if name == "swin":
        return lambda p: (config.num_heads[int(p.split(".")[3])],) * 2
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    return lambda p: (heads, 1 if name == "falcon" else kv)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_what_does_not_flow_through_a_head_gives_it_no_gradient(name):
    """With the first heads' columns of the projection back at zero, exactly their share of the
    stripes of the other projections has no gradient: whatever the layout, a stripe that mixed
    heads would have some."""
    case = ZOO[name]
    model, count = case.make().eval(), _heads(name)
    if name.startswith("olmo"):  # its norms reach over all heads, and so would the gradient
        for module in model.modules():
            if hasattr(module, "q_norm"):
                module.q_norm, module.k_norm = nn.Identity(), nn.Identity()
    specs = find_heads(model).specs
    assert not find_heads(model).unresolved
    own = model_parameters(model)
    back = ("o_proj", "out_proj", "dense", "o", "out_lin", "c_proj", "Wo")
    groups: dict[str, list[str]] = {}
    for p in specs:
        if "bias" not in p:
            attention = p.replace(".output.dense", ".dense").replace(".self.", ".")
            groups.setdefault(attention.rsplit(".", 2)[0], []).append(p)
    assert groups
    for attention, members in groups.items():
        (out,) = [p for p in members if p.split(".")[-2] in back]
        heads, kv = count(attention)
        grid = BlockGrid.of(own[out].shape, specs[out])
        assert grid.n_blocks == heads
        with torch.no_grad():
            for block in range(heads // kv):
                r0, r1, c0, c1 = grid.bounds(block)
                own[out][r0:r1, c0:c1] = 0
    model(**case.batch(2, 0)).loss.backward()
    for attention, members in groups.items():
        heads, kv = count(attention)
        for p in members:
            if p.split(".")[-2] in back or own[p].grad is None:
                continue
            grid = BlockGrid.of(own[p].shape, specs[p])
            sums = block_sums(own[p].grad.abs(), grid.block_rows, grid.block_cols)
            silent = (sums == 0).sum().item()
            assert silent * kv == grid.n_blocks, (p, sums)


def test_bias_tables_have_a_column_per_head():
    for name in ("t5", "swin"):
        model = ZOO[name].make()
        own, specs = model_parameters(model), find_heads(model).specs
        tables = [p for p in specs if "bias" in p]
        assert tables
        for p in tables:
            assert specs[p] == "*x1"
            assert own[p].shape[1] in (2, 4)


def test_heads_of_other_widths_and_layouts():
    """Where a head's width is not hidden size / heads, and where a gate stands beside it."""
    import transformers as tf

    small = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    found = find_heads(randomised(lambda: llama(head_dim=10)))
    prefix = "model.layers.1.self_attn."
    assert {n.removeprefix(prefix): s for n, s in found.specs.items() if n.startswith(prefix)} == {
        "q_proj.weight": "10x*", "k_proj.weight": "10x*", "v_proj.weight": "10x*",
        "o_proj.weight": "*x10",
    }  # fmt: skip
    with torch.device("meta"):
        latent = tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(
            **small, q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6,
            v_head_dim=5, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=8, first_k_dense_replace=1,
        ))  # fmt: skip
        gated = tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(
            **small, num_key_value_heads=2, head_dim=10, linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=4, linear_value_head_dim=10,
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
            shared_expert_intermediate_size=8, layer_types=["linear_attention", "full_attention"],
        ))  # fmt: skip
        two = tf.CLIPModel(tf.CLIPConfig(
            text_config={"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1},
            vision_config={"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 1},
        ))  # fmt: skip
    specs = resolve(latent, "head")
    assert {n.removeprefix(prefix): s for n, s in specs.items() if n.startswith(prefix)} == {
        "q_a_proj.weight": "module", "q_a_layernorm.weight": "module",
        "q_b_proj.weight": "10x*", "kv_a_proj_with_mqa.weight": "module",
        "kv_a_layernorm.weight": "module", "kv_b_proj.weight": "11x*", "o_proj.weight": "*x5",
    }  # fmt: skip
    report = find_heads(gated)
    assert report.specs[prefix + "q_proj.weight"] == "20x*"
    linear = "model.layers.0.linear_attn."
    # 4 value heads of width 10 look like 4 attention heads of width 10; they are not
    assert "no query projection" in report.unresolved[linear + "out_proj.weight"]
    with pytest.raises(BlockSpecError, match=r"heads of 4 parameters are not known.*linear_attn.*"
                                             r"and 1 more.*Remedy.*'module', '\*': 'head'"):
        resolve(gated, "head")
    specs = resolve(gated, {"*.linear_attn.*": "module", "*": "head"})
    assert specs[prefix + "o_proj.weight"] == "*x10"
    attention = [n for n in specs if ".self_attn." in n]
    assert resolve(gated, "head", attention) == {n: specs[n] for n in attention}
    specs = find_heads(two).specs
    assert specs["text_model.encoder.layers.0.self_attn.q_proj.weight"] == "8x*"
    assert specs["vision_model.encoder.layers.0.self_attn.q_proj.weight"] == "16x*"


def test_heads_of_plain_torch_and_of_adapters():
    layer = nn.TransformerEncoderLayer(32, 4, 40)
    assert find_heads(layer).specs == {
        "self_attn.in_proj_weight": "8x*", "self_attn.out_proj.weight": "*x8"
    }  # fmt: skip
    own = nn.MultiheadAttention(32, 4, kdim=20, vdim=24)
    assert find_heads(own).specs == {
        "q_proj_weight": "8x*", "k_proj_weight": "8x*", "v_proj_weight": "8x*",
        "out_proj.weight": "*x8",
    }  # fmt: skip
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"])
    )
    specs = find_heads(model).specs
    prefix = "base_model.model.model.layers.0.self_attn."
    assert {n.removeprefix(prefix): s for n, s in specs.items() if n.startswith(prefix)} == {
        "q_proj.base_layer.weight": "8x*", "q_proj.lora_B.default.weight": "8x*",
        "k_proj.weight": "8x*",
        "v_proj.base_layer.weight": "8x*", "v_proj.lora_B.default.weight": "8x*",
        "o_proj.base_layer.weight": "*x8", "o_proj.lora_A.default.weight": "*x8",
    }  # fmt: skip


class Attention(nn.Module):
    def __init__(self, heads=4, rows=32, **attributes):
        super().__init__()
        self.q_proj = nn.Linear(32, rows)
        if heads is not None:
            self.num_heads = heads
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Attention(heads=None), "how many heads"),
        (Attention(heads=5), r"32 features are not those of its heads \(unknown\)"),
        (Attention(head_dim=6), r"32 features.*4 x 6 or 4 x 12"),
        (Attention(heads=True), "how many heads"),
        (Attention(q_proj=nn.Conv2d(1, 32, 2)), r"shape \(32, 1, 2, 2\) is not that of a matrix"),
        (Attention(mixer=nn.Linear(3, 5)), "no rule says"),
        (Attention(relative_attention_bias=nn.Embedding(9, 5)), "5 columns for 4 heads"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_known_is_named_with_the_reason(module, reason):
    with pytest.raises(BlockSpecError, match=f"attention heads of .*{reason}.*Remedy"):
        resolve(nn.ModuleDict({"attn": module}), "head")


# -- heads as blocks of a measurement ------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_heads_add_up_to_the_module(name):
    model = randomised(MODELS[name])
    model(**batch_of()).loss.backward()
    own = model_parameters(model)
    for p, spec in resolve(model, "head").items():
        grid = BlockGrid.of(own[p].shape, spec)
        sums = block_sums(
            matrix_view(own[p].grad).double().square(), grid.block_rows, grid.block_cols
        )
        np.testing.assert_allclose(sums.sum(), own[p].grad.double().square().sum(), rtol=1e-12)
        assert grid.sizes().sum() == own[p].numel()
