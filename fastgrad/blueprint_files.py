"""A blueprint's files: the JSON text and, beside it, block vectors as safetensors.

Vectors of the primary domain have a file of their own, so that a reader that knows nothing of
domains reads it as ever; those of all other domains share a second one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgrad.blocks import check_specs, grid_of
from fastgrad.blueprint_schema import (
    DOMAIN_VECTORS_NAME,
    MAX_BYTES,
    VECTORS_NAME,
    BlockVectors,
    BlueprintFile,
    Domain,
    Measured,
    dump_blueprint,
    parse_blueprint,
)
from fastgrad.blueprint_strict_json import parse_json
from fastgrad.errors import BlueprintError
from fastgrad.files import atomic_path, write_text
from fastgrad.hub import MAX_VECTOR_BYTES

Array = NDArray[np.float64]

_FORMAT = "fastgrad.blueprint.blocks/1"

#: A header names each tensor once; no model has parameters enough for a larger one.
MAX_HEADER_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Vectors:
    """Scores of blocks: finest granularity, exceptions from it, and parameter -> ``[n_blocks]``."""

    spec: str = "module"
    specs: Mapping[str, str] = field(default_factory=dict)
    block_sq: Mapping[str, Array] = field(default_factory=dict)


def check_vectors(content: Measured, vectors: Vectors) -> Vectors:
    """``vectors`` if they fit the submodules, granularities in the canonical form.

    Raises:
        BlueprintError: if a vector is of no submodule, has another length or type, or holds what
            no squared norm is.
        BlockSpecError: for an unknown granularity.
    """
    shapes = {s.name: s.shape for s in content.submodules}
    specs = check_specs(vectors.specs, shapes)
    for name, values in vectors.block_sq.items():
        if name not in shapes:
            raise BlueprintError(f"block vectors name {name[:80]!r}, which is no submodule")
        n = grid_of(name, shapes[name], vectors.spec, specs).n_blocks
        if values.shape != (n,) or values.dtype != np.float64:
            raise BlueprintError(f"block vectors of {name} have shape {values.shape} and type "
                                 f"{values.dtype}, expected {n} float64")
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise BlueprintError(f"block vectors of {name} hold NaN, infinity or a negative "
                                 "number")
    return Vectors(vectors.spec, specs, dict(vectors.block_sq))


# -- writing -------------------------------------------------------------------------------------


def encode(
    file: BlueprintFile, primary: Vectors, others: Iterable[tuple[Domain, Vectors]]
) -> tuple[str, dict[str, bytes]]:
    """Text of the JSON file, and the content of each file beside it, by name.

    Raises:
        BlueprintError: if an unknown key holds what JSON cannot say.
    """
    pairs = list(others)
    beside = {}
    if primary.block_sq:
        beside[VECTORS_NAME] = _packed([primary], [""])
    prefixes = [f"{i}/" for i in range(len(pairs))]
    if any(v.block_sq for _, v in pairs):
        beside[DOMAIN_VECTORS_NAME] = _packed([v for _, v in pairs], prefixes)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in beside.items()}

    def named(content: Any, vectors: Vectors, name: str, prefix: str) -> Any:
        entry: BlockVectors | None = None
        if vectors.block_sq:
            new: dict[str, Any] = {
                "file": name, "sha256": digests[name], "spec": vectors.spec,
                "specs": dict(vectors.specs), "prefix": prefix,
            }  # fmt: skip
            old = content.block_vectors
            entry = old.model_copy(update=new) if old else BlockVectors(**new)
        return content.model_copy(update={"block_vectors": entry})

    file = named(file, primary, VECTORS_NAME, "")
    domains = [
        named(domain, vectors, DOMAIN_VECTORS_NAME, prefix)
        for (domain, vectors), prefix in zip(pairs, prefixes, strict=True)
    ]
    try:
        return dump_blueprint(file.model_copy(update={"domains": domains})), beside
    except ValueError as error:
        raise BlueprintError(f"the blueprint cannot be written as JSON: {error}") from error


def _packed(vectors: list[Vectors], prefixes: list[str]) -> bytes:
    from safetensors.numpy import save

    arrays = {
        prefix + name: values
        for one, prefix in zip(vectors, prefixes, strict=True)
        for name, values in one.block_sq.items()
    }
    about: dict[str, Any] = {"format": _FORMAT}
    if prefixes == [""]:
        by_name = {"specs": dict(vectors[0].specs)} if vectors[0].specs else {}
        about |= {"spec": vectors[0].spec, **by_name}
    # One metadata key only: safetensors does not keep several in order.
    header = json.dumps(about, sort_keys=True)
    return bytes(save(dict(sorted(arrays.items())), {"fastgrad": header}))


def write(target: Path, text: str, beside: Mapping[str, bytes]) -> None:
    """Put the files where they belong, each whole or not at all.

    Raises:
        BlueprintError: if the folder cannot be written.
    """
    try:
        # The JSON file names the others by their hashes, so it comes last.
        for name, data in beside.items():
            with atomic_path(target.with_name(name)) as temporary:
                temporary.write_bytes(data)
        write_text(target, text)
        for name in (VECTORS_NAME, DOMAIN_VECTORS_NAME):
            if name not in beside:  # one left from an earlier blueprint would be of other numbers
                target.with_name(name).unlink(missing_ok=True)
    except OSError as error:
        raise BlueprintError(f"the blueprint cannot be written: {error}") from error


# -- reading -------------------------------------------------------------------------------------


def decode(
    target: Path, beside: Callable[[str], Path]
) -> tuple[BlueprintFile, Vectors, list[Vectors]]:
    """The content of a blueprint's files: JSON, vectors of the primary and of other domains.

    Args:
        target: the JSON file.
        beside: from the name of a file beside it to its path.

    Raises:
        ValueError: with the reason in words; also of BlueprintError's kind.
        OSError: if a file cannot be read.
    """
    file = parse_blueprint(_read(target, MAX_BYTES))
    entries = [m.block_vectors for m in (file, *file.domains)]
    found: list[Vectors] = [Vectors() for _ in entries]
    left = MAX_VECTOR_BYTES  # all files together
    for name in dict.fromkeys(e.file for e in entries if e is not None):
        data = _read(beside(name), left)
        left -= len(data)
        digest, arrays = hashlib.sha256(data).hexdigest(), None
        for i, entry in enumerate(entries):
            if entry is not None and entry.file == name:
                if entry.sha256 != digest:
                    raise ValueError(f"{name} is damaged or belongs to another blueprint: its "
                                     "hash is not the one in the JSON file")
                arrays = _unpacked(data, name) if arrays is None else arrays
                cut = len(entry.prefix)
                own = {n[cut:]: v for n, v in arrays.items() if n.startswith(entry.prefix)}
                found[i] = Vectors(entry.spec, entry.specs, own)
    return file, found[0], found[1:]


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


def _unpacked(data: bytes, name: str) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"{name} is damaged: its header claims {size} bytes")
    try:
        parse_json(data[8 : 8 + size])  # strictly: no repeated name, no nesting
        return load(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is damaged: {str(error)[:200]}") from error
