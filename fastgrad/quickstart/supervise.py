"""Starts an arm's process, follows its progress, and reads its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastgrad.errors import FastgradError
from fastgrad.files import write_text
from fastgrad.quickstart.settings import THREADS, Spec

WORKER = ("-m", "fastgrad.quickstart.worker")


def run_arm(
    spec: Spec,
    log: Path,
    progress: Callable[[int, int, float], None],
    running: list[subprocess.Popen[str]],
    worker: Sequence[str] = WORKER,
) -> dict[str, Any]:
    """Run one arm in a process of its own and return what it wrote.

    Args:
        spec: the arm.
        log: file for the process's standard error.
        progress: called with the number of the rate, the step, and the loss.
        running: holds the process while it runs, so that another thread can end it.
        worker: what Python is told to run; the path of the spec comes after it.

    Raises:
        FastgradError: if the process fails; the message ends with its last words.
    """
    spec.result.unlink(missing_ok=True)
    told = spec.result.with_suffix(".spec.json")
    write_text(told, json.dumps(spec.as_json(), indent=1) + "\n")
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            # -P: the working folder is not searched; this repository's kernels/ would hide the
            # PyPI package of that name.
            [sys.executable, "-P", *worker, str(told.resolve())],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment(),
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        running.append(process)
        for line in process.stdout:
            message = _message(line)
            if message is not None:
                progress(message["rate"], message["step"], message["loss"])
        code = process.wait()
        running.remove(process)
    if code != 0 or not spec.result.exists():
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise FastgradError(f"the arm '{spec.arm.label}' ended with exit code {code}; its last "
                            f"words, from {log}:\n{tail}")
    result: dict[str, Any] = json.loads(spec.result.read_text(encoding="utf-8"))
    return result


def _message(line: str) -> dict[str, Any] | None:
    """A progress line; anything else that a library prints is passed over."""
    try:
        message = json.loads(line)
    except json.JSONDecodeError:
        return None
    return message if isinstance(message, dict) and "step" in message else None


def _environment() -> dict[str, str]:
    """One thread, and nothing from the network."""
    return os.environ | {
        "OMP_NUM_THREADS": str(THREADS),
        "MKL_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
