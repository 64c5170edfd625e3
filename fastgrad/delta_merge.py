"""A base model and a delta as one full checkpoint that needs no fastgrad to be read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.delta import check_result, load_delta
from fastgrad.delta_files import DeltaFile, read_delta_file
from fastgrad.errors import DeltaError, MissingExtraError
from fastgrad.identity import tensors_hash
from fastgrad_kernels.layout import write_blocks_

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of the base weights alone: said of the merged ones it would be wrong.
_OF_THE_BASE = {"gradient_blueprint.json"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json",
            ".bin.index.json")  # fmt: skip


def merge_delta(
    base: nn.Module | str | os.PathLike[str],
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: str | int | None = None,
) -> Path:
    """Write base weights with a delta as a full checkpoint. Returns ``out``.

    Args:
        base: a model (unchanged when this returns), the folder of a transformers model, which is
            written by its own ``save_pretrained`` and with the other files of the folder (tokenizer
            and the like; not the blueprint, which is of the base), or a folder with
            ``model.safetensors`` or the shards that ``model.safetensors.index.json`` names and no
            ``config.json``, which is copied tensor by tensor.
        delta: file of :func:`~fastgrad.save_delta` or :func:`~fastgrad.stack_deltas`.
        out: a folder that does not exist or is empty. It appears whole or not at all.
        max_shard_size: of a transformers model, as in its ``save_pretrained``.

    Raises:
        DeltaError: if the delta is damaged or was made for other weights, the result is not what
            was saved, ``base`` or ``out`` will not do, or nothing can be written.
        MissingExtraError: if the base is a transformers folder and transformers is not installed.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DeltaError(f"{target} is there already. Remedy: a folder that does not exist")
    with _folder(target) as folder:
        if isinstance(base, nn.Module):
            _merge_model(base, delta, folder, max_shard_size)
        elif (Path(base) / "config.json").is_file():
            _merge_model(_load(Path(base)), delta, folder, max_shard_size)
            _copy_others(Path(base), folder)
        else:
            _merge_files(Path(base), read_delta_file(delta), folder)
    return target


def _merge_model(
    model: nn.Module, delta: str | os.PathLike[str], folder: Path, max_shard_size: Any
) -> None:
    applied = load_delta(model, delta)
    try:
        save: Any = getattr(model, "save_pretrained", None)
        if save is not None:
            save(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        else:
            from safetensors.torch import save_model

            save_model(model, str(folder / SINGLE))
    finally:
        applied.revert()


def _load(folder: Path) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = getattr(transformers, (config.architectures or [""])[0])
        model: nn.Module = kind.from_pretrained(
            folder, config=config, dtype="auto", local_files_only=True
        )
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DeltaError(
            f"the model in {folder} cannot be loaded: {line[:200]} Remedy: load it yourself and "
            "give merge_delta the model"
        ) from error
    return model


def _copy_others(base: Path, folder: Path) -> None:
    for path in base.iterdir():
        known = path.name.endswith(_WEIGHTS) or path.name in _OF_THE_BASE
        if path.is_file() and not known and not (folder / path.name).exists():
            shutil.copy2(path, folder / path.name)


def _merge_files(base: Path, delta: DeltaFile, folder: Path) -> None:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        shards = _shards(base)
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(safe_open(base / name, framework="pt")) for name in shards
            }
            where = {key: file for file in files.values() for key in file.keys()}  # noqa: SIM118
            _check_names(base, delta, where)
            found = tensors_hash((key, where[key].get_tensor(key)) for key in sorted(where))
            if found != delta.base_hash:
                raise DeltaError(
                    f"the delta was made for weights {delta.base_hash[:23]}..., the files in "
                    f"{base} hold {found[:23]}... Remedy: the base revision that it was trained "
                    "from; where files hold more or other tensors than the model has parameters, "
                    "load the model and give merge_delta that"
                )
            for name, file in files.items():
                tensors = {k: _changed(k, file.get_tensor(k), delta) for k in file.keys()}  # noqa: SIM118
                save_file(tensors, folder / name, metadata=file.metadata())
    except SafetensorError as error:
        raise DeltaError(f"a file in {base} is damaged or cannot be copied: {error}") from error
    if (base / INDEX).is_file():
        shutil.copy2(base / INDEX, folder / INDEX)
    _copy_others(base, folder)
    merged = _hash_of(folder, shards)
    check_result(delta, merged)


def _shards(base: Path) -> list[str]:
    """File names of a checkpoint's tensors.

    Raises:
        DeltaError: if there are none.
    """
    if (base / INDEX).is_file():
        try:
            index = json.loads((base / INDEX).read_text("utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DeltaError(f"{base / INDEX} is damaged: {error}") from error
        for name in names:
            if Path(name).name != name or not (base / name).is_file():
                raise DeltaError(f"{base / INDEX} names {name!r}, which is no file beside it")
        return names
    if (base / SINGLE).is_file():
        return [SINGLE]
    raise DeltaError(
        f"{base} is no checkpoint: it holds neither config.json nor {SINGLE} nor {INDEX}"
    )


def _check_names(base: Path, delta: DeltaFile, where: Mapping[str, Any]) -> None:
    for name, shape in delta.shapes.items():
        if name not in where or tuple(where[name].get_slice(name).get_shape()) != shape:
            raise DeltaError(
                f"the delta changes {name} of shape {shape}, which the files in {base} lack. "
                "Remedy: load the model and give merge_delta that"
            )


@torch.no_grad()
def _changed(name: str, tensor: Tensor, delta: DeltaFile) -> Tensor:
    if name not in delta.shapes:
        return tensor
    grid, ids, values = delta.grid(name), delta.ids[name], delta.values[name]
    if values.dtype != tensor.dtype:
        raise DeltaError(f"{name} is {tensor.dtype}, in the delta {values.dtype}")
    if ids is None:
        return values
    return write_blocks_(tensor.clone(), ids, values, grid.block_rows, grid.block_cols)


def _hash_of(folder: Path, shards: list[str]) -> str:
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / s, framework="pt")) for s in shards]
        where = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        return tensors_hash((key, where[key].get_tensor(key)) for key in sorted(where))


@contextlib.contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """A new folder beside the target, renamed onto it on success and removed on failure.

    Raises:
        DeltaError: if nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise DeltaError(f"{target} cannot be written: {error}") from error
    try:
        yield made
        umask = os.umask(0)
        os.umask(umask)
        made.chmod(0o777 & ~umask)  # mkdtemp makes private folders
        made.replace(target)
    except OSError as error:
        raise DeltaError(
            f"{target} cannot be written: {error}. Nothing is left of it. Remedy: make room, or "
            "choose another folder"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
