"""How many examples a Trainer's run evaluates, all its evaluations together, before it begins.

From the arguments alone, so that it is the same on every process and in a resumed run. What else
asks for evaluations (another callback, a call of ``evaluate``) is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from fastgrad.errors import FastgradError


def evaluated_in_all(trainer: Trainer | None, state: Any, train_dataloader: Any) -> int:
    """Examples in all planned evaluations of the whole run.

    Args:
        trainer: that runs; None if it is not known.
        state: its state when training begins.
        train_dataloader: of this process, for the length of an epoch.

    Raises:
        FastgradError: if none is planned, or they cannot be counted.
    """
    if trainer is None:
        raise _uncounted("the Trainer that runs is not known")
    count = sum(1 for _ in _evaluations(trainer.args, state, train_dataloader))
    if count == 0:
        raise FastgradError(
            "evaluation_share is a share of what the run evaluates, and no evaluation is planned "
            f"(eval_strategy={trainer.args.eval_strategy.value!r}, eval_delay="
            f"{trainer.args.eval_delay}). Remedy: eval_strategy='steps' and eval_steps=..., "
            "evaluated_examples=... if the run is evaluated in another way, or examples=... instead"
        )
    sets = trainer.eval_dataset
    of_each = [
        _examples(f" ({name})" if name else "", one, trainer.args)
        for name, one in (sets if isinstance(sets, dict) else {"": sets}).items()
    ]
    return count * sum(of_each)


def _evaluations(args: Any, state: Any, train_dataloader: Any) -> Iterator[float]:
    """When: step or epoch of each, as the Trainer's own flow decides it."""
    if args.eval_on_start:
        yield 0
    total = state.max_steps
    if args.eval_strategy == IntervalStrategy.STEPS:
        every = int(state.eval_steps)
        yield from (s for s in range(every, total + 1, every) if s >= args.eval_delay)
        if total % every and total >= args.eval_delay:
            yield total
    elif args.eval_strategy == IntervalStrategy.EPOCH:
        yield from (e for e in _epoch_ends(args, total, train_dataloader) if e >= args.eval_delay)


def _epoch_ends(args: Any, total: int, train_dataloader: Any) -> Iterator[float]:
    """``state.epoch`` at the end of each; the last one may be cut short by ``total`` steps."""
    try:
        batches = len(train_dataloader)
    except TypeError:
        raise _uncounted("epochs of training data without a length") from None
    each = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    for epoch in range(total // each):
        yield epoch + 1
    if rest := total % each:
        yield total // each + rest * args.gradient_accumulation_steps / batches


def _examples(name: str, dataset: Any, args: Any) -> int:
    try:
        n = len(dataset)
    except TypeError:
        raise _uncounted(f"evaluation data without a length{name}") from None
    at_a_time = args.eval_batch_size * args.world_size
    return n - n % at_a_time if args.dataloader_drop_last else n


def _uncounted(why: str) -> FastgradError:
    return FastgradError(
        f"what the run evaluates cannot be counted: {why}. Remedy: evaluated_examples=..., "
        "evaluations of the run times examples in each, or examples=... instead of "
        "evaluation_share=..."
    )
