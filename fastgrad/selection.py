"""Selection: which blocks of which parameters are to be trained, and how they are chosen."""

from __future__ import annotations

import fnmatch
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastgrad.blocks import BlockGrid, check_spec
from fastgrad.errors import BlockSpecError, SelectionError
from fastgrad.files import write_text
from fastgrad.ranking import CONTROLS, MEASURED, Ranked, block_scores
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastgrad.blueprint import Blueprint

FORMAT = "fastgrad.selection/1"

# A memory budget is met to this fraction of the parameters: below what a plan can promise.
_MEMORY_RESOLUTION = 1e-4


@dataclass(frozen=True, eq=False)
class Selection:
    """A set of blocks of a model's parameters.

    Attributes:
        shapes: shape of *every* parameter of the model, in the model's order.
        spec: block granularity, see :class:`fastgrad.blocks.BlockGrid`.
        blocks: parameter name -> sorted int64 block numbers, in the model's order; parameters
            without a selected block are absent.
        weights_hash: content hash of the weights the selection was made for, if known.
        meta: how it was made (ranking, budget, source); JSON values only.

    Raises:
        SelectionError: if nothing is selected, a name is unknown, or a block number does not fit
            its parameter.
        BlockSpecError: for an unknown granularity.
    """

    shapes: Mapping[str, tuple[int, ...]]
    spec: str
    blocks: Mapping[str, NDArray[np.int64]]
    weights_hash: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_spec(self.spec)
        shapes = {name: tuple(int(n) for n in shape) for name, shape in self.shapes.items()}
        object.__setattr__(self, "shapes", shapes)
        if unknown := [name for name in self.blocks if name not in shapes]:
            raise SelectionError(
                f"the selection names {unknown[0]!r}, which is no parameter of the model it was "
                f"made for; known names look like {', '.join(list(shapes)[:3])}"
            )
        checked = {}
        for name in shapes:
            if name in self.blocks:
                try:
                    ids = self.grid(name).check_ids(self.blocks[name], name)
                except BlockSpecError as error:
                    raise SelectionError(str(error)) from None
                if ids.size:
                    checked[name] = ids
        object.__setattr__(self, "blocks", checked)
        if not checked:
            raise SelectionError(
                "the selection is empty: nothing would be trained. Remedy: a larger budget, or "
                "include patterns that match more"
            )

    def __eq__(self, other: object) -> bool:
        """Same model shapes in the same order, same blocks, same origin."""
        if not isinstance(other, Selection):
            return NotImplemented
        return (
            list(self.shapes.items()) == list(other.shapes.items())
            and self.spec == other.spec
            and self.weights_hash == other.weights_hash
            and dict(self.meta) == dict(other.meta)
            and list(self.blocks) == list(other.blocks)
            and all(np.array_equal(ids, other.blocks[n]) for n, ids in self.blocks.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def grid(self, name: str) -> BlockGrid:
        return BlockGrid.of(self.shapes[name], self.spec)

    def is_whole(self, name: str) -> bool:
        """True if every block of the parameter is selected."""
        return name in self.blocks and len(self.blocks[name]) == self.grid(name).n_blocks

    def n_selected(self, name: str) -> int:
        """Number of selected elements of one parameter."""
        if name not in self.blocks:
            return 0
        return int(self.grid(name).sizes()[self.blocks[name]].sum())

    @property
    def names(self) -> list[str]:
        """Parameters with a selected block, in the model's order."""
        return list(self.blocks)

    @property
    def n_blocks(self) -> int:
        """Number of selected blocks."""
        return sum(len(ids) for ids in self.blocks.values())

    @property
    def n_parameters(self) -> int:
        """Number of selected elements."""
        return sum(self.n_selected(name) for name in self.blocks)

    @property
    def n_total(self) -> int:
        """Number of elements of the whole model."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def fraction(self) -> float:
        """Selected share of all elements."""
        return self.n_parameters / self.n_total

    def summary(self) -> str:
        """Where the budget went, as text: in all, by layer, by kind of module."""
        made = [f"{key} {self.meta[key]}" for key in ("ranking",) if key in self.meta]
        budget = self.meta.get("budget")
        if isinstance(budget, Mapping):
            made.append(f"budget {budget.get('kind')} = {budget.get('value')}")
        whole = sum(self.is_whole(name) for name in self.blocks)
        lines = [
            f"{self.n_parameters:,} of {self.n_total:,} parameters ({self.fraction:.1%}) in "
            f"{self.n_blocks:,} blocks of granularity {self.spec}"
            + (f"; {', '.join(made)}" if made else ""),
            f"{len(self.blocks)} of {len(self.shapes)} parameter tensors touched, {whole} whole",
        ]
        if self.meta.get("note"):
            lines.append(f"note: {self.meta['note']}")
        selected = {name: self.n_selected(name) for name in self.shapes}
        for title, group in (("layer", _layer_of), ("kind of parameter", _kind_of)):
            chosen: dict[str, int] = {}
            total: dict[str, int] = {}
            for name, shape in self.shapes.items():
                key = group(name)
                chosen[key] = chosen.get(key, 0) + selected[name]
                total[key] = total.get(key, 0) + math.prod(shape)
            width = max(len(title), *(len(key) for key in total))
            lines += ["", f"{title:<{width}}  {'selected':>14}  {'of it':>6}  {'of budget':>9}"]
            lines += [
                f"{key:<{width}}  {chosen[key]:>14,}  {chosen[key] / max(total[key], 1):>6.1%}  "
                f"{chosen[key] / self.n_parameters:>9.1%}"
                for key in total
            ]
        return "\n".join(lines)

    def check_model(self, model: nn.Module, *, allow_other_weights: bool = False) -> None:
        """Check that this selection was made for ``model``: names, shapes and, if known, weights.

        Raises:
            SelectionError: naming what differs.
        """
        from fastgrad.identity import model_parameters, weights_hash

        own = {name: tuple(p.shape) for name, p in model_parameters(model).items()}
        for name, shape in self.shapes.items():
            if name not in own:
                raise SelectionError(f"the selection was made for a model with {name!r}, which "
                                     "this model lacks")
            if own[name] != shape:
                raise SelectionError(f"{name} has shape {own[name]}, the selection expects {shape}")
        if extra := [name for name in own if name not in self.shapes]:
            raise SelectionError(f"this model has {extra[0]!r}, which the selection does not know; "
                                 "it was made for another model")
        if self.weights_hash is None or allow_other_weights:
            return
        try:
            found = weights_hash(model)
        except ValueError as error:
            raise SelectionError(f"the weights cannot be compared: {error}. Remedy: "
                                 "allow_other_weights=True") from None
        if found != self.weights_hash:
            raise SelectionError(
                f"this selection was made for weights {self.weights_hash[:23]}..., the model has "
                f"{found[:23]}... Remedy: select anew, or pass allow_other_weights=True"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, atomically."""
        from fastgrad.blueprint_schema import canonical_json

        write_text(path, canonical_json({
            "format": FORMAT,
            "spec": self.spec,
            # A list, because the order of the parameters is part of the content.
            "shapes": [[name, list(shape)] for name, shape in self.shapes.items()],
            "blocks": {
                name: "all" if self.is_whole(name) else _to_runs(ids)
                for name, ids in self.blocks.items()
            },
            "weights_hash": self.weights_hash,
            "meta": dict(self.meta),
        }))  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what :meth:`save` wrote.

        Raises:
            SelectionError: if the file is missing, damaged, or of another format.
        """
        from fastgrad.blueprint_schema import MAX_BYTES, parse_json

        try:
            if not Path(path).is_file():
                raise SelectionError(f"no selection file at {path}")
            with open(path, "rb") as file:
                value = parse_json(file.read(MAX_BYTES + 1))
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            shapes = {}
            for name, shape in value["shapes"]:
                if not isinstance(name, str) or not all(type(n) is int and n >= 0 for n in shape):
                    raise ValueError("a shape is not a name with whole numbers")
                if name in shapes:
                    raise ValueError(f"{name!r} is listed twice")
                shapes[name] = tuple(shape)
            spec = check_spec(value["spec"])
            blocks = {}
            for name, runs in value["blocks"].items():
                if name not in shapes:
                    raise ValueError(f"{name!r} has blocks but no shape")
                blocks[name] = _from_runs(runs, BlockGrid.of(shapes[name], spec).n_blocks, name)
            digest, meta = value["weights_hash"], value["meta"]
            if not isinstance(digest, str | None) or not isinstance(meta, dict):
                raise ValueError("weights_hash or meta has the wrong type")
            return cls(shapes, spec, blocks, digest, meta)
        except SelectionError:
            raise
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            raise SelectionError(f"{path} is damaged or not a selection file: {reason}") from error


def _to_runs(ids: NDArray[np.int64]) -> list[list[int]]:
    """Sorted numbers as half-open runs ``[first, end]``: tiles are often chosen in stretches."""
    cuts = np.flatnonzero(np.diff(ids) > 1) + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in np.split(ids, cuts)]


def _from_runs(runs: Any, n_blocks: int, name: str) -> NDArray[np.int64]:
    if runs == "all":
        runs = [[0, n_blocks]]
    end = 0
    for run in runs:
        if not (isinstance(run, list) and len(run) == 2 and all(type(n) is int for n in run)):
            raise ValueError(f"{name}: a run of blocks is not a pair of whole numbers")
        # Checked before anything is allocated: a damaged number must not cost memory.
        if not end <= run[0] < run[1] <= n_blocks:
            raise ValueError(f"{name}: the run {run} does not fit its {n_blocks} blocks")
        end = run[1]
    return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in runs])


def _layer_of(name: str) -> str:
    match = re.match(r"^(?:.*?\.)?\d+(?=\.)", name)
    return match[0] if match else name.rpartition(".")[0] or name


def _kind_of(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


# -- choosing ----------------------------------------------------------------------------------


def select(
    source: Blueprint | GradientStats | None,
    model: nn.Module | None = None,
    *,
    fraction: float | None = None,
    count: int | None = None,
    k_star: str | None = None,
    memory: str | int | None = None,
    blocks: str | None = None,
    ranking: str = "rms",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 0,
    largest: bool = True,
    optimizer: str = "adamw",
    batch_shape: tuple[int, int] | None = None,
    master_dtype: torch.dtype | None = None,
) -> Selection:
    """Choose the blocks to train: rank them, then fill one budget.

    Blocks are taken from the best score down (equal scores in the model's order). A block that
    does not fit into what is left of the budget is skipped and the next ones are tried, so the
    budget is used well and never exceeded.

    Args:
        source: what was measured; None for the controls that need no measurement.
        model: needed by ``memory``, by ``magnitude``, by ``relative`` below module granularity,
            where ``source`` is None, and where only part of the model was measured. If given,
            parameters that do not require a gradient are left out.
        fraction: budget as a share of *all* elements of the model, 0 < fraction <= 1.
        count: budget as a number of blocks.
        k_star: budget from the blueprint: ``"memory"`` or ``"flops"``.
        memory: budget in bytes or as text such as ``"16GiB"``, for everything that
            :func:`fastgrad.plan_memory` counts.
        blocks: granularity; by default that of the measurement, ``"module"`` without one.
        ranking: by gradient: ``norm``, ``rms`` (norm/√n, the default), ``relative``
            (‖g‖/‖w‖; weights that are exactly zero come first), ``alignment`` (signed, mean over
            examples). Controls: ``random``, ``magnitude`` (‖w‖/√n), ``first``, ``last``
            (position in the model).
        include, exclude: name patterns (``fnmatch``) of the parameters that may be chosen.
        seed: of ``random``.
        largest: False takes the lowest scores first, as a control.
        optimizer, batch_shape, master_dtype: for ``memory``, as :func:`fastgrad.plan_memory`.

    Raises:
        SelectionError: for not exactly one budget, an unknown ranking, a pattern that matches
            nothing, a source that does not fit the model or is too coarse, or an empty result.
        BlockSpecError: for an unknown granularity.
    """
    budget = {"fraction": fraction, "count": count, "k_star": k_star, "memory": memory}
    given = {kind: value for kind, value in budget.items() if value is not None}
    if len(given) != 1:
        raise SelectionError(
            "give exactly one budget: fraction, count, k_star or memory; got "
            + (" and ".join(given) or "none")
        )
    if isinstance(source, str | os.PathLike):
        raise SelectionError(
            f"select needs a blueprint or statistics, not a path. Remedy: "
            f"fg.Blueprint.from_pretrained({os.fspath(source)!r})"
        )
    (kind, value), = given.items()
    if ranking not in MEASURED + CONTROLS:
        raise SelectionError(f"unknown ranking {ranking!r}; use one of "
                             f"{', '.join(MEASURED + CONTROLS)}")
    if ranking in MEASURED and source is None:
        raise SelectionError(f"ranking {ranking!r} needs a measurement. Remedy: a Blueprint or "
                             "GradientStats, or use random, magnitude, first or last")
    spec = check_spec(blocks or (source.spec if source is not None else "module"))
    shapes, candidates = _parameters(source, model, ranking in MEASURED)
    candidates = _filtered(candidates, shapes, include, exclude)
    grids = {name: BlockGrid.of(shapes[name], spec) for name in candidates}
    scores = block_scores(source, model, ranking, grids, seed)
    ranked = Ranked(grids, scores, largest)
    meta: dict[str, Any] = {
        "ranking": ranking,
        "budget": {"kind": kind, "value": value.item() if isinstance(value, np.generic) else value},
        "source": _describe(source),
        "seed": seed if ranking == "random" else None,
        "largest": largest,
        "include": list(include) if include else None,
        "exclude": list(exclude) if exclude else None,
        "unranked": ranked.unranked,
        "note": "activations are not counted in the memory budget: no batch_shape was given"
        if memory is not None and batch_shape is None
        else None,
    }
    digest = _hash_of(source)

    def made(chosen: Mapping[str, NDArray[np.int64]]) -> Selection:
        return Selection(shapes, spec, chosen, digest, meta)

    total = sum(math.prod(shape) for shape in shapes.values())
    if memory is not None:
        if model is None:
            raise SelectionError("a memory budget needs model=...; one on the meta device will do")
        return _fill_memory(ranked, made, parse_memory(memory), total, model, optimizer,
                            batch_shape, master_dtype)  # fmt: skip
    if count is not None:
        if isinstance(count, bool) or not isinstance(count, int | np.integer):
            raise SelectionError(f"count must be a whole number of blocks; got {count!r}")
        if not 1 <= count <= len(ranked):
            raise SelectionError(f"count must lie in 1..{len(ranked)}, the number of blocks that "
                                 f"can be chosen; got {count}")
        return made(ranked.top(int(count)))
    share = _k_star_value(source, k_star) if k_star is not None else fraction
    return made(ranked.fill(_capacity(share, total)))


def parse_memory(text: str | int) -> int:
    """Bytes from a number or from text such as ``16GiB`` (2^30) or ``16GB`` (10^9).

    Raises:
        SelectionError: if it is not a positive amount of memory.
    """
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
             "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", str(text), re.I | re.ASCII)
    size = int(Fraction(match[1]) * units[match[2].lower()]) if match else 0
    if size < 1:
        raise SelectionError(f"{text!r} is not an amount of memory; write for instance '16GiB', "
                             "'500MB' or a number of bytes")
    return size


def _capacity(fraction: Any, total: int) -> int:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float | np.number):
        raise SelectionError(f"fraction must be a number; got {fraction!r}")
    if not 0 < fraction <= 1:
        raise SelectionError(f"fraction must lie in (0, 1]; got {fraction}")
    # As the decimal number that the user wrote: 0.29 of 100 is 29, though 0.29 * 100 < 29.
    return int(Fraction(repr(float(fraction))) * total)


def _k_star_value(source: Blueprint | GradientStats | None, resource: str) -> float:
    if source is None or isinstance(source, GradientStats):
        raise SelectionError("k_star is read from a blueprint. Remedy: pass "
                             "Blueprint.from_stats(stats)")
    if resource not in source.k_star:
        raise SelectionError(f"the blueprint has no k* for {resource!r}; it has "
                             f"{', '.join(source.k_star) or 'none'}")
    return source.k_star[resource].value


def _fill_memory(
    ranked: Ranked,
    made: Any,
    budget: int,
    total: int,
    model: nn.Module,
    optimizer: str,
    batch_shape: tuple[int, int] | None,
    master_dtype: torch.dtype | None,
) -> Selection:
    """The largest filling whose plan stays within ``budget`` bytes, by bisection."""
    import fastgrad

    def attempt(capacity: int) -> tuple[Selection, int]:
        selection: Selection = made(ranked.fill(capacity))
        plan = fastgrad.plan_memory(
            model, selection, optimizer=optimizer, batch_shape=batch_shape,
            master_dtype=master_dtype,
        )  # fmt: skip
        return selection, int(plan.total)

    low, high = int(ranked.sizes.min()), total
    best, needed = attempt(low)
    if needed > budget:
        raise SelectionError(
            f"{budget:,} bytes are not enough: weights and the smallest selection of {low:,} "
            f"elements need {needed:,}. Remedy: a larger memory budget, or finer blocks=..."
        )
    everything, needed = attempt(high)
    if needed <= budget:
        return everything
    # Invariant: what ``low`` gives fits and is in ``best``; what ``high`` gives does not.
    while high - low > max(1, total * _MEMORY_RESOLUTION):
        middle = (low + high) // 2
        selection, needed = attempt(middle)
        if needed <= budget:
            low, best = middle, selection
        else:
            high = middle
    return best


def _parameters(
    source: Blueprint | GradientStats | None, model: nn.Module | None, measured: bool
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of all parameters of the model, and the names of those that may be chosen."""
    known = {} if source is None else dict(zip(source.names, source.shapes, strict=True))
    if model is None:
        if source is None:
            raise SelectionError("without a measurement the shapes must come from model=...")
        total = source.n_model_parameters if not isinstance(source, GradientStats) else (
            source.meta.get("n_model_parameters")
        )  # fmt: skip
        have = sum(math.prod(s) for s in known.values())
        if total is not None and total != have:
            raise SelectionError(
                f"only {have:,} of the model's {total:,} parameters were measured, and the shapes "
                "of the others are not known here. Remedy: pass model=..."
            )
        return known, [n for n in known if n in _measured_names(source)]
    from fastgrad.identity import PACKED_SUFFIX, model_parameters

    if any(n.endswith(PACKED_SUFFIX) for n, _ in model.named_parameters()):
        raise SelectionError("the model is being trained partially, so most of its weights are "
                             "frozen. Remedy: call .remove() on that Partial first")
    own = model_parameters(model)
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    for name, shape in known.items():
        if name not in shapes:
            raise SelectionError(f"{name!r} was measured, but this model lacks it; the measurement "
                                 "is of another model")
        if shapes[name] != tuple(shape):
            raise SelectionError(f"{name} has shape {shapes[name]} here and {tuple(shape)} in the "
                                 "measurement; it is of another model")
    trainable = [n for n, p in own.items() if p.requires_grad and p.is_floating_point()]
    if source is not None and measured:
        wanted = _measured_names(source)
        trainable = [n for n in trainable if n in wanted]
    return shapes, trainable


def _measured_names(source: Blueprint | GradientStats) -> set[str]:
    if isinstance(source, GradientStats):
        return set(source.names)
    return {s.name for s in source.submodules if s.grad_norm is not None}


def _filtered(
    candidates: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> list[str]:
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise SelectionError(f"{argument} is a list of patterns; write [{patterns!r}]")
        for pattern in patterns or ():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in shapes):
                raise SelectionError(
                    f"{argument}: the pattern {pattern!r} matches no parameter; names look like "
                    f"{', '.join(list(shapes)[:3])}"
                )

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in patterns)

    left = [
        name
        for name in candidates
        if (include is None or matches(name, include))
        and not matches(name, exclude or ())
        and math.prod(shapes[name]) > 0
    ]
    if not left:
        raise SelectionError(
            "no parameter can be chosen: none is left that was measured, requires a gradient and "
            "passes include and exclude. Remedy: wider patterns, or requires_grad_(True)"
        )
    return left


def _describe(source: Blueprint | GradientStats | None) -> dict[str, Any] | None:
    if source is None:
        return None
    return {
        "kind": "stats" if isinstance(source, GradientStats) else "blueprint",
        "n_examples": source.n_examples,
        "n_batches": source.n_batches,
        "domain_tags": [] if isinstance(source, GradientStats) else list(source.domain_tags),
    }


def _hash_of(source: Blueprint | GradientStats | None) -> str | None:
    if isinstance(source, GradientStats):
        return source.meta.get("weights_hash")
    return None if source is None else source.weights_hash
