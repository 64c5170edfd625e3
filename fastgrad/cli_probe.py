"""``fastgrad probe``: measure a language model on a text, records or a data set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastgrad.cli_common import (
    Json,
    ModelRef,
    Rows,
    Split,
    Subset,
    check_writable,
    emit,
    emit_json,
    note,
    track,
    usage,
)
from fastgrad.cli_data import Reading, batch_of, check_options, read_examples
from fastgrad.cli_imports import importing
from fastgrad.cli_models import kind_of, load_model, load_tokenizer
from fastgrad.cli_values import dtype_of, spec_of


def probe(
    model: ModelRef,
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="A UTF-8 text file, a .jsonl file, a folder that "
                                            "datasets wrote, or the name of a data set."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the statistics go.")
    ] = Path("stats.safetensors"),
    field: Annotated[
        str | None, typer.Option(help="Of records: the field of the text; text by default.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Of records: the field of the answer. Its tokens alone are labels; an "
                          "encoder-decoder model needs it."),
    ] = None,
    split: Split = None,
    subset: Subset = None,
    blocks: Annotated[
        str,
        typer.Option(help="module, row, column, expert, head, a tile such as 128x128 or a stripe "
                          "such as 64x*."),
    ] = "module",
    length: Annotated[
        int, typer.Option(min=2, help="Tokens per row of a text; at most so many of a record.")
    ] = 128,
    rows: Rows = 8,
    limit: Annotated[
        int, typer.Option(min=1, help="Examples in all, spread evenly over the data.")
    ] = 256,
    l1: Annotated[
        bool, typer.Option("--l1", help="Absolute gradients too, for select --ranking l1.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of the masks of a masked model; 0 by default.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="dtype to load the weights in; as stored by default.")
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a causal, masked or encoder-decoder language model on your data.

    Labels are what such a model is trained on: every next token of a causal model (with --target
    the answer's alone), 15 % masked tokens of a masked model, the answer of an encoder-decoder
    model. Padding never counts, and nothing is added to the text but the special tokens that the
    tokenizer adds to a record.

    Example: [bold]fastgrad probe my-model/ sample.txt -o stats.safetensors[/]

    [bold]fastgrad probe my-model/ pairs.jsonl --field question --target answer[/]
    """
    with importing():
        import torch

        from fastgrad.blocks import in_words
        from fastgrad.blueprint_provenance import public_command
        from fastgrad.probe import Probe

    weights, granularity = dtype_of(dtype), spec_of(blocks)
    check_options(data, field=field, split=split, subset=subset)
    check_writable(output)
    net = load_model(model, weights).eval()
    kind = kind_of(net.config)
    if seed is not None and kind != "masked":
        usage("it is of the masks of a masked model, which this is not", "--seed")
    tokenizer = load_tokenizer(model, net.config)
    reading = Reading(field or "text", target, split, subset, length, limit)
    sample = read_examples(data, reading, kind, tokenizer)
    generator = torch.Generator().manual_seed(seed or 0)
    starts = range(0, len(sample.examples), rows)
    with Probe(net, blocks=granularity, l1=l1) as measuring:
        for start in track(starts, "probing", quiet=as_json):
            batch = batch_of(sample.examples[start : start + rows], kind, tokenizer, generator)
            net.zero_grad(set_to_none=True)
            net(**batch).loss.backward()
    stats = measuring.stats()
    stats.meta["data"] = {
        "datasets": [sample.meta()], "command": public_command(sys.argv),
        **({"seed": seed or 0} if kind == "masked" else {}),
    }  # fmt: skip
    stats.save(output)
    statuses = [c.status for c in stats.coverage_list]
    coverage = {s: statuses.count(s) for s in sorted(set(statuses))}
    labels = int(stats.label_tokens.sum())
    if as_json:
        emit_json({
            "path": str(output), "model_kind": kind, "n_examples": stats.n_examples,
            "n_batches": stats.n_batches, "n_label_tokens": labels,
            "blocks": in_words(stats.spec, stats.specs), "coverage": coverage,
            "notes": sample.notes,
        })  # fmt: skip
    else:
        counts = ", ".join(f"{n} {status}" for status, n in coverage.items())
        emit(f"{stats.n_examples} examples, {labels:,} label tokens, in {stats.n_batches} batches "
             f"({kind} model); coverage: {counts}")  # fmt: skip
        for line in sample.notes:
            note(line)
        note(f"wrote {output}")
