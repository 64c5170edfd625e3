"""Two real texts that every Python carries: its own source, and the prose of its help topics.

Both are split into training, validation and test parts before anything is learnt from them: the
source by file, the prose by topic. Help topics quote each other (``specialnames`` contains
``attribute-access`` and a dozen more), so topics that share a paragraph stay in one part, and a
repeated paragraph is kept once; otherwise the test part would have been read in training.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrad.errors import FastgradError
from fastgrad.quickstart.settings import Settings

END, PAD = "<|end|>", "<|pad|>"  # ids 0 and 1
PARTS = ("train", "valid", "test")
HELD_OUT = {"valid": 0.12, "test": 0.15}  # share of the prose, in characters

# Tests are another kind of text; tables and generated code teach nothing; pydoc_data is the
# second domain and must not be seen in the first.
_SKIPPED_FOLDERS = frozenset({
    "__pycache__", "dist-packages", "encodings", "idle_test", "lib-dynload", "pydoc_data",
    "site-packages", "test", "tests",
})  # fmt: skip
_LARGEST_FILE = 150_000
_SHORTEST_SHARED = 40  # characters; shorter paragraphs ("Note:") are repeated by chance


@dataclass(frozen=True)
class Corpus:
    """Documents of both domains by part, in a fixed order."""

    code: Mapping[str, list[str]]
    prose: Mapping[str, list[str]]


@dataclass(frozen=True)
class Data:
    """Token rows ``[n, length]`` by ``domain_part``, and the tokenizer that made them."""

    rows: Mapping[str, Tensor]
    tokenizer: Any
    n_documents: Mapping[str, int]


def read_corpus(settings: Settings) -> Corpus:
    """Both domains, split.

    Raises:
        FastgradError: if this Python has no standard-library source or no help topics.
    """
    return Corpus(read_code(settings.code_bytes), read_prose())


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on the name alone: the same split on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def read_code(limit: int, root: Path | None = None) -> dict[str, list[str]]:
    """Standard-library source, about ``limit`` bytes for training and a tenth of it held out.

    Files are taken in a fixed pseudo-random order, so that a small limit is a fair sample.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1])
    )
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    room = {"train": limit, "valid": limit // 20, "test": limit // 20}
    for name in sorted(names, key=_draw):
        side = _draw(f"split {name}")
        part = "valid" if side < 0.1 else "test" if side < 0.2 else "train"
        if room[part] <= 0:
            continue
        text = _source(root / name)
        if text:
            parts[part].append(text)
            room[part] -= len(text)
    if not all(parts.values()):
        raise FastgradError(
            f"no Python source under {root}: the quickstart trains on the standard library. "
            "Remedy: use a Python whose library is installed as .py files (not zipped)"
        )
    return parts


def _source(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return ""
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""  # a dangling link or one of the few files in another encoding


def read_prose(topics: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Python's help topics, one document per topic."""
    if topics is None:
        topics = _help_topics()
    groups = _groups(topics)
    size = {i: sum(len(topics[name]) for name in group) for i, group in enumerate(groups)}
    total = sum(size.values())
    largest = max(size, key=lambda i: size[i])
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    room = {part: share * total for part, share in HELD_OUT.items()}
    for i in sorted(size, key=lambda i: _draw(groups[i][0])):
        part = next((p for p in HELD_OUT if i != largest and size[i] <= room[p] + total / 100),
                    "train")  # fmt: skip
        if part != "train":
            room[part] -= size[i]
            if room[part] <= 0:
                room[part] = float("-inf")
        parts[part] += _without_repeats(topics[name] for name in groups[i])
    return parts


def _help_topics() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FastgradError(
            "this Python has no pydoc_data.topics, the quickstart's second text. "
            "Remedy: install the complete standard library"
        ) from None
    return topics


def _paragraphs(text: str) -> list[str]:
    return [p for p in re.split(r"\n\s*\n", text.strip("\n")) if p.strip()]


def _plain(paragraph: str) -> str:
    """A paragraph without its layout: quoted topics are indented differently."""
    return " ".join(paragraph.split())


def _groups(topics: Mapping[str, str]) -> list[list[str]]:
    """Topics joined by shared paragraphs, each group sorted by name (union-find)."""
    parent = {name: name for name in topics}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in map(_plain, _paragraphs(topics[name])):
            if len(paragraph) >= _SHORTEST_SHARED:
                parent[root(name)] = root(first.setdefault(paragraph, name))
    groups: dict[str, list[str]] = {}
    for name in sorted(topics):
        groups.setdefault(root(name), []).append(name)
    return sorted(groups.values())


def _without_repeats(texts: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    documents = []
    for text in texts:
        kept = []
        for paragraph in _paragraphs(text):
            plain = _plain(paragraph)
            if len(plain) < _SHORTEST_SHARED or plain not in seen:
                kept.append(paragraph)
            seen.add(plain)
        if kept:
            documents.append("\n\n".join(kept) + "\n")
    return documents


def train_tokenizer(documents: Iterable[str], vocab: int) -> Any:
    """Byte-level BPE as a transformers tokenizer; 0 ends a document, 1 pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so no byte is ever unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD
    )


def token_rows(tokenizer: Any, documents: Iterable[str], length: int) -> Tensor:
    """All documents in one stream, an end mark after each, cut into int64 rows of ``length``."""
    end, stream = tokenizer.eos_token_id, []
    for document in documents:  # one at a time: what the library keeps per token is large
        stream += tokenizer.backend_tokenizer.encode(document, add_special_tokens=False).ids
        stream.append(end)
    n = len(stream) // length
    return torch.tensor(stream[: n * length], dtype=torch.int64).view(n, length)


def build_data(settings: Settings, corpus: Corpus) -> Data:
    """Tokenizer from the first domain's training part alone, and rows of every part."""
    tokenizer = train_tokenizer(corpus.code["train"], settings.vocab)
    rows, counts = {}, {}
    for domain, parts in (("code", corpus.code), ("prose", corpus.prose)):
        for part in PARTS:
            name = f"{domain}_{part}"
            matrix = token_rows(tokenizer, parts[part], settings.length)
            if part != "train":
                matrix = _spread(matrix, settings.eval_rows)
            if len(matrix) == 0:
                raise FastgradError(f"the {domain} text has too little for its {part} part")
            rows[name], counts[name] = matrix, len(parts[part])
    return Data(rows, tokenizer, counts)


def _spread(rows: Tensor, most: int) -> Tensor:
    """At most ``most`` rows, evenly spread over the whole part."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).long()]
