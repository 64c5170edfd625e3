"""Several measurements as one: raw sums and counts, so that nothing is lost."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fastgrad.data_sources import joined_data
from fastgrad.errors import StatsError
from fastgrad.stats import PER_EXAMPLE, Coverage, GradientStats

_SEVERITY = ("frozen", "unused", "exact", "missing")


def joined(pieces: Iterable[GradientStats], n_examples: int, n_batches: int) -> GradientStats:
    """The pieces, one after the other.

    They may come one at a time from disk: the result is allocated once, from the totals, and no
    piece is held for longer than its turn.

    Raises:
        StatsError: if the pieces were not made on the same parameters, blocks and weights.
    """
    whole: GradientStats | None = None
    examples = batches = skipped = 0
    running = True
    mixing: set[str] = set()  # seen only when it happens, as what coverage is missing
    dtypes: set[str] = set()
    with_examples: bool | None = None
    for piece in pieces:
        if whole is None:
            whole = empty_like(piece, n_examples, n_batches)
        else:
            check_alike(whole, piece)
            if "data" in whole.meta or "data" in piece.meta:
                whole.meta["data"] = joined_data(whole.meta.get("data"), piece.meta.get("data"))
        with_examples = same_kind(with_examples, piece)
        columns = slice(examples, examples + piece.n_examples)
        for name in PER_EXAMPLE:
            if name not in ("batch", "example_ids"):
                getattr(whole, name)[..., columns] = getattr(piece, name)
        whole.batch[columns] = piece.batch + batches
        whole.example_ids[columns] = piece.example_ids
        for name, values in piece.block_sq.items():
            whole.block_sq[name][:, columns] = values
        whole.batch_sq[:, batches : batches + piece.n_batches] = piece.batch_sq
        for name, sums in piece.block_batch_sq.items():
            whole.block_batch_sq[name] += sums
        for name, sums in piece.block_batch_abs.items():
            whole.block_batch_abs[name] += sums
        for name, sums in piece.block_alignment.items():
            whole.block_alignment[name] += sums
        whole.coverage_list = worst_coverage(whole.coverage_list, piece.coverage_list)
        skipped += int(piece.meta.get("skipped_batches") or 0)
        mixing.update(piece.meta.get("mixes_examples") or ())
        dtypes.update(piece.meta.get("dtypes") or ())
        running = running and piece.running_ids
        examples, batches = columns.stop, batches + piece.n_batches
    assert whole is not None
    if running:
        whole.example_ids[:] = np.arange(n_examples)
    whole.running_ids = running
    if "skipped_batches" in whole.meta:
        whole.meta["skipped_batches"] = skipped
    if mixing:
        whole.meta["mixes_examples"] = sorted(mixing)
    if dtypes:
        whole.meta["dtypes"] = sorted(dtypes)
    blank_missing(whole)
    return whole


def same_kind(with_examples: bool | None, piece: GradientStats) -> bool | None:
    """Whether the pieces up to this one hold examples; None while no backward pass was seen.

    Raises:
        StatsError: if some do and some do not.
    """
    if piece.n_batches == 0:
        return with_examples
    kind = piece.n_examples > 0
    if with_examples not in (None, kind):
        raise StatsError(
            "cannot merge statistics of different kinds: with and without examples"
        )
    return kind


def worst_coverage(one: list[Coverage], other: list[Coverage]) -> list[Coverage]:
    """Of two reports the one that promises less, parameter by parameter."""
    worst = {c.name: c for c in one}
    for c in other:
        seen = worst.get(c.name)
        if seen is None or _SEVERITY.index(c.status) > _SEVERITY.index(seen.status):
            worst[c.name] = c
    return list(worst.values())


def blank_missing(stats: GradientStats) -> None:
    """Put NaN where coverage is missing: a use that no tap covers is seen only when it comes, but
    it makes a parameter's influence unknown in the examples before it too."""
    missing = {c.name for c in stats.coverage_list if c.status == "missing"}
    for p, name in enumerate(stats.names):
        if name in missing:
            stats.sq[p] = np.nan
            stats.alignment_by_direction[:, p] = np.nan
            if name in stats.block_sq:
                stats.block_sq[name][:] = np.nan
            if name in stats.block_alignment:
                stats.block_alignment[name][:] = np.nan


def empty_like(
    like: GradientStats, n_examples: int = 0, n_batches: int = 0
) -> GradientStats:
    """Room for the pieces: what does not depend on examples and passes is taken over."""
    p, f8, i8 = len(like.names), np.float64, np.int64
    return GradientStats(
        names=list(like.names),
        shapes=list(like.shapes),
        spec=like.spec,
        specs=dict(like.specs),
        sq=np.empty((p, n_examples), f8),
        batch=np.empty(n_examples, i8),
        label_tokens=np.empty(n_examples, i8),
        mean_factor=np.empty(n_examples, f8),
        sum_factor=np.empty(n_examples, f8),
        batch_sq=np.empty((p, n_batches), f8),
        weight_sq=like.weight_sq.copy(),
        block_sq={
            n: np.empty((v.shape[0], n_examples), np.float32) for n, v in like.block_sq.items()
        },
        block_batch_sq={n: np.zeros_like(v) for n, v in like.block_batch_sq.items()},
        directions=list(like.directions),
        alignment_by_direction=np.empty((len(like.directions), p, n_examples), f8),
        coverage_list=list(like.coverage_list),
        meta=dict(like.meta),
        example_ids=np.empty(n_examples, i8),
        unloaded=like.unloaded,
        block_batch_abs={n: np.zeros_like(v) for n, v in like.block_batch_abs.items()},
        block_alignment={n: np.zeros_like(v) for n, v in like.block_alignment.items()},
    )


def check_alike(a: GradientStats, b: GradientStats) -> None:
    """Raise StatsError, naming what differs, unless the two can be one measurement."""
    for what, one, other in (
        ("parameters", a.names, b.names),
        ("shapes", [tuple(s) for s in a.shapes], [tuple(s) for s in b.shapes]),
        ("block granularity", _granularity(a), _granularity(b)),
        ("weights (hash)", a.meta.get("weights_hash"), b.meta.get("weights_hash")),
        ("directions", a.directions, b.directions),
        ("processes (see fastgrad.gather)", a.meta.get("rank"), b.meta.get("rank")),
        ("loss reduction", a.meta.get("loss_reduction"), b.meta.get("loss_reduction")),
        ("block detail", sorted(a.block_sq), sorted(b.block_sq)),
        ("block norms of batches", sorted(a.block_batch_sq), sorted(b.block_batch_sq)),
        ("absolute values (l1)", sorted(a.block_batch_abs), sorted(b.block_batch_abs)),
        ("block alignment", sorted(a.block_alignment), sorted(b.block_alignment)),
    ):
        if one != other:
            raise StatsError(
                f"cannot merge statistics of different {what}: {_differ(one, other)}"
            )


def _granularity(stats: GradientStats) -> list[str]:
    return [f"{n}: {stats.specs.get(n, stats.spec)}" for n in stats.names]


def _differ(one: object, other: object) -> str:
    """The first place where two differ: long lists would bury it."""
    if isinstance(one, list) and isinstance(other, list):
        for a, b in zip(one, other, strict=False):
            if a != b:
                return f"{a} and {b}"
        return f"{len(one)} and {len(other)} of them"
    return f"{one} and {other}"
