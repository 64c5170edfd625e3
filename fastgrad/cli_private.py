"""``fastgrad blueprint private``: a blueprint of noised norms, with a guarantee for each record.

What an example becomes depends on its own record alone: not on its place, on its neighbours in a
batch, nor on how long they are. Nothing about the data is written but what the release says.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from fastgrad.cli_common import (
    Created,
    Domains,
    Json,
    ModelName,
    ModelRef,
    ModelRevision,
    Rows,
    Split,
    Subset,
    TokensPerStep,
    check_writable,
    emit_json,
    emit_text,
    note,
    track,
    usage,
)
from fastgrad.cli_data import (
    IGNORED,
    Example,
    Reading,
    batch_of,
    check_options,
    is_text,
    padding_of,
    read_examples,
)
from fastgrad.cli_models import Kind, config_of, kind_of, load_model, load_tokenizer
from fastgrad.errors import PrivacyError

if TYPE_CHECKING:
    import torch

    from fastgrad.privacy import PrivateNorms

#: What the passes of :func:`fastgrad.private_norms` are for, in their order.
_PASSES = ("checking", "measuring", "adding up")


class _Batches:
    """Batches that are read several times, each time with a progress bar."""

    def __init__(self, batches: Sequence[dict[str, torch.Tensor]], quiet: bool) -> None:
        self._batches, self._passes, self._quiet = batches, iter(_PASSES), quiet

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from track(self._batches, next(self._passes, "reading"), quiet=self._quiet)


def alone(example: Example, kind: Kind, tokenizer: Any, seed: int) -> Example:
    """The example as the model is given it: with a token, and with masks drawn from nothing but
    its own tokens and the seed."""
    import torch

    if not example.ids:  # a record without a token has no gradient, but is one of n
        return Example([padding_of(tokenizer)], [IGNORED], [True])
    if kind != "masked":
        return example
    if all(example.special):
        return Example(example.ids, [IGNORED] * len(example.ids), example.special)
    digest = hashlib.sha256(json.dumps([seed, example.ids]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    batch = batch_of([example], kind, tokenizer, generator)
    return Example(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), example.special)


def private(
    model: ModelRef,
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="A .jsonl file, a folder that datasets wrote, or the "
                                            "name of a data set. Each record is protected."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
    clip: Annotated[
        float,
        typer.Option(help="Length that each example's gradient is cut to. From public data: a "
                          "choice that looks at these records is not private."),
    ],
    delta: Annotated[float, typer.Option(help="Of the guarantee; well below 1/n.")],
    epsilon: Annotated[
        float | None, typer.Option(help="Of the guarantee; the noise follows from it.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Instead: noise by sensitivity; epsilon follows.")
    ] = None,
    adjacency: Annotated[
        str,
        typer.Option(help="Which data sets are neighbours: replace_one, zero_out or "
                          "add_or_remove_one (a record), see docs/maths.md."),
    ] = "replace_one",
    n: Annotated[
        int | None,
        typer.Option("--n", help="Public number that sums are divided by. By default the number "
                                 "of records; add_or_remove_one, which hides that, needs it."),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Of records: the field of the text; text by default.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Of records: the field of the answer. Its tokens alone are labels."),
    ] = None,
    split: Split = None,
    subset: Subset = None,
    length: Annotated[
        int, typer.Option(min=2, help="At most so many tokens of a record.")
    ] = 128,
    rows: Rows = 8,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Records in all, spread evenly; all by default."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the masks of a masked model; 0 by default. Noise has none."),
    ] = None,
    coarse: Annotated[
        str | None,
        typer.Option(help="ranks or deciles: write these of the noised norms, and no numbers."),
    ] = None,
    domain: Domains = None,
    name: ModelName = None,
    revision: ModelRevision = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Name of the data set, which then is public; none without; repeatable."),
    ] = None,
    created: Created = None,
    tokens_per_step: TokensPerStep = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a causal or masked language model, and write a blueprint with differential privacy
    for each record: clipped gradients, one release of noised norms, nothing else.

    Every run is a release. Another one from the same records, also after one that was refused
    because all norms lay below the noise, adds to epsilon and delta. The command line is written
    into the file with DATA in place of the data's name; what is printed on standard error is not
    protected.

    Example: [bold]fastgrad blueprint private my-model/ notes.jsonl -o my-model/ --clip 1.0
    --epsilon 2 --delta 1e-6[/]
    """
    from fastgrad.blueprint_coarse import Coarseness
    from fastgrad.blueprint_schema import FILE_NAME
    from fastgrad.privacy import calibrated, check_release

    check_options(data, field=field, split=split, subset=subset)
    if coarse is not None and coarse not in get_args(Coarseness):
        usage(f"{coarse!r}: use {' or '.join(get_args(Coarseness))}", "--coarse")
    hidden = adjacency == "add_or_remove_one"
    if hidden and n is None:
        usage("the number of records is a secret under add_or_remove_one; name a public one", "--n")
    if hidden and limit is not None:
        usage("which records are chosen depends on how many there are, and that is a secret under "
              "add_or_remove_one", "--limit")  # fmt: skip
    if is_text(data):
        raise PrivacyError(
            f"{data} is one text: where a row of it begins depends on all that comes before, so "
            "one changed word changes many rows. Remedy: a .jsonl file or a data set, with a "
            "record for each example that is to be protected"
        )
    check_release(clip, n or 1, delta, adjacency)
    calibrated(delta, epsilon, noise_multiplier)
    check_writable(output / FILE_NAME)
    config = config_of(model)
    kind = kind_of(config)
    if kind == "encoder-decoder":
        raise PrivacyError(
            "the losses of single examples of an encoder-decoder model are not known to the "
            "command. Remedy: fastgrad.private_norms in Python, with loss=..."
        )
    if seed is not None and kind != "masked":
        usage("it is of the masks of a masked model, which this is not", "--seed")
    tokenizer = load_tokenizer(model, config)
    most = sys.maxsize if limit is None else limit
    reading = Reading(field or "text", target, split, subset, length, most, every=True)
    sample = read_examples(data, reading, kind, tokenizer)
    norms = _release(
        model, [alone(e, kind, tokenizer, seed or 0) for e in sample.examples], tokenizer, rows,
        clip=clip, n=len(sample.examples) if n is None else n, delta=delta, epsilon=epsilon,
        noise_multiplier=noise_multiplier, adjacency=adjacency, quiet=as_json,
    )  # fmt: skip
    blueprint = norms.blueprint(
        domain or [], name_or_path=name, revision=revision, datasets=dataset or (),
        created=created, tokens_per_step=tokens_per_step, coarse=coarse,  # type: ignore[arg-type]
        command=_without(data, sys.argv),
    )  # fmt: skip
    path = blueprint.save_pretrained(output)
    for line in sample.notes:
        note(f"{line}; this is not part of the release")
    if as_json:
        emit_json({"path": str(path), "privacy": json.loads(blueprint.to_json())["privacy"]})
    else:
        emit_text(blueprint.summary())
        note(f"wrote {path}")


def _without(data: str, argv: Sequence[str]) -> str:
    """The command line, with DATA in place of the data's name: that may say what is in them."""
    from fastgrad.blueprint_provenance import public_command

    return public_command(["DATA" if arg == data else arg for arg in argv])


def _release(
    model: str,
    examples: Sequence[Example],
    tokenizer: Any,
    rows: int,
    *,
    n: int,
    quiet: bool,
    **settings: Any,
) -> PrivateNorms:
    import torch

    from fastgrad.identity import weights_hash
    from fastgrad.privacy import check_release, private_norms

    check_release(settings["clip"], n, settings["delta"], settings["adjacency"])
    batches = _Batches([
        batch_of(examples[start : start + rows], "decoder", tokenizer, torch.Generator())
        for start in range(0, len(examples), rows)
    ], quiet)  # fmt: skip
    net = load_model(model)
    stored = weights_hash(net)
    # Rounding to 16 bits would change sums by more than one example may.
    return private_norms(net.float(), batches, n=n, weights_hash=stored, **settings)
