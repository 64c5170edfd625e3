"""select_jointly: a measurement gives the blocks to train and the examples to train them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgrad.choosing import filtered_names, parameters_of
from fastgrad.concentration import FloatArray, IntArray
from fastgrad.errors import SelectionError
from fastgrad.joint import RANK, JointChoice, JointCost, Strategy, choose_jointly
from fastgrad.mass import MassMatrix
from fastgrad.selection import Selection
from fastgrad.stats import GradientStats, Scale

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import WeightedRandomSampler


@dataclass(frozen=True, eq=False)
class JointSelection:
    """Blocks to train, and examples to train them on.

    Attributes:
        selection: of the blocks, for :func:`fastgrad.make_partial`.
        example_ids: int64, ids of the chosen examples as the statistics have them, the one with
            the most gradient in the chosen blocks first. Without ids of one's own the probe numbers
            examples in the order measured: the rows of a data set that was read without shuffling.
        scores: float64, squared gradient of each chosen example in the chosen blocks.
        choice: shares, cost and how it came about, see :class:`fastgrad.joint.JointChoice`.
    """

    selection: Selection
    example_ids: IntArray
    scores: FloatArray
    choice: JointChoice

    def subset(self, dataset: Any) -> Any:
        """The chosen rows of a data set, best first: ``dataset.select(ids)`` where it has that
        (``datasets.Dataset``), else a :class:`torch.utils.data.Subset`.

        Raises:
            SelectionError: if an id is no row of the data set.
        """
        self._require_rows(len(dataset))
        ids = self.example_ids.tolist()
        if hasattr(dataset, "select"):
            return dataset.select(ids)
        from torch.utils.data import Subset

        return Subset(dataset, ids)

    def sampler(
        self, dataset: Any, num_samples: int | None = None, seed: int = 0
    ) -> WeightedRandomSampler:
        """Draws the chosen rows with replacement, each in proportion to its gradient norm in the
        chosen blocks: the weights with the least variance of the summed gradient, if every drawn
        row's loss is divided by its weight (Zhao and Zhang, ICML 2015). Loaders that do not divide
        train on the heavy rows more often, which is another objective.

        Args:
            dataset: of which the ids are rows.
            num_samples: rows drawn in an epoch; by default as many as were chosen.
            seed: of the draws.

        Raises:
            SelectionError: if an id is no row of the data set, or no chosen example has any
                gradient.
        """
        import torch
        from torch.utils.data import WeightedRandomSampler

        if num_samples is not None and num_samples < 1:
            raise SelectionError(f"num_samples is a number of rows, 1 or more; got {num_samples}")
        self._require_rows(len(dataset))
        if not self.scores.any():
            raise SelectionError("no chosen example has any gradient in the chosen blocks")
        weights = torch.zeros(len(dataset), dtype=torch.float64)
        weights[torch.from_numpy(self.example_ids)] = torch.from_numpy(np.sqrt(self.scores))
        return WeightedRandomSampler(
            weights.tolist(),
            num_samples or len(self.example_ids),
            generator=torch.Generator().manual_seed(seed),
        )

    def _require_rows(self, n: int) -> None:
        if len(np.unique(self.example_ids)) != self.example_ids.size:
            raise SelectionError(
                "an example was measured more than once, so its id stands for several scores. "
                "Remedy: measure each example once, or merge statistics with ids of their own"
            )
        outside = self.example_ids[(self.example_ids < 0) | (self.example_ids >= n)]
        if outside.size:
            raise SelectionError(
                f"example id {int(outside[0])} is no row of this data set of {n}. Remedy: pass the "
                "data set that was probed, or give the probe ids that are its rows"
            )

    def summary(self) -> str:
        """What was chosen and what it holds, a line each."""
        c = self.choice
        return "\n".join((
            f"{c.parameters:.1%} of the parameters ({self.selection.n_blocks} blocks) and "
            f"{c.examples.mean():.1%} of the examples ({len(self.example_ids)}), "
            f"{c.strategy}" + (f", {c.rounds} rounds" if c.rounds else ""),
            f"together they hold {c.share:.1%} of the squared gradient; these blocks on all "
            f"examples {c.by_blocks:.1%}, all blocks on these examples {c.by_examples:.1%}",
            f"that is {c.ratio:.2f} times the product of both; cost {c.cost:.4g}",
        ))  # fmt: skip


def select_jointly(
    stats: GradientStats,
    parameters: float | None = None,
    examples: float | None = None,
    *,
    model: nn.Module | None = None,
    strategy: Strategy = "alternating",
    budget: float | None = None,
    cost: JointCost | None = None,
    groups: Sequence[Any] | None = None,
    quotas: Mapping[Any, tuple[float, float]] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    scale: Scale = "contribution",
    blocks: bool = True,
    rank: int = RANK,
    seed: int = 0,
) -> JointSelection:
    """Choose the blocks to train and the examples to train them on, each with an eye on the other.

    Args:
        stats: with examples. Parameters with block detail are chosen by block, others whole.
        parameters, examples, strategy, budget, cost, groups, quotas, rank, seed: see
            :func:`fastgrad.joint.choose_jointly`; shares are of what may be chosen.
        model: needed where only part of the model was measured. If given, parameters that do not
            require a gradient are left out.
        include, exclude: name patterns (``fnmatch``) of the parameters that may be chosen.
        scale: of the influence, see :meth:`GradientStats.influence`. ``contribution`` weighs an
            example as training does; ``example_mean`` as if all had the same weight.
        blocks: False: whole parameters only.

    Raises:
        SelectionError: as :func:`fastgrad.joint.choose_jointly` and :func:`fastgrad.select`.
        StatsError: without examples, or if no parameter's influence is known.
    """
    shapes, candidates = parameters_of(stats, model)
    allowed = set(filtered_names(candidates, shapes, include, exclude))
    mass = MassMatrix.from_stats(stats, scale, blocks=blocks)
    keep = np.array([name in allowed for name in mass.names])
    if not keep.any():
        raise SelectionError("of the parameters that may be chosen, no influence is known. Remedy: "
                             "see stats.coverage")
    if not keep.all():
        if not mass.by_block[keep].sum():
            raise SelectionError("the parameters that may be chosen have no gradient at all")
        mass = replace(
            mass,
            values=mass.values[keep],
            sizes=mass.sizes[keep],
            names=[n for n, k in zip(mass.names, keep, strict=True) if k],
            blocks=mass.blocks[keep],
        )
    total = sum(int(np.prod(s, dtype=np.int64)) for s in shapes.values())
    choice = choose_jointly(
        mass, parameters, examples, strategy=strategy, budget=budget, cost=cost, groups=groups,
        quotas=quotas, rank=rank, n_parameters=total, seed=seed,
    )  # fmt: skip
    chosen: dict[str, list[int]] = {}
    for i in np.flatnonzero(choice.blocks):
        chosen.setdefault(mass.names[i], []).append(int(mass.blocks[i]))
    columns = np.flatnonzero(choice.examples)
    columns = columns[np.argsort(-choice.score[columns], kind="stable")]
    meta = {
        "ranking": f"joint, {choice.strategy}",
        "budget": {"kind": "joint", "value": choice.cost, "parameters": choice.parameters,
                   "examples": float(choice.examples.mean())},
        "source": {"kind": "stats", "n_examples": stats.n_examples, "n_batches": stats.n_batches,
                   "domain_tags": []},
        "share": choice.share,
        "scale": scale,
        "unranked": list(mass.left_out),
    }  # fmt: skip
    spec, specs = (stats.spec, dict(stats.specs)) if blocks else ("module", {})
    for name in chosen:  # chosen whole, for want of block detail
        if blocks and name not in stats.block_sq and not stats.grid(name).is_whole:
            specs[name] = "module"
    selection = Selection(
        shapes, spec, {n: np.array(ids, np.int64) for n, ids in chosen.items()},
        stats.meta.get("weights_hash"), meta, specs,
    )  # fmt: skip
    return JointSelection(selection, mass.example_ids[columns], choice.score[columns], choice)


__all__ = ["JointSelection", "select_jointly"]
