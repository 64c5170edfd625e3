"""Interleaved timing: every contender runs in turn, round after round; medians and ratios.

Two processes that drift apart in clock speed cannot be compared by their seconds. Contenders
that alternate within one process can: each round gives one ratio, and the median of those is
what we quote, with the quartiles beside it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call (median) and ratio to the baseline (median, lower and upper quartile)."""

    seconds: float
    ratio: float
    low: float
    high: float


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds of one call, from the host's point of view; a GPU is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class DeviceClock:
    """Seconds per call on the GPU's own clock: events around as many calls as fill ``at_least``
    seconds, so that launches overlap with work as they do in training."""

    def __init__(self, at_least: float = 5e-3, most: int = 200) -> None:
        self.at_least, self.most = at_least, most
        self._repeats: dict[int, int] = {}

    def __call__(self, call: Callable[[], object]) -> float:
        repeats = self._repeats.get(id(call))
        if repeats is None:
            call()  # compile
            once = self._time(call, 1)
            repeats = max(1, min(self.most, int(self.at_least / max(once, 1e-6))))
            self._repeats[id(call)] = repeats
        return self._time(call, repeats)

    @staticmethod
    def _time(call: Callable[[], object], repeats: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(repeats):
            call()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    progress: Callable[[], None] = lambda: None,
    clock: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, Timing]:
    """Time all contenders round by round; ratios are to the first one, within each round."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for r in range(warmup + rounds):
        # alternate the order, so that no one always runs on a warm or a throttled core
        order = list(contenders) if r % 2 else list(reversed(contenders))
        for name in order:
            seconds = clock(contenders[name])
            if r >= warmup:
                samples[name].append(seconds)
        progress()
    base = samples[next(iter(contenders))]
    out = {}
    for name, values in samples.items():
        ratios = [v / b for v, b in zip(values, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        out[name] = Timing(statistics.median(values), middle, low, high)
    return out


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory instead of returning it; False if it cannot.

    Whether a buffer of many MiB comes back to the same pages or to fresh ones, which fault one by
    one, depends on the heap's history and not on the step; ``bench/step_overhead.py
    --system-malloc`` shows what that does. Call it before any contender runs, so that it holds
    for all alike.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))


def environment() -> dict[str, Any]:
    """What a figure depends on: date, processor, threads, versions."""
    info: dict[str, Any] = {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if importlib.util.find_spec("triton") is not None:
        info["triton"] = version("triton")
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
        info["driver"] = _first_line(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        )
    info["commit"] = _first_line(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"])
    return info


def _first_line(command: list[str]) -> str:
    """First line of a command's output; "unknown" if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
