"""Rank-size figure: values in descending order, and the power law that was fitted to their tail."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastgrad.dead import DEAD_RELATIVE
from fastgrad.errors import FastgradError
from fastgrad.heavytail import TailFit
from fastgrad.plots_base import (
    BLUE,
    GREY,
    ORANGE,
    far_below,
    matplotlib_module,
    plain_log_ticks,
)

if TYPE_CHECKING:
    from fastgrad.blueprint_schema import Tail

TITLES = {
    "supported": "a power law is supported",
    "indistinguishable": "a power law, or something else",
    "rejected": "no power law",
    "too_few": "too few for a power law",
}


def rank_size_plot(
    ax: Any,
    values: npt.ArrayLike,
    fit: TailFit | Tail,
    *,
    what: str = "gradient norm",
    unit: str = "submodules",
) -> None:
    """Values by rank, both axes logarithmic, with the tail fit, where it begins and its verdict.

    On these axes a power law is a straight line of slope minus the rank exponent. The line is that
    of maximum likelihood, ``x = xmin (r / n_tail)^-a``, drawn where it was fitted; it is dashed
    unless the verdict is ``supported``. Thin lines through the same end have the slopes at the
    ends of its interval. Dead values are left out, and counted; so are those that are alive but
    far below the others, which would take the axis for themselves.

    Args:
        ax: matplotlib axes.
        values: ``[n]``, not negative, zero where dead; NaN is left out.
        fit: of these values, by :func:`fastgrad.heavytail.fit_tail` or as a blueprint has it.
        what: the values, for the axis label.
        unit: what has a rank.

    Raises:
        FastgradError: if no value is positive, or the fit is of other values.
    """
    matplotlib_module()
    x = np.asarray(values, dtype=np.float64)
    x = np.sort(x[np.isfinite(x)])[::-1]
    if not (x > 0).any():
        raise FastgradError("no value is positive: there is nothing to draw")
    live = x[x / x[0] >= DEAD_RELATIVE]
    if live.size != fit.n:
        raise FastgradError(f"the fit is of {fit.n} live values, but {live.size} are given")
    rank = np.arange(1, live.size + 1)
    tail, exponent = fit.n_tail, _number(fit.rank_exponent)
    xmin = _number(fit.xmin)
    known = math.isfinite(exponent) and math.isfinite(xmin) and tail > 0
    inside = rank <= tail if known else np.ones(live.size, dtype=bool)
    dead = x.size - live.size
    low = far_below(live)
    below = int((live < low).sum())
    label = f"{live.size} {unit}" + (f", {below} far below" if below else "")
    label += f", {dead} dead left out" if dead else ""
    ax.plot(rank[inside], live[inside], "o", color=BLUE, markersize=5, label=label, zorder=3)
    ax.plot(rank[~inside], live[~inside], "o", color=BLUE, markersize=5, markerfacecolor="white",
            zorder=3)  # fmt: skip
    if known:
        _draw_fit(ax, fit, exponent, xmin)
    p = _number(fit.gof_p)
    title = f"Rank-size: {TITLES[fit.verdict]}"
    if math.isfinite(p):
        title += f" (fit p = {p:.2g})"
    ax.set(xscale="log", yscale="log", xlabel=f"rank among {unit}", ylabel=what, title=title)
    ends = low / 1.6, float(live[0]) * 1.6
    ax.set_ylim(*ends)
    plain_log_ticks(ax.yaxis, *ends)
    ax.set_xlim(0.85, live.size * 1.18)
    _plain_ranks(ax, live.size)
    ax.grid(color="#eeeeee", zorder=0)
    ax.set_axisbelow(True)
    ax.legend(loc="lower left", frameon=False, fontsize=9)


def _draw_fit(ax: Any, fit: TailFit | Tail, a: float, xmin: float) -> None:
    """The line over the tail, the ends of its interval, and where the tail begins."""
    tail = fit.n_tail
    r = np.geomspace(1, tail, 100)
    low, high = map(_number, fit.rank_interval)
    text = f"tail fit, rank exponent {a:.2f}"
    if math.isfinite(low) and math.isfinite(high):
        # Lines, no area: all of them meet at xmin, so a wide interval would fill the axes.
        for end in (low, high):
            ax.plot(r, xmin * (r / tail) ** -end, color=ORANGE, linewidth=0.8, alpha=0.8, zorder=1)
        text += f" [{low:.2f}, {high:.2f}]"
    dash = "-" if fit.verdict == "supported" else "--"
    ax.plot(r, xmin * (r / tail) ** -a, color=ORANGE, linestyle=dash, linewidth=2.0, label=text,
            zorder=2)  # fmt: skip
    ax.axhline(xmin, color=GREY, linestyle=":", linewidth=1.2, zorder=1,
               label=f"the tail begins: xmin = {xmin:.3g}, {tail} of {fit.n}")  # fmt: skip


def _plain_ranks(ax: Any, n: int) -> None:
    """1, 2, 5, 10, ... instead of powers of ten."""
    from matplotlib.ticker import NullLocator

    ticks = [m * 10**e for e in range(8) for m in (1, 2, 5) if m * 10**e <= n]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


__all__ = ["TITLES", "rank_size_plot"]
