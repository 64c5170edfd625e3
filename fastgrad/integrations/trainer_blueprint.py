"""A Trainer callback that measures during training and writes the blueprint at its end."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer, TrainerCallback

from fastgrad.blueprint_about import About
from fastgrad.blueprint_log import BlueprintLog, Measurement
from fastgrad.blueprint_make import DataSetLike
from fastgrad.blueprint_schedule import Schedule
from fastgrad.errors import FastgradError
from fastgrad.evaluation_budget import check
from fastgrad.granularity import Blocks, check_blocks
from fastgrad.held_out import HeldOut
from fastgrad.identity import model_parameters
from fastgrad.integrations.known import known
from fastgrad.integrations.trainer_checkpoints import calling_trainer
from fastgrad.integrations.trainer_evaluations import evaluated_in_all
from fastgrad.measuring import Loss, own_loss, whole_weights
from fastgrad.partial import Partial
from fastgrad.probe import Reduction

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint

__all__ = ["BlueprintCallback", "Measurement"]

#: In the Trainer's state, which each checkpoint holds.
_STATE = "fastgrad_blueprint"

# Engines under which self.model is not what is trained, or its gradients are not autograd's.
_ENGINES = ("DEEPSPEED", "MEGATRON_LM", "TP", "XLA")


class BlueprintCallback(TrainerCallback):
    """Measures held-out gradients during training, and writes the blueprint at its end: a
    :class:`fastgrad.BlueprintLog` that the Trainer drives.

    The last measurement is of the weights that training ends with, wherever that is (the best
    ones, under ``load_best_model_at_end``), and is what the blueprint describes; all become its
    checkpoints. Gradients, random state, train mode and optimizer are left alone: the training run
    is bit for bit what it would be without the callback. A partial model is suspended meanwhile,
    so that the gradient of all its weights is measured. Checkpoints hold what was measured before
    them: a resumed run makes the blueprint of the uninterrupted one. Under ``torchrun`` each
    process measures a part of the batches, and the first one writes.

    Each measurement is logged as the Trainer logs: in ``state.log_history``, and to TensorBoard,
    Weights & Biases and whatever ``report_to`` names. The keys are those of
    :meth:`fastgrad.blueprint_log.Measurement.logs`.

    Args:
        validation_batches: held-out batches, as the model's keyword arguments with labels. Read
            anew at each measurement; all of them on every process.
        at: fractions of the run's optimizer steps (``state.max_steps``); 50, 80 and 100 % where no
            other schedule is given. The end is always measured.
        steps: numbers of optimizer steps to measure after.
        every: measure after every so many optimizer steps.
        examples, share, evaluation_share: how many of the batches are measured, see
            :class:`fastgrad.BlueprintLog`; 16 at most by default.
        evaluated_examples: what ``evaluation_share`` is a share of; by default the examples of all
            evaluations that the Trainer's arguments plan, over all its evaluation data sets.
        blocks: granularity of the blueprint.
        domain_tags: what the data is about, for the blueprint.
        datasets, revision: see :meth:`fastgrad.Blueprint.from_stats`.
        seed: of the run, for the blueprint's ``data.seed``; ``args.seed`` by default.
        output_dir: where ``gradient_blueprint.json`` goes; the Trainer's by default.
        loss_reduction, per_example, frozen: see :class:`fastgrad.Probe`.
        loss: ``(model, batch) -> loss``, for models that do not return one.
        log_parameters: log the norm of each parameter; by default if there are at most 200.
        partial: what is trained, where the run's optimizer does not come from ``sparse_adamw``
            (which makes it known) and the model is partial.
        **options: further arguments of ``Blueprint.from_stats``, as in
            :class:`fastgrad.BlueprintLog`.

    ``tokens_seen`` of the blueprint's checkpoints is what the Trainer counts (of all processes)
    under ``include_num_input_tokens_seen``. Without it, or if it was not set from the first step
    on, there is a warning and ``tokens_seen`` is null: a callback is not shown the batches.

    Attributes:
        log: the :class:`fastgrad.BlueprintLog`, once training has begun.
        blueprint: the blueprint, once training has ended.
    """

    def __init__(
        self,
        validation_batches: Iterable[Mapping[str, Any]],
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
        output_dir: str | os.PathLike[str] | None = None,
        loss_reduction: Reduction = "token_mean",
        per_example: bool = True,
        frozen: Sequence[str] | None = None,
        loss: Loss = own_loss,
        log_parameters: bool | None = None,
        partial: Partial | None = None,
        **options: Any,
    ) -> None:
        check_blocks(blocks)
        About(domain_tags, datasets, revision, seed, options)
        Schedule.of(at, steps, every)
        check(evaluation_share, evaluated_examples)
        # How many examples the share is, is known when training begins.
        some = None if evaluation_share is None else math.inf
        self.batches = HeldOut(validation_batches, examples, share, some).batches
        self.output_dir, self.partial, self.log_parameters = output_dir, partial, log_parameters
        self._options: dict[str, Any] = {
            "at": at, "steps": steps, "every": every, "examples": examples, "share": share,
            "evaluation_share": evaluation_share, "evaluated_examples": evaluated_examples,
            "blocks": blocks, "domain_tags": list(domain_tags), "datasets": list(datasets),
            "revision": revision, "seed": seed, "loss_reduction": loss_reduction,
            "per_example": per_example, "frozen": frozen, "loss": loss, **options,
        }  # fmt: skip
        self._counted = False
        self.log: BlueprintLog | None = None
        self.blueprint: Blueprint | None = None

    @property
    def measurements(self) -> list[Measurement]:
        """What was measured so far."""
        return [] if self.log is None else self.log.measurements

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if model is None:
            raise FastgradError("BlueprintCallback was not given the model to measure")
        _check_engine(args)
        partial = self.partial or known(kwargs.get("optimizer")).partial
        with whole_weights(model, partial):
            frozen = sum(not p.requires_grad for p in model_parameters(model).values())
        if frozen and self._options["frozen"] is None:
            warnings.warn(
                f"{frozen} parameters are frozen: the blueprint will name them, without a gradient."
                " frozen=[...] measures them too",
                stacklevel=2,
            )
        options = dict(self._options)
        if options["evaluation_share"] is not None and options["evaluated_examples"] is None:
            options["evaluated_examples"] = evaluated_in_all(
                calling_trainer(), state, kwargs.get("train_dataloader")
            )
        if options["seed"] is None:
            options["seed"] = getattr(args, "seed", None)
        self._counted = _tokens_are_counted(args, state)
        self.blueprint = None
        self.log = BlueprintLog(model, self.batches, state.max_steps, partial=partial, **options)
        if _STATE in state.stateful_callbacks:
            self.log.load_state_dict(state.stateful_callbacks[_STATE])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log = self._log()
        log.steps = state.global_step - 1  # also where the first part ran without this callback
        log.tokens_seen = (state.num_input_tokens_seen or None) if self._counted else None
        found = log.step()
        if found is not None:
            self._report(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log = self._log()
        log.steps, before = state.global_step, list(log.measurements)
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        step = state.best_global_step if best else None
        tokens = _tokens_at(state, step) if self._counted else None
        self.blueprint = log.blueprint(step, best_tokens=tokens)
        if len(log.measurements) > len(before):
            self._report(state, control)
        if state.is_world_process_zero:
            self.blueprint.save_pretrained(self.output_dir or args.output_dir)

    def _log(self) -> BlueprintLog:
        if self.log is None:
            raise FastgradError("training has not begun; BlueprintCallback counts its steps")
        return self.log

    def _report(self, state: Any, control: Any) -> None:
        """Log the last measurement, and keep all for the checkpoints to come."""
        log = self._log()
        state.stateful_callbacks[_STATE] = log.state_dict()
        entry = log.measurements[-1].logs(self.log_parameters)
        trainer = calling_trainer()
        if trainer is None:
            state.log_history.append({**entry, "step": state.global_step})
            return
        # The base class's: TRL's trainers empty their own metrics whenever something is logged.
        # It also takes the wish to log as fulfilled, which is that of the training loss.
        wanted = control.should_log
        Trainer.log(trainer, entry)
        control.should_log = wanted


def _tokens_are_counted(args: Any, state: Any) -> bool:
    """Whether ``state.num_input_tokens_seen`` is that of the whole run; warns if it is not."""
    if getattr(args, "include_num_input_tokens_seen", "no") == "no":
        why = "the Trainer counts no tokens"
    elif state.global_step and not state.num_input_tokens_seen:
        why = f"the tokens of the first {state.global_step} steps were not counted"
    else:
        return True
    if getattr(state, "is_world_process_zero", True):
        warnings.warn(
            f"{why}, so tokens_seen of the blueprint's checkpoints will be null. Remedy: "
            "include_num_input_tokens_seen='non_padding' (or 'all', with padding) in the "
            "arguments of the Trainer, from the first step on",
            stacklevel=3,
        )
    return False


def _tokens_at(state: Any, step: int | None) -> int | None:
    """What was logged at this step; an evaluation, which finds the best one, logs."""
    found = [e.get("num_input_tokens_seen") for e in state.log_history if e.get("step") == step]
    return next((n for n in found if n), None)


def _check_engine(args: Any) -> None:
    """Raises FastgradError for engines whose gradients cannot be measured from outside."""
    engine = getattr(getattr(args, "distributed_state", None), "distributed_type", "")
    name = getattr(engine, "value", str(engine)).upper()
    if name in _ENGINES or getattr(args, "deepspeed", None):
        raise FastgradError(
            f"BlueprintCallback does not measure under {name or 'DeepSpeed'}, which keeps weights "
            "or gradients elsewhere. Remedy: DistributedDataParallel (torchrun), or measure the "
            "saved model afterwards with fg.Probe"
        )
    if getattr(args, "fp16", False):
        raise FastgradError(
            "gradients in float16 vanish without a GradScaler's factor, so their norms would be "
            "too small. Remedy: bf16=True, or measure the saved model afterwards in float32"
        )
