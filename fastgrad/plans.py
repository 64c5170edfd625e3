"""What every plan says: terms that add up, beside those of training every weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Plan(ABC):
    """What a training step takes of one resource, by term.

    Attributes:
        terms: amounts; they add up to ``total``.
        full_terms: the same for training every weight.
        n_trained, n_total: number of weights.
        notes: what the figures leave out.
    """

    terms: dict[str, int]
    full_terms: dict[str, int]
    n_trained: int
    n_total: int
    notes: tuple[str, ...] = ()

    _unit: ClassVar[str]  # the amounts' name in to_dict

    @property
    def total(self) -> int:
        """Amount of all terms."""
        return sum(self.terms.values())

    @property
    def full_total(self) -> int:
        """:attr:`total` for training every weight."""
        return sum(self.full_terms.values())

    @property
    def saved(self) -> int:
        """Amount saved against training every weight."""
        return self.full_total - self.total

    def table(self) -> str:
        """A plain text table, one line per term."""
        terms = [(t.replace("_", " "), n, self.full_terms[t]) for t, n in self.terms.items()]
        share = self.n_trained / self.n_total
        lines = [
            f"trained weights: {self.n_trained:,} of {self.n_total:,} ({share:.1%})",
            f"{'term':<22}{'selection':>14}{'full tuning':>14}{'saved':>14}",
        ]
        for name, amount, full in [*terms, *self._last_rows()]:
            figures = (self._human(n) for n in (amount, full, full - amount))
            lines.append(f"{name:<22}" + "".join(f"{figure:>14}" for figure in figures))
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        unit = self._unit
        return {
            f"terms_{unit}": self.terms,
            f"full_terms_{unit}": self.full_terms,
            f"total_{unit}": self.total,
            f"full_total_{unit}": self.full_total,
            "n_trained": self.n_trained,
            "n_total": self.n_total,
            "notes": list(self.notes),
        }

    def _last_rows(self) -> list[tuple[str, int, int]]:
        return [("total", self.total, self.full_total)]

    @staticmethod
    @abstractmethod
    def _human(amount: float) -> str:
        """An amount with its unit, as the table shows it."""


def with_unit(amount: float, units: Sequence[str]) -> str:
    """An amount in the largest of these units, each a thousand of the former, that is below it."""
    power = 0
    while abs(amount) >= 1000 and power < len(units) - 1:
        amount, power = amount / 1000, power + 1
    return f"{amount:.2f} {units[power]}" if power else f"{amount:.0f} {units[0]}"
