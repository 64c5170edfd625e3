"""Figures: where gradient mass sits, and what each way to train costs. Needs matplotlib.

Colours are the Okabe-Ito palette, viridis and cividis, which colour-blind readers can tell apart;
groups also differ by marker.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgrad.errors import FastgradError
from fastgrad.heavytail import GammaFit, LorenzCurve
from fastgrad.plots_base import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    far_below,
    literal,
    matplotlib_module,
    new_figure,
    open_axes,
    percent,
    plain_log_ticks,
    save_figure,
    within,
    write_figure,
)
from fastgrad.plots_staleness import staleness_plot
from fastgrad.plots_tail import rank_size_plot

if TYPE_CHECKING:
    from fastgrad.blueprint_schema import Gamma
    from fastgrad.plots_blueprint import blueprint_figure, domains_figure

_ABSENT = "#e4e4e4"
_MANY = 12  # ticks on an axis of the heat map


@dataclass(frozen=True)
class ArmPoint:
    """One way to train, as a point: what it used, and the loss that it reached.

    Attributes:
        group: name in the legend; points of one group share colour and marker.
        resource: amount used, in the unit of the axis.
        loss: held-out loss.
    """

    group: str
    resource: float
    loss: float


# -- Lorenz curve ------------------------------------------------------------------------


def lorenz_plot(
    ax: Any, curve: LorenzCurve, gamma_fit: GammaFit | Gamma, *, what: str = "squared gradient norm"
) -> None:
    """Share of gradient mass in the densest fraction of parameters, with ``k^gamma`` beside it.

    Args:
        ax: matplotlib axes.
        curve, gamma_fit: of the same mass, see :func:`fastgrad.heavytail.lorenz` and
            :func:`fastgrad.heavytail.fit_gamma`; or the latter as a blueprint has it.
        what: the mass, for the axis label.
    """
    matplotlib_module()
    k = np.linspace(0, 1, 401)
    low, high = (math.nan if end is None else end for end in gamma_fit.gamma_interval)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2, label="spread evenly")
    if math.isfinite(low) and math.isfinite(high):
        ax.fill_between(k, k**low, k**high, color=ORANGE, alpha=0.25, linewidth=0)
    # How far off it is stands beside it: often no single exponent describes the curve.
    ax.plot(k, k**gamma_fit.gamma, color=ORANGE, linestyle="--", linewidth=1.8,
            label=f"fit $k^\\gamma$, $\\gamma$ = {gamma_fit.gamma:.2f} "
                  f"[{low:.2f}, {high:.2f}], off by up to {gamma_fit.max_deviation:.0%}")
    at = 0.2
    share = float(curve.share_at(at))
    ax.plot(curve.k, curve.share, color=BLUE, linewidth=2.2,
            label=f"measured: the top {at:.0%} hold {share:.0%}")  # fmt: skip
    ax.plot([at, at, 0], [0, share, share], color=BLUE, linewidth=0.9, alpha=0.6)
    ax.plot([at], [share], "o", color=BLUE, markersize=5)
    ax.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="fraction of parameters, densest first",
           ylabel=f"share of {what}", title="Concentration (Lorenz curve)")  # fmt: skip
    percent(ax.xaxis)
    percent(ax.yaxis)
    legend = ax.legend(loc="lower right", frameon=True, framealpha=0.85, fontsize=9)
    legend.get_frame().set_linewidth(0)  # in small axes lines pass below it


# -- heat map ----------------------------------------------------------------------------

_INDEX = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


def place(names: Sequence[str]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Where each parameter goes in a module x layer table.

    The first number in a name is its layer, what follows its module; names without a number
    come before or after the layers, as in the model.

    Returns:
        Row labels, column labels, and parameter name -> (row, column).
    """
    matches = {name: _INDEX.match(name) for name in names}
    layers = sorted({int(m[1]) for m in matches.values() if m})
    first = next((i for i, name in enumerate(names) if matches[name]), len(names))
    before = any(not matches[name] for name in names[:first])
    after = any(not matches[name] for name in names[first:])
    columns = ["in"] * before + [str(layer) for layer in layers] + ["out"] * after
    column_of = {layer: i + before for i, layer in enumerate(layers)}
    rows: list[str] = []
    cells: dict[str, tuple[int, int]] = {}
    for i, name in enumerate(names):
        match = matches[name]
        module = short(match[2]) if match else short(name)
        if module not in rows:
            rows.append(module)
        if match:
            column = column_of[int(match[1])]
        else:
            column = 0 if i < first else len(columns) - 1
        cells[name] = (rows.index(module), column)
    return rows, columns, cells


def short(module: str) -> str:
    """A module's name as a tick label: its last two parts, without the usual suffix."""
    module = module.removesuffix(".weight")
    for word in ("model.", "transformer.", "self_attn.", "attention.self.", "mlp."):
        module = module.removeprefix(word)
    return module


def _every(labels: Sequence[str], most: int) -> list[int]:
    return list(range(0, len(labels), max(1, math.ceil(len(labels) / most))))


def _layers_shown(labels: Sequence[str]) -> list[int]:
    """All columns where there is room; else every second, fifth, tenth, ... layer."""
    if len(labels) <= _MANY:
        return list(range(len(labels)))
    numbers = {i: int(label) for i, label in enumerate(labels) if label.isdigit()}
    for step in (m * 10**e for e in range(10) for m in (1, 2, 5)):
        shown = [i for i, number in numbers.items() if number % step == 0]
        if len(shown) <= _MANY:
            return shown
    return _every(labels, _MANY)


def heat_map(
    ax: Any,
    names: Sequence[str],
    values: Sequence[float],
    *,
    label: str = "gradient rms",
    marked: Mapping[str, float] | None = None,
) -> None:
    """Influence of each parameter by module and layer, on a logarithmic colour scale.

    Of many values the outermost 2 % on either side have the colour of the scale's end, which is an
    arrow then. Grey is a parameter without a gradient, white a place where there is no parameter.

    Args:
        ax: matplotlib axes.
        names: parameter names as the model has them, in its order.
        values: one value each; zero and NaN are drawn as not measured.
        label: what the values are, for the colour bar.
        marked: names -> share selected; these cells get a dot, smaller for a partial selection.

    Raises:
        FastgradError: if names and values differ in number, or no value is positive.
    """
    matplotlib_module()
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    if len(names) != len(values):
        raise FastgradError(f"{len(names)} names but {len(values)} values")
    rows, columns, cells = place(names)
    table = np.full((len(rows), len(columns)), np.nan)
    for name, value in zip(names, values, strict=True):
        if value > 0:
            table[cells[name]] = value
    if np.isnan(table).all():
        raise FastgradError("no value is positive: there is nothing to draw")
    colours = colormaps["viridis"].with_extremes(bad=(0, 0, 0, 0))
    low, high = within(table[np.isfinite(table)])
    low = max(low, far_below(table[np.isfinite(table)]))
    high = high if high > low else low * 1.01
    gap = min(1.0, 24 / max(table.shape))  # between cells; as wide as thin ones it would hide them
    norm = LogNorm(low, high)
    mesh = ax.pcolormesh(
        np.ma.masked_invalid(table), cmap=colours, norm=norm, edgecolor="white", linewidth=gap
    )
    named = np.zeros(table.shape, dtype=bool)
    for cell in cells.values():
        named[cell] = True
    blank = named & ~np.isfinite(table)
    if blank.any():
        ax.pcolormesh(np.ma.masked_where(~blank, np.ones(table.shape)), edgecolor="white",
                      linewidth=gap, cmap=ListedColormap([_ABSENT]))  # fmt: skip
    ax.invert_yaxis()
    for axis, labels in ((ax.xaxis, columns), (ax.yaxis, rows)):
        shown = _layers_shown(labels) if axis is ax.xaxis else _every(labels, 2 * _MANY)
        axis.set_ticks([i + 0.5 for i in shown], [literal(labels[i]) for i in shown])
        axis.set_tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    for name, share in (marked or {}).items():
        if name in cells and share > 0:
            row, column = cells[name]
            light = norm(table[row, column]) < 0.55 if np.isfinite(table[row, column]) else False
            ax.plot(column + 0.5, row + 0.5, "o", markersize=2 + 4 * math.sqrt(share),
                    color="white" if light else "black")  # fmt: skip
    title = "Influence by module and layer"
    ax.set(xlabel="layer" + (" (grey: no gradient)" if blank.any() else ""),
           title=title + (" (dot: selected)" if marked else ""))  # fmt: skip
    under, over = float(np.nanmin(table)) < low, float(np.nanmax(table)) > high
    ends = "both" if under and over else "min" if under else "max" if over else "neither"
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, extend=ends)
    plain_log_ticks(bar.ax.yaxis, low, high)
    bar.set_label(label)
    bar.outline.set_visible(False)


# -- loss against resource ---------------------------------------------------------------


def pareto_plot(
    ax: Any,
    arms: Sequence[ArmPoint],
    *,
    xlabel: str = "resource used",
    title: str = "Loss against resource",
    before: float | None = None,
    legend: bool = True,
) -> None:
    """Held-out loss of each arm over what it used; lower left is better.

    A thin line joins the arms that no other arm beats in both.

    Args:
        ax: matplotlib axes.
        arms: the points.
        xlabel: the resource and its unit.
        title: of the axes.
        before: loss before training, drawn as a line or, if far above, given in words.
        legend: name the groups inside the axes.

    Raises:
        FastgradError: if there is no arm.
    """
    matplotlib_module()
    if not arms:
        raise FastgradError("there is no arm to draw")
    front = pareto_front(arms)
    ax.step([a.resource for a in front], [a.loss for a in front], where="post", color=GREY,
            linewidth=1.0, zorder=1, label="not beaten in both")  # fmt: skip
    groups = list(dict.fromkeys(a.group for a in arms))
    for i, group in enumerate(groups):
        points = [a for a in arms if a.group == group]
        marker = MARKERS[i % len(MARKERS)]
        ax.scatter(
            [a.resource for a in points], [a.loss for a in points], label=group,
            color=COLOURS[i % len(COLOURS)], marker=marker, s=150 if marker == "*" else 60,
            edgecolor="white", linewidth=0.8, zorder=3,
        )  # fmt: skip
    ax.margins(0.08)
    if min(a.resource for a in arms) >= 0:
        ax.set_xlim(left=0)  # savings are read as lengths
    ax.set(xlabel=xlabel, ylabel="held-out loss (nats per token)", title=title)
    if before is not None:
        _mark_before(ax, before, [a.loss for a in arms])
    ax.grid(color="#eeeeee", zorder=0)
    ax.set_axisbelow(True)
    if legend:
        ax.legend(frameon=False, fontsize=9)


def _mark_before(ax: Any, before: float, losses: Sequence[float]) -> None:
    """The loss before training: a line if it is near, else words, so that arms stay apart."""
    spread = max(losses) - min(losses)
    if before - max(losses) <= max(spread, 1e-9):
        ax.axhline(before, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
        where: dict[str, Any] = {"xy": (0.99, before), "xycoords": ("axes fraction", "data")}
        text = "before adaptation"
    else:
        where = {"xy": (0.99, 1.0), "xycoords": "axes fraction"}
        text = f"before adaptation: {before:.2f}, above this axis"
        ax.set_ylim(top=max(losses) + 0.15 * max(spread, 1e-9))  # room for the words
    ax.annotate(text, **where, xytext=(0, -4), textcoords="offset points", ha="right", va="top",
                color=GREY, fontsize=9)  # fmt: skip


def pareto_front(arms: Sequence[ArmPoint]) -> list[ArmPoint]:
    """Arms that no other arm beats in both resource and loss, cheapest first."""
    front: list[ArmPoint] = []
    for arm in sorted(arms, key=lambda a: (a.resource, a.loss)):
        if not front or arm.loss < front[-1].loss:
            front.append(arm)
    return front


# -- all of it ---------------------------------------------------------------------------


def summary_figure(
    *,
    curve: LorenzCurve,
    gamma_fit: GammaFit,
    names: Sequence[str],
    values: Sequence[float],
    panels: Mapping[str, Sequence[ArmPoint]],
    before: float | None = None,
    marked: Mapping[str, float] | None = None,
    title: str = "",
    what: str = "squared gradient norm",
    value_label: str = "gradient rms",
) -> Any:
    """Lorenz curve, heat map, and one panel of loss against each resource.

    Args:
        curve, gamma_fit, what: see :func:`lorenz_plot`.
        names, values, marked, value_label: see :func:`heat_map`.
        panels: resource label with unit -> the arms' points.
        before: see :func:`pareto_plot`.
        title: of the figure.

    Returns:
        A matplotlib ``Figure``, for :func:`save_figure`.
    """
    figure = new_figure(12.5, 9.5)
    top, bottom, foot = figure.subfigures(3, 1, height_ratios=(1, 1, 0.16))
    left, right = top.subplots(1, 2)
    lorenz_plot(left, curve, gamma_fit, what=what)
    heat_map(right, names, values, label=value_label, marked=marked)
    axes = np.atleast_1d(bottom.subplots(1, max(len(panels), 1), sharey=True))
    for ax, (label, arms) in zip(axes, panels.items(), strict=False):
        pareto_plot(ax, arms, xlabel=label, title=f"Loss against {label.split(' (')[0]}",
                    before=before, legend=False)  # fmt: skip
        if ax is not axes[0]:
            ax.set_ylabel("")
    handles, labels = axes[0].get_legend_handles_labels()
    foot.legend(handles, labels, loc="center", ncols=4, frameon=False, fontsize=10)
    open_axes(left, *axes)
    if title:
        figure.suptitle(title, fontsize=13)
    return figure


def __getattr__(name: str) -> Any:
    # These put together what is drawn here, so their module imports this one.
    if name in ("blueprint_figure", "domains_figure"):
        from fastgrad import plots_blueprint

        return getattr(plots_blueprint, name)
    raise AttributeError(f"module 'fastgrad.plots' has no attribute {name!r}")


__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "SKY",
    "VERMILION",
    "YELLOW",
    "ArmPoint",
    "blueprint_figure",
    "domains_figure",
    "heat_map",
    "lorenz_plot",
    "new_figure",
    "pareto_front",
    "pareto_plot",
    "place",
    "rank_size_plot",
    "save_figure",
    "short",
    "staleness_plot",
    "summary_figure",
    "write_figure",
]
