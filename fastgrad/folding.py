"""Layers that repeat: a model with a few of them stands for the whole one.

Decoder layers of one structure do the same on tensors of the same shapes, so what one of them
takes, all of them do. :class:`Repeats` finds them, and says which layers a short model has to keep
so that the whole step can be put together from its parts.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from fastgrad.identity import PACKED_SUFFIX, model_parameters, unwrapped
from fastgrad.packed import PartialModule, class_before
from fastgrad.selection import Selection

#: A shorter stack is run as it is: four of its layers are always run.
FEWEST = 6
# Which layer it is: differs from layer to layer by its nature.
_NUMBER = re.compile(r"^_?(layer|block)?_?(idx|index|id|number|num)$")


class Irregular(Exception):
    """The layers of a model do not take what their likes take."""


class Repeats:
    """The longest stack of layers of a model.

    Attributes:
        path: of the ``ModuleList``.
        count: number of layers.
        structures: of each layer a number, equal where the layers are alike.
    """

    def __init__(self, model: nn.Module, path: str, structures: Sequence[int]) -> None:
        self.path, self.structures, self.count = path, structures, len(structures)
        start = f"{path}."
        self.local: list[dict[str, str]] = [{} for _ in structures]  # name in the layer: full name
        self.outside: list[str] = []
        for name in model_parameters(model):
            if name.startswith(start):
                number, _, rest = name[len(start) :].partition(".")
                self.local[int(number)][rest] = name
            else:
                self.outside.append(name)

    def shortened(self, selection: Selection, kept: Sequence[int]) -> Selection | None:
        """The same selection of a model that has only the layers ``kept``, in this order; None if
        nothing is selected there."""
        names = {name: name for name in self.outside}
        for position, i in enumerate(kept):
            names |= {
                full: f"{self.path}.{position}.{rest}" for rest, full in self.local[i].items()
            }
        blocks = {new: selection.blocks[n] for n, new in names.items() if n in selection.blocks}
        if not blocks:
            return None
        return Selection(
            {new: selection.shapes[n] for n, new in names.items()},
            selection.spec,
            blocks,
            specs={new: selection.specs[n] for n, new in names.items() if n in selection.specs},
        )


def find_repeats(model: nn.Module) -> Repeats | None:
    """The stack with the most parameters of which any layer may stand for another; None if there
    is none. Layers of two structures by turns (sliding and full attention) are none: each kind has
    tensors of its own that its layers share, which these rules do not follow."""
    model = unwrapped(model)
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if type(module) is nn.ModuleList and len(module) >= FEWEST:
            size = sum(p.numel() for p in module.parameters())
            if best is None or size > best[0]:
                best = size, path, module
    if best is None or not best[0]:
        return None
    _, path, layers = best
    if _shares(model, layers):
        return None
    numbers: dict[Any, int] = {}
    kinds = _layer_types(model, len(layers))
    structures = [
        numbers.setdefault((_structure(layer, i), kinds[i]), len(numbers))
        for i, layer in enumerate(layers)
    ]
    if len(numbers) > 1:
        return None
    return Repeats(model, path, structures)


def _shares(model: nn.Module, layers: nn.ModuleList) -> bool:
    """A parameter or module of one layer is also somewhere else."""
    inside = [id(x) for layer in layers for x in (*layer.parameters(), *layer.modules())]
    if len(inside) != len(set(inside)):
        return True
    own = {id(m) for m in layers.modules()}
    known = set(inside)
    return any(
        id(p) in known
        for module in model.modules()
        if id(module) not in own
        for p in module._parameters.values()
        if p is not None
    )


def numbers_of(module: nn.Module, number: int) -> list[str]:
    """Attributes of a module of layer ``number`` that say so."""
    return [k for k, v in module.__dict__.items() if _says_number(k) and v == number]


@lru_cache(maxsize=4096)  # modules of one class have attributes of the same names
def _says_number(attribute: str) -> bool:
    return _NUMBER.match(attribute) is not None


_PLAIN = (str, bool, int, float, type(None))
_CONTAINERS = (dict, OrderedDict, set)  # most of a module's attributes


def _plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (
        isinstance(value, tuple) and all(_plain(v) for v in value)
    )


def _structure(layer: nn.Module, number: int) -> Any:
    """Whatever may make one layer work in another way than the next one."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        kind = class_before(module) if isinstance(module, PartialModule) else type(module)
        found.append((name, kind, module.training, _config(module)))
        own = numbers_of(module, number)
        for key, value in sorted(module.__dict__.items()):
            if type(value) in _CONTAINERS:  # neither plain nor callable
                continue
            if key.startswith("_fastgrad") or key in own or key == "training":
                continue
            if _plain(value):
                found.append((key, value))
            elif callable(value):
                found.append((key, getattr(value, "__qualname__", type(value))))
        for kind_of, tensors in (("p", module._parameters), ("b", module._buffers)):
            for key, tensor in tensors.items():
                if isinstance(tensor, Tensor) and not key.endswith(PACKED_SUFFIX):
                    found.append((kind_of, key, tuple(tensor.shape), tensor.dtype, tensor.stride()))
    return tuple(found)


def _config(module: nn.Module) -> int:
    return id(module.__dict__.get("config"))


def configs_of(model: nn.Module) -> list[Any]:
    """Configurations that the model's modules hold."""
    found = {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}
    return list(found.values())


def layer_lists(config: Any, count: int) -> Mapping[str, Sequence[Any]]:
    """Entries of a configuration that say something of each layer, by number."""
    values = getattr(config, "__dict__", {})
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, list | tuple) and len(value) == count
    }


def _layer_types(model: nn.Module, count: int) -> list[Any]:
    lists = [
        value for c in configs_of(model) for _, value in sorted(layer_lists(c, count).items())
    ]
    return [tuple(repr(value[i]) for value in lists) for i in range(count)]


__all__ = ["Irregular", "Repeats", "configs_of", "find_repeats", "layer_lists", "numbers_of"]
