"""A blueprint as a LoRA configuration: PEFT builds it, and it is what was chosen."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import fastgrad as fg
from fastgrad.errors import SelectionError
from fastgrad.integrations.peft_check import ranks_of
from fastgrad.integrations.peft_export import layer_list, lora_plan, peft_config, target_regex
from fastgrad.integrations.peft_names import split_layer
from fastgrad.integrations.peft_ranks import share_ranks
from tests import models

peft = pytest.importorskip("peft")


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=models.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip


#: PEFT 0.21 warns of rank patterns for ``target_parameters``, which it heeds all the same.
BY_PEFT = ("ignore:fan_in_fan_out", "ignore:The following .*_pattern keys did not match")

MAKERS = {
    "llama": models.llama,
    "llama-tied": lambda: models.llama(tied=True),
    "gpt2": models.gpt2,
    "mixtral": mixtral,
    "bert": models.bert,
}


@pytest.fixture(scope="module", params=MAKERS)
def measured(request):
    model = models.randomised(MAKERS[request.param])
    return request.param, model, measure(model)


def measure(model: nn.Module) -> fg.Blueprint:
    with fg.Probe(model, per_example=False) as probe:
        for seed in range(2):
            model(**models.batch_of(seed=seed)).loss.backward()
    model.zero_grad(set_to_none=True)
    return fg.Blueprint.from_stats(probe.stats(), model, n_bootstrap=2, created="2026-01-01")


def built(model: nn.Module, config):
    return peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))


def adapters(peft_model) -> dict[str, nn.Module]:
    return {
        name: module for name, module in peft_model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }  # fmt: skip


def n_trained(peft_model) -> int:
    """Elements in memory: tied factors are two parameters over one."""
    found = {p.data_ptr(): p.numel() for p in peft_model.parameters() if p.requires_grad}
    return sum(found.values())


def train_one_step(peft_model) -> float:
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    batch = models.batch_of()
    before = peft_model(**batch).loss
    before.backward()
    optimizer.step()
    return float(before.detach() - peft_model(**batch).loss.detach())


# -- the configuration, built ------------------------------------------------------------


@pytest.mark.filterwarnings(*BY_PEFT)
def test_peft_builds_what_was_chosen_and_every_adapter_is_trained(measured):
    _kind, model, blueprint = measured
    plan = lora_plan(blueprint, model, count=8, r=4, tied=True)
    config = peft_config(blueprint, model, count=8, r=4, tied=True)
    adapted = built(model, config)
    expected = {key: plan.ranks[n] for n, t in plan.targets.items() for key in t.keys}
    ranks, whole = ranks_of(adapted)
    assert ranks == expected
    assert whole == set()
    assert len(plan.ranks) == 8
    assert len(set(plan.ranks.values())) > 1
    for module in adapters(adapted).values():
        assert module.scaling["default"] == pytest.approx(2.0)
    assert n_trained(adapted) == plan.n_parameters
    assert train_one_step(adapted) > 0
    # B begins at zero: without a gradient there it would stay an ornament. An embedding's A
    # is what begins at zero.
    for name, p in adapted.named_parameters():
        if p.requires_grad and ("lora_B" in name or "lora_embedding_A" in name):
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name


@pytest.mark.filterwarnings(*BY_PEFT)
def test_the_budget_is_that_of_one_rank_everywhere_and_is_used(measured):
    _, model, blueprint = measured
    plan = lora_plan(blueprint, model, r=4)
    uniform = sum(t.cost * min(4, t.max_rank) for t in plan.targets.values())
    larger = [t.cost for n, t in plan.targets.items() if plan.ranks[n] < min(16, t.max_rank)]
    assert uniform - min(larger) < plan.n_parameters <= uniform
    half = lora_plan(blueprint, model, r=4, budget=uniform // 2)
    assert half.n_parameters <= uniform // 2
    for name, rank in plan.ranks.items():
        assert 1 <= rank <= min(16, plan.targets[name].max_rank)


@pytest.mark.filterwarnings(*BY_PEFT)
def test_the_configuration_survives_its_file(measured, tmp_path):
    _, model, blueprint = measured
    config = peft_config(blueprint, model, count=5, task_type="FEATURE_EXTRACTION")
    config.save_pretrained(tmp_path)
    read = peft.LoraConfig.from_pretrained(tmp_path)
    read.inference_mode = False
    assert ranks_of(built(model, read)) == ranks_of(built(model, config))


def test_conv1d_is_told_to_peft():
    model = models.randomised(models.gpt2)
    blueprint = measure(model)
    config = peft_config(blueprint, model, count=4, include=["*.c_*", "*.c_*.weight"])
    assert config.fan_in_fan_out is True
    adapted = built(model, config)
    for name, module in adapters(adapted).items():
        n_in, n_out = module.get_base_layer().weight.shape
        assert module.lora_A["default"].weight.shape[1] == n_in, name
        assert module.lora_B["default"].weight.shape[0] == n_out, name


def test_a_tied_embedding_is_adapted_once_where_peft_can_tie():
    model = models.randomised(lambda: models.llama(tied=True))
    blueprint = measure(model)
    names = ["*embed_tokens*", "*q_proj*"]
    assert "model.embed_tokens.weight" not in lora_plan(blueprint, model, include=names).ranks
    config = peft_config(blueprint, model, r=3, include=names, tied=True)
    assert config.ensure_weight_tying
    adapted = built(model, config)
    inner = adapted.base_model.model
    a, b = inner.model.embed_tokens, inner.lm_head
    assert b.lora_A["default"].weight.data_ptr() == a.lora_embedding_B["default"].data_ptr()
    assert a.r == b.r
    assert a.scaling == b.scaling
    assert train_one_step(adapted) > 0


@pytest.mark.parametrize("make", [models.gpt2, models.bert], ids=["gpt2", "bert"])
def test_a_tied_embedding_that_peft_cannot_tie_is_left_out_by_name(make):
    model = models.randomised(make)
    blueprint = measure(model)
    (tied,) = {n for n, s in zip(blueprint.names, blueprint.shapes, strict=True)
               if s == (models.VOCAB, 32)}  # fmt: skip
    selection = fg.select(blueprint, model, fraction=1.0)
    with pytest.warns(UserWarning, match="PEFT would adapt only one"):
        peft_config(blueprint, model, selection=selection)
    plan = lora_plan(blueprint, model, selection=selection)
    assert tied in plan.left_out
    assert tied not in plan.ranks
    assert tied not in lora_plan(blueprint, model).ranks


@pytest.mark.filterwarnings(*BY_PEFT)
def test_experts_and_router_are_target_parameters():
    model = models.randomised(mixtral)
    blueprint = measure(model)
    names = ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.gate.weight",
             "model.layers.0.mlp.experts.gate_up_proj"]  # fmt: skip
    config = peft_config(blueprint, model, include=names, r=2)
    assert sorted(config.target_parameters) == sorted(names)
    ranks, _ = ranks_of(built(model, config))
    assert set(ranks) == set(names)
    plan = lora_plan(blueprint, model, include=names, r=2)
    assert plan.targets[names[0]].cost == 4 * (32 + 48)
    with pytest.raises(SelectionError, match="lora_dropout"):
        peft_config(blueprint, model, include=names, lora_dropout=0.1)


def test_norms_are_trained_whole_only_if_wanted():
    model = models.randomised(models.llama)
    blueprint = measure(model)
    names = ["model.norm.weight", "*q_proj.weight"]
    plain = lora_plan(blueprint, model, include=names)
    assert plain.whole == {}
    assert len(plain.ranks) == 2
    config = peft_config(blueprint, model, include=names, whole=True)
    assert set(config.modules_to_save) == {"model.norm"}
    adapted = built(model, config)
    assert ranks_of(adapted)[1] == {"model.norm"}
    plan = lora_plan(blueprint, model, include=names, whole=True)
    assert (plan.n_whole, plan.whole) == (32, {"model.norm.weight": "model.norm"})
    assert n_trained(adapted) == plan.n_parameters + plan.n_whole
    assert train_one_step(adapted) > 0


def test_a_bias_is_left_out_by_name():
    model = models.randomised(models.gpt2)
    blueprint = measure(model)
    selection = fg.select(blueprint, model, fraction=1.0, include=["*attn*", "*ln_1*"])
    plan = lora_plan(blueprint, model, selection=selection, whole=True)
    assert plan.left_out["transformer.h.0.attn.c_attn.bias"].startswith("a bias")
    assert plan.whole["transformer.h.0.ln_1.bias"] == "transformer.h.0.ln_1"


# -- names -------------------------------------------------------------------------------


class Trap(nn.Module):
    """Names that are the ends of others, and characters that mean something in expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6, bias=False)
        self.xproj = nn.Linear(6, 6, bias=False)
        self.tower = nn.ModuleDict({
            "proj": nn.Linear(6, 6, bias=False),
            "a+b": nn.ModuleDict({"proj": nn.Linear(6, 6, bias=False)}),
            "aab": nn.ModuleDict({"proj": nn.Linear(6, 6, bias=False)}),
        })  # fmt: skip
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 6, bias=False)}) for _ in range(12)
        )

    def forward(self, x):
        towers = (self.tower["proj"], self.tower["a+b"]["proj"], self.tower["aab"]["proj"])
        for i, part in enumerate((self.proj, self.xproj, *towers)):
            x = x + torch.tanh(part(x)) * (i + 1)
        for layer in self.layers:
            x = x + torch.tanh(layer["up"](x))
        return x


def trap() -> tuple[nn.Module, fg.GradientStats]:
    torch.manual_seed(0)
    model = Trap()
    with fg.Probe(model, per_example=False) as probe:
        model(torch.randn(5, 6)).square().sum().backward()
    return model, probe.stats()


@pytest.mark.parametrize("names", [
    ["proj"], ["tower.proj"], ["tower.a+b.proj"], ["xproj", "tower.aab.proj"],
    ["layers.1.up"], ["layers.1.up", "layers.11.up", "proj"], ["layers.0.up", "layers.10.up"],
], ids=lambda n: " ".join(n))  # fmt: skip
def test_names_that_end_others_and_special_characters(names):
    model, stats = trap()
    include = [f"{n}.weight" for n in names]
    config = peft_config(stats, model, include=include, r=2)
    ranks, _ = ranks_of(built(model, config))
    assert set(ranks) == set(names)
    expression = target_regex(stats, model, include=include)
    found = {n for n, _ in model.named_modules() if re.fullmatch(expression, n)}
    assert found == set(names)


def test_ranks_that_differ_under_trap_names_are_those_of_the_plan():
    model, stats = trap()
    plan = lora_plan(stats, model, r=2, max_rank=5)
    assert len(set(plan.ranks.values())) > 1
    ranks, _ = ranks_of(built(model, peft_config(stats, model, r=2, max_rank=5)))
    assert ranks == {t.module: plan.ranks[n] for n, t in plan.targets.items()}


def test_layers_are_named_briefly():
    model = models.randomised(lambda: models.llama(layers=4))
    blueprint = measure(model)
    some = [f"model.layers.{i}.{m}.weight" for i in (0, 2)
            for m in ("self_attn.q_proj", "mlp.up_proj")]  # fmt: skip
    config = peft_config(blueprint, model, include=some)
    assert config.target_modules == {"q_proj", "up_proj"}
    assert (config.layers_to_transform, config.layers_pattern) == ([0, 2], "layers")
    everywhere = peft_config(blueprint, model, include=["*q_proj.weight"])
    assert everywhere.target_modules == {"q_proj"}
    assert everywhere.layers_to_transform is None


def test_a_regex_of_every_choice_matches_it_alone(measured):
    _, model, blueprint = measured
    names = [n for n, _ in model.named_modules()]
    for count in (1, 3, 6):
        expression = target_regex(blueprint, model, count=count)
        read = {n for n in names if re.fullmatch(expression, n)}
        assert len(read) == count
        with_ranks = lora_plan(blueprint, model, count=count, modules_only=True)
        assert read == {t.module for t in with_ranks.targets.values()}


def test_layer_numbers_are_found():
    assert split_layer("model.layers.3.mlp.up") == ("model.layers", 3, "mlp.up")
    assert split_layer("h.12.attn.c_attn") == ("h", 12, "attn.c_attn")
    assert split_layer("0.weight") == ("", 0, "weight")
    assert split_layer("layers.1.experts.0.w") == ("layers", 1, "experts.0.w")
    assert split_layer("conv1.weight") is None
    assert split_layer("a.b2.c") is None


def test_layers_by_their_gradient():
    model = models.randomised(lambda: models.llama(layers=4))
    blueprint = measure(model)
    mean = np.zeros(4)
    size = np.zeros(4)
    for s in blueprint.submodules:
        if place := split_layer(s.name):
            mean[place[1]] += s.grad_norm**2
            size[place[1]] += s.numel
    order = np.argsort(-mean / size, kind="stable")
    for count in (1, 2, 4):
        assert layer_list(blueprint, model, count=count) == sorted(order[:count])
    assert layer_list(blueprint, fraction=0.5) == sorted(order[:2])
    with pytest.raises(SelectionError, match="fits"):
        layer_list(blueprint, fraction=0.1)
    with pytest.raises(SelectionError, match="exactly one"):
        layer_list(blueprint)
    with pytest.raises(SelectionError, match="no list of layers 'h'"):
        layer_list(blueprint, count=1, container="h")


# -- sharing out -------------------------------------------------------------------------


def test_ranks_follow_the_mass_within_bounds_and_budget():
    ranks = share_ranks([8.0, 4.0, 2.0, 1.0], [10] * 4, 10 * 30, 1, [99] * 4)
    assert ranks.tolist() == [16, 8, 4, 2]
    assert share_ranks([1.0, 1.0], [10, 20], 120, 1, [99, 99]).tolist() == [6, 3]
    assert share_ranks([100.0, 1.0, 1.0], [1] * 3, 30, 2, [16] * 3).tolist() == [16, 7, 7]
    assert share_ranks([0.0, 0.0], [1, 1], 8, 1, [8, 8]).tolist() == [4, 4]
    assert share_ranks([5.0, 1.0], [1, 1], 100, 1, [3, 4]).tolist() == [3, 4]
    with pytest.raises(SelectionError, match="more than the budget"):
        share_ranks([1.0, 1.0], [10, 10], 19, 1, [4, 4])


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_never_exceeded_and_nothing_that_fits_is_left(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 30))
    cost = rng.integers(1, 500, n)
    mass = rng.pareto(1.0, n)
    high = rng.integers(1, 40, n)
    low = 1 + int(rng.integers(0, 3))
    budget = int(cost @ np.minimum(low, high)) + int(rng.integers(0, 20000))
    ranks = share_ranks(mass, cost, budget, low, high)
    assert (ranks <= high).all()
    assert (ranks >= np.minimum(low, high)).all()
    left = budget - int(cost @ ranks)
    assert left >= 0
    assert all(r == h or c > left for r, h, c in zip(ranks, high, cost, strict=True))


# -- refusals ----------------------------------------------------------------------------


def test_another_model_is_refused_by_name():
    model = models.randomised(models.llama)
    blueprint = measure(model)
    with pytest.raises(SelectionError, match=r"'model\.embed_tokens\.weight' was measured"):
        peft_config(blueprint, models.gpt2(), count=2)
    with pytest.raises(SelectionError, match="lm_head"):
        peft_config(blueprint, models.llama(tied=True), count=2)


def test_arguments_that_contradict_are_refused():
    model = models.randomised(models.llama)
    blueprint = measure(model)
    with pytest.raises(SelectionError, match="fraction or count"):
        peft_config(blueprint, model, fraction=0.5, count=2)
    with pytest.raises(SelectionError, match="rank_pattern follows"):
        peft_config(blueprint, model, count=2, rank_pattern={"q_proj": 3})
    with pytest.raises(SelectionError, match="matches no parameter"):
        peft_config(blueprint, model, include=["*nothing*"])
    selection = fg.select(blueprint, model, count=1, include=["model.norm.weight"])
    with pytest.raises(SelectionError, match="LoRA applies to none"):
        peft_config(blueprint, model, selection=selection)
    with pytest.raises(SelectionError, match="max_rank"):
        peft_config(blueprint, model, min_rank=4, max_rank=2)
    with pytest.raises(SelectionError, match="alpha_ratio"):
        peft_config(blueprint, model, alpha_ratio=0.0)


def test_what_another_piece_of_code_reads_is_left_out():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(6, 6, batch_first=True)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.out = nn.Linear(6, 6)

        def forward(self, x):
            h = self.rnn(x)[0]
            return self.out(self.attention(h, h, h)[0])

    model = Mixed()
    with fg.Probe(model, per_example=False) as probe:
        model(torch.randn(2, 3, 6)).square().sum().backward()
    plan = lora_plan(probe.stats(), model)
    assert set(plan.ranks) == {"out.weight"}
    with pytest.raises(SelectionError):
        lora_plan(probe.stats(), model, include=["attention.out_proj.weight"])


def test_rank_stabilised_adapters_share_one_alpha():
    model = models.randomised(models.llama)
    blueprint = measure(model)
    config = peft_config(blueprint, model, r=4, count=6, use_rslora=True)
    assert config.alpha_pattern == {}
    assert config.lora_alpha == 8
    for module in adapters(built(model, config)).values():
        assert module.scaling["default"] == pytest.approx(8 / module.r["default"] ** 0.5)


def test_a_model_without_weights_is_enough():
    model = models.randomised(models.llama)
    blueprint = measure(model)
    with torch.device("meta"):
        bare = models.llama()
    assert peft_config(blueprint, bare, count=6) == peft_config(blueprint, model, count=6)


def test_the_released_example_becomes_a_configuration_of_its_model():
    """docs/examples/minilm-code, on the model's shape alone."""
    from transformers import BertConfig, BertModel

    folder = Path(__file__).parent.parent / "docs" / "examples" / "minilm-code"
    blueprint = fg.Blueprint.from_pretrained(folder)
    with torch.device("meta"):
        model = BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536))
    plan = lora_plan(blueprint, model, count=12)
    config = peft_config(blueprint, model, count=12, task_type="FEATURE_EXTRACTION")
    assert len(plan.ranks) == 12
    # The word embeddings have the largest weight and a small gradient per weight.
    assert "embeddings.word_embeddings.weight" not in plan.ranks
    norm = {s.name: s.grad_norm for s in blueprint.submodules}
    free = [n for n, r in plan.ranks.items() if 1 < r < min(32, plan.targets[n].max_rank)]
    size = {n: plan.ranks[n] * plan.targets[n].cost for n in free}
    for a in free:
        for b in free:
            assert abs(size[a] / norm[a] * norm[b] - size[b]) <= 2 * (
                plan.targets[a].cost * norm[b] / norm[a] + plan.targets[b].cost
            )
    assert config.task_type == "FEATURE_EXTRACTION"


@pytest.mark.filterwarnings(*BY_PEFT)
def test_every_family_of_names_gets_what_was_chosen():
    """An encoder-decoder, whose two lists of layers have one name."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    ))  # fmt: skip
    ids = torch.randint(3, 60, (3, 7))
    with fg.Probe(model, per_example=False) as probe:
        model(input_ids=ids, labels=ids).loss.backward()
    stats = probe.stats()
    plan = lora_plan(stats, model, count=7)
    ranks, _ = ranks_of(built(model, peft_config(stats, model, count=7)))
    assert ranks == {t.module: plan.ranks[n] for n, t in plan.targets.items()}
    assert len(layer_list(stats, model, count=1, container="encoder.block")) == 1
    with pytest.raises(SelectionError, match=r"decoder\.block, encoder\.block"):
        layer_list(stats, model, count=1)
