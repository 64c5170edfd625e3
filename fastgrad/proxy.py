"""Is the gradient norm a good proxy for what training a block does?

:func:`proxy_quality` sets the norm of every parameter's gradient, and scores of second order,
beside what was measured: the held-out loss after that parameter alone was trained a little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad.concentration import FloatArray, check_bootstrap, check_positive
from fastgrad.curvature import FACTOR_LIMIT, Curvature, DampingOf, gather_curvature
from fastgrad.errors import FastgradError, NonFiniteGradientError, StatsError
from fastgrad.identity import model_parameters, sharded_modules, unwrapped
from fastgrad.measuring import (
    Loss,
    check_reached,
    gradients_on,
    on_device,
    own_loss,
    stand_ins,
    untouched,
    whole_weights,
)
from fastgrad.partial import Partial
from fastgrad.proxy_report import ProxyReport, judge

Gradients = dict[str, Tensor]

# The line search for a rate begins with a step of this share of the weights' norm.
_FIRST_STEP = 1e-3
_DOUBLINGS = 30


def proxy_quality(
    model: nn.Module,
    batches: Iterable[Any],
    heldout: Iterable[Any],
    *,
    loss: Loss = own_loss,
    damping: float = 0.1,
    damping_of: DampingOf = "model",
    rate: float | None = None,
    adam_rate: float = 1e-3,
    steps: int = 4,
    factor_limit: int = FACTOR_LIMIT,
    partial: Partial | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> ProxyReport:
    """How well the gradient norm and other scores rank the parameters by their measured effect.

    The scores come from the mean gradient g over ``batches``; those of second order divide by the
    empirical Fisher matrix of the rows of ``batches``, see :mod:`fastgrad.curvature`. The effects
    are decreases of the mean loss over ``heldout`` after one parameter alone was changed, always
    from the same start:

    * ``gradient_step``: by ``-rate · g``. To first order that is ``rate`` times the inner product
      of g with the held-out gradient, so the squared norm wins wherever both gradients agree and
      the step is short.
    * ``adamw``: by ``steps`` steps of AdamW (``weight_decay`` 0), a batch each, over and over.

    Nothing about the model changes: weights are put back bit for bit, also if an error is raised;
    gradients, modes and random state are what they were. The model is in evaluation mode.

    Costs, with P parameters, B batches of R rows and H held-out batches: ``B·R + B`` forward and
    backward passes for the scores, some 10 more for a rate that is not given, and for each
    parameter ``2 H`` forward passes and ``steps`` backward passes. Memory beside the model: its
    gradient, its diagonal Fisher matrix, the Kronecker factors and (for the search of a rate) a
    copy of the weights.

    Args:
        model: float32 or float64 weights; those with ``requires_grad`` are the blocks. Wrappers are
            looked through.
        batches: to train on: keyword arguments of the model, or anything with ``loss`` given, with
            a row for each example.
        heldout: other batches, to measure on.
        loss: ``(model, batch) -> loss``, a mean over examples or tokens.
        damping: share of a mean eigenvalue that is added to the Fisher matrices, over 0.
        damping_of: whose eigenvalue: that of the whole ``model``'s diagonal, so that all blocks
            get the same damping, as in Martens and Grosse; or each parameter's own (``block``, as
            in kronfluence), which takes the size of its gradient out of the score.
        rate: of the plain gradient step; by default the one at which a step of all parameters
            together lowers the loss over ``batches`` most, to a factor of two.
        adam_rate, steps: of AdamW.
        factor_limit: longest side of a weight that gets Kronecker factors.
        partial: what is trained, if the model is partial; it is suspended.
        n_bootstrap, seed: of the intervals over parameters.

    Raises:
        FastgradError: for half-precision or sharded weights, no batch, or a step that makes the
            loss infinite or NaN.
        NonFiniteGradientError: naming the parameters.
        StatsError: for fewer than 4 parameters, or an argument outside its range.
    """
    check_bootstrap(n_bootstrap)
    for name, value in {"damping": damping, "adam_rate": adam_rate, "steps": steps,
                        **({} if rate is None else {"rate": rate})}.items():  # fmt: skip
        check_positive(name, value)
    if damping_of not in ("block", "model"):
        raise StatsError(f"damping_of must be 'block' or 'model', got {damping_of!r}")
    train, test = list(batches), list(heldout)
    if not train or not test:
        raise FastgradError("batches and heldout must each hold a batch or more")
    if next(sharded_modules(model), None) is not None:
        raise FastgradError("the weights are divided by fully_shard, and each block is to be "
                            "changed alone. Remedy: measure the saved model in one process")
    inner = unwrapped(model)
    with (
        whole_weights(inner, partial),
        gradients_on(),
        untouched(inner),
        stand_ins(inner) as replaced,
    ):
        bench = _Bench(inner, train, test, loss)
        gradient = bench.gradient(train)
        check_reached(replaced)
        scores = plain_scores(gradient, bench.gradient(test))
        curvature = gather_curvature(inner, bench.own, train, loss, factor_limit=factor_limit)
        scores |= second_order_scores(curvature, gradient, damping, damping_of)
        step = bench.search(gradient) if rate is None else rate
        before, resolution = bench.held_out()
        effects = {
            "gradient_step": bench.effects(before, lambda n: bench.step(n, gradient[n], step)),
            "adamw": bench.effects(before, lambda n: bench.adamw(n, adam_rate, steps)),
        }
    sizes = np.array([p.numel() for p in bench.own.values()], dtype=np.int64)
    correlations, comparisons = judge(scores, effects, sizes, n_bootstrap, seed)
    return ProxyReport(
        names=tuple(bench.own), sizes=sizes, scores=scores, effects=effects,
        reasons=curvature.reasons, loss=before, resolution=resolution, rate=step,
        adam_rate=adam_rate, steps=steps, damping=damping, damping_of=damping_of,
        n_examples=curvature.n_examples, n_bootstrap=n_bootstrap, seed=seed,
        correlations=correlations, comparisons=comparisons,
    )  # fmt: skip


def plain_scores(
    gradient: Mapping[str, Tensor], heldout: Mapping[str, Tensor]
) -> dict[str, FloatArray]:
    """Scores of first order, float64 ``[P]`` each, and the sizes."""
    sizes = np.array([g.numel() for g in gradient.values()], dtype=np.float64)
    wide = {n: g.double() for n, g in gradient.items()}
    norm = np.array([float(g.norm()) for g in wide.values()])
    return {
        "norm": norm,
        "rms": norm / np.sqrt(sizes),
        "abs": np.array([float(g.abs().sum()) for g in wide.values()]),
        "alignment": np.array([float((g * heldout[n]).sum()) for n, g in wide.items()]),
        "size": sizes,
    }


def second_order_scores(
    curvature: Curvature, gradient: Mapping[str, Tensor], damping: float, of: DampingOf
) -> dict[str, FloatArray]:
    """``fisher`` and ``kfac``, float64 ``[P]`` each; NaN where there are no factors."""
    return {
        kind: np.array([curvature.score(n, g, damping, of, kind) for n, g in gradient.items()])
        for kind in ("fisher", "kfac")
    }


class _Bench:
    """A model whose parameters are changed one at a time, and put back."""

    def __init__(
        self, model: nn.Module, train: Sequence[Any], test: Sequence[Any], loss: Loss
    ) -> None:
        own = {n: p for n, p in model_parameters(model).items() if p.requires_grad}
        if not own:
            raise FastgradError("no parameter requires a gradient, so no block can be trained")
        for name, p in own.items():
            if type(p) is not nn.Parameter or p.dtype not in (torch.float32, torch.float64):
                raise FastgradError(
                    f"{name} is a {type(p).__name__} of {p.dtype}: a small step of it would be "
                    "lost in rounding. Remedy: load the model in float32 (model.float())"
                )
        self.model, self.own, self.loss = model, own, loss
        device = next(iter(own.values())).device
        self.train, self.test = ([on_device(device, b) for b in part] for part in (train, test))

    def gradient(self, batches: Sequence[Any]) -> Gradients:
        """Mean gradient over batches; zero where none arrives."""
        for batch in batches:
            (self.loss(self.model, batch) / len(batches)).backward()
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.own.items()}
        self._forget()
        bad = [n for n, g in found.items() if not bool(torch.isfinite(g).all())]
        if bad:
            raise NonFiniteGradientError(bad, "No score can be made of it.")
        return found

    def _forget(self) -> None:
        for p in self.own.values():
            p.grad = None

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Any]) -> float:
        return math.fsum(float(self.loss(self.model, b)) for b in batches) / len(batches)

    def held_out(self) -> tuple[float, float]:
        """Loss at the start, and the smallest difference from it that is not rounding: the loss's
        own spacing of numbers, or what it differs by when nothing was changed."""
        first, second = self.mean_loss(self.test), self.mean_loss(self.test)
        dtype = next(iter(self.own.values())).dtype
        return first, max(abs(first - second), torch.finfo(dtype).eps * abs(first))

    @contextmanager
    def _put_back(self, names: Iterable[str]) -> Iterator[None]:
        kept = {n: self.own[n].detach().clone() for n in names}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.own[name].copy_(value)

    def effects(self, before: float, change: Callable[[str], None]) -> FloatArray:
        """Decrease of the held-out loss by a change of each parameter alone."""
        found = []
        for name in self.own:
            with self._put_back([name]):
                change(name)
                after = self.mean_loss(self.test)
            if not math.isfinite(after):
                raise FastgradError(f"the held-out loss is {after} after {name} alone was trained. "
                                    "Remedy: a lower rate or adam_rate")
            found.append(before - after)
        return np.array(found)

    @torch.no_grad()
    def step(self, name: str, gradient: Tensor, rate: float) -> None:
        self.own[name].sub_(gradient, alpha=rate)

    def adamw(self, name: str, rate: float, steps: int) -> None:
        """Steps of one parameter, a batch each, from an empty optimizer state."""
        wanted = self.own[name]
        for p in self.own.values():
            p.requires_grad_(p is wanted)  # the stand-ins: nothing to put back outside
        try:
            # the same memory without the marks of a suspended partial model
            bare = nn.Parameter(wanted.detach())
            optimizer = torch.optim.AdamW([bare], lr=rate, weight_decay=0.0)
            for batch in islice(_over_and_over(self.train), steps):
                value = self.loss(self.model, batch)
                if value.requires_grad:
                    value.backward()
                bare.grad, wanted.grad = wanted.grad, None
                optimizer.step()
        finally:
            self._forget()
            for p in self.own.values():
                p.requires_grad_(True)

    def search(self, gradient: Mapping[str, Tensor]) -> float:
        """The rate at which a step of all parameters lowers the loss of the batches most."""
        weights = math.sqrt(sum(float(p.detach().double().square().sum())
                                for p in self.own.values()))  # fmt: skip
        size = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        if size == 0:
            raise FastgradError("every gradient is zero: no step can be made")
        tried: dict[float, float] = {0.0: self.mean_loss(self.train)}

        def after(rate: float) -> float:
            if rate not in tried:
                with self._put_back(self.own):
                    for name, g in gradient.items():
                        self.step(name, g, rate)
                    value = self.mean_loss(self.train)
                tried[rate] = value if math.isfinite(value) else math.inf
            return tried[rate]

        rate = _FIRST_STEP * (weights or 1.0) / size
        for _ in range(_DOUBLINGS):  # until the step is short enough to help at all
            if after(rate) < tried[0.0]:
                break
            rate /= 2
        for factor in (2.0, 0.5):
            for _ in range(_DOUBLINGS):
                if after(rate * factor) >= after(rate):
                    break
                rate *= factor
        if after(rate) >= tried[0.0]:
            raise FastgradError("no step along the gradient lowers the loss of the batches that it "
                                "comes from. Remedy: rate=..., or a loss without randomness")
        return rate


def _over_and_over(batches: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from batches


__all__ = ["plain_scores", "proxy_quality", "second_order_scores"]
