"""Staleness: how often its verdicts are wrong, in samples with drift of a known size or none."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binom

import staleness_power
from fastgrad import staleness
from fastgrad.blueprint import Blueprint
from tests.test_selection import synthetic_stats


def released(energy, noise=0.7, batches=32, seed=0):
    stats = staleness_power.sample(energy, batches, noise, np.random.default_rng(seed))
    return Blueprint.from_stats(stats, n_bootstrap=1, command="", created="2000-01-01")


def at_most(share: float, trials: int) -> float:
    """What a true share of ``share`` exceeds in one of a thousand runs."""
    return float(binom.ppf(0.999, trials, share)) / trials


@pytest.mark.parametrize("noise", staleness_power.NOISES)
def test_error_rates(noise):
    """No drift is called drift in 5 % of samples at most; a large one is found in 90 %."""
    fresh, large = staleness_power.rates(60, 8, noise, (0.0, 2.5), trials=30)
    assert fresh.spearman == 1
    assert fresh.share("drifted") <= at_most(0.05, 30)
    assert fresh.share("different model") == 0  # without hashes nothing says so
    assert large.spearman < 0.6
    settled = large.trials - large.verdicts["sample too small"]
    assert settled >= 15
    assert large.verdicts["fresh"] <= at_most(0.1, 30) * settled


def test_power_grows_with_the_drift():
    found = staleness_power.rates(30, 16, 0.7, (0.0, 0.5, 1.5), trials=20)
    shares = [r.share("drifted") for r in found]
    assert shares == sorted(shares)
    assert shares[-1] > 0.7
    assert [r.spearman for r in found] == sorted((r.spearman for r in found), reverse=True)


def test_each_statistic_stands_beside_the_halves():
    energy = np.random.default_rng(0).lognormal(0, 1.5, 40)
    local = staleness_power.sample(energy, 8, 0.7, np.random.default_rng(1))
    found = released(energy).staleness(local)
    for half in (found.local, found.released):
        assert half.basis == "batches"
        for name in ("spearman", "weighted_tau", "top_jaccard"):
            assert 0 < getattr(half, name) <= 1
            assert getattr(found, name) > getattr(half, name) - 0.2
    assert (found.local.n, found.released.n) == (8, 32)
    assert json.loads(json.dumps(found.to_dict()))["released"]["n"] == 32


def test_reliability_follows_spearman_brown():
    """What two halves say of the whole: its correlation with another sample of the same size."""
    rng = np.random.default_rng(2)
    said, seen = [], []
    for _ in range(30):
        energy = rng.lognormal(0, 0.5, 60)
        one, other = (staleness_power.sample(energy, 8, 1.0, rng) for _ in range(2))
        said.append(staleness.split_half(one).reliability)
        seen.append(staleness.agreement(one.grad_norm, other.grad_norm).spearman)
    error = np.std(np.subtract(said, seen)) / np.sqrt(30)
    # The formula is about linear correlation of sums; ranks and skewed energies bend it a little.
    assert abs(np.mean(said) - np.mean(seen)) < 4 * error + 0.03
    assert 0.3 < np.mean(seen) < 0.9


def test_the_number_that_is_asked_for_settles_it():
    """With as many batches more as were asked for, most samples get a verdict."""
    rng = np.random.default_rng(3)
    asked = settled = 0
    for _ in range(25):
        energy = rng.lognormal(0, 0.5, 60)
        reference = released(energy, noise=1.0, batches=200, seed=int(rng.integers(10**6)))
        small = reference.staleness(staleness_power.sample(energy, 6, 1.0, rng))
        if small.verdict != "sample too small" or small.more_needed is None:
            continue
        assert f"about {small.more_needed} more batches" in small.reason
        larger = staleness_power.sample(energy, 6 + small.more_needed, 1.0, rng)
        asked += 1
        settled += reference.staleness(larger).verdict != "sample too small"
    assert asked >= 10
    assert settled >= 0.4 * asked  # the number is the one at which half of them would pass


def test_dead_parameters_are_left_out():
    energy = np.random.default_rng(0).lognormal(0, 1.5, 40)
    energy[:10] = 0.0
    local = staleness_power.sample(energy, 8, 0.7, np.random.default_rng(1))
    reference = released(energy)
    assert reference.dead == local.dead == [f"layers.{i}.weight" for i in range(10)]
    found = reference.staleness(local)
    assert (found.n_compared, found.verdict) == (30, "fresh")
    # Dead there and alive here is a difference that counts.
    energy[:10] = 1.0
    revived = staleness_power.sample(energy, 8, 0.7, np.random.default_rng(1))
    assert reference.staleness(revived).n_compared == 40


def test_what_is_asked_for_in_examples():
    shapes = {f"layers.{i}.weight": (4, 4) for i in range(30)}
    energy = np.exp(0.15 * np.linspace(-1, 1, 30))
    reference = Blueprint.from_stats(
        synthetic_stats(shapes, profile=energy, n_batches=100), n_bootstrap=1
    )
    seen = 0
    for seed in range(1, 9):
        found = reference.staleness(
            synthetic_stats(shapes, profile=energy, n_batches=6, per_batch=5, seed=seed)
        )
        if found.verdict == "sample too small" and found.more_needed is not None:
            seen += 1
            assert found.more_examples == 5 * found.more_needed
            assert f"more batches ({found.more_examples} examples)" in found.reason
    assert seen >= 3
    # Too few to be halved: the fewest that would do.
    one = reference.staleness(synthetic_stats(shapes, profile=energy, n_batches=1, per_batch=3))
    assert (one.verdict, one.more_needed, one.more_examples) == ("sample too small", None, 1)
    # Examples are halved where there are few batches; then the two numbers are one.
    few = reference.staleness(synthetic_stats(shapes, profile=energy, n_batches=2, per_batch=4))
    assert few.local.basis == "examples"
    assert few.more_examples == few.more_needed
