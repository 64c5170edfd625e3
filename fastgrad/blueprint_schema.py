"""The blueprint file: its fields, their limits, and JSON that is read and written strictly.

The pydantic models here are the one source; ``docs/blueprint.schema.json`` is generated from
them. Unknown keys are kept, so that a file of a newer minor version survives a round trip.
No model code and no statistics: this module knows what a file may say, not how it was measured.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION = "1.1.0"
SCHEMA_MAJOR = 1
FILE_NAME = "gradient_blueprint.json"
VECTORS_NAME = "gradient_blueprint.safetensors"
MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64  # the schema itself needs 6 levels; extra keys get the rest

#: One parameter larger than this does not exist; a file that claims it is damaged or hostile.
MAX_ELEMENTS = 2**48

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[list[float | None], Field(min_length=2, max_length=2)]
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
    weights_hash: Hash | None = Field(
        None, description="fastgrad.weights_hash: names, dtypes, shapes and bytes of all parameters"
    )
    n_parameters: Count


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
    shift_labels: bool | None = None
    dtypes: list[str] = []
    attention: str | None = None
    skipped_batches: Count = 0


class Submodule(Part):
    """One parameter of the model. Raw sums are null where nothing was measured, and in a blend,
    whose numbers are normalised and can no longer be added up."""

    name: str = Field(min_length=1, description="as in model.named_parameters()")
    shape: Annotated[list[Count], Field(max_length=16)]
    coverage: Literal["exact", "unused", "frozen", "missing"]
    coverage_reason: str = ""
    batch_sum_sq: Amount | None = Field(None, description="sum over batches of ‖g_b‖²")
    n_batches: Count = 0
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
    grad_norm: Amount | None = Field(None, description="√(batch_sum_sq / n_batches)")
    rms: Amount | None = Field(None, description="grad_norm / √(number of elements)")
    relative_norm: Amount | None = Field(None, description="grad_norm / weight_norm")
    weight_norm: Amount | None = None
    share: Share | None = Field(None, description="grad_norm² as a share of the whole model's")
    share_variance: Amount | None = Field(
        None, description="sampling variance of share; null with fewer than two batches"
    )

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

    verdict: Literal["supported", "indistinguishable", "rejected", "too_few"]
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
    kept_share: Share
    over_aggressive: bool


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
    split_half_reliability: Reliability | None = None


class Checkpoint(Part):
    """Gradient norms logged during training."""

    label: str
    step: Count | None = None
    tokens_seen: Count | None = None
    grad_norm: dict[str, Amount]


class Privacy(Part):
    """What was done to protect the examples."""

    mechanism: str = "none"
    statement: str = (
        "Exact aggregates over the examples; no clipping, no noise, no privacy guarantee."
    )


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


class BlueprintFile(Part):
    """A gradient blueprint: where the gradient of a model is concentrated, and how sure that is."""

    schema_version: Annotated[str, Field(pattern=r"^\d{1,9}\.\d{1,9}\.\d{1,9}$")]
    fastgrad_version: str
    model: ModelInfo
    data: DataInfo
    domain_tags: list[str]
    submodules: Annotated[list[Submodule], Field(min_length=1)]
    dead: list[str] = Field(description="submodules whose gradient is at rounding level")
    fits: Fits
    block_fit: Fit | None = Field(None, description="over blocks, ‖g‖², where vectors exist")
    k_star: dict[str, KStarEntry]
    noise: Noise
    checkpoints: list[Checkpoint] = []
    privacy: Privacy = Privacy()
    provenance: Provenance
    block_vectors: BlockVectors | None = None
    blend: Blend | None = None

    @model_validator(mode="after")
    def _consistent(self) -> BlueprintFile:
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


# -- strict JSON ---------------------------------------------------------------------------


def parse_json(data: bytes) -> Any:
    """JSON without its loopholes: no NaN, infinity, overflow, repeated key or deep nesting.

    Raises:
        ValueError: with the reason in words; nothing else, whatever the bytes are.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes; no such file is larger than {MAX_BYTES}")
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            object_pairs_hook=_unique_keys,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    _check_depth(value)
    return value


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} overflows")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} is repeated")
            seen.add(key)
    return result


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def canonical_json(value: Any) -> str:
    """Equal content gives equal bytes: sorted keys, shortest exact floats, ASCII, one newline.

    Raises:
        ValueError: for NaN or infinity.
    """
    text = json.dumps(
        _without_negative_zero(value), sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False
    )
    return text + "\n"


def _without_negative_zero(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_negative_zero(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_negative_zero(v) for v in value]
    return 0.0 if isinstance(value, float) and value == 0.0 else value


def finite_or_none(value: Any) -> Any:
    """The same JSON value with None for NaN and infinity, which JSON cannot say."""
    if isinstance(value, dict):
        return {k: finite_or_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


# -- reading and writing the file ------------------------------------------------------------


def parse_blueprint(data: bytes) -> BlueprintFile:
    """The checked content of a blueprint file.

    Raises:
        ValueError: with the reason in words, for bytes that are not a blueprint of this major
            version.
    """
    return validate(parse_json(data))


def validate(value: Any) -> BlueprintFile:
    """``value`` (parsed JSON) as a blueprint.

    Raises:
        ValueError: with the reason in words.
    """
    if not isinstance(value, dict):
        raise ValueError("the top level is not an object")
    check_version(value.get("schema_version"))
    try:
        return BlueprintFile.model_validate(value)
    except ValidationError as error:
        raise ValueError(_in_words(error)) from None


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
