"""Which arms are compared, at which sizes, and how each is set up."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

import arms_peers
import arms_reselect
from fastgrad.quickstart.arms import Prepared
from fastgrad.quickstart.arms import prepare as prepare_own
from fastgrad.quickstart.settings import Arm, Settings, Spec

OURS, CONTROL, PEER, FULL = "ours", "control", "peer", "full"
# Arms whose trained part changes on the way: what they cost is measured over more steps.
TAKE_TURNS = frozenset({"badam", "lisa", "reselected"})


def settings(fast: bool) -> Settings:
    """The quickstart's sizes, so that its figures and these can be read side by side."""
    if fast:
        return replace(Settings.fast(), draws=1)
    return replace(Settings.full(), draws=1)


def arms(settings: Settings) -> dict[Arm, str]:
    """Every arm and its role, in the order of the table; full tuning comes first.

    Random arms draw with the training seed: one draw for each seed.
    """
    tile = settings.tile
    return {
        Arm("full", "full AdamW", "full"): FULL,
        Arm("submodules", "SparseAdamW, submodules", "sparse", "blend"): OURS,
        Arm("rows", "SparseAdamW, rows", "sparse", "blend", blocks="row"): OURS,
        Arm("tiles", f"SparseAdamW, {tile} tiles", "sparse", "blend", blocks=tile): OURS,
        Arm("reselected", "SparseAdamW, re-selected", "reselected", "blend"): OURS,
        Arm("random", "random submodules", "sparse", None, "random"): CONTROL,
        Arm("embedding", "embedding + random", "sparse", None, "random",
            keep=(arms_peers.EMBEDDING,)): CONTROL,
        Arm("last", "last layers", "sparse", None, "last"): CONTROL,
        Arm("lora", "LoRA", "lora"): PEER,
        Arm("lora-embedding", "LoRA + embedding", "lora-embedding"): PEER,
        Arm("dora", "DoRA", "dora"): PEER,
        Arm("galore", "GaLore", "galore"): PEER,
        Arm("badam", "BAdam", "badam"): PEER,
        Arm("lisa", "LISA-style", "lisa"): PEER,
        Arm("adamw-8bit", "8-bit AdamW", "adamw-8bit"): PEER,
    }  # fmt: skip


def granularity(arm: Arm, settings: Settings) -> str:
    """Blocks of the statistics that an arm needs: tiles also serve whole submodules."""
    return arm.blocks if arm.blocks == "row" else settings.tile


def prepare(spec: Spec, model: nn.Module) -> Prepared:
    """Set up ``model`` for any arm of :func:`arms`."""
    if spec.arm.kind in arms_peers.KINDS:
        return arms_peers.prepare(spec, model)
    if spec.arm.kind == "reselected":
        return arms_reselect.prepare(spec, model)
    return prepare_own(spec, model)
