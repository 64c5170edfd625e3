"""One measurement of validation batches by all the processes that train a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from fastgrad.distributed import gather
from fastgrad.errors import FastgradError, StatsError
from fastgrad.held_out import HeldOut
from fastgrad.identity import sharded_modules
from fastgrad.measuring import losses_and_stats
from fastgrad.stats import GradientStats


def place(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Number of processes, and of this one among them; ``(1, 0)`` without torch.distributed.

    Raises:
        FastgradError: if this process is not in ``group``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    processes, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise FastgradError("this process is not in the group of those that measure. Remedy: "
                            "group=... with the processes that hold the model")
    return processes, rank


def is_sharded(model: nn.Module) -> bool:
    return next(sharded_modules(model), None) is not None


def numbers_for(model: nn.Module, held_out: HeldOut, processes: int) -> list[int]:
    """Numbers of the batches that all processes measure together."""
    return held_out.chosen(processes if is_sharded(model) else 1)


def measure_together(
    model: nn.Module, held_out: HeldOut, group: dist.ProcessGroup | None = None, **options: Any
) -> tuple[list[float], GradientStats]:
    """Losses and statistics, the same on every process; all have to call this.

    Where every process holds the whole model (DistributedDataParallel), each measures a part of
    the batches, without any reduction, and the parts are put one after the other: what one process
    would have measured. Under ``fully_shard`` the processes measure as many batches at a time as
    there are processes, and a batch of the result is the mean over those, as in training
    (:func:`fastgrad.gather`).

    Args:
        model: without the wrapper of DistributedDataParallel.
        held_out: the same batches on every process.
        group: the processes that hold the model; all by default.
        **options: see :func:`fastgrad.measuring.measure`.

    Raises:
        FastgradError: on every process, if one of them raised an error or holds another model.
    """
    processes, rank = place(group)
    numbers = numbers_for(model, held_out, processes)
    if processes == 1:
        return losses_and_stats(model, held_out.read(numbers), **options)
    if is_sharded(model):
        losses, stats = losses_and_stats(model, held_out.read(numbers[rank::processes]), **options)
        parts: list[Any] = [None] * processes
        dist.all_gather_object(parts, losses, group=group)
        in_turn = [loss for turn in zip(*parts, strict=True) for loss in turn]
        return in_turn, gather(stats, group)
    mine = numbers[rank * len(numbers) // processes : (rank + 1) * len(numbers) // processes]
    found: Any = None  # fewer batches than processes: some have none
    if mine:
        try:
            found = losses_and_stats(model, held_out.read(mine), **options)
        except Exception as error:  # the others wait for this process
            found = error
    everyone: list[Any] = [None] * processes
    dist.all_gather_object(
        everyone, repr(found) if isinstance(found, Exception) else found, group=group
    )
    if isinstance(found, Exception):
        raise found
    for number, one in enumerate(everyone):
        if isinstance(one, str):
            raise FastgradError(f"process {number} could not measure its validation batches: {one}")
    return _one_after_the_other([one for one in everyone if one is not None])


def _one_after_the_other(
    parts: Sequence[tuple[list[float], GradientStats]],
) -> tuple[list[float], GradientStats]:
    losses = [loss for own, _ in parts for loss in own]
    try:
        return losses, GradientStats.concat([stats for _, stats in parts])
    except StatsError as error:
        raise FastgradError(
            f"the processes do not hold the same model: {error}. Remedy: BlueprintLog measures "
            "models that every process holds whole (DistributedDataParallel) or that fully_shard "
            "divides, not pipelines or copies that train apart; pass group=... if other processes "
            "take no part in training"
        ) from error
