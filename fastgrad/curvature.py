"""Second-order scores of whole parameters: the gradient against its own Fisher matrix.

The empirical Fisher matrix of a parameter is the mean over examples of ``g_j g_jᵀ``, where ``g_j``
is the gradient of example j's own loss. Two of its approximations are gathered here from one
backward pass for each example: the diagonal, and, for weights read by linear layers, a Kronecker
product (Martens and Grosse, ICML 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgrad.batches import input_tensors
from fastgrad.errors import FastgradError
from fastgrad.measuring import Loss, on_device
from fastgrad.online import take_rows

DampingOf = Literal["block", "model"]

#: Longest side of a Kronecker factor by default: a float32 matrix of 64 MiB.
FACTOR_LIMIT = 4096
# How far the product of what a linear layer read and got back may be from autograd's gradient, in
# parts of it: this much, and under autocast as many roundings of what was read.
_EXPLAINED, _ROUNDINGS = 1e-3, 4


@dataclass
class Factors:
    """``F ≈ left ⊗ right`` of a matrix parameter ``[rows, cols]``.

    With activations ``a_t`` and output gradients ``g_t`` of all tokens t of E examples, and N
    tokens in all, the factors are ``Σ_t g_t g_tᵀ / E`` and ``Σ_t a_t a_tᵀ / N``: Fisher blocks of
    tokens that are independent of one another, of activations that are independent of gradients
    ("expand" in Eschenhagen et al., NeurIPS 2023). With one token for each example they are those
    of Martens and Grosse. Tokens that no gradient reaches (padding) count in neither.

    Attributes:
        left: float32 ``[rows, rows]``; of output gradients, or of activations where the weight is
            stored ``[in, out]`` (``Conv1D`` of transformers).
        right: float32 ``[cols, cols]``, of the other.
    """

    left: Tensor
    right: Tensor

    @property
    def mean_eigenvalue(self) -> float:
        """Of ``left ⊗ right``."""
        return float(self.left.diagonal().double().mean() * self.right.diagonal().double().mean())

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        of_left, left = torch.linalg.eigh(self.left.double())
        of_right, right = torch.linalg.eigh(self.right.double())
        return torch.outer(of_left.clamp_min(0), of_right.clamp_min(0)), left, right

    def quadratic(self, gradient: Tensor, damping: float) -> float:
        """``gᵀ (left ⊗ right + damping)⁻¹ g``, exactly, by the eigenvectors of both factors."""
        values, left, right = self._eigen
        return _divided(left.T @ gradient.double() @ right, values, damping)


@dataclass
class Curvature:
    """What one backward pass for each example says about the Fisher matrix.

    Attributes:
        diagonal: parameter name -> float32 tensor of its shape, mean of squared gradients.
        factors: name -> Kronecker factors, for weights read by linear layers alone.
        reasons: name -> why there are no factors, for all others.
        n_examples: E.
    """

    diagonal: dict[str, Tensor]
    factors: dict[str, Factors]
    reasons: dict[str, str]
    n_examples: int

    def damping(self, name: str, share: float, of: DampingOf, kind: str) -> float:
        """The damping added to the Fisher matrix of one parameter.

        Args:
            name: of the parameter.
            share: of a mean eigenvalue.
            of: ``model``: of the diagonals of all parameters, the same value for all. ``block``:
                of the parameter's own approximation.
            kind: ``fisher`` or ``kfac``.
        """
        if of == "model":
            total = sum(float(d.sum(dtype=torch.float64)) for d in self.diagonal.values())
            return share * total / sum(d.numel() for d in self.diagonal.values())
        if kind == "kfac":
            return share * self.factors[name].mean_eigenvalue
        return share * float(self.diagonal[name].mean(dtype=torch.float64))

    def score(
        self, name: str, gradient: Tensor, share: float, of: DampingOf, kind: str
    ) -> float:
        """``gᵀ (F + damping)⁻¹ g`` of one parameter; NaN where ``kind`` is not known for it.

        Twice what a step ``(F + damping)⁻¹ g`` takes off the loss, if the damped F is its Hessian.
        """
        if kind == "kfac" and name not in self.factors:
            return float("nan")
        damping = self.damping(name, share, of, kind)
        if kind == "kfac":
            return self.factors[name].quadratic(gradient, damping)
        return _divided(gradient.double(), self.diagonal[name].double(), damping)


def _divided(gradient: Tensor, values: Tensor, damping: float) -> float:
    parts = gradient.square() / (values + damping)
    return float(parts.masked_fill_(gradient == 0, 0.0).sum())  # 0 / 0 where nothing ever came


class _Read(NamedTuple):
    """Of a linear layer: activations ``[tokens, in]``, output gradients ``[tokens, out]``, whether
    the weight is stored ``[in, out]``, and the relative rounding of the product."""

    activations: Tensor
    gradients: Tensor
    transposed: bool
    rounding: float


class _Reads(TorchFunctionMode):
    """Keeps what linear functions read with, and get back for, some weights."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.seen: dict[str, list[_Read]] = {}  # by name, in the order of the backward pass

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        found = _linear(func, args, kwargs)
        if found is not None:
            x, weight, transposed = found
            name = self.names.get(id(weight))
            if name is not None and out.requires_grad:
                out.register_hook(self._keep(name, x.detach(), transposed))
        return out

    def _keep(self, name: str, x: Tensor, transposed: bool) -> Callable[[Tensor], None]:
        def arrived(grad: Tensor) -> None:
            a, g = (t.detach().reshape(-1, t.shape[-1]).float() for t in (x, grad))
            self.seen.setdefault(name, []).append(
                _Read(a, g, transposed, torch.finfo(grad.dtype).eps)
            )

        return arrived


def _linear(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Any, bool] | None:
    """Activations, weight, and whether the weight is stored ``[in, out]``, of a linear function."""
    if func is F.linear:
        given = dict(zip(("input", "weight"), args, strict=False)) | dict(kwargs)
        return given["input"], given["weight"], False
    if func is torch.addmm and len(args) == 3 and not kwargs:  # Conv1D of transformers
        return args[1], args[2], True
    return None


@dataclass
class _Sums:
    activations: Tensor
    gradients: Tensor
    transposed: bool
    tokens: int = 0

    def factors(self, examples: int) -> Factors:
        a, g = self.activations / max(self.tokens, 1), self.gradients / examples
        return Factors(a, g) if self.transposed else Factors(g, a)


@dataclass
class _Gatherer:
    own: Mapping[str, nn.Parameter]
    limit: int
    sums: dict[str, _Sums] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, seen: Mapping[str, list[_Read]]) -> None:
        """What one example's backward pass left in ``.grad`` and in ``seen``."""
        for name, p in self.own.items():
            if name in self.reasons or p.grad is None:
                continue
            reads = seen.get(name, [])
            reason = self._unfit(p, reads)
            if reason:
                self.reasons[name] = reason
                self.sums.pop(name, None)
                continue
            a, g, transposed, _ = reads[0]
            live = (g != 0).any(1)
            a, g = a[live], g[live]
            if name not in self.sums:
                of_a, of_g = (t.new_zeros(t.shape[1], t.shape[1]) for t in (a, g))
                self.sums[name] = _Sums(of_a, of_g, transposed)
            mine = self.sums[name]
            mine.activations.addmm_(a.T, a)
            mine.gradients.addmm_(g.T, g)
            mine.tokens += len(g)

    def _unfit(self, p: nn.Parameter, reads: list[_Read]) -> str:
        if not reads:
            return "no linear layer reads it as it is"
        if len(reads) > 1:
            return f"linear layers read it {len(reads)} times in one pass"
        if max(p.shape) > self.limit:
            return (f"a factor of side {max(p.shape)} is larger than factor_limit={self.limit}. "
                    "Remedy: a larger limit, if memory allows")  # fmt: skip
        a, g, transposed, rounding = reads[0]
        assert p.grad is not None
        off = torch.linalg.norm((a.T @ g if transposed else g.T @ a) - p.grad.float())
        allowed = max(_EXPLAINED, _ROUNDINGS * rounding)
        if float(off) > allowed * float(torch.linalg.norm(p.grad.float())):
            return "it is used elsewhere too, as tied weights are"
        return ""


def examples_of(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches of one row each.

    Raises:
        FastgradError: if a batch holds no tensor with rows.
    """
    for batch in batches:
        found = input_tensors((), batch) if isinstance(batch, Mapping) else (
            input_tensors(batch if isinstance(batch, tuple | list) else (batch,), {})
        )  # fmt: skip
        if not found:
            raise FastgradError("the examples of a batch cannot be counted: it holds no tensor. "
                                "Remedy: batches with the examples in the leading dimension")
        n = len(found[0])
        for i in range(n):
            yield take_rows(batch, np.array([i]), n)


def gather_curvature(
    model: nn.Module,
    own: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Loss,
    *,
    factor_limit: int = FACTOR_LIMIT,
) -> Curvature:
    """Diagonal and Kronecker-factored Fisher matrices of every parameter.

    Costs a forward and backward pass for each row of the batches, each alone; memory for one
    float32 copy of the parameters, and for each weight ``[out, in]`` that linear layers read
    ``4 (out² + in²)`` bytes. ``.grad`` is used and left empty; call it where nothing else needs it
    (:func:`fastgrad.measuring.stand_ins`).

    Args:
        model: in the mode to be measured.
        own: its parameters by name.
        batches: with a row for each example.
        loss: ``(model, batch) -> loss``, called with one row at a time.
        factor_limit: no Kronecker factors for weights with a longer side.

    Raises:
        FastgradError: if there is no example, or a batch without rows.
    """
    device = next(iter(own.values())).device
    diagonal = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in own.items()}
    gatherer = _Gatherer(own, factor_limit)
    names = {id(p): n for n, p in own.items() if p.ndim == 2}
    count = 0
    for row in examples_of(batches):
        mode = _Reads(names)
        with mode:
            value = loss(model, on_device(device, row))
        value.backward()
        gatherer.add(mode.seen)
        for name, p in own.items():
            if p.grad is not None:
                diagonal[name].add_(p.grad.float().square())
            p.grad = None
        count += 1
    if not count:
        raise FastgradError("there was no example to measure on")
    for square in diagonal.values():
        square.div_(count)
    factors = {n: s.factors(count) for n, s in gatherer.sums.items()}
    reasons = {n: gatherer.reasons.get(n, "no gradient reached it")
               for n in own if n not in factors}  # fmt: skip
    return Curvature(diagonal, factors, reasons, count)


__all__ = ["FACTOR_LIMIT", "Curvature", "DampingOf", "Factors", "examples_of", "gather_curvature"]
