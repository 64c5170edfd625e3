"""What several processes measured on their parts of each batch, as one measurement.

    stats = fg.gather(probe.stats())         # on every process; the same on every process
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch.distributed as dist

from fastgrad.errors import StatsError
from fastgrad.stats import GradientStats
from fastgrad.stats_merge import check_alike, joined

_REMEDY = "Remedy: run the same loop on every process, with as many batches on each"


def gather(stats: GradientStats, group: dist.ProcessGroup | None = None) -> GradientStats:
    """The measurement of all processes, on each of them; all have to call this.

    See :func:`combine` for what comes out. Every process holds the whole afterwards: where block
    detail of many examples makes that large, save each process' statistics and combine the files.

    Args:
        stats: what ``probe.stats()`` gave this process.
        group: the processes over which gradients are reduced; all by default.

    Raises:
        StatsError: if torch.distributed is not running, or the processes' measurements do not
            belong together.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise StatsError(
            "there is nothing to gather from: torch.distributed is not running. Remedy: start the "
            "program with torchrun and call init_process_group, or do without gather"
        )
    pieces: list[GradientStats | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(pieces, stats, group=group)
    return combine([p for p in pieces if p is not None])


def combine(pieces: Sequence[GradientStats]) -> GradientStats:
    """One measurement of what each of several processes measured while they trained together, with
    gradients reduced by DistributedDataParallel or ``fully_shard``.

    * *Examples* are those of all processes, sorted by the ids that ``probe.next_ids`` gave; without
      ids they are numbered backward pass by backward pass, in each of them process by process.
    * *Contributions* are parts of the reduced gradient: what an example adds on its own process,
      divided by the number of processes (or by fully_shard's divide factor).
    * *Batches* are reductions: their norms are those of the gradient after it, and examples of
      passes without reduction (``no_sync``, gradient accumulation) belong to the batch of the next
      one that had it.
    * ``example_mean`` is the gradient of the example's own mean loss, from its own process' factor:
      with the mean over a process' n label tokens, of which the example has t, and the mean over W
      processes, its contribution is ``t / (n W)`` times that gradient. So it holds too where
      processes have different numbers of label tokens, and the mean over processes of their means
      is not the mean over all tokens.
    * *Coverage* is the worst over processes.

    Args:
        pieces: the statistics of each process, in any order.

    Raises:
        StatsError: naming what differs, if processes did not measure the same parameters, weights
            and backward passes, or one is absent.
    """
    pieces = _in_order(pieces)
    first = pieces[0]
    bare = [replace(p, meta={k: v for k, v in p.meta.items() if k != "rank"}) for p in pieces]
    for rank, piece in enumerate(bare):
        try:
            check_alike(bare[0], piece)
        except StatsError as error:
            raise StatsError(f"processes 0 and {rank}: {error}. {_REMEDY}") from None
        _check_passes(bare[0], piece, rank)
    given = {p.running_ids for p in bare if p.n_examples}
    if len(given) > 1:
        raise StatsError(
            "some processes gave ids to their examples and some did not. Remedy: call "
            "probe.next_ids on all of them, or on none"
        )
    whole = joined(bare, sum(p.n_examples for p in bare), sum(p.n_batches for p in bare))
    whole.batch = np.concatenate([p.batch for p in bare])
    whole.batch_sq, whole.block_batch_sq = first.batch_sq, first.block_batch_sq
    whole.block_batch_abs = first.block_batch_abs
    if "skipped_batches" in first.meta:
        whole.meta["skipped_batches"] = first.meta["skipped_batches"]
    if not whole.running_ids:
        return whole.sorted_by_example()
    ordered = whole.reordered(np.argsort(whole.batch, kind="stable"))
    ordered.example_ids, ordered.running_ids = np.arange(whole.n_examples), True
    return ordered


def _in_order(pieces: Sequence[GradientStats]) -> list[GradientStats]:
    """By rank.

    Raises:
        StatsError: unless there is one from each process.
    """
    pieces = list(pieces)
    if not pieces:
        raise StatsError("there are no statistics to combine")
    for piece in pieces:
        if "rank" not in piece.meta:
            raise StatsError(
                "these statistics are not those of one of several processes: the probed model was "
                "not wrapped in DistributedDataParallel or fully_shard, so its gradients were not "
                "reduced. Remedy: wrap it; measurements that were made apart are merged with "
                "GradientStats.concat"
            )
    ranks = sorted(int(p.meta["rank"]) for p in pieces)
    processes = {int(p.meta["processes"]) for p in pieces}
    if processes != {len(pieces)} or ranks != list(range(len(pieces))):
        raise StatsError(
            f"gradients were reduced over {max(processes)} processes, and here are the statistics "
            f"of processes {ranks}. Remedy: give those of each process once, or gather(stats, "
            "group) with the group over which gradients are reduced"
        )
    return sorted(pieces, key=lambda p: int(p.meta["rank"]))


def _check_passes(one: GradientStats, other: GradientStats, rank: int) -> None:
    if one.n_batches != other.n_batches:
        raise StatsError(
            f"process 0 measured {one.n_batches} batches and process {rank} {other.n_batches}. "
            + _REMEDY
        )
    skipped = [int(s.meta.get("skipped_batches") or 0) for s in (one, other)]
    if skipped[0] != skipped[1]:
        raise StatsError(
            f"process 0 skipped {skipped[0]} batches for NaN or infinity and process {rank} "
            f"{skipped[1]}. {_REMEDY}"
        )
    scale = one.batch_sq.max(initial=0.0)
    if not np.allclose(one.batch_sq, other.batch_sq, rtol=1e-3, atol=1e-6 * scale):
        raise StatsError(
            f"processes 0 and {rank} had different gradients after the reduction. Remedy: enter "
            "the probe before the first backward pass after zero_grad(), on every process"
        )
