"""The arm that chooses again on the way: what is trained follows the gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from safetensors.torch import load_file
from torch import nn

import fastgrad as fg
from fastgrad.integrations.transformers import measure
from fastgrad.quickstart.arms import Prepared
from fastgrad.quickstart.arms import prepare as prepare_own
from fastgrad.quickstart.pretrain import batches
from fastgrad.quickstart.settings import Spec
from fastgrad.quickstart.worker import data_order

TIMES = 3  # each selection serves for a third of the steps
PROBED = 2  # batches


def period(steps: int) -> int:
    """Steps between selections."""
    return max(1, steps // TIMES)


def prepare(spec: Spec, model: nn.Module) -> Prepared:
    """A sparse arm that probes the rows that come next and selects anew, twice.

    What the probe says is blended with the released blueprint as at the start. Its passes are
    part of the arm's time, operations and peak memory.
    """
    settings = spec.settings
    every = period(settings.steps)
    ready = prepare_own(replace(spec, arm=replace(spec.arm, kind="sparse")), model)
    partial = ready.partial
    assert partial is not None
    data = load_file(spec.data)["prose_train"]
    order = data_order(len(data), settings.rows, settings.steps, spec.seed)
    need = PROBED * settings.probe_rows // settings.rows  # training batches that are looked at

    def choose_again(step: int, optimizer: Any) -> None:
        if step % every or step // every >= TIMES:
            return
        rows = [data[i] for i in order[step : step + need]]
        ahead = [batch for part in rows for batch in batches(part, settings.rows, 1)]
        with partial.suspended() as plain:
            stats, _ = measure(plain, ahead, blocks=settings.tile)
            released = fg.Blueprint.from_pretrained(spec.released or spec.model)
            mixed = released.blend(stats, weight="auto", allow_other_weights=True)
            selection = fg.select(
                mixed, model=plain, fraction=spec.fraction,
                blocks=spec.arm.blocks, ranking=spec.arm.ranking,
            )  # fmt: skip
        partial.reselect(selection, optimizer)
        ready.trained[:] = partial.parameters()

    ready.after_step = choose_again
    ready.note += f"; chosen again every {every} steps from {need} batches that come next"
    return ready
