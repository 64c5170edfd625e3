"""How many floating-point operations will a training step take, before anything is run.

The forward pass runs once on fake tensors (:mod:`fastgrad.dry_run`); what the backward pass costs
follows from its graph. A node costs what its needed gradients cost, and a gradient is needed if
a trained weight lies behind it: the pass ends below the lowest trained layer. Selected blocks cost
what the partial model's own layers take for one block, times their number.

Counted is what ``torch.utils.flop_counter.FlopCounterMode`` counts, products and convolutions at
two operations per multiply-add, so that a plan equals what it finds in the real step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fastgrad.dry_run import DryRun
from fastgrad.errors import ResourceError
from fastgrad.identity import model_parameters
from fastgrad.resources import ADAMW_FLOPS_PER_PARAM
from fastgrad.selection import Selection

#: Elementwise operations of one update per trained weight, counted from the update rules.
OPTIMIZER_FLOPS = {
    "adamw": ADAMW_FLOPS_PER_PARAM,
    "torch-adamw": ADAMW_FLOPS_PER_PARAM,
    "sgd-momentum": 4.0,  # decay the momentum and add the gradient, scale and subtract
    "sgd": 2.0,
}
# Nodes that a weight's gradient passes on its way and that only look at it in another way.
_VIEWS = (
    "TBackward", "TransposeBackward", "PermuteBackward", "ViewBackward", "UnsafeViewBackward",
    "ReshapeAliasBackward", "UnsqueezeBackward", "SqueezeBackward", "ExpandBackward",
    "SelectBackward", "SliceBackward", "AliasBackward", "ToCopyBackward", "CloneBackward",
    "OverlayBackward",
)  # fmt: skip
# Products that PyTorch's counter has no formula for.
_UNCOUNTED = {
    "_scaled_dot_product_flash_attention_for_cpu": "attention scores on a CPU",
    "_grouped_mm": "grouped products of experts",
}


@dataclass(frozen=True)
class FlopPlan:
    """Floating-point operations of one training step, by what they are for.

    Attributes:
        terms: ``forward``, ``activation_gradients``, ``weight_gradients``, ``optimizer``.
        full_terms: the same for training every weight.
        n_trained, n_total: number of weights.
        notes: what the figures leave out.
    """

    terms: dict[str, int]
    full_terms: dict[str, int]
    n_trained: int
    n_total: int
    notes: tuple[str, ...] = field(default=())

    @property
    def total(self) -> int:
        """Operations of the step."""
        return sum(self.terms.values())

    @property
    def full_total(self) -> int:
        """Operations of a step that trains every weight."""
        return sum(self.full_terms.values())

    @property
    def saved(self) -> int:
        """Operations saved against training every weight."""
        return self.full_total - self.total

    def table(self) -> str:
        """A plain text table, one line per term."""
        lines = [
            f"trained weights: {self.n_trained:,} of {self.n_total:,} "
            f"({self.n_trained / self.n_total:.1%})",
            f"{'term':<22}{'selection':>14}{'full tuning':>14}{'saved':>14}",
        ]
        rows = [(t.replace("_", " "), n, self.full_terms[t]) for t, n in self.terms.items()]
        for term, count, full in [*rows, ("total", self.total, self.full_total)]:
            lines.append(
                f"{term:<22}{_human(count):>14}{_human(full):>14}{_human(full - count):>14}"
            )
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "terms_flops": self.terms,
            "full_terms_flops": self.full_terms,
            "total_flops": self.total,
            "full_total_flops": self.full_total,
            "n_trained": self.n_trained,
            "n_total": self.n_total,
            "notes": list(self.notes),
        }


def _human(count: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 1000:
            return f"{count:.0f} FLOP" if not unit else f"{count:.2f} {unit}FLOP"
        count /= 1000
    return f"{count:.2f} EFLOP"


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
        self._whole = _Graph(DryRun(model, batch_shape), None)
        self._by_block: dict[Any, _BlockCosts] = {}
        self._measured: dict[Any, int] = {}

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
                    found.learn(n, first[1][n], first[0][n], int(sizes[n][0]), 1)
                    found.check(n, second[1][n], second[0][n], int(sizes[n][ids].sum()), len(ids))
            self._by_block[key] = found
        return self._by_block[key]

    def _products(
        self, selection: Selection, blocks: Any
    ) -> tuple[dict[str, int], dict[str, int]] | None:
        """Operations of the weight gradients of some blocks: in products of selected blocks alone,
        and in others. None where the graph does not tell."""
        some = Selection(selection.shapes, selection.spec, blocks, specs=selection.specs)
        graph = _Graph(DryRun(*self._source), some)
        found = graph.by_parameter()
        if found is not None:
            activations, _ = self._whole.cost(set(blocks), set())
            if activations + sum(sum(costs.values()) for costs in found) == graph.backward:
                return found
        return None

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


class _Count(TorchDispatchMode):
    """Operations, by the node of the backward pass that they belong to.

    Args:
        weights: the model's parameters. A product that takes none of them is part of the gradient
            of a weight, if it is in a node that gives one.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._weights = {p.untyped_storage()._cdata for p in weights}
        self.of_node: Counter[Any] = Counter()
        self.without_weights: Counter[Any] = Counter()
        self.total = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            count = flop_registry[packet](*args, **kwargs, out_val=out)
            node = torch._C._current_autograd_node()
            self.total += count
            self.of_node[node] += count
            if not any(
                isinstance(a, Tensor) and a.untyped_storage()._cdata in self._weights for a in args
            ):
                self.without_weights[node] += count
        elif (name := packet.__name__) in _UNCOUNTED:
            self.uncounted.add(_UNCOUNTED[name])
        return out


class _Graph:
    """The graph of one forward pass and what the gradients in it cost.

    Attributes:
        forward, backward: operations of the two passes, the latter with all gradients.
        names: the trained parameters.
    """

    def __init__(self, run: DryRun, selection: Selection | None) -> None:
        self._run = run
        partial = run.select(selection)
        trained = {id(p): name for name, p in partial.named_parameters()}
        self._packed = {blocks.name for blocks in partial.packed}
        with run.active(), _Count() as forward:
            loss = run.loss()
        if not loss.requires_grad:
            raise ResourceError(
                f"the loss of {type(run.model).__name__} depends on no trained weight"
            )
        self._walk(loss, trained)
        full = model_parameters(run.model).values()
        with run.active(), _Count(full) as backward, run.explained("backward pass"):
            loss.backward(retain_graph=True)
        self.names = set(trained.values())
        self.forward, self.backward = forward.total, backward.total
        self._of_node, self._without_weights = backward.of_node, backward.without_weights
        self._costs: dict[tuple[Any, tuple[int, ...]], int] = {}
        left_out = sorted(forward.uncounted | backward.uncounted)
        self.notes = (
            "elementwise operations are counted for the optimizer only",
            *(f"{what} are not counted: PyTorch has no formula for them" for what in left_out),
        )

    @cached_property
    def exact(self) -> bool:
        """The costs of single gradients add up to those of the pass."""
        return sum(self.cost(self.names, self.names)) == self.backward

    def _walk(self, loss: Tensor, trained: Mapping[int, str]) -> None:
        """Nodes in an order in which what a node leads to comes before it."""
        self._order: list[Any] = []
        self._leaf: dict[Any, str | None] = {}
        seen: set[Any] = set()
        stack = [(loss.grad_fn, False)]
        while stack:
            node, done = stack.pop()
            if done:
                self._order.append(node)
                continue
            if node in seen:
                continue
            seen.add(node)
            stack.append((node, True))
            if hasattr(node, "variable"):
                self._leaf[node] = trained.get(id(node.variable))  # type: ignore[union-attr]
            stack += [(n, False) for n, _ in node.next_functions if n is not None]  # type: ignore[union-attr]

    def _weight_of(self, node: Any) -> str | None:
        """The parameter that a gradient goes to through views alone."""
        while node is not None:
            if node in self._leaf:
                return self._leaf[node]
            edges = [n for n, _ in node.next_functions if n is not None]
            if len(edges) != 1 or not node.name().lstrip("_").startswith(_VIEWS):
                return None
            node = edges[0]
        return None

    def cost(self, trained: set[str], dense: set[str]) -> tuple[int, int]:
        """Operations for the gradients of activations and of the weights in ``dense``, if a
        gradient is needed wherever one of ``trained`` lies behind it."""
        needed: set[Any] = set()
        activations = weights = 0
        for node in self._order:
            if node in self._leaf:
                if self._leaf[node] in trained:
                    needed.add(node)
                continue
            edges = [i for i, (n, _) in enumerate(node.next_functions) if n in needed]
            if not edges:
                continue
            needed.add(node)
            if not self._of_node[node]:
                continue
            owners = {i: self._weight_of(node.next_functions[i][0]) for i in edges}
            others = tuple(i for i in edges if owners[i] is None)
            all_dense = tuple(i for i in edges if owners[i] is None or owners[i] in dense)
            first = self._cost(node, others)
            activations += first
            weights += self._cost(node, all_dense) - first
        return activations, weights

    def _cost(self, node: Any, edges: tuple[int, ...]) -> int:
        """Operations of one node for the gradients along some of its edges: it is run alone."""
        if not edges:
            return 0
        if (node, edges) not in self._costs:
            wanted = [GradientEdge(*node.next_functions[i]) for i in edges]
            with self._run.active(), _Count() as count:
                shapes = node._input_metadata
                given = [
                    torch.empty(tuple(m.shape), dtype=m.dtype, device=m.device) for m in shapes
                ]
                torch.autograd.grad(
                    [GradientEdge(node, i) for i in range(len(shapes))],
                    list(dict.fromkeys(wanted)), given, retain_graph=True, allow_unused=True,
                )  # fmt: skip
            self._costs[node, edges] = count.total
        return self._costs[node, edges]

    def by_parameter(self) -> tuple[dict[str, int], dict[str, int]] | None:
        """Operations for the gradient of each parameter: in functions that form selected blocks
        alone, and in others. None where one function does so for several parameters."""
        sparse, dense = dict.fromkeys(self.names, 0), dict.fromkeys(self.names, 0)
        for node, count in self._of_node.items():
            owners = {
                i: name
                for i, (n, _) in enumerate(node.next_functions)
                if (name := self._weight_of(n)) is not None
            }
            if owners and isinstance(node, torch.autograd.function.BackwardCFunction):
                packed = {
                    owners[i] for i in owners if node.next_functions[i][0] in self._leaf
                } & self._packed
                if len(packed) != 1:
                    return None
                sparse[packed.pop()] += self._without_weights[node]
            elif count:
                for i, name in owners.items():
                    dense[name] += self._cost(node, (i,))
        return sparse, dense
