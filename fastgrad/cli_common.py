"""What all verbs of the ``fastgrad`` command share: exit codes, printing, progress, arguments."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console

from fastgrad.cli_exit import BROKEN_PIPE
from fastgrad.errors import FastgradError
from fastgrad.files import atomic_path
from fastgrad.printable import printable, printable_lines

if TYPE_CHECKING:
    from fastgrad.blueprint import Blueprint

T = TypeVar("T")
Verb = TypeVar("Verb", bound=Callable[..., None])

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
# Options that several verbs have.
Split = Annotated[str | None, typer.Option(help="Of a data set with several splits.")]
Subset = Annotated[str | None, typer.Option(help="Of a data set with several subsets.")]
Rows = Annotated[int, typer.Option(min=1, help="Examples per batch.")]
Domains = Annotated[list[str] | None, typer.Option(help="What the data is about; may be repeated.")]
ModelName = Annotated[str | None, typer.Option(help="Hub id of the model.")]
ModelRevision = Annotated[str | None, typer.Option(help="Of the model: commit, tag or branch.")]
Created = Annotated[str | None, typer.Option(help="ISO date to write; today by default.")]
TokensPerStep = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a training step, for k* of FLOPs.")
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw it too, into a .png or .svg file."),
]
BlueprintRef = Annotated[
    str,
    typer.Argument(
        metavar="BLUEPRINT",
        help="A model's folder, gradient_blueprint.json, or a hub id such as org/name or "
             "org/name@revision.",
    ),
]  # fmt: skip
ModelRef = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A transformers model folder (config.json, weights, tokenizer), or a hub id such as "
             "org/name or org/name@revision.",
    ),
]  # fmt: skip


def verb(app: typer.Typer, name: str) -> Callable[[Verb], Verb]:
    """Register a function as a verb. Its docstring is the help, each paragraph as wide as the
    screen."""

    def register(function: Verb) -> Verb:
        paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(function.__doc__ or ""))
        help_text = "\n\n".join(" ".join(p.split()) for p in paragraphs)
        app.command(name, help=help_text)(function)
        return function

    return register


def emit(text: str, *, end: str = "\n", raw: bool = False) -> None:
    """Text for standard output, with control characters escaped unless ``raw`` (JSON has escapes of
    its own). A reader that went away (``| head``) ends the command quietly."""
    try:
        sys.stdout.write((text if raw else printable_lines(text)) + end)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered must not raise again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None


def emit_text(text: str) -> None:
    """Text for people: on a terminal, lines that are too long go on below where they began."""
    if not sys.stdout.isatty():
        return emit(text)
    width = shutil.get_terminal_size().columns
    lines = []
    for line in text.splitlines():
        label = re.match(r"(\S+:? +)(?=\S+ \S)", line)
        hang = len(label[1]) if label and len(label[1]) <= 12 else 2
        if "  " in line[hang:]:  # a row of a table
            lines.append(line)
            continue
        lines += textwrap.wrap(
            line, width, subsequent_indent=" " * hang, break_long_words=False,
            break_on_hyphens=False,
        ) or [""]  # fmt: skip
    emit("\n".join(lines))


def emit_json(value: Any) -> None:
    """JSON for standard output."""
    emit(json.dumps(value, indent=2, allow_nan=False), raw=True)


def note(text: str) -> None:
    """A line for standard error: neither markup nor wrapping."""
    Console(stderr=True).print(printable_lines(text), markup=False, soft_wrap=True, highlight=False)


def usage(text: str, option: str | None = None) -> NoReturn:
    """Wrong usage: exit code 2.

    Raises:
        typer.BadParameter: always.
    """
    raise typer.BadParameter(text, param_hint=option)


@contextlib.contextmanager
def busy(description: str, *, quiet: bool) -> Iterator[None]:
    """A moving bar on standard error, if that is a terminal, while work of unknown length goes on;
    it goes away with the work. None if ``quiet``, for --json."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(description, total=None)
        yield


def track(items: Sequence[T], description: str, *, quiet: bool = False) -> Iterator[T]:
    """``items``, with a progress bar on standard error if that is a terminal; none if ``quiet``."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        yield from progress.track(items, description=description)


def check_writable(path: Path) -> None:
    """Before long work: a file can appear at ``path``. Leaves nothing behind.

    Raises:
        OSError: if not.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file to write")

    class _OnlyATry(Exception):
        pass

    try:
        with atomic_path(path):
            raise _OnlyATry
    except _OnlyATry:
        pass


def check_plot(path: Path | None) -> None:
    """Before the work of a verb with --plot: what is asked for can be written.

    Raises:
        typer.BadParameter: for another kind of file.
        MissingExtraError: without matplotlib.
        OSError: if nothing can be written there.
    """
    if path is None:
        return
    from fastgrad.plots_base import KINDS, matplotlib_module

    if path.suffix.lower() not in KINDS:
        usage(f"{path.name}: a name that ends in {' or '.join(KINDS)}", "--plot")
    matplotlib_module()
    check_writable(path)


def split_revision(reference: str) -> tuple[str, str | None]:
    """``org/name@revision``, or a path, which may hold an @ too."""
    if os.path.exists(reference) or "@" not in reference:
        return reference, None
    name, _, revision = reference.rpartition("@")
    return name, revision or None


def open_blueprint(reference: str) -> Blueprint:
    """The blueprint of a folder, a file or a hub id.

    Raises:
        BlueprintError: if there is none that can be used.
    """
    from fastgrad.blueprint import Blueprint

    name, revision = split_revision(reference)
    return Blueprint.from_pretrained(name, revision=revision)


def beside(reference: str) -> str:
    """The model that a blueprint lies beside: its folder, or the same hub id."""
    path = Path(reference)
    if path.is_dir() or not path.exists():
        return reference
    return str(path.parent)


def first_line(error: BaseException) -> str:
    """What another library says, without its list of two hundred classes."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def in_one_line(error: BaseException) -> str:
    """An error of ours as it is; another with its type and a remedy."""
    line = printable(" ".join(str(error).split()))
    if isinstance(error, FastgradError):
        return line
    return f"{type(error).__name__}: {line}. Remedy: another path, or room and rights there"
