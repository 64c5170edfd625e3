"""Delta checkpoints: the trained blocks alone, for exactly one base model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgrad import sharded
from fastgrad.blocks import BlockGrid, check_specs, grid_of
from fastgrad.errors import BlockSpecError, DeltaError
from fastgrad.files import atomic_path
from fastgrad.identity import model_parameters, tensors_hash, weights_hash, whole
from fastgrad.packed import refresh_packed
from fastgrad.partial import Partial
from fastgrad_kernels.layout import gather_blocks, matrix_view, write_blocks_

FORMAT = "fastgrad.delta/1"
#: With granularities that differ by parameter: an older reader would take the blocks for others.
FORMAT_BY_NAME = "fastgrad.delta/2"


@dataclass
class AppliedDelta:
    """What :func:`load_delta` changed; :meth:`revert` takes it back bit by bit."""

    model: nn.Module
    grids: dict[str, BlockGrid]
    ids: dict[str, Tensor | None]
    before: dict[str, Tensor]

    @torch.no_grad()
    def revert(self) -> None:
        """Restore the weights that stood there before."""
        own = model_parameters(self.model)
        for name, old in self.before.items():
            _write(own[name], self.grids[name], self.ids[name], old)
        refresh_packed(self.model)


def save_delta(partial: Partial, path: str | os.PathLike[str]) -> int:
    """Write the trained blocks as safetensors, atomically. Returns the file's size in bytes.

    Under ``fully_shard`` all processes have to call this, and one of them writes the file.

    Raises:
        DeltaError: if the partial model was made without the hash of its base weights.
        PartialError: if it was removed.
    """
    from safetensors.torch import save_file

    if not isinstance(partial, Partial):
        raise DeltaError(
            f"save_delta takes what make_partial returned, not {type(partial).__name__}: it knows "
            "which blocks were trained"
        )
    if partial.base_hash is None:
        raise DeltaError(
            "a delta must name its base weights. Remedy: make_partial(..., hash_base=True)"
        )
    partial.sync()
    own, selection = model_parameters(partial.model), partial.touched  # also what was dropped
    tensors: dict[str, Tensor] = {}
    for name, ids in selection.blocks.items():
        index = None if selection.is_whole(name) else torch.from_numpy(ids)
        tensors[f"values/{name}"] = _read(own[name], selection.grid(name), index)
        if index is not None:
            tensors[f"blocks/{name}"] = index.to(torch.int32)
    specs = {n: selection.specs[n] for n in selection.blocks if n in selection.specs}
    header = {
        "format": FORMAT_BY_NAME if specs else FORMAT,
        "spec": selection.spec,
        "specs": specs,
        "base_hash": partial.base_hash,
        "content_hash": _content_hash(tensors),
        "shapes": {n: list(selection.shapes[n]) for n in selection.blocks},
    }

    def write() -> int:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"fastgrad": json.dumps(header, sort_keys=True)})
        return os.path.getsize(path)

    return sharded.once(partial.model, write)


@torch.no_grad()
def load_delta(
    model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True
) -> AppliedDelta:
    """Write a delta's blocks into ``model``, which must hold the base weights.

    Args:
        model: the base model; changed in place.
        path: file written by :func:`save_delta`.
        check_base: compare the content hash of the model with the delta's.

    Raises:
        DeltaError: if the file is missing or damaged, or was made for other weights; the model
            is unchanged then.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["fastgrad"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header["format"] not in (FORMAT, FORMAT_BY_NAME):
            raise DeltaError(
                f"{path} has format {header['format']!r}, this version reads {FORMAT!r} and "
                f"{FORMAT_BY_NAME!r}"
            )
        shapes = {n: _shape(s) for n, s in header["shapes"].items()}
        specs = check_specs(header.get("specs", {}), shapes)
        grids = {n: grid_of(n, s, header["spec"], specs) for n, s in shapes.items()}
        values = {n: tensors[f"values/{n}"] for n in shapes}
        ids = {
            n: _block_ids(tensors[f"blocks/{n}"]) if f"blocks/{n}" in tensors else None
            for n in shapes
        }
        base_hash = str(header["base_hash"])
        if header["content_hash"] != _content_hash(tensors):
            raise DeltaError(
                f"{path} is damaged: its values are not those that were saved. Remedy: copy or "
                "download it again"
            )
    except FileNotFoundError:
        raise DeltaError(f"no delta file at {path}") from None
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
        if isinstance(error, DeltaError):
            raise
        raise DeltaError(f"{path} is damaged or not a fastgrad delta: {error}") from error
    own = model_parameters(model)
    for name, shape in shapes.items():
        if name not in own or tuple(own[name].shape) != shape:
            raise DeltaError(
                f"the delta changes {name} of shape {shape}, which this model lacks: "
                "it was made for another model"
            )
        if values[name].dtype != own[name].dtype:
            raise DeltaError(
                f"{name} is {own[name].dtype}, in the delta {values[name].dtype}. "
                "Remedy: load the base model in that dtype"
            )
        _check_values(path, name, grids[name], ids[name], values[name])
    if check_base:
        found = weights_hash(model)
        if found != base_hash:
            raise DeltaError(
                f"the delta was made for weights {base_hash[:23]}..., the model has "
                f"{found[:23]}... Remedy: load the base revision it was trained from"
            )
    applied = AppliedDelta(model, grids, ids, {})
    for name in shapes:
        applied.before[name] = _read(own[name], grids[name], ids[name])
    for name in shapes:
        _write(own[name], grids[name], ids[name], values[name])
    refresh_packed(model)
    return applied


def _content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes, as :func:`weights_hash` does for a model."""
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


def _check_values(
    path: object, name: str, grid: BlockGrid, ids: Tensor | None, values: Tensor
) -> None:
    try:
        if ids is not None:
            grid.check_ids(ids.numpy(), name)
    except BlockSpecError as error:
        raise DeltaError(f"{path} is damaged: {error}") from error
    if not bool(torch.isfinite(values).all()):
        raise DeltaError(f"{path} holds NaN or infinity for {name}")
    expected = grid.shape if ids is None else (ids.numel(), grid.block_rows, grid.block_cols)
    if tuple(values.shape) != expected:
        raise DeltaError(
            f"{path} is damaged: {name} has values of shape {tuple(values.shape)}, "
            f"expected {expected}"
        )


def _read(p: Tensor, grid: BlockGrid, ids: Tensor | None) -> Tensor:
    p = whole(p.detach())
    if ids is None:
        return p.clone()
    return gather_blocks(matrix_view(p), ids.to(p.device), grid.block_rows, grid.block_cols)


def _write(p: Tensor, grid: BlockGrid, ids: Tensor | None, values: Tensor) -> None:
    p = p.detach()
    if ids is None:
        p.copy_(values)
        return
    device = p.device
    write_blocks_(p, ids.to(device), values.to(device), grid.block_rows, grid.block_cols)
