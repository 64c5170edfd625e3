"""``fastgrad export``: what is written is what the functions behind it say, and PEFT reads it."""

from __future__ import annotations

import json
import re
import sys

import pytest

import fastgrad as fg
from fastgrad import cli
from fastgrad.integrations.peft_export import layer_list, lora_plan, target_regex
from tests.test_cli import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with statistics and a blueprint beside it."""
    made = save_model(tmp_path_factory.mktemp("model"), "llama")
    text = made / "text.txt"
    text.write_text(" ".join(f"w{(7 * i * i) % 50}" for i in range(400)))
    for args in (["probe", made, text, "-o", made / "stats", "--length", 16],
                 ["blueprint", "create", made / "stats", "-o", made]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in args])
        assert not stop.value.code
    return made


@pytest.fixture
def run(capsys):
    def call(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", *(str(a) for a in args)])
        return stop.value.code, *capsys.readouterr()

    return call


def model_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_peft_reads_what_is_written(run, folder, tmp_path):
    from peft import PeftConfig, get_peft_model

    code, out, err = run("peft", folder, "--fraction", 0.3, "--rank", 4, "-o", tmp_path / "lora")
    assert code == 0, err
    model = model_of(folder)
    blueprint = fg.Blueprint.from_pretrained(folder)
    plan = lora_plan(blueprint, model, fraction=0.3, r=4)
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert config.task_type == "CAUSAL_LM"
    adapted = get_peft_model(model, config)
    ranks = {
        name.removeprefix("base_model.model.") + ".weight": module.r["default"]
        for name, module in adapted.named_modules() if getattr(module, "r", None)
    }  # fmt: skip
    assert ranks == plan.ranks
    assert adapted.get_nb_trainable_parameters()[0] == plan.n_parameters
    assert f"{plan.n_parameters:,} parameters in adapters of {len(ranks)} weights" in out
    rows = dict(re.findall(r"^(\S+) +(\d+)$", out, re.MULTILINE))
    assert {name: int(rank) for name, rank in rows.items()} == plan.ranks
    assert "wrote" in err


def test_the_same_in_every_process(run, folder):
    """PEFT keeps names in a set, whose order is another in every process."""
    code, out, err = run("peft", folder, "--count", 9)
    assert code == 0, err
    names = json.loads(out)["target_modules"]
    assert len(names) > 1
    assert names == sorted(names)


def test_json_says_what_is_left_out(run, folder, tmp_path):
    target = tmp_path / "selection.json"
    selection = fg.select(fg.Blueprint.from_pretrained(folder), model_of(folder), fraction=0.3)
    selection.save(target)
    code, out, err = run("peft", folder, "--selection", target, "--json")
    assert code == 0, err
    found = json.loads(out)
    plan = lora_plan(fg.Blueprint.from_pretrained(folder), model_of(folder), selection=selection)
    assert found["ranks"] == plan.ranks
    assert found["left_out"] == plan.left_out
    assert plan.left_out
    assert "warning" not in err
    code, out, err = run("peft", folder, "--selection", target, "-o", tmp_path)
    assert (code, err.count("warning: no adapter for")) == (0, 1)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == found["config"]


def test_regex_and_layers(run, folder):
    blueprint, model = fg.Blueprint.from_pretrained(folder), model_of(folder)
    code, out, err = run("regex", folder, "--fraction", 0.3, "--exclude", "*embed*")
    assert code == 0, err
    assert out == target_regex(blueprint, model, fraction=0.3, exclude=["*embed*"]) + "\n"
    found = json.loads(run("regex", folder, "--fraction", 0.3, "--json")[1])
    assert found == {"regex": target_regex(blueprint, model, fraction=0.3)}
    assert run("layers", folder, "--count", 1)[1] == f"{layer_list(blueprint, count=1)[0]}\n"
    assert run("layers", folder, "--fraction", 1)[1] == "0,1\n"
    found = json.loads(run("layers", folder / "stats", "--count", 1, "--json")[1])
    assert found == {"layers": layer_list(fg.GradientStats.load(folder / "stats"), count=1)}
    code, out, err = run("layers", folder)
    assert (code, out, "exactly one" in err) == (1, "", True)
    code, _, err = run("peft", folder, "--fraction", 0.2, "--count", 2)
    assert (code, err.count("\n")) == (1, 1)
    assert run("peft", folder, "--selection", folder / "none")[0] == 1


def test_without_peft(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, err = run("peft", folder)
    assert (code, "pip install 'fastgrad[hf]'" in err) == (1, True)
