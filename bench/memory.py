"""Peak bytes of live CPU tensors during a call, exact and the same on every run.

PyTorch keeps no peak for its CPU allocator, and resident memory will not do: it holds the C
library's free lists and changes from run to run. But the allocator reports every allocation and
every release to the profiler, the scratch tensors inside an operator included, which a dispatch
mode would not see. Replaying those events in order gives the peak to the byte, and names the
operators whose tensors were alive at that moment.

Left out: what is no tensor (packing buffers of BLAS and oneDNN, NumPy, Python objects), and what
kernels allocate on their worker threads; none depends on who measures gradients. Releases of
memory that was live before the call do not lower the count.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Peak:
    """Most bytes alive at once beyond those before the call, and the operators that made them."""

    bytes: int
    holders: Counter[str]  # "outermost < ... < innermost" profiler event: bytes alive at the peak


def peak(call: Callable[[], object]) -> Peak:
    """Run ``call`` under the profiler and replay its allocations.

    Call it once before, so that what is made once and kept (tables, caches) is not counted. The
    cyclic garbage collector is off meanwhile: when it runs is an accident, and tensors that only
    it can free are to be seen.
    """
    gc.collect()
    gc.disable()
    try:
        with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            call()
    finally:
        gc.enable()
    return _replay(_allocations(prof.profiler.kineto_results.experimental_event_tree()))


def _allocations(roots: list[Any]) -> list[Any]:
    """All allocations and releases on the CPU, in the order in which they happened."""
    found, stack = [], list(roots)
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag.name == "Allocation" and event.extra_fields.device.type == "cpu":
            found.append(event)
    # The tree is nested by operator; all events are of one thread, and none takes no time.
    return sorted(found, key=lambda event: event.start_time_ns)


def _replay(events: list[Any]) -> Peak:
    live: dict[int, Any] = {}  # address: event of the allocation
    size = most = 0
    at_most: list[Any] = []
    for event in events:
        fields = event.extra_fields
        if fields.alloc_size > 0:
            live[fields.ptr] = event
            size += fields.alloc_size
        elif (made := live.pop(fields.ptr, None)) is not None:
            size -= made.extra_fields.alloc_size
        if size > most:
            most, at_most = size, list(live.values())
    holders: Counter[str] = Counter()
    for event in at_most:
        holders[_path(event)] += event.extra_fields.alloc_size
    return Peak(most, holders)


def _path(event: Any) -> str:
    names: list[str] = []
    while (event := event.parent) is not None:
        name = event.name.removeprefix("autograd::engine::evaluate_function: ")
        if not names or names[-1] != name:
            names.append(name)
    return " < ".join(reversed(names)) or "(outside any operator)"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the profiler's own remarks, which it writes past Python to the error stream."""
    keep = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(keep, 2)
        os.close(keep)


__all__ = ["Peak", "peak"]
