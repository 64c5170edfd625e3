"""The graph of a training step on fake tensors, and what each gradient in it costs.

A node costs what its needed gradients cost, and a gradient is needed if a trained weight lies
behind it. The graph of a model whose layers repeat is made of a short model's: every layer of the
whole one costs what the layer of its structure costs there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastgrad.dry_run import DryRun
from fastgrad.errors import ResourceError
from fastgrad.folding import Irregular, Repeats
from fastgrad.identity import model_parameters
from fastgrad.mode_queries import DEVICE, answer_of_class
from fastgrad.selection import Selection

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


class Count(TorchDispatchMode):
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
        if func is DEVICE:
            return answer_of_class(func, types, args)
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


@dataclass
class _Part:
    """Nodes of one layer, or of what comes before or behind the layers.

    Attributes:
        order: nodes, each behind all that it leads to.
        below, top: the nodes that made the input and the output; None if there are none.
        forward, backward: operations, the latter with all gradients.
    """

    order: list[Any]
    below: Any
    top: Any
    forward: int
    backward: int = 0


class Graph:
    """The graph of one forward pass and what the gradients in it cost.

    Args:
        run: to be run, with these layers of the model if some repeat.
        selection: what is trained in the run.
        repeats, kept: as ``run`` was given them, to speak of the whole model. The last layer of
            the whole model has to be the last one kept.

    Attributes:
        forward, backward: operations of the two passes, the latter with all gradients.
        names: the trained parameters.

    Raises:
        ResourceError: if the loss depends on nothing trained.
        Irregular: if the layers are not a chain.
    """

    def __init__(
        self,
        run: DryRun,
        selection: Selection | None,
        repeats: Repeats | None = None,
        kept: Sequence[int] = (),
    ) -> None:
        self._run = run
        partial = run.select(selection)
        trained = {id(p): name for name, p in partial.named_parameters()}
        self._packed = {blocks.name for blocks in partial.packed}
        entries: list[tuple[Any, int]] = []  # of each layer: what made its input, operations so far
        layers = [] if repeats is None else run.layers
        with run.active(), Count() as forward:

            def enter(args: Any, kwargs: Any) -> None:
                given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                entries.append((given[0].grad_fn, forward.total))

            hooks = [
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs: enter(args, kwargs), with_kwargs=True
                )
                for layer in layers
            ]
            loss = run.loss()
            for hook in hooks:
                hook.remove()
        if not loss.requires_grad:
            raise ResourceError(
                f"the loss of {type(run.model).__name__} depends on no trained weight"
            )
        if len(entries) != len(layers):
            raise Irregular("a layer is not run once")
        self._walk(loss, trained, entries, forward.total)
        full = model_parameters(run.model).values()
        with run.active(), Count(full) as backward, run.explained("backward pass"):
            loss.backward(retain_graph=True)
        self._of_node, self._without_weights = backward.of_node, backward.without_weights
        self._costs: dict[tuple[Any, tuple[int, ...]], int] = {}
        for part in self._parts:
            part.backward = sum(self._of_node[node] for node in part.order)
        if layers and sum(part.backward for part in self._parts) != backward.total:
            raise Irregular("operations outside of the graph")
        self._stand_for(set(trained.values()), repeats, kept)
        self.forward = sum(self._parts[i].forward for i, _ in self._stages)
        self.backward = sum(self._parts[i].backward for i, _ in self._stages)
        self._passed: dict[Any, tuple[int, int, bool]] = {}
        left_out = sorted(forward.uncounted | backward.uncounted)
        self.notes = (
            "elementwise operations are counted for the optimizer only",
            *(f"{what} are not counted: PyTorch has no formula for them" for what in left_out),
        )

    def _stand_for(
        self, trained: set[str], repeats: Repeats | None, kept: Sequence[int]
    ) -> None:
        """Which part stands for each of the whole model's, from the loss's other end up, and what
        its parameters are called in it."""
        self._stages: list[tuple[int, dict[str, str]]] = [(0, {n: n for n in trained})]
        if repeats is not None:
            self._stages = [(0, {n: n for n in repeats.outside if n in trained})]
            part_of = {repeats.structures[i]: k for k, i in reversed([*enumerate(kept[:-1])])}
            for i, local in enumerate(repeats.local):
                end = i == repeats.count - 1
                k = len(kept) - 1 if end else part_of[repeats.structures[i]]
                names = {n: f"{repeats.path}.{k}.{rest}" for rest, n in local.items()}
                if end:  # what comes behind the last layer
                    names |= self._stages[0][1]
                self._stages.append((k + 1, {n: m for n, m in names.items() if m in trained}))
        #: Of the whole model's parameters, what stands for them.
        self.stand_in = {n: m for _, names in self._stages for n, m in names.items()}
        self.names = set(self.stand_in)

    @cached_property
    def exact(self) -> bool:
        """The costs of single gradients add up to those of the pass."""
        return sum(self.cost(self.names, self.names)) == self.backward

    def _walk(
        self, loss: Tensor, trained: Mapping[int, str], entries: list[Any], total: int
    ) -> None:
        """The parts and their nodes."""
        self._leaf: dict[Any, str | None] = {}
        self._parts: list[_Part] = []
        seen: set[Any] = set()
        below, before = None, 0
        for top, so_far in [*entries, (loss.grad_fn, total)]:
            if top is None:
                raise Irregular("the input of a layer depends on nothing trained")
            order = self._nodes(top, trained, seen)
            inside = {*order, below}
            for node in order:
                for n, _ in node.next_functions:
                    if n is not None and n not in inside and n not in self._leaf:
                        raise Irregular("a layer reaches past the one below it")
            self._parts.append(_Part(order, below, top, so_far - before))
            below, before = top, so_far

    def _nodes(self, top: Any, trained: Mapping[int, str], seen: set[Any]) -> list[Any]:
        """New nodes behind ``top``, in an order in which what a node leads to comes before it."""
        order: list[Any] = []
        stack = [(top, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
                continue
            if node in seen:
                continue
            seen.add(node)
            stack.append((node, True))
            if hasattr(node, "variable"):
                self._leaf[node] = trained.get(id(node.variable))
            stack += [(n, False) for n, _ in node.next_functions if n is not None]
        return order

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
        activations = weights = 0
        below = False
        for i, names in self._stages:
            here = frozenset(m for n, m in names.items() if n in trained)
            whole = frozenset(m for n, m in names.items() if n in dense)
            key = i, here, whole, below
            if key not in self._passed:
                self._passed[key] = self._pass(*key)
            first, second, below = self._passed[key]
            activations, weights = activations + first, weights + second
        return activations, weights

    def _pass(
        self, number: int, trained: frozenset[str], dense: frozenset[str], below: bool
    ) -> tuple[int, int, bool]:
        """:meth:`cost` in one part, and whether its output needs a gradient.

        Args:
            below: whether its input does.
        """
        part = self._parts[number]
        needed: set[Any] = {part.below} if below else set()
        for leaf, name in self._leaf.items():
            if name in trained:
                needed.add(leaf)
        activations = weights = 0
        for node in part.order:
            if node in self._leaf:
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
        return activations, weights, part.top in needed

    def _cost(self, node: Any, edges: tuple[int, ...]) -> int:
        """Operations of one node for the gradients along some of its edges: it is run alone."""
        if not edges:
            return 0
        if (node, edges) not in self._costs:
            wanted = [GradientEdge(*node.next_functions[i]) for i in edges]
            with self._run.active(), Count() as count:
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
