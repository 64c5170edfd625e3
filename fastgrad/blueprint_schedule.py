"""When a run is measured: at fractions of it, at given steps, or every so many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgrad.errors import FastgradError

#: Where arXiv 2511.01077 logs gradient norms.
DEFAULT = (0.5, 0.8, 1.0)


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps at which to measure; the end is always measured and needs no entry.

    Attributes:
        at: fractions of all steps, in (0, 1].
        steps: numbers of steps, the first is 1.
        every: a step from one measurement to the next.
    """

    at: tuple[float, ...] = DEFAULT
    steps: tuple[int, ...] = ()
    every: int | None = None

    @classmethod
    def of(
        cls, at: Sequence[float] | None, steps: Sequence[int], every: int | None
    ) -> Schedule:
        """Fractions are ``DEFAULT`` where nothing else is given.

        Raises:
            FastgradError: for numbers that are no fractions or steps.
        """
        if at is None:
            at = () if steps or every is not None else DEFAULT
        elif not at or not all(0 < f <= 1 for f in at):
            raise FastgradError(f"at must hold fractions in (0, 1], got {tuple(at)}. Remedy: "
                                "steps=[...] for numbers of steps")
        for step in (*steps, *(() if every is None else (every,))):
            if type(step) is not int or step < 1:
                raise FastgradError(f"a step to measure at is {step!r}. Remedy: whole numbers from "
                                    "1, in steps=[...] or every=...")
        return cls(tuple(sorted(set(at))), tuple(sorted(set(steps))), every)

    def check(self, total: int | None) -> None:
        """Raises FastgradError if there are fractions, and of what is not known."""
        if total is not None and (type(total) is not int or total < 1):
            raise FastgradError(f"total_steps is {total!r}. Remedy: how many optimizer steps the "
                                "run makes")
        if total is None and any(f < 1 for f in self.at):
            raise FastgradError(
                "fractions of a run need its length. Remedy: total_steps=..., or steps=[...] or "
                "every=... instead of fractions"
            )

    def label(self, step: int, total: int | None) -> str | None:
        """What the measurement after ``step`` steps is called, or None if there is none."""
        if total is not None and step >= total:
            return None  # the end
        if total is not None:
            for fraction in self.at:
                if fraction < 1 and max(1, round(fraction * total)) == step:
                    return in_percent(fraction)
        if step in self.steps or (self.every is not None and step % self.every == 0):
            return f"step {step}"
        return None

    def count(self, total: int | None) -> int:
        """Measurements of the whole run, its end among them.

        Args:
            total: optimizer steps of the run, if known.

        Raises:
            FastgradError: if that follows from the length alone, which is not known.
        """
        if total is None:
            if self.every is not None:
                raise FastgradError(
                    f"how often a run is measured every {self.every} steps needs its length. "
                    "Remedy: total_steps=..."
                )
            return len(self.steps) + 1
        single = {max(1, round(f * total)) for f in self.at if f < 1} | set(self.steps)
        if self.every is None:
            return sum(step < total for step in single) + 1
        return (total - 1) // self.every + 1 + sum(
            step < total and step % self.every != 0 for step in single
        )


def in_percent(fraction: float) -> str:
    """0.5 -> ``50%``, 0.125 -> ``12.5%``."""
    return f"{100 * fraction:.6g}%"
