"""Meters for tests, and clocks that stand still unless moved."""

from __future__ import annotations

from fastgrad.meter import Meter


class Clock:
    """Called as ``time.perf_counter`` is."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def plain(**options):
    """A meter without counters of operations and energy, unless asked for."""
    return Meter(**({"flops": "off", "energy": "off", "device": "cpu"} | options))
