"""Imports of large packages, in the process of the ``fastgrad`` command.

Importing torch and transformers makes a million objects, which live until the process ends. The
garbage collector goes through all of them again and again meanwhile, and finds nothing.
``bench/plan_start.py`` compares the command with the same imports alone, without this.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_own = False


def process_is_our_own() -> None:
    """Say so, once: the command was started as a process, which ends with it."""
    global _own
    _own = True


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """The garbage collector rests inside, and never looks at what is there at the end.

    In the command's own process alone: in another one there may be garbage by then, and
    :func:`fastgrad.step_guard.optimizers_of` has to find the optimizers.
    """
    if not (_own and gc.isenabled()):
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
