"""How many floating-point operations will a training step take, before anything is run.

The forward pass runs once on fake tensors (:mod:`fastgrad.dry_run`); what the backward pass costs
follows from its graph. A node costs what its needed gradients cost, and a gradient is needed if
a trained weight lies behind it: the pass ends below the lowest trained layer. Selected blocks cost
what the partial model's own layers take for one block, times their number.

Counted is what ``torch.utils.flop_counter.FlopCounterMode`` counts, products and convolutions at
two operations per multiply-add, so that a plan equals what it finds in the real step.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastgrad.dry_run import DryRun
from fastgrad.errors import ResourceError
from fastgrad.flop_graph import Graph
from fastgrad.folding import Irregular, find_repeats
from fastgrad.identity import model_parameters
from fastgrad.plans import Plan, with_unit
from fastgrad.resources import ADAMW_FLOPS_PER_PARAM
from fastgrad.selection import Selection
from fastgrad.turns import check_turns

#: Elementwise operations of one update per trained weight, counted from the update rules.
OPTIMIZER_FLOPS = {
    "adamw": ADAMW_FLOPS_PER_PARAM,
    "torch-adamw": ADAMW_FLOPS_PER_PARAM,
    "sgd-momentum": 4.0,  # decay the momentum and add the gradient, scale and subtract
    "sgd": 2.0,
}


@dataclass(frozen=True)
class FlopPlan(Plan):
    """Floating-point operations of one training step, by what they are for.

    Attributes:
        terms: ``forward``, ``activation_gradients``, ``weight_gradients``, ``optimizer``.
        full_terms: the same for training every weight.
        n_trained, n_total: number of weights.
        notes: what the figures leave out.
    """

    _unit = "flops"

    @staticmethod
    def _human(amount: float) -> str:
        units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
        return with_unit(amount, units)


def plan_flops(
    model: nn.Module,
    selection: Selection | None = None,
    *,
    batch_shape: tuple[int, int],
    optimizer: str = "adamw",
) -> FlopPlan:
    """Operations of a training step with ``selection`` (all weights if None).

    To plan many selections of one model, build a :class:`FlopPlanner` once.

    Args:
        model: on any device, the meta device included.
        selection: what is trained, see :func:`fastgrad.select`.
        batch_shape: ``(rows, tokens)`` of a text model's batch.
        optimizer: ``adamw``, ``torch-adamw``, ``sgd-momentum`` or ``sgd``.

    Raises:
        ResourceError: for an unknown optimizer, or if the model cannot run on fake tensors.
    """
    return FlopPlanner(model, batch_shape, optimizer=optimizer).plan(selection)


class FlopPlanner:
    """Plans many selections of one model: its passes are run once, a plan takes milliseconds.

    Where the graph does not tell the cost of a selection exactly (custom functions with several
    products, activation checkpointing), each selection is run on fake tensors as a whole.

    Args:
        model, batch_shape, optimizer: as for :func:`plan_flops`.

    Attributes:
        not_folded: why all layers are run although they look alike; empty if they are not.

    Raises:
        ResourceError: as :func:`plan_flops`.
    """

    def __init__(
        self, model: nn.Module, batch_shape: tuple[int, int], *, optimizer: str = "adamw"
    ) -> None:
        if optimizer not in OPTIMIZER_FLOPS:
            raise ResourceError(
                f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZER_FLOPS)}"
            )
        self._per_element = OPTIMIZER_FLOPS[optimizer]
        self._sizes = {n: p.numel() for n, p in model_parameters(model).items()}
        self._source = model, batch_shape
        self._repeats, self._kept = find_repeats(model), list[int]()
        if self._repeats is not None:  # one layer of each structure, and the last one
            structures, last = self._repeats.structures, self._repeats.count - 1
            self._kept = sorted({structures.index(s) for s in structures[:-1]} | {last})
        self.not_folded = ""
        try:
            if self._repeats is not None:
                check_turns(model, batch_shape, self._repeats)
            self._whole = Graph(self._dry_run(), None, self._repeats, self._kept)
        except (Irregular, ResourceError) as error:
            if self._repeats is None:
                raise
            self._repeats, self._kept, self.not_folded = None, [], str(error)
            self._whole = Graph(self._dry_run(), None)
        self._by_block: dict[Any, _BlockCosts] = {}
        self._measured: dict[Any, int] = {}

    def _dry_run(self) -> DryRun:
        return DryRun(*self._source, self._repeats, self._kept)

    def plan(self, selection: Selection | None = None) -> FlopPlan:
        """The plan of one selection (all weights if None).

        Raises:
            ResourceError: if the partial model cannot run on fake tensors.
        """
        total = sum(self._sizes.values())
        trained = total if selection is None else selection.n_parameters
        full = self._terms(None, total)
        terms = full if selection is None else self._terms(selection, trained)
        return FlopPlan(dict(terms), dict(full), trained, total, self._whole.notes)

    def _terms(self, selection: Selection | None, trained: int) -> dict[str, int]:
        forward, activations, weights = self._whole.forward, *self._backward(selection)
        return {
            "forward": forward,
            "activation_gradients": activations,
            "weight_gradients": weights,
            "optimizer": int(self._per_element * trained),
        }

    def _backward(self, selection: Selection | None) -> tuple[int, int]:
        graph = self._whole
        if selection is None:
            activations, weights = graph.cost(graph.names, graph.names)
            return activations, graph.backward - activations
        whole = {n for n in selection.blocks if selection.is_whole(n)}
        partly = {n: len(ids) for n, ids in selection.blocks.items() if n not in whole}
        activations, weights = graph.cost(set(selection.blocks), whole)
        if not graph.exact:
            return self._run_whole(selection, activations)
        if partly:
            costs = self._blocks_of(selection)
            for name, count in partly.items():
                cost = costs.of(name, count, selection.n_selected(name))
                if cost is None:
                    return self._run_whole(selection, activations)
                weights += cost
        return activations, weights

    def _blocks_of(self, selection: Selection) -> _BlockCosts:
        """What blocks of this selection's granularities cost, of all parameters that have several,
        so that the next selections find theirs: from passes with one block each and with three."""
        key = (selection.spec, tuple(sorted(selection.specs.items())))
        if key not in self._by_block:
            sizes = {n: selection.grid(n).sizes() for n in self._whole.names}
            one = {n: [0] for n, size in sizes.items() if len(size) > 1}
            more = {n: _others(len(sizes[n])) for n in one}
            first, second = self._products(selection, one), self._products(selection, more)
            found = _BlockCosts()
            if first is not None and second is not None:
                for n, ids in more.items():
                    m = self._whole.stand_in[n]
                    found.learn(n, first[1][m], first[0][m], int(sizes[n][0]), 1)
                    found.check(n, second[1][m], second[0][m], int(sizes[n][ids].sum()), len(ids))
            self._by_block[key] = found
        return self._by_block[key]

    def _products(
        self, selection: Selection, blocks: Any
    ) -> tuple[dict[str, int], dict[str, int]] | None:
        """Operations of the weight gradients of some blocks: in products of selected blocks alone,
        and in others. None where the graph does not tell."""
        some: Any = Selection(selection.shapes, selection.spec, blocks, specs=selection.specs)
        if self._repeats is not None:
            some = self._repeats.shortened(some, self._kept)
        graph = Graph(self._dry_run(), some)
        found = graph.by_parameter()
        if found is not None:
            activations, _ = self._short.cost(set(some.blocks), set())
            if activations + sum(sum(costs.values()) for costs in found) == graph.backward:
                return found
        return None

    @cached_property
    def _short(self) -> Graph:
        """The graph of the model that is run, as it is."""
        return self._whole if self._repeats is None else Graph(self._dry_run(), None)

    def _run_whole(self, selection: Selection, activations: int) -> tuple[int, int]:
        """Run the partial model; what is not an activation's gradient by the plain model's graph
        is a weight's."""
        key = (selection.spec, tuple(sorted(selection.specs.items())),
               tuple((n, ids.tobytes()) for n, ids in selection.blocks.items()))  # fmt: skip
        if key not in self._measured:
            run = DryRun(*self._source)
            run.select(selection)
            with run.active(), FlopCounterMode(display=False) as counter:
                loss = run.loss()
                forward = counter.get_total_flops()
                with run.explained("backward pass"):
                    loss.backward()
            self._measured[key] = counter.get_total_flops() - forward
        backward = self._measured[key]
        activations = min(activations, backward)
        return activations, backward - activations


def _others(count: int) -> list[int]:
    """Blocks to compare the first with, not all: two of one stripe if there are so many, and the
    last one, which is smaller if any is."""
    return [1] if count == 2 else [0, 2] if count == 3 else [0, 1, count - 1]


class _BlockCosts:
    """Operations of the weight gradients of selected blocks, by parameter: so many whatever is
    selected, and so many per element or per block, padding included."""

    def __init__(self) -> None:
        self._dense: dict[str, int] = {}
        self._per_element: dict[str, Fraction] = {}
        self._per_block: dict[str, int] = {}

    def learn(self, name: str, dense: int, sparse: int, elements: int, blocks: int) -> None:
        """Suppose both ways of counting."""
        self._dense[name] = dense
        self._per_element[name] = Fraction(sparse, elements)
        self._per_block[name] = sparse // blocks

    def check(self, name: str, dense: int, sparse: int, elements: int, blocks: int) -> None:
        """Give up what does not agree with another measurement."""
        if dense != self._dense[name] or self._per_element[name] * elements != sparse:
            del self._per_element[name]
        if dense != self._dense[name] or self._per_block[name] * blocks != sparse:
            del self._per_block[name]

    def of(self, name: str, blocks: int, elements: int) -> int | None:
        """Of so many blocks with so many elements; None if that does not follow."""
        if name in self._per_element:
            return self._dense[name] + int(self._per_element[name] * elements)
        if name in self._per_block:
            return self._dense[name] + self._per_block[name] * blocks
        return None
