"""Recurrent layers and cells: watched, and their backward pass followed through time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.derived import Sink, roots_of, spread_over
from fastgrad.handlers_common import (
    constant,
    example_rows,
    expect_dense,
    ownership,
    refuse,
    too_large,
    watch_sinks,
)
from fastgrad.ownership import Mark, mark
from fastgrad.random_state import random_states, restore
from fastgrad.records import Batch
from fastgrad.rows import Rows, wide
from fastgrad.tap_recurrent import GATES, Steps, Weights, before_gates
from fastgrad.tap_watch import Sinks, give, refuse_late, watched

_FORMED = 1 << 22  # elements of all examples' gradients: of cells, these are added up


class _Layers(NamedTuple):
    """How PyTorch's function was called."""

    func: Any
    kind: str
    biases: bool
    layers: int
    dropout: float
    training: bool
    both: bool  # directions
    batch_first: bool

    @property
    def directions(self) -> int:
        return 1 + self.both

    @property
    def each(self) -> int:
        """Tensors of one direction of a layer."""
        return 4 if self.biases else 2

    @property
    def draws(self) -> bool:
        return self.training and self.dropout > 0 and self.layers > 1


def recurrent(batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    """``lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu``."""
    kind = func.__name__
    if kwargs or len(args) != 9:
        return NotImplemented
    if not isinstance(args[2], list | tuple):  # packed: (data, batch_sizes, hx, weights, ...)
        weights = [t for t in args[3] if isinstance(t, Tensor)]
        refuse(watch_sinks(batch, *weights), "its recurrent layer saw a packed sequence")
        return func(*args)
    x, states, weights, *rest = args
    how = _Layers(func, kind, *rest)
    states = [states] if isinstance(states, Tensor) else list(states)
    if roots_of(x, batch) or constant(x, batch) or 0 in x.shape:
        return NotImplemented
    if weights[1].shape[0] != GATES[kind] * weights[1].shape[1]:
        return NotImplemented  # hidden states are projected
    sinks = watch_sinks(batch, *weights)
    dim, n = 0 if how.batch_first else 1, batch.n_examples
    found = ownership(x, batch)
    if n > 1 and (found.dim != dim or x.shape[dim] % n):
        refuse(
            sinks,
            f"its recurrent layer saw an input of shape {tuple(x.shape)}, in which dimension "
            f"{dim} is not known to count the batch's {n} examples",
        )
        return func(*args)
    if (large := too_large(batch, sinks, weights)) is not None:
        refuse(sinks, large)
        return func(*args)
    for k, state in enumerate(states):  # learned, and expanded over the examples
        if roots := roots_of(state, batch):
            partner = state.new_empty(1).expand(1, x.shape[dim], 1)
            spread = spread_over(state, roots, partner, Mark(1), batch)
            if isinstance(spread, str):
                return NotImplemented
            states[k] = spread
    _expect(sinks, weights)
    random = random_states([x]) if how.draws else None
    hx = tuple(states) if kind == "lstm" else states[0]
    if not any(sinks):
        return func(x, hx, weights, *how[2:])

    def measure(
        sinks: Sinks, grads: Sequence[Tensor], saved: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        _measure(how, n, random, sinks, grads, saved)
        return []

    def run() -> Sequence[Tensor]:
        return func(x, hx, weights, *how[2:])

    outs = watched(run, [], sinks, measure, x, *states, *weights, keep=True)
    for out, at in zip(outs, (dim, 1, 1), strict=False):
        mark(out, batch.index, Mark(at))
    return outs


def _expect(sinks: Sequence[Sink | None], weights: Sequence[Tensor | None]) -> None:
    for sink, weight in zip(sinks, weights, strict=True):
        if sink is None or weight is None:
            continue
        if weight.ndim == 2:
            sink.expect_product(weight)
        else:
            sink.expect_dense(weight)


def _measure(
    how: _Layers,
    n: int,
    random: dict[torch.device, Tensor] | None,
    sinks: Sequence[Sink | None],
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> None:
    """From the last layer to the first, what each weight's gradient is made of."""
    n_states = 2 if how.kind == "lstm" else 1
    x, *rest = saved
    states, weights = rest[:n_states], rest[n_states : n_states + len(sinks)]
    out, rounded = rest[n_states + len(sinks)], grads[0].dtype
    if how.batch_first:
        x, out = x.transpose(0, 1), out.transpose(0, 1)
    x, out, *states = (wide(t) for t in (x, out, *states))
    weights = [wide(t) for t in weights]
    grad, *last = (wide(g) for g in grads)
    grad = grad.transpose(0, 1) if how.batch_first else grad
    seen, masks = _replayed(how, x, states, weights, random, out)
    if seen is None:
        refuse_late(sinks, "its recurrent layer's dropout cannot be repeated on this device")
        return
    size = weights[1].shape[1]
    for layer in reversed(range(how.layers)):
        source, result = seen[layer], seen[layer + 1]
        below = torch.zeros_like(source) if layer else None
        for d in range(how.directions):
            k = layer * how.directions + d
            at = slice(k * how.each, (k + 1) * how.each)
            own = Weights(*weights[at])
            after, arrived = (t[..., d * size : (d + 1) * size] for t in (result, grad))
            xs = source
            if d:
                xs, after, arrived = (t.flip(0) for t in (xs, after, arrived))
            before = torch.cat([states[0][k : k + 1], after[:-1]])
            arrived = torch.cat([arrived[:-1], (arrived[-1] + last[0][k]).unsqueeze(0)])
            cell = states[1][k] if how.kind == "lstm" else None
            steps = Steps(xs, before, after, cell)
            last_cell = last[1][k] if how.kind == "lstm" else None
            at_input, at_hidden = before_gates(how.kind, own, steps, arrived, last_cell)
            _arrive(sinks[at], own, at_input, at_hidden, steps, n, rounded)
            if below is not None:
                more = at_input @ own.ih
                below = below + (more.flip(0) if d else more)
        if below is not None:
            grad = below * masks[layer - 1] if masks else below


def _replayed(
    how: _Layers,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    random: dict[torch.device, Tensor] | None,
    out: Tensor,
) -> tuple[list[Tensor] | None, list[Tensor]]:
    """The inputs of all layers and the last one's output, and how dropout scaled the inputs of all
    layers but the first. None in place of the inputs if dropout did not fall as it had before."""
    seen, masks = [x], []
    if how.layers == 1:
        return [x, out], []
    before = random_states([x]) if random is not None else None
    if random is not None:
        restore(random)
    try:
        for layer in range(how.layers - (random is None)):
            at = slice(layer * how.directions, (layer + 1) * how.directions)
            own = slice(at.start * how.each, at.stop * how.each)
            hx = [s[at].contiguous() for s in states]
            given = tuple(hx) if how.kind == "lstm" else hx[0]
            found = how.func(seen[-1], given, list(weights[own]), how.biases, 1, 0.0, how.training,
                             how.both, False)[0]  # fmt: skip
            if random is not None and layer + 1 < how.layers:
                masks.append(F.dropout(torch.ones_like(found), how.dropout))
                found = found * masks[-1]
            seen.append(found)
    finally:
        if before is not None:
            restore(before)
    if random is None:
        return [*seen, out], []
    distance, scale = (seen[-1] - out).abs().max(), out.abs().max()
    return (seen, masks) if bool(distance <= 2e-2 * scale) else (None, masks)


def _arrive(
    sinks: Sequence[Sink | None],
    weights: Weights,
    at_input: Tensor,
    at_hidden: Tensor,
    steps: Steps,
    n: int,
    rounded: torch.dtype,
) -> None:
    """Products over steps, example by example."""
    ih, hh, b_ih, b_hh = (*sinks, None, None)[:4]
    n_steps, n_rows = steps.x.shape[:2]
    rows = Rows.uniform(n, n_steps * n_rows // n)

    def by_example(t: Tensor) -> Tensor:
        return t.transpose(0, 1).reshape(n_rows * n_steps, -1)

    left = by_example(at_input)
    same = at_hidden is at_input
    other = left if same else by_example(at_hidden)
    for sink, grad, right in ((ih, left, steps.x), (hh, other, steps.before)):
        product(sink, grad, by_example(right), rows, rounded)
    for sink, grad in ((b_ih, left), (b_hh, other)):
        if sink is not None:
            give(sink, rows.sums(grad), rounded)


def product(
    sink: Sink | None, left: Tensor, right: Tensor, rows: Rows, rounded: torch.dtype
) -> None:
    """A use in wide numbers, though autograd's gradient went through ``rounded``."""
    if sink is None:
        return
    sink.product(left, right, rows, left.dtype)
    if rounded in (torch.bfloat16, torch.float16):
        for root in sink.roots:
            root.record.rounded = True


# -- cells -------------------------------------------------------------------------------


def cell(
    batch: Batch,
    func: Any,
    x: Tensor,
    states: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """One step. A loop calls it many times: the gradients of each example are added up, where
    they are small enough, rather than each step held against each other step."""
    kind, given = func.__name__.removesuffix("_cell"), (w_ih, w_hh, b_ih, b_hh)
    hx = [states] if isinstance(states, Tensor) else list(states)
    sinks = watch_sinks(batch, *given)
    if x.ndim != 2 or any(roots_of(t, batch) for t in (x, *hx)) or not any(sinks):
        return NotImplemented
    own = next((t for t in (x, *hx) if not constant(t, batch)), None)
    rows = None if own is None else example_rows(own, batch)
    if rows is None:
        return NotImplemented
    if (large := too_large(batch, sinks, given)) is not None:
        return refuse(sinks, large)
    n = batch.n_examples
    matrices = [(s, w) for s, w in zip(sinks, given, strict=True)
                if s is not None and w is not None and w.ndim == 2]  # fmt: skip
    small = all(n * w.numel() <= min(s.limit, _FORMED) for s, w in matrices)
    if small:
        sinks = [s if s is None or w is None else Sink.at(w, s.roots)
                 for s, w in zip(sinks, given, strict=True)]  # fmt: skip
        expect_dense(sinks, given)
    else:
        _expect(sinks, given)

    def measure(
        sinks: Sinks, grads: Sequence[Tensor], saved: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        x, *before = (wide(t) for t in saved[: 1 + len(hx)])
        weights = Weights(*(wide(t) for t in saved[1 + len(hx) :]))
        after = x
        if kind.startswith("rnn"):
            after = F.linear(x, weights.ih, weights.b_ih) + F.linear(
                before[0], weights.hh, weights.b_hh
            )
            after = after.tanh() if kind == "rnn_tanh" else after.relu()
        steps = Steps(x[None], before[0][None], after[None], before[1] if before[1:] else None)
        arrived = [wide(g) for g in grads]
        found = before_gates(kind, weights, steps, arrived[0][None], (*arrived, None)[1])
        for k, (grad, right) in enumerate(zip(found, (x, before[0]), strict=True)):
            left, right, dtype = rows.ordered(grad[0]), rows.ordered(right), grads[0].dtype
            if small:
                give(sinks[k], _each(left, right, rows), dtype)
            else:
                product(sinks[k], left, right, rows, dtype)
            if sinks[k + 2] is not None:
                give(sinks[k + 2], rows.sums(grad[0]), dtype)
        return []

    def run() -> Sequence[Tensor]:
        made = func(x, states, *given)
        return (made,) if isinstance(made, Tensor) else made

    saved = [t for t in (x, *hx, *given) if t is not None]
    outs = watched(run, [], sinks, measure, *saved)
    return outs if kind == "lstm" else outs[0]


def _each(left: Tensor, right: Tensor, rows: Rows) -> Tensor:
    if rows.per_example is not None:
        shape = (rows.n_examples, rows.per_example)
        return torch.bmm(left.unflatten(0, shape).transpose(1, 2), right.unflatten(0, shape))
    return torch.stack([left[p].T @ right[p] for p in rows.parts()])
