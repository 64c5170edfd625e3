"""``fastgrad staleness`` and ``fastgrad blueprint diff | merge | blend``: several measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastgrad.cli_common import BlueprintRef, Json, emit, emit_json, note, open_blueprint, verb
from fastgrad.cli_exit import NO, UNDECIDED
from fastgrad.cli_values import weight_of

if TYPE_CHECKING:
    from fastgrad.staleness import Staleness

_STALENESS_CODES = {
    "fresh": 0, "drifted": NO, "different model": NO, "sample too small": UNDECIDED,
}  # fmt: skip
StatsPath = Annotated[
    Path, typer.Argument(metavar="STATS", help="Statistics of a local sample: `fastgrad probe`.")
]


def staleness_command(blueprint: BlueprintRef, stats: StatsPath, as_json: Json = False) -> None:
    """Check whether a blueprint still holds for a local sample of data.

    Exit code 0 if it is fresh, 3 if it has drifted or is of a different model, 4 if the sample is
    too small to tell.

    Example: [bold]fastgrad staleness my-model/ my-sample.safetensors[/]
    """
    from fastgrad.stats import GradientStats

    found = open_blueprint(blueprint).staleness(GradientStats.load(stats, blocks=False))
    if as_json:
        emit_json(found.to_dict())
    else:
        emit(_staleness_table(found))
    if code := _STALENESS_CODES[found.verdict]:
        raise typer.Exit(code)


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
    weights = {None: "not known to be the same", True: "the same", False: "others"}
    lines.append(f"{found.n_compared} submodules compared; the weights are "
                 f"{weights[found.weights_match]}")  # fmt: skip
    return "\n".join(lines)


def blend(
    blueprint: BlueprintRef,
    stats: StatsPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
    weight: Annotated[
        str, typer.Option(help="Weight of the blueprint, 0 to 1, or auto: by inverse variance.")
    ] = "auto",
    domain: Annotated[
        list[str] | None, typer.Option(help="What the sample is about; may be repeated.")
    ] = None,
    created: Annotated[
        str | None, typer.Option(help="ISO date to write; today by default.")
    ] = None,
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
        emit(blended.summary())
        note(f"wrote {path}")


def add_compare_verbs(app: typer.Typer) -> None:
    """The verbs of several measurements, into ``fastgrad blueprint``."""
    verb(app, "blend")(blend)
