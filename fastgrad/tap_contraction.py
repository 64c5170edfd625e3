"""Sums of products of an activation and a matrix, written with a letter for each dimension.

``"btd,hde->bthe"`` says what matrix products, ``einsum`` and ``tensordot`` have in common. The
letters tell how the gradient of the parameter's tensor comes about: those that it shares with the
output alone come from the output's gradient, those that it shares with the activation alone from
the activation, and all that it lacks are rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrad.derived import Sink, into_record
from fastgrad.regions import Region
from fastgrad.rows import Rows, wide
from fastgrad.tap_watch import give


class Letters(NamedTuple):
    """Of the activation, the parameter's tensor and the output."""

    x: str
    w: str
    out: str

    @property
    def sound(self) -> bool:
        """Each letter at most once in a term, and in two terms at least."""
        terms = [set(t) for t in self]
        once = all(len(t) == len(s) for t, s in zip(self, terms, strict=True))
        x, w, out = terms
        return once and x <= w | out and w <= x | out and out <= x | w


class Plan(NamedTuple):
    """How a gradient is put together.

    ``loop`` letters of ``w`` are taken one index after the other; what is left is a matrix
    ``first x second``, and lies in the parameter at ``places`` (None: gradients are formed).
    """

    letters: Letters
    lead: str  # those of the rows, as these are ordered
    rows: Rows
    loop: str
    first: str
    second: str
    places: list[tuple[Region, bool]] | None
    sizes: dict[str, int]


def split(letters: Letters) -> tuple[str, str, str] | None:
    """``w`` as loop, first, second: one of the last two is the activation's, the other the
    output's. None if the letters do not lie so."""
    w = letters.w

    def whose(part: str) -> str:
        sides = {("x" if c in letters.x else "") + ("o" if c in letters.out else "") for c in part}
        return sides.pop() if len(sides) == 1 else "" if not sides else "mixed"

    for at in range(len(w) + 1):
        for cut in range(at, len(w) + 1):
            loop, first, second = w[:at], w[at:cut], w[cut:]
            if {whose(first), whose(second)} <= {"x", "o", ""} and whose(first) != whose(second):
                return loop, first, second
    return None


class ContractTap(torch.autograd.Function):
    """``scale * einsum(x, w) + shift * bias``, computed by the function that the model called."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        compute: Callable[..., Tensor],
        plan: Plan,
        sink: Sink | None,
        bias_sink: Sink | None,
        sums: Callable[[Tensor], Tensor] | None,
        scales: tuple[float, float],
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.plan, ctx.sums, ctx.scales = plan, sums, scales
        ctx.sinks = [None if s is None else s.kept() for s in (sink, bias_sink)]
        out = compute(x, w, bias)
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        letters: Letters = ctx.plan.letters
        sinks, (scale, shift) = ctx.sinks, ctx.scales
        if torch.is_grad_enabled():
            for sink in sinks:
                if sink is not None:
                    sink.differentiated()
            sinks = [None, None]
        grad_x = grad_w = grad_bias = None
        if ctx.needs_input_grad[2]:
            each = grad if shift == 1 else grad * shift
            if sinks[1] is not None and ctx.sums is not None:
                give(sinks[1], ctx.sums(each), grad.dtype)
            shape, dtype = ctx.bias
            grad_bias = each.sum_to_size(shape).to(dtype)
        g = grad if scale == 1 else grad * scale
        if ctx.needs_input_grad[0]:
            grad_x = torch.einsum(f"{letters.out},{letters.w}->{letters.x}", g, w.conj())
        if ctx.needs_input_grad[1]:
            if sinks[0] is None:
                equation = f"{letters.x},{letters.out}->{letters.w}"
                grad_w = torch.einsum(equation, x.conj(), g)
            else:
                grad_w = _gradient(x.conj(), g, w, ctx.plan, sinks[0])
        return grad_x, grad_w, grad_bias, *[None] * 6


def _gradient(x: Tensor, g: Tensor, w: Tensor, plan: Plan, sink: Sink) -> Tensor:
    if plan.places is None:
        return _formed(x, g, w, plan, sink)
    letters, rows = plan.letters, plan.rows
    inner = [c for c in (*plan.first, *plan.second) if c in letters.x]
    of_x = _matrices(x, letters.x, plan, "".join(inner))
    of_g = _matrices(g, letters.out, plan, "".join(c for c in letters.w if c in letters.out))
    swapped = any(c in letters.x for c in plan.first) or any(c in letters.out for c in plan.second)
    lefts, rights = (of_x, of_g) if swapped else (of_g, of_x)
    record = sink.roots[0].record
    found = [
        into_record(record, a, b, rows, w.dtype, region, flipped)
        for a, b, (region, flipped) in zip(lefts, rights, plan.places, strict=True)
    ]
    return torch.stack(found).view(w.shape)


def _matrices(t: Tensor, own: str, plan: Plan, last: str) -> list[Tensor]:
    """``[rows, last]`` for each index of the loop's letters; ``t`` may lack some of these."""
    lead = plan.lead
    last = "".join(c for c in last if c not in plan.loop)
    inside = "".join(c for c in plan.loop if c in own)
    t = t.permute([own.index(c) for c in (*inside, *lead, *last)])
    n_rows, size = (math.prod(plan.sizes[c] for c in part) for part in (lead, last))
    parts = []
    for index in itertools.product(*(range(plan.sizes[c]) for c in plan.loop)):
        at = tuple(k for c, k in zip(plan.loop, index, strict=True) if c in inside)
        parts.append(t[at].reshape(n_rows, size))
    return parts


def _formed(x: Tensor, g: Tensor, w: Tensor, plan: Plan, sink: Sink) -> Tensor:
    """The gradients of each example one by one, for what does not lie as a matrix."""
    letters, rows = plan.letters, plan.rows
    terms, flat = [], []
    for t, own in ((x, letters.x), (g, letters.out)):
        others = [c for c in own if c not in plan.lead]
        t = t.permute([own.index(c) for c in (*plan.lead, *others)])
        flat.append(wide(t.reshape(-1, *(plan.sizes[c] for c in others))))
        terms.append("z" + "".join(others))
    one = f"{terms[0]},{terms[1]}->{letters.w}"
    a, b = (rows.ordered(t) for t in flat)
    if rows.per_example is not None:
        shape = (rows.n_examples, rows.per_example)
        a, b = a.unflatten(0, shape), b.unflatten(0, shape)
        each = torch.einsum(f"y{terms[0]},y{terms[1]}->y{letters.w}", a, b)
    else:
        each = torch.stack([torch.einsum(one, a[p], b[p]) for p in rows.parts()])
    give(sink, each, w.dtype)
    total = each.sum(0)
    if rows.rest is not None:
        total = total + torch.einsum(one, *(t[rows.rest] for t in flat))
    return total.to(w.dtype)
