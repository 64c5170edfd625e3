"""docs/cli.md, made of the command itself: ``python -m fastgrad.cli_docs > docs/cli.md``."""

from __future__ import annotations

import inspect
import re
from typing import Any

from fastgrad.cli_exit import MEANING

_HEAD = """# The `fastgrad` command

Made by `python -m fastgrad.cli_docs`; a test compares this page with the command.

Data goes to standard output, everything else to standard error, so `--json` can be piped. Long
work shows a bar where standard error is a terminal. `NO_COLOR` is respected. Where a
BLUEPRINT or MODEL is named, a hub id works too, at a revision as `org/name@revision`; what is
fetched lies in the hub's cache, and `HF_HUB_OFFLINE=1` takes it from there alone. Every file
appears whole or not at all.

## Exit codes

| code | meaning |
|--:|:--|
"""


def page() -> str:
    """The page's text."""
    codes = "".join(f"| {code} | {meaning} |\n" for code, meaning in MEANING.items())
    example = (
        "\n```\nfastgrad staleness my-model/ my-sample.safetensors\ncase $? in\n"
        "  0) echo use the blueprint as it is ;;\n  3) echo blend or measure again ;;\n"
        "  4) echo probe more examples ;;\n  *) exit 1 ;;\nesac\n```\n"
    )
    return _HEAD + codes + example + "".join(_verb(path, verb) for path, verb in verbs())


def verbs() -> list[tuple[str, Any]]:
    """``("fastgrad blueprint show", its command)`` for each verb, in the order of the help."""
    from typer.main import get_command

    from fastgrad.cli_app import app

    found: list[tuple[str, Any]] = []

    def collect(path: str, command: Any) -> None:
        if not hasattr(command, "commands"):
            found.append((path, command))
            return
        for name, below in command.commands.items():
            collect(f"{path} {name}", below)

    collect("fastgrad", get_command(app))
    return found


def _verb(path: str, verb: Any) -> str:
    arguments = [p for p in verb.params if p.param_type_name == "argument"]
    options = [p for p in verb.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join(
        [path, *(["[OPTIONS]"] if options else []), *(_metavar(p) for p in arguments)]
    )
    rows = [(f"`{_metavar(p)}`", p.help) for p in arguments]
    rows += [(_option(p), _help(p)) for p in options]
    table = "".join(f"| {name} | {_cell(text or '')} |\n" for name, text in rows)
    return (
        f"\n## {path}\n\n```\n{usage}\n```\n\n{_prose(verb.help or '')}\n"
        + (f"\n| | |\n|:--|:--|\n{table}" if rows else "")
    )  # fmt: skip


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _option(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names + (" (required)" if parameter.required else "")


def _help(parameter: Any) -> str:
    default = parameter.default
    plain = default is None or default is False or default == [] or callable(default)
    shown = "" if plain or default is True else f" Default: `{default}`."
    return f"{parameter.help or ''}{shown}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


def _prose(text: str) -> str:
    """The help's paragraphs, with examples as code."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        joined = " ".join(paragraph.split())
        paragraphs.append(re.sub(r"\[bold\](.*?)\[/\]", r"`\1`", joined))
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    print(page(), end="")
