"""The chain rule through a piece of autograd's graph, without autograd's engine.

A tap has each example's gradient of a derived tensor and wants those of its roots. The engine
would run every hook on its way once more, and with gradients that stand for one example: hooks of
the user and of the probe. So the graph's nodes are called one after the other, for all examples
at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

Edge = tuple[Any, int]  # a node, and which of its inputs (the outputs of the forward function)


def edge(tensor: Tensor) -> Edge:
    """Where the gradient of a tensor enters the graph."""
    found = get_gradient_edge(tensor)
    return found.node, found.output_nr


def through(start: Edge, ends: Sequence[Edge], gradients: Tensor) -> list[Tensor]:
    """Gradients ``[n, *shape]`` at ``start`` as those at ``ends``. What reaches an end goes no
    further, even if another lies behind it. The graph stays as it is."""
    order = _order(start[0], {node for node, _ in ends})

    def one(gradient: Tensor) -> list[Tensor]:
        return _walk(start, ends, order, gradient)

    with torch.no_grad():
        try:
            found = torch.vmap(one)(gradients)
        except RuntimeError:  # a function that cannot do all examples at once
            each = [one(g) for g in gradients]
            found = [torch.stack(column) for column in zip(*each, strict=True)]
    return list(found)


def _order(start: Any, ends: set[Any]) -> dict[Any, None]:
    """The nodes on the ways from ``start`` to ``ends``, each before those that it hands on to."""
    leads: dict[Any, bool] = {}  # looked at, and whether it leads to an end
    stack: list[tuple[Any, bool]] = [(start, False)]
    finished = []
    while stack:
        node, behind = stack.pop()
        if not behind:
            if node in leads:
                continue
            leads[node] = node in ends
            stack.append((node, True))
            if node not in ends:
                stack += [(n, False) for n, _ in node.next_functions if n is not None]
        elif leads[node] or any(leads.get(n, False) for n, _ in node.next_functions):
            leads[node] = True
            finished.append(node)
    return dict.fromkeys(reversed(finished))


def _walk(
    start: Edge, ends: Sequence[Edge], order: dict[Any, None], gradient: Tensor
) -> list[Tensor]:
    """One example's gradients at ``ends``."""
    waiting: dict[Any, dict[int, Tensor]] = {start[0]: {start[1]: gradient}}
    stop = {node for node, _ in ends}
    for node in order:
        if node in stop or node not in waiting:
            continue
        come = waiting.pop(node)
        given = [
            come[i] if i in come else gradient.new_zeros(tuple(m.shape), dtype=m.dtype)
            for i, m in enumerate(node._input_metadata)
        ]
        for (following, i), new in zip(node.next_functions, _called(node, given), strict=True):
            if following in order and new is not None:
                new = _fitting(new, following._input_metadata[i])
                known = waiting.setdefault(following, {})
                known[i] = known[i] + new if i in known else new
    return [_at(e, waiting, gradient) for e in ends]


def _called(node: Any, given: list[Tensor]) -> Sequence[Tensor | None]:
    """What a node makes of gradients, one for each of its ``next_functions``."""
    if not isinstance(node, BackwardCFunction):
        out = node(*given)
        return out if isinstance(out, tuple) else (out,)
    # A function in Python answers for every argument; what is no tensor has no next function.
    out = node.apply(*given)
    answers = iter(
        [
            g
            for g, needed in zip(
                out if isinstance(out, tuple) else (out,), node.needs_input_grad, strict=False
            )
            if needed
        ]
    )
    return [None if n is None else next(answers) for n, _ in node.next_functions]


def _fitting(gradient: Tensor, meta: Any) -> Tensor:
    """As the engine does: summed where the forward function broadcast, and in the right type."""
    shape = tuple(meta.shape)
    if tuple(gradient.shape) != shape:
        gradient = gradient.sum_to_size(shape)
    if gradient.is_complex() and not meta.dtype.is_complex:
        gradient = gradient.real
    return gradient if gradient.dtype == meta.dtype else gradient.to(meta.dtype)


def _at(end: Edge, waiting: dict[Any, dict[int, Tensor]], like: Tensor) -> Tensor:
    node, i = end
    if i in waiting.get(node, ()):
        return waiting[node][i]
    meta = node._input_metadata[i]
    return like.new_zeros(tuple(meta.shape), dtype=meta.dtype)


__all__ = ["Edge", "edge", "through"]
