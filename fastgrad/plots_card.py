"""The pictures of a model card: one finding each, with its caption and its words for those who do
not see it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrad.files import atomic_path
from fastgrad.model_card import Picture
from fastgrad.plots import heat_map, lorenz_plot, short
from fastgrad.plots_base import new_figure, open_axes
from fastgrad.plots_blueprint import curve_of, rms_values, tail_values
from fastgrad.plots_tail import TITLES, rank_size_plot
from fastgrad.printable import printable

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint

STEM = "gradient_blueprint_"
WIDTH, DPI = 7.0, 110  # inches and dots: 770 pixels, about a card's column
_ROWS = 24  # labels of the heat map, at most


def card_pictures(blueprint: Blueprint, folder: Path) -> list[Picture]:
    """Draw a blueprint's Lorenz curve, rank-size and heat map as PNG into ``folder``.

    Of a blueprint without a tail fit there is no rank-size; of one that holds ranks or deciles
    alone, or no gradient at all, there is no picture.

    Returns:
        The pictures in the order of a card.

    Raises:
        MissingExtraError: without matplotlib.
        OSError: if the files cannot be written.
    """
    file = blueprint.file
    if file.fits is None or not any(rms_values(blueprint)):
        return []
    pictures = [_drawn(folder, "lorenz", 4.6, lambda ax: _lorenz(ax, blueprint))]
    if file.fits.norm.tail is not None and any(tail_values(blueprint)):
        pictures.append(_drawn(folder, "rank_size", 4.6, lambda ax: _rank_size(ax, blueprint)))
    rows = min(len({short(s.name) for s in blueprint.submodules}), _ROWS)
    height = max(3.2, 1.2 + 0.24 * rows)
    pictures.append(_drawn(folder, "heat_map", height, lambda ax: _heat_map(ax, blueprint)))
    return pictures


def _drawn(
    folder: Path, name: str, height: float, draw: Callable[[Any], tuple[str, str]]
) -> Picture:
    figure = new_figure(WIDTH, height)
    alt, caption = draw(figure.subplots())
    file = f"{STEM}{name}.png"
    with atomic_path(folder / file) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    return Picture(file, alt, caption)


def _lorenz(ax: Any, blueprint: Blueprint) -> tuple[str, str]:
    assert blueprint.file.fits is not None
    curve, fit = curve_of(blueprint), blueprint.file.fits.squared_norm.gamma
    lorenz_plot(ax, curve, fit)
    open_axes(ax)
    few, half = float(curve.share_at(0.2)), float(curve.share_at(0.5))
    return (
        f"Lorenz curve of the squared gradient norm: the fifth of the weights with the densest "
        f"gradient holds {few:.0%} of it, the densest half {half:.0%}; spread evenly it would be "
        "20% and 50%.",
        f"Concentration: the densest 20% of the weights hold {few:.0%} of the squared gradient. "
        f"The curve k^{fit.gamma:.2f} that was fitted is off by up to {fit.max_deviation:.0%}.",
    )


def _rank_size(ax: Any, blueprint: Blueprint) -> tuple[str, str]:
    assert blueprint.file.fits is not None
    fit = blueprint.file.fits.norm.tail
    assert fit is not None
    values = tail_values(blueprint)
    rank_size_plot(ax, values, fit)
    open_axes(ax)
    verdict = TITLES[fit.verdict]
    exponent = "" if fit.rank_exponent is None else (
        f" and the power law fitted to the {fit.n_tail} largest, of rank exponent "
        f"{fit.rank_exponent:.2f}")  # fmt: skip
    return (
        f"Gradient norms of {fit.n} parameters by rank, from {max(values):.2g} down, on "
        f"logarithmic axes{exponent}: {verdict}.",
        f"Power law: {fit.verdict.replace('_', ' ')}. {fit.reason[0].upper()}{fit.reason[1:]}.",
    )


def _heat_map(ax: Any, blueprint: Blueprint) -> tuple[str, str]:
    names, values = [s.name for s in blueprint.submodules], rms_values(blueprint)
    heat_map(ax, names, values)
    best = printable(max(zip(values, names, strict=True))[1])
    grey = sum(value == 0 for value in values)
    none = f"; {grey} of {len(names)} parameters have none beyond rounding (grey)" if grey else ""
    live = [value for value in values if value > 0]
    return (
        f"Heat map of the gradient rms of {len(names)} parameters by module and layer, from "
        f"{min(live):.2g} to {max(live):.2g}, highest in {best}.",
        f"Gradient per weight, by module and layer: highest in {best}{none}.",
    )


__all__ = ["card_pictures"]
