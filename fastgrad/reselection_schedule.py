"""When to re-select in a plain loop: every so many steps, or when the selection has gone stale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastgrad.blueprint import Blueprint
from fastgrad.blueprint_schema import parse_blueprint
from fastgrad.errors import BlueprintError, PartialError, SelectionError
from fastgrad.partial import Partial
from fastgrad.random_state import random_states, restore
from fastgrad.reselection import GroupOf, Report
from fastgrad.selection import Selection
from fastgrad.staleness import Staleness
from fastgrad.stats import GradientStats
from fastgrad.step_guard import is_pending

Choose = Callable[[nn.Module, GradientStats | None], Selection]
Measure = Callable[[nn.Module], GradientStats]


class Reselection:
    """Calls :meth:`fastgrad.Partial.reselect` as training goes on.

    By steps::

        again = fg.Reselection(partial, optimizer, choose, every=200, measure=measure)
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            again.step()
            optimizer.zero_grad()

    By staleness, with ``reference`` what the present selection was made from: every ``every``
    steps a fresh measurement is compared with it, and only where the ranks have drifted by more
    than the noise of the sample (:meth:`fastgrad.Blueprint.staleness`) is the selection made anew;
    that measurement is the reference from then on.

    ``measure`` and ``choose`` get the plain model, inside :meth:`fastgrad.Partial.suspended`;
    random numbers that they draw do not change those of training.

    Args:
        partial: the partial model.
        optimizer: see :meth:`fastgrad.Partial.reselect`.
        choose: ``(model, stats) -> Selection``; ``stats`` is what ``measure`` returned, None
            without it.
        every: optimizer steps from one look to the next.
        measure: ``model -> GradientStats``, for instance by :class:`fastgrad.Probe` over some
            batches. Leave the model in the mode (``train`` or ``eval``) in which it came.
        reference: blueprint or statistics that the present selection was made from; None to
            re-select at every look.
        group_of: see :meth:`fastgrad.Partial.reselect`.

    Attributes:
        steps: optimizer steps so far.
        looks: how often ``measure`` or ``choose`` was called.
        done: re-selections so far.
        late: a look was due at a step that a GradScaler skipped: the next step makes up for it.
        verdict: of the last look, with a reference.

    Raises:
        PartialError: if ``every`` is not a positive whole number, or there is a reference and no
            ``measure``.
    """

    def __init__(
        self,
        partial: Partial,
        optimizer: Optimizer | Sequence[Optimizer],
        choose: Choose,
        *,
        every: int,
        measure: Measure | None = None,
        reference: Blueprint | GradientStats | None = None,
        group_of: GroupOf | None = None,
    ) -> None:
        if type(every) is not int or every < 1:
            raise PartialError(f"every is {every!r}. Remedy: a whole number of steps, such as 200")
        if reference is not None and measure is None:
            raise PartialError(
                "staleness is judged by a fresh measurement. Remedy: pass measure=..., or leave "
                "reference out to re-select by steps"
            )
        self.partial, self.optimizer, self.choose = partial, optimizer, choose
        self.every, self.measure, self.group_of = every, measure, group_of
        self.steps = self.looks = self.done = 0
        self.late = False
        self.verdict: Staleness | None = None
        self._reference = _compact(reference)

    def step(self) -> Report | None:
        """Count one optimizer step; look, and re-select, where it is time.

        A step that a GradScaler skipped for infinite gradients leaves these unused, and new blocks
        would lack their part of them: the look is put off to the next step.

        Returns:
            what was re-selected, or None.

        Raises:
            SelectionError: if ``measure`` looked at another model, or ``choose`` chose for one.
            PartialError: see :meth:`fastgrad.Partial.reselect`; the step is not counted then.
        """
        due = self.late or (self.steps + 1) % self.every == 0
        if due and self._skipped():
            self.late, due = True, False
        if not due:
            self.steps += 1
            return None
        stats, chosen, verdict, reference = None, None, None, self._reference
        with self._looking() as model:
            if self.measure is not None:
                stats = self.measure(model)
            if reference is not None and stats is not None:
                verdict = reference.staleness(stats)
                if _is_stale(verdict):
                    reference = _compact(stats)
            if reference is None or reference is not self._reference:
                chosen = self.choose(model, stats)
        report = None
        if chosen is not None:
            report = self.partial.reselect(chosen, self.optimizer, group_of=self.group_of)
            self.done += 1
        self.steps, self.looks, self.late = self.steps + 1, self.looks + 1, False
        self.verdict, self._reference = verdict, reference
        return report

    def _skipped(self) -> bool:
        """Gradients are there that no step was made with, and some are not finite."""
        pending = [p.grad for p in self.partial.parameters() if is_pending(p)]
        return not all(bool(torch.isfinite(g).all()) for g in pending if g is not None)

    @contextmanager
    def _looking(self) -> Iterator[nn.Module]:
        states = random_states(list(self.partial.model.parameters()))
        try:
            with self.partial.suspended() as model:
                yield model
        finally:
            restore(states)

    def state_dict(self) -> dict[str, Any]:
        """Counters and reference, as numbers and text (``torch.load(weights_only=True)`` reads
        them)."""
        reference = None if self._reference is None else self._reference.to_json()
        return {
            "steps": self.steps, "looks": self.looks, "done": self.done, "every": self.every,
            "late": self.late, "reference": reference,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            PartialError: if it is not such a state, or one with another ``every``; nothing has
                changed then.
        """
        try:
            counts = [int(state[key]) for key in ("steps", "looks", "done")]
            every, text = int(state["every"]), state["reference"]
            late = bool(state.get("late", False))  # states of older versions have none
            reference = None if text is None else Blueprint(parse_blueprint(text.encode()))
        except (KeyError, TypeError, ValueError, AttributeError, BlueprintError) as error:
            raise PartialError(f"this is not the state of a Reselection: {error!r}") from error
        if every != self.every or (reference is None) != (self._reference is None):
            raise PartialError(
                f"this state is of a schedule with every={every} "
                f"{'without' if reference is None else 'with'} a reference, not of this one. "
                "Remedy: build the Reselection with the same arguments"
            )
        self.steps, self.looks, self.done = counts
        self.late = late
        self._reference, self.verdict = reference, None


def _compact(source: Blueprint | GradientStats | None) -> Blueprint | None:
    """What staleness compares with: submodules, without block vectors."""
    if isinstance(source, GradientStats):
        source = Blueprint.from_stats(source, n_bootstrap=2)  # intervals are of no use here
    if source is not None and not isinstance(source, Blueprint):
        raise PartialError(
            f"reference is a Blueprint or GradientStats, not {type(source).__name__}"
        )
    return None if source is None else Blueprint(source.file)


def _is_stale(verdict: Staleness) -> bool:
    if verdict.verdict == "different model":
        if verdict.spearman is None:
            raise SelectionError(f"measure looked at another model: {verdict.reason}")
        return True  # ranks that agree no better than chance: the weights are under way
    return verdict.verdict == "drifted"
