"""Bars for work that may take seconds: on a terminal, never with --json, gone when it is done."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastgrad as fg
from fastgrad.cli_common import busy, track
from tests.test_cli_compare import made, run  # noqa: F401  (fixtures)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # standard error counts as a terminal then
    monkeypatch.setenv("TERM", "xterm")


def delta_of(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    (folder / "base").mkdir()
    save_file(model.state_dict(), folder / "base" / "model.safetensors")
    chosen = fg.select(None, model=model, fraction=0.5, ranking="random")
    partial = fg.make_partial(model, chosen)
    for p in partial.parameters():
        p.data.add_(1.0)
    partial.sync()
    fg.save_delta(partial, folder / "delta.safetensors")
    return ["delta", "apply", folder / "base", folder / "delta.safetensors", "-o"]


@pytest.mark.parametrize(("verb", "said"), [
    ("create", "fitting"), ("report", "resampling"), ("apply", "reading, hashing and writing"),
])  # fmt: skip
def test_a_bar_on_a_terminal_and_none_with_json(
    run, made, tmp_path, verb, said, monkeypatch  # noqa: F811
):
    args = {
        "create": lambda: ["blueprint", "create", made / "a.safetensors", "-o"],
        "report": lambda: ["influence", "report", made / "a.safetensors", "--bootstrap", 5],
        "apply": lambda: delta_of(tmp_path),
    }[verb]()
    targets = iter([[], [], []] if verb == "report" else [[tmp_path / n] for n in "xyz"])
    code, plain, err = run(*args, *next(targets))
    assert (code, said in err) == (0, False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    code, out, err = run(*args, *next(targets))
    assert (code, said in err) == (0, True)
    assert said not in out
    assert len(out) == len(plain)
    code, _, err = run(*args, *next(targets), "--json")
    assert (code, err) == (0, "")


def test_verify_says_what_it_does(run, tmp_path, terminal):  # noqa: F811
    from transformers import AutoModelForCausalLM

    from tests.test_cli import save_model
    from tests.training_runs import HELD_OUT

    folder = save_model(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with fg.Probe(model) as probe:
        model(**HELD_OUT[0]).loss.backward()
    fg.Blueprint.from_stats(probe.stats(), model=model).save_pretrained(folder)
    code, out, err = run("blueprint", "verify", folder)
    assert (code, "was made for the weights" in out) == (0, True)
    assert "reading the weights" in err
    assert "hashing the weights" in err
    code, _, err = run("blueprint", "verify", folder, "--json")
    assert (code, "hashing" in err) == (0, False)


def test_an_error_comes_through_and_the_screen_is_put_back(capsys, terminal):
    with pytest.raises(fg.errors.StatsError), busy("working", quiet=False):
        raise fg.errors.StatsError("no")
    err = capsys.readouterr().err
    assert "working" in err
    assert err.count("\x1b[?25l") == err.count("\x1b[?25h") == 1  # the cursor is shown again
    assert list(track([1, 2], "counting", quiet=True)) == [1, 2]
    assert capsys.readouterr().err == ""
    assert list(track([1, 2], "counting")) == [1, 2]
    assert "counting" in capsys.readouterr().err
