"""Imports of large packages, in the process of the ``fastgrad`` command.

Importing torch and transformers makes a million objects, which live until the process ends. The
garbage collector goes through all of them again and again meanwhile, and finds nothing. A part of
what is imported serves nothing that the command does. ``bench/plan_start.py`` compares the command
with the import of a model's module alone, without all this.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

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


def imported_lightly(package: str, load: Callable[[], T], without: Sequence[str] = ()) -> T:
    """What ``load`` returns, which imports ``package`` as if some others were not installed.

    In the command's own process alone, and only if none of them has been imported yet. Afterwards
    they are there again: what asks for one later finds it, also where ``package`` remembers its
    answers (``package.utils.import_utils.is_NAME_available``, if that is cached). If the package
    cannot be imported without them, it is imported once more with them.

    Args:
        without: packages that ``package`` can do without, and of which the command needs nothing.

    Raises:
        ImportError: if the package cannot be imported at all.
    """
    absent = [name for name in without if name not in sys.modules]
    if not _own or package in sys.modules:
        return load()
    try:
        with _not_installed(absent), _scanned_once(f"{package}.utils.import_utils"):
            loaded = load()
    except Exception:  # of which kind, the package decides
        for name in [m for m in sys.modules if m.partition(".")[0] == package]:
            del sys.modules[name]
        return load()
    tools = sys.modules.get(f"{package}.utils.import_utils")
    for name in absent:
        getattr(getattr(tools, f"is_{name}_available", None), "cache_clear", lambda: None)()
    return loaded


@contextlib.contextmanager
def _not_installed(names: Sequence[str]) -> Iterator[None]:
    """None in ``sys.modules`` is how Python's import system is told that a module is not to be
    found (language reference, 5.3.1)."""
    gone: Any = dict.fromkeys(names)
    sys.modules.update(gone)
    try:
        yield
    finally:
        for name in names:
            if name in sys.modules and sys.modules[name] is None:
                del sys.modules[name]


@contextlib.contextmanager
def _scanned_once(module: str) -> Iterator[None]:
    """transformers reads the source of all its models to learn their names, twice: the folders
    read are remembered, but no more than 128 of its 500. Here all of them are. Nothing is done
    where the function is not found or remembers in another way."""
    finder = _Watch(module, functools.partial(_remember_all, "create_import_structure_from_path"))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _remember_all(name: str, module: Any) -> None:
    function: Any = getattr(module, name, None)
    parameters: dict[str, Any] = getattr(function, "cache_parameters", dict)()
    if parameters.get("maxsize") is not None:
        setattr(module, name, functools.lru_cache(maxsize=None)(function.__wrapped__))


class _Watch:
    """Finds one module where Python does, and calls ``then`` with it once it was executed."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
