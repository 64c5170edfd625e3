"""Whether PEFT reads a configuration as it is meant: tried on the model without its weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from fastgrad.errors import SelectionError
from fastgrad.integrations.peft_names import Brief
from fastgrad.integrations.peft_targets import Target


def matched(brief: Brief, model: nn.Module, saved: Collection[str]) -> set[str]:
    """Names of the modules that PEFT takes ``brief`` for, by its own rule."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    config = LoraConfig(
        target_modules=brief.target_modules, layers_to_transform=brief.layers,
        layers_pattern=brief.layers_pattern, modules_to_save=list(saved) or None,
    )  # fmt: skip
    found = set()
    for name, _ in model.named_modules():
        result = check_target_module_exists(config, name) if name else None
        if result and not isinstance(result, _ExcludedModule):
            found.add(name)
    return found


def refuse_difference(
    config: Any,
    model: nn.Module,
    ranks: Mapping[str, int],
    targets: Mapping[str, Target],
    whole: Collection[str],
) -> None:
    """Put ``config`` on a copy of ``model`` without weights, and compare.

    Raises:
        SelectionError: naming what PEFT refuses, adapts without being asked, leaves out, or
            gives another rank.
    """
    expected = {key: ranks[name] for name, t in targets.items() for key in t.keys}
    found, saved = built_ranks(config, model)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise SelectionError(
                f"PEFT gives {name} rank {found.get(name, 'none')} where {_want(expected, name)} "
                "was chosen. Remedy: exclude it, or another version of peft"
            )
    if saved != set(whole):
        other = sorted(saved ^ set(whole))[0]
        raise SelectionError(f"PEFT would {'not ' if other in whole else ''}train {other} whole, "
                             "since it compares the ends of names. Remedy: whole=False, or exclude "
                             "it")  # fmt: skip


def _want(expected: Mapping[str, int], name: str) -> str:
    return f"rank {expected[name]}" if name in expected else "nothing"


def built_ranks(config: Any, model: nn.Module) -> tuple[dict[str, int], set[str]]:
    """What PEFT makes of ``config``: module or parameter name -> rank, and the names of the
    modules that it trains whole."""
    from peft import get_peft_model

    tried = copy.deepcopy(config)
    tried.init_lora_weights = True  # any other reads the weights, which the copy lacks
    tried.task_type = None  # what it adds to the model's methods is not in question
    try:
        bare = _without_weights(model)
    except RuntimeError as error:  # a tensor that was computed, as older weight_norm keeps one
        raise SelectionError(f"the model cannot be copied to try the configuration: {error}. "
                             "Remedy: fold what reparametrises its weights") from error  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built: Any = get_peft_model(bare, tried)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise SelectionError(f"PEFT refuses the configuration: {error}. Remedy: exclude what it "
                             "names") from error  # fmt: skip
    return ranks_of(built)


def ranks_of(peft_model: Any, adapter: str = "default") -> tuple[dict[str, int], set[str]]:
    """Module or parameter name (as the base model has it) -> rank of its LoRA adapter, and the
    names of the modules that are trained whole."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    ranks: dict[str, int] = {}
    whole: set[str] = set()
    base = peft_model.base_model.model
    for name, module in base.named_modules(remove_duplicate=False):
        plain = ".".join(part for part in name.split(".") if part != "base_layer")
        if isinstance(module, ModulesToSaveWrapper):
            whole.add(plain)
        elif isinstance(module, LoraLayer):
            bare = getattr(module, "parameter_name", None)
            ranks[f"{plain}.{bare}" if bare else plain] = int(module.r[adapter])
    return ranks, whole


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, ties included."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(
            torch.empty_like(p, device="meta"), requires_grad=p.requires_grad
        )
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


__all__ = ["built_ranks", "matched", "ranks_of", "refuse_difference"]
