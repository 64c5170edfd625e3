"""Cost models and k*, against hand counts and numeric maximisation."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastgrad import resources
from fastgrad.errors import FastgradError, ResourceError
from fastgrad.resources import OVER_AGGRESSIVE_SHARE, CostModel, KStar, k_star

MATHS = Path(__file__).parents[1] / "docs" / "maths.md"


def page_says(*numbers: str) -> None:
    """Print each number and find it in the maths page, whatever the line breaks there."""
    text = re.sub(r"\s+", " ", MATHS.read_text(encoding="utf-8"))
    for number in numbers:
        print(number)
        assert number in text, f"docs/maths.md does not say {number!r}"


def model(fixed: float, per_param: float, n_params: int = 10**12) -> CostModel:
    return CostModel("memory", "bytes", fixed, per_param, n_params)


# --------------------------------------------------------------------------------------------
# Cost models


def test_memory_by_hand() -> None:
    cost = CostModel.memory(
        100, weight_bytes=2, grad_bytes=3, moment_bytes=5, master_bytes=7, activation_bytes=11
    )
    assert (cost.resource, cost.unit, cost.n_params) == ("memory", "bytes", 100)
    assert cost.fixed == 211
    assert cost.per_param == 1500
    assert cost.cost(0) == 211
    assert cost.cost(0.5) == 961
    assert cost.cost(1) == 1711


def test_memory_defaults_are_bf16_weights_with_packed_fp32_masters() -> None:
    cost = CostModel.memory(1000)
    assert cost.fixed == 2000
    assert cost.per_param == 1000 * (4 + 8 + 4)


def test_flops_by_hand() -> None:
    cost = CostModel.flops(100, tokens=7)
    assert (cost.resource, cost.unit) == ("flops", "FLOP")
    assert cost.fixed == 4 * 100 * 7
    assert cost.per_param == 2 * 100 * 7 + 14 * 100
    # All parameters: the familiar six operations per parameter and token, and the optimizer.
    assert cost.cost(1) == 6 * 100 * 7 + 14 * 100
    assert CostModel.flops(100, tokens=7, optimizer_flops=0).cost(1) == 6 * 100 * 7


def test_adamw_flops_are_those_of_the_update_rule() -> None:
    """Count the operations while the rule runs, and check the rule against its definition."""

    class Counted:
        operations = 0

        def __init__(self, value: float) -> None:
            self.value = value

        def _apply(self, value: float) -> Counted:
            Counted.operations += 1
            return Counted(value)

        def __mul__(self, other: Any) -> Counted:
            return self._apply(self.value * getattr(other, "value", other))

        def __add__(self, other: Any) -> Counted:
            return self._apply(self.value + getattr(other, "value", other))

        def __sub__(self, other: Any) -> Counted:
            return self._apply(self.value - getattr(other, "value", other))

        def __truediv__(self, other: Any) -> Counted:
            return self._apply(self.value / getattr(other, "value", other))

        def sqrt(self) -> Counted:
            return self._apply(math.sqrt(self.value))

    lr, b1, b2, eps, decay, step = 1e-3, 0.9, 0.99, 1e-8, 0.1, 3
    p, g, m, v = Counted(0.7), Counted(-0.3), Counted(0.05), Counted(0.02)
    # Factors that are the same for every parameter are computed once, so they are not counted.
    keep, rescale, size = 1 - lr * decay, 1 / math.sqrt(1 - b2**step), lr / (1 - b1**step)
    m = m * b1 + g * (1 - b1)
    v = v * b2 + g * g * (1 - b2)
    p = p * keep - m * size / (v.sqrt() * rescale + eps)
    assert Counted.operations == resources.ADAMW_FLOPS_PER_PARAM

    m_hat = (0.05 * b1 + -0.3 * (1 - b1)) / (1 - b1**step)
    v_hat = (0.02 * b2 + 0.09 * (1 - b2)) / (1 - b2**step)
    expected = 0.7 * (1 - lr * decay) - lr * m_hat / (math.sqrt(v_hat) + eps)
    assert p.value == pytest.approx(expected, rel=1e-14)


def test_numpy_scalars_become_plain_numbers() -> None:
    cost = CostModel.memory(np.int64(10), weight_bytes=np.float32(2.0))
    assert type(cost.n_params) is int
    assert type(cost.fixed) is float
    assert json.loads(json.dumps(cost.to_dict(), allow_nan=False)) == dataclasses.asdict(cost)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: model(-1, 1), "fixed must be a finite number >= 0; got -1"),
        (lambda: model(1, math.nan), "per_param must be a finite number"),
        (lambda: model(math.inf, 1), "fixed must be a finite number"),
        (lambda: model(0, 0), "a resource that costs nothing has no k"),
        (lambda: model(1, 1, 0), "n_params must be a whole number >= 1; got 0"),
        (lambda: CostModel.memory(10.5), "n_params must be a whole number"),  # type: ignore[arg-type]
        (lambda: CostModel.memory(True), "n_params must be a whole number"),
        (lambda: CostModel.memory(10, grad_bytes=-1), "grad_bytes must be a finite number"),
        (lambda: CostModel.memory(10, activation_bytes=math.nan), "activation_bytes must be"),
        (lambda: CostModel.flops(10, tokens=0), "tokens must be a whole number >= 1; got 0"),
        (lambda: CostModel.flops(10, tokens=1, optimizer_flops=-3), "optimizer_flops must be"),
        (lambda: model(1, 1).cost(1.5), r"k must lie in \[0, 1\]"),
        (lambda: model(1, 1).cost(math.nan), r"k must lie in \[0, 1\]"),
    ],
)
def test_impossible_numbers_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ResourceError, match=message):
        build()
    assert issubclass(ResourceError, FastgradError)


# --------------------------------------------------------------------------------------------
# Measured costs


@given(
    st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.lists(st.floats(0, 1), min_size=3, max_size=12)
)
def test_a_measured_line_is_found(fixed: float, per_param: float, ks: list[float]) -> None:
    assume(len(set(ks)) >= 3 and max(ks) - min(ks) > 0.01)
    cost = CostModel.time([(k, fixed + per_param * k) for k in ks], n_params=100)
    scale = 1e-9 * (fixed + per_param)
    assert cost.fixed == pytest.approx(fixed, abs=scale)
    assert cost.per_param == pytest.approx(per_param, abs=scale)
    assert (cost.resource, cost.unit, cost.mode) == ("time", "s", "measured")
    assert cost.n_points == len(ks)
    assert cost.residual is not None
    assert cost.residual <= scale


def test_the_residual_is_the_scatter_about_the_line() -> None:
    """Against NumPy's own fit, and the noise that was put in."""
    rng = np.random.default_rng(0)
    k = np.tile([0.05, 0.2, 0.5, 1.0], 500)
    joules = 40 + 25 * k + rng.normal(0, 2, k.size)
    cost = CostModel.energy(zip(k, joules, strict=True), n_params=10**6)
    slope, intercept = np.polyfit(k, joules, 1)
    assert (cost.fixed, cost.per_param) == pytest.approx((intercept, slope), rel=1e-10)
    assert cost.residual == pytest.approx(2, rel=0.05)
    assert (cost.resource, cost.unit, cost.n_points) == ("energy", "J", 2000)
    found = k_star(0.3, cost)
    assert (found.mode, found.n_points, found.residual) == ("measured", 2000, cost.residual)
    assert found.value == pytest.approx(0.3 * cost.fixed / (cost.per_param * 0.7))
    assert KStar(**json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_what_was_counted_does_not_claim_a_measurement() -> None:
    for cost in (CostModel.memory(10), CostModel.flops(10, tokens=3), model(1, 1)):
        assert (cost.mode, cost.n_points, cost.residual) == ("counted", None, None)
        assert k_star(0.2, cost).mode == "counted"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "0 measurements at 0 different fractions"),
        ([(0.1, 1.0), (0.1, 1.1), (0.9, 2.0)], "3 measurements at 2 different fractions.*Remedy"),
        ([(0.1, 1.0), (0.5, 1.1), (1.1, 2.0)], r"must lie in \[0, 1\]; got 1.1"),
        ([(0.1, 1.0), (0.5, 1.1), (math.nan, 2.0)], r"must lie in \[0, 1\]; got nan"),
        ([(0.1, 1.0), (0.5, 0.0), (1.0, 2.0)], "must be finite and above 0; got 0.0"),
        ([(0.1, 1.0), (0.5, math.inf), (1.0, 2.0)], "must be finite and above 0; got inf"),
        ([(0.1, 3.0), (0.5, 2.0), (1.0, 1.0)], "per_param = -2.2.*below 0.*Remedy: longer"),
        ([(0.5, 1.0), (0.7, 2.0), (1.0, 4.0)], "fixed = -2.1.*below 0"),
    ],
)
def test_no_coefficient_is_made_up(pairs: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(ResourceError, match=message):
        CostModel.time(pairs, n_params=10)


def test_mode_and_its_numbers_belong_together() -> None:
    for extra, message in (
        (("guessed",), "mode is 'counted' or 'measured'; got 'guessed'"),
        (("measured",), "has n_points and residual"),
        (("counted", 3, 0.1), "has no n_points"),
        (("measured", 0, 0.1), "n_points must be a whole number >= 1"),
        (("measured", 3, math.nan), "residual must be a finite number"),
    ):
        with pytest.raises(ResourceError, match=message):
            CostModel("time", "s", 1.0, 1.0, 10, *extra)


# --------------------------------------------------------------------------------------------
# k*

gammas = st.floats(0.01, 0.999)
amounts = st.floats(1e-3, 1e15)


def quotient(k: Any, gamma: float, cost: CostModel) -> Any:
    return k**gamma / (cost.fixed + cost.per_param * k)


@given(gammas, amounts, amounts)
def test_k_star_is_the_numeric_maximum(gamma: float, fixed: float, per_param: float) -> None:
    cost = model(fixed, per_param)
    found = k_star(gamma, cost)
    grid = np.geomspace(1 / cost.n_params, 1.0, 200_001)
    values = quotient(grid, gamma, cost)
    # No grid point does better, but for the rounding of a power and a quotient.
    assert quotient(found.value, gamma, cost) >= values.max() * (1 - 1e-13)
    # The maximum is flat, so its place is compared on logarithms with the grid's own curvature.
    step = math.log(grid[1] / grid[0])
    place = grid[values >= values.max() * (1 - 1e-13)]
    assert math.log(place[0]) - step <= math.log(found.value) <= math.log(place[-1]) + step
    assert found.kept_share == found.value**gamma
    assert 1 / cost.n_params <= found.value <= 1.0


@given(gammas, amounts, amounts)
def test_clamp_follows_the_stated_condition(gamma: float, fixed: float, per_param: float) -> None:
    ratio, limit = fixed / per_param, (1 - gamma) / gamma
    assume(abs(ratio / limit - 1) > 1e-9)  # at equality rounding decides
    found = k_star(gamma, model(fixed, per_param))
    if ratio >= limit:
        assert found.clamped
        assert found.value == 1.0
        assert "the fixed cost dominates" in found.reason
    elif ratio / limit >= 1e-11:
        assert not found.clamped
        assert found.value == pytest.approx(ratio / limit, rel=1e-12)
        assert "interior optimum" in found.reason


@given(gammas, amounts, amounts, st.floats(1e-6, 1e6))
def test_unit_of_the_resource_does_not_matter(
    gamma: float, fixed: float, per_param: float, unit: float
) -> None:
    assume(abs(gamma * fixed / (per_param * (1 - gamma)) - 1) > 1e-9)
    base = k_star(gamma, model(fixed, per_param))
    scaled = k_star(gamma, model(fixed * unit, per_param * unit))
    assert scaled.value == pytest.approx(base.value, rel=1e-12)
    assert scaled.clamped == base.clamped


@pytest.mark.parametrize("gamma", [1.0, 1.7])
def test_even_gradient_trains_everything(gamma: float) -> None:
    for cost in (model(1, 2), model(0, 2), model(1, 0)):
        found = k_star(gamma, cost)
        assert found.value == found.kept_share == 1.0
        assert found.clamped
        assert "not concentrated" in found.reason


def test_free_selection_trains_everything() -> None:
    found = k_star(0.3, model(5, 0))
    assert (found.value, found.clamped) == (1.0, True)
    assert "does not grow with k" in found.reason


def test_no_fixed_cost_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ResourceError, match=r"fixed cost is 0.*Remedy: put what is paid at k = 0"):
        k_star(0.5, model(0, 1))


def test_optimum_below_one_parameter_is_raised_to_one() -> None:
    found = k_star(0.5, model(1e-6, 1, n_params=1000))
    assert found.value == 1e-3
    assert found.clamped
    assert "below one of 1000 parameters" in found.reason
    assert found.over_aggressive


@pytest.mark.parametrize("gamma", [0.0, -0.5, math.nan, math.inf])
def test_impossible_gamma_is_refused(gamma: float) -> None:
    with pytest.raises(ResourceError, match="gamma must be a positive number"):
        k_star(gamma, model(1, 1))


def test_over_aggressive_is_below_half_the_mass() -> None:
    # gamma = 1/2 makes k* = fixed/per_param, and keeps its square root.
    assert not k_star(0.5, model(0.2501, 1)).over_aggressive
    assert k_star(0.5, model(0.2499, 1)).over_aggressive
    assert resources.OVER_AGGRESSIVE_SHARE == 0.5


def test_k_star_serialises_and_is_frozen() -> None:
    found = k_star(0.4, CostModel.memory(1000, activation_bytes=500))
    assert KStar(**json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.value = 0.1  # type: ignore[misc]


# --------------------------------------------------------------------------------------------
# The numbers of docs/maths.md


def test_page_k_star_examples() -> None:
    n = 7_000_000_000
    costs = {
        "memory, no activations": CostModel.memory(n),
        "memory, 40 GB of activations": CostModel.memory(n, activation_bytes=40e9),
        "FLOPs, 100 000 tokens": CostModel.flops(n, tokens=100_000),
    }
    for name, cost in costs.items():
        for gamma in (0.3, 0.5):
            found = k_star(gamma, cost)
            page_says(
                f"| {name} | {gamma} | {cost.fixed / cost.per_param:.3f} | {found.value:.3f} | "
                f"{100 * found.kept_share:.1f} % | {'yes' if found.clamped else 'no'} | "
                f"{'yes' if found.over_aggressive else 'no'} |"
            )
    # Per token 4N are fixed and 2N scale with k: interior only below gamma = 1/3.
    assert not k_star(0.333, costs["FLOPs, 100 000 tokens"]).clamped
    assert k_star(0.334, costs["FLOPs, 100 000 tokens"]).clamped


def test_page_memory_saved_at_7b() -> None:
    n = 7_000_000_000
    saved = []
    for grad, moments in ((0, 8), (4, 8)):
        cost = CostModel.memory(n, grad_bytes=grad, moment_bytes=moments, master_bytes=0)
        saved.append(f"{(cost.cost(1) - cost.cost(0.2)) / 1e9:.1f} GB")
    page_says(*saved)
    assert saved == ["44.8 GB", "67.2 GB"]


def test_the_share_that_is_warned_of_is_a_choice():
    cost = model(1.0, 8.0, n_params=10**6)
    by_default = k_star(0.5, cost)
    assert by_default.over_aggressive_share == OVER_AGGRESSIVE_SHARE == 0.5
    assert by_default.over_aggressive
    kept = by_default.kept_share
    assert kept == pytest.approx(math.sqrt(0.125))
    assert not k_star(0.5, cost, over_aggressive_share=kept * 0.999).over_aggressive
    assert k_star(0.5, cost, over_aggressive_share=kept * 1.001).over_aggressive
    assert not k_star(0.5, cost, over_aggressive_share=0.0).over_aggressive
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ResourceError, match=r"over_aggressive_share must lie in \[0, 1\]"):
            k_star(0.5, cost, over_aggressive_share=bad)
