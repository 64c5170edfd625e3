"""Backward passes of recurrent layers, up to what arrives before their gates.

The hidden states are known once the layer has run, so all gates follow from two products over all
steps at once. Only sums over time remain to be done step by step, with few operations each. The
gradients of the weights are then products over all steps and examples: of what arrives before the
gates, with the inputs and with the hidden states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Weights(NamedTuple):
    """Of one direction of a layer; the biases may be missing."""

    ih: Tensor
    hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None


class Steps(NamedTuple):
    """What a layer saw, in the order in which it went: ``[steps, rows, features]``."""

    x: Tensor
    before: Tensor  # hidden states before each step
    after: Tensor
    cell: Tensor | None  # [rows, features], before the first step


def before_gates(
    kind: str, weights: Weights, steps: Steps, grad: Tensor, grad_cell: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients ``[steps, rows, gates * features]`` of ``W_ih x + b_ih`` and ``W_hh h + b_hh``.

    Args:
        grad: what arrives at the hidden state after each step, from outside of the layer.
        grad_cell: what arrives at the last cell state.
    """
    inputs = F.linear(steps.x, weights.ih, weights.b_ih)
    hidden = F.linear(steps.before, weights.hh, weights.b_hh)
    if kind == "lstm":
        assert steps.cell is not None
        found = _lstm(inputs + hidden, steps.cell, weights.hh, grad, grad_cell)
        return found, found
    if kind == "gru":
        return _gru(inputs, hidden, steps.before, weights.hh, grad)
    slope = 1 - steps.after.square() if kind == "rnn_tanh" else (steps.after > 0).to(grad.dtype)
    found, carried = torch.empty_like(slope), grad[-1]
    for t in reversed(range(len(grad))):
        torch.mul(slope[t], carried, out=found[t])
        if t:
            carried = torch.addmm(grad[t - 1], found[t], weights.hh)
    return found, found


def _lstm(
    gates: Tensor, cell: Tensor, weight: Tensor, grad: Tensor, grad_cell: Tensor | None
) -> Tensor:
    n_steps, rows, size = grad.shape
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new, cells = (i * g).unbind(), [cell]
    for fresh, forget in zip(new, f.unbind(), strict=True):
        cells.append(torch.addcmul(fresh, forget, cells[-1]))
    seen = torch.stack(cells[1:]).tanh()
    by_cell = torch.stack(
        [g * i * (1 - i), torch.stack(cells[:-1]) * f * (1 - f), i * (1 - g.square())], 2
    )
    by_hidden, into_cell = seen * o * (1 - o), o * (1 - seen.square())
    found = grad.new_empty(n_steps, rows, 4, size)
    carried, arrived = grad[-1], grad_cell if grad_cell is not None else torch.zeros_like(cell)
    parts = (by_cell, by_hidden, into_cell, f, found[:, :, :3], found[:, :, 3],
             found.flatten(2), grad.roll(1, 0))  # fmt: skip
    for c, h, d, forget, first, last, flat, before in reversed(
        list(zip(*(p.unbind() for p in parts), strict=True))
    ):
        arrived = torch.addcmul(arrived, carried, d)
        torch.mul(c, arrived.unsqueeze(1), out=first)
        torch.mul(h, carried, out=last)
        arrived = arrived * forget
        carried = torch.addmm(before, flat, weight)
    return found.flatten(2)


def _gru(
    inputs: Tensor, hidden: Tensor, before: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    (xr, xz, xn), (hr, hz, hn) = inputs.chunk(3, -1), hidden.chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = torch.addcmul(xn, r, hn).tanh()
    by_n = (1 - z) * (1 - n.square())
    by_r, by_z = by_n * hn * r * (1 - r), (before - n) * z * (1 - z)
    slope = torch.stack([by_r, by_z, by_n * r], 2)
    found, all_carried = torch.empty_like(slope), torch.empty_like(z)
    carried = grad[-1]
    parts = (slope, z, found, found.flatten(2), all_carried, grad.roll(1, 0))
    for s, keep, own, flat, kept, previous in reversed(
        list(zip(*(p.unbind() for p in parts), strict=True))
    ):
        kept.copy_(carried)
        torch.mul(s, carried.unsqueeze(1), out=own)
        carried = torch.addcmul(torch.addmm(previous, flat, weight), carried, keep)
    at_input = torch.cat([found[:, :, :2].flatten(2), by_n * all_carried], -1)
    return at_input, found.flatten(2)
