"""The experiments: each command runs, and its record says what its own raw results say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import fastgrad as fg
from arms_verdict import difference
from experiments import common, distribution, joint, partial_update, transfer
from fastgrad.concentration import lorenz
from fastgrad.errors import FastgradError
from fastgrad.measuring import measure

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing",
                                        "ignore:Already found a `peft_config`")  # fmt: skip
RESULTS = Path(__file__).parent.parent / "bench" / "results" / "experiments"
NAMES = ("distribution", "joint", "transfer", "partial_update")


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


def test_joint(base, work, tmp_path):
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
        if r["against"] is not None:
            a, b = ([x["test_rows"] for x in arms[key]["runs"]] for key in (label, joint.BOTH))
            assert r["against"]["mean"] == pytest.approx(difference(a, b).mean)
    choice = record["choices"][0]
    assert choice["n_examples"] == len(set(choice["ids"])) == round(0.25 * record["pool"])
    assert choice["share"] >= record["choices"][1]["share"]


@pytest.mark.slow
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


@pytest.mark.slow
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
