"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import fastgrad as fg
from fastgrad import cli
from fastgrad.blueprint import Blueprint
from fastgrad.blueprint_schema import SCHEMA_VERSION, json_schema
from fastgrad.choosing import select
from fastgrad.cli_docs import page, verbs
from fastgrad.cli_exit import MEANING, SHORT
from fastgrad.selection import Selection
from fastgrad.stats import GradientStats
from tests.models import MODELS, VOCAB, randomised

ROOT = Path(__file__).parent.parent
VERBS = dict(verbs())


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args):
        code = 0
        try:
            cli.main([str(a) for a in args])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


def save_model(folder: Path, architecture: str) -> Path:
    """A tiny model with a word tokenizer, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<mask>", "<unk>", *(f"w{i}" for i in range(VOCAB - 5))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"
    ).save_pretrained(folder)
    randomised(MODELS[architecture]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text(" ".join(f"w{(7 * i * i + 3 * i) % 50}" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama-tied")


@pytest.fixture(scope="module")
def released(llama_dir, text_file):
    """The model's folder with statistics and blueprint in it, made by the command line."""
    for args in (
        ["probe", llama_dir, text_file, "-o", llama_dir / "stats.safetensors", "--length", "16",
         "--rows", "4", "--blocks", "8x8"],
        ["blueprint", "create", llama_dir / "stats.safetensors", "-o", llama_dir, "--domain",
         "words", "--domain", "toy", "--created", "2025-01-02", "--name", "org/tiny"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in args])
        assert not stop.value.code
    return llama_dir


# -- help, version, errors -----------------------------------------------------------------------


@pytest.mark.parametrize("path", VERBS)
def test_help_shows_an_example(run, path):
    command = path.split()[1:]
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert f"Example: {path}" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert "--json" in out


def test_help_names_the_exit_codes(run):
    code, out, _ = run("--help")
    text = " ".join(out.split())
    assert code == 0
    assert set(SHORT) == set(MEANING)
    for number, meaning in SHORT.items():
        assert f"{number} {meaning}" in text


def test_the_page_of_the_command_is_up_to_date():
    assert (ROOT / "docs" / "cli.md").read_text() == page(), (
        "make it anew: python -m fastgrad.cli_docs > docs/cli.md"
    )


def examples():
    """Commands in the help of a verb, in the README and in the guides."""
    for path, verb in VERBS.items():
        yield from ((path, e) for e in re.findall(r"(fastgrad [^`\[\n]+)", verb.help or ""))
    for page_ in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page_.read_text()
        for line in re.findall(r"^fastgrad .*$", "\n".join(re.findall(
            r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE
        )), re.MULTILINE):  # fmt: skip
            yield page_.name, line


def test_every_example_has_options_that_exist():
    found = 0
    for where, line in examples():
        words = line.split("#")[0].split()
        path = max((v for v in VERBS if words[: len(v.split())] == v.split()), key=len,
                   default=None)  # fmt: skip
        if path is None or "[OPTIONS]" in words:
            assert "|" in line or "[OPTIONS]" in words or where in VERBS, f"{where}: {line}"
            continue
        known = {o for p in VERBS[path].params for o in (*p.opts, *p.secondary_opts)}
        for word in words:
            if word.startswith("-"):
                assert word.rstrip(".,") in known, f"{where}: {line}"
        found += 1
    assert found >= len(VERBS)


def test_version(run):
    assert run("--version") == (0, f"fastgrad {fg.__version__}\n", "")


def test_usage_errors_are_exit_code_2(run, released):
    assert run("select")[0] == 2
    assert run("nonsense")[0] == 2
    assert run("plan", released, "--batch", "8*9")[0] == 2
    assert run("plan", released, "--master", "int8")[0] == 2
    assert run("select", released, "--fraction", "0.1", "--local",
               released / "stats.safetensors", "--weight", "some")[0] == 2  # fmt: skip


def test_an_option_that_would_change_nothing_is_refused(run, released, tmp_path):
    target = tmp_path / "sel.json"
    for options, needed in (
        (["--batch", "2x8"], "--memory or --flops"),
        (["--optimizer", "adamw"], "--memory or --flops"),
        (["--master", "float32"], "--memory"),
        (["--weight", "0.5"], "--local"),
        (["--seed", "0"], "--ranking random"),
    ):
        code, out, err = run("select", released, "--fraction", 0.2, *options, "-o", target)
        assert (code, out) == (2, "")
        assert f"it goes with {needed}" in " ".join(err.replace("│", " ").split())
        assert not target.exists()
    code, _, err = run("select", released, "--flops", "1T", "--batch", "1x8", "--master",
                       "float32", "-o", target)  # fmt: skip
    assert (code, "it goes with --memory" in err) == (2, True)
    assert run("select", released, "--ranking", "random", "--seed", 3, "--fraction", 0.2,
               "-o", target)[0] == 0  # fmt: skip
    assert Selection.load(target) == select(
        Blueprint.from_pretrained(released), ranking="random", seed=3, fraction=0.2
    )


def test_our_errors_are_one_line_and_exit_code_1(run, tmp_path):
    code, out, err = run("blueprint", "show", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "no file gradient_blueprint.json" in err
    assert "Traceback" not in err


def test_a_missing_extra_is_named(run, released, text_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for args in (["probe", released, text_file], ["plan", released],
                 ["blueprint", "verify", released]):  # fmt: skip
        code, _, err = run(*args)
        assert code == 1
        assert "pip install 'fastgrad[hf]'" in err
    assert run("blueprint", "show", released)[0] == 0  # needs no extra


# -- probe ---------------------------------------------------------------------------------------


def test_probe_measures_what_a_loop_does(run, released, text_file):
    stats = GradientStats.load(released / "stats.safetensors")
    assert (stats.n_examples, stats.n_batches, stats.spec) == (25, 7, "8x8")
    ids = torch.tensor([5 + (7 * i * i + 3 * i) % 50 for i in range(400)]).reshape(25, 16)
    model = _loaded(released)
    with fg.Probe(model, blocks="8x8") as probe:
        for rows in ids.split(4):
            model.zero_grad()
            model(input_ids=rows, labels=rows).loss.backward()
    expected = probe.stats()
    assert stats.names == expected.names
    torch.testing.assert_close(
        torch.from_numpy(stats.T), torch.from_numpy(expected.T), rtol=1e-5, atol=1e-9
    )


def _loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_probe_json_and_limit(run, released, text_file, tmp_path):
    code, out, err = run("probe", released, text_file, "-o", tmp_path / "s", "--length", 16,
                         "--limit", 6, "--rows", 4, "--json")  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["n_examples"] == 6
    assert found["n_batches"] == 2
    assert found["coverage"] == {"exact": len(GradientStats.load(tmp_path / "s").names)}


def test_probe_of_a_masked_model(run, tmp_path, text_file):
    folder = save_model(tmp_path / "bert", "bert")
    for output in ("a", "b"):
        code, _, err = run("probe", folder, text_file, "-o", tmp_path / output, "--length", 16)
        assert code == 0, err
    a, b = (GradientStats.load(tmp_path / name) for name in ("a", "b"))
    assert (a.label_tokens >= 1).all()
    assert (a.label_tokens < 16).any()
    assert 0.08 < a.label_tokens.mean() / 16 < 0.25
    assert (a.sq == b.sq).all()  # the masks come from the seed


def test_probe_refuses(run, released, text_file, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for args, message in (
        ([released, tmp_path / "short.txt"], "2 tokens, fewer than one row of 128"),
        ([released, tmp_path / "binary.txt"], "not UTF-8"),
        ([tmp_path, text_file], "no config.json"),
        ([tmp_path / "broken", text_file], "cannot be read"),
    ):
        code, _, err = run("probe", *args, "-o", tmp_path / "out")
        assert (code, err.count("error: ")) == (1, 1)
        assert message in err
        assert not (tmp_path / "out").exists()


# -- blueprint -----------------------------------------------------------------------------------


def test_create_and_show(run, released):
    blueprint = Blueprint.from_pretrained(released)
    assert blueprint.domain_tags == ["words", "toy"]
    assert blueprint.file.model.name_or_path == "org/tiny"
    assert blueprint.file.provenance.created == "2025-01-02"
    assert blueprint.spec == "8x8"
    code, out, _ = run("blueprint", "show", released)
    assert code == 0
    assert out.rstrip("\n") == blueprint.summary()
    code, out, _ = run("blueprint", "show", released, "--json")
    assert out == (released / "gradient_blueprint.json").read_text()


def test_create_json(run, released, tmp_path):
    code, out, _ = run("blueprint", "create", released / "stats.safetensors", "-o", tmp_path,
                       "--tokens-per-step", 4096, "--json")  # fmt: skip
    assert code == 0
    made = Blueprint.from_pretrained(json.loads(out)["path"])
    assert made.k_star["flops"].tokens_per_step == 4096
    code, _, err = run("blueprint", "create", tmp_path / "none", "-o", tmp_path)
    assert code == 1
    assert "no statistics file" in err


def test_validate_and_schema(run, released, tmp_path):
    code, out, _ = run("blueprint", "validate", released)
    assert code == 0
    assert f"valid blueprint, schema {SCHEMA_VERSION}" in out
    code, out, _ = run("blueprint", "validate", released, "--json")
    assert json.loads(out) == {
        "path": str(released), "valid": True, "schema_version": SCHEMA_VERSION
    }  # fmt: skip
    content = (released / "gradient_blueprint.json").read_text()
    (tmp_path / "x.json").write_text(content.replace(f'"{SCHEMA_VERSION}"', '"2.0.0"'))
    code, out, err = run("blueprint", "validate", tmp_path / "x.json", released)
    assert (code, err) == (3, "")
    assert "newer than this library" in out
    assert f"{released} is a valid blueprint" in out  # all are checked, also after a bad one
    code, out, _ = run("blueprint", "validate", released, tmp_path / "x.json", "--json")
    assert code == 3
    assert [entry["valid"] for entry in json.loads(out)] == [True, False]
    code, out, err = run("blueprint", "validate", released, tmp_path / "none")
    assert (code, out) == (1, "")  # not judged: there is nothing to judge
    assert "no file gradient_blueprint.json" in err or "there is no file none" in err
    assert run("blueprint", "schema") == (0, json_schema(), "")


def test_verify(run, released, tmp_path):
    code, out, _ = run("blueprint", "verify", released)
    assert code == 0
    assert "sha256:" in out
    code, out, _ = run("blueprint", "verify", released / "gradient_blueprint.json", "--json")
    assert json.loads(out)["verified"] is True
    other = _loaded(released)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    other.save_pretrained(tmp_path)
    code, out, _ = run("blueprint", "verify", released, "--model", tmp_path)
    assert code == 3
    assert out.count("sha256:") == 2
    code, out, _ = run("blueprint", "verify", released, "--model", tmp_path, "--json")
    assert (code, json.loads(out)["verified"]) == (3, False)
    data = json.loads((released / "gradient_blueprint.json").read_text())
    data["model"]["weights_hash"] = data["block_vectors"] = None
    (tmp_path / "unhashed.json").write_text(json.dumps(data))
    code, out, _ = run("blueprint", "verify", tmp_path / "unhashed.json", "--model", released)
    assert (code, "holds no hash" in out) == (4, True)
    code, out, _ = run("blueprint", "verify", tmp_path / "unhashed.json", "--model", released,
                       "--json")  # fmt: skip
    assert (code, json.loads(out)["verified"]) == (4, None)
    assert run("blueprint", "verify", released, "--model", tmp_path / "none")[0] == 2


def test_staleness(run, released, text_file, tmp_path):
    stats = released / "stats.safetensors"
    code, out, _ = run("staleness", released, stats)
    assert code == 0
    found = Blueprint.from_pretrained(released).staleness(GradientStats.load(stats))
    assert out.startswith(f"{found.verdict}: {found.reason}\n")
    assert max(map(len, out.splitlines()[1:])) <= 80
    code, out, _ = run("staleness", released, stats, "--json")
    assert json.loads(out) == found.to_dict()
    few = tmp_path / "few"
    assert run("probe", released, text_file, "--length", 16, "--limit", 2, "-o", few)[0] == 0
    code, out, _ = run("staleness", released, few)
    assert (code, out.startswith("sample too small: ")) == (4, True)
    other = save_model(tmp_path / "other", "gpt2")
    assert run("probe", other, text_file, "--length", 16, "-o", few)[0] == 0
    code, out, _ = run("staleness", released, few)
    assert (code, out.startswith("different model: ")) == (3, True)
    code, out, err = run("staleness", released, tmp_path / "none")
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_blend(run, released, tmp_path):
    local = released / "stats.safetensors"
    code, out, err = run("blueprint", "blend", released, local, "-o", tmp_path, "--weight", 0.25,
                         "--domain", "mine", "--created", "2025-03-04", "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["blend_weight"] == 0.25
    made = Blueprint.from_pretrained(tmp_path)
    expected = Blueprint.from_pretrained(released).blend(
        GradientStats.load(local), 0.25, domain_tags=["mine"]
    )
    assert made.block_sq.keys() == expected.block_sq.keys()
    found, wanted = made.scores(), expected.scores()
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values)
    assert made.file.provenance.created == "2025-03-04"
    assert made.domain_tags == expected.domain_tags
    assert run("blueprint", "blend", released, local, "-o", tmp_path, "--weight", "x")[0] == 2
    code, _, err = run("blueprint", "blend", released, local, "-o", tmp_path, "--weight", 2)
    assert (code, "from 0 to 1, not" in err) == (2, True)


# -- select and plan -----------------------------------------------------------------------------


def test_select(run, released, tmp_path):
    target = tmp_path / "sel.json"
    code, out, err = run("select", released, "--fraction", 0.2, "--exclude", "*norm*", "-o", target)
    assert code == 0, err
    found = Selection.load(target)
    blueprint = Blueprint.from_pretrained(released)
    assert found == select(blueprint, fraction=0.2, exclude=["*norm*"])
    assert out.rstrip("\n") == found.summary()
    found.check_model(_loaded(released))
    code, out, _ = run("select", released, "--count", 5, "--ranking", "norm", "--blocks", "module",
                       "-o", target, "--json")  # fmt: skip
    data = json.loads(out)
    assert (data["n_blocks"], data["blocks"]) == (5, "module")
    assert data["n_parameters"] == Selection.load(target).n_parameters
    code, _, err = run("select", released)
    assert code == 1
    assert "exactly one budget" in err


def test_select_k_star_and_memory(run, released, tmp_path):
    target = tmp_path / "sel.json"
    assert run("select", released, "--k-star", "memory", "-o", target)[0] == 0
    assert Selection.load(target).fraction <= Blueprint.from_pretrained(released).k_star[
        "memory"
    ].value
    model = _loaded(released)
    budget = fg.plan_memory(model).total // 2
    assert run("select", released, "--memory", budget, "-o", target)[0] == 0
    assert fg.plan_memory(model, Selection.load(target)).total <= budget
    assert run("select", released, "--ranking", "magnitude", "--count", 3, "-o", target)[0] == 0
    expected = select(Blueprint.from_pretrained(released), model, ranking="magnitude", count=3)
    assert Selection.load(target) == expected


def test_select_spreads_over_a_mix_of_granularities(run, released, tmp_path):
    target = tmp_path / "sel.json"
    mixed = ["--blocks", "*.mlp.*=module", "--blocks", "*=module"]
    assert run("select", released, "--submodules", 6, *mixed, "-o", target)[0] == 0
    blueprint, model = Blueprint.from_pretrained(released), _loaded(released)
    assert Selection.load(target) == select(blueprint, submodules=6, blocks="module")
    code, out, err = run("select", released, "--fraction", 0.5, "--floor", "*layers*=0.01",
                         "--cap", "*layers.0=0.6", "--cap", "*=0.9", "--exclude", "*norm*",
                         "-o", target)  # fmt: skip
    assert code == 0, err
    assert Selection.load(target) == select(
        blueprint, fraction=0.5, floor={"*layers*": 0.01}, cap={"*layers.0": 0.6, "*": 0.9},
        exclude=["*norm*"],
    )  # fmt: skip
    assert "spread by layer" in out
    for options in (
        ["--floor", "much"], ["--floor", "*=much"], ["--floor", "0.1", "--floor", "0.2"],
        ["--cap", "*=0.1", "--cap", "*=0.2"], ["--blocks", "row", "--blocks", "column"],
    ):  # fmt: skip
        assert run("select", released, "--fraction", 0.2, *options)[0] == 2
    for options, said in (
        (["--spread-by", "layer"], "groups floors and caps"),
        (["--direction", "x"], "direction='x' is for ranking='alignment'"),
        (["--ranking", "l1"], "Probe(model, l1=True)"),
        (["--ranking", "alignment"], "does not know the direction"),
    ):
        code, _, err = run("select", released, "--fraction", 0.2, *options)
        assert code == 1
        assert said in err
    code, _, err = run("select", released, "--flops", "1T")
    assert code == 1
    assert "batch_shape" in err
    assert run("select", released, "--flops", "1T", "--batch", "1x8", "--blocks", "module",
               "-o", target)[0] == 0  # fmt: skip
    assert Selection.load(target).n_parameters == sum(p.numel() for p in model.parameters())


def test_select_from_statistics(run, released, tmp_path):
    target, stats = tmp_path / "sel.json", released / "stats.safetensors"
    assert run("select", stats, "--fraction", 0.2, "--ranking", "norm", "-o", target)[0] == 0
    loaded = GradientStats.load(stats, blocks=False)
    assert Selection.load(target) == select(loaded, fraction=0.2, ranking="norm")
    assert run("select", stats, "--fraction", 0.2, "--local", stats, "-o", target)[0] == 2
    named = tmp_path / "of-any-name"
    named.write_bytes(stats.read_bytes())
    again = tmp_path / "again.json"
    assert run("select", named, "--fraction", 0.2, "--ranking", "norm", "-o", again)[0] == 0
    assert again.read_text() == target.read_text()


def test_select_blends_a_local_sample(run, released, tmp_path):
    target, local = tmp_path / "sel.json", released / "stats.safetensors"
    assert run("select", released, "--fraction", 0.2, "--local", local, "--weight", 0.5,
               "-o", target)[0] == 0  # fmt: skip
    blended = Blueprint.from_pretrained(released).blend(GradientStats.load(local), weight=0.5)
    assert Selection.load(target) == select(blended, fraction=0.2)


def test_plan(run, released, tmp_path):
    model = _loaded(released)
    with torch.device("meta"):  # what the plan is made on, and says so
        meta = type(model)(model.config)
    selection = select(Blueprint.from_pretrained(released), fraction=0.2)
    selection.save(tmp_path / "sel.json")
    config_only = tmp_path / "config-only"
    config_only.mkdir()
    (config_only / "config.json").write_text((released / "config.json").read_text())
    for options, chosen, settings in (
        ([], None, {}),
        (["--selection", tmp_path / "sel.json"], selection, {}),
        (["--optimizer", "sgd", "--batch", "2x8"], None,
         {"optimizer": "sgd", "batch_shape": (2, 8)}),
    ):  # fmt: skip
        expected = fg.plan_memory(meta, chosen, **settings)
        assert expected.total == fg.plan_memory(model, chosen, **settings).total
        code, out, err = run("plan", config_only, *options)
        assert code == 0, err
        assert out.rstrip("\n") == expected.table().rstrip("\n")
        code, out, _ = run("plan", config_only, *options, "--json")
        assert json.loads(out)["total_bytes"] == expected.total
    halved = json.loads(run("plan", config_only, "--dtype", "bfloat16", "--json")[1])
    assert halved["terms_bytes"]["weights"] * 2 == fg.plan_memory(model).terms["weights"]
    code, _, err = run("plan", config_only, "--optimizer", "lion")
    assert (code, "unknown optimizer" in err) == (1, True)


# -- delta ---------------------------------------------------------------------------------------


def test_shard_sizes(run, released, tmp_path):
    model = _loaded(released)
    partial = fg.make_partial(model, select(Blueprint.from_pretrained(released), fraction=0.2))
    with torch.no_grad():
        for p in partial.parameters():
            p.add_(1)
    partial.sync()
    delta, plain = tmp_path / "delta.safetensors", tmp_path / "plain"
    fg.save_delta(partial, delta)
    for size in ("much", "5 XB", "0GB", "-5GB", "0", "5GiB"):
        code, _, err = run("delta", "apply", released, delta, "-o", tmp_path / "out",
                           "--max-shard-size", size)  # fmt: skip
        assert (code, "is no size" in err) == (2, True), size
        assert not (tmp_path / "out").exists()
    code, _, err = run("delta", "apply", released, delta, "-o", tmp_path / "out",
                       "--max-shard-size", "10kb")  # fmt: skip
    assert code == 0, err
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    plain.mkdir()
    code, _, err = run("delta", "apply", plain, delta, "-o", tmp_path / "out2", "--max-shard-size",
                       "5GB")  # fmt: skip
    assert (code, "no config.json" in err) == (2, True)


# -- quickstart ----------------------------------------------------------------------------------


def test_quickstart_passes_its_arguments_on(run, tmp_path, monkeypatch):
    calls = []
    module = types.ModuleType("fastgrad.quickstart.run")
    def run_quickstart(output, fast, seed, *, to_stderr):
        calls.append((output, fast, seed))
        print("a screen", file=sys.stderr if to_stderr else sys.stdout)
        (output / "results.json").write_text('{"loss": 2.5}\n')
        return 3 if fast else 0

    module.run_quickstart = run_quickstart
    monkeypatch.setitem(sys.modules, "fastgrad.quickstart.run", module)
    code, _, _ = run("quickstart", "--fast", "--output", tmp_path, "--seed", 7)
    assert calls == [(tmp_path, True, 7)]
    assert code == 3  # its result is the exit code
    code, out, err = run("quickstart", "--output", tmp_path, "--json")
    assert (code, json.loads(out), err) == (0, {"loss": 2.5}, "a screen\n")
    assert calls[-1] == (tmp_path, False, 0)
