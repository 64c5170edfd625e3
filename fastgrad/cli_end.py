"""The end of the ``fastgrad`` command's process.

When a process ends, Python takes apart all modules and objects that are left, one after the other,
before the operating system takes back the memory anyway. After an import of torch and transformers
a short command would wait for that.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading


def end_process(code: int) -> None:
    """End the process with this exit code at once: what was registered with :mod:`atexit` is done,
    and both streams are flushed.

    Returns, and leaves the end to Python, where someone is still there who may have something to
    do: other threads, a debugger, profiler or tracer, an interactive session; and where a stream
    cannot be flushed, which Python reports in its own way.
    """
    finish = getattr(atexit, "_run_exitfuncs", None)
    if finish is None or threading.active_count() > 1 or _looked_at():
        return
    try:
        _flush()
        finish()
        _flush()
    except Exception:
        return
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _looked_at() -> bool:
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    return (
        sys.getprofile() is not None
        or sys.gettrace() is not None
        or (monitoring is not None and any(monitoring.get_tool(i) for i in range(6)))
        or bool(sys.flags.interactive or sys.flags.inspect or os.environ.get("PYTHONINSPECT"))
    )
