"""The experiments: each command runs, and its record says what its own raw results say."""

from __future__ import annotations

import importlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import fastgrad as fg
from arms_verdict import difference
from experiments import (
    common,
    distribution,
    joint,
    joint_arms,
    mislabelled,
    partial_update,
    proxy,
    transfer,
)
from fastgrad.concentration import lorenz
from fastgrad.errors import FastgradError
from fastgrad.measuring import measure

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing",
                                        "ignore:Already found a `peft_config`")  # fmt: skip
RESULTS = Path(__file__).parent.parent / "bench" / "results" / "experiments"
NAMES = ("distribution", "joint", "transfer", "partial_update", "proxy", "mislabelled")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def base(work):
    return common.Base(work, common.sizes("fast"), "cpu")


def run(module, work, tmp_path):
    module.main(["--fast", "--work", str(work), "--out", str(tmp_path)])
    name = module.__name__.split(".")[-1]
    for ending in ("png", "svg", "md"):
        assert (tmp_path / f"{name}.{ending}").stat().st_size > 0
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.md").read_text() == module.table(record) + "\n"
    assert {"torch", "processor", "date", "commit"} <= set(record["environment"])
    return record


def test_distribution(base, work, tmp_path):
    record = run(distribution, work, tmp_path)
    found = {(r["short"], r["population"]): r for r in record["rows"]}
    assert len(found) == len(common.CHECKPOINTS) * len(distribution.POPULATIONS)
    model, s = base.model(0.5), base.settings
    rows = base.rows["code_valid"][: s.probe_rows * s.probe_batches]
    stats, _ = measure(model, [{"input_ids": p, "labels": p} for p in rows.split(s.probe_rows)])
    one = found["Llama 50%", "submodules"]
    expected = np.sort(stats.grad_norm)[::-1][np.array(one["curve"]["rank"]) - 1]
    np.testing.assert_allclose(one["curve"]["norm"], expected, rtol=1e-5)
    assert one["curve"]["rank"][-1] == one["tail"]["n"] + one["tail"]["n_dead"]
    share = lorenz(stats.grad_norm**2, stats.numel).share_at(0.2)
    assert one["gamma"]["share"][2] == pytest.approx(share, rel=1e-5)
    for r in record["rows"]:
        low, high = r["tail"]["rank_interval"]
        if low is not None:
            assert r["interval_in_paper_range"] == (low > 1 and high < 2)
            assert not (r["interval_in_paper_range"] and r["interval_outside_paper_range"])


def test_joint(base, work, tmp_path, monkeypatch):
    monkeypatch.setitem(joint.RESAMPLES, "fast", 5)
    record = run(joint, work, tmp_path)
    arms = {r["label"]: r for r in record["arms"]}
    same = {r["cost"] for label, r in arms.items() if "five times" not in label}
    assert len(same) == 1
    assert arms["full, five times the cost"]["cost"] == pytest.approx(5 * same.pop())
    assert [p["step"] for p in record["points"]] == [0, 2, 5]
    first, last = record["points"][0]["loss"], record["points"][-1]["loss"]
    assert last < first  # the reports are of a model that learns
    for label, r in arms.items():
        assert r["summary"]["trained"] <= (0.2 if r["steps"] == 5 and "full" not in label else 1)
        for found, other in ((r["against"], joint.BOTH), (r["against_all"], r["reference"])):
            if found is not None:
                a, b = ([x["test_rows"] for x in arms[key]["runs"]] for key in (label, other))
                assert found["mean"] == pytest.approx(difference(a, b).mean)
    online = arms["joint, rows anew every step by cosine"]
    assert online["choosing"] == record["pool"] + 5 * 16 + record["target"]
    choice = record["choices"][0]
    assert choice["n_examples"] == len(set(choice["ids"])) == round(0.25 * record["pool"])
    assert choice["share"] >= record["choices"][1]["share"]


def test_transfer(work, tmp_path):
    record = run(transfer, work, tmp_path)
    assert [d["domain"] for d in record["domains"]] == list(common.DOMAINS)
    for d in record["domains"]:
        arms = {r["key"]: r for r in d["arms"]}
        assert arms["local"]["overlap"] == 1.0
        assert arms["local"]["cost"] is None
        assert set(d["staleness"]) == {"early", "released"}
        for key, r in arms.items():
            assert r["summary"]["trained"] <= (1.0 if key == "full" else 0.2)
            if r["selected"] is not None and key != "local":
                a, b = set(r["selected"]), set(arms["local"]["selected"])
                assert (r["overlap"] == 1.0) == (a == b)
        released, local = (np.mean([x["test"] for x in arms[k]["runs"]])
                           for k in ("released", "local"))  # fmt: skip
        assert arms["released"]["cost"]["mean"] == pytest.approx(released - local, abs=1e-5)


def test_partial_update(work, tmp_path):
    pytest.importorskip("peft")
    record = run(partial_update, work, tmp_path)
    arms = {(r["ranking"], r["granularity"]): r for r in record["arms"]}
    assert len(arms) == 2 + 3 * (len(partial_update.RANKINGS) + 1)
    for (ranking, _), r in arms.items():
        assert r["summary"]["trained"] <= (1.0 if ranking == "full" else 0.25)
        assert len({x["rate"] for x in r["runs"]}) == 1
        if r["same_as"]:
            assert r["runs"] == arms[tuple(r["same_as"].split())]["runs"]
    assert arms["norm", "tiles"]["against"]["mean"] == pytest.approx(
        np.mean([x["test"] for x in arms["norm", "tiles"]["runs"]])
        - np.mean([x["test"] for x in arms["random", "tiles"]["runs"]]), abs=1e-5)  # fmt: skip


def test_proxy_pools_what_its_rows_say(work, tmp_path, monkeypatch):
    monkeypatch.setattr(proxy, "BOOTSTRAP", 50)
    monkeypatch.setattr(proxy, "LONG_STEPS", 3)
    record = run(proxy, work, tmp_path)
    rows = record["rows"]
    assert [(r["domain"], r["seed"]) for r in rows] == [("prose", 0), ("prose", 1), ("headers", 0)]
    for c in record["correlations"]:
        own = [r for r in rows if r["domain"] == c["domain"]]
        values = []
        for r in own:
            pairs = [
                (s / (n if c["score"] not in ("norm", "size") else n**0.5 if c["score"] == "norm"
                      else 1), e / n) if c["per_element"] else (s, e)
                for s, e, n in zip(r["scores"][c["score"]], r["effects"][c["outcome"]], r["sizes"],
                                   strict=True) if s is not None
            ]  # fmt: skip
            values.append(spearmanr(*zip(*pairs, strict=True)).statistic)
        assert c["n"] == len(pairs)
        assert c["value"] == pytest.approx(np.mean(values), abs=1e-9)
        assert c["interval"][0] <= c["value"] + 0.05
        if c["score"] == "norm":
            assert c["norm_less_score"] == 0


def test_mislabelled(work, tmp_path):
    pytest.importorskip("sklearn")
    record = run(mislabelled, work, tmp_path)
    last = {(r["seed"], r["score"]): r for r in record["rows"] if r["epoch"] == 20}
    for seed in record["seeds"]:
        assert last[seed, "loss"]["auroc"] > 0.8
        assert last[seed, "norm"]["auroc"] > 0.8
        assert 0.3 < last[seed, "random"]["auroc"] < 0.7


def test_adaptation_uses_the_rows_that_it_is_given(base):
    seen = []

    def prepare(model, seed):
        model.register_forward_pre_hook(
            lambda m, a, k: seen.append(k["input_ids"]) if m.training else None, with_kwargs=True
        )
        selection = fg.select(None, model, fraction=0.2, ranking="last")
        return common.sparse(selection)(model, seed)

    given = [3, 5, 9, 11]
    result = common.Adaptation(base, "headers", prepare, 0, rows=given, steps=2, rate=0.01).run()
    expected = {tuple(base.rows["headers_train"][i].tolist()) for i in given}
    assert {tuple(row.tolist()) for rows in seen for row in rows} == expected
    assert [t["rate"] for t in result["tried"]] == [0.01]


@pytest.mark.parametrize(
    ("best", "refine", "expected"),
    [
        (4e-3, False, [1e-3, 4e-3, 1.6e-2]),
        (1e-4, False, [1e-3, 4e-3, 1.6e-2, 2.5e-4, 6.25e-5, 1.56e-5]),
        (0.1, False, [1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256]),
        (3e-4, True, [1e-3, 4e-3, 1.6e-2, 2.5e-4, 6.25e-5, 3e-4]),
        (1e-30, False, [1e-3, 4e-3, 1.6e-2, 2.5e-4, 6.25e-5, 1.56e-5, 3.89e-6]),
    ],
)
def test_rates_go_on_until_the_best_lies_between_two_others(base, best, refine, expected):
    class Valley(common.Adaptation):
        """Loss by the logarithm of the rate, without training."""

        def one_rate(self, number, rate):
            return None, {"rate": rate, "valid": np.log(rate / best) ** 2}

        def keep(self, prepared, outcome):
            self.result |= outcome

    found = Valley(base, "prose", None, 0)
    found.spec = replace(found.spec, settings=replace(
        base.settings, rates=(1e-3, 4e-3, 1.6e-2), refine=refine))  # fmt: skip
    result = found.all_rates()
    assert [t["rate"] for t in result["tried"]] == pytest.approx(expected)
    assert result["rate"] == min(expected, key=lambda rate: abs(np.log(rate / best)))
    assert common.at_the_end(result) == (best == 1e-30)


def test_scores_and_targets_see_the_trained_blocks_only(base):
    """An alignment is the inner product of gradients in the selected tiles."""
    model = base.model()
    selection = fg.select(None, model, fraction=0.2, blocks="16x16", ranking="random")
    pool, target = base.rows["prose_train"][:3], base.rows["prose_train"][3:6]

    def gradient(rows):
        model.eval().zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    inside = {n: torch.zeros(selection.shapes[n]) for n in selection.blocks}
    for name, ids in selection.blocks.items():
        grid = selection.grid(name)
        for r0, r1, c0, c1 in map(grid.bounds, ids.tolist()):
            inside[name].view(grid.rows, grid.cols)[r0:r1, c0:c1] = 1
    aim = gradient(target)
    scores = joint_arms.signed_scores(base, pool, target, selection)["alignment"]
    for row, score in zip(pool, scores, strict=True):
        own = gradient(row[None])
        expected = sum(float((own[n] * aim[n] * mask).sum()) for n, mask in inside.items())
        assert score == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_rows_are_chosen_anew_for_every_step_and_the_target_is_renewed(base, monkeypatch):
    monkeypatch.setattr(joint_arms, "RENEWAL", 2)
    selection = fg.select(None, base.model(), fraction=0.2, blocks="16x16", ranking="random")
    target = base.rows["prose_train"][40:44]
    arm = joint_arms.JointArm(common.sparse(selection), lambda _: np.arange(40), 3, 0.2, 0,
                              online="alignment", selection=selection)  # fmt: skip
    seen, directions = [], []
    choose = fg.BatchChooser.choose

    def watched(self, batch):
        directions.append(self.targets)
        found = choose(self, batch)
        order = np.argsort(-found.scores, kind="stable")[:4]
        seen.append((batch["input_ids"], found.batch["input_ids"]))
        assert torch.equal(found.batch["input_ids"], batch["input_ids"][order])
        return found

    monkeypatch.setattr(fg.BatchChooser, "choose", watched)
    run = joint_arms.Online(arm, base, "prose", 0, target)
    trained = []
    take = run.batch

    def batch(prepared, rows):
        trained.append(take(prepared, rows))
        return trained[-1]

    run.batch = batch
    run.run()
    assert [len(wide) for wide, _ in seen] == [16] * 3
    assert all(torch.equal(a, b) for (_, a), b in zip(seen, trained, strict=True))
    same = [a is b for a, b in itertools.pairwise(directions)]
    assert same == [True, False]  # every second step
    name = next(iter(selection.blocks))
    assert not torch.equal(directions[0][name], directions[2][name])  # of the model as it is


def test_headers_are_split_by_file_and_refused_where_there_are_none(tmp_path):
    parts = common.read_headers()
    texts = [text for part in parts.values() for text in part]
    assert all(parts.values())
    assert len(texts) >= 20
    assert not set(parts["train"]) & set(parts["test"])
    assert not set(parts["train"]) & set(parts["valid"])
    with pytest.raises(FastgradError, match="Remedy: install Python's development files"):
        common.read_headers(tmp_path)


def test_gpu_sizes_are_refused_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        common.asked("joint", "", "small", ["--gpu"])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_committed_tables_come_from_committed_records(name):
    path = RESULTS / f"{name}.json"
    if not path.exists():
        pytest.skip("this experiment has not been recorded")
    module = importlib.import_module(f"experiments.{name}")
    table = module.table(json.loads(path.read_text()))
    assert (RESULTS / f"{name}.md").read_text() == table + "\n"
