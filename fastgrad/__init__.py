"""fastgrad: measure where a model's gradient is concentrated, and train only there.

Public names are loaded when first used, so that ``import fastgrad`` costs nothing and needs no
optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "BlockGrid": "blocks",
    "Blueprint": "blueprint",
    "CostModel": "resources",
    "Coverage": "stats",
    "GradientStats": "stats",
    "Meter": "meter",
    "Partial": "partial",
    "Probe": "probe",
    "Selection": "selection",
    "SparseAdamW": "optim",
    "k_star": "resources",
    "load_delta": "delta",
    "make_partial": "partial",
    "plan_memory": "planner",
    "save_delta": "delta",
    "select": "selection",
    "weights_hash": "identity",
}
_MODULES = ("errors", "heavytail", "integrations", "plots")

__all__ = ["__version__", *sorted(_PUBLIC), *_MODULES]

if TYPE_CHECKING:
    from fastgrad import errors, heavytail, integrations, plots
    from fastgrad.blocks import BlockGrid
    from fastgrad.blueprint import Blueprint
    from fastgrad.delta import load_delta, save_delta
    from fastgrad.identity import weights_hash
    from fastgrad.meter import Meter
    from fastgrad.optim import SparseAdamW
    from fastgrad.partial import Partial, make_partial
    from fastgrad.probe import Probe
    from fastgrad.planner import plan_memory
    from fastgrad.resources import CostModel, k_star
    from fastgrad.selection import Selection, select
    from fastgrad.stats import Coverage, GradientStats


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"fastgrad.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"fastgrad.{name}")
    raise AttributeError(f"module 'fastgrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
