"""Are the modules whose weights are trained still part of the model?

A module that was put in the place of another after ``make_partial`` is called, and the one that
the optimizer trains is not. Looked at in each step, so the look is short: each module on the way
from the model to a trained weight is still where it was. Where one is not, the whole model is gone
through: a wrapper around the old module is no harm.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


class Reachable:
    """The ways from a model to the modules that hold trained weights.

    Keeps no module alive. Copies and pickles know of no module.

    Args:
        model: to be looked through.
        owners: by name of a trained weight, the modules that hold it.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        owners: Mapping[str, Iterable[nn.Module]] | None = None,
    ) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._owners = {
            name: [weakref.ref(module) for module in modules]
            for name, modules in (owners or {}).items()
        }
        self._steps: list[tuple[Any, str, Any]] = []
        if model is not None:
            self._find_ways(model)

    def lost(self) -> str | None:
        """Name of a trained weight of which no module is part of the model any more, or None.
        A model that is gone is not asked."""
        model = None if self._model is None else self._model()
        if model is None:
            return None
        for parent, key, child in self._steps:
            holder, held = parent(), child()
            if holder is None or held is None or holder._modules.get(key) is not held:
                break
        else:
            return None
        return self._find_ways(model)

    def _find_ways(self, model: nn.Module) -> str | None:
        """Note the steps down to each owner, by any way; name the first weight that has none."""
        above: dict[int, tuple[nn.Module, str, nn.Module]] = {}
        present = {id(model)}
        for module in model.modules():
            for key, child in module._modules.items():
                if child is not None and id(child) not in present:
                    present.add(id(child))
                    above[id(child)] = module, key, child
        taken: dict[int, tuple[Any, str, Any]] = {}
        missing = None
        for name, references in self._owners.items():
            modules = [m for reference in references if (m := reference()) is not None]
            there = [m for m in modules if id(m) in present]
            if not there and missing is None:
                missing = name
            for module in there:
                at: nn.Module = module
                while id(at) in above and id(at) not in taken:
                    parent, key, _ = above[id(at)]
                    taken[id(at)] = weakref.ref(parent), key, weakref.ref(at)
                    at = parent
        if missing is None:
            self._steps = list(taken.values())
        return missing

    def __reduce__(self) -> Any:
        return Reachable, ()


__all__ = ["Reachable"]
