"""Blueprint: where a model's gradient is concentrated, as a file beside its weights.

No model code here: a blueprint is shown, validated, compared and blended without torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastgrad.blocks import BlockGrid, check_specs, grid_of, in_words
from fastgrad.blueprint_make import CheckpointLike, blend, from_stats
from fastgrad.blueprint_schema import (
    FILE_NAME,
    MAX_BYTES,
    VECTORS_NAME,
    BlockVectors,
    BlueprintFile,
    KStarEntry,
    Lorenz,
    Noise,
    Submodule,
    dump_blueprint,
    parse_blueprint,
)
from fastgrad.errors import BlockSpecError, BlueprintError
from fastgrad.files import atomic_path, write_text
from fastgrad.hub import MAX_VECTOR_BYTES, located, push
from fastgrad.ranking import rank_scores, refuse_coarse
from fastgrad.staleness import SplitHalf, Staleness, compare
from fastgrad.stats import GradientStats

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from torch import nn

Array = NDArray[np.float64]

_VECTORS_FORMAT = "fastgrad.blueprint.blocks/1"


class Blueprint:
    """A gradient blueprint.

    Made by :meth:`from_stats`, :meth:`from_pretrained` or :meth:`blend`; not changed afterwards.

    Attributes:
        file: the content of the file, as checked pydantic models.
        spec: finest granularity it has scores for, see :class:`fastgrad.blocks.BlockGrid`.
        specs: parameter name -> granularity, for those that differ from ``spec``.
        block_sq: parameter name -> ``[n_blocks]`` mean squared gradient norm of each block, for
            the parameters that it divides.
    """

    def __init__(
        self,
        file: BlueprintFile,
        spec: str = "module",
        block_sq: Mapping[str, Array] | None = None,
        specs: Mapping[str, str] | None = None,
    ) -> None:
        self.file, self.spec = file, spec
        self.block_sq = dict(block_sq or {})
        self._shapes = shapes = {s.name: s.shape for s in file.submodules}
        self.specs = check_specs(specs or {}, shapes)
        for name, values in self.block_sq.items():
            if name not in shapes:
                raise BlueprintError(f"block vectors name {name!r}, which is no submodule")
            n = self.grid(name).n_blocks
            if values.shape != (n,) or values.dtype != np.float64:
                raise BlueprintError(f"block vectors of {name} have shape {values.shape} and type "
                                     f"{values.dtype}, expected {n} float64")
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise BlueprintError(f"block vectors of {name} hold NaN, infinity or a negative "
                                     "number")

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
        norms = {s.name: s.grad_norm for s in self.submodules if s.grad_norm is not None}
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
        measured = [s for s in self.submodules if s.grad_norm is not None and s.numel]
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
        tokens_per_step: int | None = None,
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
            tokens_per_step: of the training that k* for FLOPs is about; by default the label
                tokens of a measured batch. Without either there is no k* for FLOPs.
            created: ISO date; today by default.
            command: how it was made; the command line by default, paths cut to their last part.
            n_bootstrap, seed: of the intervals.

        Raises:
            BlueprintError: if no gradient was recorded, one is not finite, the model has other
                parameters, or an argument does not fit the schema.
        """
        made = from_stats(
            stats, model, domain_tags, checkpoints, name_or_path=name_or_path,
            tokens_per_step=tokens_per_step, created=created, command=command,
            n_bootstrap=n_bootstrap, seed=seed,
        )  # fmt: skip
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
        return Blueprint(*blend(self, local, weight, allow_other_weights))

    # -- files -------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The file's text: equal content gives equal bytes.

        Raises:
            BlueprintError: if an unknown key holds what JSON cannot say.
        """
        return self._texts()[0]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``gradient_blueprint.json`` into ``folder``, and the block vectors beside it.

        Returns:
            The path of the JSON file.

        Raises:
            BlueprintError: if the folder cannot be written.
        """
        text, vectors = self._texts()
        target = Path(folder) / FILE_NAME
        try:
            # The JSON file names the other one by its hash, so it comes last.
            if vectors is not None:
                with atomic_path(target.with_name(VECTORS_NAME)) as temporary:
                    temporary.write_bytes(vectors)
            write_text(target, text)
            if vectors is None:  # one left from an earlier blueprint would be of other numbers
                target.with_name(VECTORS_NAME).unlink(missing_ok=True)
        except OSError as error:
            raise BlueprintError(f"the blueprint cannot be written: {error}") from error
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
                Both files of a hub repository are read at one commit.
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
            file = parse_blueprint(_read(target, MAX_BYTES))
            if file.block_vectors is None:
                return cls(file)
            vectors = _read(beside(file.block_vectors.file), MAX_VECTOR_BYTES)
            entry = file.block_vectors
            return cls(file, entry.spec, _parse_vectors(vectors, entry), entry.specs)
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
        """Put both files into a model repository of the hub, in one commit; nothing else in the
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

    def _texts(self) -> tuple[str, bytes | None]:
        file, vectors = self.file, None
        if self.block_sq:
            from safetensors.numpy import save

            # One metadata key only: safetensors does not keep several in order.
            by_name = {"specs": self.specs} if self.specs else {}
            header = json.dumps(
                {"format": _VECTORS_FORMAT, "spec": self.spec, **by_name}, sort_keys=True
            )
            vectors = save(dict(sorted(self.block_sq.items())), {"fastgrad": header})
            entry: dict[str, Any] = {
                "file": VECTORS_NAME,
                "sha256": hashlib.sha256(vectors).hexdigest(),
                "spec": self.spec,
                "specs": self.specs,
            }
            old = file.block_vectors
            new = old.model_copy(update=entry) if old else BlockVectors(**entry)
            file = file.model_copy(update={"block_vectors": new})
        else:
            file = file.model_copy(update={"block_vectors": None})
        try:
            return dump_blueprint(file), vectors
        except ValueError as error:
            raise BlueprintError(f"the blueprint cannot be written as JSON: {error}") from error


def _read(path: Path, limit: int) -> bytes:
    if not path.is_file():
        raise ValueError(
            f"there is no file {path.name} here. Remedy: a model folder or file that "
            "exists, or a hub id such as org/name"
        )
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path.name} is larger than {limit} bytes, which no blueprint is")
    return data


def _parse_vectors(data: bytes, entry: BlockVectors) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ValueError(f"{entry.file} is damaged or belongs to another blueprint: its hash is "
                         "not the one in the JSON file")
    try:
        return load(data)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{entry.file} is damaged: {error}") from error


def describe(file: BlueprintFile) -> str:
    """What a blueprint says, as text."""
    model, data, noise = file.model, file.data, file.noise
    fit = file.fits.squared_norm
    tail = file.fits.norm.tail
    lines = [
        f"model      {model.class_name or 'unknown class'} {model.name_or_path or ''} "
        f"{model.n_parameters:,} parameters, weights {(model.weights_hash or 'not hashed')[:23]}",
        f"data       {', '.join(file.domain_tags) or 'no domain tag'}: {data.n_examples:,} "
        f"examples in {data.n_batches:,} batches, {_or_unknown(data.n_label_tokens)} label tokens",
        "mass       top 10 % / 20 % / 50 % of the parameters hold "
        + " / ".join(f"{_share_at(fit.lorenz, k):.0%}" for k in (0.1, 0.2, 0.5))
        + " of the squared gradient norm",
        f"gamma      {fit.gamma.gamma:.3f} for ‖g‖², {file.fits.norm.gamma.gamma:.3f} for ‖g‖",
    ]
    if tail is not None:
        exponent = "" if tail.rank_exponent is None else f"rank exponent {tail.rank_exponent:.2f}, "
        lines.append(f"power law  {exponent}{tail.verdict}: {tail.reason}")
    for name, k in file.k_star.items():
        warning = " (over-aggressive: keeps less than half)" if k.over_aggressive else ""
        lines.append(f"k*         {k.value:.1%} for {name}{warning}: {k.reason}")
    scale = noise.noise_scale_reason if noise.noise_scale is None else f"{noise.noise_scale:,.1f}"
    r = noise.split_half_reliability
    lines.append(
        f"noise      scale {scale}; "
        + ("no split halves" if r is None else
           f"halves ({r.n} {r.basis}) agree to Spearman {r.spearman:.2f}, top-20 % Jaccard "
           f"{r.top_jaccard:.2f}")
    )  # fmt: skip
    if file.blend is not None:
        lines.append(f"blend      {file.blend.blend_weight:.2f} released, {file.blend.rule}")
    counts = {
        status: sum(s.coverage == status for s in file.submodules)
        for status in ("exact", "unused", "frozen", "missing")
    }
    lines.append(
        "coverage   " + ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        + f"; {len(file.dead)} dead"
    )  # fmt: skip
    ranked = sorted(
        (s for s in file.submodules if s.rms is not None), key=lambda s: -(s.rms or 0.0)
    )[:10]
    width = max((len(s.name) for s in ranked), default=0)
    lines += ["", f"{'highest rms':<{width}}  {'rms':>9}  {'norm':>9}  {'share':>6}  elements"]
    lines += [
        f"{s.name:<{width}}  {s.rms or 0:>9.3g}  {s.grad_norm or 0:>9.3g}  {s.share or 0:>6.1%}  "
        f"{s.numel:,}"
        for s in ranked
    ]
    return "\n".join(lines)


def _share_at(curve: Lorenz, k: float) -> float:
    return float(np.interp(k, curve.k, curve.share))


def _or_unknown(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
