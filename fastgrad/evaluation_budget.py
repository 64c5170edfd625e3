"""How much may be measured, so that it costs a given share of what a run evaluates.

From counts, not from a clock: the same on every process, and in a run that is resumed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from fastgrad.blueprint_schedule import Schedule
from fastgrad.errors import FastgradError

#: Evaluated examples that a measured one of the same length is taken to cost. An evaluated one is
#: a forward pass; a measured one adds a backward pass, twice that, which makes 3, and each
#: example's influence adds up to 18 % of both passes (128x128 tiles, 64 tokens a row, in
#: bench/results/step_overhead.json), which makes 3.5. The rest is for what does not grow with the
#: batch: hooks and stand-ins, the hash of the weights, the fits of the blueprint.
COST = 4.0


@dataclass(frozen=True)
class EvaluationBudget:
    """What one measurement may hold.

    Attributes:
        share: of the run's evaluation, that all measurements together may cost.
        evaluated: examples in all evaluations of the run together.
        measurements: of the whole run.
    """

    share: float
    evaluated: int
    measurements: int

    @classmethod
    def of(
        cls, share: float | None, evaluated: int | None, schedule: Schedule, steps: int | None
    ) -> EvaluationBudget | None:
        """None without a share.

        Args:
            share: as it was asked for.
            evaluated: examples in all evaluations of the run together.
            schedule: of the measurements.
            steps: of the run, if known.

        Raises:
            FastgradError: if one of the two is missing or cannot be, or the measurements cannot be
                counted.
        """
        check(share, evaluated)
        if share is None:
            return None
        if evaluated is None:
            raise FastgradError(
                f"evaluation_share={share} is a share of what the run evaluates, and how much that "
                "is, is not known. Remedy: evaluated_examples=..., evaluations of the run times "
                "examples in each, or examples=... instead"
            )
        return cls(share, evaluated, schedule.count(steps))

    @property
    def examples(self) -> float:
        """Examples in each measurement."""
        return self.share * self.evaluated / (COST * self.measurements)

    def share_of(self, examples: int) -> float:
        """What all measurements of so many examples each cost, as a share of the evaluation."""
        return COST * examples * self.measurements / self.evaluated

    def warn(self, batches: int, rows: int) -> None:
        """Warns if ``batches`` of ``rows`` each are more than there is room for."""
        if batches * rows <= self.examples * (1 + 1e-9):
            return
        least = "one batch" if batches == 1 else f"{batches} batches, one for each process,"
        warnings.warn(
            f"evaluation_share={self.share:g} of {self.evaluated} evaluated examples leaves room "
            f"for {self.examples:.3g} in each of {self.measurements} measurements, and the least "
            f"that is measured is {least} of {rows}: measuring will cost about "
            f"{self.share_of(batches * rows):.2g} of the evaluation. Remedy: validation batches of "
            "fewer rows, fewer measurements, or a larger share",
            stacklevel=2,
        )


def check(share: float | None, evaluated: int | None) -> None:
    """Raises FastgradError for numbers that are no share or no number of examples."""
    if share is not None and not 0 < share <= 1:
        raise FastgradError(f"evaluation_share must be in (0, 1], got {share!r}")
    if evaluated is None:
        return
    if share is None:
        raise FastgradError(
            "evaluated_examples says what evaluation_share is a share of. Remedy: "
            "evaluation_share=0.02 beside it, or leave it out"
        )
    if type(evaluated) is not int or evaluated < 0:
        raise FastgradError(f"evaluated_examples must be a whole number, got {evaluated!r}")
    if evaluated == 0:
        raise FastgradError(
            f"evaluation_share={share} of a run that evaluates nothing leaves nothing to measure. "
            "Remedy: examples=... or share=... instead"
        )
