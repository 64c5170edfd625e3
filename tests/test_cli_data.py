"""What ``fastgrad probe`` makes of texts, records and data sets."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import fastgrad as fg
from fastgrad import cli
from tests.test_cli import save_model

PAIRS = [
    {"q": "w1 w2 w3", "a": "w4 w5", "n": 1},
    {"q": "w7", "a": "w8 w9 w10 w11", "n": 2},
    {"q": "w3 w1 w4 w1 w5 w9", "a": "w2 w6 w5 w3 w5 w8 w9", "n": 3},
    {"q": "w2 w7 w1 w8", "a": "", "n": 4},
    {"q": "w2 w8", "a": "w1", "n": 5},
]


def number(word: str) -> int:
    return 5 + int(word[1:])  # five special tokens come first, see save_model


def save_t5(folder):
    from transformers import T5Config, T5ForConditionalGeneration

    from tests.models import VOCAB, randomised

    save_model(folder, "llama")
    randomised(lambda: T5ForConditionalGeneration(T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_decoder_layers=1,
        num_heads=2, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    ))).save_pretrained(folder)  # fmt: skip
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: save_model(tmp_path_factory.mktemp(name), name) for name in ("llama", "bert")}
    return made | {"t5": save_t5(tmp_path_factory.mktemp("t5"))}


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps(pair) for pair in PAIRS))  # blank lines are no records
    return path


@pytest.fixture
def probe(capsys, tmp_path):
    """Run the verb: its statistics and what it printed as JSON, or its exit code and message."""

    def call(*args):
        target = tmp_path / "stats"
        target.unlink(missing_ok=True)
        with pytest.raises(SystemExit) as stop:
            cli.main(["probe", *map(str, args), "-o", str(target), "--json"])
        out, err = capsys.readouterr()
        if stop.value.code:
            assert not target.exists()
            return stop.value.code, " ".join(err.replace("│", " ").split())
        return fg.GradientStats.load(target), json.loads(out)

    return call


def loaded(folder, kind):
    import transformers

    return getattr(transformers, kind).from_pretrained(folder).eval()


def expected_of(model, examples):
    """``T`` of examples one by one, from a plain backward pass each."""
    columns = []
    for example in examples:
        model.zero_grad()
        model(**{k: torch.tensor([v]) for k, v in example.items()}).loss.backward()
        columns.append([float(p.grad.norm()) for p in model.parameters()])
    return np.array(columns).T


def one_by_one(stats):
    """The probe's influence of each example's own mean loss."""
    return stats.T * stats.mean_factor


def test_records_are_examples_of_their_own(folders, pairs, probe):
    stats, said = probe(folders["llama"], pairs, "--field", "q", "--length", 4, "--rows", 3)
    rows = [[number(w) for w in p["q"].split()][:4] for p in PAIRS if p["q"] != "w7"]
    assert stats.label_tokens.tolist() == [2, 3, 3, 1]  # the first token is no label
    assert said["n_label_tokens"] == 9
    assert said["notes"] == ["1 records were cut off at 4 tokens (--length)",
                             "1 records without a label were left out"]  # fmt: skip
    model = loaded(folders["llama"], "AutoModelForCausalLM")
    expected = expected_of(model, [{"input_ids": r, "labels": r} for r in rows])
    np.testing.assert_allclose(one_by_one(stats), expected, rtol=2e-4, atol=1e-7)


def test_only_the_answer_is_a_label(folders, pairs, probe):
    stats, said = probe(folders["llama"], pairs, "--field", "q", "--target", "a", "--rows", 2)
    examples = []
    for pair in PAIRS:
        if pair["a"]:
            q, a = ([number(w) for w in pair[k].split()] for k in "qa")
            examples.append({"input_ids": q + a, "labels": [-100] * len(q) + a})
    assert stats.label_tokens.tolist() == [2, 4, 7, 1]
    assert said["notes"] == ["1 records without a label were left out"]
    model = loaded(folders["llama"], "AutoModelForCausalLM")
    np.testing.assert_allclose(
        one_by_one(stats), expected_of(model, examples), rtol=2e-4, atol=1e-7
    )


def test_pairs_of_an_encoder_decoder_model(folders, pairs, probe):
    stats, said = probe(folders["t5"], pairs, "--field", "q", "--target", "a", "--rows", 4)
    assert said["model_kind"] == "encoder-decoder"
    examples = [
        {"input_ids": [number(w) for w in p["q"].split()],
         "labels": [number(w) for w in p["a"].split()]}
        for p in PAIRS if p["a"]
    ]  # fmt: skip
    assert stats.label_tokens.tolist() == [2, 4, 7, 1]  # nothing is shifted: all are labels
    model = loaded(folders["t5"], "AutoModelForSeq2SeqLM")
    np.testing.assert_allclose(
        one_by_one(stats), expected_of(model, examples), rtol=2e-4, atol=1e-7
    )


def test_masks_of_records_spare_padding_and_special_tokens(folders, tmp_path, probe):
    path = tmp_path / "texts.jsonl"
    texts = ["<pad> w1 <unk>", "<pad> <pad>", "<pad> " + "w3 w4 " * 20, "w9 " * 30]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    stats, said = probe(folders["bert"], path, "--seed", 3)
    assert said["model_kind"] == "masked"
    assert said["notes"] == ["1 records without a label were left out"]  # special tokens alone
    assert stats.label_tokens[0] == 1  # its only word
    assert (stats.label_tokens <= [1, 40, 30]).all()
    assert (stats.label_tokens >= 1).all()


def test_the_limit_is_spread_over_the_records(folders, tmp_path, probe):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(
        json.dumps({"text": " ".join(["w1"] * (2 + i % 50))}) + "\n" for i in range(101)
    ) + "this line is not read\n")  # fmt: skip
    code, err = probe(folders["llama"], path, "--limit", 200)
    assert (code, "line 102 is not JSON" in err) == (1, True)
    lines = path.read_text().splitlines()[:101]
    path.write_text("\n".join(lines))
    stats, _ = probe(folders["llama"], path, "--limit", 3)
    assert stats.label_tokens.tolist() == [1, 1, 1]  # records 0, 50 and 100


def test_data_sets(folders, pairs, tmp_path, probe):
    import datasets

    rows = datasets.Dataset.from_list(PAIRS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0, 2])}).save_to_disk(
        tmp_path / "two"
    )
    options = ["--field", "q", "--length", 8]
    expected, _ = probe(folders["llama"], pairs, *options)
    found, _ = probe(folders["llama"], tmp_path / "one", *options)
    assert np.array_equal(found.sq, expected.sq)
    found, _ = probe(folders["llama"], tmp_path / "two", *options, "--split", "test")
    assert found.label_tokens.tolist() == [2, 5]
    code, err = probe(folders["llama"], tmp_path / "two", *options)
    assert (code, "has the splits train, test" in err) == (2, True)
    code, err = probe(folders["llama"], tmp_path / "one", *options, "--split", "test")
    assert (code, "has no splits" in err) == (2, True)
    (tmp_path / "none").mkdir()
    code, err = probe(folders["llama"], tmp_path / "none", *options)
    assert (code, "cannot be loaded" in err) == (1, True)


def test_without_the_package_of_data_sets(folders, tmp_path, probe, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, err = probe(folders["llama"], tmp_path)
    assert (code, "pip install 'fastgrad[loops]'" in err) == (1, True)


def test_refusals(folders, pairs, tmp_path, probe):
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 " * 100)
    lists = tmp_path / "lists.jsonl"
    lists.write_text('{"text": ["w1"]}')
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text("1\n2")
    for args, code, said in (
        (["llama", pairs], 1, "has no field 'text'. Remedy: name one of its fields (q, a, n)"),
        (["llama", lists], 1, "holds list, not text"),
        (["llama", numbers], 1, "no JSON object"),
        (["llama", tmp_path / "typo.jsonl"], 2, "no file or folder"),
        (["t5", text], 1, "trained on pairs"),
        (["t5", pairs, "--field", "q"], 2, "trained on pairs"),
        (["bert", pairs, "--field", "q", "--target", "a"], 2, "has no targets"),
        (["llama", text, "--target", "a"], 2, "a text file has no fields"),
        (["llama", text, "--field", "a"], 2, "has none: it is a text file"),
        (["llama", pairs, "--split", "a"], 2, "has none: it is a JSON Lines file"),
        (["llama", text, "--seed", 1], 2, "of the masks of a masked model"),
        (["llama", pairs, "--field", "q", "--target", "a", "--length", 2, "--limit", 1], 1,
         "no example with a label"),
    ):  # fmt: skip
        found, err = probe(folders[args[0]], *args[1:])
        assert found == code, (args, err)
        assert said in err, (args, err)


def test_plan_of_an_encoder_decoder_model(folders, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(folders["t5"]), "--json"])
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert found == fg.plan_memory(loaded(folders["t5"], "AutoModelForSeq2SeqLM")).to_dict()
