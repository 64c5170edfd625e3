"""BlueprintLog: held-out gradients during training, in a loop of your own.

    log = fg.BlueprintLog(model, validation_batches, total_steps=1000)
    for batch in loader:
        model(**batch).loss.backward(); optimizer.step(); optimizer.zero_grad()
        log.step()
    log.save_pretrained("my-model/")
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastgrad.blueprint import Blueprint
from fastgrad.blueprint_about import About
from fastgrad.blueprint_make import DataSetLike
from fastgrad.blueprint_schedule import Schedule
from fastgrad.blueprint_schema import FILE_NAME
from fastgrad.errors import FastgradError
from fastgrad.evaluation_budget import EvaluationBudget
from fastgrad.granularity import Blocks, check_blocks
from fastgrad.held_out import HeldOut
from fastgrad.identity import model_parameters, unwrapped, weights_hash
from fastgrad.measuring import Loss, own_loss, whole_weights
from fastgrad.measuring_together import measure_together, numbers_for, place
from fastgrad.partial import Partial
from fastgrad.probe import Probe, Reduction
from fastgrad.replicas import refuse_wrappers
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    import torch.distributed as dist

_STATE = "fastgrad.blueprint_log/1"

#: Up to this many parameters the norm of each is logged.
MOST_LOGGED = 200


@dataclass(frozen=True)
class Measurement:
    """One look at the held-out gradient during training.

    Attributes:
        label: ``50%`` for a fraction of the run, ``step 300`` for a step of the schedule; the end
            is ``100%``, ``end`` if the run ended early or had no length, ``best`` if other weights
            than the last ones were brought back.
        step: optimizer steps that its weights had behind them.
        fraction: of the run; NaN if its length was not known.
        loss: mean loss of the measured batches.
        grad_norm: parameter name -> norm of the held-out gradient (root mean square over batches).
        n_batches, n_examples: what was measured.
        tokens_seen: tokens of the training up to here, if they were counted.
        weights_hash: of the weights that were measured.
    """

    label: str
    step: int
    fraction: float
    loss: float
    grad_norm: dict[str, float]
    n_batches: int
    n_examples: int
    tokens_seen: int | None
    weights_hash: str
    _stats: GradientStats | None = field(default=None, repr=False, compare=False)

    @property
    def stats(self) -> GradientStats:
        """All that was measured.

        Raises:
            FastgradError: if that was before the run was resumed; a checkpoint keeps the norms.
        """
        if self._stats is None:
            raise FastgradError(
                f"{self.label} was measured before this run was resumed, and a checkpoint keeps "
                "the norms alone. Remedy: grad_norm, or save stats at the time"
            )
        return self._stats

    def logs(self, parameters: bool | None = None) -> dict[str, float]:
        """For a logger: names and plain numbers.

        Args:
            parameters: ``grad_norm/NAME`` for each parameter too; by default if there are at most
                ``MOST_LOGGED`` of them.
        """
        total = math.sqrt(math.fsum(x * x for x in self.grad_norm.values()))
        entry: dict[str, float] = {
            "blueprint_loss": self.loss, "blueprint_grad_norm": total,
            "blueprint_batches": self.n_batches, "blueprint_examples": self.n_examples,
        }  # fmt: skip
        if len(self.grad_norm) <= MOST_LOGGED if parameters is None else parameters:
            entry |= {f"grad_norm/{name}": norm for name, norm in self.grad_norm.items()}
        return entry


class BlueprintLog:
    """Measures the held-out gradient while a loop of your own trains, and makes the blueprint.

    The last measurement is of the weights that training ends with, and is what the blueprint
    describes; all become its checkpoints. Each is made in evaluation mode, at the precision of an
    autocast around the call, and leaves nothing behind: training is bit for bit what it would be
    without. All processes make the log and call it alike; see ``docs/blueprint.md``.

    Args:
        model: also inside DistributedDataParallel or ``torch.compile``, whose inner model is
            measured, and under ``fully_shard``.
        validation_batches: held-out batches, as the model's keyword arguments with labels. Read
            anew at each measurement, in the same order; in several processes all of them on each.
        total_steps: optimizer steps of the run, for the fractions.
        at: fractions of ``total_steps``; 50, 80 and 100 % where no other schedule is given. The
            end is always measured.
        steps: numbers of optimizer steps to measure after.
        every: measure after every so many.
        examples: measure as many validation batches as hold that many examples.
        share: measure this share of the validation batches.
        evaluation_share: measure as much as costs this share of the run's evaluation, all
            measurements together, by the count of examples
            (:mod:`fastgrad.evaluation_budget`); one batch at least, with a warning if that is
            more. Without any of these three, 16 batches at most. The batches are spread evenly
            and the same every time; the blueprint says how many there were.
        evaluated_examples: what ``evaluation_share`` is a share of: examples in all evaluations of
            the whole run together, also where it is resumed.
        blocks: granularity of the blueprint.
        domain_tags: what the data is about, for the blueprint.
        datasets, revision: see :meth:`fastgrad.Blueprint.from_stats`.
        seed: of the run, for the blueprint's ``data.seed``; the command line is written too.
        loss_reduction, per_example, frozen: see :class:`fastgrad.Probe`. Frozen parameters that
            are not measured are named in the blueprint's coverage.
        loss: ``(model, batch) -> loss``, for models that do not return one.
        partial: what is trained, if the model is partial. It is suspended meanwhile, so that the
            gradient of all weights is measured.
        group: the processes that hold the model; all by default.
        **options: further arguments of ``Blueprint.from_stats``, such as ``name_or_path``,
            ``tokens_per_step`` or ``costs``. Its ``seed``, that of the intervals, is an argument
            of :meth:`blueprint`.

    Attributes:
        measurements: what was measured so far. Each keeps its statistics, 8 bytes per parameter
            and example.
        steps: optimizer steps so far.
        tokens_seen: tokens that ``step`` was told of, or None.
        evaluation_share: what all measurements of the run are planned to cost, as a share of its
            evaluation; at most the one asked for, unless a warning said so. None without one.

    Raises:
        FastgradError: for a schedule, sample or provenance that cannot be, or a model that cannot
            be measured (float16, compiled in place, DeepSpeed, FSDP1, tensor parallel), by name.
    """

    def __init__(
        self,
        model: nn.Module,
        validation_batches: Iterable[Any],
        total_steps: int | None = None,
        at: Sequence[float] | None = None,
        *,
        steps: Sequence[int] = (),
        every: int | None = None,
        examples: int | None = None,
        share: float | None = None,
        evaluation_share: float | None = None,
        evaluated_examples: int | None = None,
        blocks: Blocks = "module",
        domain_tags: Sequence[str] = (),
        datasets: Sequence[DataSetLike] = (),
        revision: str | None = None,
        seed: int | None = None,
        loss_reduction: Reduction = "token_mean",
        per_example: bool = True,
        frozen: Sequence[str] | None = None,
        loss: Loss = own_loss,
        partial: Partial | None = None,
        group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        check_blocks(blocks)
        self.about = About(domain_tags, datasets, revision, seed, options)
        self.schedule = Schedule.of(at, steps, every)
        self.schedule.check(total_steps)
        budget = EvaluationBudget.of(
            evaluation_share, evaluated_examples, self.schedule, total_steps
        )
        self.held_out = HeldOut(
            validation_batches, examples, share, None if budget is None else budget.examples
        )
        if not isinstance(model, nn.Module):
            raise FastgradError(
                f"a BlueprintLog needs a model, not {type(model).__name__}. Remedy: load it first"
            )
        refuse_wrappers(model)
        model = unwrapped(model)
        self.model, self.total_steps, self.partial, self.group = model, total_steps, partial, group
        self._options: dict[str, Any] = {
            "blocks": blocks, "loss_reduction": loss_reduction, "per_example": per_example,
            "frozen": frozen, "loss": loss,
        }  # fmt: skip
        self.measurements: list[Measurement] = []
        self.steps = 0
        self.tokens_seen: int | None = None
        with whole_weights(self.model, partial):
            # What cannot be measured is refused now, not in the middle of the run.
            Probe(self.model, blocks, frozen=frozen, hash_weights=False)
            _refuse_float16(self.model)
        planned = len(numbers_for(self.model, self.held_out, place(group)[0]))
        self.evaluation_share: float | None = None
        if budget is not None:
            budget.warn(planned, self.held_out.rows())
            self.evaluation_share = budget.share_of(planned * self.held_out.rows())

    # -- in the loop ---------------------------------------------------------------------

    def step(self, tokens: int | None = None) -> Measurement | None:
        """Count one optimizer step, and measure where it is time.

        Args:
            tokens: tokens that the step trained on (of all processes), for ``tokens_seen`` of the
                blueprint's checkpoints, which is null without them.

        Returns:
            what was measured, or None.

        Raises:
            FastgradError: if the validation batches cannot be measured; the step is counted.
        """
        self.steps += 1
        if tokens is not None:
            self.tokens_seen = (self.tokens_seen or 0) + tokens
        label = self.schedule.label(self.steps, self.total_steps)
        return None if label is None else self._measure(label, self.steps, self.tokens_seen)

    def blueprint(
        self, best_step: int | None = None, *, best_tokens: int | None = None, **options: Any
    ) -> Blueprint:
        """The blueprint of the present weights, which are measured unless they just were. In
        several processes all have to call this.

        Args:
            best_step: the step of which the weights are, if they are not those of the last step
                (the best ones were brought back).
            best_tokens: tokens that had been trained on by then, if they were counted.
            **options: further arguments of :meth:`fastgrad.Blueprint.from_stats`, before those
                that the log was made with.

        Raises:
            FastgradError: see :func:`fastgrad.measuring.measure`.
        """
        step = self.steps if best_step is None else best_step
        last = None
        if known := [m for m in self.measurements if m.step == step]:  # a hash reads all weights
            with whole_weights(self.model, self.partial):
                now = weights_hash(self.model)
            last = next((m for m in known if m.weights_hash == now), None)
        if last is None or last._stats is None:
            whole = self.total_steps is not None and step == self.total_steps
            label = "best" if best_step is not None else "100%" if whole else "end"
            tokens = self.tokens_seen if best_step is None else best_tokens
            last = self._measure(label, step, tokens, last)
        with whole_weights(self.model, self.partial):
            return Blueprint.from_stats(
                last.stats, model=self.model,
                checkpoints=[_checkpoint(m) for m in self.measurements],
                **self.about.for_blueprint() | options,
            )  # fmt: skip

    def save_pretrained(
        self, folder: str | os.PathLike[str], best_step: int | None = None, **options: Any
    ) -> Path:
        """Write :meth:`blueprint` into ``folder``; of several processes the first one writes."""
        made = self.blueprint(best_step, **options)
        if place(self.group)[1] == 0:
            return made.save_pretrained(folder)
        return Path(folder) / FILE_NAME

    def _measure(
        self, label: str, step: int, tokens: int | None, before: Measurement | None = None
    ) -> Measurement:
        """``before`` is the same measurement, of which the norms alone are known."""
        with whole_weights(self.model, self.partial):
            _refuse_float16(self.model)
            losses, stats = measure_together(
                self.model, self.held_out, self.group, **self._options
            )
        stats.meta["data"] = self.about.data()
        total = self.total_steps
        found = Measurement(
            label if before is None else before.label,
            step,
            math.nan if total is None else step / total,
            math.fsum(losses) / len(losses),
            dict(zip(stats.names, stats.grad_norm.tolist(), strict=True)),
            stats.n_batches,
            stats.n_examples,
            tokens if before is None else before.tokens_seen,
            str(stats.meta["weights_hash"]),
            stats,
        )
        if before is None:
            self.measurements.append(found)
        else:
            self.measurements[self.measurements.index(before)] = found
        return found

    # -- resume --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters and the norms of all measurements, as lists, text and numbers: for JSON, and
        ``torch.load(weights_only=True)`` reads them. The same on every process."""
        names = list(self.measurements[0].grad_norm) if self.measurements else []
        return {
            "format": _STATE, "steps": self.steps, "tokens_seen": self.tokens_seen, "names": names,
            "measurements": [
                {
                    "label": m.label, "step": m.step, "loss": m.loss,
                    "fraction": None if math.isnan(m.fraction) else m.fraction,
                    "n_batches": m.n_batches, "n_examples": m.n_examples,
                    "tokens_seen": m.tokens_seen, "weights_hash": m.weights_hash,
                    "grad_norm": [m.grad_norm[name] for name in names],
                }
                for m in self.measurements
            ],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            FastgradError: if it is not such a state, or one of another model; nothing has changed
                then.
        """
        try:
            if state["format"] != _STATE:
                raise ValueError(f"format {state['format']!r}, this version reads {_STATE!r}")
            names, steps = [str(n) for n in state["names"]], int(state["steps"])
            tokens = _whole(state["tokens_seen"])
            read = [_measurement(entry, names) for entry in state["measurements"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FastgradError(f"this is not the state of a BlueprintLog: {error!r}") from error
        if unknown := sorted(set(names) - set(model_parameters(self.model))):
            raise FastgradError(
                f"this state is of another model: {unknown[0]} is no parameter of this one. "
                "Remedy: the state of the run that is resumed"
            )
        self.steps, self.tokens_seen, self.measurements = steps, tokens, read


def _measurement(entry: Mapping[str, Any], names: Sequence[str]) -> Measurement:
    norms = [float(x) for x in entry["grad_norm"]]
    fraction = entry["fraction"]
    return Measurement(
        str(entry["label"]), int(entry["step"]), math.nan if fraction is None else float(fraction),
        float(entry["loss"]), dict(zip(names, norms, strict=True)), int(entry["n_batches"]),
        int(entry["n_examples"]), _whole(entry["tokens_seen"]), str(entry["weights_hash"]),
    )  # fmt: skip


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _checkpoint(m: Measurement) -> dict[str, Any]:
    return {
        "label": m.label, "step": m.step, "tokens_seen": m.tokens_seen, "grad_norm": m.grad_norm,
        "fraction": None if math.isnan(m.fraction) else m.fraction, "loss": m.loss,
        "n_batches": m.n_batches, "n_examples": m.n_examples, "weights_hash": m.weights_hash,
    }  # fmt: skip


def _refuse_float16(model: nn.Module) -> None:
    kind = next(model.parameters()).device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
    if autocast or any(p.dtype is torch.float16 for p in model.parameters()):
        raise FastgradError(
            "gradients in float16 vanish without a GradScaler's factor, so their norms would be "
            "too small. Remedy: bfloat16 or float32, or measure the saved model in float32"
        )
