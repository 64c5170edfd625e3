"""``fastgrad blueprint``: make, show and check a blueprint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastgrad.cli_common import (
    BlueprintRef,
    Created,
    Domains,
    Json,
    ModelName,
    ModelRevision,
    Plot,
    TokensPerStep,
    beside,
    busy,
    check_plot,
    emit,
    emit_json,
    emit_text,
    in_one_line,
    note,
    open_blueprint,
    split_revision,
    verb,
)
from fastgrad.cli_exit import NO, UNDECIDED
from fastgrad.cli_models import load_model
from fastgrad.errors import BlueprintError

blueprint_app = typer.Typer(
    help="Make, show, check, compare and release gradient_blueprint.json.", no_args_is_help=True
)


@verb(blueprint_app, "create")
def create(
    stats: Annotated[
        Path,
        typer.Argument(metavar="STATS", help="What `fastgrad probe` or a ShardWriter wrote."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
    domain: Domains = None,
    name: ModelName = None,
    revision: ModelRevision = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Name of the data set; what the statistics say by default; repeatable."),
    ] = None,
    created: Created = None,
    tokens_per_step: TokensPerStep = None,
    as_json: Json = False,
) -> None:
    """Make a blueprint of measured statistics.

    Example: [bold]fastgrad blueprint create stats.safetensors -o my-model/ --domain python[/]
    """
    from fastgrad.blueprint import Blueprint
    from fastgrad.stats import GradientStats

    with busy("fitting", quiet=as_json):
        blueprint = Blueprint.from_stats(
            GradientStats.load(stats, blocks=False), domain_tags=domain or [], name_or_path=name,
            revision=revision, datasets=dataset or (), created=created,
            tokens_per_step=tokens_per_step,
        )  # fmt: skip
    path = blueprint.save_pretrained(output)
    if as_json:
        emit_json({"path": str(path), "n_submodules": len(blueprint.names)})
    else:
        emit_text(blueprint.summary())
        note(f"wrote {path}")


@verb(blueprint_app, "show")
def show(
    blueprint: BlueprintRef,
    domain: Annotated[
        str | None, typer.Option(help="Tag of a domain; the whole file by default.")
    ] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Show what a blueprint says. With --json, the file's own text; with --plot, its Lorenz curve,
    rank-size and heat map as a picture, of several domains those of the primary one.

    Example: [bold]fastgrad blueprint show my-model/[/]

    [bold]fastgrad blueprint show my-model/ --plot blueprint.svg[/]
    """
    check_plot(plot)
    found = open_blueprint(blueprint)
    if domain is not None:
        found = found.domain(domain)
    if as_json:
        emit(found.to_json(), end="", raw=True)
    else:
        emit_text(found.summary())
    if plot is not None:
        from fastgrad.plots import blueprint_figure, write_figure

        note(f"wrote {write_figure(blueprint_figure(found), plot)}")


@verb(blueprint_app, "validate")
def validate(
    blueprints: Annotated[
        list[str],
        typer.Argument(metavar="BLUEPRINT...", help="Folders, files or hub ids; all are checked."),
    ],
    as_json: Json = False,
) -> None:
    """Check that files are well-formed blueprints, with their block vectors.

    Exit code 0 if all are, 3 if one is not, 1 if one cannot be read at all.

    Example: [bold]fastgrad blueprint validate my-model/gradient_blueprint.json[/]
    """
    from fastgrad.hub import located

    found = []
    for reference in blueprints:
        name, revision = split_revision(reference)
        path, _ = located(name, revision=revision)  # what cannot be fetched is not judged
        try:
            version = open_blueprint(reference).file.schema_version
            found.append({"path": reference, "valid": True, "schema_version": version})
        except BlueprintError as error:
            if not path.is_file() or isinstance(error.__cause__, OSError):
                raise
            found.append({"path": reference, "valid": False, "reason": in_one_line(error)})
    for entry in found if not as_json else []:
        emit(
            f"{entry['path']} is a valid blueprint, schema {entry['schema_version']}"
            if entry["valid"] else f"no blueprint: {entry['reason']}"
        )  # fmt: skip
    if as_json:
        emit_json(found[0] if len(found) == 1 else found)
    if not all(entry["valid"] for entry in found):
        raise typer.Exit(NO)


@verb(blueprint_app, "verify")
def verify(
    blueprint: BlueprintRef,
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or hub id; by default the one the blueprint is in."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that a blueprint was made for the weights beside it: names, shapes and hash.

    Exit code 0 if it was, 3 if it was made for others, 4 if it holds no hash of the weights.

    Example: [bold]fastgrad blueprint verify my-model/[/]
    """
    found = open_blueprint(blueprint)
    reference = model or beside(blueprint)
    with busy("reading the weights", quiet=as_json):
        net = load_model(reference)
    result = {"blueprint": blueprint, "model": reference, "weights_hash": found.weights_hash}
    code, reason = 0, ""
    try:
        with busy("hashing the weights", quiet=as_json):
            found.verify(net)
    except BlueprintError as error:
        if error.__cause__ is not None:  # the weights could not be read
            raise
        reason = in_one_line(error)
        code = UNDECIDED if "holds no hash" in reason else NO
    if as_json:
        # None: names and shapes fit, and no more can be said.
        verified = {0: True, NO: False, UNDECIDED: None}[code]
        emit_json({"verified": verified, **result, **({"reason": reason} if reason else {})})
    else:
        emit(reason or f"{split_revision(blueprint)[0]} was made for the weights in {reference} "
                       f"({found.weights_hash})")  # fmt: skip
    if code:
        raise typer.Exit(code)


@verb(blueprint_app, "schema")
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of the file, which is JSON with --json and without.

    Example: [bold]fastgrad blueprint schema > blueprint.schema.json[/]
    """
    from fastgrad.blueprint_schema import json_schema

    emit(json_schema(), end="")
