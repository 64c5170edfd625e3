"""How a blueprint came about, without the folders of the machine it was made on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from fastgrad.printable import printable


def provenance(created: str | None, command: str | None, torch: Any) -> dict[str, Any]:
    """The ``provenance`` entry of a file that is made now."""
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
    # Only where the model may have come from it: nothing is imported for its version.
    transformers = getattr(sys.modules.get("transformers"), "__version__", None)
    if isinstance(transformers, str):
        versions["transformers"] = transformers
    return {
        "created": created or datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": public_command(sys.argv) if command is None else command,
        "versions": versions | ({"torch": str(torch)} if torch else {}),
    }


def public_command(argv: Sequence[str]) -> str:
    """A command line without the folders of the machine it ran on; ``python -m fastgrad.cli`` is
    ``fastgrad`` too."""
    own = os.path.join(os.path.dirname(__file__), "cli.py")
    if argv and os.path.realpath(argv[0]) == os.path.realpath(own):
        argv = ["fastgrad", *argv[1:]]
    # A URL stays, without its user; an absolute path, or one below a home folder, does not.
    url = r"(?P<scheme>\b(?!file:)\w+://)(?:[^/@\s]*@)?(?P<rest>\S*)"
    path = r"(?<![\w.~/\\-])(?:file:/*|~\w*|[A-Za-z]:)?(?:[/\\]+[^/\\:=,;'\"]+)+[/\\]?"

    def shown(match: re.Match[str]) -> str:
        scheme = match["scheme"]
        return scheme + match["rest"] if scheme else _last(match[0])

    # A file name that is not UTF-8 reaches Python as surrogates, which no text can hold.
    return printable(shlex.join(re.sub(f"{url}|{path}", shown, arg) for arg in argv))


def public_name(name: Any) -> str | None:
    """A hub id as it is; of a local folder only its own name."""
    if not name:
        return None
    text = str(name)
    local = os.path.isabs(text) or text.startswith((".", "~")) or "\\" in text
    return printable(_last(text) if local else text)


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
