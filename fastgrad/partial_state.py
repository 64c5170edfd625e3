"""One file per checkpoint: what an exact resume needs beside the model's and the optimizer's.

A checkpoint of the model holds the full weights, one of the optimizer its moments and step counts.
Neither knows which blocks are trained, the digits that only float32 masters have, or which weights
a delta will be against. Layout: safetensors; everything that is not a tensor is JSON in its header.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad import sharded
from fastgrad.blocks import check_spec, check_specs
from fastgrad.errors import BlockSpecError, PartialError, SelectionError
from fastgrad.files import atomic_path
from fastgrad.identity import model_parameters, tensors_hash, weights_hash, whole
from fastgrad.partial import (
    Partial,
    as_it_stands,
    build,
    check_fits,
    check_has_content,
    check_plain,
)
from fastgrad.selection import Selection
from fastgrad_kernels.layout import gather_blocks, matrix_view

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "fastgrad.partial/1"
_VALUES, _BLOCKS, _TOUCHED = "values/", "blocks/", "touched/"
_DTYPES = {str(d): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def save(partial: Partial, path: str | os.PathLike[str], *, hash_weights: bool) -> int:
    """See :meth:`fastgrad.Partial.save`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial.sync()
    selection, touched = partial.selection, partial.touched
    tensors: dict[str, Tensor] = {}
    for blocks in partial.packed:
        # In the weight's own dtype the packed values are those of the full weight.
        if blocks.packed.dtype != blocks.full.dtype:
            tensors[_VALUES + blocks.name] = whole(blocks.packed.detach()).contiguous()
    tensors |= _ids(selection, _BLOCKS)
    if touched is not selection:
        tensors |= _ids(touched, _TOUCHED)
    header = {
        "format": FORMAT,
        "selection": _described(selection),
        "touched": None if touched is selection else _described(touched),
        "master_dtype": None if partial.master_dtype is None else str(partial.master_dtype),
        "by_block": [b.name for b in partial.packed if b.by_block],
        "order": [name for name, _ in partial.named_parameters()],
        "requires_grad": partial._requires_grad,
        "base_hash": partial.base_hash,
        "model_hash": weights_hash(partial.model) if hash_weights else None,
        "content_hash": tensors_hash(sorted(tensors.items())),
    }
    metadata = {"fastgrad": json.dumps(header)}

    def write() -> int:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        return os.path.getsize(path)

    try:
        return sharded.once(partial.model, write)
    except (OSError, SafetensorError) as error:
        raise PartialError(
            f"could not write {path}: {error}. What stood there before is unchanged, and so is the "
            "partial model. Remedy: free space or another folder, then save again"
        ) from error


def load_partial(
    model: nn.Module, path: str | os.PathLike[str], *, check_weights: bool = True
) -> Partial:
    """Make ``model`` partial as it was when :meth:`fastgrad.Partial.save` wrote the file.

    The model must hold the weights that it had then: load its checkpoint first. Afterwards build
    the optimizer on ``partial.parameters()``, in the same groups as before, empty ones too, and
    load its state. Training then goes on bit for bit.

    Args:
        model: not partial, weights loaded; changed in place.
        path: the file.
        check_weights: compare the content hash of the weights (one read of them). The values of
            blocks with masters are compared in any case, at no cost.

    Returns:
        the partial model; its ``base_hash`` is that of the weights before any training.

    Raises:
        PartialError: if the file is missing or damaged, or belongs to another model or to other
            weights; nothing has changed then.
    """
    header, tensors = _read(path)
    try:
        selection = _selection(header["selection"], tensors, _BLOCKS)
        described = header["touched"]
        touched = None if described is None else _selection(described, tensors, _TOUCHED)
        master = header["master_dtype"]
        master_dtype = None if master is None else _DTYPES[master]
        by_block, requires_grad = list(header["by_block"]), dict(header["requires_grad"])
        base_hash, model_hash = header["base_hash"], header["model_hash"]
        if not all(h is None or isinstance(h, str) for h in (base_hash, model_hash)):
            raise ValueError("a hash is not a text")
        if header["order"] != list(selection.blocks) or not set(by_block) <= set(selection.blocks):
            raise ValueError("the trained tensors are not those of the selection")
    except (KeyError, TypeError, ValueError, AttributeError, BlockSpecError) as error:
        raise PartialError(f"{path} is damaged: {error!r}") from error
    check_plain(model)
    sharded.check_not_wrapped(model)
    check_has_content(model, "the partial file holds the trained blocks alone")
    own = model_parameters(model)
    _check_model(path, own, selection)
    values = {}
    for name in selection.blocks:
        p = own[name]
        if as_it_stands(selection, name, p, master_dtype, by_block):
            continue
        if (master_dtype or p.dtype) != p.dtype:
            values[name] = _master(path, selection, name, p, tensors, master_dtype, by_block)
    if check_weights and model_hash is not None:
        found = weights_hash(model)
        if found != model_hash:
            raise PartialError(
                f"{path} was saved with weights {model_hash[:23]}..., the model has "
                f"{found[:23]}...: it changed between save and resume. Remedy: load the "
                "checkpoint that was saved beside the file, in the same dtype"
            )
    return build(
        model, selection, master_dtype, base_hash, by_block=by_block, values=values,
        requires_grad=requires_grad, touched=touched,
    )  # fmt: skip


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["fastgrad"])
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise PartialError(
                    f"{path} is not a file of this format: this version reads {FORMAT!r}, written "
                    "by Partial.save()"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PartialError(f"no file of a partial model at {path}") from None
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise PartialError(
            f"{path} is damaged or not written by Partial.save(): {error}"
        ) from error
    if header.get("content_hash") != tensors_hash(sorted(tensors.items())):
        raise PartialError(
            f"{path} is damaged: its values are not those that were saved. Remedy: go back to an "
            "earlier checkpoint"
        )
    return header, tensors


def _check_model(
    path: object, own: Mapping[str, nn.Parameter], selection: Selection
) -> None:
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    for name, shape in selection.shapes.items():
        if shapes.get(name) != shape:
            found = f"has it in shape {shapes[name]}" if name in shapes else "lacks it"
            raise PartialError(
                f"{path} is of a model with {name} of shape {shape}; this model {found}. Remedy: "
                "build the model that was trained"
            )
    if extra := [name for name in shapes if name not in selection.shapes]:
        raise PartialError(
            f"{path} is of a model without {extra[0]!r}. Remedy: build the model that was trained; "
            "add adapters before make_partial"
        )
    try:
        check_fits(own, selection)
    except SelectionError as error:
        raise PartialError(f"{path} does not fit: {error}") from error


def _master(
    path: object,
    selection: Selection,
    name: str,
    p: nn.Parameter,
    tensors: Mapping[str, Tensor],
    master_dtype: torch.dtype | None,
    by_block: list[str],
) -> Tensor:
    """The saved master values of one weight, if they are what the weight is rounded from."""
    value, grid, full = tensors.get(_VALUES + name), selection.grid(name), p.detach()
    if not (selection.is_whole(name) and name not in by_block):
        ids = torch.from_numpy(selection.blocks[name]).to(p.device)
        full = gather_blocks(matrix_view(full), ids, grid.block_rows, grid.block_cols)
    if value is None or value.dtype != master_dtype or value.shape != full.shape:
        raise PartialError(
            f"{path} has no {master_dtype} values of {name} in the shape {tuple(full.shape)}: "
            f"the model has it in {p.dtype}. Remedy: load the model in the dtype that it was "
            "trained in"
        )
    value = value.to(p.device)
    rounded = value.to(p.dtype)
    if not torch.allclose(rounded, full, rtol=0, atol=0, equal_nan=True):
        raise PartialError(
            f"{name} does not hold what {path} was saved with: the model changed between save and "
            "resume. Remedy: load the checkpoint that was saved beside the file"
        )
    return value


def _ids(selection: Selection, prefix: str) -> dict[str, Tensor]:
    """Block numbers of the parameters that are not whole."""
    return {
        prefix + name: torch.from_numpy(ids)
        for name, ids in selection.blocks.items()
        if not selection.is_whole(name)
    }


def _described(selection: Selection) -> dict[str, Any]:
    return {
        "shapes": [[name, list(shape)] for name, shape in selection.shapes.items()],
        "spec": selection.spec,
        "specs": dict(selection.specs),
        "names": list(selection.blocks),
        "weights_hash": selection.weights_hash,
        "meta": dict(selection.meta),
    }


def _selection(described: Any, tensors: Mapping[str, Tensor], prefix: str) -> Selection:
    shapes = {str(name): tuple(int(n) for n in shape) for name, shape in described["shapes"]}
    spec = check_spec(described["spec"])
    specs = check_specs(described["specs"], shapes)
    whole = Selection(
        shapes, spec, {n: np.array([0]) for n in described["names"]}, specs=specs
    )  # for its grids
    blocks = {}
    for name in described["names"]:
        ids = tensors.get(prefix + name)
        blocks[name] = np.arange(whole.grid(name).n_blocks) if ids is None else ids.numpy()
    digest, meta = described["weights_hash"], dict(described["meta"])
    return Selection(shapes, spec, blocks, digest, meta, specs)
