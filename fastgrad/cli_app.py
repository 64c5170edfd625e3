"""The verbs of the ``fastgrad`` command, put together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fastgrad
from fastgrad.cli_blueprint import blueprint_app
from fastgrad.cli_common import Json, emit, verb
from fastgrad.cli_compare import add_compare_verbs, staleness_command
from fastgrad.cli_delta import delta_app
from fastgrad.cli_exit import SHORT
from fastgrad.cli_export import export_app
from fastgrad.cli_influence import influence_app
from fastgrad.cli_plan import plan
from fastgrad.cli_private import private
from fastgrad.cli_probe import probe
from fastgrad.cli_release import add_release_verbs
from fastgrad.cli_select import select_command

_CODES = ", ".join(f"{code} {meaning}" for code, meaning in SHORT.items())

app = typer.Typer(
    help="Measure where a model's gradient is concentrated, and train only there.",
    epilog=f"Exit codes: {_CODES}. docs/cli.md has all verbs on one page.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        emit(f"fastgrad {fastgrad.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True,
                           help="Print the version and exit.")
    ] = False,
) -> None:  # fmt: skip
    pass


verb(app, "probe")(probe)
verb(blueprint_app, "private")(private)
add_compare_verbs(blueprint_app)
add_release_verbs(blueprint_app)
app.add_typer(blueprint_app, name="blueprint")
verb(app, "staleness")(staleness_command)
verb(app, "select")(select_command)
verb(app, "plan")(plan)
app.add_typer(influence_app, name="influence")
app.add_typer(export_app, name="export")
app.add_typer(delta_app, name="delta")


@verb(app, "quickstart")
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("quickstart-out"),
    fast: Annotated[bool, typer.Option("--fast", help="Smaller, in under 90 seconds.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    as_json: Json = False,
) -> None:
    """Train, measure, select and adapt a small model on real text, against control arms. With
    --json, what results.json holds is printed, and the screens go to standard error.

    Example: [bold]fastgrad quickstart --fast --output /tmp/quickstart[/]
    """
    from fastgrad.quickstart.run import run_quickstart

    code = run_quickstart(output, fast, seed, to_stderr=as_json)
    if as_json and code == 0:
        emit((output / "results.json").read_text("utf-8"), end="", raw=True)
    raise typer.Exit(code)
