"""``fastgrad blueprint private``: what is released, and that one record moves nothing else."""

from __future__ import annotations

import json
import os
import random
import signal

import numpy as np
import pytest
import torch

import fastgrad as fg
from fastgrad import cli, cli_private, privacy
from fastgrad.blueprint import Blueprint
from fastgrad.cli_data import IGNORED, Example, Reading, batch_of, read_examples
from fastgrad.cli_private import alone
from fastgrad.errors import PrivacyError
from tests.test_cli import save_model
from tests.test_cli_data import save_t5

pytest.importorskip("dp_accounting")

TEXTS = [" ".join(f"w{(7 * i * j + 3 * j) % 50}" for j in range(i % 9 + 2)) for i in range(30)]
GUARANTEE = ["--clip", "2", "--delta", "1e-3", "--epsilon", "6"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: save_model(tmp_path_factory.mktemp(name), name) for name in ("llama", "bert")}
    return made | {"t5": save_t5(tmp_path_factory.mktemp("t5"))}


def written(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def records(tmp_path):
    return written(tmp_path / "secret.jsonl")


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the verb, with the noise of a seed: exit code, standard output, standard error."""
    monkeypatch.setattr(privacy.random, "SystemRandom", lambda: random.Random(5))
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main(["blueprint", "private", *map(str, args)])
        return stop.value.code, *capsys.readouterr()

    return call


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def examples_of(path, folder, kind, seed=0):
    tokenizer = tokenizer_of(folder)
    reading = Reading("text", None, None, None, 8, 10**9, every=True)
    sample = read_examples(str(path), reading, kind, tokenizer)
    return [alone(e, kind, tokenizer, seed) for e in sample.examples], tokenizer


@pytest.fixture
def sent(monkeypatch):
    """What would be measured: token numbers and labels of each example, without padding."""
    seen = []

    def spy(model, batches, **settings):
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            for j in range(len(mask)):
                ids, labels = (batch[k][j][mask[j]].tolist() for k in ("input_ids", "labels"))
                assert (batch["labels"][j][~mask[j]] == IGNORED).all()
                seen.append((tuple(ids), tuple(labels)))
        raise PrivacyError("enough")

    monkeypatch.setattr(privacy, "private_norms", spy)
    return seen


# -- what is released ----------------------------------------------------------------------------


def test_it_is_the_release_of_the_library(run, folders, records, tmp_path):
    folder = folders["llama"]
    code, out, err = run(folder, records, "-o", tmp_path / "made", *GUARANTEE, "--length", 8,
                         "--rows", 7, "--domain", "notes", "--dataset", "org/notes", "--name",
                         "org/tiny", "--created", "2026-01-02", "--json")  # fmt: skip
    assert code == 0, err
    made = Blueprint.from_pretrained(tmp_path / "made")
    told = json.loads(out)
    assert told["path"] == str(tmp_path / "made" / "gradient_blueprint.json")
    assert told["privacy"] == json.loads(made.to_json())["privacy"]

    examples, tokenizer = examples_of(records, folder, "decoder")
    batches = [
        batch_of(examples[i : i + 7], "decoder", tokenizer, torch.Generator())
        for i in range(0, 30, 7)
    ]
    model = load(folder)
    expected = fg.private_norms(
        model, batches, clip=2.0, n=30, delta=1e-3, epsilon=6.0, generator=random.Random(5)
    )
    found = {s.name: s.noised_norm for s in made.submodules}
    assert found == dict(zip(expected.names, expected.values.tolist(), strict=True))
    part = made.file.privacy
    assert (part.epsilon, part.delta, part.n, part.clip_norm) == (
        expected.epsilon, 1e-3, 30, 2.0
    )  # fmt: skip
    assert made.file.model.name_or_path == "org/tiny"
    assert made.domain_tags == ["notes"]
    assert made.file.provenance.created == "2026-01-02"
    made.verify(model)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_nothing_else_about_the_data_is_in_the_file(run, folders, records, tmp_path):
    """Two data sets with the same noised norms give the same file, byte for byte."""
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other" / "secret.jsonl", ["w1 w2 w3", *TEXTS])
    texts = []
    norms = np.linspace(0.5, 3.0, 21)
    for data in (records, other):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(privacy, "noised", lambda values, std, generator: norms[: len(values)])
            code, out, err = run(
                folders["llama"], data, "-o", tmp_path / "made", *GUARANTEE, "--n", 30,
                "--adjacency", "add_or_remove_one", "--length", 8, "--created", "2026-01-02",
                "--json",
            )  # fmt: skip
        assert code == 0, err
        texts.append(((tmp_path / "made" / "gradient_blueprint.json").read_text(), out))
    assert texts[0] == texts[1]
    assert json.loads(texts[0][0])["data"]["datasets"] == []
    assert "sha256" not in texts[0][0].replace(json.loads(texts[0][0])["model"]["weights_hash"], "")


def test_the_name_of_the_data_is_not_in_the_command(run, folders, records, tmp_path, monkeypatch):
    given = ["blueprint", "private", folders["llama"], records, "-o", tmp_path / "made", *GUARANTEE]
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/fastgrad", *map(str, given)])
    code, _, err = run(*given[2:], "--length", 8)
    assert code == 0, err
    text = (tmp_path / "made" / "gradient_blueprint.json").read_text()
    assert records.stem not in text
    command = json.loads(text)["provenance"]["command"]
    assert command.split()[:5] == ["fastgrad", "blueprint", "private", os.path.basename(
        folders["llama"]), "DATA"]  # fmt: skip


def test_weights_of_16_bits_are_measured_in_32_and_named_as_they_are(run, records, tmp_path):
    folder = save_model(tmp_path / "half", "llama")
    load(folder).to(torch.bfloat16).save_pretrained(folder)
    code, _, err = run(folder, records, "-o", folder, *GUARANTEE, "--length", 8)
    assert code == 0, err
    made = Blueprint.from_pretrained(folder)
    stored = load(folder)
    assert stored.dtype == torch.bfloat16
    made.verify(stored)
    assert list(made.file.data.dtypes) == ["torch.float32"]


def test_coarse(run, folders, records, tmp_path):
    code, out, err = run(folders["llama"], records, "-o", tmp_path / "made", *GUARANTEE,
                         "--length", 8, "--coarse", "deciles", "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["privacy"]["released"] == "deciles"
    assert all(s.grad_norm is None for s in Blueprint.from_pretrained(tmp_path / "made").submodules)


# -- one record moves nothing else ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_what_a_record_becomes_depends_on_it_alone(run, folders, tmp_path, sent, kind):
    """One record less, a longer or an empty one: all others are the same."""
    options = [*GUARANTEE, "--length", 8, "--rows", 4, "--n", 12, "--adjacency",
               "add_or_remove_one"]  # fmt: skip
    few = TEXTS[:12]
    neighbours = {
        "less": [*few[:3], *few[4:]],
        "longer": [*few[:3], " ".join(["w1"] * 40), *few[4:]],
        "empty": [*few[:3], "", *few[4:]],
    }
    assert "enough" in run(folders[kind], written(tmp_path / "a.jsonl", few), "-o",
                           tmp_path / "made", *options)[2]  # fmt: skip
    before = list(sent)
    assert len(before) == 12
    for name, texts in neighbours.items():
        sent.clear()
        assert "enough" in run(folders[kind], written(tmp_path / "b.jsonl", texts), "-o",
                               tmp_path / "made", *options)[2]  # fmt: skip
        assert len(sent) == len(texts)
        rest = sent if name == "less" else [*sent[:3], *sent[4:]]
        assert rest == [*before[:3], *before[4:]]


def test_masks_follow_the_tokens_and_the_seed(folders, records):
    examples, tokenizer = examples_of(records, folders["bert"], "masked")
    again, _ = examples_of(records, folders["bert"], "masked")
    other, _ = examples_of(records, folders["bert"], "masked", seed=1)
    assert examples == again
    assert examples != other
    for example in examples:
        masked = [label != IGNORED for label in example.labels]
        assert any(masked)
        assert [i == tokenizer.mask_token_id for i in example.ids] == masked
    special = Example([0, 1], [0, 1], [True, True])
    assert alone(special, "masked", tokenizer, 0).labels == [IGNORED, IGNORED]


def test_a_record_without_a_label_counts(run, folders, tmp_path):
    """It has no gradient; to leave it out would tell that it was there."""
    data = written(tmp_path / "a.jsonl", [*TEXTS, "", "w1"])
    code, out, err = run(folders["llama"], data, "-o", tmp_path / "made", *GUARANTEE, "--length", 8,
                         "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["privacy"]["n"] == 32
    assert "2 records without a label have no gradient; this is not part of the release" in err
    code, out, _ = run(folders["llama"], data, "-o", tmp_path / "made", *GUARANTEE, "--length", 8,
                       "--limit", 16, "--json")  # fmt: skip
    assert (code, json.loads(out)["privacy"]["n"]) == (0, 16)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "options", "code", "said"), [
    ("t5", [], 1, "encoder-decoder"),
    ("llama", ["--noise-multiplier", "1"], 1, "one follows from the other"),
    ("llama", ["--delta", "0.5"], 1, "not below 1/n"),
    ("llama", ["--delta", "0"], 1, "delta must lie between 0 and 1"),
    ("llama", ["--clip", "0"], 1, "clip must be a finite positive number"),
    ("llama", ["--epsilon", "0"], 1, "epsilon must be a finite positive number"),
    ("llama", ["--adjacency", "some"], 1, "use replace_one, zero_out, add_or_remove_one"),
    ("llama", ["--n", "29"], 1, "30 are there"),
    ("llama", ["--seed", "1"], 2, "which this is not"),
    ("llama", ["--split", "train"], 2, "JSON Lines file"),
    ("llama", ["--coarse", "some"], 2, "use ranks or deciles"),
    ("llama", ["--adjacency", "add_or_remove_one"], 2, "name a public one"),
    ("llama", ["--adjacency", "add_or_remove_one", "--n", "30", "--limit", "9"], 2, "a secret"),
])  # fmt: skip
def test_refusals(run, folders, records, tmp_path, model, options, code, said):
    found, out, err = run(folders[model], records, "-o", tmp_path / "made", *GUARANTEE, "--length",
                          8, *options)  # fmt: skip
    text = " ".join(err.replace("│", " ").split())
    assert (found, out) == (code, "")
    assert said in text
    assert not list(tmp_path.glob("made/*"))


def test_a_text_is_refused(run, folders, tmp_path):
    (tmp_path / "one.txt").write_text(" ".join(TEXTS))
    code, out, err = run(folders["llama"], tmp_path / "one.txt", "-o", tmp_path / "made",
                         *GUARANTEE)  # fmt: skip
    assert (code, out) == (1, "")
    assert "one changed word changes many rows. Remedy: " in err
    assert not list(tmp_path.glob("made/*"))


def test_refused_before_the_model_is_loaded(run, folders, records, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_private, "load_model", lambda *a: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("x")
    assert run(folders["llama"], records, "-o", tmp_path / "file", *GUARANTEE)[0] == 1
    assert run(folders["llama"], records, "-o", tmp_path, *GUARANTEE, "--delta", 0.04)[0] == 1
    assert run(folders["llama"], records, "-o", tmp_path, *GUARANTEE[:4])[0] == 1
    import importlib

    real = importlib.import_module
    monkeypatch.setattr(privacy.importlib, "import_module", lambda name: real(
        "no_such_package" if name == "dp_accounting" else name))  # fmt: skip
    code, _, err = run(folders["llama"], records, "-o", tmp_path, *GUARANTEE)
    assert (code, "fastgrad[privacy]" in err) == (1, True)


@pytest.mark.parametrize("moment", ["measuring", "writing"])
def test_ctrl_c_leaves_the_earlier_file(run, folders, records, tmp_path, monkeypatch, moment):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    target = tmp_path / "made" / "gradient_blueprint.json"
    target.parent.mkdir()
    target.write_text("an earlier one")
    if moment == "measuring":
        from fastgrad import clipping

        losses = clipping.example_losses
        calls = []

        def interrupted(model, batch):
            calls.append(batch)
            if len(calls) == 20:
                os.kill(os.getpid(), signal.SIGINT)
            return losses(model, batch)

        monkeypatch.setattr(clipping, "example_losses", interrupted)
    else:
        from pathlib import Path

        real = Path.replace

        def replaced(self, to):
            if Path(to).name == target.name:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, to)

        monkeypatch.setattr(Path, "replace", replaced)
    try:
        found = run(folders["llama"], records, "-o", target.parent, *GUARANTEE, "--length", 8)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == (130, "", "interrupted: no file was left half written\n")
    assert target.read_text() == "an earlier one"
    assert list(target.parent.iterdir()) == [target]
