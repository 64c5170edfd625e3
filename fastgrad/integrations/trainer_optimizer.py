"""SparseAdamW as a Trainer's optimizer: the selection is made when training begins."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import Trainer

from fastgrad.budgets import KINDS
from fastgrad.choosing import select
from fastgrad.errors import FastgradError, PartialError
from fastgrad.identity import unwrapped
from fastgrad.integrations.known import make_known
from fastgrad.integrations.trainer_checkpoints import (
    calling_trainer,
    check_engine,
    keep_in_checkpoints,
    read_partial,
    resumed_folder,
)
from fastgrad.optim import SparseAdamW
from fastgrad.partial import Partial, make_partial
from fastgrad.selection import Selection
from fastgrad.stats import GradientStats
from fastgrad.step_guard import NAME

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint


@dataclass(frozen=True)
class Choice:
    """What to train, as :func:`sparse_adamw` was told: at first, and again later on.

    Attributes:
        source: what was measured, or None.
        selection: a ready selection, instead of source and options.
        options: of :func:`fastgrad.select`.
    """

    source: Blueprint | GradientStats | None
    selection: Selection | None
    options: Mapping[str, Any]

    def first(self, model: nn.Module) -> Selection:
        """When training begins."""
        return self.selection or select(self.source, model=model, **self.options)

    def again(self, model: nn.Module, stats: GradientStats | None) -> Selection:
        """With the same budget, by a measurement of now."""
        source: Any = stats
        if stats is not None and "k_star" in self.options:
            from fastgrad.blueprint import Blueprint

            source = Blueprint.from_stats(stats, model=model)
        return select(source, model=model, **self.options)

    def check_again(self) -> None:
        """Raises FastgradError where choosing again makes no sense."""
        if self.selection is not None:
            raise FastgradError(
                "sparse_adamw was given a ready selection, so the budget of another one is not "
                "known. Remedy: sparse_adamw(blueprint, fraction=...), or choose=... for the "
                "callback"
            )
        ranking = self.options.get("ranking", "rms")
        if ranking in ("random", "first", "last"):
            raise FastgradError(
                f"ranking {ranking!r} would choose the same blocks again, whatever is measured. "
                "Remedy: a measured ranking such as 'rms', or choose=... for the callback"
            )


class SparseAdamWFactory:
    """What Trainer calls to build the optimizer; made by :func:`sparse_adamw`.

    Trainer calls what is not an Optimizer class twice: without arguments, then the result with
    the model. One factory may serve several Trainers, each with a model of its own.

    Attributes:
        partial: the partial model built last, once training has begun; ``fg.save_delta`` takes
            it.
    """

    def __init__(
        self, choice: Callable[[], Choice], master_dtype: torch.dtype | None,
        allow_other_weights: bool, hyperparameters: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._read_choice, self._master_dtype = choice, master_dtype
        self._allow_other_weights = allow_other_weights
        self._hyperparameters = dict(hyperparameters)
        self._partial: Partial | None = None

    @functools.cached_property
    def choice(self) -> Choice:
        """What to train; a blueprint's folder is read when this is first asked for.

        Raises:
            BlueprintError: if there is no blueprint, or a damaged one.
        """
        return self._read_choice()

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
        # Trainer passes the model alone.
        trainer = calling_trainer()

        def build(model: nn.Module, **overrides: Any) -> SparseAdamW:
            return self.build(model, trainer, **overrides)

        return build

    def build(
        self, model: nn.Module, trainer: Trainer | None = None, **overrides: Any
    ) -> SparseAdamW:
        """Make the model partial and return its optimizer.

        Args:
            model: changed in place.
            trainer: whose TrainingArguments give the hyperparameters that were not given, and
                whose checkpoints keep the partial state.
            **overrides: hyperparameters.

        Raises:
            FastgradError: if no learning rate is known.
            PartialError: if the model is partial already, the Trainer resumes from a checkpoint
                without a partial file or with one for other weights, or it uses FSDP or
                DeepSpeed.
        """
        if trainer is not None:
            check_engine(trainer)
        if any(NAME in p.__dict__ for p in model.parameters()):
            raise PartialError(
                "this model is being trained partially already. Remedy: call .remove() on that "
                "Partial first (the weights stay), or build a new model"
            )
        options: dict[str, Any] = {}
        if trainer is not None:
            arguments = trainer.args
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
        # The Trainer's own rule, by the names of the plain model: neither biases nor norms.
        decayed = set(Trainer.get_decay_parameter_names(trainer, unwrapped(model)))
        folder = None if trainer is None else resumed_folder(trainer)
        if folder is None:
            partial = make_partial(
                model, self.choice.first(model), self._master_dtype,
                allow_other_weights=self._allow_other_weights,
            )  # fmt: skip
        else:
            partial = read_partial(model, folder)
        if trainer is not None:
            keep_in_checkpoints(trainer, partial)
        self._partial = partial
        decay = options.pop("weight_decay", 1e-2)
        trained = list(partial.named_parameters())
        groups = [
            {"params": [p for n, p in trained if n in decayed], "weight_decay": decay},
            {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0},
        ]
        optimizer = SparseAdamW(groups, **options)  # an empty group too: it may be filled later
        make_known(optimizer, partial, lambda name, weight: int(name not in decayed))
        return optimizer


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
        allow_other_weights: accept weights that differ from the blueprint's. A resumed run needs
            no such word: its checkpoint says which blocks it trains.
        lr, betas, eps, weight_decay: instead of those in TrainingArguments.
        **select_options: further arguments of :func:`fastgrad.select`.

    Raises:
        FastgradError: if both or neither of selection and budget are given.
    """
    if tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 3):
        raise FastgradError(
            f"sparse_adamw needs transformers 5.3 or newer, this is {transformers.__version__}. "
            "Remedy: pip install -U transformers, or a loop of your own with SparseAdamW"
        )
    budget = fraction is not None or bool(set(KINDS) & select_options.keys())
    if (selection is None) != budget or (selection is not None and blueprint is not None):
        raise FastgradError("give sparse_adamw either a selection, or a budget such as "
                            "fraction=0.2 with or without a blueprint")
    if selection is not None and (ranking is not None or select_options):
        unused = ", ".join(["ranking"] * (ranking is not None) + list(select_options))
        raise FastgradError(f"a ready selection leaves no use for {unused}. Remedy: give either")

    def choice() -> Choice:
        source: Any = blueprint
        if isinstance(blueprint, str | os.PathLike):
            from fastgrad.blueprint import Blueprint

            source = Blueprint.from_pretrained(Path(blueprint))
        options = dict(select_options)
        if ranking is not None:
            options["ranking"] = ranking
        if fraction is not None:
            options["fraction"] = fraction
        if master_dtype is not None:  # a budget of memory counts the masters
            options["master_dtype"] = master_dtype
        return Choice(source, selection, options)

    given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    factory = SparseAdamWFactory(
        choice, master_dtype, allow_other_weights,
        {k: v for k, v in given.items() if v is not None},
    )  # fmt: skip
    return factory, {}
