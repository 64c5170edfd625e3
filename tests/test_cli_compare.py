"""Several measurements on the command line: diff, merge, domains."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad import cli


def stats_of(seed: int, *, passes: int = 6, scale: float = 1.0, width: int = 8):
    """A measurement of one model on data that the seed and ``scale`` decide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5), nn.Tanh(),
                          nn.Linear(5, 4))  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    stretch = torch.logspace(0, scale, 6)
    with fg.Probe(model, loss_reduction="row_mean") as probe:
        for _ in range(passes):
            model.zero_grad()
            model(torch.randn(5, 6, generator=g) * stretch).square().mean(1).mean().backward()
    return probe.stats()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders with blueprints: ``a`` and ``b`` of one domain, ``far`` of another, ``wide`` of
    another model; and the statistics behind ``a``."""
    root = tmp_path_factory.mktemp("made")
    for name, stats, tag in (
        ("a", stats_of(1), "near"), ("b", stats_of(2), "near"),
        ("far", stats_of(3, scale=-3.0), "far"), ("wide", stats_of(1, width=9), "near"),
    ):  # fmt: skip
        blueprint = fg.Blueprint.from_stats(stats, domain_tags=[tag], created="2025-01-02")
        blueprint.save_pretrained(root / name)
        stats.save(root / f"{name}.safetensors")
    return root


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in args])
        return stop.value.code, *capsys.readouterr()

    return call


def test_diff(run, made):
    load = fg.Blueprint.from_pretrained
    codes = {"identical": 0, "agree": 0, "differ": 3, "different model": 3, "unknown": 4}
    seen = set()
    for other in ("a", "b", "far", "wide"):
        expected = load(made / "a").diff(load(made / other))
        code, out, err = run("blueprint", "diff", made / "a", made / other)
        assert (code, err) == (codes[expected.verdict], "")
        assert out == expected.text() + "\n"
        code, out, _ = run("blueprint", "diff", made / "a", made / other, "--json")
        assert code == codes[expected.verdict]
        assert json.loads(out) == json.loads(json.dumps(expected.to_dict()))
        seen.add(expected.verdict)
    assert {"identical", "different model"} < seen
    short = run("blueprint", "diff", made / "a", made / "b", "--most", 0)[1]
    assert "largest changes" not in short
    assert run("blueprint", "diff", made / "a", made / "none")[0] == 1


def test_merge(run, made, tmp_path):
    code, out, err = run("blueprint", "merge", made / "a", made / "b", made / "far", "-o", tmp_path,
                         "--created", "2025-02-03", "--json")  # fmt: skip
    assert code == 0, err
    found = fg.Blueprint.from_pretrained(tmp_path)
    said = json.loads(out)
    assert said["n_examples"] == found.n_examples == 3 * 30
    assert said["not_merged"] == dict(found.file.merge.not_merged)
    together = stats_of(1).merge(stats_of(2)).merge(stats_of(3, scale=-3.0))
    norms = dict(zip(together.names, together.grad_norm, strict=True))
    for submodule in found.submodules:
        assert submodule.grad_norm == pytest.approx(norms[submodule.name], rel=1e-6)
    assert found.file.provenance.created == "2025-02-03"
    code, out, _ = run("blueprint", "merge", made / "a", "-o", tmp_path / "alone")
    assert code == 2
    code, _, err = run("blueprint", "merge", made / "a", made / "wide", "-o", tmp_path / "other")
    assert (code, err.count("error: ")) == (1, 1)
    assert not (tmp_path / "alone").exists()
    assert not (tmp_path / "other").exists()


def test_domains(run, made, tmp_path):
    code, out, err = run("blueprint", "add-domain", made / "a", made / "far", "-o", tmp_path)
    assert code == 0, err
    assert out.splitlines() == ["domain     near", "domain     far"]
    both = fg.Blueprint.from_pretrained(tmp_path)
    assert [b.domain_tags for b in both.domains] == [["near"], ["far"]]
    assert run("blueprint", "add-domain", tmp_path, made / "b", "-o", tmp_path / "x")[0] == 1
    local = made / "far.safetensors"
    expected = both.nearest_domain(fg.GradientStats.load(local))
    code, out, _ = run("blueprint", "nearest", tmp_path, local, "--json")
    assert json.loads(out) == json.loads(json.dumps(expected.to_dict()))
    assert json.loads(out)["tags"] == ["far"]
    assert code == (0 if expected.verdict == "clear" else 4)
    code, out, _ = run("blueprint", "nearest", tmp_path, local)
    assert out.startswith(f"{expected.verdict}: ")
    assert [line.split()[-1] for line in out.splitlines()[3:]] == ["far", "near"]
    code, out, _ = run("staleness", tmp_path, local, "--domain", "far", "--json")
    assert (code, json.loads(out)["spearman"]) == (0, 1.0)
    alone = json.loads(run("staleness", tmp_path, local, "--json")[1])
    assert alone["spearman"] == both.staleness(fg.GradientStats.load(local)).spearman
    target = tmp_path / "selection.json"
    assert run("select", tmp_path, "--domain", "far", "--count", 2, "-o", target)[0] == 0
    assert fg.Selection.load(target) == fg.select(both.domain("far"), count=2)
    code, _, err = run("select", tmp_path, "--domain", "none", "--count", 2, "-o", target)
    assert (code, "there are: near, far" in err) == (1, True)
    assert run("select", local, "--domain", "far", "--count", 2, "-o", target)[0] == 2


def test_what_was_probed_is_in_the_blueprint(run, tmp_path):
    import hashlib

    from tests.test_cli import save_model

    folder = save_model(tmp_path / "model", "bert")
    text = tmp_path / "ours-alone" / "words.txt"
    text.parent.mkdir()
    text.write_text(" ".join(f"w{i % 40}" for i in range(400)))
    assert run("probe", folder, text, "-o", tmp_path / "s", "--length", 16, "--seed", 3)[0] == 0
    assert run("blueprint", "create", tmp_path / "s", "-o", folder, "--revision", "v1")[0] == 0
    found = fg.Blueprint.from_pretrained(folder).file
    (data,) = found.data.datasets
    assert data.name == "words.txt"
    assert data.revision == "sha256:" + hashlib.sha256(text.read_bytes()).hexdigest()
    assert (data.n_examples, found.data.seed, found.model.revision) == (25, 3, "v1")
    assert "ours-alone" not in (folder / "gradient_blueprint.json").read_text()
    code, _, err = run("blueprint", "create", tmp_path / "s", "-o", folder, "--dataset", "org/data")
    assert code == 0, err
    (data,) = fg.Blueprint.from_pretrained(folder).file.data.datasets
    assert data.name == "org/data"
