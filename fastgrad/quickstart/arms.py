"""The arms: what is trained, and by which optimizer. Everything else is equal between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastgrad as fg
from fastgrad.errors import FastgradError, MissingExtraError
from fastgrad.identity import model_parameters
from fastgrad.quickstart.settings import Spec

WEIGHT_DECAY = 0.01


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor that an optimizer keeps from one step to the next."""
    return [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]


def no_tensors() -> list[Tensor]:
    return []


@dataclass
class Prepared:
    """A model made ready for one arm.

    Attributes:
        model: what is called in training and evaluation.
        trained: the tensors that get gradients.
        n_trained: number of trained weights, padding not counted.
        optimizer: rate -> optimizer.
        partial: for sparse arms.
        selected: parameter name -> share of it that is trained.
        note: one line about the choice.
        state: optimizer -> the tensors that it keeps.
        copies: the tensors that training keeps beside the model's own weights.
        after_step: called with the number of steps done and the optimizer.
    """

    model: nn.Module
    trained: list[nn.Parameter]
    n_trained: int
    optimizer: Callable[[float], torch.optim.Optimizer]
    partial: fg.Partial | None = None
    selected: dict[str, float] = field(default_factory=dict)
    note: str = ""
    state: Callable[[Any], Iterable[Tensor]] = state_tensors
    copies: Callable[[], Iterable[Tensor]] = no_tensors
    after_step: Callable[[int, Any], None] | None = None


def prepare(spec: Spec, model: nn.Module) -> Prepared:
    """Set up ``model`` (changed in place) for the arm of ``spec``."""
    if spec.arm.kind not in KINDS:
        raise FastgradError(f"unknown kind of arm {spec.arm.kind!r}; use one of {', '.join(KINDS)}")
    return KINDS[spec.arm.kind](spec, model)


def _full(spec: Spec, model: nn.Module) -> Prepared:
    trained = list(model.parameters())
    return Prepared(
        model,
        trained,
        sum(p.numel() for p in trained),
        lambda rate: torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY, fused=True),
        selected={name: 1.0 for name in model_parameters(model)},
        note="every weight",
    )


def _sparse(spec: Spec, model: nn.Module) -> Prepared:
    selection = choose(spec, model)
    partial = fg.make_partial(model, selection)
    trained = list(partial.parameters())
    return Prepared(
        model,
        trained,
        partial.n_parameters,
        lambda rate: fg.SparseAdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY),
        partial=partial,
        selected={
            name: selection.n_selected(name) / selection.grid(name).numel
            for name in selection.blocks
        },
        note=f"{len(selection.blocks)} of {len(selection.shapes)} submodules, "
        f"{sum(len(ids) for ids in selection.blocks.values())} blocks",
        copies=lambda: [t for b in partial.packed for t in (b.packed, b.ids)],
    )


def choose(spec: Spec, model: nn.Module) -> fg.Selection:
    """The arm's selection: from the blueprint blended with the local sample, or from none."""
    arm = spec.arm
    released = spec.released or spec.model
    source = blended(released, spec.local) if arm.source == "blend" else None
    own = model_parameters(model)
    kept = sum(own[name].numel() for name in arm.keep)
    fraction = spec.fraction - kept / sum(p.numel() for p in own.values())
    chosen = fg.select(
        source, model=model, fraction=fraction, blocks=arm.blocks, ranking=arm.ranking,
        seed=spec.seed + arm.draw, exclude=arm.keep or None,
    )  # fmt: skip
    if not arm.keep:
        return chosen
    whole = {n: np.arange(chosen.grid(n).n_blocks) for n in arm.keep}
    found = {**chosen.blocks, **whole}
    blocks = {name: found[name] for name in chosen.shapes if name in found}
    return fg.Selection(
        chosen.shapes, chosen.spec, blocks, chosen.weights_hash,
        {**chosen.meta, "kept": list(arm.keep)}, chosen.specs,
    )  # fmt: skip


def blended(folder: Path, local: Path) -> fg.Blueprint:
    """The released blueprint, mixed with what the user's own sample says."""
    released = fg.Blueprint.from_pretrained(folder)
    return released.blend(fg.GradientStats.load(local), weight="auto")


def lora_rank(model: nn.Module, budget: float) -> int:
    """The rank whose number of trained weights comes closest to ``budget``."""
    per_rank = sum(
        module.in_features + module.out_features for module in lora_targets(model).values()
    )
    return max(1, round(budget / per_rank))


def lora_targets(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of the decoder: the output layer shares its weight with the embedding."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def _lora(spec: Spec, model: nn.Module) -> Prepared:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "hf") from error

    total = sum(p.numel() for p in model.parameters())
    targets = sorted(lora_targets(model))
    rank = lora_rank(model, spec.fraction * total)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=targets,
    )  # fmt: skip
    adapted: Any = get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return Prepared(
        adapted,
        trained,
        sum(p.numel() for p in trained),
        lambda rate: torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY, fused=True),
        note=f"rank {rank}, alpha {2 * rank}, all {len(targets)} linear layers of the decoder",
        copies=lambda: trained,
    )


KINDS: dict[str, Callable[[Spec, nn.Module], Prepared]] = {
    "full": _full, "sparse": _sparse, "lora": _lora,
}  # fmt: skip
