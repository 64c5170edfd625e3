"""The blueprint file: its fields, their limits, and JSON that is read and written strictly.

The pydantic models here are the one source; ``docs/blueprint.schema.json`` is generated from
them. Unknown keys are kept, so that a file of a newer minor version survives a round trip.
No model code and no statistics: this module knows what a file may say, not how it was measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from fastgrad.blueprint_strict_json import (
    MAX_BYTES,
    MAX_DEPTH,
    canonical_json,
    check_text,
    finite_or_none,
    parse_json,
)

__all__ = ["MAX_BYTES", "MAX_DEPTH", "canonical_json", "finite_or_none", "parse_json"]

SCHEMA_VERSION = "1.2.0"
SCHEMA_MAJOR = 1
FILE_NAME = "gradient_blueprint.json"
VECTORS_NAME = "gradient_blueprint.safetensors"
DOMAIN_VECTORS_NAME = "gradient_blueprint.domains.safetensors"

#: One parameter larger than this does not exist; a file that claims it is damaged or hostile.
MAX_ELEMENTS = 2**48

#: More entries than this in one list or mapping are no blueprint: a model has fewer parameters.
MAX_ENTRIES = 2**18

#: Domains beside the primary one.
MAX_DOMAINS = 64

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[list[float | None], Field(min_length=2, max_length=2)]
Verdict = Literal["supported", "indistinguishable", "rejected", "too_few"]
Hash = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Part(BaseModel):
    """Common rules: no coercion of types, no NaN or infinity, unknown keys kept."""

    model_config = ConfigDict(
        extra="allow", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True
    )


class ModelInfo(Part):
    """Which model, and which weights of it."""

    class_name: str | None = Field(None, alias="class")
    name_or_path: str | None = Field(None, description="hub id, or the last part of a local path")
    revision: str | None = Field(None, description="commit, tag or branch of name_or_path")
    weights_hash: Hash | None = Field(
        None, description="fastgrad.weights_hash: names, dtypes, shapes and bytes of all parameters"
    )
    n_parameters: Count


class DataSet(Part):
    """A data set that examples were taken from."""

    name: str = Field(min_length=1, description="hub id, or the last part of a local path")
    revision: str | None = Field(None, description="commit, version or hash of the data")
    subset: str | None = None
    split: str | None = None
    n_examples: Count | None = Field(None, description="taken from here; null if not counted")


class DataInfo(Part):
    """What the gradient was measured on."""

    n_examples: Count
    n_batches: Count
    n_label_tokens: Count | None = Field(description="label tokens in the loss; null if unknown")
    loss_reduction: str | None
    example_scale: Literal["example_mean", "contribution"] = Field(
        description="unit of example_mean_norm and example_median_norm: gradient of an example's "
        "own mean loss, or its contribution to the loss of its batch"
    )
    shift_labels: bool | None = Field(
        None, description="whether the model's loss predicts the next token; null where it was "
        "given no labels, so that the loss was another"
    )
    dtypes: list[str] = Field(
        [], description="of the parameters, and of the arithmetic under autocast"
    )
    attention: str | None = None
    skipped_batches: Count = 0
    datasets: list[DataSet] = []
    clip: str | None = Field(
        None, description="none: gradients as the backward pass computed them, before any clipping "
        "of a training loop; per_example: each example's gradient was cut to clip_norm"
    )
    clip_norm: Amount | None = None
    seed: int | None = Field(None, description="of whatever was drawn at random in the data")
    command: str | None = Field(None, description="that measured it, paths cut to their last part")
    weight_sum_sq: Amount | None = Field(
        None, description="Σ_j w_j², w_j the weight of example j's own mean loss in its batch's"
    )
    weight_pair_sum: Amount | None = Field(None, description="Σ_b Σ_{j≠k in b} w_j w_k")


class Submodule(Part):
    """One parameter of the model. Raw sums are null where nothing was measured, and in a blend,
    whose numbers are normalised and can no longer be added up."""

    name: str = Field(min_length=1, description="as in model.named_parameters()")
    shape: Annotated[list[Count], Field(max_length=16)]
    coverage: Literal["exact", "unused", "frozen", "missing"]
    coverage_reason: str = ""
    batch_sum_sq: Amount | None = Field(None, description="sum over batches of ‖g_b‖²")
    n_batches: Count = 0
    batch_sum_fourth: Amount | None = Field(None, description="sum over batches of ‖g_b‖⁴")
    batch_sum_with_total: Amount | None = Field(
        None, description="sum over batches of ‖g_b‖² times that of all submodules together"
    )
    example_sum_sq: Amount | None = Field(
        None, description="sum over examples of the squared norm of the contribution"
    )
    example_sum_norm: Amount | None = Field(
        None, description="sum over examples of the norm of the contribution"
    )
    n_examples: Count = 0
    example_mean_norm: Amount | None = Field(None, description="see data.example_scale")
    example_median_norm: Amount | None = Field(None, description="see data.example_scale")
    signal_sq: float | None = Field(
        None, description="unbiased estimate of ‖E g‖²; negative where noise dominates"
    )
    grad_norm: Amount | None = Field(
        None, description="√(batch_sum_sq / n_batches); of a private release √(noised_norm² − "
        "privacy.noise_std²), or 0"
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(
        None, description="coarse release: by rms, 1 is the highest"
    )
    decile: Annotated[int, Field(ge=1, le=10)] | None = Field(
        None, description="coarse release: tenth of the ranks, 1 is the highest"
    )
    noised_norm: float | None = Field(
        None, description="private release: norm of the mean clipped gradient, plus noise"
    )
    rms: Amount | None = Field(None, description="grad_norm / √(number of elements)")
    relative_norm: Amount | None = Field(None, description="grad_norm / weight_norm")
    weight_norm: Amount | None = None
    share: Share | None = Field(None, description="grad_norm² as a share of the whole model's")
    share_variance: Amount | None = Field(
        None, description="sampling variance of share; null with fewer than two batches"
    )
    n_blocks: Count | None = Field(None, description="blocks with vectors; null without vectors")
    gamma: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="of ‖g‖² over the submodule's blocks"
    )
    gamma_interval: Interval | None = None
    rank_exponent: float | None = Field(
        None, description="a of x_r ~ r^-a for the norms of the submodule's blocks; read it with "
        "its verdict"
    )
    rank_exponent_interval: Interval | None = None
    rank_exponent_verdict: Verdict | None = None
    rank_exponent_n_tail: Count | None = None
    block_fit_reason: str = Field("", description="of the verdict, or why there is no fit")

    @model_validator(mode="after")
    def _consistent(self) -> Submodule:
        if math.prod(self.shape) > MAX_ELEMENTS:
            raise ValueError(f"{self.name}: more than {MAX_ELEMENTS} elements")
        if self.batch_sum_sq is not None and self.n_batches == 0:
            raise ValueError(f"{self.name}: batch_sum_sq is given for no batch")
        if self.batch_sum_sq is not None and self.grad_norm is not None:
            norm = math.sqrt(self.batch_sum_sq / self.n_batches)
            if not math.isclose(norm, self.grad_norm, rel_tol=1e-6, abs_tol=1e-300):
                raise ValueError(
                    f"{self.name}: grad_norm {self.grad_norm} contradicts the raw sum ({norm})"
                )
        return self

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Lorenz(Part):
    """Share of the gradient mass in the densest fraction k of the parameters."""

    k: list[Share]
    share: list[Share]

    @model_validator(mode="after")
    def _consistent(self) -> Lorenz:
        if len(self.k) != len(self.share):
            raise ValueError("k and share differ in length")
        return self


class Gamma(Part):
    """The exponent of S(k) ~ k^gamma; fields as in fastgrad.heavytail.GammaFit."""

    gamma: Annotated[float, Field(gt=0, le=1)]
    gamma_interval: Interval
    at: list[Share]
    share: list[Share]
    share_intervals: list[Interval]
    gamma_at: list[float]
    gamma_at_intervals: list[Interval]
    max_deviation: Amount
    n_blocks: Count
    n_dead: Count
    n_bootstrap: Count
    seed: int


class Tail(Part):
    """Power-law fit of the upper tail with its verdict; fields as in heavytail.TailFit."""

    verdict: Verdict
    reason: str
    rank_exponent: float | None
    rank_interval: Interval
    density_exponent: float | None
    density_interval: Interval
    xmin: float | None
    n: Count
    n_dead: Count
    n_tail: Count
    ks: float | None
    gof_p: float | None
    lognormal_ratio: float | None = None
    lognormal_p: float | None = None
    inner_lognormal_ratio: float | None = None
    inner_lognormal_p: float | None = None
    exponential_ratio: float | None = None
    exponential_p: float | None = None
    n_bootstrap: Count
    seed: int


class Fit(Part):
    """Concentration of one kind of gradient mass."""

    lorenz: Lorenz
    gamma: Gamma
    tail: Tail | None = Field(None, description="null where it was not fitted")


class Fits(Part):
    """Over submodules, for the sums of ‖g‖ and of ‖g‖²."""

    norm: Fit
    squared_norm: Fit


class PaperKStar(Part):
    """For comparison only: what the closed forms of arXiv 2511.01077 give. Nothing uses it, since
    its gamma contradicts the power law that it is meant to follow from (docs/maths.md)."""

    label: str
    rank_exponent: float = Field(description="fits.norm.tail's, whatever its verdict")
    gamma: Share = Field(description="1/(1 + rank_exponent)")
    value: Amount = Field(
        description="gamma*fixed/(per_param*(1 - gamma)), as it stands: above 1 it is no fraction"
    )
    curve_share: Share = Field(description="measured share of the mass at that k, at most 1")


class KStarEntry(Part):
    """The fraction with the most gradient mass per unit of one resource."""

    resource: str
    unit: str
    value: Annotated[float, Field(gt=0, le=1)]
    clamped: bool
    reason: str
    gamma: float
    mass: Literal["norm", "squared_norm"]
    granularity: str
    tokens_per_step: Count | None = Field(None, description="that the cost is for; FLOPs only")
    fixed: Amount = Field(description="cost at k = 0, in unit")
    per_param: Amount = Field(description="cost of k going from 0 to 1, in unit")
    kept_share: Share = Field(description="value**gamma, as the fitted curve has it")
    over_aggressive: bool = Field(
        description="a warning: curve_share (kept_share where that is null) is below "
        "over_aggressive_share"
    )
    over_aggressive_share: Share | None = None
    curve_share: Share | None = Field(None, description="read from the Lorenz curve at value")
    mode: str = Field("counted", description="coefficients from a formula, or measured")
    n_points: Count | None = Field(None, description="measurements behind measured coefficients")
    residual: Amount | None = Field(None, description="their scatter about the line, in unit")
    paper: PaperKStar | None = Field(None, description="null where no rank exponent was fitted")


class Reliability(Part):
    """Agreement between two random halves of the sample, mean over repeats (rms scores)."""

    basis: Literal["batches", "examples"] = Field(description="what was divided into halves")
    n: Count = Field(description="how many of them")
    repeats: Count
    spearman: float
    weighted_tau: float
    top_jaccard: float = Field(description="overlap of the top 20 % of submodules")


class Noise(Part):
    """How far the numbers can be trusted. Null where the sample does not allow an estimate."""

    noise_scale: Amount | None = Field(
        None, description="tr Σ / ‖E g‖² in examples; null if unknown or no signal was detected"
    )
    noise_scale_reason: str = ""
    signal: float | None = Field(None, description="sum of signal_sq: unbiased ‖E g‖²")
    share_variance: Amount | None = Field(None, description="sum over submodules")
    total_sum_fourth: Amount | None = Field(
        None, description="sum over batches of the square of all submodules' ‖g_b‖² together"
    )
    split_half_reliability: Reliability | None = None


class Checkpoint(Part):
    """Gradient norms logged during training."""

    label: str
    step: Count | None = None
    fraction: Share | None = Field(None, description="of the run")
    tokens_seen: Count | None = None
    loss: float | None = Field(None, description="mean over what was measured")
    n_batches: Count | None = Field(None, description="measured")
    n_examples: Count | None = Field(None, description="measured")
    weights_hash: Hash | None = None
    grad_norm: dict[str, Amount] = Field(description="root mean square over the batches")


class Privacy(Part):
    """What was done to protect the examples; fields but the first two are null if nothing was."""

    mechanism: str = Field("none", description="gaussian: noise on every submodule's norm")
    statement: str = (
        "Exact aggregates over the examples; no clipping, no noise, no privacy guarantee."
    )
    unit: str | None = Field(None, description="what is protected: an example, a row of a batch")
    adjacency: Literal["replace_one", "zero_out", "add_or_remove_one"] | None = Field(
        None, description="which data sets count as neighbours"
    )
    clip_norm: Amount | None = Field(
        None, description="length that an example's gradient of the whole model was cut to"
    )
    n: Count | None = Field(None, description="public number that the sum was divided by")
    sensitivity: Amount | None = Field(
        None, description="L2, of the vector of all submodules' norms"
    )
    noise_multiplier: Amount | None = Field(None, description="noise_std / sensitivity")
    noise_std: Amount | None = Field(None, description="of the noise on each submodule's norm")
    n_submodules: Count | None = Field(None, description="norms released at once")
    n_above_noise: Count | None = Field(
        None, description="of these, noised norms above twice noise_std; the others say little"
    )
    epsilon: Amount | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    accountant: str | None = Field(None, description="library and method behind epsilon")
    released: str | None = Field(None, description="norms, or ranks or deciles alone")


class Provenance(Part):
    """How the file came about."""

    created: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}")]
    command: str | None = Field(None, description="command line, paths cut to their last part")
    versions: dict[str, str] = {}


class BlockVectors(Part):
    """The file beside this one that holds squared gradient norms per block."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    spec: str
    specs: dict[str, str] = Field(
        {}, description="submodule -> granularity, for those that differ from spec"
    )
    prefix: str = Field("", description="of the names in the file; empty: all of it is meant")


class BlendSource(Part):
    """One of the two measurements that were blended."""

    weight: Share
    share_variance: Amount | None
    model: ModelInfo
    data: DataInfo
    domain_tags: list[str]
    provenance: Provenance


class Blend(Part):
    """blend_weight * released + (1 - blend_weight) * local, each normalised to mass one."""

    blend_weight: Share
    rule: str
    squared_distance: Amount = Field(description="‖released − local‖² of the normalised masses")
    released: BlendSource
    local: BlendSource


class MergeSource(Part):
    """One of the measurements that were merged."""

    model: ModelInfo
    data: DataInfo
    domain_tags: list[str]
    provenance: Provenance


class Merge(Part):
    """Measurements of different data on the same weights, their raw sums added."""

    sources: Annotated[list[MergeSource], Field(min_length=2), FailFast()]
    not_merged: dict[str, str] = Field(
        description="what cannot be had from sums, and is null therefore -> why"
    )


class Measured(Part):
    """One measurement of the model's gradient: what it was made on, and what was found."""

    fastgrad_version: str
    model: ModelInfo
    data: DataInfo
    domain_tags: list[str]
    submodules: Annotated[list[Submodule], Field(min_length=1), FailFast()]
    dead: list[str] = Field(description="submodules whose gradient nothing tells from rounding")
    fits: Fits | None = Field(description="null in a coarse release")
    block_fit: Fit | None = Field(None, description="over blocks, ‖g‖², where vectors exist")
    k_star: dict[str, KStarEntry]
    noise: Noise
    checkpoints: Annotated[list[Checkpoint], FailFast()] = []
    privacy: Privacy = Privacy.model_validate({})
    provenance: Provenance
    block_vectors: BlockVectors | None = None
    blend: Blend | None = None
    merge: Merge | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Measured:
        names = [s.name for s in self.submodules]
        known = set(names)
        if len(known) != len(names):
            raise ValueError("a submodule is listed twice")
        listed = set(self.dead).union(*(c.grad_norm for c in self.checkpoints))
        if unknown := sorted(listed - known):
            raise ValueError(f"dead or checkpoints name {unknown[0]!r}, which is no submodule")
        if sum(s.numel for s in self.submodules) > self.model.n_parameters:
            raise ValueError("the submodules hold more than model.n_parameters elements")
        return self


class Domain(Measured):
    """The same weights measured on other data; ``fastgrad.Blueprint.domain`` makes a blueprint of
    its own of it."""


class BlueprintFile(Measured):
    """A gradient blueprint: where the gradient of a model is concentrated, and how sure that is.

    The measurement at the top level is of the primary domain.
    """

    schema_version: Annotated[
        str, Field(pattern=rf"^{SCHEMA_MAJOR}\.[0-9]{{1,9}}\.[0-9]{{1,9}}$")
    ]
    domains: Annotated[list[Domain], Field(max_length=MAX_DOMAINS), FailFast()] = Field(
        [], description="measurements of the same weights on other data, in the order added"
    )

    @model_validator(mode="after")
    def _same_weights(self) -> BlueprintFile:
        for i, domain in enumerate(self.domains):
            for what in ("n_parameters", "weights_hash"):
                if getattr(domain.model, what) != getattr(self.model, what):
                    raise ValueError(f"domains.{i} is of another model: its {what} differs")
        return self


# -- reading and writing the file ------------------------------------------------------------


def parse_blueprint(data: bytes) -> BlueprintFile:
    """The checked content of a blueprint file.

    Raises:
        ValueError: with the reason in words, for bytes that are not a blueprint of this major
            version.
    """
    return _validated(parse_json(data))


def validate(value: Any) -> BlueprintFile:
    """``value`` (JSON that is made now) as a blueprint.

    Raises:
        ValueError: with the reason in words.
    """
    check_text(value)
    return _validated(value)


def _validated(value: Any) -> BlueprintFile:
    if not isinstance(value, dict):
        raise ValueError("the top level is not an object")
    check_version(value.get("schema_version"))
    _check_sizes(value)
    try:
        return BlueprintFile.model_validate(value)
    except ValidationError as error:
        raise ValueError(_in_words(error)) from None


def _check_sizes(value: dict[str, Any]) -> None:
    """No list or mapping of more entries than there are parameters in a model: a million wrong
    entries would make a million error messages."""
    waiting: list[Any] = [value]
    while waiting:
        node = waiting.pop()
        if len(node) > MAX_ENTRIES:
            raise ValueError(
                f"a list or object holds {len(node)} entries; no more than {MAX_ENTRIES} are read"
            )
        children = node.values() if isinstance(node, dict) else node
        waiting += [child for child in children if isinstance(child, dict | list)]


def check_version(version: Any) -> None:
    """Raise ValueError unless ``version`` is one that this library reads."""
    match = re.fullmatch(r"(\d{1,9})\.\d{1,9}\.\d{1,9}", version, re.ASCII) if isinstance(
        version, str
    ) else None  # fmt: skip
    if match is None:
        raise ValueError("schema_version is missing or not of the form 1.2.3")
    if int(match[1]) > SCHEMA_MAJOR:
        raise ValueError(
            f"schema_version {version} is newer than this library, which reads {SCHEMA_MAJOR}.x. "
            "Remedy: pip install --upgrade fastgrad"
        )
    if int(match[1]) < SCHEMA_MAJOR:
        raise ValueError(f"schema_version {version} never existed; files start at {SCHEMA_MAJOR}.0")


def dump_blueprint(file: BlueprintFile) -> str:
    """Canonical text of the file.

    Raises:
        ValueError: if an extra key holds NaN or infinity.
    """
    return canonical_json(file.model_dump(by_alias=True))


def json_schema() -> str:
    """JSON Schema (draft 2020-12) of the blueprint file, canonical text."""
    schema = BlueprintFile.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"Gradient blueprint {SCHEMA_VERSION}"
    return canonical_json(schema)


def _in_words(error: ValidationError) -> str:
    details: Sequence[Any] = error.errors(
        include_url=False, include_context=False, include_input=False
    )
    shown = [
        f"{'.'.join(str(part)[:60] for part in d['loc']) or 'file'}: {d['msg'][:200]}"
        for d in details[:3]
    ]
    more = f" and {len(details) - 3} more" if len(details) > 3 else ""
    return "; ".join(shown) + more
