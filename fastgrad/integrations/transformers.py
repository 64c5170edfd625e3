"""Plugs for the transformers Trainer: a callback that writes a blueprint, and an optimizer.

    callback = BlueprintCallback(validation_batches, domain_tags=["python-source"])
    Trainer(model=model, args=args, train_dataset=ds, callbacks=[callback])

    Trainer(model=model, args=args, train_dataset=ds,
            optimizer_cls_and_kwargs=sparse_adamw(blueprint="my-model/", fraction=0.2))
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgrad.choosing import select
from fastgrad.errors import FastgradError, MissingExtraError, PartialError
from fastgrad.granularity import Blocks, check_blocks
from fastgrad.identity import model_parameters
from fastgrad.optim import SparseAdamW
from fastgrad.packed import PartialModule
from fastgrad.partial import Partial, make_partial
from fastgrad.probe import Probe, Reduction
from fastgrad.selection import Selection
from fastgrad.stats import GradientStats

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise MissingExtraError("transformers", "hf") from error

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint


# -- measuring without leaving a trace ---------------------------------------------------


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; gradients, modes and random state are what they were afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            for p, _ in grads:
                p.grad = None
            yield
        finally:
            for p, grad in grads:
                p.grad = grad
            for module, training in modes:
                module.training = training


def measure(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    blocks: Blocks = "module",
    per_example: bool = True,
    loss_reduction: Reduction = "token_mean",
) -> tuple[GradientStats, float]:
    """Gradient statistics and mean loss over batches; nothing about the model changes.

    Block detail is kept for the batch gradients, not for each example.

    Args:
        model: a transformers model, whose forward pass returns an output with ``loss``.
        batches: keyword arguments of the model, labels among them.
        blocks: granularity, see :class:`fastgrad.Probe`.
        per_example: measure the cross-influence too, not the gradient norms alone.
        loss_reduction: see :class:`fastgrad.Probe`.

    Raises:
        FastgradError: if there is no batch, or the model returns no loss.
    """
    device = next(model.parameters()).device
    losses = []
    probe = Probe(
        model, blocks, per_example=per_example, detail=(), loss_reduction=loss_reduction
    )
    with untouched(model), probe, torch.enable_grad():
        for batch in batches:
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            loss = model(**inputs).loss
            if loss is None:
                raise FastgradError("the model returned no loss. Remedy: put 'labels' into the "
                                    "batches to measure on")
            loss.backward()
            losses.append(float(loss.detach()))
            for p in model.parameters():
                p.grad = None
    if not losses:
        raise FastgradError("there was no batch to measure on")
    return probe.stats(), math.fsum(losses) / len(losses)


# -- the callback ------------------------------------------------------------------------


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
    run is bit for bit what it would be without the callback.

    Args:
        validation_batches: held-out batches, as the model's keyword arguments with labels. Read
            anew at each measurement.
        at: fractions of ``max_steps``; the end is always measured.
        blocks: granularity of the blueprint.
        domain_tags: what the data is about, for the blueprint.
        output_dir: where ``gradient_blueprint.json`` goes; the Trainer's by default.
        loss_reduction: see :class:`fastgrad.Probe`.

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
    ) -> None:
        check_blocks(blocks)
        if not at or not all(0 < f <= 1 for f in at):
            raise FastgradError(f"at must hold fractions in (0, 1], got {tuple(at)}")
        if iter(validation_batches) is validation_batches:  # a generator could be read only once
            validation_batches = list(validation_batches)
        self.batches, self.at, self.blocks = validation_batches, sorted(set(at)), blocks
        self.domain_tags, self.output_dir = list(domain_tags), output_dir
        self.loss_reduction = loss_reduction
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
        if any(isinstance(m, PartialModule) for m in model.modules()):
            raise PartialError(
                "BlueprintCallback measures the gradient of whole weights, and this run trains "
                "blocks of them. Remedy: leave the callback out, and measure the saved model "
                "afterwards with fg.Probe"
            )
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
            self._measure(self._steps[state.global_step], state, model)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        from fastgrad.blueprint import Blueprint

        last = self._measure(1.0, state, model)
        self.blueprint = Blueprint.from_stats(
            last.stats,
            model=model,
            domain_tags=self.domain_tags,
            checkpoints=[
                (f"{m.fraction:.0%}", m.step, m.stats) for m in self.measurements
            ],
        )
        self.blueprint.save_pretrained(self.output_dir or args.output_dir)

    def _measure(self, fraction: float, state: Any, model: nn.Module) -> Measurement:
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


# -- the optimizer -----------------------------------------------------------------------


class SparseAdamWFactory:
    """What Trainer calls to build the optimizer; made by :func:`sparse_adamw`.

    Trainer calls what is not an Optimizer class twice: without arguments, then the result with
    the model.

    Attributes:
        partial: the partial model, once training has begun; ``fg.save_delta`` takes it.
    """

    def __init__(
        self, choose: Callable[[nn.Module], Selection], master_dtype: torch.dtype | None,
        allow_other_weights: bool, hyperparameters: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._choose, self._master_dtype = choose, master_dtype
        self._allow_other_weights = allow_other_weights
        self._hyperparameters = dict(hyperparameters)
        self._partial: Partial | None = None

    @property
    def partial(self) -> Partial:
        """The partial model.

        Raises:
            PartialError: before training has begun.
        """
        if self._partial is None:
            raise PartialError("the Trainer has not built its optimizer yet. Remedy: call "
                               "trainer.train() first")
        return self._partial

    def __call__(self) -> Callable[..., SparseAdamW]:
        # Trainer passes the model alone; its TrainingArguments are found on the Trainer itself.
        caller = sys._getframe(1).f_locals.get("self")
        arguments = caller.args if isinstance(caller, Trainer) else None

        def build(model: nn.Module, **overrides: Any) -> SparseAdamW:
            return self.build(model, arguments, **overrides)

        return build

    def build(self, model: nn.Module, arguments: Any = None, **overrides: Any) -> SparseAdamW:
        """Make the model partial and return its optimizer.

        Args:
            model: changed in place.
            arguments: TrainingArguments to take the hyperparameters from that were not given.
            **overrides: hyperparameters.

        Raises:
            FastgradError: if no learning rate is known.
        """
        options: dict[str, Any] = {}
        if arguments is not None:
            options = {
                "lr": arguments.learning_rate,
                "betas": (arguments.adam_beta1, arguments.adam_beta2),
                "eps": arguments.adam_epsilon,
                "weight_decay": arguments.weight_decay,
            }
        options |= self._hyperparameters | overrides
        if "lr" not in options:
            raise FastgradError("no learning rate: sparse_adamw was used outside a Trainer. "
                                "Remedy: pass lr=...")
        dimensions = {name: p.ndim for name, p in model_parameters(model).items()}
        self._partial = make_partial(
            model, self._choose(model), self._master_dtype,
            allow_other_weights=self._allow_other_weights,
        )  # fmt: skip
        trained = list(self._partial.named_parameters())
        # Trainer decays neither biases nor norm weights; the same rule by shape.
        decay = options.pop("weight_decay", 1e-2)
        groups = [
            {"params": [p for n, p in trained if dimensions[n] >= 2], "weight_decay": decay},
            {"params": [p for n, p in trained if dimensions[n] < 2], "weight_decay": 0.0},
        ]
        return SparseAdamW([g for g in groups if g["params"]], **options)


def sparse_adamw(
    blueprint: Blueprint | GradientStats | str | os.PathLike[str] | None = None,
    fraction: float | None = None,
    *,
    selection: Selection | None = None,
    ranking: str | None = None,
    master_dtype: torch.dtype | None = None,
    allow_other_weights: bool = False,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    **select_options: Any,
) -> tuple[SparseAdamWFactory, dict[str, Any]]:
    """SparseAdamW for a Trainer, as its argument ``optimizer_cls_and_kwargs``.

    The selection is made when the Trainer builds its optimizer. Learning rate, betas, epsilon
    and weight decay come from the TrainingArguments unless given here; the Trainer's schedule
    applies as always.

    Args:
        blueprint: a blueprint, the folder that holds one, gradient statistics of your own, or
            None for a ranking that needs none.
        fraction: budget, see :func:`fastgrad.select`.
        selection: a ready selection, instead of blueprint and budget.
        ranking: see :func:`fastgrad.select`.
        master_dtype: see :func:`fastgrad.make_partial`; ``torch.float32`` for bfloat16 weights.
        allow_other_weights: accept weights that differ from the blueprint's, as after resuming
            from a checkpoint.
        lr, betas, eps, weight_decay: instead of those in TrainingArguments.
        **select_options: further arguments of :func:`fastgrad.select`.

    Raises:
        FastgradError: if both or neither of selection and budget are given.
    """
    budget = fraction is not None or bool({"count", "k_star", "memory"} & select_options.keys())
    if (selection is None) != budget or (selection is not None and blueprint is not None):
        raise FastgradError("give sparse_adamw either a selection, or a budget such as "
                            "fraction=0.2 with or without a blueprint")

    def choose(model: nn.Module) -> Selection:
        if selection is not None:
            return selection
        source: Any = blueprint
        if isinstance(blueprint, str | os.PathLike):
            from fastgrad.blueprint import Blueprint

            source = Blueprint.from_pretrained(Path(blueprint))
        options = dict(select_options)
        if ranking is not None:
            options["ranking"] = ranking
        if fraction is not None:
            options["fraction"] = fraction
        return select(source, model=model, **options)

    given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    factory = SparseAdamWFactory(
        choose, master_dtype, allow_other_weights,
        {k: v for k, v in given.items() if v is not None},
    )  # fmt: skip
    return factory, {}


__all__ = [
    "BlueprintCallback",
    "Measurement",
    "SparseAdamWFactory",
    "measure",
    "sparse_adamw",
    "untouched",
]
