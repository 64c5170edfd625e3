"""Which of the validation batches are measured: an even sample, the same one every time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastgrad.errors import FastgradError
from fastgrad.random_state import unnoticed_draws

#: Batches that are measured unless more or fewer are asked for. Halves of 8 still tell how
#: reliable the ranks are, and staleness needs 4.
DEFAULT_BATCHES = 16


class HeldOut:
    """Validation batches, of which some are measured.

    Args:
        batches: a list, a DataLoader, or anything that can be read again and again and ends. An
            iterator is read at once and kept.
        examples: measure as many batches as hold that many examples, by the size of the first.
        share: measure this share of the batches.
        at_most: measure as many batches as hold no more examples than that, by the size of the
            first, but one at least. Without any of these, at most ``DEFAULT_BATCHES`` batches.

    Raises:
        FastgradError: for a sample that cannot be.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        examples: int | None = None,
        share: float | None = None,
        at_most: float | None = None,
    ) -> None:
        given = {"examples": examples, "share": share, "evaluation_share": at_most}
        both = [name for name, value in given.items() if value is not None]
        if len(both) > 1:
            raise FastgradError(
                f"{' and '.join(both)} both say how much to measure. Remedy: give one"
            )
        if share is not None and not 0 < share <= 1:
            raise FastgradError(f"share must be in (0, 1], got {share!r}")
        if examples is not None and (type(examples) is not int or examples < 1):
            raise FastgradError(f"examples must be a positive whole number, got {examples!r}")
        if isinstance(batches, Iterator):  # could be read only once
            batches = list(batches)
        self.batches, self.examples, self.share, self.at_most = batches, examples, share, at_most
        self._n: int | None = None
        self._rows: int | None = None

    def __len__(self) -> int:
        """How many there are; read through once where the batches do not say."""
        if self._n is None:
            try:
                self._n = len(self.batches)  # type: ignore[arg-type]
            except TypeError:  # also a DataLoader of an iterable data set
                with unnoticed_draws():
                    self._n = sum(1 for _ in self.batches)
        return self._n

    def chosen(self, multiple: int = 1) -> list[int]:
        """Numbers of the batches that are measured, spread evenly, ``multiple`` or a multiple of
        it.

        Raises:
            FastgradError: if there are not so many.
        """
        n = len(self)
        if n < multiple:
            raise FastgradError(
                "there was no batch to measure on"
                if n == 0
                else f"under fully_shard each of {multiple} processes measures a batch at a time, "
                f"and there are {n}. Remedy: smaller batches, more of them"
            )
        wanted = DEFAULT_BATCHES
        if self.share is not None:
            wanted = math.ceil(round(self.share * n, 9))
        elif self.examples is not None:
            wanted = math.ceil(self.examples / self.rows())
        elif self.at_most is not None:
            wanted = math.floor(round(min(self.at_most / self.rows(), n), 9))
        k = max(min(wanted, n) // multiple, 1) * multiple
        return [(2 * i + 1) * n // (2 * k) for i in range(k)]

    def rows(self) -> int:
        """Examples in the first batch, which is read once.

        Raises:
            FastgradError: if it holds no tensor to count them by.
        """
        if self._rows is None:
            with unnoticed_draws():  # a DataLoader draws a seed for its workers
                self._rows = _rows_of(next(iter(self.batches)))
        return self._rows

    def read(self, numbers: Sequence[int]) -> Iterator[Any]:
        """These batches, in ascending order."""
        if isinstance(self.batches, Sequence):
            yield from (self.batches[i] for i in numbers)
            return
        wanted, last = set(numbers), max(numbers, default=-1)
        for i, batch in enumerate(self.batches):
            if i in wanted:
                yield batch
            if i >= last:
                return


def _rows_of(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else (
        batch if isinstance(batch, Sequence) else (batch,)
    )  # fmt: skip
    for value in values:
        if isinstance(value, Tensor) and value.ndim and len(value):
            return len(value)
    raise FastgradError(
        "the examples of a validation batch cannot be counted: it holds no tensor. Remedy: "
        "share=..., which counts batches"
    )
