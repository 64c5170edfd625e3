"""Plugs into other libraries. Each is imported when first used, and asks for its extra then."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = ("peft_export", "transformers")

__all__ = ["peft_export", "transformers"]  # loaded by __getattr__


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastgrad.integrations.{name}")
    raise AttributeError(f"module 'fastgrad.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
