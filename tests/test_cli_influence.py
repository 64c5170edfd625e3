"""``fastgrad influence`` says what the functions behind it say."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

import fastgrad as fg
from fastgrad import cli


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, y = torch.randn(24, 6), torch.randint(0, 3, (24,))
    with fg.Probe(model, "row", loss_reduction="row_mean") as probe:
        for i in range(0, 24, 8):
            torch.nn.functional.cross_entropy(model(x[i : i + 8]), y[i : i + 8]).backward()
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    probe.stats().save(path)
    return path


@pytest.fixture
def run(capsys):
    def call(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main(["influence", *(str(a) for a in args)])
        return stop.value.code or 0, *capsys.readouterr()

    return call


def test_report(run, measured):
    code, out, err = run("report", measured, "--bootstrap", 60, "--json")
    assert code == 0, err
    found = fg.influence_report(
        fg.GradientStats.load(measured), n_bootstrap=60, n_permutations=60
    )
    assert json.loads(out) == json.loads(json.dumps(found.to_dict()))
    code, out, _ = run("report", measured, "--bootstrap", 60, "--whole")
    assert code == 0
    assert out.startswith("4 blocks x 24 examples")
    assert "multiplicativity" in out


def test_scores(run, measured, tmp_path):
    stats = fg.GradientStats.load(measured)
    want = fg.example_scores(stats)
    code, out, err = run("scores", measured)
    assert code == 0, err
    rows = list(csv.DictReader(out.splitlines()))
    assert [int(r["id"]) for r in rows] == np.argsort(-want, kind="stable").tolist()
    assert [float(r["score"]) for r in rows] == sorted(want.tolist(), reverse=True)
    _, out, _ = run("scores", measured, "--include", "2.*", "--top", 3, "--json")
    part = fg.example_scores(stats, include=["2.*"])
    assert [r["id"] for r in json.loads(out)] == np.argsort(-part)[:3].tolist()
    code, _, _ = run("scores", measured, "--top", 2, "-o", tmp_path / "scores.csv")
    assert code == 0
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 3


def test_choose(run, measured, tmp_path):
    paths = "-o", tmp_path / "selection.json", "--ids", tmp_path / "ids.txt"
    code, out, err = run(
        "choose", measured, *paths, "--parameters", 0.3, "--examples", 0.25, "--json"
    )
    assert code == 0, err
    want = fg.select_jointly(fg.GradientStats.load(measured), 0.3, 0.25)
    assert fg.Selection.load(tmp_path / "selection.json") == want.selection
    ids = [int(line) for line in (tmp_path / "ids.txt").read_text().split()]
    assert ids == want.example_ids.tolist()
    assert json.loads(out)["share"] == want.choice.share
    code, out, _ = run("choose", measured, *paths, "--budget", 0.1)
    assert code == 0
    assert "squared gradient" in out


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["choose", "--parameters", 0.2], 2, "--budget"),
        (["choose", "--parameters", 2, "--examples", 0.1], 1, "fraction in (0, 1]"),
        (["choose", "--budget", 0.2, "--strategy", "best"], 2, "alternating"),
        (["scores", "--by", "best"], 2, "cosine"),
        (["scores", "--by", "cosine"], 1, "target"),
        (["report", "--scale", "mean"], 2, "example_mean"),
    ],
)
def test_wrong_usage(run, measured, tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    found, _, err = run(args[0], measured, *args[1:])
    assert found == code
    assert message in err
    assert not list(tmp_path.iterdir())
