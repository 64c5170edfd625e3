"""The quickstart: honest splits, equal arms, numbers that say what happened; once end to end."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import fastgrad as fg
from fastgrad.errors import FastgradError, MissingExtraError
from fastgrad.quickstart import measure, report, screen
from fastgrad.quickstart.arms import lora_rank, prepare
from fastgrad.quickstart.corpus import (
    PARTS,
    build_data,
    read_code,
    read_corpus,
    read_prose,
    token_rows,
    train_tokenizer,
)
from fastgrad.quickstart.pretrain import new_model
from fastgrad.quickstart.run import run_quickstart
from fastgrad.quickstart.settings import Settings, Spec, arms, next_rate
from fastgrad.quickstart.supervise import run_arm
from fastgrad.quickstart.worker import data_order, rate_factor

FAST = Settings.fast()


@pytest.fixture(scope="module")
def corpus():
    return read_corpus(FAST)


# -- corpus ------------------------------------------------------------------------------


def test_no_file_and_no_paragraph_is_in_two_parts(corpus):
    for parts in (corpus.code, corpus.prose):
        for a in PARTS:
            for b in PARTS:
                if a < b:
                    assert not set(parts[a]) & set(parts[b])
    long = {
        part: {
            " ".join(p.split())
            for text in corpus.prose[part]
            for p in re.split(r"\n\s*\n", text)
            if len(" ".join(p.split())) >= 40
        }
        for part in PARTS
    }
    assert not long["train"] & long["valid"]
    assert not long["train"] & long["test"]
    assert not long["valid"] & long["test"]


def test_every_part_is_large_enough_to_measure_on(corpus):
    characters = {p: sum(map(len, corpus.prose[p])) for p in PARTS}
    whole = sum(characters.values())
    assert 0.08 < characters["valid"] / whole < 0.25
    assert 0.10 < characters["test"] / whole < 0.30
    assert sum(map(len, corpus.code["train"])) >= FAST.code_bytes


def test_the_same_python_gives_the_same_corpus(corpus):
    again = read_corpus(FAST)
    assert again.code == corpus.code
    assert again.prose == corpus.prose


def test_source_of_another_domain_is_left_out(tmp_path):
    for name in ("a.py", "test/b.py", "pydoc_data/c.py", "site-packages/d.py", "json/tests/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    for i in range(60):
        (tmp_path / f"m{i}.py").write_text(f"x{i} = {i}\n")
    (tmp_path / "latin.py").write_bytes("# \xe9\n".encode("latin-1"))
    (tmp_path / "huge.py").write_text("#" * 200_000)
    texts = [t for part in read_code(10**6, tmp_path).values() for t in part]
    assert "# a.py\n" in texts
    assert len(texts) == 61


def test_a_python_without_source_is_refused(tmp_path):
    with pytest.raises(FastgradError, match="no Python source"):
        read_code(1000, tmp_path)


def test_topics_that_quote_each_other_stay_together():
    shared = "This paragraph is long enough to be a quotation of another topic."
    topics = {f"t{i:02}": f"Topic number {i}.\n\n{'words ' * 20}{i}" for i in range(40)}
    topics["t03"] += f"\n\n   {shared}"
    topics["t31"] += f"\n\n{shared}"
    parts = read_prose(topics)
    holders = [p for p in PARTS if any(shared in text for text in parts[p])]
    assert len(holders) == 1
    assert sum(text.count(shared) for text in parts[holders[0]]) == 1  # and is kept once
    assert sum(len(texts) for texts in parts.values()) == 40


def test_the_tokenizer_keeps_every_byte_and_its_marks_apart():
    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 50], 300)
    text = "déf ∑ <tag>\n\t\x00 日本"
    ids = tokenizer.backend_tokenizer.encode(text).ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    rows = token_rows(tokenizer, ["def f", "return"], 3)
    assert rows.shape[1] == 3
    assert (rows == 0).any()


# -- equal conditions --------------------------------------------------------------------


def test_every_arm_sees_the_same_batches():
    a, b = data_order(50, 4, 30, seed=3), data_order(50, 4, 30, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert [len(x) for x in a] == [4] * 30
    seen = torch.cat(a)
    counts = torch.bincount(seen, minlength=50)
    assert counts.min() >= 2  # 120 draws in whole passes over 50 rows
    assert counts.max() <= 3
    assert not torch.equal(torch.cat(data_order(50, 4, 30, seed=4)), seen)


def test_the_schedule_warms_up_and_decays():
    factors = [rate_factor(step, 50) for step in range(50)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] < 0.12
    assert factors[5:] == sorted(factors[5:], reverse=True)


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ({1e-3: 3.0, 4e-3: 2.0, 1.6e-2: 3.0}, 4e-3),
        ({1e-3: 3.0, 4e-3: 2.0, 1.6e-2: 2.5}, 5e-3),
        ({1e-3: 2.2, 4e-3: 2.0, 1.6e-2: 2.5}, 3e-3),
        ({1e-3: 4.356, 4e-3: 4.379, 1.6e-2: 4.838}, 1.9e-3),  # lowest at the edge, but not by much
        ({1e-3: 1.0, 4e-3: 2.0, 1.6e-2: 3.0}, 5e-4),
        ({1e-3: 3.0, 4e-3: 2.0, 1.6e-2: 1.0}, 3.2e-2),
        ({1e-3: 3.0, 4e-3: 2.9, 1.6e-2: 1.0}, 3.2e-2),
        ({1e-3: 3.0, 4e-3: 2.0, 1.6e-2: math.inf}, 2e-3),
        ({1e-3: 2.0, 4e-3: math.inf, 1.6e-2: math.inf}, 5e-4),
    ],
)
def test_one_more_rate_where_three_point_to(tried, expected):
    assert next_rate(tried) == pytest.approx(expected)


def test_all_control_arms_are_there():
    keys = [arm.key for arm in arms(Settings.full())]
    assert keys == ["full", "blueprint", "blueprint-tiles", "random-1", "random-2", "random-3",
                    "embedding", "last", "lora"]  # fmt: skip
    assert [arm.key for arm in arms(FAST)] == keys


@pytest.fixture
def prepared_spec(tmp_path):
    """A model with a blueprint and a local sample, as the stages before the arms leave them."""
    from fastgrad.integrations.transformers import measure as measure_gradients

    model = new_model(FAST, seed=0)
    rows = torch.randint(2, FAST.vocab, (8, 16))
    batches = [{"input_ids": r, "labels": r} for r in rows.split(2)]
    stats, _ = measure_gradients(model, batches, blocks=FAST.tile)
    fg.Blueprint.from_stats(stats, model=model).save_pretrained(tmp_path)
    stats.save(tmp_path / "local.safetensors")

    def spec(key, result=tmp_path / "result.json"):
        arm = next(a for a in arms(FAST) if a.key == key)
        return Spec(arm=arm, settings=FAST, seed=0, fraction=0.2, model=tmp_path,
                    data=tmp_path / "data.safetensors", local=tmp_path / "local.safetensors",
                    result=result)  # fmt: skip

    return spec


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks for it
@pytest.mark.parametrize("key", [arm.key for arm in arms(FAST)])
def test_an_arm_trains_what_it_says(prepared_spec, key):
    model = new_model(FAST, seed=0)
    total = sum(p.numel() for p in model.parameters())
    ready = prepare(prepared_spec(key), model)
    before = {n: p.detach().clone() for n, p in ready.model.named_parameters()}
    optimizer = ready.optimizer(1e-2)
    rows = torch.randint(2, FAST.vocab, (2, 16))
    for _ in range(2):
        ready.model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = sum(
        int((p.detach() != before[n]).sum())
        for n, p in ready.model.named_parameters()
        if not n.endswith("packed")
    )
    assert changed <= ready.n_trained
    assert changed > 0.5 * ready.n_trained
    if key == "embedding":
        assert ready.selected["model.embed_tokens.weight"] == 1
        assert len(ready.selected) > 1
    if key == "full":
        assert ready.n_trained == total
    else:
        assert 0.15 * total < ready.n_trained < 0.23 * total


def test_the_rank_of_lora_comes_closest_to_the_budget():
    model = new_model(FAST, seed=0)
    per_rank = FAST.layers * (
        64 + 64 + 2 * (64 + 32) + 64 + 64 + 3 * (FAST.width + FAST.feed_forward)
    )
    for budget in (1, 10_000, 31_000):
        rank = lora_rank(model, budget)
        assert rank == max(1, round(budget / per_rank))


def test_a_spec_survives_its_file(prepared_spec):
    spec = prepared_spec("blueprint-tiles")
    assert Spec.from_json(json.loads(json.dumps(spec.as_json()))) == spec


def test_a_process_that_fails_is_reported_with_its_last_words(prepared_spec, tmp_path):
    with pytest.raises(FastgradError, match=r"(?s)full AdamW.*exit code 1.*data\.safetensors"):
        run_arm(prepared_spec("full"), tmp_path / "full.log", lambda *_: None, [])


# -- measuring ---------------------------------------------------------------------------


def test_row_losses_are_the_models_own_losses():
    model = new_model(FAST, seed=0).train()
    rows = torch.randint(2, FAST.vocab, (5, 12))
    losses = measure.row_losses(model, rows, batch=2)
    assert model.training
    for row, loss in zip(rows, losses, strict=True):
        assert model(input_ids=row[None], labels=row[None]).loss.item() == pytest.approx(
            float(loss), rel=1e-5
        )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_processs_own_and_can_start_anew():
    code = """
from fastgrad.quickstart import measure
start = measure.peak_memory()
assert start < 600e6, start   # not that of the process that started this one
block = bytearray(200_000_000)
assert measure.peak_memory() > 190e6
del block
if measure.restart_peak():
    assert measure.peak_memory() < start + 50e6
assert abs(measure.current_memory() - measure.peak_memory()) < 100e6
"""
    ballast = bytearray(b"x") * 800_000_000
    subprocess.run([sys.executable, "-c", code], check=True)
    del ballast


# -- the report --------------------------------------------------------------------------


def result(key, test, *, code=4.2, rates=(1e-3, 2e-3, 4e-3), rate=2e-3, noise=0.01):
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    rows = test + noise * rng.standard_normal(50)
    return {
        "key": key, "label": key, "kind": "sparse", "rate": rate, "test": float(rows.mean()),
        "test_rows": rows.tolist(), "code": code, "n_trained": 20, "state_bytes": 16_000_000,
        "gradient_bytes": 8_000_000, "peak": 600_000_000, "baseline": 500_000_000,
        "seconds": 3.0, "cpu_seconds": 3.1, "tried": [{"rate": r, "valid": 1.0} for r in rates],
    }  # fmt: skip


BEFORE = {"prose_test": 5.0, "code_test": 4.0}


def test_rows_compute_shares_and_differences():
    table = report.rows([result("full", 3.0, noise=0), result("blueprint", 3.5, noise=0)],
                        BEFORE, 100)  # fmt: skip
    assert table[0].gain_share == 1.0
    assert table[1].gain_share == pytest.approx(0.75)
    assert table[1].forgetting == pytest.approx(0.2)
    assert table[1].trained_share == 0.2
    assert table[1].above == 100_000_000
    assert not table[1].edge
    edge = report.rows([result("full", 3.0, rate=4e-3)], BEFORE, 100)
    assert edge[0].edge
    assert report.cells(edge[0])[-1] == "0.004*"
    assert "* marks" in report.legend(edge)


def test_a_losing_blueprint_is_called_that():
    table = report.rows(
        [result("full", 3.0), result("blueprint", 4.5), result("random-1", 3.5),
         result("last", 4.5001, noise=1.0), result("lora", 4.9)], BEFORE, 100,
    )  # fmt: skip
    text = report.verdict(table)
    assert re.search(r"blueprint as whole submodules, 2[45]% of full", text)
    assert re.search(r"worse than random-1 \(7[45]%\)", text)
    assert "better than lora" in text
    assert "level with last" in text
    assert "random-1 reached the lowest loss" in text


def test_nothing_is_claimed_where_full_tuning_gained_nothing():
    table = report.rows([result("full", 5.2), result("blueprint", 4.9)], BEFORE, 100)
    assert "says nothing" in report.verdict(table)
    assert report.cells(table[1])[2] == "-"


def test_markdown_and_terminal_show_every_arm_whatever_the_width():
    results = [result(k, 3.0 + i / 10) for i, k in enumerate(["full", "blueprint", "lora"])]
    results[1]["label"] = max((arm.label for arm in arms(Settings.full())), key=len)
    table = report.rows(results, BEFORE, 100)
    record = {
        "created": "2026-01-02T03:04:05", "machine": report.machine(),
        "versions": report.versions(), "threads_per_process": 1, "arms_at_a_time": 2, "seed": 0,
        "settings": vars(FAST), "seconds": {"total": 10.0}, "delta_bytes": 2_000_000,
        "checkpoint_bytes": 10_000_000, "delta_restores": True,
    }  # fmt: skip
    text = report.markdown(record, table, "figure.png")
    assert text.count("\n| ") == 3
    assert "2.00 MB" in text
    assert "2026-01-02" in text
    assert {len(line.split("|")) for line in text.splitlines() if line.startswith("|")} == {14}
    for width in (80, 100, 120, 140):
        out = Console(file=io.StringIO(), width=width, highlight=False)
        screen.result(out, record, table)
        shown = out.file.getvalue()
        assert "…" not in shown
        assert max(map(len, shown.splitlines())) <= width
        for row in table:
            for cell in report.cells(row):
                assert cell in shown


def test_a_missing_package_is_named_before_anything_is_done(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    with pytest.raises(MissingExtraError, match=r"peft.*fastgrad\[hf\]"):
        run_quickstart(tmp_path / "out", fast=True)
    assert not (tmp_path / "out").exists()


# -- all of it ---------------------------------------------------------------------------


def test_rows_of_both_texts(corpus):
    data = build_data(FAST, corpus)
    assert set(data.rows) == {f"{d}_{p}" for d in ("code", "prose") for p in PARTS}
    assert all(rows.shape[1] == FAST.length for rows in data.rows.values())
    assert all(int(rows.max()) < FAST.vocab for rows in data.rows.values())
    needed = FAST.pretrain_steps * FAST.pretrain_rows
    assert len(data.rows["code_train"]) >= needed  # one pass: nothing is learnt by heart
    assert len(data.rows["prose_train"]) >= FAST.steps * FAST.rows


@pytest.mark.slow
def test_fast_quickstart_end_to_end(tmp_path):
    from fastgrad.integrations.transformers import measure as measure_gradients

    code = (
        "import sys; from pathlib import Path\n"
        "from fastgrad.quickstart.run import run_quickstart\n"
        "sys.exit(run_quickstart(Path(sys.argv[1]), True))"
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True
    )
    record = json.loads((out / "results.json").read_text())
    by_key = {r["key"]: r for r in record["arms"]}
    assert list(by_key) == [arm.key for arm in arms(FAST)]
    for arm in arms(FAST):
        assert arm.label in done.stdout
        assert arm.label in (out / "results.md").read_text()
    assert record["verdict"].split()[0] in done.stdout
    assert by_key["full"]["test"] < record["loss_before"]["prose_test"] - 0.1
    assert [c["at"] for c in record["checkpoints"]] == [0.5, 0.8, 1.0]
    assert len({r["pid"] for r in record["arms"]}) == len(record["arms"])
    full = by_key["full"]
    assert full["gradient_bytes"] == 4 * record["n_parameters"]
    # two moments of four bytes and one step count per tensor
    assert full["state_bytes"] == 8 * record["n_parameters"] + 4 * len(full["selected"])
    for key in (
        *("blueprint", "blueprint-tiles", "random-1", "random-2", "random-3"),
        *("embedding", "last"),
    ):
        assert by_key[key]["n_trained"] <= 0.2 * record["n_parameters"]
        assert by_key[key]["gradient_bytes"] < 0.25 * full["gradient_bytes"]

    # the files are what they claim to be, for somebody who comes later
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(out / "model")
    released = fg.Blueprint.from_pretrained(out / "model")
    released.verify(model)
    assert len(released.file.checkpoints) == 3
    assert AutoTokenizer.from_pretrained(out / "model").eos_token_id == model.config.eos_token_id
    data = load_file(out / "data.safetensors")
    fg.load_delta(model, out / "delta.safetensors")
    loss = measure.row_losses(model, data["prose_test"], 4).mean()
    assert float(loss) == pytest.approx(by_key["blueprint"]["test"], rel=1e-4)
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    rows = data["prose_train"][:4]
    stats, _ = measure_gradients(model, [{"input_ids": rows, "labels": rows}])
    assert all(c.status == "exact" for c in stats.coverage_list)
