"""Selection: which blocks of which parameters are to be trained."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastgrad.blocks import BlockGrid, check_spec, check_specs, grid_of
from fastgrad.errors import BlockSpecError, SelectionError
from fastgrad.files import write_text

if TYPE_CHECKING:
    from torch import nn

FORMAT = "fastgrad.selection/1"
#: With granularities that differ by parameter: an older reader would take the blocks for others.
FORMAT_BY_NAME = "fastgrad.selection/2"


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
        specs: parameter name -> granularity, for those that differ from ``spec``.

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
    specs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_spec(self.spec)
        shapes = {name: tuple(int(n) for n in shape) for name, shape in self.shapes.items()}
        object.__setattr__(self, "shapes", shapes)
        specs = check_specs(self.specs, shapes)
        differing = {n: specs[n] for n in shapes if specs.get(n, self.spec) != self.spec}
        object.__setattr__(self, "specs", differing)
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
            and (self.spec, self.specs) == (other.spec, other.specs)
            and self.weights_hash == other.weights_hash
            and dict(self.meta) == dict(other.meta)
            and list(self.blocks) == list(other.blocks)
            and all(np.array_equal(ids, other.blocks[n]) for n, ids in self.blocks.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """In a line; :meth:`summary` says where the budget went, the attributes hold the rest."""
        blocks = sum(map(len, self.blocks.values()))
        return (
            f"<Selection by {self.spec}: {blocks:,} blocks of {len(self.blocks)} of "
            f"{len(self.shapes)} parameters, {self.n_parameters:,} of {self.n_total:,} elements>"
        )

    def grid(self, name: str) -> BlockGrid:
        """How a parameter divides into blocks."""
        return grid_of(name, self.shapes[name], self.spec, self.specs)

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
        """Where the budget went, as text: in all, by granularity if there are several, by layer
        and by kind of parameter, with floors and caps where there are any.

        ``of it`` is the selected share of the group, ``of budget`` the group's share of all that
        is selected.
        """
        from fastgrad.selection_report import report

        return report(self)

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

        by_name = {"specs": dict(self.specs)} if self.specs else {}
        write_text(path, canonical_json(by_name | {
            "format": FORMAT_BY_NAME if by_name else FORMAT,
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
            if not isinstance(value, dict) or value.get("format") not in (FORMAT, FORMAT_BY_NAME):
                raise ValueError(f"its format is not {FORMAT!r} or {FORMAT_BY_NAME!r}")
            shapes = {}
            for name, shape in value["shapes"]:
                if not isinstance(name, str) or not all(type(n) is int and n >= 0 for n in shape):
                    raise ValueError("a shape is not a name with whole numbers")
                if name in shapes:
                    raise ValueError(f"{name!r} is listed twice")
                shapes[name] = tuple(shape)
            spec = check_spec(value["spec"])
            specs = check_specs(value.get("specs", {}), shapes)
            blocks = {}
            for name, runs in value["blocks"].items():
                if name not in shapes:
                    raise ValueError(f"{name!r} has blocks but no shape")
                n_blocks = grid_of(name, shapes[name], spec, specs).n_blocks
                blocks[name] = _from_runs(runs, n_blocks, name)
            digest, meta = value["weights_hash"], value["meta"]
            if not isinstance(digest, str | None) or not isinstance(meta, dict):
                raise ValueError("weights_hash or meta has the wrong type")
            return cls(shapes, spec, blocks, digest, meta, specs)
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


def layer_of(name: str) -> str:
    """``layers.3`` of ``layers.3.mlp.up_proj.weight``; outside numbered layers the module."""
    match = re.match(r"^(?:.*?\.)?\d+(?=\.)", name)
    return match[0] if match else name.rpartition(".")[0] or name


def kind_of(name: str) -> str:
    """The name with ``*`` for its numbers: what parameters of several layers have in common."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)
