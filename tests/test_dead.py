"""Gradients that are rounding are told from gradients that are small."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.dead import DEAD_RELATIVE, dead_parameters, has_direction, rounding_level


def encoder(dtype: torch.dtype) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    for p in model.parameters():  # as in a trained model: biases are not zero
        p.data += 0.1 * torch.randn_like(p)
    return model.to(dtype)


def measured(model, per_example=True, batches=6, autocast=None, wrap=False):
    """Sums of squared distances to fixed points: every example has a loss of its own."""
    dtype = next(model.parameters()).dtype
    torch.manual_seed(1)
    forward = model.forward
    if wrap:  # as accelerate does it: nothing is set yet when the model is called
        model.forward = torch.autocast("cpu", autocast)(forward)
    context = contextlib.nullcontext() if wrap or autocast is None else (
        torch.autocast("cpu", autocast))  # fmt: skip
    with fg.Probe(model, per_example=per_example, loss_reduction="sum") as probe, context:
        for _ in range(batches):
            hidden = model(torch.randint(0, 64, (8, 24))).last_hidden_state
            goal = torch.randn(hidden.shape).to(dtype)
            (hidden - goal).square().mean((1, 2)).sum().backward()
    model.forward = forward
    return probe.stats()


KEYS = [f"encoder.layer.{i}.attention.self.key.bias" for i in range(3)]


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize(("dtype", "autocast", "wrap"), [
    (torch.float64, None, False),
    (torch.float32, None, False),
    (torch.bfloat16, None, False),
    (torch.float32, torch.bfloat16, False),
    (torch.float32, torch.bfloat16, True),
])  # fmt: skip
def test_key_biases_are_dead_and_nothing_else(dtype, autocast, wrap, per_example):
    if wrap and not per_example:
        pytest.skip("without taps nothing sees what a forward function sets for itself")
    stats = measured(encoder(dtype), per_example, autocast=autocast, wrap=wrap)
    norms = dict(zip(stats.names, stats.grad_norm / stats.grad_norm.max(), strict=True))
    if dtype != torch.float64:  # the bar beside the largest gradient misses them
        assert min(norms[n] for n in KEYS) > DEAD_RELATIVE
    assert stats.meta["dtypes"] == sorted({str(dtype), str(autocast or dtype)})
    assert stats.dead == KEYS
    blueprint = fg.Blueprint.from_stats(stats, n_bootstrap=10)
    assert blueprint.dead == KEYS
    tail = blueprint.file.fits.norm.tail
    assert (tail.n_dead, tail.n) == (len(KEYS), len(stats.names) - len(KEYS))
    squares = blueprint.file.fits.squared_norm.tail
    assert (squares.n_dead, squares.n) == (tail.n_dead, tail.n)


def test_the_bias_in_front_of_batch_norm_is_dead():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3),
                          nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))  # fmt: skip
    with fg.Probe(model, per_example=False) as probe:
        for _ in range(4):
            x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 3, (16,))
            nn.functional.cross_entropy(model(x), y).backward()
    assert probe.stats().dead == ["0.bias", "3.bias"]


class Loud(nn.Module):
    """A layer whose inputs are so large that its bias's gradient is tiny beside its weight's."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.layer, self.size = nn.Linear(16, 8), size

    def forward(self, x):
        return self.layer(self.size * x) / self.size


@pytest.mark.parametrize(("dtype", "size"), [
    (torch.float32, 3e6), (torch.bfloat16, 300.0),
])  # fmt: skip
def test_a_tiny_gradient_with_a_direction_is_alive(dtype, size):
    torch.manual_seed(0)
    model = Loud(size).to(dtype)

    def stats(per_example, common):
        with fg.Probe(model, per_example=per_example, loss_reduction="sum") as probe:
            for _ in range(8):
                out = model(torch.randn(16, 16).to(dtype))
                push = torch.ones(16, 8) if common else torch.randn(16, 8)
                (out * push.to(dtype)).sum().backward()
        return probe.stats()

    found = stats(True, common=True)
    weight, bias = (n / s**0.5 for n, s in zip(found.grad_norm, found.numel, strict=True))
    assert bias / weight < rounding_level([str(dtype)], 16)  # by its size it could be rounding
    assert found.dead == []
    # Where examples say nothing of a direction, or were not asked, the size is all there is.
    assert stats(True, common=False).dead == ["layer.bias"]
    assert stats(False, common=True).dead == ["layer.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_whose_gradients_all_shrank_is_alive(dtype):
    """As far as the bar beside the largest gradient: floating point shrinks without rounding."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"near": nn.Linear(16, 8), "far": nn.Linear(16, 8)}).to(dtype)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["near"](x) + 1e-7 * self.parts["far"](x)

    both = Both()
    for per_example in (True, False):
        with fg.Probe(both, per_example=per_example, loss_reduction="sum") as probe:
            for _ in range(4):
                (both(torch.randn(8, 16).to(dtype)) * torch.randn(8, 8).to(dtype)).sum().backward()
        stats = probe.stats()
        assert stats.grad_norm[2:].max() < 1e-6 * stats.grad_norm.max()
        assert stats.dead == []


def test_chance_seldom_looks_like_a_direction():
    """The bound holds in the worst case: Gaussian contributions in one dimension."""
    rng = np.random.default_rng(0)
    for n_batches in (4, 16, 64):
        c = rng.normal(size=(4000, n_batches, 8))
        together, apart = (c.sum(-1) ** 2).sum(-1), (c**2).sum((-1, -2))
        false = [has_direction(t, a, n_batches) for t, a in zip(together, apart, strict=True)]
        assert np.mean(false) < 0.02
    shifted = c + 1.0
    together, apart = (shifted.sum(-1) ** 2).sum(-1), (shifted**2).sum((-1, -2))
    assert all(has_direction(t, a, 64) for t, a in zip(together, apart, strict=True))
    opposed = c - c.mean(-1, keepdims=True)  # examples that cancel have a structure too
    together, apart = (opposed.sum(-1) ** 2).sum(-1), (opposed**2).sum((-1, -2))
    assert all(has_direction(t, a, 64) for t, a in zip(together, apart, strict=True))


def test_the_rule_by_numbers():
    bar = rounding_level(["torch.float32"], 100)
    assert bar == pytest.approx(8 * 11 * 2**-24)
    assert rounding_level([], 100) == rounding_level(["torch.int8"], 100) == bar
    assert rounding_level(["torch.float32", "torch.bfloat16"], 100) == pytest.approx(
        8 * (2**-8 + 10 * 2**-24))  # fmt: skip
    assert rounding_level(["torch.float64"], 100) == pytest.approx(8 * 11 * 2**-53)

    def dead(bias, **options):
        given = {"dtypes": ["torch.float32"], "batch_sum_sq": [None] * 4,
                 "example_sum_sq": [None] * 4, "n_examples": 0, "n_batches": 4}  # fmt: skip
        return dead_parameters(
            ["a.weight", "a.bias", "b.bias", "b.extra"], [(100, 4), (4,), (4,), (4,)],
            [20.0, bias, 1e-3, 1e-9], **(given | options),
        )  # fmt: skip

    assert dead(0.0) == ["a.bias", "b.extra"]
    assert dead(2 * bar * 0.999) == ["a.bias", "b.extra"]  # rms of the weight: 20 / √400
    assert dead(2 * bar * 1.001) == ["b.extra"]
    known = {"n_examples": 16, "batch_sum_sq": [1.0] * 4}
    assert "a.bias" in dead(bar, **known, example_sum_sq=[1.0] * 4)
    assert "a.bias" not in dead(bar, **known, example_sum_sq=[0.25] * 4)
    assert "a.bias" in dead(bar, **known, example_sum_sq=[float("nan")] * 4)
    # A batch of one example is that example: nothing is known of a direction.
    assert "a.bias" in dead(bar, **(known | {"n_examples": 4}), example_sum_sq=[0.25] * 4)


def test_merged_files_and_merged_statistics_name_the_same():
    model = encoder(torch.float32)
    one, other = measured(model, batches=3), measured(model, batches=4)
    other.batch_sq = other.batch_sq * 1.01  # other data: the same sums are refused
    files = [fg.Blueprint.from_stats(s, n_bootstrap=10) for s in (one, other)]
    assert files[0].merge(files[1]).dead == one.merge(other).dead == KEYS
    blend = files[0].blend(other, weight=0.5)
    assert blend.dead == KEYS
    assert blend.file.fits.norm.tail.n_dead == len(KEYS)


def test_statistics_of_other_arithmetic_name_both_when_merged():
    model = encoder(torch.float32)
    one, other = measured(model, batches=2), measured(model, batches=2, autocast=torch.bfloat16)
    assert one.meta["dtypes"] == ["torch.float32"]
    assert one.merge(other).meta["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert one.merge(other).dead == KEYS


def test_labels_are_shifted_only_where_the_model_saw_some():
    from transformers import LlamaConfig, LlamaForCausalLM

    def told(model, run, **options):
        with fg.Probe(model, **options) as probe:
            for _ in range(2):
                run().backward()
        return fg.Blueprint.from_stats(probe.stats(), n_bootstrap=10).file.data.shift_labels

    bert, ids = encoder(torch.float32), torch.randint(0, 64, (3, 9))
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    ))  # fmt: skip
    # transformers gives every model without a loss of its own that of causal models.
    assert bert.loss_function.__name__ == "ForCausalLMLoss"
    assert told(bert, lambda: bert(ids).last_hidden_state.square().mean()) is None
    assert told(llama, lambda: llama(ids).logits.square().mean()) is None
    assert told(llama, lambda: llama(ids, labels=ids).loss) is True
    assert told(llama, lambda: llama(ids, labels=ids).loss, shift_labels=False) is False
