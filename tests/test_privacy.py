"""Private release: exact clipping, sensitivity on adversarial neighbours, noise, the file."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm
from torch import nn

import fastgrad as fg
from fastgrad import clipping, privacy
from fastgrad.clipping import SLACK, clipped_norms
from fastgrad.errors import (
    BlueprintError,
    CoverageError,
    MissingExtraError,
    PrivacyError,
    SelectionError,
)
from fastgrad.identity import model_parameters
from tests.models import MODELS, batch_of, one_example, randomised
from tests.test_heavytail import page_says

pytest.importorskip("dp_accounting")

BOUND = {"replace_one": 2.0, "zero_out": 1.0, "add_or_remove_one": 1.0}


class Net(nn.Module):
    """Three submodules; the last one's gradient points where the target lies."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def squared(model, batch):
    x, y = batch
    return (model(x) - y).square().sum(1)


def in_batches(examples, size=4):
    x, y = examples
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def one_by_one(model, batches, losses, clip):
    """The definition: each example alone, its gradient cut, all added up in float64."""
    own = model_parameters(model)
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in own.items()}
    before = []
    for batch in batches:
        for j in range(len(next(iter(batch.values())))):
            model.zero_grad()
            losses(model, one_example(batch, j)).sum().backward()
            found = {n: p.grad.double() for n, p in own.items() if p.grad is not None}
            before.append(math.sqrt(sum(float(g.square().sum()) for g in found.values())))
            factor = min(1.0, clip * (1 - SLACK) / max(before[-1], 1e-300))
            for n, g in found.items():
                total[n] += factor * g
    model.zero_grad()
    return np.array([float(t.norm()) for t in total.values()]), np.array(before)


# -- clipping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert"])
def test_clipped_sums_are_those_of_single_examples(name):
    model = randomised(MODELS[name]).eval()
    batches = [batch_of(3, padding="right", seed=1), batch_of(2, tokens=7, masked=True, seed=2)]
    norms = one_by_one(model, batches, clipping.example_losses, 1.0)[1]
    for clip in (0.5 * norms.min(), float(np.median(norms)), 2 * norms.max()):
        expected, _ = one_by_one(model, batches, clipping.example_losses, clip)
        found = clipped_norms(model, batches, clip)
        assert found.names == list(model_parameters(model))
        assert found.n_examples == 5
        # Float32 gradients of batches of other sizes: rounding of sums of some hundred terms.
        np.testing.assert_allclose(found.norms, expected, rtol=1e-5, atol=1e-6 * clip)


def test_default_losses_are_the_models_own():
    for name in ("llama", "bert"):
        model = randomised(MODELS[name]).eval()
        batch = batch_of(3, padding="right", masked=True)
        own = [model(**one_example(batch, j)).loss.item() for j in range(3)]
        found = clipping.example_losses(model, batch).detach()
        np.testing.assert_allclose(found, own, rtol=1e-5)

    class Classifier(nn.Module):
        def forward(self, x):
            return type("Output", (), {"logits": x})

    x, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    found = clipping.example_losses(Classifier(), {"x": x, "labels": labels})
    torch.testing.assert_close(found, F.cross_entropy(x, labels, reduction="none"))


def test_the_clip_is_of_the_whole_model_and_not_of_each_submodule():
    model, data = Net(), (torch.randn(1, 3), 50 * torch.randn(1, 2))
    found = clipped_norms(model, in_batches(data), 1.0, squared)
    assert float(np.square(found.norms).sum()) == pytest.approx((1 - SLACK) ** 2, rel=1e-5)


def test_nothing_about_the_model_changes():
    model = randomised(MODELS["llama"]).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    kept = next(model.parameters())
    kept.grad = torch.ones_like(kept)
    fired = []
    kept.register_post_accumulate_grad_hook(fired.append)  # an optimizer in the backward pass
    torch.manual_seed(5)
    state = torch.get_rng_state()
    clipped_norms(model, [batch_of(2)], 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert fired == []
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_frozen_parameters_are_neither_clipped_by_nor_released():
    model, data = Net(), (torch.randn(5, 3), torch.randn(5, 2))
    model.a.requires_grad_(False)
    found = release(model, data, noise_multiplier=0.01)
    assert found.names == ("b.weight", "b.bias")
    entries = {s.name: s for s in found.blueprint().submodules}
    assert entries["a.weight"].coverage == "frozen"
    assert entries["a.weight"].grad_norm is None


# -- sensitivity -------------------------------------------------------------------------------


def distance(model, one, other, clip, n):
    a, b = (clipped_norms(model, in_batches(d), clip, squared).norms / n for d in (one, other))
    return float(np.linalg.norm(a - b))


def neighbours(data, example):
    """Adjacency -> the data set that differs from ``data`` in its last example."""
    x, y = data
    return {
        "replace_one": (torch.cat([x[:-1], example[0]]), torch.cat([y[:-1], example[1]])),
        "add_or_remove_one": (x[:-1], y[:-1]),
        "add": (torch.cat([x, example[0]]), torch.cat([y, example[1]])),
    }


def crafted():
    """Data sets of examples that pull as one, one of them enormous, or against each other."""
    x = torch.ones(12, 3)
    aligned = (x, torch.full((12, 2), 100.0))
    tiny = (torch.randn(12, 3), Net()(torch.randn(12, 3)).detach())
    far = (torch.full((1, 3), 1e3), torch.full((1, 2), 1e6))
    against = (torch.ones(1, 3), torch.full((1, 2), -100.0))
    return {
        "aligned": (aligned, far),
        "opposite": (aligned, against),
        "one huge outlier": (tiny, far),
        "one outlier against all": (tiny, against),
    }


@pytest.mark.parametrize("name", list(crafted()))
@pytest.mark.parametrize("clip", [1e-3, 1.0, 50.0])
def test_sensitivity_on_crafted_neighbours(name, clip):
    data, example = crafted()[name]
    model, n = Net(), len(data[0])
    others = neighbours(data, example)
    for adjacency, key in (("replace_one", "replace_one"), ("add_or_remove_one", "add"),
                           ("add_or_remove_one", "add_or_remove_one")):  # fmt: skip
        moved = distance(model, data, others[key], clip, n)
        assert moved <= BOUND[adjacency] * clip / n, (adjacency, moved * n / clip)


def test_the_bounds_are_reached():
    """So they cannot be lowered, and the test above can fail."""
    (data, _), clip, n = crafted()["aligned"], 1.0, 12
    against = crafted()["opposite"][1]
    others = neighbours(data, against)
    model = Net()
    model.requires_grad_(False)
    model.b.bias.requires_grad_(True)  # its gradient is the residual's direction: exactly aligned
    assert distance(model, data, others["replace_one"], clip, n) > 1.99 * clip / n
    assert distance(model, data, others["add_or_remove_one"], clip, n) > 0.99 * clip / n


def test_without_clipping_the_bound_breaks(monkeypatch):
    data, example = crafted()["one huge outlier"]
    other = neighbours(data, example)["replace_one"]
    monkeypatch.setattr(clipping, "_check_clipped", lambda *a: None)
    monkeypatch.setattr(clipping.np, "maximum", lambda norms, limit: np.full_like(norms, limit))
    assert distance(Net(), data, other, 1.0, 12) > 1e3 * 2 / 12


@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-3, 6), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_sensitivity_on_random_neighbours(seed, log_clip, log_scale, n):
    g = torch.Generator().manual_seed(seed)
    draw = lambda rows, columns: torch.randn(rows, columns, generator=g)  # noqa: E731
    data, example = (draw(n, 3), draw(n, 2)), (draw(1, 3), 10**log_scale * draw(1, 2))
    model, clip = Net(), 10**log_clip
    others = neighbours(data, example)
    assert distance(model, data, others["replace_one"], clip, n) <= 2 * clip / n
    assert distance(model, data, others["add"], clip, n) <= clip / n


def test_an_example_without_a_gradient_changes_nothing():
    """So removing an example and replacing it by such a one are the same step."""
    model = Net()
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    still = torch.randn(1, 3)
    target = model(still).detach()
    with_it = clipped_norms(model, in_batches((torch.cat([x, still]), torch.cat([y, target]))),
                            1.0, squared)  # fmt: skip
    without = clipped_norms(model, in_batches((x, y)), 1.0, squared)
    np.testing.assert_allclose(with_it.norms, without.norms, rtol=1e-5)


# -- noise and accounting ----------------------------------------------------------------------


def release(model, data, **kwargs):
    given_ = {"clip": 1.0, "n": len(data[0]), "delta": 1e-5, "noise_multiplier": 1.0,
              "loss": squared} | kwargs  # fmt: skip
    return fg.private_norms(model, in_batches(data), **given_)


def test_the_noise_is_gaussian_of_the_stated_size():
    values = np.linspace(0, 3, 20_000)
    noise = privacy.noised(values, 0.25, random.Random(0)) - values
    assert kstest(noise / 0.25, "norm").pvalue > 1e-3
    assert noise.std() == pytest.approx(0.25, rel=4 / math.sqrt(2 * 20_000))
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 4 / math.sqrt(20_000)
    # A grid much finer than the noise, and far coarser than the digits of a float.
    released = privacy.noised(values, 0.25, random.Random(0))
    grid = 2.0**-18
    np.testing.assert_array_equal(np.round(released / grid) * grid, released)
    assert (np.round(released / grid / 2) * grid * 2 != released).any()


@pytest.mark.parametrize("adjacency", list(BOUND))
def test_noise_goes_with_the_sensitivity(adjacency):
    data = torch.randn(8, 3), torch.randn(8, 2)
    found = release(Net(), data, adjacency=adjacency, clip=0.5, noise_multiplier=3.0,
                    generator=random.Random(1))  # fmt: skip
    assert found.sensitivity == BOUND[adjacency] * 0.5 / 8
    assert found.noise_std == 3.0 * found.sensitivity
    exact = clipped_norms(Net(), in_batches(data), 0.5, squared).norms / 8
    expected = privacy.noised(exact, found.noise_std, random.Random(1))
    np.testing.assert_array_equal(found.values, expected)


def test_noise_comes_from_the_operating_system(monkeypatch):
    used = []

    class Watched(random.SystemRandom):
        def gauss(self, mu=0.0, sigma=1.0):
            used.append(sigma)
            return super().gauss(mu, sigma)

    monkeypatch.setattr(privacy.random, "SystemRandom", Watched)
    data = torch.randn(4, 3), torch.randn(4, 2)
    random.seed(0)
    torch.manual_seed(0)
    first = release(Net(), data)
    assert len(used) == len(first.names)
    random.seed(0)
    torch.manual_seed(0)
    assert (release(Net(), data).values != first.values).all()


def test_epsilon_is_the_exact_one_and_two_other_accountants_agree():
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    for z, delta in ((0.7, 1e-3), (1.0, 1e-5), (4.0, 1e-6), (20.0, 1e-8)):
        multiplier, epsilon, name = privacy.calibrated(delta, noise_multiplier=z)
        assert multiplier == z
        assert name.startswith(f"dp-accounting {importlib.metadata.version('dp-accounting')}")
        # Balle and Wang, theorem 8, written out.
        reached = norm.cdf(0.5 / z - epsilon * z) - math.exp(epsilon) * norm.cdf(
            -0.5 / z - epsilon * z
        )
        assert reached == pytest.approx(delta, rel=1e-6)
        event = dp.GaussianDpEvent(z)
        pld = PLDAccountant().compose(event).get_epsilon(delta)
        assert epsilon - 1e-6 <= pld <= epsilon + 1e-3  # its grid rounds up, by 1e-4 a step
        assert RdpAccountant().compose(event).get_epsilon(delta) >= epsilon
    for epsilon in (0.1, 1.0, 8.0):
        multiplier, achieved, _ = privacy.calibrated(1e-6, epsilon=epsilon)
        assert epsilon * (1 - 1e-6) < achieved <= epsilon
        assert privacy.calibrated(1e-6, noise_multiplier=multiplier)[1] == achieved


def test_composition():
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    together = privacy.composed_epsilon([1.0, 2.0, 3.0], 1e-5)
    accountant = PLDAccountant()
    for z in (1.0, 2.0, 3.0):
        accountant.compose(dp.GaussianDpEvent(z))
    assert together == pytest.approx(accountant.get_epsilon(1e-5), abs=2e-3)
    assert privacy.composed_epsilon([2.0], 1e-5) == privacy.calibrated(
        1e-5, noise_multiplier=2.0
    )[1]
    with pytest.raises(PrivacyError, match="at least one"):
        privacy.composed_epsilon([], 1e-5)


def test_no_test_tells_neighbours_apart_better_than_promised():
    """The best test between the worst neighbours, one sensitivity apart, 100 000 draws each."""
    rng, draws = random.Random(2), 100_000
    z, delta = 1.0, 1e-3
    epsilon = privacy.calibrated(delta, noise_multiplier=z)[1]
    one = privacy.noised(np.zeros(draws), z, rng)
    other = privacy.noised(np.ones(draws), z, rng)
    gaps = []
    for threshold in np.linspace(-1, 5, 61):
        true, false = (one > threshold).mean(), (other > threshold).mean()
        gaps += [false - math.exp(epsilon) * true]
    # Sampling: each share is known to 0.16 %, the smaller one counts e^epsilon times.
    error = 4 * math.sqrt(delta / draws) * (1 + math.exp(epsilon / 2))
    assert delta - error < max(gaps) < delta + error + 2e-3


def test_page_noise_and_examples():
    multipliers = [privacy.calibrated(1e-6, epsilon=e)[0] for e in (1.0, 2.0, 8.0)]
    page_says("{:.2f}, {:.2f} and {:.2f}".format(*multipliers))
    share = 10 * math.sqrt(50)  # each submodule's norm is clip / share
    page_says(f"C/{share:.0f}", f"takes {math.ceil(4 * multipliers[1] * share)} examples")


# -- the file ----------------------------------------------------------------------------------


def test_a_file_depends_on_the_data_through_the_noised_norms_alone(monkeypatch):
    """Other examples, other lengths, other batches, parameters that no gradient reaches: with the
    same noised norms the file is the same to the byte."""
    model = randomised(MODELS["llama"])
    fixed = np.random.default_rng(0).normal(0.02, 0.02, len(list(model.parameters())))
    monkeypatch.setattr(privacy, "noised", lambda values, std, generator: fixed)
    dead = batch_of(6, seed=3)
    dead["labels"][:] = -100  # no example has a gradient
    texts = set()
    for batches in (
        [batch_of(6, seed=1)],
        [batch_of(2, tokens=t, padding="right", seed=t) for t in (7, 9, 11)],
        [dead],
    ):
        found = fg.private_norms(model, batches, clip=1.0, n=6, delta=1e-3,
                                 noise_multiplier=0.01)
        made = found.blueprint(["toy"], created="2026-01-01", command="c", n_bootstrap=20)
        texts.add(made.to_json())
    assert len(texts) == 1


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, f"{path}.{key}")
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from leaves(child, f"{path}[{i}]")
    else:
        yield path, value


def test_no_exact_number_is_in_the_file():
    model, data = Net(), (torch.randn(64, 3), torch.randn(64, 2))
    exact = clipped_norms(model, in_batches(data), 1.0, squared)
    found = release(model, data, noise_multiplier=0.5)
    text = json.loads(found.blueprint(["toy"]).to_json())
    secrets = np.concatenate([
        exact.norms, exact.norms / 64, (exact.norms / 64) ** 2, exact.stats.grad_norm,
        exact.stats.T.sum(1), exact.stats.sq.sum(1), np.median(exact.stats.T, 1),
    ])  # fmt: skip
    numbers = 0
    for path, value in leaves(text):
        if isinstance(value, float) and value not in (0.0, 1.0, 0.5):
            numbers += 1
            assert not np.isclose(value, secrets, rtol=1e-9, atol=0).any(), path
    assert numbers > 100
    # What a blueprint of exact statistics says of batches and single examples is not there.
    for entry in text["submodules"]:
        known = {k for k, v in entry.items() if v not in (None, 0, "")}
        assert known <= {
            "name", "shape", "coverage", "coverage_reason", "weight_norm", "rms", "noised_norm",
            "grad_norm", "relative_norm", "share", "block_fit_reason",
        }  # fmt: skip
    assert text["dead"] == text["checkpoints"] == []
    assert {k: v for k, v in text["noise"].items() if v is not None and k != "noise_scale_reason"
            } == {}  # fmt: skip
    assert text["block_vectors"] is text["block_fit"] is None
    # The seeds that are there are of the intervals, which everyone can compute anew.
    seeds = {p: v for p, v in leaves(text) if p.endswith("seed") and v is not None}
    assert set(seeds.values()) == {0}
    assert all(p.startswith(".fits.") for p in seeds)


def test_what_the_privacy_part_says():
    data = torch.randn(64, 3), torch.randn(64, 2)
    found = release(Net(), data, noise_multiplier=None, epsilon=2.0, clip=0.25)
    part = found.blueprint().file.privacy
    assert (part.mechanism, part.unit, part.adjacency) == ("gaussian", "example", "replace_one")
    assert (part.clip_norm, part.n, part.delta) == (0.25, 64, 1e-5)
    assert part.epsilon == pytest.approx(2.0, rel=1e-6)
    assert part.sensitivity == 2 * 0.25 / 64
    assert part.noise_std == part.noise_multiplier * part.sensitivity
    assert part.n_submodules == 4
    assert part.n_above_noise == int((found.values > 2 * part.noise_std).sum())
    for word in ("(2, 1e-05)", "replaced by any other", "n = 64", "cut to 0.25"):
        assert word in part.statement
    data_part = found.blueprint().file.data
    assert (data_part.clip, data_part.clip_norm, data_part.n_examples) == ("per_example", 0.25, 64)


def test_norms_are_corrected_for_the_noise():
    """The mean of the squares is that of the exact ones: noise adds its variance."""
    model, data = Net(), (torch.randn(32, 3), 9 + torch.randn(32, 2))
    exact = clipped_norms(model, in_batches(data), 1.0, squared).norms / 32
    found = release(model, data, noise_multiplier=1.0)
    energies = []
    for seed in range(400):
        values = privacy.noised(exact, found.noise_std, random.Random(seed))
        made = copy.copy(found)
        object.__setattr__(made, "values", values)
        energies.append([e["grad_norm"] ** 2 for e in made._entries()])
    clear = exact > 4 * found.noise_std  # those are never cut off at zero
    assert clear.sum() >= 2
    mean, error = np.mean(energies, 0), np.std(energies, 0) / 20
    assert (np.abs(mean - exact**2)[clear] < 4 * error[clear]).all()


def test_a_private_blueprint_is_one(tmp_path):
    model = randomised(MODELS["llama"])
    batches = [batch_of(4, seed=s) for s in range(8)]
    # Little noise, so that what is tested is the way through: 32 examples cannot be protected.
    made = fg.private_norms(model, batches, clip=0.5, n=32, delta=1e-3, noise_multiplier=0.02)
    made.blueprint(["toy"], tokens_per_step=1000).save_pretrained(tmp_path)
    back = fg.Blueprint.from_pretrained(tmp_path)
    back.verify(model)
    assert "flops" in back.k_star
    assert back.file.privacy.epsilon == made.epsilon
    assert fg.select(back, model=model, fraction=0.2).fraction <= 0.2
    with fg.Probe(model) as probe:
        for batch in batches:
            model(**batch).loss.backward()
    stats = probe.stats()
    assert back.staleness(stats).spearman > 0.5
    blended = back.blend(stats)
    assert blended.file.privacy.mechanism == "none"  # the local sample is in it, exact
    with pytest.raises(BlueprintError, match="protected by gaussian"):
        back.merge(fg.Blueprint.from_stats(stats, model=model))


# -- coarse ------------------------------------------------------------------------------------


def coarse_pair(kind):
    model = randomised(MODELS["llama"])
    found = fg.private_norms(model, [batch_of(4, seed=s) for s in range(8)], clip=0.5, n=32,
                             delta=1e-3, noise_multiplier=0.5)  # fmt: skip
    return model, found, found.blueprint(["toy"]), found.blueprint(["toy"], coarse=kind)


@pytest.mark.parametrize("kind", ["ranks", "deciles"])
def test_a_coarse_file_holds_the_order_alone(tmp_path, kind):
    model, found, full, coarse = coarse_pair(kind)
    numel = np.array([math.prod(s) for s in full.shapes])
    rms = found.values / np.sqrt(numel)
    order = np.argsort(-rms, kind="stable")
    rank = np.empty(len(order), dtype=int)
    rank[order] = np.arange(1, len(order) + 1)
    for s, r in zip(coarse.submodules, rank.tolist(), strict=True):
        if kind == "ranks":
            assert (s.rank, s.decile) == (r, None)
        else:
            assert (s.rank, s.decile) == (None, 1 + 10 * (r - 1) // len(rank))
    # Every number that is left is public, or an order: it stands in the file of other norms that
    # are ordered alike, too.
    other = copy.copy(found)
    moved = np.sort(np.random.default_rng(0).normal(0.02, 0.01, len(rms)))[::-1]
    values = np.empty_like(moved)
    values[order] = moved
    object.__setattr__(other, "values", values * np.sqrt(numel))
    assert other.blueprint(["toy"], coarse=kind).to_json() == coarse.to_json()
    part = coarse.file.privacy
    assert (part.mechanism, part.released, part.epsilon) == ("gaussian", kind, found.epsilon)
    assert f"Only their {kind}" in part.statement
    # It is a blueprint all the same.
    coarse.save_pretrained(tmp_path)
    back = fg.Blueprint.from_pretrained(tmp_path)
    assert back.to_json() == coarse.to_json()
    scores = back.scores("rms")
    ranked = sorted(scores, key=lambda n: -scores[n][0])
    if kind == "ranks":
        assert ranked == [full.names[i] for i in order]
    chosen = fg.select(back, model=model, fraction=0.3)
    assert 0 < chosen.fraction <= 0.3
    assert kind in back.summary()
    assert "epsilon" in back.summary()


def test_coarse_is_not_private_by_itself():
    stats_model = randomised(MODELS["llama"])
    with fg.Probe(stats_model) as probe:
        for seed in range(4):
            stats_model(**batch_of(3, seed=seed)).loss.backward()
    exact = fg.Blueprint.from_stats(probe.stats(), model=stats_model)
    coarse = exact.coarse("ranks")
    assert coarse.file.privacy.mechanism == "none"
    assert "no privacy guarantee" in coarse.file.privacy.statement
    assert coarse.file.fits is None
    assert coarse.k_star == {}
    agreement = coarse.staleness(probe.stats())
    assert agreement.spearman == pytest.approx(1.0)
    assert coarse.diff(exact).spearman == pytest.approx(1.0)
    exact_scores, ranks = exact.scores("rms"), coarse.scores("rms")
    assert sorted(exact_scores, key=lambda n: -exact_scores[n][0]) == sorted(
        ranks, key=lambda n: -ranks[n][0]
    )


def test_what_ranks_cannot_do_is_refused():
    model, _, full, coarse = coarse_pair("deciles")
    with fg.Probe(model) as probe:
        model(**batch_of(3)).loss.backward()
        model(**batch_of(3, seed=2)).loss.backward()
    for ranking in ("norm", "relative"):
        with pytest.raises(SelectionError, match=f"deciles of rms alone.*rank by {ranking}"):
            fg.select(coarse, model=model, fraction=0.3, ranking=ranking)
        with pytest.raises(SelectionError, match="deciles of rms alone"):
            coarse.scores(ranking)
    with pytest.raises(BlueprintError, match="cannot be blended"):
        coarse.blend(probe.stats())
    with pytest.raises(BlueprintError, match="deciles alone cannot be merged"):
        coarse.merge(full)
    with pytest.raises(BlueprintError, match="a coarse file cannot be made coarse"):
        coarse.coarse("ranks")
    with pytest.raises(BlueprintError, match="use ranks or deciles"):
        full.coarse("quartiles")
    one, other = (fg.Blueprint.from_stats(probe.stats(), domain_tags=[tag], model=model)
                  for tag in "ab")  # fmt: skip
    two = one.with_domain(other)
    with pytest.raises(BlueprintError, match="several domains"):
        two.coarse("ranks")
    with pytest.raises(SelectionError, match=r"no k\* for .memory.; it has none"):
        fg.select(coarse, model=model, k_star="memory")


# -- what is refused ---------------------------------------------------------------------------


class Normalised(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class Dropping(Net):
    def forward(self, x):
        return self.b(F.dropout(self.a(x), 0.5, training=True))


def contrastive(model, batch):
    x, _ = batch
    similar = model(x) @ model(x.flip(1)).T
    return F.cross_entropy(similar, torch.arange(len(x)), reduction="none")


def targets_as_negatives(model, batch):
    x, y = batch
    return F.cross_entropy(model(x) @ y.T, torch.arange(len(x)), reduction="none")


def weighted_by_the_others(model, batch):
    losses = squared(model, batch)
    return losses / losses.sum()


class Meeting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


class Secretly(Net):
    def forward(self, x):
        return self.b(Meeting.apply(self.a(x)))


class Reader(list):
    """Batches in another order each time they are read."""

    def __iter__(self):
        self.reverse()
        return super().__iter__()


DATA = torch.randn(8, 3, generator=torch.Generator().manual_seed(4)), torch.randn(
    8, 2, generator=torch.Generator().manual_seed(5)
)


@pytest.mark.parametrize(
    ("model", "loss", "error", "message"),
    [
        (Normalised, squared, PrivacyError, "cannot be computed without its batch"),
        (Net, contrastive, CoverageError, "examples meet"),
        (Net, targets_as_negatives, CoverageError, r"alone and without padding"),
        (Net, weighted_by_the_others, CoverageError, "examples meet"),
        (Secretly, squared, CoverageError, r"alone and without padding"),
        (Dropping, squared, CoverageError, "examples meet, or are random"),
        (Net, lambda m, b: squared(m, b).mean(), PrivacyError, r"returned \(\)"),
        (Net, lambda m, b: squared(m, b).tolist(), PrivacyError, "returned list"),
        (Net, lambda m, b: squared(m, b)[::2], PrivacyError, "a batch has 2 losses, and its"),
        (Net, lambda m, b: squared(m, b).bfloat16(), PrivacyError, "16 bits"),
        (lambda: Net().bfloat16(), lambda m, b: squared(m, [t.bfloat16() for t in b]),
         PrivacyError, "a.weight is torch.bfloat16"),
        (Net, None, PrivacyError, "no 'labels'"),
    ],
)  # fmt: skip
def test_what_the_bound_does_not_hold_for_is_refused(model, loss, error, message):
    with pytest.raises(error, match=message):
        release(model(), DATA, loss=loss)


@pytest.mark.parametrize(
    ("model", "loss", "where"),
    [(Normalised, squared, "batch_norm"), (Net, weighted_by_the_others, "sum")],
)
def test_the_probe_names_where_examples_meet(monkeypatch, model, loss, where):
    """By itself too: the check of one batch is no reason to believe the others."""
    monkeypatch.setattr(clipping, "_check_alone", lambda *a: None)
    with pytest.raises(CoverageError, match=f"examples meet in .*{where}"):
        release(model(), DATA, loss=loss)


def test_two_passes_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(clipping, "_check_alone", lambda *a: None)
    with pytest.raises(PrivacyError, match="the two passes over the data differ"):
        release(Dropping(), DATA)


def test_batches_in_another_order_are_refused():
    with pytest.raises(PrivacyError, match=r"differ.*shuffle=False"):
        fg.private_norms(Net(), Reader(in_batches(DATA, 3)), clip=0.1, n=8, delta=1e-3,
                         epsilon=1.0, loss=squared)  # fmt: skip


def test_a_generator_is_read_once_and_kept():
    made = clipped_norms(Net(), (b for b in in_batches(DATA)), 1.0, squared)
    np.testing.assert_array_equal(made.norms, clipped_norms(Net(), in_batches(DATA), 1.0,
                                                            squared).norms)  # fmt: skip


def test_autocast_and_packed_rows_are_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(PrivacyError, match="autocast is on"):
        release(Net(), DATA)
    model = randomised(MODELS["llama"])
    batch = batch_of(2, tokens=8) | {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)}
    with pytest.raises(PrivacyError, match="the losses are of 2 examples, and 4 entered"):
        clipped_norms(model, [batch], 1.0)


def test_a_parameter_whose_influence_is_not_known_is_refused():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g * w, (g * x).sum(0)

    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(40_000))

        def forward(self, x):
            wide = Hidden.apply(x[:, :1].expand(-1, 40_000), self.w)
            return super().forward(x) + wide.mean(1, keepdim=True)

    from fastgrad import probe

    with pytest.MonkeyPatch.context() as patch:  # examples' gradients of it no longer fit
        patch.setattr(probe.Probe.__init__, "__kwdefaults__",
                      probe.Probe.__init__.__kwdefaults__ | {"dense_limit": 1000})  # fmt: skip
        with pytest.raises(CoverageError, match=r"w: .*cannot be cut"):
            release(Odd(), DATA)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": 9}, "n = 9 examples were announced and 8 are there"),
        ({"n": 9, "adjacency": "zero_out"}, "9 examples were announced"),
        ({"n": 0}, "n must be a whole number"),
        ({"n": 8.0}, "n must be a whole number"),
        ({"clip": 0.0}, "clip must be a finite positive number"),
        ({"clip": math.nan}, "clip must be"),
        ({"delta": 0.2}, r"delta = 0.2 is not below 1/n = 0.125"),
        ({"delta": 0.0}, "delta must lie between 0 and 1"),
        ({"delta": 1.0}, "delta must lie between 0 and 1"),
        ({"epsilon": 1.0}, "give epsilon, or noise_multiplier"),
        ({"noise_multiplier": None}, "give epsilon, or noise_multiplier"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be a finite positive number"),
        ({"noise_multiplier": None, "epsilon": math.inf}, "epsilon must be a finite positive"),
        ({"adjacency": "any"}, "use replace_one, zero_out, add_or_remove_one"),
    ],
)
def test_arguments_that_promise_nothing_are_refused(kwargs, message):
    with pytest.raises(PrivacyError, match=message):
        release(Net(), DATA, **kwargs)


def test_any_number_of_examples_under_a_public_constant():
    """It alone divides: a mean over the eight that are there would tell how many there are."""
    found = release(Net(), DATA, n=10, adjacency="add_or_remove_one", generator=random.Random(3))
    assert found.n == 10
    exact = clipped_norms(Net(), in_batches(DATA), 1.0, squared).norms
    np.testing.assert_array_equal(
        found.values, privacy.noised(exact / 10, found.noise_std, random.Random(3))
    )
    assert found.blueprint().n_examples == 10


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtraError, match=r"fastgrad\[privacy\]"):
        release(Net(), DATA)


def test_padding_that_moves_other_examples_is_refused():
    """Left padding without position ids: the longest row decides where the others' positions
    begin, so replacing it would change every gradient."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=64, n_embd=16, n_layer=1, n_head=2,
                                     initializer_range=0.5)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)

    def batch(left, positions=False):
        ids, mask = torch.randint(1, 40, (6, 12)), torch.ones(6, 12, dtype=torch.long)
        mask[1:, :6] = 0
        if not left:
            mask = mask.flip(1)
        labels = ids.masked_fill(mask == 0, -100)
        made = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if positions:
            made["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            made["labels"][mask.cumsum(1) == 1] = -100  # it would be guessed from padding
        return made

    options = {"clip": 1.0, "n": 6, "delta": 1e-3, "noise_multiplier": 1.0}
    with pytest.raises(CoverageError, match="without padding"):
        fg.private_norms(model, [batch(left=True)], **options)
    fg.private_norms(model, [batch(left=False)], **options)
    fg.private_norms(model, [batch(left=True, positions=True)], **options)


def test_what_would_hide_or_tell_too_much_is_refused():
    data = torch.randn(64, 3), 9 * torch.randn(64, 2)
    found = release(Net(), data, adjacency="add_or_remove_one")
    with pytest.raises(BlueprintError, match="secret"):
        found.blueprint(datasets=[{"name": "chats", "n_examples": 8}])
    private = found.blueprint(domain_tags=["a"], n_bootstrap=5)
    other = release(Net(), data).blueprint(domain_tags=["b"], n_bootstrap=5)
    with pytest.raises(BlueprintError, match="private release"):
        private.with_domain(other)


def test_words_never_promise_more_than_the_numbers():
    from fastgrad.privacy import _upwards

    for x in (9.99726, 0.123449, 1.0, 2.0001, 3e-7, 12345.678):
        assert x * (1 - 1e-8) <= float(_upwards(x)) <= x * 1.001 + 1e-12
