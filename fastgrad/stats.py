"""GradientStats: what a probe measured, as raw sums and counts, so that merging is exact."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from fastgrad.blocks import BlockGrid, check_spec, check_specs, grid_of
from fastgrad.dead import dead_parameters
from fastgrad.errors import StatsError

Array = NDArray[np.float64]
Scale = Literal["contribution", "example_mean", "example_sum"]
_RUNNING: NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # stands for "number them"


@dataclass(frozen=True)
class Coverage:
    """Whether a parameter's influence is known.

    ``status``: ``exact``; ``unused`` (no gradient ever reached it: its influence is zero);
    ``frozen`` (does not require a gradient, was not measured); ``missing`` (a gradient came from
    a use that no tap covers, see ``reason``; its ``T`` is NaN, its gradient norm is known).
    """

    name: str
    status: Literal["exact", "unused", "frozen", "missing"]
    reason: str = ""


@dataclass
class GradientStats:
    """Measured gradient norms and cross-influence.

    Attributes:
        names: parameter names as ``model.named_parameters()`` has them, P of them.
        shapes: their shapes.
        spec: block granularity, see :class:`fastgrad.blocks.BlockGrid`.
        specs: parameter name -> granularity, for those that differ from ``spec``.
        sq: ``[P, E]`` squared norm of example e's *contribution* to the gradient of its batch
            loss, exactly as autograd has it. NaN where coverage is missing.
        batch: ``[E]`` number of the backward pass that example e belonged to.
        label_tokens: ``[E]`` label tokens of each example that enter the loss; -1 if unknown.
        mean_factor, sum_factor: ``[E]`` what turns a contribution into the gradient of the
            example's own mean (or summed) loss; NaN if the loss reduction was not known.
        batch_sq: ``[P, N]`` squared norm of the gradient of each of N backward passes.
        block_sq: parameter name -> ``[n_blocks, E]`` float32, where block detail was kept.
        block_batch_sq: name -> ``[n_blocks]`` squared norms of batch gradients, summed over
            the N passes.
        block_batch_abs: name -> ``[n_blocks]`` sums of the absolute values of batch gradients,
            summed over the N passes; for every parameter, or none (``Probe(l1=True)``).
        block_alignment: name -> ``[K, n_blocks]`` inner products of contributions and direction,
            summed over the examples; for parameters of several blocks. NaN where coverage is
            missing.
        weight_sq: ``[P]`` squared norm of the weights when the probe began.
        alignment_by_direction: ``[K, P, E]`` inner product of contribution and direction.
        directions: names of the K directions.
        coverage_list: one :class:`Coverage` per parameter of the model, probed or not.
        meta: model hash, class, dtype, loss reduction and the like; JSON values only.
        example_ids: int64 ``[E]``; 0, 1, ... in the order measured if none were given.
        running_ids: the ids are such running numbers, so that a merge numbers on.
        unloaded: parameters whose block detail was left on disk by :meth:`load`.
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    spec: str
    sq: Array
    batch: NDArray[np.int64]
    label_tokens: NDArray[np.int64]
    mean_factor: Array
    sum_factor: Array
    batch_sq: Array
    weight_sq: Array
    block_sq: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    block_batch_sq: dict[str, Array] = field(default_factory=dict)
    directions: list[str] = field(default_factory=list)
    alignment_by_direction: Array = field(default_factory=lambda: np.zeros((0, 0, 0)))
    coverage_list: list[Coverage] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    specs: dict[str, str] = field(default_factory=dict)
    example_ids: NDArray[np.int64] = field(default_factory=lambda: _RUNNING)
    running_ids: bool = False
    unloaded: tuple[str, ...] = ()
    block_batch_abs: dict[str, Array] = field(default_factory=dict)
    block_alignment: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.example_ids is _RUNNING:
            self.example_ids = np.arange(self.batch.size, dtype=np.int64)
            self.running_ids = True
        if not self.directions and self.alignment_by_direction.size == 0:
            self.alignment_by_direction = np.zeros((0, len(self.names), self.batch.size))

    def _validate(self) -> None:
        """Everything that was read fits together.

        Raises:
            ValueError: naming the first thing that does not.
        """
        texts = [*self.names, *self.directions]
        if not isinstance(self.names, list) or not all(isinstance(t, str) for t in texts):
            raise ValueError("names are not a list of strings")
        if not all(type(d) is int and d >= 0 for shape in self.shapes for d in shape):
            raise ValueError("a shape is not made of sizes")
        if not isinstance(self.meta, dict):
            raise ValueError("meta is not a mapping")
        check_spec(self.spec)
        check_specs(self.specs, self.names)
        if {c.status for c in self.coverage_list} - {"exact", "unused", "frozen", "missing"}:
            raise ValueError("an unknown coverage status")
        p, e, n = len(self.names), self.batch.size, self.batch_sq.shape[-1]
        expected = {
            "sq": (p, e),
            "batch": (e,),
            "example_ids": (e,),
            "label_tokens": (e,),
            "mean_factor": (e,),
            "sum_factor": (e,),
            "batch_sq": (p, n),
            "weight_sq": (p,),
            "alignment_by_direction": (len(self.directions), p, e),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {shape}")
        if self.example_ids.dtype != np.int64 or (
            self.running_ids and not np.array_equal(self.example_ids, np.arange(e))
        ):
            raise ValueError("example_ids are not whole numbers, or not the running ones")
        if len(self.shapes) != p or (e and not 0 <= self.batch.min() <= self.batch.max() < n):
            raise ValueError("shapes or batch numbers do not fit the names and passes")
        k = len(self.directions)
        for kept, before, after in (
            (self.block_sq, (), (e,)),
            (self.block_batch_sq, (), ()),
            (self.block_batch_abs, (), ()),
            (self.block_alignment, (k,), ()),
        ):
            for name, values in kept.items():
                if values.shape != (*before, self.grid(name).n_blocks, *after):
                    raise ValueError(f"blocks of {name} have shape {values.shape}")
        if self.block_batch_abs and set(self.block_batch_abs) != set(self.names):
            raise ValueError("sums of absolute values are there for some parameters only")

    # -- sizes ---------------------------------------------------------------------------

    @property
    def n_examples(self) -> int:
        return int(self.batch.size)

    @property
    def n_batches(self) -> int:
        return int(self.batch_sq.shape[1])

    @property
    def numel(self) -> NDArray[np.int64]:
        """``[P]`` number of elements of each parameter."""
        return np.array([int(np.prod(s, dtype=np.int64)) for s in self.shapes], dtype=np.int64)

    @property
    def coverage(self) -> dict[str, Coverage]:
        """Parameter name -> coverage, for every parameter of the model."""
        return {c.name: c for c in self.coverage_list}

    def index(self, name: str) -> int:
        """Row of a parameter.

        Raises:
            StatsError: if it was not probed.
        """
        try:
            return self.names.index(name)
        except ValueError:
            raise StatsError(f"{name!r} was not probed; known names: {_some(self.names)}") from None

    def grid(self, name: str) -> BlockGrid:
        """How a parameter divides into blocks."""
        return grid_of(name, self.shapes[self.index(name)], self.spec, self.specs)

    # -- influence -----------------------------------------------------------------------

    def influence(self, scale: Scale = "contribution") -> Array:
        """``T [P, E]``: norm of example e's gradient with respect to parameter p.

        ``contribution`` (default) is its part of the batch gradient as autograd computed it;
        ``example_mean`` the gradient of the mean loss over the example's own label tokens;
        ``example_sum`` of their summed loss.

        Raises:
            StatsError: if examples or the loss reduction needed for the scale are unknown.
        """
        if self.n_examples == 0:
            raise StatsError(
                "no example was recorded: probe with per_example=True and run at "
                "least one backward pass"
            )
        return np.sqrt(self.sq) * self.factor(scale)

    @property
    def T(self) -> Array:
        """Cross-influence ``[P, E]`` at contribution scale, see :meth:`influence`."""
        return self.influence()

    def blocks(self, name: str, scale: Scale = "contribution") -> Array:
        """Cross-influence of each block of one parameter, ``[n_blocks, E]``.

        Raises:
            StatsError: if the parameter was not probed or its block detail was not kept.
        """
        row = self.index(name)
        if name in self.block_sq:
            return np.sqrt(self.block_sq[name].astype(np.float64)) * self.factor(scale)
        if self.grid(name).is_whole:
            return self.influence(scale)[row : row + 1]
        if name in self.unloaded:
            raise StatsError(
                f"the block detail of {name} was left on disk. Remedy: "
                f"GradientStats.load(path, blocks=[{name!r}])"
            )
        raise StatsError(f"no block detail was kept for {name}; probe with a detail pattern for it")

    def factor(self, scale: Scale) -> Array:
        """``[E]``: what turns a contribution into a gradient at another scale.

        Raises:
            StatsError: for a scale that is unknown, or that this measurement cannot give.
        """
        if scale == "contribution":
            return np.ones(self.n_examples)
        if scale not in ("example_mean", "example_sum"):
            raise StatsError(f"scale {scale!r}: use contribution, example_mean or example_sum")
        mixing = self.meta.get("mixes_examples")
        if mixing:
            raise StatsError(
                f"scale {scale!r}: the forward pass mixes examples (in {', '.join(mixing)}), so no "
                "example has a loss of its own. Remedy: scale='contribution' is exact, the part "
                "of the batch's gradient that came through the example's activations; batch norm "
                "stops mixing with .eval(), a router's balancing loss with "
                "output_router_logits=False"
            )
        factor = self.mean_factor if scale == "example_mean" else self.sum_factor
        if np.isnan(factor).any():
            raise StatsError(
                f"scale {scale!r} needs the loss reduction and the label tokens of every example. "
                "Remedy: pass loss_reduction='token_mean', 'row_mean' or 'sum' to Probe, and "
                "labels=... to the model"
            )
        return factor

    @property
    def alignment(self) -> Array:
        """Signed influence: inner product of contribution and target direction. ``[P, E]`` for
        one direction, ``[K, P, E]`` for several.

        Raises:
            StatsError: if the probe had no target direction.
        """
        if not self.directions:
            raise StatsError("no target direction was given; pass targets=... to Probe")
        a = self.alignment_by_direction
        return a[0] if len(self.directions) == 1 else a

    # -- norms ---------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Array:
        """``[P]`` gradient norm of the batch loss; root mean square over backward passes.

        No copy of the gradient is kept between passes, so this is not the norm of the sum of
        several batches; :attr:`signal_sq` estimates the noise-free part.
        """
        self._need_batches()
        return np.sqrt(self.batch_sq.mean(1))

    def block_grad_norm(self, name: str) -> Array:
        """``[n_blocks]``: like :attr:`grad_norm`, for each block of one parameter."""
        self._need_batches()
        row = self.index(name)
        if name in self.block_batch_sq:
            return np.sqrt(self.block_batch_sq[name] / self.n_batches)
        return self.grad_norm[row : row + 1]

    def mean_abs(self, name: str) -> Array:
        """``[n_blocks]`` mean absolute gradient (L1 norm by number of elements) of each block of
        one parameter, mean over backward passes.

        Raises:
            StatsError: if it was not recorded, or the parameter was not probed.
        """
        self._need_batches()
        sizes = self.grid(name).sizes()
        if name not in self.block_batch_abs:
            raise StatsError(
                "the sums of absolute gradients were not recorded. Remedy: measure with "
                "Probe(model, l1=True)"
            )
        return self.block_batch_abs[name] / (self.n_batches * np.maximum(sizes, 1))

    @property
    def weight_norm(self) -> Array:
        return np.sqrt(self.weight_sq)

    @property
    def dead(self) -> list[str]:
        """Parameters whose gradient nothing tells from rounding (:mod:`fastgrad.dead`): left out
        of logarithms and of comparisons."""
        together, apart = self.batch_sq.sum(1), self.sq.sum(1)
        return dead_parameters(
            self.names, self.shapes, self.grad_norm.tolist(), dtypes=self.meta.get("dtypes") or (),
            batch_sum_sq=together.tolist(), example_sum_sq=apart.tolist(),
            n_examples=self.n_examples, n_batches=self.n_batches,
        )  # fmt: skip

    def _need_batches(self) -> None:
        if self.n_batches == 0:
            raise StatsError("no backward pass was recorded: call loss.backward() inside the probe")

    # -- noise ---------------------------------------------------------------------------

    def _loss_weights(self) -> tuple[float, float]:
        """With weights w_j of the examples in their backward pass's loss (contribution c_j is
        w_j times the gradient of the example's own mean loss): ``Σ_j w_j²`` over everything, and
        the sum over passes of ``Σ_{j≠k} w_j w_k``."""
        factor = self.factor("example_mean")
        weights = np.divide(1.0, factor, out=np.zeros_like(factor), where=factor > 0)
        squares = float((weights**2).sum())
        totals = np.bincount(self.batch, weights, self.n_batches)
        return squares, float((totals**2).sum()) - squares

    @property
    def signal_sq(self) -> Array:
        """``[P]`` unbiased estimate of the squared norm of the expected gradient, ``‖μ‖²``.

        From pairs of different examples: ``Σ_{j≠k}⟨c_j, c_k⟩ = ‖g‖² − Σ‖c_j‖²`` has expectation
        ``‖μ‖² Σ_{j≠k} w_j w_k``. May be negative where noise dominates: unbiased means that too.

        Raises:
            StatsError: without per-example norms, a known reduction, or two examples a batch.
        """
        _, pairs = self._loss_weights()
        if pairs <= 1e-12:
            raise StatsError("the noise-free norm needs batches of at least two examples")
        return (self.batch_sq.sum(1) - self.sq.sum(1)) / pairs

    @property
    def noise_scale_by_parameter(self) -> Array:
        """``[P]`` gradient noise scale ``tr Σ / ‖μ‖²`` in examples (McCandlish et al., arXiv
        1812.06162, eq. 2.9); infinity where no signal was detected."""
        squares, _ = self._loss_weights()
        signal = self.signal_sq
        trace = np.maximum(self.sq.sum(1) / squares - signal, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(signal > 0, trace / signal, np.inf)

    @property
    def noise_scale(self) -> float:
        """Gradient noise scale of all covered parameters together, in examples."""
        squares, _ = self._loss_weights()
        known = ~np.isnan(self.sq).any(1)
        signal = float(self.signal_sq[known].sum())
        trace = float(self.sq[known].sum()) / squares - signal
        return max(trace, 0.0) / signal if signal > 0 else float("inf")

    def halves(self, seed: int = 0) -> tuple[Array, Array]:
        """Scores ``[P]`` from two random halves of the measurement: mean squared contribution of
        examples where known, else mean squared batch norm.

        Raises:
            StatsError: if there are fewer than two examples and fewer than two batches.
        """
        source = self.sq if self.n_examples >= 2 else self.batch_sq
        if source.shape[1] < 2:
            raise StatsError("two halves need at least two examples or two backward passes")
        order = np.random.default_rng(seed).permutation(source.shape[1])
        half = source.shape[1] // 2
        return source[:, order[:half]].mean(1), source[:, order[half:]].mean(1)

    def split_half_reliability(self, repeats: int = 20, seed: int = 0) -> float:
        """Spearman correlation of parameter ranks between random halves, mean over repeats."""
        values = []
        for r in range(repeats):
            a, b = self.halves(seed + r)
            known = ~(np.isnan(a) | np.isnan(b))
            if known.sum() < 3:
                raise StatsError("rank reliability needs at least three covered parameters")
            values.append(spearmanr(a[known], b[known]).statistic)
        return float(np.mean(values))

    # -- order, merge, save, load --------------------------------------------------------

    def reordered(self, order: Sequence[int] | NDArray[np.int64]) -> GradientStats:
        """The same measurement with the examples in another order: column k is ``order[k]``.

        Raises:
            StatsError: if ``order`` is not a permutation of the examples.
        """
        index = np.asarray(order)
        whole = index.size == 0 or np.issubdtype(index.dtype, np.integer)
        if not whole or not np.array_equal(np.sort(index), np.arange(self.n_examples)):
            raise StatsError(
                f"an order of the examples names each of 0..{self.n_examples - 1} once"
            )
        index = index.astype(np.int64)
        moved = {n: getattr(self, n)[..., index] for n in PER_EXAMPLE}
        return replace(
            self,
            block_sq={n: v[:, index] for n, v in self.block_sq.items()},
            running_ids=self.running_ids and np.array_equal(index, np.arange(index.size)),
            **moved,
        )

    def sorted_by_example(self) -> GradientStats:
        """The same measurement in the order of the example ids; equal ids keep their order.

        Measurements of several processes, merged, come out as one process would have made them.
        """
        return self.reordered(np.argsort(self.example_ids, kind="stable"))

    def merge(self, other: GradientStats) -> GradientStats:
        """Both measurements as one; exact, because raw sums are kept. See :meth:`concat`."""
        return GradientStats.concat([self, other])

    @staticmethod
    def concat(pieces: Sequence[GradientStats]) -> GradientStats:
        """Several measurements as one, in their order; exact, because raw sums are kept.

        Costs one copy of each. Running example numbers go on from piece to piece; ids that were
        given stay what they are. What is missing (see :class:`Coverage`) in one piece is missing
        in the whole.

        Raises:
            StatsError: for no piece, or if they were not all made on the same parameters, blocks
                and weights.
        """
        from fastgrad.stats_merge import joined

        pieces = list(pieces)
        if not pieces:
            raise StatsError("there are no statistics to merge")
        n_examples = sum(p.n_examples for p in pieces)
        return joined(pieces, n_examples, sum(p.n_batches for p in pieces))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically; metadata as JSON in its header."""
        from fastgrad.stats_files import write

        write(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], blocks: bool | Sequence[str] = True
    ) -> GradientStats:
        """Read what :meth:`save` or :class:`fastgrad.ShardWriter` wrote.

        Args:
            path: a file, or the folder of a shard writer, which is read as one measurement.
            blocks: which per-example block detail to read: all, none (False), or name patterns
                (``fnmatch``). What is left out is not read from the disk at all.

        Raises:
            StatsError: if a file is missing, damaged, or of another format, or a pattern matches
                no parameter with block detail.
        """
        from fastgrad.stats_files import read
        from fastgrad.stats_shards import ShardReader

        if os.path.isdir(path):
            return ShardReader(path).load(blocks)
        return read(path, blocks)


#: Arrays of which the last dimension counts the examples.
PER_EXAMPLE = (
    "sq",
    "batch",
    "label_tokens",
    "mean_factor",
    "sum_factor",
    "alignment_by_direction",
    "example_ids",
)


def _some(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 3:
        return f"{', '.join(map(str, value[:3]))}, ... ({len(value)} in all)"
    return str(value)
