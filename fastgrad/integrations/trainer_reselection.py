"""A Trainer callback that re-selects what is trained, every so many steps or when it is stale."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback

from fastgrad.errors import FastgradError, PartialError
from fastgrad.integrations.known import known
from fastgrad.integrations.trainer_optimizer import SparseAdamWFactory
from fastgrad.measuring import measure
from fastgrad.partial import Partial
from fastgrad.probe import Reduction
from fastgrad.reselection import Report
from fastgrad.reselection_schedule import Choose, Reselection
from fastgrad.stats import GradientStats

#: In the Trainer's state, which each checkpoint holds.
_STATE = "fastgrad_reselection"


class ReselectionCallback(TrainerCallback):
    """Measures during training, and trains other blocks where the gradient has moved.

    The optimizer comes from :func:`sparse_adamw`, and its budget, granularity and ranking apply
    again. The model is measured whole, in evaluation mode; apart from the blocks that are trained
    nothing changes, random numbers included. Checkpoints hold the state of the schedule: a resumed
    run re-selects as the uninterrupted one does.

    Each look adds an entry to the Trainer's log history: the loss on the batches, and what was
    kept, added and dropped, or why the selection stands.

    Args:
        plug: what :func:`sparse_adamw` returned.
        batches: what to measure on, as the model's keyword arguments with labels; read anew at
            each look. None where the ranking needs no measurement (``magnitude``).
        every: optimizer steps from one look to the next.
        when_stale: re-select only where the ranks have drifted from the measurement that the
            present selection was made from by more than the noise of the sample, see
            :meth:`fastgrad.Blueprint.staleness`. At first that is the blueprint of ``plug``.
        choose: ``(model, stats) -> Selection``, instead of the budget of ``plug``.
        per_example: measure each example's gradient too; with less than four batches staleness
            needs it.
        loss_reduction: see :class:`fastgrad.Probe`.

    Attributes:
        reports: step -> what was re-selected.
        schedule: the :class:`fastgrad.Reselection`, once training has begun.

    Raises:
        FastgradError: if choosing again makes no sense for ``plug``, or staleness has nothing to
            be judged by.
    """

    def __init__(
        self,
        plug: tuple[SparseAdamWFactory, Mapping[str, Any]],
        batches: Iterable[Mapping[str, Any]] | None,
        *,
        every: int,
        when_stale: bool = False,
        choose: Choose | None = None,
        per_example: bool = False,
        loss_reduction: Reduction = "token_mean",
    ) -> None:
        factory = plug[0] if isinstance(plug, tuple) else plug
        if not isinstance(factory, SparseAdamWFactory):
            raise FastgradError(
                "ReselectionCallback takes what sparse_adamw returned. Remedy: plug = "
                "sparse_adamw(...), for the Trainer and for this; with an optimizer of your own, "
                "fg.Reselection in a callback of your own"
            )
        if type(every) is not int or every < 1:
            raise FastgradError(f"every is {every!r}. Remedy: a whole number of steps, such as 200")
        if iter(batches or ()) is batches:  # a generator could be read only once
            batches = list(batches or ())
        if when_stale and batches is None:
            raise FastgradError("staleness is judged by a fresh measurement. Remedy: batches")
        self.factory, self.batches, self.every = factory, batches, every
        self.when_stale, self.choose = when_stale, choose
        self.per_example, self.loss_reduction = per_example, loss_reduction
        self.reports: dict[int, Report] = {}
        self.schedule: Reselection | None = None
        self._loss: float | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            raise FastgradError(
                "ReselectionCallback measures in one process, and this run has "
                f"{args.world_size}. Remedy: leave the callback out"
            )
        found = known(optimizer)
        if found.partial is None or found.partial is not self.factory.partial:
            raise PartialError(
                "this Trainer's optimizer is not of the plug that ReselectionCallback was given. "
                "Remedy: pass the same sparse_adamw(...) to both"
            )
        choice, reference = self.factory.choice, None
        if self.choose is None:
            choice.check_again()
        if self.when_stale:
            reference = choice.source
            if reference is None:
                raise FastgradError(
                    "staleness is a drift from the measurement that the selection was made from, "
                    "and sparse_adamw was given none. Remedy: sparse_adamw(blueprint, ...), or "
                    "when_stale=False"
                )
        self.reports = {}
        self.schedule = Reselection(
            found.partial, optimizer, self.choose or choice.again, every=self.every,
            measure=None if self.batches is None else self._measure, reference=reference,
            group_of=found.group_of,
        )  # fmt: skip
        if _STATE in state.stateful_callbacks:
            self.schedule.load_state_dict(state.stateful_callbacks[_STATE])
        self.schedule.steps = state.global_step  # also where the first part ran without this

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.schedule is None:
            raise PartialError("training has not begun; ReselectionCallback counts its steps")
        looks = self.schedule.looks
        report = self.schedule.step()
        state.stateful_callbacks[_STATE] = self.schedule.state_dict()
        if self.schedule.looks == looks:
            return
        entry: dict[str, Any] = {"step": state.global_step}
        if self.batches is not None:
            entry["reselection_loss"] = self._loss
        if self.schedule.verdict is not None:
            entry["staleness"] = self.schedule.verdict.verdict
            entry["staleness_reason"] = self.schedule.verdict.reason
        if report is not None:
            self.reports[state.global_step] = report
            entry |= {"blocks_kept": report.kept, "blocks_added": report.added,
                      "blocks_dropped": report.dropped}  # fmt: skip
        state.log_history.append(entry)

    def _measure(self, model: nn.Module) -> GradientStats:
        assert self.schedule is not None
        assert self.batches is not None
        stats, self._loss = measure(
            model, self.batches, blocks=_granularity(self.schedule.partial),
            per_example=self.per_example, loss_reduction=self.loss_reduction,
        )  # fmt: skip
        return stats


def _granularity(partial: Partial) -> dict[str, str]:
    """As the present selection divides each parameter."""
    selection = partial.selection
    return {glob.escape(n): selection.specs.get(n, selection.spec) for n in selection.shapes}
