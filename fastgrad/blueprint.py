"""Blueprint: where a model's gradient is concentrated, as a file beside its weights.

No model code here: a blueprint is shown, validated, compared and blended without torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from fastgrad import blueprint_files as files
from fastgrad.blocks import BlockGrid, grid_of, in_words
from fastgrad.blueprint_blend import blend
from fastgrad.blueprint_coarse import Coarseness, coarsened, is_coarse, norms_by_name
from fastgrad.blueprint_diff import BlueprintDiff, diff
from fastgrad.blueprint_domains import (
    NearestDomain,
    as_domain,
    as_file,
    find_domain,
    nearest,
    refuse_domain,
)
from fastgrad.blueprint_files import Vectors
from fastgrad.blueprint_fits import Made
from fastgrad.blueprint_make import CheckpointLike, DataSetLike, Origin, from_stats
from fastgrad.blueprint_merge import merge
from fastgrad.blueprint_schema import (
    FILE_NAME,
    BlueprintFile,
    KStarEntry,
    Noise,
    Submodule,
)
from fastgrad.blueprint_text import describe
from fastgrad.errors import BlockSpecError, BlueprintError, SelectionError
from fastgrad.hub import located, push
from fastgrad.ranking import rank_scores, refuse_coarse
from fastgrad.resources import OVER_AGGRESSIVE_SHARE, CostModel
from fastgrad.staleness import SplitHalf, Staleness, compare
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from torch import nn

Array = NDArray[np.float64]


class Blueprint:
    """A gradient blueprint.

    Made by :meth:`from_stats`, :meth:`from_pretrained` or :meth:`blend`; not changed afterwards.

    Attributes:
        file: the content of the file, as checked pydantic models.
        spec: finest granularity it has scores for, see :class:`fastgrad.blocks.BlockGrid`.
        specs: parameter name -> granularity, for those that differ from ``spec``.
        block_sq: parameter name -> ``[n_blocks]`` mean squared gradient norm of each block, for
            the parameters that it divides.

    Where the file holds several domains, all of this is of the primary one; see :attr:`domains`.
    """

    def __init__(
        self,
        file: BlueprintFile,
        spec: str = "module",
        block_sq: Mapping[str, Array] | None = None,
        specs: Mapping[str, str] | None = None,
        *,
        domain_vectors: Sequence[Vectors] | None = None,
    ) -> None:
        found = files.check_vectors(file, Vectors(spec, specs or {}, block_sq or {}))
        others = [Vectors()] * len(file.domains) if domain_vectors is None else domain_vectors
        self.file, self.spec = file, spec
        self.block_sq, self.specs = dict(found.block_sq), dict(found.specs)
        self._shapes = {s.name: s.shape for s in file.submodules}
        self._domain_vectors = [
            files.check_vectors(domain, vectors)
            for domain, vectors in zip(file.domains, others, strict=True)
        ]

    # -- content -----------------------------------------------------------------------------

    @property
    def submodules(self) -> list[Submodule]:
        """One entry per parameter, in the model's order."""
        return self.file.submodules

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.submodules]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(s.shape) for s in self.submodules]

    @property
    def weight_norm(self) -> Array:
        """``[P]`` norm of each parameter's weights; NaN where unknown."""
        return np.array([math.nan if s.weight_norm is None else s.weight_norm
                         for s in self.submodules])  # fmt: skip

    @property
    def weights_hash(self) -> str | None:
        return self.file.model.weights_hash

    @property
    def n_model_parameters(self) -> int:
        """Elements of the whole model, measured or not."""
        return self.file.model.n_parameters

    @property
    def n_examples(self) -> int:
        return self.file.data.n_examples

    @property
    def n_batches(self) -> int:
        return self.file.data.n_batches

    @property
    def domain_tags(self) -> list[str]:
        return self.file.domain_tags

    @property
    def dead(self) -> list[str]:
        """Parameters whose gradient is at rounding level."""
        return self.file.dead

    @property
    def k_star(self) -> dict[str, KStarEntry]:
        """Resource -> the fraction that keeps the most gradient mass per unit of it."""
        return self.file.k_star

    @property
    def noise(self) -> Noise:
        return self.file.noise

    @property
    def split_half(self) -> SplitHalf | None:
        """Agreement between halves of the sample behind this blueprint, if known."""
        r = self.noise.split_half_reliability
        if r is None:
            return None
        return SplitHalf(r.basis, r.n, r.repeats, r.spearman, r.weighted_tau, r.top_jaccard)

    def grid(self, name: str) -> BlockGrid:
        """How a parameter divides into the finest blocks known.

        Raises:
            BlueprintError: if the blueprint does not describe it.
        """
        if name not in self._shapes:
            raise BlueprintError(f"the blueprint does not describe {name!r}; known names look like "
                                 f"{', '.join(self.names[:3])}")
        return grid_of(name, self._shapes[name], self.spec, self.specs)

    def energy(self, grids: Mapping[str, BlockGrid]) -> dict[str, Array]:
        """Mean squared gradient norm of each block.

        Raises:
            SelectionError: naming the parameters for which this blueprint is too coarse or that
                were not measured.
        """
        norms = norms_by_name(self.file)
        found = {}
        for name, grid in grids.items():
            if grid.is_whole and name in norms:
                found[name] = np.array([norms[name]]) ** 2
            elif name in self.block_sq and self.grid(name).same_blocks(grid):
                found[name] = self.block_sq[name]
        refuse_coarse(self.spec, self.specs, grids, found)
        return found

    def scores(self, ranking: str = "rms", blocks: str | None = None) -> dict[str, Array]:
        """Parameter name -> score of each block, for the parameters that were measured.

        Args:
            ranking: ``norm``, ``rms`` or ``relative`` (module granularity only).
            blocks: granularity; by default the finest known.

        Raises:
            SelectionError: for another ranking, or a granularity that the blueprint lacks.
            BlockSpecError: for an unknown granularity.
        """
        self.refuse_ranking(ranking)
        measured = [s for s in self.submodules if s.name in self.measured_names and s.numel]
        grids = {
            s.name: BlockGrid.of(s.shape, blocks)
            if blocks
            else grid_of(s.name, s.shape, self.spec, self.specs)
            for s in measured
        }
        weights = {
            s.name: np.array([s.weight_norm]) ** 2
            for s in measured
            if s.weight_norm is not None and grids[s.name].is_whole
        }
        return {
            name: rank_scores(ranking, energy, grids[name].sizes(), weights.get(name))
            for name, energy in self.energy(grids).items()
        }

    @property
    def measured_names(self) -> set[str]:
        """Parameters that the blueprint has a norm, or a rank, of."""
        return set(norms_by_name(self.file))

    def refuse_ranking(self, ranking: str) -> None:
        """Raise SelectionError for a ranking that a coarse blueprint does not know."""
        if is_coarse(self.file) and ranking != "rms":
            raise SelectionError(
                f"this blueprint holds {self.file.privacy.released} of rms alone, so it cannot "
                f"rank by {ranking}. Remedy: ranking='rms'"
            )

    def coarse(self, kind: Coarseness) -> Blueprint:
        """A blueprint that says of the gradient nothing but the ``ranks`` or the ``deciles`` of
        the submodules' rms. By itself that is no privacy; see :func:`fastgrad.private_norms`.

        Raises:
            BlueprintError: for another kind, several domains, a blend, or a coarse blueprint.
        """
        return Blueprint(coarsened(self.file, kind))

    def summary(self) -> str:
        """What the blueprint says, as text."""
        return describe(self.file)

    def __repr__(self) -> str:
        return (f"Blueprint({self.file.model.class_name}, {len(self.names)} submodules, "
                f"{self.n_examples} examples, domains {self.domain_tags}, "
                f"{in_words(self.spec, self.specs)})")

    # -- making ------------------------------------------------------------------------------

    @classmethod
    def from_stats(
        cls,
        stats: GradientStats,
        model: nn.Module | None = None,
        domain_tags: Sequence[str] = (),
        checkpoints: Iterable[CheckpointLike] = (),
        *,
        name_or_path: str | None = None,
        revision: str | None = None,
        datasets: Sequence[DataSetLike] = (),
        tokens_per_step: int | None = None,
        costs: Sequence[CostModel] = (),
        over_aggressive_share: float = OVER_AGGRESSIVE_SHARE,
        created: str | None = None,
        command: str | None = None,
        n_bootstrap: int = 200,
        seed: int = 0,
    ) -> Blueprint:
        """The blueprint of a measurement.

        Args:
            stats: what a probe measured.
            model: the probed model, so that parameters that were not probed are listed too.
            domain_tags: what the data is about.
            checkpoints: earlier gradient norms, as ``(label, step, stats)`` or as mappings with
                ``label``, ``step``, ``tokens_seen`` and ``grad_norm`` (name -> norm).
            name_or_path: hub id of the model; by default what its config says.
            revision: of the model: commit, tag or branch; by default the commit that it was
                loaded at, where the statistics know it.
            datasets: where the examples come from: names, or mappings with ``name``,
                ``revision``, ``subset``, ``split`` and ``n_examples``; by default what the
                statistics say (``meta["data"]``).
            tokens_per_step: of the training that k* for FLOPs is about; by default the label
                tokens of a measured batch. Without either there is no k* for FLOPs.
            costs: further resources that k* is wanted for, such as
                ``CostModel.time(pairs, n_params=...)`` from measured steps; one of ``memory`` or
                ``flops`` replaces the counted one.
            over_aggressive_share: a k* that keeps less than this share of the squared gradient
                norm is warned of.
            created: ISO date; today by default.
            command: how it was made; the command line by default, paths cut to their last part.
            n_bootstrap, seed: of the intervals.

        Raises:
            BlueprintError: if no gradient was recorded, one is not finite, the model has other
                parameters, or an argument does not fit the schema.
        """
        origin = Origin(name_or_path, revision, datasets, created, command)
        return cls._of(from_stats(
            stats, model, domain_tags, checkpoints, origin, tokens_per_step=tokens_per_step,
            n_bootstrap=n_bootstrap, seed=seed, costs=costs,
            over_aggressive_share=over_aggressive_share,
        ))  # fmt: skip

    @classmethod
    def _of(cls, made: Made) -> Blueprint:
        return cls(*made)

    def blend(
        self,
        local_stats: GradientStats,
        weight: float | Literal["auto"] = "auto",
        *,
        domain_tags: Sequence[str] = (),
        allow_other_weights: bool = False,
        created: str | None = None,
        command: str | None = None,
    ) -> Blueprint:
        """``weight`` x this blueprint + (1 - ``weight``) x a local sample.

        Both are first divided by their total squared gradient norm, so that only where the
        gradient lies counts, not the size of batches or losses. ``"auto"`` weighs by inverse
        variance, the released one's variance including its squared bias for the local data; see
        ``docs/blueprint.md``. Block vectors are blended where both have them; where only one has
        them (or they differ in granularity: the local ones count), it alone says how a
        parameter's blended mass is divided within that parameter.

        Raises:
            BlueprintError: if the two are of different models or (unless
                ``allow_other_weights``) different weights, ``weight`` is outside [0, 1], or
                ``"auto"`` is asked of a local sample of fewer than two batches.
        """
        local = Blueprint.from_stats(
            local_stats, domain_tags=domain_tags, created=created, command=command
        )
        return Blueprint._of(blend(self, local, weight, allow_other_weights))

    def merge(
        self, other: Blueprint, *, created: str | None = None, command: str | None = None
    ) -> Blueprint:
        """Both measurements as one, of the same weights on disjoint data; exact, since raw sums
        add up: what :meth:`from_stats` would make of :meth:`GradientStats.merge`.

        What does not follow from sums (medians, agreement of halves) is null, and named with the
        reason in ``file.merge.not_merged``.

        Args:
            other: measured on other examples. That they are others cannot be seen from the files,
                except that the very same numbers twice are refused.
            created, command: as for :meth:`from_stats`.

        Raises:
            BlueprintError: naming what differs: model, weights, loss reduction, scale of the
                per-example norms, granularity, clipping; or if one of the two is a blend, is
                protected by noise, or holds several domains.
        """
        return Blueprint._of(merge(self, other, created, command))

    def diff(self, other: Blueprint) -> BlueprintDiff:
        """How another blueprint differs: in what it was made on and with, in its ranks, and where
        the gradient lies. Of the primary domains."""
        return diff(self, other)

    # -- domains -----------------------------------------------------------------------------

    @property
    def domains(self) -> list[Blueprint]:
        """Each domain as a blueprint of its own, the primary one first."""
        primary = self.file.model_copy(update={"domains": []})
        found = [Blueprint(primary, self.spec, self.block_sq, self.specs)]
        for domain, vectors in zip(self.file.domains, self._domain_vectors, strict=True):
            file = as_file(domain, self.file.schema_version)
            found.append(Blueprint(file, vectors.spec, vectors.block_sq, vectors.specs))
        return found

    def domain(self, tag: str) -> Blueprint:
        """The domain with this tag, as a blueprint of its own.

        Raises:
            BlueprintError: if no domain or more than one has it.
        """
        return find_domain(self.domains, tag)

    def with_domain(self, other: Blueprint) -> Blueprint:
        """This blueprint with the domains of another one added; its own primary domain stays the
        primary one.

        Raises:
            BlueprintError: if the two are of different models or weights, or ``other`` has no
                domain tag or only such as are there already.
        """
        domains, vectors = list(self.file.domains), list(self._domain_vectors)
        for one in other.domains:
            refuse_domain(self, one, [self.file, *domains])
            domains.append(as_domain(one.file))
            vectors.append(Vectors(one.spec, one.specs, one.block_sq))
        file = as_file(self.file, self.file.schema_version, domains)
        return Blueprint(file, self.spec, self.block_sq, self.specs, domain_vectors=vectors)

    def nearest_domain(self, local_stats: GradientStats) -> NearestDomain:
        """Which domain a local sample is most like, with the agreement of each.

        Raises:
            StatsError: if the sample holds no backward pass.
        """
        return nearest(self.domains, local_stats)

    # -- files -------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The file's text: equal content gives equal bytes.

        Raises:
            BlueprintError: if an unknown key holds what JSON cannot say.
        """
        return self._texts()[0]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``gradient_blueprint.json`` into ``folder``, and block vectors beside it.

        Returns:
            The path of the JSON file.

        Raises:
            BlueprintError: if the folder cannot be written.
        """
        text, beside = self._texts()
        target = Path(folder) / FILE_NAME
        files.write(target, text, beside)
        return target

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Blueprint:
        """Read a blueprint from a model's folder, from a file, or from a repository of the hub.

        Args:
            path: a folder, a file, or (if nothing local has that name) a hub id ``org/name``.
                All files of a hub repository are read at one commit.
            revision: branch, tag or commit of a hub repository.
            local_files_only: take a hub repository from the local cache, without the network.
            token, cache_dir: for a hub repository, as ``huggingface_hub`` has them.

        Raises:
            BlueprintError: if it is missing, damaged, or of a newer major version. Nothing else,
                whatever the file holds.
            MissingExtraError: for a hub id without ``huggingface_hub``.
        """
        try:
            target, beside = located(
                path, revision=revision, local_files_only=local_files_only, token=token,
                cache_dir=cache_dir,
            )  # fmt: skip
            file, own, others = files.decode(target, beside)
            return cls(file, own.spec, own.block_sq, own.specs, domain_vectors=others)
        except (BlueprintError, BlockSpecError) as error:
            raise BlueprintError(f"{path}: {error}") from None
        except (OSError, ValueError) as error:
            raise BlueprintError(f"{path} is not a usable blueprint: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Put the files into a model repository of the hub, in one commit; nothing else in the
        repository changes. It is made if it does not exist.

        Args:
            repo_id: ``org/name``.
            revision: branch to commit to.
            private: of a repository that is made.
            commit_message, token, create_pr: as ``huggingface_hub`` has them.

        Raises:
            BlueprintError: if the hub refuses.
            MissingExtraError: without ``huggingface_hub``.
        """
        return push(
            *self._texts(), repo_id, revision=revision, commit_message=commit_message,
            private=private, token=token, create_pr=create_pr,
        )  # fmt: skip

    def verify(self, model: nn.Module) -> None:
        """Check that this blueprint describes ``model``: names, shapes and the weights' hash.

        Raises:
            BlueprintError: naming what differs, both hashes if it is the weights.
        """
        from fastgrad.identity import model_parameters, weights_hash

        own = {name: tuple(p.shape) for name, p in model_parameters(model).items()}
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in own:
                raise BlueprintError(f"the blueprint describes {name!r}, which this model lacks")
            if own[name] != shape:
                raise BlueprintError(f"{name} has shape {own[name]}, the blueprint says {shape}")
        size = sum(math.prod(shape) for shape in own.values())
        if size != self.n_model_parameters:
            raise BlueprintError(f"the model has {size:,} parameters, the blueprint's "
                                 f"{self.n_model_parameters:,}")
        if self.weights_hash is None:
            raise BlueprintError("the blueprint holds no hash of the weights. Remedy: measure with "
                                 "Probe(model, hash_weights=True)")
        try:
            found = weights_hash(model)
        except ValueError as error:
            raise BlueprintError(f"the weights cannot be compared: {error}") from error
        if found != self.weights_hash:
            raise BlueprintError(f"the blueprint was made for weights {self.weights_hash}, the "
                                 f"model has {found}")

    def staleness(self, local_stats: GradientStats) -> Staleness:
        """Whether this blueprint still holds for the model and data of a local sample.

        Compares rms scores of whole parameters: Spearman, weighted tau and the overlap of the
        top 20 %, each beside the same statistic between halves of the samples.

        Raises:
            StatsError: if the sample holds no backward pass.
        """
        return compare(self, local_stats)

    def _texts(self) -> tuple[str, dict[str, bytes]]:
        others = zip(self.file.domains, self._domain_vectors, strict=True)
        return files.encode(self.file, Vectors(self.spec, self.specs, self.block_sq), others)
