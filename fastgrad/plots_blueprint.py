"""Figures of a whole blueprint, and of the domains that one holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from fastgrad.blueprint_coarse import is_coarse
from fastgrad.errors import FastgradError
from fastgrad.heavytail import LorenzCurve, lorenz
from fastgrad.plots import heat_map, lorenz_plot, short
from fastgrad.plots_base import (
    BLUE,
    COLOURS,
    GREY,
    MARKERS,
    literal,
    new_figure,
    open_axes,
    percent,
)
from fastgrad.plots_tail import rank_size_plot

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint

_LINES = ("-", "--", "-.", ":")
_SHOWN = 14  # submodules in the figure of several domains


def blueprint_figure(blueprint: Blueprint, *, title: str | None = None) -> Any:
    """Lorenz curve, rank-size and heat map of one blueprint; of several domains the primary one.

    Args:
        title: of the figure; by default the model's name and what the data is about.

    Returns:
        A matplotlib ``Figure``, for :func:`fastgrad.plots.save_figure`.

    Raises:
        FastgradError: if no gradient was measured, or ranks or deciles alone were released.
        MissingExtraError: without matplotlib.
    """
    file = blueprint.file
    entries = blueprint.submodules
    if is_coarse(file):
        raise FastgradError(f"the blueprint holds {file.privacy.released} alone and no gradient "
                            "norm: there is nothing to draw. Remedy: the file that they were "
                            "made of, if it may be shown")  # fmt: skip
    if file.fits is None or not any(s.grad_norm for s in entries):
        raise FastgradError("the blueprint holds no gradient: there is nothing to draw. Remedy: "
                            "measure with batches that have a loss")  # fmt: skip
    rows = len({_module(s.name) for s in entries})
    figure = new_figure(12.5, 4.6 + max(3.2, 0.24 * min(rows, 24) + 1.2))
    top, bottom = figure.subfigures(2, 1, height_ratios=(4.6, figure.get_figheight() - 4.6))
    left, right = top.subplots(1, 2)
    fit = file.fits.squared_norm
    lorenz_plot(left, curve_of(blueprint), fit.gamma)
    if file.fits.norm.tail is not None:
        rank_size_plot(right, tail_values(blueprint), file.fits.norm.tail)
    else:
        right.set_axis_off()
        right.text(0.5, 0.5, "no tail was fitted", ha="center", color=GREY)
    ax = bottom.subplots()
    heat_map(ax, [s.name for s in entries], rms_values(blueprint))
    open_axes(left, right)
    figure.suptitle(literal(_title(blueprint)) if title is None else title, fontsize=13)
    return figure


def domains_figure(blueprint: Blueprint, *, title: str | None = None) -> Any:
    """What a blueprint's domains have in common: Lorenz curves, the submodules with the largest
    shares of the squared gradient norm in each domain, and how far the ranks agree.

    Args:
        title: of the figure.

    Returns:
        A matplotlib ``Figure``, for :func:`fastgrad.plots.save_figure`.

    Raises:
        FastgradError: if there is one domain only.
        MissingExtraError: without matplotlib.
    """
    domains = blueprint.domains
    if len(domains) < 2:
        raise FastgradError("the blueprint holds one domain. Remedy: with_domain(other)")
    labels = [literal(" + ".join(d.domain_tags)) or "primary" for d in domains]
    figure = new_figure(15.5, 5.4)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.15, 0.9))
    _curves(left, domains, labels)
    _shares(middle, domains, labels)
    _agreement(right, domains, labels)
    open_axes(left, middle)
    figure.suptitle(title or f"{literal(_model(blueprint))}: {len(domains)} domains", fontsize=13)
    return figure


def _curves(ax: Any, domains: Sequence[Blueprint], labels: Sequence[str]) -> None:
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2, label="spread evenly")
    for i, (domain, label) in enumerate(zip(domains, labels, strict=True)):
        curve = curve_of(domain)
        ax.plot(curve.k, curve.share, color=_colour(i), linestyle=_LINES[i % len(_LINES)],
                linewidth=2.0, label=f"{label}: top 20% hold {float(curve.share_at(0.2)):.0%}",
                )  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="fraction of parameters, densest first",
           ylabel="share of squared gradient norm", title="Concentration")  # fmt: skip
    percent(ax.xaxis)
    percent(ax.yaxis)
    ax.legend(loc="lower right", frameon=False, fontsize=9)


def _shares(ax: Any, domains: Sequence[Blueprint], labels: Sequence[str]) -> None:
    shares = [{s.name: s.share or 0.0 for s in d.submodules} for d in domains]
    largest = {n: max(of.get(n, 0.0) for of in shares) for of in shares for n in of}
    shown = sorted(largest, key=lambda n: -largest[n])[:_SHOWN]
    place = np.arange(len(shown))
    table = np.array([[of.get(n, 0.0) for n in shown] for of in shares])
    ax.hlines(place, table.min(0), table.max(0), color="#c4c4c4", linewidth=2.0, zorder=1)
    for i, label in enumerate(labels):
        # The first is larger, so that it is seen behind another at the same place.
        ax.plot(table[i], place, _marker(i), color=_colour(i), markersize=6 if i else 9.5,
                markeredgecolor="white", markeredgewidth=0.6, label=label, zorder=3)  # fmt: skip
    ax.set_yticks(place, [literal(_label(n)) for n in shown], fontsize=8.5)
    ax.invert_yaxis()
    ax.set(xlabel="share of squared gradient norm", xlim=(0, None),
           title=f"Largest shares ({len(shown)} of {len(largest)} submodules)")  # fmt: skip
    percent(ax.xaxis)
    ax.grid(axis="x", color="#eeeeee", zorder=0)
    ax.set_axisbelow(True)
    ax.legend(loc="lower right", frameon=False, fontsize=9)


def _agreement(ax: Any, domains: Sequence[Blueprint], labels: Sequence[str]) -> None:
    """Spearman of rms scores between domains; on the diagonal that between halves of the sample."""
    n = len(domains)
    scores = [d.scores("rms", "module") for d in domains]
    dead = [set(d.dead) for d in domains]
    table = np.full((n, n), np.nan)
    for i in range(n):
        half = domains[i].split_half
        if half is not None:
            table[i, i] = half.spearman
        for j in range(i):
            common = [m for m in scores[i] if m in scores[j] and m not in dead[i] & dead[j]]
            if len(common) > 2:
                found = spearmanr([scores[i][m][0] for m in common],
                                  [scores[j][m][0] for m in common])  # fmt: skip
                table[i, j] = table[j, i] = float(found.statistic)
    # Ranks that agree are dark; a scale from zero would paint almost all there is in one colour.
    known = table[np.isfinite(table)]
    low = min(0.9, math.floor(10 * float(known.min())) / 10) if known.size else 0.0
    mesh = ax.pcolormesh(np.ma.masked_invalid(table), cmap="cividis_r", vmin=low, vmax=1,
                         edgecolor="white", linewidth=1.0)  # fmt: skip
    ax.set_facecolor("white")
    for i in range(n):
        for j in range(n):
            value = table[i, j]
            dark = np.isfinite(value) and (value - low) / (1 - low) > 0.5
            ax.text(j + 0.5, i + 0.5, f"{value:.3f}" if np.isfinite(value) else "-", ha="center",
                    va="center", color="white" if dark else "black",
                    fontsize=12 if n <= 4 else 8)  # fmt: skip
    middle = np.arange(n) + 0.5
    ax.set_xticks(middle, labels, rotation=0 if n <= 3 else 45, ha="center" if n <= 3 else "right")
    ax.set_yticks(middle, labels)
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.set_aspect("equal")
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title("Agreement of ranks (Spearman of rms)")
    ax.set_xlabel("on the diagonal: halves of one sample")
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.03, shrink=0.7)
    bar.outline.set_visible(False)


def tail_values(blueprint: Blueprint) -> list[float]:
    """Gradient norms of the submodules as the tail fit took them: zero where it is rounding."""
    dead = set(blueprint.dead)
    return [0.0 if s.name in dead else s.grad_norm for s in blueprint.submodules
            if s.grad_norm is not None and s.numel]  # fmt: skip


def rms_values(blueprint: Blueprint) -> list[float]:
    """Rms gradients of all submodules; zero where none was measured, or rounding alone."""
    dead = set(blueprint.dead)
    return [0.0 if s.name in dead else s.rms or 0.0 for s in blueprint.submodules]


def curve_of(blueprint: Blueprint) -> LorenzCurve:
    """Of the whole model: what was not measured counts with mass zero."""
    entries = [s for s in blueprint.submodules if s.numel]
    sizes = [s.numel for s in entries]
    mass = [(s.grad_norm or 0.0) ** 2 for s in entries]
    if (rest := blueprint.n_model_parameters - sum(sizes)) > 0:
        sizes, mass = [*sizes, rest], [*mass, 0.0]
    return lorenz(mass, sizes)


def _title(blueprint: Blueprint) -> str:
    tags = ", ".join(blueprint.domain_tags)
    return _model(blueprint) + (f": {tags}" if tags else "")


def _model(blueprint: Blueprint) -> str:
    model = blueprint.file.model
    return (model.name_or_path or model.class_name or "a model").rpartition("/")[2]


def _module(name: str) -> str:
    from fastgrad.plots import place

    return place([name])[0][0]


def _label(name: str) -> str:
    """``3 output.dense`` of ``encoder.layer.3.output.dense.weight``."""
    from fastgrad.selection import layer_of

    layer = layer_of(name)
    number = layer.rpartition(".")[2]
    if number.isdigit():
        return f"layer {number}  {short(name[len(layer) + 1 :])}"
    return short(name)


def _colour(i: int) -> str:
    return (BLUE, *COLOURS[3:], *COLOURS[:3])[i % (len(COLOURS) + 1)]


def _marker(i: int) -> str:
    return MARKERS[1:][i % (len(MARKERS) - 1)]


__all__ = ["blueprint_figure", "curve_of", "domains_figure", "rms_values", "tail_values"]
