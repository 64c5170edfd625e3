"""Staleness figure: a released blueprint's scores beside those of a local sample."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgrad.blueprint_coarse import is_coarse
from fastgrad.errors import FastgradError
from fastgrad.plots_base import (
    BLUE,
    GREY,
    ORANGE,
    SKY,
    VERMILION,
    far_below,
    matplotlib_module,
)
from fastgrad.rank_agreement import TOP
from fastgrad.release_noise import above_noise
from fastgrad.staleness import Staleness
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint


def staleness_plot(
    ax: Any,
    released: Blueprint,
    local: GradientStats,
    result: Staleness | None = None,
    *,
    name: str = "released",
    local_name: str = "local sample",
) -> None:
    """Rms gradients of whole parameters, released over local, both axes logarithmic.

    Submodules on one line parallel to the diagonal have the same ranks: the distance between the
    two is only the scale of the loss. Which ones are in the top 20 % of both, or of one alone, is
    what a selection depends on. Parameters that are dead in both are left out; those that are
    alive but far below the others are counted, outside the axes. The verdict is the title; each
    statistic stands beside what it needs: its bar (the same statistic between halves of a sample,
    and what the noise of a private release leaves of it) less the tolerance.

    Args:
        ax: matplotlib axes.
        released, local: what is compared.
        result: ``released.staleness(local)``, if it is there already.
        name, local_name: of the two, for the axes.

    Raises:
        FastgradError: if nothing can be compared, or ranks or deciles alone were released.
        StatsError: if the sample holds no backward pass.
    """
    matplotlib_module()
    if is_coarse(released.file):
        raise FastgradError(f"the blueprint holds {released.file.privacy.released} alone and no "
                            "gradient norm: there is nothing to draw. Remedy: the verdict and its "
                            "numbers, which need no more")  # fmt: skip
    result = released.staleness(local) if result is None else result
    x, y = _common(released, local)
    if x.size == 0:
        raise FastgradError("no submodule is alive in both: there is nothing to draw. Remedy: a "
                            "sample of the model that the blueprint is of")  # fmt: skip
    size = max(1, round(TOP * x.size))
    top_x, top_y = (np.isin(np.arange(x.size), np.argsort(-v, kind="stable")[:size])
                    for v in (x, y))  # fmt: skip
    shift = float(np.median(np.log(y / x)))
    moved = y * math.exp(-shift)
    low = min(far_below(x), far_below(moved))
    outside = (x < low) | (moved < low)
    ends = np.array([low / 1.6, max(x.max(), moved.max()) * 1.6])
    ax.plot(ends, ends * math.exp(shift), color=GREY, linestyle=":", linewidth=1.2, zorder=1,
            label="the same ranks")  # fmt: skip
    groups = (
        (~top_x & ~top_y, SKY, "o", "neither"), (top_x & top_y, BLUE, "o", "both"),
        (top_x & ~top_y, ORANGE, "v", f"{name} only"),
        (~top_x & top_y, VERMILION, "^", f"{local_name} only"),
    )  # fmt: skip
    for inside, colour, marker, label in groups:
        if inside.any():
            text = "others" if label == "neither" else f"top {TOP:.0%} of {label}"
            text += f": {int(inside.sum())}"
            if gone := int((inside & outside).sum()):
                text += f", {gone} far below"
            ax.plot(x[inside], y[inside], marker, color=colour, markeredgecolor="white",
                    markeredgewidth=0.6, markersize=7, zorder=3, label=text)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel=f"gradient rms, {name}",
           ylabel=f"gradient rms, {local_name}",
           title=f"{name} against {local_name}: {result.verdict}")  # fmt: skip
    ax.set_xlim(*ends)
    ax.set_ylim(*(ends * math.exp(shift)))
    ax.set_aspect("equal")
    ax.grid(color="#eeeeee", zorder=0)
    ax.set_axisbelow(True)
    ax.legend(loc="upper left", frameon=False, fontsize=9)
    # Ordinary spaces at the begin of a line and in a row are one in an SVG's text.
    table = statistics_text(result).replace(" ", "\u00a0")
    ax.text(0.98, 0.03, table, transform=ax.transAxes, ha="right", va="bottom",
            fontsize=9, family="monospace", linespacing=1.35)  # fmt: skip


def statistics_text(result: Staleness) -> str:
    """The statistics beside what they need, a line each; what could not be computed is a dash."""
    rows = []
    limits = result.limits or (None, None, None)
    for label, value, limit in (
        ("Spearman", result.spearman, limits[0]),
        ("weighted tau", result.weighted_tau, limits[1]),
        (f"top-{TOP:.0%} Jaccard", result.top_jaccard, limits[2]),
    ):
        own = "   -" if value is None else f"{value:.2f}"
        allowed = "   -" if limit is None else f"{limit:.2f}"
        sign = "- "
        if value is not None and limit is not None:
            sign = "< " if value < limit else ">="
        rows.append(f"{label:<16} {own} {sign} {allowed}")
    return "\n".join([f"{'':<16} agrees needs", *rows])


def _common(released: Blueprint, local: GradientStats) -> tuple[np.ndarray, np.ndarray]:
    """Rms of the parameters that both have and that are alive in either; of a private release
    those above its noise."""
    dead = set(released.dead) & set(local.dead)
    above = above_noise(released.file) or {}
    theirs = {n: float(v[0]) for n, v in released.scores("rms", "module").items()}
    x, y = [], []
    for name, norm, n in zip(local.names, local.grad_norm, local.numel, strict=True):
        if not above.get(name, True):
            continue
        if name in theirs and name not in dead and n and theirs[name] > 0 and norm > 0:
            x.append(theirs[name])
            y.append(float(norm) / math.sqrt(n))
    return np.array(x), np.array(y)


__all__ = ["staleness_plot", "statistics_text"]
