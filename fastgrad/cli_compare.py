"""``fastgrad staleness`` and ``fastgrad blueprint diff | merge | blend``: several measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastgrad.cli_common import (
    BlueprintRef,
    Json,
    Plot,
    check_plot,
    emit_json,
    emit_text,
    note,
    open_blueprint,
    usage,
    verb,
)
from fastgrad.cli_exit import NO, UNDECIDED
from fastgrad.cli_values import weight_of
from fastgrad.printable import printable

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint
    from fastgrad.staleness import Staleness
    from fastgrad.stats import GradientStats

_STALENESS_CODES = {
    "fresh": 0, "drifted": NO, "different model": NO, "sample too small": UNDECIDED,
}  # fmt: skip
_DIFF_CODES = {
    "identical": 0, "agree": 0, "differ": NO, "different model": NO, "unknown": UNDECIDED,
}  # fmt: skip
_NEAREST_CODES = {"clear": 0, "close": UNDECIDED, "undecided": UNDECIDED}
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")]
Created = Annotated[str | None, typer.Option(help="ISO date to write; today by default.")]
DomainTag = Annotated[
    str | None, typer.Option("--domain", help="Tag of a domain; the primary one by default.")
]
StatsPath = Annotated[
    Path, typer.Argument(metavar="STATS", help="Statistics of a local sample: `fastgrad probe`.")
]


def staleness_command(
    blueprint: BlueprintRef,
    stats: StatsPath,
    domain: DomainTag = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Check whether a blueprint still holds for a local sample of data. With --plot, every
    submodule's gradient in the one over that in the other as a picture too.

    Exit code 0 if it is fresh, 3 if it has drifted or is of a different model, 4 if the sample is
    too small to tell, or the noise of a private release hides it.

    Example: [bold]fastgrad staleness my-model/ my-sample.safetensors --plot both.png[/]
    """
    from fastgrad.stats import GradientStats

    check_plot(plot)
    released = open_blueprint(blueprint)
    if domain is not None:
        released = released.domain(domain)
    local = GradientStats.load(stats, blocks=False)
    found = released.staleness(local)
    drawn = None if plot is None else _scatter(released, local, found, plot)
    if as_json:
        emit_json(found.to_dict() | ({} if plot is None else {"plot": drawn}))
    else:
        emit_text(_staleness_table(found))
        if drawn is not None:
            note(f"wrote {drawn}")
    if code := _STALENESS_CODES[found.verdict]:
        raise typer.Exit(code)


def _scatter(
    released: Blueprint, local: GradientStats, found: Staleness, path: Path
) -> str | None:
    """The picture's path. Where there is nothing to draw, that is noted and the verdict stands."""
    from fastgrad.errors import FastgradError
    from fastgrad.plots import new_figure, open_axes, staleness_plot, write_figure

    figure = new_figure(6.6, 6.6)
    ax = figure.subplots()
    try:
        staleness_plot(ax, released, local, found)
    except FastgradError as error:
        note(f"no picture: {error}")
        return None
    open_axes(ax)
    return str(write_figure(figure, path))


def _staleness_table(found: Staleness) -> str:
    def cells(values: tuple[float | None, float | None, float | None]) -> str:
        return "".join("-".rjust(14) if v is None else f"{v:>14.2f}" for v in values)

    lines = [f"{found.verdict}: {found.reason}", "",
             f"{'':<18}{'Spearman':>14}{'weighted tau':>14}{'top 20 %':>14}"]  # fmt: skip
    lines.append(f"{'agreement':<18}"
                 + cells((found.spearman, found.weighted_tau, found.top_jaccard)))  # fmt: skip
    for label, halves in (("halves, local", found.local), ("halves, released", found.released)):
        if halves is not None:
            lines.append(
                f"{label:<18}" + cells((halves.spearman, halves.weighted_tau, halves.top_jaccard))
                + f"  of {halves.n} {halves.basis}"
            )  # fmt: skip
    noise, among = found.noise, ""
    if noise is not None and noise.n_above is not None and noise.std:
        among = f", those of {noise.n} above the release's noise"
        if noise.expected is not None and found.limits is not None:
            lines.append(f"{'halves and noise':<18}" + cells(found.bars or (None, None, None)))
            lines.append(f"{'drifted below':<18}" + cells(found.limits))
    weights = {None: "not known to be the same", True: "the same", False: "others"}
    lines.append(f"{found.n_compared} submodules compared{among}; the weights are "
                 f"{weights[found.weights_match]}")  # fmt: skip
    return "\n".join(lines)


def blend(
    blueprint: BlueprintRef,
    stats: StatsPath,
    output: Output,
    weight: Annotated[
        str, typer.Option(help="Weight of the blueprint, 0 to 1, or auto: by inverse variance.")
    ] = "auto",
    domain: Annotated[
        list[str] | None, typer.Option(help="What the sample is about; may be repeated.")
    ] = None,
    created: Created = None,
    other_weights: Annotated[
        bool, typer.Option("--allow-other-weights", help="Though the sample is of other weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Blend a blueprint with a local sample into a new one that names both.

    Example: [bold]fastgrad blueprint blend my-model/ my-sample.safetensors -o blended/[/]
    """
    from fastgrad.stats import GradientStats

    share = weight_of(weight)
    blended = open_blueprint(blueprint).blend(
        GradientStats.load(stats, blocks=False), share, domain_tags=domain or [],
        allow_other_weights=other_weights, created=created,
    )  # fmt: skip
    path = blended.save_pretrained(output)
    done = blended.file.blend
    if as_json:
        emit_json({"path": str(path), "blend_weight": done.blend_weight if done else None})
    else:
        emit_text(blended.summary())
        note(f"wrote {path}")


def diff(
    one: Annotated[str, typer.Argument(metavar="ONE", help="Folder, file or hub id.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Folder, file or hub id.")],
    most: Annotated[int, typer.Option(min=0, help="Largest changes to show.")] = 10,
    as_json: Json = False,
) -> None:
    """Compare two blueprints: how they were made, their ranks, and where the gradient lies.

    Exit code 0 if they are identical or agree as well as each with itself, 3 if they differ or are
    of different models, 4 if that cannot be told.

    Example: [bold]fastgrad blueprint diff my-model/ org/model@v2[/]
    """
    found = open_blueprint(one).diff(open_blueprint(other))
    if as_json:
        emit_json(found.to_dict())
    else:
        emit_text(found.text(most))
    if code := _DIFF_CODES[found.verdict]:
        raise typer.Exit(code)


def merge(
    blueprints: Annotated[
        list[str], typer.Argument(metavar="BLUEPRINT...", help="Two or more: folders, files or "
                                                               "hub ids.")
    ],
    output: Output,
    created: Created = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Merge blueprints of the same weights, measured on different examples, into one. Exact: raw
    sums are added.

    Example: [bold]fastgrad blueprint merge first/ second/ -o merged/[/]
    """
    if len(blueprints) < 2:
        usage("one blueprint alone is merged already", "BLUEPRINT...")
    merged, *rest = [open_blueprint(reference) for reference in blueprints]
    for other in rest:
        merged = merged.merge(other, created=created)
    path = merged.save_pretrained(output)
    missing = dict(merged.file.merge.not_merged) if merged.file.merge else {}
    if as_json:
        emit_json({"path": str(path), "n_examples": merged.n_examples, "not_merged": missing})
    else:
        emit_text(merged.summary())
        note(f"wrote {path}")


def add_domain(
    blueprint: BlueprintRef,
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="Blueprint of the same weights on other data.")
    ],
    output: Output,
    as_json: Json = False,
) -> None:
    """Add the domains of another blueprint of the same weights; each stays a measurement of its
    own.

    Example: [bold]fastgrad blueprint add-domain my-model/ prose/ -o my-model/[/]
    """
    both = open_blueprint(blueprint).with_domain(open_blueprint(other))
    path = both.save_pretrained(output)
    domains = [one.domain_tags for one in both.domains]
    if as_json:
        emit_json({"path": str(path), "domains": domains})
    else:
        tagged = (printable(", ".join(tags)) or "(no tag)" for tags in domains)
        emit_text("\n".join(f"domain     {tags}" for tags in tagged))
        note(f"wrote {path}")


def nearest(blueprint: BlueprintRef, stats: StatsPath, as_json: Json = False) -> None:
    """Find the domain of a blueprint that a local sample is most like.

    Exit code 0 if that is clear, 4 if the sample does not decide.

    Example: [bold]fastgrad blueprint nearest my-model/ my-sample.safetensors[/]
    """
    from fastgrad.stats import GradientStats

    found = open_blueprint(blueprint).nearest_domain(GradientStats.load(stats, blocks=False))
    if as_json:
        emit_json(found.to_dict())
    else:
        lines = [f"{found.verdict}: {printable(found.reason)}", "",
                 f"{'Spearman':>8}  {'nearest in':>10}  {'verdict':<16}  domain"]  # fmt: skip
        for one in found.domains:
            s = one.staleness
            lines.append(
                f"{'-' if s.spearman is None else format(s.spearman, '.2f'):>8}  "
                f"{'-' if one.support is None else format(one.support, '.0%'):>10}  "
                f"{s.verdict:<16}  {printable(' + '.join(one.tags)) or '(no tag)'}"
            )
        emit_text("\n".join(lines))
    if code := _NEAREST_CODES[found.verdict]:
        raise typer.Exit(code)


def add_compare_verbs(app: typer.Typer) -> None:
    """The verbs of several measurements, into ``fastgrad blueprint``."""
    verb(app, "diff")(diff)
    verb(app, "merge")(merge)
    verb(app, "blend")(blend)
    verb(app, "add-domain")(add_domain)
    verb(app, "nearest")(nearest)
