"""``fastgrad blueprint card | push``: a blueprint beside its weights, for others to find."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastgrad.cli_common import (
    BlueprintRef,
    Json,
    emit,
    emit_json,
    note,
    open_blueprint,
    usage,
    verb,
)

if TYPE_CHECKING:
    from fastgrad.model_card import Emissions, Picture


def card(
    folder: Annotated[
        Path,
        typer.Argument(metavar="MODEL_DIR", exists=True, file_okay=False,
                       help="A model's folder with gradient_blueprint.json in it."),
    ],
    no_figures: Annotated[
        bool, typer.Option("--no-figures", help="No pictures into the folder and the card.")
    ] = False,
    emissions: Annotated[
        float | None,
        typer.Option(min=0, metavar="GRAMS", help="Measured emissions: CO2 equivalent."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(min=0, metavar="KWH",
                     help="Measured energy instead; with --carbon-intensity."),
    ] = None,
    carbon_intensity: Annotated[
        float | None,
        typer.Option(min=0, metavar="G_PER_KWH", help="Of the electricity that was used."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="How emissions or energy were measured, in words.")
    ] = None,
    location: Annotated[
        str | None, typer.Option(help="Where the emissions arose.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="On what hardware the emissions arose.")
    ] = None,
    training_type: Annotated[
        str | None, typer.Option(help="What was measured: pre-training, fine-tuning, ...")
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a section about the blueprint into the model card, README.md.

    It stands between two markers and is replaced when written again; every other byte of the card
    stays. Emissions are named only if they were measured and are given here.

    Example: [bold]fastgrad blueprint card my-model/[/]

    [bold]fastgrad blueprint card my-model/ --energy 1.4 --carbon-intensity 380 --source "meter"[/]
    """
    from fastgrad.model_card import write_card

    measured = _emissions(emissions, energy, carbon_intensity, source, location, hardware,
                          training_type)  # fmt: skip
    blueprint = open_blueprint(str(folder))
    pictures: list[Picture] = []
    if not no_figures:
        from fastgrad.plots_card import card_pictures

        pictures = card_pictures(blueprint, folder)
        if not pictures:
            note("no picture: the blueprint holds no gradient norms")
    path = write_card(folder, blueprint, figures=pictures, emissions=measured)
    if as_json:
        emit_json({
            "path": str(path), "figures": [picture.file for picture in pictures],
            "co2_eq_emissions": None if measured is None else measured.metadata(),
        })  # fmt: skip
    else:
        names = [*(picture.file for picture in pictures), path.name]
        emit("\n".join(f"wrote {folder / name}" for name in names))
        if measured is None:
            note("nothing is said of emissions: none were given")


def _emissions(
    grams: float | None, energy: float | None, intensity: float | None, source: str | None,
    location: str | None, hardware: str | None, training_type: str | None,
) -> Emissions | None:  # fmt: skip
    if grams is not None and energy is not None:
        usage("either --emissions or --energy: the one follows from the other", "--energy")
    if (energy is None) != (intensity is None):
        usage("--energy and --carbon-intensity go together: emissions are their product",
              "--energy" if intensity is None else "--carbon-intensity")  # fmt: skip
    more = {"location": location, "hardware": hardware, "training_type": training_type}
    if grams is None and energy is None:
        for name, value in {"source": source, **more}.items():
            if value is not None:
                usage("it is of emissions, and none are given: --emissions or --energy",
                      f"--{name.replace('_', '-')}")  # fmt: skip
        return None
    from fastgrad.model_card import Emissions

    if source is None:
        usage("emissions need it: how they were measured, in words", "--source")
    if grams is not None:
        return Emissions(grams, source, **more)
    assert energy is not None
    assert intensity is not None
    return Emissions.of_energy(energy * 3.6e6, intensity, source, **more)


def push(
    blueprint: BlueprintRef,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="org/name on the hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Of a repository that does not exist yet.")
    ] = False,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="As a pull request instead of a commit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put a blueprint into a model repository of the Hugging Face Hub, in one commit.

    Nothing else in the repository changes. You must be logged in (hf auth login, or HF_TOKEN).

    Example: [bold]fastgrad blueprint push my-model/ org/my-model[/]
    """
    done = open_blueprint(blueprint).push_to_hub(
        repo_id, revision=revision, commit_message=message, private=private or None,
        create_pr=pull_request,
    )  # fmt: skip
    if as_json:
        emit_json({"repo_id": repo_id, "commit": done.oid, "url": str(done.commit_url),
                   "pull_request": done.pr_url})  # fmt: skip
    else:
        emit(f"pushed to {done.pr_url or done.commit_url}")


def add_release_verbs(app: typer.Typer) -> None:
    """The verbs of a release, into ``fastgrad blueprint``."""
    verb(app, "card")(card)
    verb(app, "push")(push)
