"""What all figures share: colours, a canvas without a window, and files."""

from __future__ import annotations

import math
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

#: Of files, by their endings.
KINDS = (".png", ".svg")


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


def within(values: npt.NDArray[np.float64], share: float = 0.02) -> tuple[float, float]:
    """Ends of a scale for these values: of fifty or more the outermost ``share`` on either side
    lies outside, so that one outlier does not take the scale from all others."""
    low = np.percentile(values, 100 * share, method="lower")
    high = np.percentile(values, 100 * (1 - share), method="higher")
    return float(low), float(high)


def plain_log_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks of a logarithmic axis that a reader can tell apart: 1, 2, 5, 10, ... where it spans
    less than two and a half decades, powers of ten where it spans more, and evenly spaced numbers
    where those leave less than two."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    every = max(1, (last - first) // 8)
    ticks = [m * 10.0**e for e in range(first, last + 1, every) for m in steps]
    shown = [t for t in ticks if low <= t <= high]
    if len(shown) < 2:
        shown = [t for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    axis.set_major_locator(FixedLocator(shown))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda t, _: _plain(t)))


def _plain(value: float) -> str:
    """``0.02`` and ``50``, but powers of ten of what would be mostly zeros."""
    if not value > 0:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    if -3 <= exponent <= 3:
        return f"{value:g}"
    first = f"{value / 10.0**exponent:.3g}"
    return (f"${first}\\times " if first != "1" else "$") + f"10^{{{exponent}}}$"


def literal(text: str) -> str:
    """Text of a file, in which a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def percent(axis: Any) -> None:
    """Label shares as percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def save_figure(figure: Any, path: str | os.PathLike[str], *, dpi: int = 150) -> list[Path]:
    """Write a figure as PNG and as SVG, each atomically.

    The same figure gives the same bytes with the same matplotlib: no date, no program name, and
    ids in the SVG that come from its content. Text in the SVG is text: it can be searched, copied
    and read aloud; its font is matplotlib's where that is installed, else another sans serif.

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
    path = Path(path)
    if path.suffix.lower() in (".pdf", ".jpg", ".jpeg", ".eps", ".ps", ".webp", ".tif", ".tiff"):
        raise FastgradError(f"{path.name}: figures are written as PNG and SVG. Remedy: leave the "
                            "ending out, or figure.savefig")  # fmt: skip
    stem = path.with_suffix("") if path.suffix.lower() in KINDS else path
    return [write_figure(figure, stem.with_name(stem.name + kind), dpi=dpi) for kind in KINDS]


def write_figure(figure: Any, path: str | os.PathLike[str], *, dpi: int = 150) -> Path:
    """Write a figure as one file, PNG or SVG by its ending; otherwise as :func:`save_figure`.

    Raises:
        FastgradError: for another ending.
        MissingExtraError: without matplotlib.
        OSError: if the file cannot be written.
    """
    matplotlib = matplotlib_module()
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise FastgradError(f"{path.name}: figures are written as PNG or SVG. Remedy: a name that "
                            "ends in .png or .svg")  # fmt: skip
    nameless: dict[str, dict[str, None]] = {
        ".png": {"Software": None}, ".svg": {"Date": None, "Creator": None},
    }  # fmt: skip
    settings = {"svg.hashsalt": "fastgrad", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind[1:], dpi=dpi, metadata=nameless[kind])
    return path


__all__ = [
    "far_below", "literal", "new_figure", "open_axes", "percent", "plain_log_ticks", "save_figure",
    "within", "write_figure",
]  # fmt: skip
