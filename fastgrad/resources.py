"""What training a fraction of the parameters costs, and the fraction that pays best.

A :class:`CostModel` says what one resource costs when the fraction k of the parameters is
trained; :func:`k_star` maximises the share of gradient mass kept per unit of that resource.
``docs/maths.md`` derives the formula and its clamps.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastgrad.errors import ResourceError

__all__ = ["CostModel", "KStar", "k_star"]

#: Arithmetic of one AdamW update per parameter, counted from the update rule: first moment 3
#: (two products, one sum), second moment 4, denominator 3 (root, scale, add), decay 1, step 3.
ADAMW_FLOPS_PER_PARAM = 14.0

#: A k* that keeps less than this share of the gradient mass is called over-aggressive.  k*
#: maximises mass *per resource*, which can be best at a fraction too small to learn from; at less
#: than one half, most of what the gradient asks for is thrown away.
OVER_AGGRESSIVE_SHARE = 0.5

#: How coefficients came about: counted from a formula, or fitted to measured steps.
COUNTED, MEASURED = "counted", "measured"

#: Three different fractions are the fewest from which a line and its misfit both follow.
MIN_FRACTIONS = 3

#: Fractions of the parameters trained, and what a step cost.
Pairs = Iterable[tuple[float, float]] | Mapping[float, float]


@dataclass(frozen=True)
class CostModel:
    """Linear cost of training a fraction k of the parameters: ``fixed + per_param * k``.

    Attributes:
        resource: what is paid with, for instance ``"memory"``.
        unit: unit of ``fixed`` and ``per_param``, for instance ``"bytes"``.
        fixed: cost at k = 0, paid whatever is selected.
        per_param: cost of k going from 0 to 1, that is, of selecting *all* parameters; for a
            single parameter divide by ``n_params``.
        n_params: parameters of the model.
        mode: ``"counted"``, from a formula, or ``"measured"``, fitted to measured steps.
        n_points: how many measurements were fitted; None if counted.
        residual: standard deviation of the measurements about the line, in ``unit`` (n - 2 degrees
            of freedom): noise, and whatever is not linear; None if counted.

    Raises:
        ResourceError: a cost is negative or not finite, both are zero, ``n_params < 1``, or the
            last three contradict each other.
    """

    resource: str
    unit: str
    fixed: float
    per_param: float
    n_params: int
    mode: str = COUNTED
    n_points: int | None = None
    residual: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in (COUNTED, MEASURED):
            raise ResourceError(f"mode is {COUNTED!r} or {MEASURED!r}; got {self.mode!r}")
        if self.mode == MEASURED and (self.n_points is None or self.residual is None):
            raise ResourceError("a measured cost has n_points and residual. Remedy: "
                                "CostModel.from_measurements")
        if self.mode == COUNTED and (self.n_points, self.residual) != (None, None):
            raise ResourceError("a counted cost has no n_points and no residual")
        if self.n_points is not None and self.residual is not None:
            _require_count("n_points", self.n_points)
            _require_amount("residual", self.residual)
        _require_count("n_params", self.n_params)
        _require_amount("fixed", self.fixed)
        _require_amount("per_param", self.per_param)
        if self.fixed == 0.0 and self.per_param == 0.0:
            raise ResourceError(f"{self.resource}: a resource that costs nothing has no k*")
        # NumPy scalars are welcome, but JSON wants plain numbers.
        object.__setattr__(self, "n_params", int(self.n_params))
        object.__setattr__(self, "fixed", float(self.fixed))
        object.__setattr__(self, "per_param", float(self.per_param))

    def cost(self, k: float) -> float:
        """Cost in ``unit`` of training the fraction ``k``.

        Raises:
            ResourceError: ``k`` is outside [0, 1].
        """
        if not 0.0 <= k <= 1.0:
            raise ResourceError(f"k must lie in [0, 1], a fraction of the parameters; got {k}")
        return self.fixed + self.per_param * k

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)

    @classmethod
    def memory(
        cls,
        n_params: int,
        weight_bytes: float = 2.0,
        grad_bytes: float = 4.0,
        moment_bytes: float = 8.0,
        master_bytes: float = 4.0,
        activation_bytes: float = 0.0,
    ) -> CostModel:
        """Peak bytes of a training step.

        ``fixed = n_params * weight_bytes + activation_bytes`` and
        ``per_param = n_params * (grad_bytes + moment_bytes + master_bytes)``.

        The defaults describe bf16 weights with packed fp32 masters under AdamW: a gradient has
        the dtype of the packed parameter it belongs to, hence 4 bytes.

        Args:
            n_params: parameters of the model.
            weight_bytes: bytes per weight as stored in the model.
            grad_bytes: bytes of gradient per *selected* parameter.
            moment_bytes: bytes of optimizer moments per selected parameter, all moments together.
            master_bytes: bytes of master copy per selected parameter; 0 without one.
            activation_bytes: bytes of activations of the whole batch.  The part that shrinks when
                layers are frozen is not modelled, so give the value of full training.

        Raises:
            ResourceError: a number is negative or not finite, or ``n_params < 1``.
        """
        _require_count("n_params", n_params)
        for name, value in (
            ("weight_bytes", weight_bytes),
            ("grad_bytes", grad_bytes),
            ("moment_bytes", moment_bytes),
            ("master_bytes", master_bytes),
            ("activation_bytes", activation_bytes),
        ):
            _require_amount(name, value)
        return cls(
            resource="memory",
            unit="bytes",
            fixed=n_params * weight_bytes + activation_bytes,
            per_param=n_params * (grad_bytes + moment_bytes + master_bytes),
            n_params=n_params,
        )

    @classmethod
    def flops(
        cls,
        n_params: int,
        tokens: int,
        optimizer_flops: float = ADAMW_FLOPS_PER_PARAM,
    ) -> CostModel:
        """Floating-point operations of one step of a dense transformer.

        Per token: ``2 n_params`` forward, ``2 n_params`` for the gradients of the activations,
        and ``2 n_params * k`` for the gradients of the selected weights; per step
        ``optimizer_flops`` for each selected parameter.

        Left out: attention scores (which grow with the context, and are fixed), recomputation
        under activation checkpointing (likewise fixed), and the saving when everything selected
        lies near the output so that the backward pass can stop early.  An embedding counts as if
        it were multiplied.

        Args:
            n_params: parameters of the model.
            tokens: tokens per optimizer step, over all devices and accumulated batches.
            optimizer_flops: operations per selected parameter and step.

        Raises:
            ResourceError: a number is negative or not finite, or a count is below 1.
        """
        _require_count("n_params", n_params)
        _require_count("tokens", tokens)
        _require_amount("optimizer_flops", optimizer_flops)
        return cls(
            resource="flops",
            unit="FLOP",
            fixed=4.0 * n_params * tokens,
            per_param=2.0 * n_params * tokens + optimizer_flops * n_params,
            n_params=n_params,
        )

    @classmethod
    def from_measurements(
        cls, resource: str, unit: str, pairs: Pairs, *, n_params: int
    ) -> CostModel:
        """Least-squares line through measured costs of steps: :attr:`mode` is ``"measured"``.

        Every pair weighs the same. Repeat each fraction as often as the others, in turns rather
        than one after the other, so that a drift of the machine does not look like a slope.

        Args:
            resource: what is paid with, for instance ``"time"``.
            unit: of the measured costs, for instance ``"s"``.
            pairs: ``(fraction of the parameters trained, cost of a step)`` for each measurement,
                at three different fractions at least. Fractions in [0, 1], zero being a step
                that trains nothing. Also a mapping of fraction to cost.
            n_params: parameters of the model.

        Raises:
            ResourceError: too few fractions, impossible numbers, or a line that falls with k or is
                below zero at k = 0: then noise or something that is not linear decides, and no
                coefficient is made up in its place.
        """
        try:
            given = pairs.items() if isinstance(pairs, Mapping) else pairs
            points = [(float(k), float(cost)) for k, cost in given]
        except (TypeError, ValueError) as error:
            raise ResourceError(
                f"{resource}: measurements are pairs of numbers. Remedy: [(0.2, 0.031), (0.5, "
                "0.048), ...], the fraction trained and the cost of a step; or a mapping of one "
                "to the other"
            ) from error
        for k, cost in points:
            if not 0.0 <= k <= 1.0:
                raise ResourceError(f"{resource}: a measured fraction must lie in [0, 1]; got {k}")
            if not (math.isfinite(cost) and cost > 0.0):
                raise ResourceError(
                    f"{resource}: a measured cost must be finite and above 0; got {cost}"
                )
        n_fractions = len({k for k, _ in points})
        if n_fractions < MIN_FRACTIONS:
            raise ResourceError(
                f"{resource}: {len(points)} measurements at {n_fractions} different fractions; a "
                f"line and its misfit need {MIN_FRACTIONS}. Remedy: measure steps at more "
                "fractions, for instance 0.05, 0.2, 0.5 and 1"
            )
        k, cost = np.array(points).T
        away = k - k.mean()
        per_param = float((away * (cost - cost.mean())).sum() / (away**2).sum())
        fixed = float(cost.mean() - per_param * k.mean())
        residual = float(np.sqrt(((cost - fixed - per_param * k) ** 2).sum() / (k.size - 2)))
        for name, value in (("per_param", per_param), ("fixed", fixed)):
            if value < 0.0:
                raise ResourceError(
                    f"{resource}: the line through {k.size} measurements has {name} = {value:.4g} "
                    f"{unit}, below 0 (they scatter about it by {residual:.4g} {unit}). Remedy: "
                    "longer measurements, more of them, or fractions further apart"
                )
        return cls(resource, unit, fixed, per_param, n_params, MEASURED, int(k.size), residual)

    @classmethod
    def time(cls, pairs: Pairs, *, n_params: int) -> CostModel:
        """Seconds of a step, from measured ``(fraction trained, seconds per step)``.

        Time depends on machine, model and batch, so it is measured and never estimated.

        Raises:
            ResourceError: see :meth:`from_measurements`.
        """
        return cls.from_measurements("time", "s", pairs, n_params=n_params)

    @classmethod
    def energy(cls, pairs: Pairs, *, n_params: int) -> CostModel:
        """Joules of a step, from measured ``(fraction trained, joules per step)``; as :meth:`time`.

        Raises:
            ResourceError: see :meth:`from_measurements`.
        """
        return cls.from_measurements("energy", "J", pairs, n_params=n_params)


@dataclass(frozen=True)
class KStar:
    """The fraction that maximises ``k**gamma / (fixed + per_param * k)``.

    Attributes:
        resource: name of the resource.
        value: the fraction k*, in [1/n_params, 1].
        clamped: whether the interior optimum lay outside that range, or did not exist.
        reason: in words, how ``value`` came about.
        gamma: exponent of the share of mass, S(k) = k**gamma.
        fixed: cost at k = 0, in the cost model's unit.
        per_param: cost of k going from 0 to 1, in the same unit.
        kept_share: share of gradient mass kept at k*, ``value**gamma``.
        over_aggressive: whether ``kept_share`` is below ``over_aggressive_share``.
        mode, n_points, residual: of the cost model, see :class:`CostModel`.
        over_aggressive_share: share of gradient mass below which the warning is given.
    """

    resource: str
    value: float
    clamped: bool
    reason: str
    gamma: float
    fixed: float
    per_param: float
    kept_share: float
    over_aggressive: bool
    mode: str = COUNTED
    n_points: int | None = None
    residual: float | None = None
    over_aggressive_share: float = OVER_AGGRESSIVE_SHARE

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)


def k_star(
    gamma: float, cost: CostModel, over_aggressive_share: float = OVER_AGGRESSIVE_SHARE
) -> KStar:
    """Fraction of parameters with the most gradient mass kept per unit of one resource.

    Interior optimum ``gamma * fixed / (per_param * (1 - gamma))``; it lies below 1 only if
    ``fixed / per_param < (1 - gamma) / gamma``.  Otherwise mass grows faster than cost all the
    way, and full training is the answer.

    Args:
        gamma: exponent of the share of mass, positive; 1 and above mean that no fraction is
            denser than the rest.
        cost: the resource.
        over_aggressive_share: the result warns if it keeps less than this share of the mass,
            in [0, 1]; 0 never warns.

    Raises:
        ResourceError: ``gamma`` is not a positive number, or the share no share; or nothing is
            paid at k = 0 while ``gamma < 1``, where the quotient grows without bound as k goes to
            0.  That is an error and not a tiny k*, because a real step always pays something for
            the parameters that it does not train: the model lacks a term, and "train one
            parameter" would be an answer to a question nobody asked.
    """
    if not (math.isfinite(gamma) and gamma > 0.0):
        raise ResourceError(f"gamma must be a positive number; got {gamma}")
    if not 0.0 <= over_aggressive_share <= 1.0:
        raise ResourceError(
            f"over_aggressive_share must lie in [0, 1]; got {over_aggressive_share}"
        )
    fixed, per_param = cost.fixed, cost.per_param
    floor = 1.0 / cost.n_params
    clamped = True
    if gamma >= 1.0:
        value = 1.0
        reason = f"gamma {gamma:.3g} >= 1: the gradient is not concentrated, so train everything"
    elif per_param == 0.0:
        value = 1.0
        reason = f"{cost.resource} does not grow with k, so train everything"
    elif fixed == 0.0:
        raise ResourceError(
            f"{cost.resource}: fixed cost is 0, so mass per {cost.unit} grows without bound as k "
            "goes to 0 and there is no k*. Remedy: put what is paid at k = 0 (weights, "
            "activations, the forward pass) into CostModel.fixed"
        )
    elif gamma * fixed >= per_param * (1.0 - gamma):
        value = 1.0
        reason = (
            f"fixed/per_param = {fixed / per_param:.3g} >= (1 - gamma)/gamma = "
            f"{(1.0 - gamma) / gamma:.3g}: the fixed cost dominates, so train everything"
        )
    else:
        value = gamma * fixed / (per_param * (1.0 - gamma))
        clamped = value < floor
        if clamped:
            reason = f"the optimum {value:.3g} is below one of {cost.n_params} parameters"
            value = floor
        else:
            reason = (
                f"interior optimum gamma*fixed/(per_param*(1 - gamma)), with fixed/per_param = "
                f"{fixed / per_param:.3g} < (1 - gamma)/gamma = {(1.0 - gamma) / gamma:.3g}"
            )
    kept_share = value**gamma
    return KStar(
        resource=cost.resource,
        value=value,
        clamped=clamped,
        reason=reason,
        gamma=gamma,
        fixed=fixed,
        per_param=per_param,
        kept_share=kept_share,
        over_aggressive=kept_share < over_aggressive_share,
        mode=cost.mode,
        n_points=cost.n_points,
        residual=cost.residual,
        over_aggressive_share=over_aggressive_share,
    )


def _require_amount(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0.0):
        raise ResourceError(f"{name} must be a finite number >= 0; got {value}")


def _require_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ResourceError(f"{name} must be a whole number >= 1; got {value!r}")
