"""A Trainer callback that measures during training and writes the blueprint at its end."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from fastgrad.errors import FastgradError
from fastgrad.granularity import Blocks, check_blocks
from fastgrad.identity import model_parameters
from fastgrad.integrations.measuring import measure, whole_model
from fastgrad.partial import Partial
from fastgrad.probe import Reduction
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint


@dataclass(frozen=True)
class Measurement:
    """One look at the held-out gradient during training."""

    fraction: float
    step: int
    loss: float
    stats: GradientStats


class BlueprintCallback(TrainerCallback):
    """Measures held-out gradients during training, and writes the blueprint at its end.

    The last measurement is of the weights that training ends with (the best ones, under
    ``load_best_model_at_end``), and is what the blueprint describes; earlier ones become its
    checkpoints. Gradients, random state, train mode and optimizer are left alone: the training
    run is bit for bit what it would be without the callback. A partial model is suspended
    meanwhile, so that the gradient of all its weights is measured.

    Args:
        validation_batches: held-out batches, as the model's keyword arguments with labels. Read
            anew at each measurement.
        at: fractions of ``max_steps``; the end is always measured.
        blocks: granularity of the blueprint.
        domain_tags: what the data is about, for the blueprint.
        output_dir: where ``gradient_blueprint.json`` goes; the Trainer's by default.
        loss_reduction: see :class:`fastgrad.Probe`.
        partial: what is trained, where the run's optimizer does not come from ``sparse_adamw``
            (which makes it known) and the model is partial.

    Attributes:
        measurements: what was measured so far.
        blueprint: the blueprint, once training has ended.
    """

    def __init__(
        self,
        validation_batches: Iterable[Mapping[str, Any]],
        at: Sequence[float] = (0.5, 0.8, 1.0),
        *,
        blocks: Blocks = "module",
        domain_tags: Sequence[str] = (),
        output_dir: str | os.PathLike[str] | None = None,
        loss_reduction: Reduction = "token_mean",
        partial: Partial | None = None,
    ) -> None:
        check_blocks(blocks)
        if not at or not all(0 < f <= 1 for f in at):
            raise FastgradError(f"at must hold fractions in (0, 1], got {tuple(at)}")
        if iter(validation_batches) is validation_batches:  # a generator could be read only once
            validation_batches = list(validation_batches)
        self.batches, self.at, self.blocks = validation_batches, sorted(set(at)), blocks
        self.domain_tags, self.output_dir = list(domain_tags), output_dir
        self.loss_reduction, self.partial = loss_reduction, partial
        self.measurements: list[Measurement] = []
        self.blueprint: Blueprint | None = None
        self._steps: dict[int, float] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            raise FastgradError(
                "BlueprintCallback measures in one process, and this run has "
                f"{args.world_size}. Remedy: measure the saved model afterwards with fg.Probe"
            )
        if model is None:
            raise FastgradError("BlueprintCallback was not given the model to measure")
        with whole_model(model, self.partial, kwargs.get("optimizer")):
            frozen = sum(not p.requires_grad for p in model_parameters(model).values())
        if frozen:
            warnings.warn(
                f"{frozen} parameters are frozen: the blueprint will not describe them",
                stacklevel=2,
            )
        self.measurements, self.blueprint = [], None
        self._steps = {max(1, round(f * state.max_steps)): f for f in self.at if f < 1}

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step in self._steps and state.global_step < state.max_steps:
            self._measure(self._steps[state.global_step], state, model, kwargs.get("optimizer"))

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        from fastgrad.blueprint import Blueprint

        optimizer = kwargs.get("optimizer")
        last = self._measure(1.0, state, model, optimizer)
        with whole_model(model, self.partial, optimizer):
            self.blueprint = Blueprint.from_stats(
                last.stats,
                model=model,
                domain_tags=self.domain_tags,
                checkpoints=[
                    (f"{m.fraction:.0%}", m.step, m.stats) for m in self.measurements
                ],
            )
        self.blueprint.save_pretrained(self.output_dir or args.output_dir)

    def _measure(
        self, fraction: float, state: Any, model: nn.Module, optimizer: Any
    ) -> Measurement:
        with whole_model(model, self.partial, optimizer):
            stats, loss = measure(
                model, self.batches, blocks=self.blocks, loss_reduction=self.loss_reduction
            )
        found = Measurement(fraction, state.global_step, loss, stats)
        self.measurements.append(found)
        norms = zip(stats.names, stats.grad_norm, strict=True)
        state.log_history.append(
            {"step": state.global_step, "blueprint_loss": loss}
            | {f"grad_norm/{name}": float(norm) for name, norm in norms}
        )
        return found
