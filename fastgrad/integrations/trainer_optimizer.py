"""SparseAdamW as a Trainer's optimizer: the selection is made when training begins."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from fastgrad.choosing import select
from fastgrad.errors import FastgradError, PartialError
from fastgrad.identity import model_parameters
from fastgrad.optim import SparseAdamW
from fastgrad.partial import Partial, make_partial
from fastgrad.selection import Selection
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint


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
