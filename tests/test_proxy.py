"""Scores of blocks beside what training them does: against oracles, and without a trace."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn
from torch.func import functional_call, grad, vmap

import fastgrad as fg
from fastgrad.curvature import Factors, examples_of, gather_curvature
from fastgrad.errors import FastgradError, NonFiniteGradientError, StatsError
from fastgrad.proxy import _Bench, second_order_scores
from fastgrad.proxy_report import SCORES, judge, rank_correlation
from tests.models import MODELS, batch_of, randomised


def net(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 8, bias=bias), nn.Tanh(),
        nn.Linear(8, 3, bias=bias),
    )  # fmt: skip


def data(n=3, rows=8, seed=1, tokens=()):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, *tokens, 6, generator=g),
         torch.randint(0, 3, (rows, *tokens), generator=g))
        for _ in range(n)
    ]  # fmt: skip


def loss_of(model, batch):
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def quality(model=None, **options):
    options = {"loss": loss_of, "n_bootstrap": 50, **options}
    return fg.proxy_quality(model or net(), data(), data(2, seed=2), **options)


def curvature_of(model, batches, loss=loss_of, **options):
    return gather_curvature(model, dict(model.named_parameters()), batches, loss, **options)


# -- curvature ---------------------------------------------------------------------------


def test_the_diagonal_is_that_of_torch_func():
    model, batches = net(), data()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(own, x, y):
        return F.cross_entropy(functional_call(model, own, (x[None],)), y[None])

    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    found = curvature_of(model, batches)
    assert found.n_examples == len(x)
    for name, g in each.items():
        torch.testing.assert_close(found.diagonal[name], g.square().mean(0))
        mean = g.mean(0).double()
        damping = 0.3 * float(g.square().mean())
        want = float((mean**2 / (g.double().square().mean(0) + damping)).sum())
        assert found.score(name, mean, 0.3, "block", "fisher") == pytest.approx(want, rel=1e-5)
    everything = torch.cat([g.square().mean(0).flatten() for g in each.values()])
    for name in each:
        want = 0.3 * float(everything.mean())
        assert found.damping(name, 0.3, "model", "kfac") == pytest.approx(want, rel=1e-5)


def test_a_quadratic_form_is_that_of_the_dense_inverse():
    rng = torch.Generator().manual_seed(0)
    left, right = (m @ m.T for m in (torch.randn(n, n, generator=rng) for n in (3, 5)))
    g = torch.randn(3, 5, generator=rng)
    dense = torch.kron(left.double(), right.double()) + 0.7 * torch.eye(15, dtype=torch.float64)
    want = float(g.double().flatten() @ torch.linalg.solve(dense, g.double().flatten()))
    factors = Factors(left, right)
    assert factors.quadratic(g, 0.7) == pytest.approx(want, rel=1e-6)
    trace = float(torch.kron(left, right).trace())
    assert factors.mean_eigenvalue == pytest.approx(trace / 15, rel=1e-5)


def kronfluence_kfac(model, examples, folder: Path, dampings):
    """Factors, and by damping the self-influence ``g_jᵀ (A ⊗ G + damping)⁻¹ g_j`` by module."""
    pytest.importorskip("kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Summed(Task):
        def compute_train_loss(self, batch, model, sample=False):
            assert not sample
            logits = model(batch["x"]).flatten(0, -2)
            return F.cross_entropy(logits, batch["y"].flatten(), reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    task = Summed()
    analyzer = Analyzer("kfac", prepare_model(copy.deepcopy(model), task), task, cpu=True,
                        disable_tqdm=True, output_dir=str(folder))  # fmt: skip
    analyzer.fit_all_factors(
        "kfac", examples, per_device_batch_size=4,
        factor_args=FactorArguments(strategy="kfac", use_empirical_fisher=True),
    )  # fmt: skip
    scores = {}
    for damping in dampings:
        analyzer.compute_self_scores(
            f"damped-{damping}", "kfac", examples, per_device_train_batch_size=4,
            score_args=ScoreArguments(compute_per_module_scores=True, damping_factor=damping),
        )  # fmt: skip
        scores[damping] = analyzer.load_self_scores(f"damped-{damping}")
    return analyzer.load_covariance_matrices("kfac"), scores


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "tokens",
    [pytest.param((), id="rows", marks=pytest.mark.slow), pytest.param((5,), id="sequences")],
)
def test_kronecker_factors_and_scores_are_those_of_kronfluence(tokens, tmp_path):
    """Without biases, which kronfluence puts into the weight's block. Its gradients are of summed
    losses, and its factors of gradients are means over tokens, ours sums over tokens and means
    over examples: with the loss summed here too, ours are ``tokens`` times larger."""
    model, (batch,) = net(bias=False), data(1, rows=12, tokens=tokens)
    times = math.prod(tokens)

    def summed(model, batch):
        x, y = batch
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum")

    examples = [{"x": x, "y": y} for x, y in zip(*batch, strict=True)]
    absolute = 1e-2
    matrices, by_damping = kronfluence_kfac(model, examples, tmp_path, [None, absolute])
    found = curvature_of(model, [batch], summed)
    assert set(by_damping[None]) == {n.removesuffix(".weight") for n in found.factors}
    assert len(found.factors) == 3
    counts = {k: matrices[f"num_{k}_covariance_processed"] for k in ("activation", "gradient")}
    for name, ours in found.factors.items():
        module = name.removesuffix(".weight")
        a = matrices["activation_covariance"][module] / counts["activation"][module]
        g = matrices["gradient_covariance"][module] / counts["gradient"][module]
        torch.testing.assert_close(ours.right, a, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.left, g * times, rtol=1e-4, atol=1e-6)
        for j, row in enumerate(examples_of([batch])):
            model.zero_grad()
            summed(model, row).backward()
            own = model.get_parameter(name).grad
            # None is 0.1 of the mean eigenvalue there, and goes along with the scale
            relative = found.score(name, own, 0.1, "block", "kfac")
            assert relative * times == pytest.approx(float(by_damping[None][module][j]), rel=1e-3)
            damped = ours.quadratic(own, absolute * times)
            assert damped * times == pytest.approx(float(by_damping[absolute][module][j]), rel=1e-3)


def test_a_weight_stored_the_other_way_round_has_the_same_score():
    """``Conv1D`` of transformers against the same layers as ``nn.Linear``."""
    from transformers.pytorch_utils import Conv1D

    linear = net()
    conv = nn.Sequential(*[
        Conv1D(m.out_features, m.in_features) if isinstance(m, nn.Linear) else m for m in linear
    ])  # fmt: skip
    with torch.no_grad():
        for a, b in zip(linear, conv, strict=True):
            if isinstance(a, nn.Linear):
                b.weight.copy_(a.weight.T)
                b.bias.copy_(a.bias)
    found = [curvature_of(m, data()) for m in (linear, conv)]
    names = {n for n in found[0].factors}
    assert names == set(found[1].factors) == {"0.weight", "2.weight", "4.weight"}
    for name in names:
        a, b = (f.factors[name] for f in found)
        torch.testing.assert_close(a.left, b.right)
        torch.testing.assert_close(a.right, b.left)
        g = torch.randn(linear.get_parameter(name).shape)
        assert a.quadratic(g, 0.1) == pytest.approx(b.quadratic(g.T, 0.1), rel=1e-5)


def test_padding_counts_in_neither_factor():
    model = net()
    short, long = data(1, tokens=(4,))[0], data(1, tokens=(4,))[0]
    long = (torch.cat([long[0], torch.full((8, 3, 6), 9.0)], 1),
            torch.cat([long[1], torch.full((8, 3), -100)], 1))  # fmt: skip
    a, b = curvature_of(model, [short]), curvature_of(model, [long])
    for name, factors in a.factors.items():
        torch.testing.assert_close(factors.left, b.factors[name].left)
        torch.testing.assert_close(factors.right, b.factors[name].right)


class Odd(nn.Module):
    """A weight read twice, one read by a layer and elsewhere, one never, one by no linear layer."""

    def __init__(self):
        super().__init__()
        self.twice, self.tied, self.never, self.fine = (nn.Linear(6, 6, bias=False)
                                                        for _ in range(4))  # fmt: skip
        self.scale = nn.Parameter(torch.ones(6))
        self.table = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        x = torch.tanh(self.twice(torch.tanh(self.twice(x)))) * self.scale
        x = torch.tanh(self.tied(x)) + x @ self.tied.weight
        return (self.fine(x) @ self.table)[..., :3]


def test_what_has_no_factors_is_named_with_the_reason():
    torch.manual_seed(0)
    found = curvature_of(Odd(), data())
    assert set(found.factors) == {"fine.weight"}
    assert "2 times" in found.reasons["twice.weight"]
    assert "elsewhere too" in found.reasons["tied.weight"]
    assert "no gradient" in found.reasons["never.weight"]
    assert "no linear layer" in found.reasons["scale"]
    assert "no linear layer" in found.reasons["table"]
    assert "factor_limit=4" in curvature_of(Odd(), data(), factor_limit=4).reasons["fine.weight"]
    assert math.isnan(found.score("scale", torch.ones(6), 0.1, "block", "kfac"))
    assert found.score("never.weight", torch.zeros(6, 6), 0.1, "block", "fisher") == 0.0


def test_autocast_is_no_other_use():
    torch.manual_seed(0)
    model = Odd()

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, batch)

    found, exact = curvature_of(model, data(), loss), curvature_of(model, data())
    assert set(found.factors) == {"fine.weight"}
    assert "elsewhere too" in found.reasons["tied.weight"]
    for side in ("left", "right"):
        a, b = (getattr(f.factors["fine.weight"], side) for f in (found, exact))
        assert float((a - b).norm() / b.norm()) < 0.02


# -- effects -----------------------------------------------------------------------------


def mean_loss(model, batches):
    with torch.no_grad():
        return sum(float(loss_of(model, b)) for b in batches) / len(batches)


def test_effects_are_what_a_copy_of_the_model_does():
    model, train, test = net(), data(), data(2, seed=2)
    report = quality(model, rate=0.3, adam_rate=2e-3, steps=5)
    total = copy.deepcopy(model)
    sum(loss_of(total, b) for b in train).div(3).backward()
    assert report.loss == mean_loss(model, test)
    for i, name in enumerate(report.names):
        g = total.get_parameter(name).grad
        assert report.scores["norm"][i] == pytest.approx(float(g.norm()), rel=1e-5)
        assert report.scores["rms"][i] == pytest.approx(float(g.square().mean().sqrt()), rel=1e-5)
        assert report.scores["abs"][i] == pytest.approx(float(g.abs().sum()), rel=1e-5)
        assert report.scores["size"][i] == report.sizes[i] == g.numel()
        stepped = copy.deepcopy(model)
        with torch.no_grad():
            stepped.get_parameter(name).sub_(g, alpha=0.3)
        want = report.loss - mean_loss(stepped, test)
        assert report.effects["gradient_step"][i] == pytest.approx(want, abs=1e-6)
        trained = copy.deepcopy(model)
        optimizer = torch.optim.AdamW([trained.get_parameter(name)], lr=2e-3, weight_decay=0)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(trained, train[step % 3]).backward()
            optimizer.step()
        want = report.loss - mean_loss(trained, test)
        assert report.effects["adamw"][i] == pytest.approx(want, abs=1e-6)
        assert report.effects["adamw"][i] != 0


def test_a_short_step_takes_off_what_the_alignment_says():
    report = quality(net().double(), rate=1e-4, loss=lambda m, b: loss_of(m, (b[0].double(), b[1])))
    np.testing.assert_allclose(
        report.effects["gradient_step"] / 1e-4, report.scores["alignment"], rtol=1e-3, atol=1e-6
    )
    assert report.correlation("alignment", "gradient_step").value > 0.99


def test_the_rate_that_is_searched_is_the_best_to_a_factor_of_two():
    """A quadratic: along its gradient the best rate is ``gᵀg / gᵀHg``."""
    torch.manual_seed(0)
    scales = torch.tensor([1.0, 3.0, 5.0])
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(3) * 1e3)

    def loss(model, batch):
        return 0.5 * (scales * (model.w - batch).square()).sum()

    batches = [torch.zeros(3)]
    for start in (model.w.detach().clone(), torch.full((3,), 1e-9)):  # from either side
        with torch.no_grad():
            model.w.copy_(start)
        bench = _Bench(model, batches, batches, loss)
        g = bench.gradient(batches)
        best = float(g["w"].square().sum() / (scales * g["w"].square()).sum())
        assert best / 2 <= bench.search(g) <= best * 2
        assert torch.equal(model.w, start)


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_about_the_model_changes_also_when_it_breaks_off(breaks):
    model = nn.Sequential(*net(), nn.Dropout(0.5)).train()
    loss_of(model, data()[0]).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    kept = {n: g.clone() for n, g in grads.items()}
    before, states = snapshot(model), (torch.get_rng_state(), random.getstate())
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    ids = {n: id(p) for n, p in model.named_parameters()}
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        random.random()
        if breaks and calls == 60:  # in the middle of a block's AdamW steps
            moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
            assert len(moved) == 1
            raise KeyError("stop")
        return loss_of(model, batch)

    if breaks:
        with pytest.raises(KeyError, match="stop"):
            quality(model, loss=loss, rate=0.1)
    else:
        quality(model, loss=loss)
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert id(p) == ids[name]
        assert p.data_ptr() == pointers[name]
        assert p.grad is grads[name]
        assert torch.equal(p.grad, kept[name])
        assert p.requires_grad
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_frozen_parameters_are_no_blocks_and_stay_frozen():
    model = net()
    model[0].requires_grad_(False)
    report = quality(model)
    assert report.names == ("2.weight", "2.bias", "4.weight", "4.bias")
    assert not model[0].weight.requires_grad


def test_a_partial_model_is_measured_whole():
    model = net()
    whole = quality(copy.deepcopy(model), rate=0.1)
    partial = fg.make_partial(model, fg.select(None, model, fraction=0.3, ranking="random"))
    with pytest.raises(FastgradError, match="partial"):
        quality(model, rate=0.1)
    report = quality(model, rate=0.1, partial=partial)
    assert report.names == whole.names
    np.testing.assert_array_equal(report.effects["adamw"], whole.effects["adamw"])


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_language_models_and_what_they_tie(architecture):
    model = randomised(MODELS[architecture])
    model.config.use_cache = False
    report = fg.proxy_quality(model, [batch_of()], [batch_of()], n_bootstrap=20)
    tied = next(n for n in report.names if "embed" in n or "wte" in n)
    assert "elsewhere too" in report.reasons[tied]
    for name, value in zip(report.names, report.scores["kfac"], strict=True):
        assert math.isnan(value) == (name in report.reasons), name
    read = [n for n in report.names if n.endswith(("q_proj.weight", "c_attn.weight"))]
    assert read
    assert not set(read) & set(report.reasons)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["scores"]["kfac"][report.names.index(tied)] is None
    assert told["names"] == list(report.names)
    assert "rank correlation of norm and effect" in report.summary()


# -- judgement ---------------------------------------------------------------------------


def test_rank_correlations_are_scipys_with_ties_too():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (3, 40)).astype(float), rng.normal(size=(3, 40))
    for got, x, y in zip(rank_correlation(a, b), a, b, strict=True):
        assert got == pytest.approx(spearmanr(x, y).statistic)
    assert rank_correlation(np.ones(5), np.arange(5.0)) == 0.0


def planted(n=40, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(10, 1000, n)
    truth = rng.lognormal(0, 1, n)
    scores = {
        "norm": truth * rng.lognormal(0, noise, n) if noise else truth.copy(),
        "kfac": truth.copy(),
        "size": sizes.astype(float),
    }
    return scores, {"adamw": truth}, sizes


def verdict(scores, effects, sizes, other="kfac", normalised=False):
    _, comparisons = judge(scores, effects, sizes, 200, 0)
    (found,) = [c for c in comparisons if (c.score, c.per_element) == (other, normalised)]
    return found


def test_verdicts():
    same = verdict(*planted())
    assert (same.norm, same.other, same.difference) == (1.0, 1.0, 0.0)
    assert same.verdict == "as well"
    assert verdict(*planted(), other="size").verdict == "better"
    assert verdict(*planted(noise=3.0)).verdict == "worse"
    scores, effects, sizes = planted(n=8)
    scores["norm"][[0, 3]] = scores["norm"][[3, 0]]
    scores["kfac"][[1, 5]] = scores["kfac"][[5, 1]]
    assert verdict(scores, effects, sizes).verdict == "undecided"


def test_scores_are_compared_on_the_blocks_that_both_know():
    scores, effects, sizes = planted()
    scores["norm"][20:] = scores["norm"][20:][::-1]  # wrong where kfac says nothing
    scores["kfac"][20:] = np.nan
    found = verdict(scores, effects, sizes)
    assert (found.n, found.norm, found.other) == (20, 1.0, 1.0)
    correlations, _ = judge(scores, effects, sizes, 50, 0)
    by = {(c.score, c.per_element): c for c in correlations}
    assert by["norm", False].n == 40
    assert by["norm", False].value < 0.9
    assert by["kfac", False].interval == (1.0, 1.0)


def test_per_element_the_norm_becomes_the_rms_and_a_sum_a_mean():
    scores, effects, sizes = planted()
    effects = {"adamw": sizes * scores["norm"]}  # as large per element as the norm says
    scores = {"norm": scores["norm"] * np.sqrt(sizes), "fisher": effects["adamw"].copy(),
              "size": scores["size"]}  # fmt: skip
    correlations, _ = judge(scores, effects, sizes, 50, 0)
    by = {(c.score, c.per_element): c.value for c in correlations}
    assert by["norm", True] == by["fisher", True] == pytest.approx(1.0)
    assert by["norm", False] < 1


def test_a_report_says_what_was_planted():
    report = quality()
    assert set(report.scores) == set(SCORES)
    for c in report.correlations:
        score, effect = report.scores[c.score], report.effects[c.effect]
        known = np.isfinite(score)
        if not c.per_element and known.sum() >= 4:
            want = spearmanr(score[known], effect[known]).statistic
            assert c.value == pytest.approx(want)
        assert c.n == known.sum()
    few = report.correlation("kfac", "adamw")
    assert few.n == 3
    assert math.isnan(few.value)
    with pytest.raises(StatsError, match="no correlation"):
        report.correlation("norm", "lunch")
    assert report.n_unresolved["gradient_step"] == 0


def test_damping_over_the_model_gives_every_block_the_same():
    model, batches = net(), data()
    found = curvature_of(model, batches)
    g = _Bench(model, batches, batches, loss_of).gradient(batches)
    scores = {of: second_order_scores(found, g, 100.0, of) for of in ("block", "model")}
    norms = np.array([float(v.norm()) for v in g.values()])
    # so much damping over all leaves the norm; each block's own leaves it relative
    assert rank_correlation(scores["model"]["fisher"], norms) == pytest.approx(1.0)
    assert rank_correlation(scores["block"]["fisher"], norms) < 0.9


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda m: m.half(), {}, FastgradError, "lost in rounding.*float32"),
        (lambda m: m.requires_grad_(False), {}, FastgradError, "no parameter requires"),
        (lambda m: m, {"damping": 0.0}, StatsError, "damping must be a positive"),
        (lambda m: m, {"damping_of": "tensor"}, StatsError, "'block' or 'model'"),
        (lambda m: m, {"rate": -1.0}, StatsError, "rate must be a positive"),
        (lambda m: m, {"n_bootstrap": 0}, StatsError, "n_bootstrap"),
        (lambda m: nn.Sequential(m[0]), {}, StatsError, "2 parameters"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, options, error, message):
    def loss(model, batch):  # six outputs or three
        return F.cross_entropy(model(batch[0].to(next(model.parameters()).dtype)), batch[1])

    with pytest.raises(error, match=message):
        quality(change(net()), loss=loss, **options)


def test_no_batch_and_bad_gradients_are_refused():
    with pytest.raises(FastgradError, match="must each hold"):
        fg.proxy_quality(net(), [], data(), loss=loss_of)
    with pytest.raises(NonFiniteGradientError, match=r"0\.weight"):
        quality(loss=lambda m, b: loss_of(m, b) * math.inf)
    with pytest.raises(FastgradError, match=r"0\.weight alone was trained.*a lower rate"):
        quality(loss=lambda m, b: m(b[0] * 1e3).exp().mean(), rate=1e38)
    with pytest.raises(FastgradError, match="no tensor"):
        list(examples_of([{"a": 1}]))
