"""Several processes on one machine (gloo, CPU): started by a test, and at work in its worker."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent


def command(module: str, processes: int = 2) -> list[str]:
    """What follows ``torchrun`` on a command line."""
    return ["--standalone", "--nproc-per-node", str(processes), "-m", module]


def launch(module: str, *arguments: object, processes: int = 2, timeout: float = 300) -> None:
    """Run ``python -m module`` in so many processes under torchrun; in one without it. Fails with
    what they said."""
    start = ["-m", module]
    if processes > 1:
        start = ["-m", "torch.distributed.run", *command(module, processes)]
    done = subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]


def launched(module: str, out: Path, *arguments: object, timeout: float = 300) -> Any:
    """The JSON that a worker of two processes writes to ``--out``."""
    launch(module, *arguments, "--out", out, timeout=timeout)
    return json.loads(out.read_text())


# -- in the worker ---------------------------------------------------------------------------


def arguments(about: str | None, **more: str) -> argparse.Namespace:
    """Names of scenarios, ``--out``, and further options with their help."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("names", nargs="*", help="scenarios; all by default")
    parser.add_argument("--out", help="JSON file for the results")
    for name, text in more.items():
        parser.add_argument(f"--{name}", help=text)
    return parser.parse_args()


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """Close the group of processes at the end, whoever made it, after the last of them has come:
    gloo aborts a process that still holds connections to one that has gone."""
    try:
        yield
        if dist.is_initialized():
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def group() -> Iterator[None]:
    """The processes of torchrun as one group, each on one thread."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    with leaving_together():
        yield


@contextlib.contextmanager
def common_folder(given: str | None) -> Iterator[Path]:
    """A folder that all processes share; a temporary one if none is given."""
    with contextlib.ExitStack() as stack:
        chosen = [given]
        if given is None and dist.get_rank() == 0:
            chosen = [stack.enter_context(tempfile.TemporaryDirectory())]
        dist.broadcast_object_list(chosen)
        yield Path(str(chosen[0]))
        dist.barrier()


def run_scenarios(scenarios: Mapping[str, Callable[[], Any]], given: argparse.Namespace) -> None:
    """Run scenarios by name on all processes; the first one prints and writes the results."""
    results: dict[str, Any] = {}
    for name in given.names or scenarios:
        try:
            results[name] = scenarios[name]()
        except Exception:  # the other process waits for this one, and says the same
            results[name] = {"failed": traceback.format_exc()}
        if dist.get_rank() == 0:
            found = results[name]
            numbers = {k: v for k, v in found.items() if isinstance(v, float)}
            text = ", ".join(f"{k} {v:.2g}" for k, v in numbers.items())
            print(f"{name:42s} {found.get('failed') or text or 'named'}", flush=True)
    if given.out and dist.get_rank() == 0:
        Path(given.out).write_text(json.dumps(results))
