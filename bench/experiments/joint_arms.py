"""The arms of the joint experiment: what is trained, on which rows, and how the rows are chosen.

Rows are chosen once, on the pretrained model (by gradient norm together with the blocks; or by
alignment and cosine with the gradient of held-out rows, the target set), or anew before every step,
among four times as many candidates. Alignment counts the trained blocks only; norms, and so the
cosine, count the parameters that have such a block whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastgrad as fg
from experiments import common
from fastgrad.measuring import untouched, whole_weights
from fastgrad.quickstart.arms import Prepared
from fastgrad.quickstart.pretrain import batches
from fastgrad.quickstart.settings import FRACTION
from fastgrad.quickstart.worker import data_order

EXAMPLES = 0.25
BOTH = "joint, alternating"
ALL, FULL = "parameters alone", "full"  # all examples
RENEWAL = 10  # steps between two gradients of the target set
Rows = Callable[[int], np.ndarray]  # seed -> numbers of the training rows that may be used


@dataclass(frozen=True)
class JointArm:
    """One way to choose parameters and examples.

    Attributes:
        prepare: how the model is set up.
        rows: on which rows it may train, or among which it chooses.
        steps: of training.
        parameters: share of the parameters that is trained.
        measured: rows whose gradients were measured before training.
        against: label of the arm that trains the same share of the parameters, chosen by their
            gradient, on rows as they come.
        online: score by which rows are chosen before every step; None: the rows as they come.
        selection: of the blocks that are trained; None: all.
    """

    prepare: common.Prepare
    rows: Rows
    steps: int
    parameters: float
    measured: int
    against: str | None = ALL
    online: str | None = None
    selection: fg.Selection | None = None

    def run(self, base: common.Base, domain: str, seed: int, target: Tensor) -> dict[str, Any]:
        """Losses at the best rate."""
        if self.online is None:
            return common.Adaptation(
                base, domain, self.prepare, seed, rows=self.rows(seed), steps=self.steps
            ).run()
        return Online(self, base, domain, seed, target).run()

    def choosing(self, batch: int, target: int) -> int:
        """Rows whose gradients were measured to choose blocks and rows, those of the target set
        among them."""
        if self.online is None:
            return self.measured
        renewed = 0 if self.online == "norm" else math.ceil(self.steps / RENEWAL) * target
        return self.measured + renewed + self.steps * round(batch / EXAMPLES)


class Online(common.Adaptation):
    """Before every step the best rows of four times as many candidates are chosen, with the model
    as it is; the gradient of the target set is renewed every :data:`RENEWAL` steps."""

    def __init__(
        self, arm: JointArm, base: common.Base, domain: str, seed: int, target: Tensor
    ) -> None:
        super().__init__(base, domain, arm.prepare, seed, rows=arm.rows(seed), steps=arm.steps)
        self.arm, self.target = arm, target

    def prepare(self, model: nn.Module) -> Prepared:
        s, n = self.spec.settings, len(self.data["prose_train"])
        wide = round(s.rows / EXAMPLES)
        self.candidates: Iterator[Tensor] = iter(data_order(n, wide, s.steps, self.spec.seed))
        self.chooser: fg.BatchChooser | None = None
        self.done = 0
        return super().prepare(model)

    def batch(self, prepared: Prepared, rows: Tensor) -> Tensor:
        arm, model, partial = self.arm, prepared.model, prepared.partial
        assert arm.online is not None
        if arm.online != "norm" and self.done % RENEWAL == 0:
            direction = target_gradient(model, partial, self.target, arm.selection)
            if self.chooser is not None:
                self.chooser.targets = direction
        if self.chooser is None:
            self.chooser = fg.BatchChooser(
                model, EXAMPLES, by=arm.online,  # type: ignore[arg-type]
                params=None if arm.selection is None else list(arm.selection.blocks),
                targets=None if arm.online == "norm" else direction, partial=partial,
            )  # fmt: skip
        self.done += 1
        part = self.data["prose_train"][next(self.candidates)]
        chosen: Tensor = self.chooser.choose({"input_ids": part, "labels": part}).batch["input_ids"]
        return chosen


def target_gradient(
    model: nn.Module, partial: fg.Partial | None, target: Tensor, selection: fg.Selection | None
) -> dict[str, Tensor]:
    """Mean gradient of the target set, zero outside of the selected blocks."""
    with whole_weights(model, partial), untouched(model):
        model(input_ids=target, labels=target).loss.backward()
        direction = fg.gradient_direction(model)
    return direction if selection is None else within(direction, selection)


def within(direction: Mapping[str, Tensor], selection: fg.Selection) -> dict[str, Tensor]:
    """The direction in the selected blocks, zero in the others."""
    found = {}
    for name, ids in selection.blocks.items():
        grid, whole = selection.grid(name), direction[name]
        view = whole.reshape(grid.rows, grid.cols)
        kept = torch.zeros_like(view)
        for block in ids.tolist():
            r0, r1, c0, c1 = grid.bounds(block)
            kept[r0:r1, c0:c1] = view[r0:r1, c0:c1]
        found[name] = kept.reshape(whole.shape)
    return found


def signed_scores(
    base: common.Base, pool: Tensor, target: Tensor, selection: fg.Selection | None
) -> dict[str, np.ndarray]:
    """Alignment and cosine of every row of the pool with the target set, on the pretrained model,
    in the selected blocks. The cosine divides by the norm over the parameters that have one."""
    model = base.model()
    direction = target_gradient(model, None, target, selection)
    names = None if selection is None else list(selection.blocks)
    size = base.settings.probe_rows
    with fg.Probe(model, params=names, targets=direction, detail=(),
                  loss_reduction="token_mean") as probe:  # fmt: skip
        for part in batches(pool, size, -(-len(pool) // size)):
            model(**part).loss.backward()
    stats = probe.stats()
    return {by: fg.example_scores(stats, by) for by in ("alignment", "cosine")}  # type: ignore[arg-type]


def arms(
    base: common.Base, stats: fg.GradientStats, pool_ids: np.ndarray, pool: Tensor, target: Tensor,
    steps: int,
) -> dict[str, JointArm]:  # fmt: skip
    """The arms by label, the joint choice first."""
    s, n = base.settings, len(pool_ids)
    both, each = (
        fg.select_jointly(stats, FRACTION, EXAMPLES, strategy=strategy)
        for strategy in ("alternating", "marginal")
    )
    count = len(both.example_ids)
    blocks = each.selection  # marginal: those with most gradient over all examples
    own = common.sparse(blocks)

    def some(seed: int) -> np.ndarray:
        return pool_ids[np.random.default_rng(1000 + seed).permutation(n)[:count]]

    def random_tiles(model: nn.Module, seed: int) -> fg.Selection:
        return fg.select(None, model, fraction=FRACTION, blocks=s.tile, ranking="random", seed=seed)

    def fixed(rows: np.ndarray) -> Rows:
        return lambda _: rows

    def best(scores: np.ndarray) -> Rows:
        return fixed(pool_ids[np.argsort(-scores, kind="stable")[:count]])

    everywhere, heavy = fixed(pool_ids), fixed(pool_ids[each.example_ids])
    signed = signed_scores(base, pool, target, blocks)
    signed_whole = signed_scores(base, pool, target, None)
    few = max(1, round(FRACTION * steps))
    all_of = common.whole("full", base)

    def part(rows: Rows, measured: int, blocks: common.Prepare = own, **options: Any) -> JointArm:
        return JointArm(blocks, rows, steps, FRACTION, measured, **options)

    def full(rows: Rows, measured: int = 0, **options: Any) -> JointArm:
        return JointArm(all_of, rows, few, 1.0, measured, **{"against": FULL, **options})

    m = len(target)
    return {
        BOTH: part(fixed(pool_ids[both.example_ids]), n, common.sparse(both.selection)),
        "joint, marginal": part(heavy, n),
        **{f"joint, rows by {by}": part(best(scores), 2 * n + m) for by, scores in signed.items()},
        **{f"joint, rows anew every step by {by}": part(everywhere, n, online=by, selection=blocks)
           for by in ("norm", "alignment", "cosine")},
        ALL: part(everywhere, n, against=None),
        "parameters, random quarter": part(some, n),
        "random tiles, all rows": part(everywhere, 0, common.sparse(random_tiles)),
        "rows alone, by norm": full(heavy, n),
        **{f"rows alone, by {by}": full(best(scores), n + m)
           for by, scores in signed_whole.items()},
        "rows alone, anew every step by cosine": full(everywhere, online="cosine"),
        "random quarter alone": full(some),
        FULL: full(everywhere, against=None),
        "full, five times the cost": JointArm(all_of, everywhere, steps, 1.0, 0, None),
    }  # fmt: skip
