"""The ``fastgrad`` command: its entry point, and what becomes of errors.

Data goes to standard output, everything else to standard error. The exit codes are in
:mod:`fastgrad.cli_exit`. What takes time to import is imported inside, so that Ctrl-C during that
is answered like any other.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from fastgrad.cli_end import end_process
from fastgrad.cli_exit import BROKEN_PIPE, INTERRUPTED, REFUSED
from fastgrad.cli_imports import importing, process_is_our_own


class _Interrupts:
    """Whether Ctrl-C was pressed: on its way up, some library may turn KeyboardInterrupt into an
    error of its own."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def _listening() -> Iterator[_Interrupts]:
    interrupts = _Interrupts()
    try:
        # Where nobody listens (a job in the background ignores Ctrl-C) it stays so.
        heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        before = signal.signal(signal.SIGINT, interrupts) if heard else None
    except ValueError:  # not the main thread, which alone is told of signals
        before = None
    try:
        yield interrupts
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: like the typer app, with our own errors, and files that cannot be read or
    written, as one red line and exit code 1, and Ctrl-C as one line and exit code 130.

    Args:
        argv: without the program's name. None: those of this process, which is then taken to be
            the command's own and to end with it.

    Raises:
        SystemExit: always, with the exit code.
    """
    if argv is None:
        process_is_our_own()
    with _listening() as interrupts:
        try:
            code = _run(argv)
        except BaseException:
            if not interrupts.came:
                raise
            code = INTERRUPTED
        if code == INTERRUPTED or interrupts.came:
            print("interrupted: no file was left half written", file=sys.stderr)
            code = INTERRUPTED
    if argv is None:
        end_process(code)
    raise SystemExit(code)


def _run(argv: Sequence[str] | None) -> int:
    try:
        with importing():
            from fastgrad.cli_app import app
            from fastgrad.cli_common import in_one_line
            from fastgrad.errors import FastgradError

        try:
            app(args=None if argv is None else list(argv), prog_name="fastgrad")
        except (FastgradError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                return BROKEN_PIPE
            from rich.console import Console
            from rich.markup import escape

            Console(stderr=True).print(
                f"[bold red]error:[/] [red]{escape(in_one_line(error))}[/]", soft_wrap=True,
                highlight=False,
            )  # fmt: skip
            return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    return 0


if __name__ == "__main__":
    main()
