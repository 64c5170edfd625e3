"""Interleaved timing: every contender runs in turn, round after round; medians and ratios.

Two processes that drift apart in clock speed cannot be compared by their seconds. Contenders
that alternate within one process can: each round gives one ratio, and the median of those is
what we quote, with the quartiles beside it.
"""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
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


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time all contenders round by round; ratios are to the first one, within each round."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for r in range(warmup + rounds):
        # alternate the order, so that no one always runs on a warm or a throttled core
        order = list(contenders) if r % 2 else list(reversed(contenders))
        for name in order:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if r >= warmup:
                samples[name].append(time.perf_counter() - start)
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
    one, depends on the heap's history and not on the step: on a 1 s step it moved ratios by 4
    points in both directions. Call it before any contender runs, so that it holds for all alike.
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
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
