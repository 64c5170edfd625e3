"""Statistics that are larger than memory: a folder of pieces, written one after the other.

The folder holds ``stats-00000.safetensors``, ``stats-00001.safetensors``, ... and
``index.json``, which names them. A piece is complete before the index names it, and the index is
replaced as a whole: whatever happens, what it names is there. A crash loses at most what had not
been written yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from fastgrad.errors import StatsError
from fastgrad.files import write_text
from fastgrad.stats import Coverage, GradientStats
from fastgrad.stats_files import DAMAGE, read_chosen, wanted_blocks
from fastgrad.stats_merge import (
    blank_missing,
    check_alike,
    empty_like,
    joined,
    same_kind,
    worst_coverage,
)

INDEX_NAME = "index.json"
FORMAT = "fastgrad.stats-shards/1"
_REMEDY = (
    "Remedy: copy the folder again from where it is whole; else measure these examples again and "
    "merge them with the other files, which GradientStats.load reads one by one"
)


@dataclass(frozen=True)
class Shard:
    """One file of the folder, as the index knows it."""

    file: str
    n_examples: int
    n_batches: int
    n_bytes: int
    sha256: str
    running_ids: bool


class ShardWriter:
    """Takes measurements piece by piece and writes them to a folder.

    Memory: the pieces that wait, less than ``every`` examples and the last piece added, and up to
    three times that while they are written. An example takes ``8 P (1 + K) + 40`` bytes for P
    parameters and K directions, a backward pass ``8 P``, and each block of a parameter with block
    detail 4 bytes per example. Nothing else grows with the number of examples but the index, by
    about 250 bytes per file.

    Every piece holds whole backward passes, so a boundary between files never divides one, and
    what is read back is what one measurement in memory would have been.

    Args:
        directory: folder for the files; made if it is not there.
        every: examples (or backward passes, where there are fewer) that make a file.
        resume: go on after what the folder holds already.

    Raises:
        StatsError: if the folder holds statistics already and ``resume`` is False, or they cannot
            be read, or ``every`` is not a positive number.
    """

    def __init__(
        self, directory: str | os.PathLike[str], every: int = 1000, *, resume: bool = False
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise StatsError(f"every is a number of examples, such as 1000, not {every!r}")
        self.directory, self.every = Path(directory), every
        self._shards: list[Shard] = []
        self._coverage: list[Coverage] = []
        self._waiting: list[GradientStats] = []
        self._like: GradientStats | None = None  # without content: what all must agree with
        self._with_examples: bool | None = None
        if (self.directory / INDEX_NAME).exists():
            if not resume:
                raise StatsError(
                    f"{self.directory} holds statistics already. Remedy: another folder, or "
                    "resume=True to go on after them"
                )
            self._take_up(ShardReader(self.directory))

    def _take_up(self, reader: ShardReader) -> None:
        self._shards, self._coverage = list(reader.shards), list(reader.coverage_list)
        for piece in reader:
            self._like = empty_like(piece)
            self._with_examples = same_kind(None, piece)
            break

    @property
    def n_examples(self) -> int:
        """Examples taken so far, written or waiting."""
        return self.n_written + sum(p.n_examples for p in self._waiting)

    @property
    def n_written(self) -> int:
        """Examples that a crash would not lose."""
        return sum(s.n_examples for s in self._shards)

    def add(self, piece: GradientStats) -> None:
        """Take one measurement of whole backward passes; write a file if enough wait.

        If the disk refuses, the piece waits and the next :meth:`flush` tries again.

        Raises:
            StatsError: if it was not made on the same parameters, blocks and weights as the
                pieces before it. Those are kept.
        """
        self.accept(piece)
        passes = sum(p.n_batches for p in self._waiting)
        if max(sum(p.n_examples for p in self._waiting), passes) >= self.every:
            self.flush()

    def accept(self, piece: GradientStats) -> None:
        """As :meth:`add`, but nothing is written yet."""
        if self._like is None:
            self._like = empty_like(piece)
        check_alike(self._like, piece)
        self._with_examples = same_kind(self._with_examples, piece)
        self._waiting.append(piece)

    def flush(self) -> None:
        """Write what waits, if anything does."""
        if not self._waiting:
            return
        whole = self._waiting[0]
        if len(self._waiting) > 1:
            whole = GradientStats.concat(self._waiting)
        path = self.directory / f"stats-{len(self._shards):05d}.safetensors"
        whole.save(path)
        size = whole.n_examples, whole.n_batches
        shard = Shard(path.name, *size, path.stat().st_size, _sha256(path), whole.running_ids)
        coverage = worst_coverage(self._coverage, whole.coverage_list)
        self._write_index([*self._shards, shard], coverage)
        self._shards.append(shard)
        self._coverage, self._waiting = coverage, []

    close = flush

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()

    def _write_index(self, shards: Sequence[Shard], coverage: Sequence[Coverage]) -> None:
        document = {
            "format": FORMAT,
            "block_detail": sorted(self._like.block_sq) if self._like is not None else [],
            "shards": [asdict(s) for s in shards],
            "coverage": [asdict(c) for c in coverage],
        }
        write_text(self.directory / INDEX_NAME, json.dumps(document, indent=1) + "\n")


class ShardReader:
    """Reads what a :class:`ShardWriter` wrote: as a whole, or one file at a time.

    Iterating gives one :class:`GradientStats` per file with all block detail; only one is in
    memory at a time.

    Attributes:
        shards: the files, in order.
        coverage_list: of the whole measurement.
        block_detail: names of the parameters with per-example block detail.

    Raises:
        StatsError: if there is no index, it is damaged, or a file that it names is missing or has
            another size.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.shards, self.coverage_list, self.block_detail = _read_index(self.directory)
        for shard in self.shards:
            path = self.directory / shard.file
            if not path.is_file():
                raise StatsError(f"{path} is missing, though {INDEX_NAME} names it. {_REMEDY}")
            if path.stat().st_size != shard.n_bytes:
                raise StatsError(
                    f"{path} is damaged: it has {path.stat().st_size:,} bytes, written were "
                    f"{shard.n_bytes:,}. {_REMEDY}"
                )

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def n_examples(self) -> int:
        return sum(s.n_examples for s in self.shards)

    @property
    def n_batches(self) -> int:
        return sum(s.n_batches for s in self.shards)

    def __iter__(self) -> Iterator[GradientStats]:
        return self.iterate()

    def iterate(self, blocks: bool | Sequence[str] = True) -> Iterator[GradientStats]:
        """The pieces in order, with the block detail asked for.

        Batch numbers count within each piece; example ids within the whole. A parameter whose
        coverage turned out to be missing later is NaN in every piece.

        Raises:
            StatsError: naming the file that is damaged.
        """
        wanted = wanted_blocks(self.block_detail, blocks)
        running, start = all(s.running_ids for s in self.shards), 0
        for shard in self.shards:
            piece = self._read(shard, wanted)
            piece.coverage_list = list(self.coverage_list)
            blank_missing(piece)
            if running:
                piece.example_ids = np.arange(start, start + shard.n_examples, dtype=np.int64)
                piece.running_ids = start == 0
            start += shard.n_examples
            yield piece

    def load(self, blocks: bool | Sequence[str] = True) -> GradientStats:
        """All pieces as one measurement, as if it had been made in memory.

        Takes the memory of the result and of one piece. See :meth:`GradientStats.load`.
        """
        if not self.shards:
            raise StatsError(f"{self.directory} holds no measurement yet")
        wanted = wanted_blocks(self.block_detail, blocks)
        # As stored: running numbers of the pieces become running numbers of the whole.
        pieces = (self._read(shard, wanted) for shard in self.shards)
        return joined(pieces, self.n_examples, self.n_batches)

    def verify(self) -> None:
        """Read every file and compare its hash: finds damage that the size does not show.

        Raises:
            StatsError: naming the first file that is not what was written.
        """
        for shard in self.shards:
            path = self.directory / shard.file
            if _sha256(path) != shard.sha256:
                raise StatsError(f"{path} is damaged: its hash is another. {_REMEDY}")

    def _read(self, shard: Shard, wanted: set[str]) -> GradientStats:
        path = self.directory / shard.file
        try:
            piece = read_chosen(path, lambda detailed: wanted.intersection(detailed))
        except StatsError as error:
            raise StatsError(f"{error}. {_REMEDY}") from error
        found = (piece.n_examples, piece.n_batches, piece.running_ids)
        if found != (shard.n_examples, shard.n_batches, shard.running_ids):
            raise StatsError(
                f"{path} is not the file that {INDEX_NAME} names: it has {piece.n_examples} "
                f"examples and {piece.n_batches} passes, not {shard.n_examples} and "
                f"{shard.n_batches}. {_REMEDY}"
            )
        return piece


def _read_index(directory: Path) -> tuple[list[Shard], list[Coverage], list[str]]:
    path = directory / INDEX_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise StatsError(
                f"{path} has format {document['format']!r}, this version reads {FORMAT!r}"
            )
        shards = [Shard(**s) for s in document["shards"]]
        for shard in shards:
            numbers = shard.n_examples, shard.n_batches, shard.n_bytes
            if Path(shard.file).name != shard.file:
                raise ValueError(f"{shard.file!r} is not a file of this folder")
            if not all(type(n) is int and n >= 0 for n in numbers):
                raise ValueError(f"the sizes of {shard.file} are not numbers")
        coverage = [Coverage(**c) for c in document["coverage"]]
        return shards, coverage, [str(n) for n in document["block_detail"]]
    except FileNotFoundError:
        raise StatsError(
            f"{directory} holds no {INDEX_NAME}, so no statistics. Remedy: give the folder that a "
            "shard writer wrote"
        ) from None
    except DAMAGE as error:
        if isinstance(error, StatsError):
            raise
        raise StatsError(f"{path} is damaged: {error}. {_REMEDY}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
