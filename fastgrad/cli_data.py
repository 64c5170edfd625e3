"""What ``fastgrad probe`` measures on: a text file, records or a data set become examples.

A text is cut into rows of equal length, the last incomplete one dropped. A record (a line of JSON
Lines, a row of a data set) is one example: cut off at ``length`` tokens, padded within its batch.
Padding, and the prompt of a pair, are no labels.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrad.cli_common import first_line, usage
from fastgrad.cli_models import Kind
from fastgrad.errors import MissingExtraError, ProbeError

if TYPE_CHECKING:
    import torch

IGNORED = -100
MASKED_SHARE = 0.15  # of the tokens, as BERT was trained
_RECORDS = (".jsonl", ".ndjson")
_FILES = (".txt", ".md", ".json", ".csv", ".parquet", ".gz", ".zip", *_RECORDS)


@dataclass(frozen=True)
class Example:
    """Token numbers that go in, and the label of each (of another length for an encoder-decoder
    model). ``special`` marks tokens that are never masked."""

    ids: list[int]
    labels: list[int]
    special: list[bool]


@dataclass
class Sample:
    """The examples chosen, and what became of the rest."""

    examples: list[Example]
    origin: dict[str, Any]  # an entry of meta["data"]["datasets"], see fastgrad.data_sources
    notes: list[str] = field(default_factory=list)

    def meta(self) -> dict[str, Any]:
        """The entry that the blueprint quotes: which data, and how many examples of it."""
        return {k: v for k, v in self.origin.items() if v} | {"n_examples": len(self.examples)}


@dataclass(frozen=True)
class Reading:
    """How data is read: see the options of ``fastgrad probe``.

    ``every``: a record without a label is an example too, one without a gradient.
    """

    field: str
    target: str | None
    split: str | None
    subset: str | None
    length: int
    limit: int
    every: bool = False


def is_text(data: str) -> bool:
    """Whether it is a file that is one text, and holds no records."""
    path = Path(data)
    return path.is_file() and path.suffix not in _RECORDS


def check_options(data: str, **options: str | None) -> None:
    """Refuse ``field``, ``split`` and ``subset`` where the data has none: wrong usage."""
    is_file = Path(data).is_file()
    for option, value in options.items():
        if value is not None and (is_text(data) or (option != "field" and is_file)):
            kind = "text" if is_text(data) else "JSON Lines"
            usage(f"{data} has none: it is a {kind} file", f"--{option}")


def read_examples(data: str, reading: Reading, kind: Kind, tokenizer: Any) -> Sample:
    """Examples for a model of one kind, at most ``reading.limit``, spread evenly over the data.

    Raises:
        ProbeError: if the data cannot be read or gives no example.
        MissingExtraError: if it is a data set and ``datasets`` is not installed.
    """
    if kind == "masked" and reading.target is not None:
        usage("a masked model predicts its own text and has no targets", "--target")
    path = Path(data)
    if is_text(data):
        return _text(path, reading, kind, tokenizer)
    n, record, origin = _lines(path) if path.is_file() else _data_set(data, reading)
    if kind == "encoder-decoder" and reading.target is None:
        usage("an encoder-decoder model is trained on pairs: name the record's field of the answer",
              "--target")  # fmt: skip
    sample = _records(data, n, record, reading, kind, tokenizer)
    sample.origin = origin
    return sample


# -- text ----------------------------------------------------------------------------------------


def _text(path: Path, reading: Reading, kind: Kind, tokenizer: Any) -> Sample:
    if reading.target is not None:
        usage("a text file has no fields; pairs come from JSON Lines or a data set", "--target")
    if kind == "encoder-decoder":
        raise ProbeError(
            f"{path} is plain text, and an encoder-decoder model is trained on pairs. Remedy: a "
            ".jsonl file or a data set, with --field and --target"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProbeError(f"{path} is not UTF-8 text: {error}. Remedy: convert it; records are read "
                         "from .jsonl files or data sets") from error  # fmt: skip
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    length = reading.length
    n = len(ids) // length
    if n == 0:
        raise ProbeError(f"{path} has {len(ids)} tokens, fewer than one row of {length}. Remedy: "
                         "more text, or a smaller --length")
    rows = [ids[i * length : (i + 1) * length] for i in _spread(n, reading.limit)]
    return Sample([Example(r, r, [False] * length) for r in rows], _origin_of_file(path))


def _origin_of_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "revision": f"sha256:{digest}"}


def _spread(n: int, limit: int) -> list[int]:
    """At most ``limit`` of the numbers below ``n``, from first to last at even distances."""
    if n <= limit:
        return list(range(n))
    import numpy as np

    return np.linspace(0, n - 1, limit).round().astype(int).tolist()


# -- records -------------------------------------------------------------------------------------

Record = Callable[[Sequence[int]], Iterator[tuple[str, Any]]]


def _lines(path: Path) -> tuple[int, Record, dict[str, Any]]:
    """Number of records of a JSON Lines file, what reads some of them (the file is read twice
    instead of being held in memory), and which file it is."""
    with path.open("rb") as file:
        n = sum(1 for line in file if line.strip())

    def read(chosen: Sequence[int]) -> Iterator[tuple[str, Any]]:
        wanted, i = set(chosen), -1
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                i += 1
                if i not in wanted:
                    continue
                try:
                    yield f"{path.name} line {number}", json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    raise ProbeError(
                        f"{path} line {number} is not JSON: {first_line(error)}. Remedy: one JSON "
                        "object in each line, UTF-8"
                    ) from None

    return n, read, _origin_of_file(path)


def _data_set(data: str, reading: Reading) -> tuple[int, Record, dict[str, Any]]:
    path = Path(data)
    if not path.is_dir() and (path.suffix in _FILES or data.startswith((".", "/", "~"))):
        usage(f"there is no file or folder {data!r}", "DATA")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "loops") from error
    datasets.disable_progress_bars()
    try:
        if path.is_dir() and any((path / n).is_file() for n in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(data)
        else:
            found = datasets.load_dataset(data, reading.subset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ProbeError(
            f"the data set {data} cannot be loaded: {first_line(error)}. Remedy: a folder that "
            "datasets wrote or can read, or the name of a data set and perhaps --subset"
        ) from error
    if isinstance(found, dict):
        split = reading.split or (next(iter(found)) if len(found) == 1 else None)
        if split not in found:
            usage(f"the data set has the splits {', '.join(found)}; choose one", "--split")
        found = found[split]
    elif reading.split is not None:
        usage("this data set has no splits", "--split")

    def read(chosen: Sequence[int]) -> Iterator[tuple[str, Any]]:
        for i in chosen:
            yield f"{data} row {i}", found[i]

    # A folder's own name alone; of a hub's data set the commit that its files came from.
    sources = " ".join(getattr(found.info, "download_checksums", None) or {})
    commit = re.search(r"@([0-9a-f]{40})/", sources)
    return len(found), read, {
        "name": path.resolve().name if path.is_dir() else data, "subset": reading.subset,
        "split": str(found.split) if found.split else reading.split,
        "revision": commit[1] if commit else None,
    }  # fmt: skip


def _records(
    data: str, n: int, read: Record, reading: Reading, kind: Kind, tokenizer: Any
) -> Sample:
    sample = Sample([], {"name": data})
    cut = empty = 0
    for where, record in read(_spread(n, reading.limit)):
        text = _text_of(record, reading.field, where, "--field")
        answer = None
        if reading.target is not None:
            answer = _text_of(record, reading.target, where, "--target")
        example, shortened = _example(text, answer, kind, tokenizer, reading.length)
        # A decoder's first token is no label, so one token alone teaches nothing.
        labels = example.labels[1:] if kind == "decoder" else example.labels
        if kind == "masked":
            labels = [t for t, s in zip(labels, example.special, strict=True) if not s]
        if not example.ids or all(label == IGNORED for label in labels):
            empty += 1
            if not reading.every:
                continue
        cut += shortened
        sample.examples.append(example)
    if not sample.examples:
        raise ProbeError(
            f"{data} gives no example with a label among {n} records. Remedy: other fields (--field"
            " and --target), or a larger --length"
        )
    if cut:
        sample.notes.append(f"{cut} records were cut off at {reading.length} tokens (--length)")
    if empty:
        left_out = "have no gradient" if reading.every else "were left out"
        sample.notes.append(f"{empty} records without a label {left_out}")
    return sample


def _text_of(record: Any, name: str, where: str, option: str) -> str:
    if not isinstance(record, dict):
        raise ProbeError(f"{where} is no JSON object with fields. Remedy: an object such as "
                         '{"text": ...}')  # fmt: skip
    if name not in record:
        known = ", ".join(str(key)[:40] for key in list(record)[:10]) or "none"
        raise ProbeError(f"{where} has no field {name!r}. Remedy: name one of its fields ({known}) "
                         f"with {option}")  # fmt: skip
    value = record[name]
    if not isinstance(value, str):
        raise ProbeError(f"{where}: the field {name!r} holds {type(value).__name__}, not text. "
                         f"Remedy: another {option}, or write its text into a field")  # fmt: skip
    return value


def _example(
    text: str, answer: str | None, kind: Kind, tokenizer: Any, length: int
) -> tuple[Example, bool]:
    ids = tokenizer(text, verbose=False)["input_ids"]
    if kind == "encoder-decoder":
        labels = tokenizer(text_target=answer, verbose=False)["input_ids"]
        cut = max(len(ids), len(labels)) > length
        ids, labels = ids[:length], labels[:length]
        return Example(ids, labels, [False] * len(ids)), cut
    labels = list(ids)
    if answer is not None:
        more = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        ids, labels = ids + more, [IGNORED] * len(ids) + more
    special = set(tokenizer.all_special_ids)
    cut = len(ids) > length
    ids, labels = ids[:length], labels[:length]
    return Example(ids, labels, [i in special for i in ids]), cut


# -- batches -------------------------------------------------------------------------------------


def batch_of(
    examples: Sequence[Example], kind: Kind, tokenizer: Any, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward pass: int64 ``[rows, tokens]``, padded on the right.

    Raises:
        ProbeError: if a masked model's tokenizer has no mask token.
    """
    import torch

    ids = _padded([e.ids for e in examples], padding_of(tokenizer))
    if kind == "masked":
        special = _padded([[int(s) for s in e.special] for e in examples], 1).bool()
        ids, labels = _mask(ids, special, tokenizer, generator)
    else:
        labels = _padded([e.labels for e in examples], IGNORED)
    batch = {"input_ids": ids, "labels": labels}
    lengths = torch.tensor([len(e.ids) for e in examples])
    if int(lengths.min()) < ids.shape[1]:
        batch["attention_mask"] = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return batch


def padding_of(tokenizer: Any) -> int:
    """Number of the token to pad with: without a meaning, for the attention mask hides it."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    import torch

    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def _mask(
    ids: torch.Tensor, special: torch.Tensor, tokenizer: Any, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels with 15 % of the tokens masked, at least one in each row."""
    import torch

    if tokenizer.mask_token_id is None:
        raise ProbeError("a masked model needs a tokenizer with a mask token. Remedy: the one that "
                         "the model was trained with, saved beside it")  # fmt: skip
    chance = torch.rand(ids.shape, generator=generator).masked_fill(special, 2.0)
    chosen = chance < MASKED_SHARE
    chosen[torch.arange(len(ids)), chance.argmin(1)] = True
    return ids.masked_fill(chosen, tokenizer.mask_token_id), ids.masked_fill(~chosen, IGNORED)
