"""The file of a delta: selected blocks, their numbers, and which weights they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastgrad.blocks import BlockGrid, check_spec, check_specs, grid_of
from fastgrad.errors import BlockSpecError, DeltaError
from fastgrad.files import atomic_path
from fastgrad.identity import tensors_hash

FORMAT = "fastgrad.delta/1"
#: With granularities that differ by parameter: an older reader would take the blocks for others.
FORMAT_BY_NAME = "fastgrad.delta/2"


@dataclass(frozen=True)
class DeltaFile:
    """What a delta holds.

    Attributes:
        spec, specs: granularity of the blocks, as in a :class:`~fastgrad.Selection`.
        shapes: of the parameters that it changes.
        ids: parameter -> int64 ``[n]`` rising block numbers; None for a whole parameter.
        values: parameter -> new values, ``[n, block_rows, block_cols]`` or of the parameter's
            shape, in the parameter's dtype.
        base_hash: content hash of the weights that it was trained from.
        result_hash: that of the weights with it; None in files of older versions.
    """

    spec: str
    shapes: Mapping[str, tuple[int, ...]]
    ids: Mapping[str, Tensor | None]
    values: Mapping[str, Tensor]
    base_hash: str
    result_hash: str | None = None
    specs: Mapping[str, str] = field(default_factory=dict)

    def grid(self, name: str) -> BlockGrid:
        """How a parameter divides into blocks."""
        return grid_of(name, self.shapes[name], self.spec, self.specs)

    @property
    def n_blocks(self) -> int:
        """Number of blocks; a whole parameter counts as all of its own."""
        return sum(
            self.grid(n).n_blocks if ids is None else ids.numel() for n, ids in self.ids.items()
        )

    @property
    def n_parameters(self) -> int:
        """Number of weights that it changes; padding of edge blocks is not counted."""
        return sum(
            self.grid(n).numel if ids is None else int(self.grid(n).sizes()[ids.numpy()].sum())
            for n, ids in self.ids.items()
        )


def write_delta_file(delta: DeltaFile, path: str | os.PathLike[str]) -> int:
    """Write a delta atomically. Returns the file's size in bytes.

    Raises:
        DeltaError: if it cannot be written, as on a full disk; what stood at ``path`` before is
            unchanged, and no part of the new file is left.
    """
    from safetensors.torch import save_file

    tensors = {f"values/{name}": value.contiguous() for name, value in delta.values.items()}
    tensors |= {
        f"blocks/{name}": ids.to(torch.int32) for name, ids in delta.ids.items() if ids is not None
    }
    header = {
        "format": FORMAT_BY_NAME if delta.specs else FORMAT,
        "spec": delta.spec,
        "specs": dict(delta.specs),
        "base_hash": delta.base_hash,
        "result_hash": delta.result_hash,
        "content_hash": _content_hash(tensors),
        "shapes": {name: list(shape) for name, shape in delta.shapes.items()},
    }
    metadata = {"fastgrad": json.dumps(header, sort_keys=True)}
    written(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return os.path.getsize(path)


def written(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` make the file at ``path``, whole or not at all.

    Raises:
        DeltaError: if it fails.
    """
    from safetensors import SafetensorError

    try:
        with atomic_path(path) as temporary:
            write(temporary)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise DeltaError(
            f"{path} cannot be written: {error}. What stood there before is unchanged. Remedy: "
            "make room, or choose another folder"
        ) from error


def read_delta_file(path: str | os.PathLike[str]) -> DeltaFile:
    """Read and check a delta.

    Raises:
        DeltaError: if the file is missing, damaged, or of a format that is not known.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["fastgrad"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header["format"] not in (FORMAT, FORMAT_BY_NAME):
            raise DeltaError(
                f"{path} has format {header['format']!r}, this version reads {FORMAT!r} and "
                f"{FORMAT_BY_NAME!r}. Remedy: a newer version of fastgrad"
            )
        shapes = {n: _shape(s) for n, s in header["shapes"].items()}
        result = header.get("result_hash")
        delta = DeltaFile(
            spec=check_spec(header["spec"]),
            specs=check_specs(header.get("specs", {}), shapes),
            shapes=shapes,
            values={n: tensors[f"values/{n}"] for n in shapes},
            ids={
                n: _block_ids(tensors[f"blocks/{n}"]) if f"blocks/{n}" in tensors else None
                for n in shapes
            },
            base_hash=str(header["base_hash"]),
            result_hash=None if result is None else str(result),
        )
        if header["content_hash"] != _content_hash(tensors):
            raise DeltaError(
                f"{path} is damaged: its values are not those that were saved. Remedy: copy or "
                "download it again"
            )
        for name in shapes:
            _check_values(path, delta, name)
    except FileNotFoundError:
        raise DeltaError(f"no delta file at {path}") from None
    except DeltaError:
        raise
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        RecursionError,
        OSError,
    ) as error:
        raise DeltaError(f"{path} is damaged or not a fastgrad delta: {error}") from error
    return delta


def _content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes, as ``weights_hash`` does for a model."""
    return tensors_hash(sorted(tensors.items()))


def _shape(raw: object) -> tuple[int, ...]:
    if not isinstance(raw, list) or not all(type(n) is int and n >= 0 for n in raw):
        raise ValueError(f"{raw!r} is not a shape")
    return tuple(raw)


def _block_ids(ids: Tensor) -> Tensor:
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"block numbers are {ids.ndim}-D {ids.dtype}, not a list of integers")
    if not bool((ids[1:] > ids[:-1]).all()):
        raise ValueError("block numbers do not rise")
    return ids.long()


def _check_values(path: object, delta: DeltaFile, name: str) -> None:
    grid, ids, values = delta.grid(name), delta.ids[name], delta.values[name]
    try:
        if ids is not None:
            grid.check_ids(ids.numpy(), name)
    except BlockSpecError as error:
        raise DeltaError(f"{path} is damaged: {error}") from error
    if (where := not_finite(delta, name)) is not None:
        raise DeltaError(f"{path} holds NaN or infinity in {where}")
    expected = grid.shape if ids is None else (ids.numel(), grid.block_rows, grid.block_cols)
    if tuple(values.shape) != expected:
        raise DeltaError(
            f"{path} is damaged: {name} has values of shape {tuple(values.shape)}, "
            f"expected {expected}"
        )


def not_finite(delta: DeltaFile, name: str) -> str | None:
    """Which blocks of a parameter hold NaN or infinity, in words; None if there are none."""
    ids, values = delta.ids[name], delta.values[name]
    if bool(torch.isfinite(values).all()):
        return None
    if ids is None:
        return name
    bad = ids[(~torch.isfinite(values)).flatten(1).any(1).cpu()].tolist()
    shown = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    return f"{name}, block{'s' * (len(bad) > 1)} {shown} of {delta.grid(name).spec!r}"
