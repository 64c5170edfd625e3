"""A blueprint as a LoRA configuration of PEFT: which weights, and with which ranks.

PEFT finds modules by the ends of their names and ranks by regular expressions, and changes both
for some models. So nothing here is trusted to be read as it was meant: every configuration is put
on a copy of the model without weights, and compared with what was chosen.
"""

from __future__ import annotations

import glob
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgrad.blocks import BlockGrid
from fastgrad.blueprint_coarse import is_coarse
from fastgrad.choosing import filtered_names, parameters_of, select
from fastgrad.errors import MissingExtraError, SelectionError
from fastgrad.identity import unwrapped
from fastgrad.integrations.peft_check import matched, refuse_difference
from fastgrad.integrations.peft_names import (
    Brief,
    brief_targets,
    layers_by_gradient,
    regex_of,
)
from fastgrad.integrations.peft_ranks import share_ranks
from fastgrad.integrations.peft_targets import Adaptable, Target, adaptable
from fastgrad.ranking import block_scores
from fastgrad.selection import Selection

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from fastgrad.blueprint import Blueprint
    from fastgrad.stats import GradientStats

_OURS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "target_parameters",
         "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out",
         "ensure_weight_tying", "exclude_modules")  # fmt: skip


@dataclass(frozen=True)
class LoraPlan:
    """What an adapter is put on.

    Attributes:
        targets: parameter name -> what PEFT adapts for it, in the model's order.
        ranks: parameter name -> rank.
        whole: parameter name -> module that is trained whole for it.
        left_out: chosen parameter -> why nothing is trained for it.
        n_parameters: of all adapters together; those of ``whole`` come on top.
        n_whole: elements of the modules in ``whole``.
    """

    targets: dict[str, Target]
    ranks: dict[str, int]
    whole: dict[str, str]
    left_out: dict[str, str]
    n_parameters: int
    n_whole: int


def lora_plan(
    source: Blueprint | GradientStats,
    model: nn.Module,
    *,
    fraction: float | None = None,
    count: int | None = None,
    selection: Selection | None = None,
    r: int = 8,
    budget: int | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    whole: bool = False,
    tied: bool = False,
    ranking: str = "rms",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    modules_only: bool = False,
    shared: bool = True,
) -> LoraPlan:
    """Choose weights by their gradient and share out ranks; see :func:`peft_config`.

    Args:
        modules_only: leave out what is no module of its own, such as stacked expert weights.
        shared: share ranks out by the gradient, which a coarse blueprint does not hold; else as
            if it were the same in all.

    Raises:
        SelectionError: as for :func:`peft_config`.
        MissingExtraError: without PEFT.
    """
    model = unwrapped(model)
    least, most = _bounds(r, min_rank, max_rank)
    shapes, candidates = parameters_of(source, model)
    known = adaptable(model, tied and _can_tie(), candidates)
    targets = {n: t for n, t in known.targets.items() if not (modules_only and t.bare)}
    usable = [*targets, *(known.whole if whole else ())]
    if selection is not None:
        if fraction is not None or count is not None or include or exclude:
            raise SelectionError("a selection says what is trained. Remedy: leave out fraction, "
                                 "count, include and exclude")
        selection.check_model(model)
        chosen = selection.names
    else:
        filtered_names(candidates, shapes, include, exclude)  # a pattern that matches nothing
        chosen = _chosen(source, model, candidates, usable, fraction, count, ranking, include,
                         exclude)  # fmt: skip
    picked = {name: target for name, target in targets.items() if name in chosen}
    saved = {n: m for n, m in known.whole.items() if whole and n in chosen}
    left_out = {n: _reason(n, known, modules_only) for n in chosen
                if n not in picked and n not in saved}  # fmt: skip
    if not picked:
        raise SelectionError(
            "LoRA applies to none of the chosen parameters"
            + "".join(f"; {n}: {why}" for n, why in list(left_out.items())[:1])
            + ". Remedy: a larger fraction, whole=False, or include patterns of weight matrices"
        )
    costs = [t.cost for t in picked.values()]
    if budget is None:
        budget = sum(cost * min(r, t.max_rank) for cost, t in zip(costs, picked.values(),
                                                                  strict=True))  # fmt: skip
    grids = {name: BlockGrid.of(shapes[name], "module") for name in picked}
    mass = [1.0] * len(picked)
    if shared:
        _refuse_coarse(source, "the ranks of adapters are shared out by gradient norms. Remedy: a "
                               "blueprint with norms, or `fastgrad export regex` (target_regex), "
                               "which needs the order alone, with one rank for all")  # fmt: skip
        norms = block_scores(source, model, "norm", grids, seed=0)
        mass = [float(np.nan_to_num(norms[name][0])) for name in picked]
    ranks = share_ranks(mass, costs, budget, least, [min(most, t.max_rank) for t in
                                                     picked.values()])  # fmt: skip
    modules = set(saved.values())
    n_whole = sum(p.numel() for m in modules for p in model.get_submodule(m).parameters())
    return LoraPlan(
        picked, dict(zip(picked, map(int, ranks), strict=True)), saved, left_out,
        int(ranks @ np.asarray(costs)), n_whole,
    )  # fmt: skip


def peft_config(
    source: Blueprint | GradientStats,
    model: nn.Module,
    *,
    fraction: float | None = None,
    count: int | None = None,
    selection: Selection | None = None,
    r: int = 8,
    budget: int | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    alpha_ratio: float = 2.0,
    whole: bool = False,
    tied: bool = False,
    ranking: str = "rms",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    **lora: Any,
) -> LoraConfig:
    """A ``peft.LoraConfig`` for the weights that a measurement ranks first.

    Each adapter's size is in proportion to the norm of its weight's gradient (see
    :func:`fastgrad.integrations.peft_ranks.share_ranks`), the sum of sizes is that of rank ``r``
    everywhere, and alpha/rank is the same for all, so that a larger rank is no larger step.

    LoRA is put on linear layers, GPT-2's ``Conv1D``, embeddings and convolutions, and through
    ``target_parameters`` on stacked expert weights and other bare matrices (PEFT 0.21 warns that
    their rank patterns are ignored; they are heeded). Norms, biases and vectors have no factors:
    by default they are not chosen; with ``whole`` a chosen one's module is trained as it is
    (``modules_to_save``), unless it is a part of something else, such as the bias of a linear
    layer. A weight in two places, such as an embedding that is the output layer too, is left
    out, unless ``tied`` is set and PEFT can tie its adapters. What a ``selection`` holds and
    cannot be had is warned of by name; :func:`lora_plan` returns it.

    Args:
        source: what was measured.
        model: that the adapter is for; on the meta device too.
        fraction: share of the model's elements that the chosen weights make up at most.
        count: number of weights that are chosen. Without either, all that LoRA applies to.
        selection: what :func:`fastgrad.select` chose, instead of either; a weight of which any
            block is chosen gets an adapter.
        r: rank that all would have if the gradient were the same everywhere.
        budget: parameters of all adapters together, instead of those of rank ``r`` everywhere.
        min_rank, max_rank: bounds of each rank; the upper one is ``4 * r`` by default, and never
            more than the smaller side of the matrix.
        alpha_ratio: ``lora_alpha`` by rank; with ``use_rslora`` alpha is this times ``r`` for all.
        whole: see above.
        tied: adapt an embedding that is the output layer too, where PEFT knows how
            (``ensure_weight_tying``). PEFT 0.21 makes two parameters over one memory of each
            factor: an optimizer steps both, one after the other, and moving the model to another
            device afterwards divides them.
        ranking: ``norm``, ``rms``, ``relative`` or a control, as :func:`fastgrad.select` has them.
        include, exclude: name patterns of parameters.
        **lora: further fields of ``peft.LoraConfig``: ``task_type``, ``lora_dropout`` and others.

    Raises:
        SelectionError: for both fraction and count, a source or selection of another model
            (naming what differs), a field that the measurement decides, a budget that is too
            small, or a configuration that PEFT does not read as it is meant.
        MissingExtraError: without PEFT.
    """
    LoraConfig = _lora_config()
    if taken := [name for name in _OURS if name in lora]:
        raise SelectionError(f"{taken[0]} follows from the measurement. Remedy: leave it out")
    if not alpha_ratio > 0:
        raise SelectionError(f"alpha_ratio is {alpha_ratio}; it must be above 0")
    model = unwrapped(model)
    plan = lora_plan(
        source, model, fraction=fraction, count=count, selection=selection, r=r, budget=budget,
        min_rank=min_rank, max_rank=max_rank, whole=whole, tied=tied, ranking=ranking,
        include=include, exclude=exclude,
    )  # fmt: skip
    _refuse_idle(plan, lora)
    config = LoraConfig(**_fields(plan, model, r, alpha_ratio, lora), **lora)
    refuse_difference(config, model, plan.ranks, plan.targets, set(plan.whole.values()))
    if plan.left_out:
        named = "; ".join(f"{n}: {why}" for n, why in list(plan.left_out.items())[:5])
        more = f"; and {len(plan.left_out) - 5} more" if len(plan.left_out) > 5 else ""
        warnings.warn(f"no adapter for {named}{more}", stacklevel=2)
    return config


def _fields(
    plan: LoraPlan, model: nn.Module, r: int, ratio: float, lora: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a LoraConfig that say what the plan says, as briefly as PEFT reads it."""
    # The rank that most have is the default, so that the patterns name the fewest.
    default = Counter(plan.ranks.values()).most_common(1)[0][0]
    modules = [t.module for t in plan.targets.values() if not t.bare]
    bare = [t.parameter for t in plan.targets.values() if t.bare]
    saved = sorted(set(plan.whole.values()))
    tied = any(t.shared_with for t in plan.targets.values())
    if modules:
        brief = brief_targets(modules, lambda b: matched(b, model, saved), as_list=tied)
    else:
        brief = Brief([])  # not None: PEFT would choose modules by itself
    stored = {t.fan_in_fan_out for t in plan.targets.values()} - {None}
    fields: dict[str, Any] = {
        "r": default,
        "lora_alpha": _alpha(r if lora.get("use_rslora") else default, ratio),
        "target_modules": brief.target_modules,
        "layers_to_transform": brief.layers,
        "layers_pattern": brief.layers_pattern,
        # Anchored and escaped, since PEFT reads the keys as regular expressions that may begin
        # at any dot of a name.
        "rank_pattern": {
            "^" + re.escape(key): plan.ranks[name] for name, t in plan.targets.items()
            for key in t.keys if plan.ranks[name] != default
        },
        "target_parameters": bare or None,
        "modules_to_save": saved or None,
        "fan_in_fan_out": stored == {True},
    }  # fmt: skip
    fields["alpha_pattern"] = {} if lora.get("use_rslora") else {
        key: _alpha(rank, ratio) for key, rank in fields["rank_pattern"].items()
    }  # fmt: skip
    if tied:
        fields["ensure_weight_tying"] = True
    return fields


def _alpha(rank: int, ratio: float) -> float:
    alpha = rank * ratio
    return int(alpha) if float(alpha).is_integer() else alpha


def target_regex(
    source: Blueprint | GradientStats,
    model: nn.Module,
    *,
    fraction: float | None = None,
    count: int | None = None,
    selection: Selection | None = None,
    ranking: str = "rms",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> str:
    """A regular expression that matches exactly the modules that :func:`peft_config` would choose.

    For ``re.fullmatch`` over ``model.named_modules()``, which is how PEFT reads
    ``target_modules`` where it is text. It was tried on every module's name. Stacked expert
    weights are no modules and not in it.

    Args:
        source, model, fraction, count, selection, ranking, include, exclude: as for
            :func:`peft_config`.

    Raises:
        SelectionError: as for :func:`peft_config`.
        MissingExtraError: without PEFT.
    """
    model = unwrapped(model)
    plan = lora_plan(source, model, fraction=fraction, count=count, selection=selection,
                     ranking=ranking, include=include, exclude=exclude,
                     modules_only=True, shared=False)  # fmt: skip
    wanted = [t.module for t in plan.targets.values()]
    return regex_of(wanted, [name for name, _ in model.named_modules()])


def layer_list(
    source: Blueprint | GradientStats,
    model: nn.Module | None = None,
    *,
    fraction: float | None = None,
    count: int | None = None,
    container: str | None = None,
) -> list[int]:
    """Numbers of the layers with the largest gradient per weight, in ascending order: for
    ``layers_to_transform``, and for tools that train whole layers.

    A layer's score is the rms of its measured gradients: √(Σ‖g‖² / elements).

    Args:
        source: what was measured.
        model: to check that the measurement is of it.
        fraction: share of all layers' elements that the chosen ones make up at most.
        count: number of layers, instead.
        container: the list of layers, such as ``model.layers``, where a model has several.

    Raises:
        SelectionError: for not exactly one of fraction and count, one out of range, a model
            without numbered layers, or with several lists of them and no ``container``.
    """
    if model is not None:
        parameters_of(source, unwrapped(model))
    if (fraction is None) == (count is None):
        raise SelectionError("give exactly one of fraction and count")
    shapes = dict(zip(source.names, source.shapes, strict=True))
    measured = _measured(source, shapes)
    return layers_by_gradient(measured, shapes, fraction, count, container)


def _measured(
    source: Blueprint | GradientStats, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    """Parameter -> squared gradient norm, for those that were measured."""
    from fastgrad.stats import GradientStats

    if isinstance(source, GradientStats):
        names = list(shapes)
    else:
        names = [n for n in source.names if n in source.measured_names]
    _refuse_coarse(source, "a layer's score is a sum of squared gradient norms. Remedy: a "
                           "blueprint with norms")  # fmt: skip
    grids = {name: BlockGrid.of(shapes[name], "module") for name in names}
    scores = block_scores(source, None, "norm", grids, seed=0)
    return {name: float(v[0]) ** 2 for name, v in scores.items() if np.isfinite(v[0])}


def _refuse_coarse(source: Blueprint | GradientStats, why: str) -> None:
    from fastgrad.stats import GradientStats

    if not isinstance(source, GradientStats) and is_coarse(source.file):
        raise SelectionError(
            f"this blueprint holds {source.file.privacy.released} of rms alone, and {why}"
        )


def _chosen(
    source: Blueprint | GradientStats,
    model: nn.Module,
    candidates: Sequence[str],
    usable: Sequence[str],
    fraction: float | None,
    count: int | None,
    ranking: str,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> list[str]:
    """Names by the budget, of what can be adapted only: a budget is not spent on what cannot."""
    if fraction is not None and count is not None:
        raise SelectionError("give fraction or count, not both")
    if fraction is None and count is None:
        fraction = 1.0
    kept = set(usable)
    # Names are patterns here: their brackets are not meant as such.
    shut = [glob.escape(n) for n in candidates if n not in kept]
    return select(
        source, model, fraction=fraction, submodules=count, blocks="module", ranking=ranking,
        include=include, exclude=[*(exclude or ()), *shut] or None, hash_weights=False,
    ).names  # fmt: skip


def _reason(name: str, known: Adaptable, modules_only: bool) -> str:
    if name in known.reasons:
        return known.reasons[name]
    if modules_only and name in known.targets:
        return "it is no module of its own"
    return "it was not measured, or requires no gradient"


def _refuse_idle(plan: LoraPlan, lora: Mapping[str, Any]) -> None:
    """What PEFT cannot do with bare parameters, said by name before it is built."""
    bare = [t.parameter for t in plan.targets.values() if t.bare]
    if not bare:
        return
    for name in ("lora_dropout", "use_dora", "lora_bias"):
        if lora.get(name):
            raise SelectionError(f"PEFT cannot combine {name} with an adapter of {bare[0]}, which "
                                 f"is no layer of its own. Remedy: leave out {name}, or "
                                 f"exclude=[{bare[0]!r}]")  # fmt: skip


def _bounds(r: int, min_rank: int, max_rank: int | None) -> tuple[int, int]:
    if r < 1 or min_rank < 1:
        raise SelectionError(f"r is {r} and min_rank {min_rank}; both must be at least 1")
    most = 4 * r if max_rank is None else max_rank
    if most < min_rank:
        raise SelectionError(f"max_rank is {most}, below min_rank {min_rank}")
    return min_rank, most


def _lora_config() -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtraError("peft", "hf") from error
    return LoraConfig


def _can_tie() -> bool:
    """PEFT keeps adapters of tied embeddings tied."""
    return "ensure_weight_tying" in _lora_config().__dataclass_fields__


__all__ = ["LoraPlan", "layer_list", "lora_plan", "peft_config", "target_regex"]
