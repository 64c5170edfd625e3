"""Functions that run as they would without a probe, and are only watched.

The function itself and its backward pass are PyTorch's own, so outputs and gradients are the same
bit for bit, and random numbers and buffers are touched once. What arrives at the outputs, together
with what the function was given, says how each example pulls on the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad.derived import Sink
from fastgrad.rows import wide

Sinks = Sequence[Sink | None]
# (sinks, gradients of the outputs, saved tensors) -> the gradients found, summed over examples
Measure = Callable[[Sinks, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor | None]]
_CHANGED = "what the function that uses it saw or returned was changed in place afterwards"
# by how much rounding makes sums of the same numbers differ: of their size, of all they sum up
_ROUNDING = {
    torch.bfloat16: (1e-2, 4e-3), torch.float16: (2e-3, 5e-4), torch.float64: (1e-4, 1e-13),
}  # fmt: skip


class Watch(torch.autograd.Function):
    """Hands outputs through, and their gradients back; looks at the gradients on their way."""

    @staticmethod
    def forward(
        ctx: Any,
        measure: Measure,
        sinks: Sinks,
        saved: Sequence[Tensor],
        keep: bool,
        found: dict[int, tuple[Tensor, Tensor]],
        *outs: Tensor,
    ) -> tuple[Tensor, ...]:
        # no views of what came in: a model may change the outputs in place
        new = tuple(torch.ops.aten._unsafe_view(out, out.shape) for out in outs)
        ctx.save_for_backward(*saved, *(new if keep else ()))
        ctx.measure, ctx.found = measure, found
        ctx.sinks = [None if s is None else s.kept() for s in sinks]
        return new

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.found.clear()
        if torch.is_grad_enabled():
            for sink in ctx.sinks:
                if sink is not None:
                    sink.differentiated()
            return None, None, None, None, None, *grads
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            refuse_late(ctx.sinks, _CHANGED)
            return None, None, None, None, None, *grads
        totals = ctx.measure(ctx.sinks, grads, saved)
        if any(t is not None for t in totals):
            summed = wide(grads[0]).norm() * grads[0].numel() ** 0.5
            size = 1 + wide(saved[0]).norm() / max(saved[0].numel(), 1) ** 0.5
            ctx.found.update({k: (t, summed * size) for k, t in enumerate(totals) if t is not None})
        return None, None, None, None, None, *grads


class Settled(torch.autograd.Function):
    """A parameter whose gradient is autograd's, unless that is nothing but rounding.

    A shift before a norm has a gradient of zero. Autograd's sum and the examples' then differ by
    all that they are, and no check could tell that from a use that was missed: so they are made
    one.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, found: dict[int, tuple[Tensor, Tensor]], k: int) -> Any:
        ctx.found, ctx.k = found, k
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.found.pop(ctx.k, None)
        if known is None or torch.is_grad_enabled():
            return grad, None, None
        total, summed = known[0].reshape(grad.shape).to(grad.dtype), known[1]
        of_size, of_sum = _ROUNDING.get(grad.dtype, (1e-4, 1e-5))
        distance = wide(total - grad).norm()
        other = (distance > of_size * wide(grad).norm()) & (distance <= of_sum * summed)
        return torch.where(other, total, grad), None, None


def watched(
    run: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    sinks: Sinks,
    measure: Measure,
    *saved: Tensor,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """``run(*tensors)`` as it is, but ``measure`` will be called with the gradients that arrive at
    the results and with ``saved`` (and the results, to ``keep`` them). At least one of the sinks
    of the ``tensors``, which may be fewer, is not None."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    given = [
        t if s is None or t is None else Settled.apply(t, found, k)
        for k, (t, s) in enumerate(zip(tensors, sinks, strict=False))
    ]
    return Watch.apply(measure, sinks, [t.detach() for t in saved], keep, found, *run(*given))


def refuse_late(sinks: Sinks, reason: str) -> None:
    """In the backward pass, which a strict probe's error must not end half way."""
    for sink in sinks:
        for root in () if sink is None else sink.roots:
            entry = (root.record.target.name, reason)
            if entry not in root.record.batch.refused:
                root.record.batch.refused.append(entry)


def give(sink: Sink | None, per_example: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Gradients ``[n_examples, ...]`` of a tensor that were formed, rounded to ``dtype`` before;
    returns their sum."""
    if sink is None:
        return None
    if sink.made is None:
        per_example = per_example.reshape(len(per_example), *sink.roots[0].record.parameter.shape)
    sink.dense(per_example, dtype)
    return per_example.sum(0)
