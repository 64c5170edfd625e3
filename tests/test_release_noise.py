"""Private releases: their noise is in the bar of staleness and diff, and is said wherever one ranks
by them."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter

import numpy as np
import pytest

import fastgrad as fg
import staleness_power
from fastgrad import cli, privacy, release_noise
from fastgrad.model_card import updated_card
from fastgrad.rank_agreement import agreement

P, N, CLIP, DELTA = 40, 256, 1.0, 1e-5


def spread(seed=0, width=2.0):
    """Expected energies of submodules, as widely spread as those of a small language model."""
    return np.random.default_rng(seed).lognormal(0, width, P)


def sample(energy, batches=16, noise=0.4, seed=1):
    return staleness_power.sample(energy, batches, noise, np.random.default_rng(seed))


def release(energy, multiplier, seed=0, length=0.3, coarse=None, hashed=None):
    """A release of norms in proportion to √energy, of length ``length`` together."""
    norms = np.sqrt(energy / energy.sum()) * length
    std = multiplier * 2 * CLIP / N
    names = tuple(f"layers.{i}.weight" for i in range(P))
    about = {
        "model": {"class": "Toy", "name_or_path": None, "revision": None, "weights_hash": hashed,
                  "n_parameters": 16 * P},
        "parameters": [(name, (4, 4), 1.0) for name in names],
        "dtypes": ["torch.float32"], "attention": None, "torch": None,
    }  # fmt: skip
    values = privacy.noised(norms, std, random.Random(seed))
    made = privacy.PrivateNorms(
        names, values, CLIP, N, "replace_one", 2 * CLIP / N, multiplier, std, 1.0, DELTA, "none",
        about,
    )  # fmt: skip
    return made.blueprint(["toy"], n_bootstrap=2, command="c", created="2026-01-01", coarse=coarse)


def verdicts(energy, multiplier, local, seeds=5, **kwargs):
    found = [release(energy, multiplier, s, **kwargs).staleness(local) for s in range(seeds)]
    return Counter(f.verdict for f in found), found


# Noise multipliers of epsilon 1, 2, 8 at the delta above, to two digits, and of next to no noise.
EPSILON = {1: 3.73, 2: 1.99, 8: 0.60}


def test_the_multipliers_are_those_of_the_epsilons():
    pytest.importorskip("dp_accounting")
    for epsilon, multiplier in EPSILON.items():
        exact, _, _ = privacy.calibrated(DELTA, epsilon=float(epsilon))
        assert exact == pytest.approx(multiplier, rel=0.02)


# -- staleness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [*EPSILON.values(), 0.03, 1e-6])
def test_noise_alone_is_never_called_drift(multiplier):
    """The same expected norms, many noises and several models."""
    for model in range(2):
        energy = spread(model)
        counts, found = verdicts(energy, multiplier, sample(energy, seed=model + 7))
        assert set(counts) <= {"fresh", "sample too small"}, (model, counts)
        for one in found:
            assert one.hidden == (one.verdict == "sample too small")
            assert one.noise.std == pytest.approx(multiplier * 2 * CLIP / N)
    if multiplier <= 0.1:
        assert set(counts) == {"fresh"}
    if multiplier == EPSILON[1]:
        assert set(counts) == {"sample too small"}


def test_without_the_bar_noise_would_be_drift():
    """So the test above can fail: the halves alone ask for more than noise leaves."""
    energy = spread()
    local = sample(energy)
    found = [release(energy, EPSILON[2], s).staleness(local) for s in range(4)]
    halves = min(f.local.spearman for f in found)
    full = [
        agreement(np.array([x[0] for x in release(energy, EPSILON[2], s).scores("rms").values()]),
                  local.grad_norm).spearman
        for s in range(4)
    ]  # fmt: skip
    assert max(full) < halves - 0.1


def test_another_sample_is_found_where_the_noise_permits():
    energy = spread()
    other = np.random.default_rng(3).permutation(energy)
    local = sample(energy)
    shares = {}
    for multiplier in (0.003, 0.1, EPSILON[1]):
        counts, found = verdicts(other, multiplier, local)
        shares[multiplier] = counts["drifted"] / 5
        assert counts["fresh"] == 0, multiplier
        assert all(f.hidden for f in found if f.verdict != "drifted")
    assert shares[0.003] == shares[0.1] == 1.0
    assert shares[EPSILON[1]] < 0.5
    assert "drifted" not in verdicts(energy, 0.1, local)[0]


def test_noise_is_not_taken_for_another_model():
    energy = spread()
    local = sample(energy)
    local.meta["weights_hash"] = "sha256:" + "0" * 64
    hashed = "sha256:" + "1" * 64
    counts, found = verdicts(energy, EPSILON[1], local, hashed=hashed)
    assert "different model" not in counts
    assert all(f.weights_match is False for f in found)
    turned = np.sort(energy)[np.argsort(np.argsort(-energy))]
    counts, _ = verdicts(turned, 0.003, local, hashed=hashed)
    assert set(counts) == {"different model"}


def test_what_is_said_of_a_hidden_answer():
    energy = spread()
    found = release(energy, EPSILON[1]).staleness(sample(energy))
    assert found.reason.startswith("the release's noise hides it")
    assert "larger epsilon" in found.reason
    assert (found.more_needed, found.more_examples) == (None, None)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["hidden"] is True
    assert told["noise"]["n"] == P
    clear = release(energy, 0.003).staleness(sample(energy))
    assert f"in the {clear.noise.n_above} of {P} norms above the release's noise" in clear.reason
    assert json.loads(json.dumps(clear.to_dict()))["noise"]["expected"]["spearman"] > 0.84
    for bar, limit in zip(clear.bars, clear.limits, strict=True):
        assert limit < bar <= 1


def test_a_small_local_sample_stays_the_reason():
    energy = spread()
    local = sample(energy, batches=4, noise=4.0)
    found = release(energy, 0.003).staleness(local)
    assert (found.verdict, found.hidden) == ("sample too small", False)
    assert "local ranks" in found.reason


def test_the_bar_falls_with_the_noise():
    norms = np.sqrt(spread())
    file = release(spread(), 0.003).file
    names = [s.name for s in file.submodules]
    left = []
    for multiplier in (1e-6, 0.003, 0.02, 0.1, 0.4):
        made = release(spread(), multiplier).file
        found = release_noise.effect(made, names, norms, np.full(P, 16.0))
        left.append(found.expected.spearman)
    assert left == sorted(left, reverse=True)
    assert left[0] > 0.999
    # The scale of the truth does not matter, and the same seed gives the same bar.
    twice = [release_noise.effect(file, names, k * norms, np.full(P, 16.0)) for k in (1.0, 1e3)]
    assert twice[0].expected == pytest.approx(twice[1].expected)


@pytest.mark.parametrize("kind", ["ranks", "deciles"])
def test_an_order_of_noised_norms(kind):
    """How far it is above the noise is not released: fresh if it agrees, never drifted."""
    energy = spread()
    local = sample(energy)
    counts, _ = verdicts(energy, 1e-4, local, coarse=kind)
    assert set(counts) == {"fresh"}
    for other in (energy, np.random.default_rng(3).permutation(energy)):
        counts, found = verdicts(other, EPSILON[1], local, coarse=kind)
        assert set(counts) == {"sample too small"}
        assert all(f.hidden and "does not say" in f.reason for f in found)


def test_deciles_of_exact_norms_are_compared_as_deciles():
    energy = spread()
    exact = fg.Blueprint.from_stats(sample(energy, seed=2), n_bootstrap=2, command="c")
    local = sample(energy)
    found = exact.coarse("deciles").staleness(local)
    assert found.verdict == "fresh"
    assert found.noise.expected.spearman < 1
    assert exact.coarse("ranks").staleness(local).noise is None
    other = sample(np.random.default_rng(3).permutation(energy))
    assert exact.coarse("deciles").staleness(other).verdict == "drifted"


# -- diff ----------------------------------------------------------------------------------------


def test_diff_takes_the_noise_into_its_bar():
    energy = spread()
    exact = fg.Blueprint.from_stats(sample(energy), n_bootstrap=2, command="c")
    other = fg.Blueprint.from_stats(sample(np.random.default_rng(3).permutation(energy)),
                                    n_bootstrap=2, command="c")  # fmt: skip
    for multiplier in EPSILON.values():
        for seed in range(3):
            private = release(energy, multiplier, seed)
            for found in (exact.diff(private), private.diff(exact)):
                assert found.verdict in ("agree", "unknown"), (multiplier, found.reason)
    assert "noise hides it" in exact.diff(release(energy, EPSILON[1])).reason
    assert exact.diff(release(energy, 0.003)).verdict == "agree"
    assert other.diff(release(energy, 0.003)).verdict == "differ"
    assert other.diff(release(energy, EPSILON[1])).verdict == "unknown"
    assert release(energy, 0.003).diff(release(energy, 0.003, 1)).verdict == "unknown"
    assert exact.diff(release(energy, 12.0, coarse="ranks")).verdict == "unknown"
    assert json.loads(json.dumps(exact.diff(release(energy, 0.003)).to_dict()))["noise"]["n"] == P


# -- what is said of a ranking -------------------------------------------------------------------


def test_show_and_card_mark_what_is_in_the_noise():
    made = release(spread(), EPSILON[8], 1)
    above = release_noise.above_noise(made.file)
    count = made.file.privacy.n_above_noise
    assert 0 < count == sum(above.values()) < P
    assert f"{count} of {P} norms above twice the noise" in made.summary()
    assert f"{count} of {P} norms above twice the noise" in updated_card(None, made, "m", [], None)
    # A row of each kind among the highest: fewer than ten are above the noise.
    few = release(spread(), EPSILON[1] * 1.5, 1)
    above = release_noise.above_noise(few.file)
    assert sum(above.values()) < 10
    rows = few.summary().split("highest rms")[1].splitlines()[1:]
    assert len(rows) == 10
    for row in rows:
        assert row.endswith("in the noise") != above[row.split()[0]]
    card = updated_card(None, release(spread(), EPSILON[1] * 2, 1), "m", [], None)
    assert "` (in the noise) |" in card
    exact = fg.Blueprint.from_stats(sample(spread()), n_bootstrap=2, command="c")
    for text in (exact.summary(), updated_card(None, exact, "m", [], None)):
        assert "noise)" not in text
        assert "in the noise" not in text
    coarse = release(spread(), 1.0, coarse="ranks")
    assert "is not released" in release_noise.in_noise(coarse.file)
    assert release_noise.in_noise(coarse.file) in coarse.summary()


def test_select_says_what_it_took_from_the_noise(tmp_path):
    made = release(spread(), EPSILON[1], 1)
    above = release_noise.above_noise(made.file)
    with pytest.warns(UserWarning, match=f"{sum(above.values())} of {P} norms above twice") as seen:
        chosen = fg.select(made, fraction=0.5)
    lost = [n for n in chosen.names if not above[n]]
    assert lost
    assert lost[0] in str(seen[0].message)
    assert chosen.meta["release_noise"]["n_above"] == sum(above.values())
    assert set(lost) <= set(chosen.meta["release_noise"]["not_above"])
    assert "private release" in chosen.summary()
    chosen.save(tmp_path / "s.json")
    assert fg.Selection.load(tmp_path / "s.json").meta == chosen.meta
    with pytest.warns(UserWarning, match="none is chosen"):
        fg.select(made, submodules=1)
    with pytest.warns(UserWarning, match="order may be that of noise"):
        fg.select(release(spread(), 1.0, coarse="ranks"), fraction=0.5)
    exact = fg.Blueprint.from_stats(sample(spread()), n_bootstrap=2, command="c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "release_noise" not in fg.select(exact, fraction=0.5).meta
        fg.select(release(spread(), 1e-6), fraction=0.5)  # all are above it
        fg.select(made, fraction=0.5, ranking="last")  # a control, which no norm has a say in


def test_the_verbs(tmp_path, capsys):
    """Exit codes and texts of show, staleness and select."""
    energy = spread()
    local = tmp_path / "local.safetensors"
    sample(energy).save(local)

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in args])
        return stop.value.code, *capsys.readouterr()

    release(energy, EPSILON[1]).save_pretrained(tmp_path / "hidden")
    code, out, _ = run("staleness", tmp_path / "hidden", local)
    assert code == 4
    assert out.startswith("sample too small: the release's noise hides it")
    release(energy, 0.003).save_pretrained(tmp_path / "clear")
    assert run("staleness", tmp_path / "clear", local)[0] == 0
    code, out, _ = run("blueprint", "show", tmp_path / "hidden")
    assert code == 0
    assert "norms above twice the noise" in out
    code, out, err = run("select", tmp_path / "hidden", "--fraction", 0.5, "-o",
                         tmp_path / "s.json")  # fmt: skip
    assert code == 0
    assert "note: the blueprint is a private release" in out
    assert "UserWarning" not in err
