"""Elementwise functions: parameters are expanded over the examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastgrad.derived import roots_of, spread_over
from fastgrad.handlers_common import (
    constant,
    expect_dense,
    ownership,
    per_channel,
    refuse,
    too_large,
    watch_sinks,
)
from fastgrad.records import Batch
from fastgrad.tap_watch import Sinks, give, watched


def broadcast(batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Elementwise functions: what is made of parameters is expanded over the examples."""
    roots = [roots_of(a, batch) if isinstance(a, Tensor) else () for a in args]
    if any(isinstance(v, Tensor) for v in kwargs.values()) or (func in _INPLACE and roots[0]):
        return NotImplemented
    partners = [a for a, r in zip(args, roots, strict=True) if isinstance(a, Tensor) and not r]
    owned = [(p, m) for p in partners if (m := ownership(p, batch)).owned]
    if not owned:
        return NotImplemented
    x, found = max(owned, key=lambda pair: pair[0].ndim)
    new = list(args)
    for i, own in enumerate(roots):
        if own:
            spread = spread_over(args[i], own, x, found, batch)
            if isinstance(spread, str):
                for root in own:
                    root.record.refuse(f"used by {getattr(func, '__name__', func)}: {spread}")
                return NotImplemented
            new[i] = spread
    return func(*new, **kwargs)


INPLACE = ("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__")
_INPLACE = {getattr(Tensor, name) for name in INPLACE}
ELEMENTWISE = (
    "mul", "add", "sub", "div", "true_divide", "pow", "maximum", "minimum", "where", "addcmul",
    "addcdiv", "lerp", "multiply", "subtract", "divide", "__mul__", "__rmul__", "__add__",
    "__radd__", "__sub__", "__rsub__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__",
)  # fmt: skip


def prelu(batch: Batch, func: Any, input: Tensor, weight: Tensor) -> Any:
    if roots_of(input, batch) or constant(input, batch):
        return NotImplemented
    sinks = watch_sinks(batch, weight)
    if not any(sinks):
        return func(input, weight)
    found, size = ownership(input, batch), weight.numel()
    sums = per_channel(batch, found, input, size)
    if sums is None:
        return refuse(
            sinks,
            f"its activation saw an input of shape {tuple(input.shape)}, in which the batch's "
            f"{batch.n_examples} examples cannot be told apart",
        )
    if (large := too_large(batch, sinks, (weight,))) is not None:
        return refuse(sinks, large)
    expect_dense(sinks, (weight,))

    def measure(
        sinks: Sinks, grads: Sequence[Tensor], saved: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        return [give(sinks[0], sums(grads[0] * saved[0].clamp(max=0)), grads[0].dtype)]

    return watched(lambda w: [func(input, w)], [weight], sinks, measure, input)[0]
