"""What all figures share: colours, a canvas without a window, and files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgrad.errors import FastgradError, MissingExtraError
from fastgrad.files import atomic_path

#: Okabe-Ito palette.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
GREY = "#767676"
#: In this order series differ most, in lightness too; markers differ with them.
COLOURS = (BLACK, BLUE, SKY, ORANGE, VERMILION, GREEN, PURPLE, YELLOW)
MARKERS = ("*", "o", "s", "v", "D", "P", "X", "^")

#: So many times smaller than the median is far below.
FAR = 1e3

_KINDS = (".png", ".svg")


def matplotlib_module() -> Any:
    """The package, with what figures need.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots") from error
    return matplotlib


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches that needs no window system.

    Raises:
        MissingExtraError: without matplotlib.
    """
    matplotlib = matplotlib_module()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def open_axes(*axes: Any) -> None:
    """Take away the lines above and to the right, which say nothing."""
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


def far_below(values: npt.NDArray[np.float64]) -> float:
    """Where a logarithmic axis of these positive values ends: below it lie outliers (gradients at
    rounding level), which would take most of the axis from the others."""
    return float(values[values >= np.median(values) / FAR].min())


def percent(axis: Any) -> None:
    """Label shares as percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def save_figure(figure: Any, path: str | os.PathLike[str], *, dpi: int = 150) -> list[Path]:
    """Write a figure as PNG and as SVG, each atomically.

    The same figure gives the same bytes with the same matplotlib: no date, no program name, and
    ids in the SVG that come from its content. Text in the SVG is drawn as outlines, so that it
    looks the same everywhere.

    Args:
        path: with or without ``.png`` or ``.svg``.
        dpi: of the PNG.

    Returns:
        The two paths.

    Raises:
        FastgradError: if the name ends otherwise, as in ``figure.pdf``.
        MissingExtraError: without matplotlib.
        OSError: if the files cannot be written.
    """
    matplotlib = matplotlib_module()
    path = Path(path)
    if path.suffix.lower() in (".pdf", ".jpg", ".jpeg", ".eps", ".ps", ".webp", ".tif", ".tiff"):
        raise FastgradError(f"{path.name}: figures are written as PNG and SVG. Remedy: leave the "
                            "ending out, or figure.savefig")  # fmt: skip
    stem = path.with_suffix("") if path.suffix.lower() in _KINDS else path
    written = []
    nameless: dict[str, dict[str, None]] = {
        ".png": {"Software": None}, ".svg": {"Date": None, "Creator": None},
    }  # fmt: skip
    with matplotlib.rc_context({"svg.hashsalt": "fastgrad", "svg.fonttype": "path"}):
        for kind in _KINDS:
            target = stem.with_name(stem.name + kind)
            with atomic_path(target) as temporary:
                figure.savefig(temporary, format=kind[1:], dpi=dpi, metadata=nameless[kind])
            written.append(target)
    return written


__all__ = ["far_below", "new_figure", "open_axes", "percent", "save_figure"]
