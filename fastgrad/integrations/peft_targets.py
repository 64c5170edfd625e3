"""What PEFT's LoRA can be put on: each parameter's target, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastgrad.identity import PACKED_SUFFIX

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Target:
    """What LoRA adapts for one parameter.

    Attributes:
        parameter: its name, as ``model.named_parameters()`` has it.
        module: name of the module that holds it.
        bare: the parameter itself is adapted (``target_parameters``), since PEFT knows no LoRA
            layer for its module; otherwise the module is (``target_modules``).
        cost: parameters of an adapter of rank one: of ``[experts, a, b]`` each expert's.
        max_rank: of its matrix, beyond which an adapter says nothing new.
        shared_with: names of other modules that hold the same parameter and that PEFT can tie.
        fan_in_fan_out: the weight is stored ``[in, out]``, as GPT-2's ``Conv1D`` has it; None
            where the module stores it in its own way (embedding, convolution).
    """

    parameter: str
    module: str
    bare: bool
    cost: int
    max_rank: int
    shared_with: tuple[str, ...] = ()
    fan_in_fan_out: bool | None = None

    @property
    def key(self) -> str:
        """The name that PEFT compares with rank and alpha patterns."""
        return self.parameter if self.bare else self.module

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key, *self.shared_with)


@dataclass(frozen=True)
class Adaptable:
    """What of a model LoRA applies to.

    Attributes:
        targets: parameter name -> target, in the model's order.
        whole: parameter name -> module that ``modules_to_save`` can train whole for it, for
            those that LoRA does not apply to.
        reasons: parameter name -> why LoRA does not apply to it.
    """

    targets: dict[str, Target] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def adaptable(model: nn.Module, can_tie: bool, names: Iterable[str]) -> Adaptable:
    """What LoRA applies to, of ``model``'s parameters ``names``.

    Args:
        can_tie: adapt a tied embedding where PEFT ties its adapters.
    """
    found = Adaptable()
    modules = dict(model.named_modules(remove_duplicate=False))
    holders = _holders(modules)
    fixed = _read_elsewhere(modules)
    tied = _tied_by_peft(model) if can_tie else {}
    for name in names:
        module_name, _, attribute = name.rpartition(".")
        module = modules[module_name]
        parameter = getattr(module, attribute)
        others = tuple(n for n in holders[id(parameter)] if n != name)
        target = _target(name, module_name, module, attribute, fixed)
        if isinstance(target, str):
            found.reasons[name] = target
            if _can_be_copied(module_name, module, fixed, holders):
                found.whole[name] = module_name
        elif others and set(others) != tied.get(name, set()):
            found.reasons[name] = f"it is {others[0]} too, and PEFT would adapt only one of them"
        else:
            shared = tuple(n.rpartition(".")[0] for n in others)
            found.targets[name] = Target(**vars(target) | {"shared_with": shared})
    return found


def _target(
    name: str, module_name: str, module: nn.Module, attribute: str, fixed: Mapping[str, str]
) -> Target | str:
    """The target, or why there is none."""
    parameter = getattr(module, attribute)
    shape = tuple(parameter.shape)
    if module_name in fixed:
        return fixed[module_name]
    if not module_name:
        return "it belongs to no module below the model, and PEFT cannot wrap the model itself"
    kind = type(module).__name__
    if len(shape) == 1:
        what = "a bias" if attribute == "bias" else "a vector"
        return f"{what}: LoRA divides matrices into factors"
    known = isinstance(module, nn.Linear | nn.Embedding) or kind == "Conv1D"
    if known and attribute == "weight":
        rows, columns = shape
        stored = None if isinstance(module, nn.Embedding) else kind == "Conv1D"
        return Target(name, module_name, False, rows + columns, min(shape), fan_in_fan_out=stored)
    if isinstance(module, _CONVOLUTIONS) and attribute == "weight":
        if module.groups > 1:
            return "a convolution in groups, whose adapter PEFT cannot merge"
        fan_in = math.prod(shape[1:])
        return Target(name, module_name, False, shape[0] + fan_in, min(shape[0], fan_in))
    if len(shape) not in (2, 3) or isinstance(module, _CONVOLUTIONS):
        return f"{kind} with a weight of shape {shape}, for which PEFT has no LoRA layer"
    if min(shape[-2:]) < 2:
        return f"shape {shape} is that of vectors: LoRA divides matrices into factors"
    experts = shape[0] if len(shape) == 3 else 1
    cost = experts * (shape[-2] + shape[-1])
    return Target(name, module_name, True, cost, min(shape[-2:]))


def _holders(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Parameter -> all names that it goes by."""
    found: dict[int, list[str]] = {}
    for name, module in modules.items():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and not attribute.endswith(PACKED_SUFFIX):
                full = f"{name}.{attribute}" if name else attribute
                found.setdefault(id(parameter), []).append(full)
    return found


def _read_elsewhere(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Modules whose weights another piece of code reads, so that an adapter put on them would
    never be asked: it would train nothing, and nobody would be told."""
    found = {}
    for name, module in modules.items():
        if isinstance(module, nn.RNNBase):
            found[name] = "a recurrent layer reads its weights without asking an adapter"
        elif isinstance(module, nn.MultiheadAttention):
            for inner, _ in module.named_modules(prefix=name):
                found[inner] = (
                    "torch.nn.MultiheadAttention reads its weights without asking an adapter"
                )
    return found


def _tied_by_peft(model: nn.Module) -> dict[str, set[str]]:
    """Embedding weight -> the other names of the same weight, where PEFT finds the tie itself."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    get: Any = getattr(model, "get_input_embeddings", None)
    embedding = get() if get is not None else None
    if embedding is None or not isinstance(getattr(embedding, "weight", None), nn.Parameter):
        return {}
    names = [
        name for name, module in model.named_modules(remove_duplicate=False)
        if module._parameters.get("weight") is embedding.weight
    ]  # fmt: skip
    if not all(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in names):
        return {}
    first, *others = (f"{name}.weight" for name in names)
    return {first: set(others)}


def _can_be_copied(
    name: str, module: nn.Module, fixed: Mapping[str, str], holders: Mapping[int, list[str]]
) -> bool:
    """A copy of the module can be trained instead of it: it has no parts, shares nothing, and
    holds nothing that LoRA applies to."""
    if not name or name in fixed or next(module.children(), None) is not None:
        return False
    own = module.named_parameters(recurse=False, remove_duplicate=False)
    return all(
        len(holders[id(p)]) == 1 and isinstance(_target(a, name, module, a, fixed), str)
        for a, p in own
    )


__all__ = ["Adaptable", "Target", "adaptable"]
