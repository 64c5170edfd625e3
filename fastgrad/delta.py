"""Delta checkpoints: the trained blocks alone, for exactly one base model."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastgrad import sharded
from fastgrad.blocks import BlockGrid
from fastgrad.delta_files import DeltaFile, not_finite, read_delta_file, write_delta_file
from fastgrad.errors import DeltaError, PartialError
from fastgrad.identity import model_parameters, tensors_hash, weights_hash, whole
from fastgrad.partial import Partial, check_plain
from fastgrad_kernels.layout import gather_blocks, matrix_view, write_blocks_

# Deltas that were applied to a model and not reverted, in that order, by number.
_APPLIED: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
_NUMBERS = itertools.count()


class AppliedDelta:
    """What :func:`load_delta` changed; :meth:`revert` takes it back bit by bit.

    Attributes:
        delta: what was applied.
        before: parameter -> the values of its blocks that stood there before.
    """

    def __init__(self, model: nn.Module, delta: DeltaFile) -> None:
        self._model = model
        self.delta = delta
        self.before: dict[str, Tensor] = {}
        self.reverted = False
        self._number, self._written = next(_NUMBERS), ""

    @torch.no_grad()
    def _apply(self) -> None:
        own = model_parameters(self._model)
        for name, ids in self.delta.ids.items():
            self.before[name] = _read(own[name], self.delta.grid(name), ids)
        with self._all_or_nothing(self.before):
            self._write(self.delta.values)
            self._written = self._hash()
        _APPLIED.setdefault(self._model, []).append(self._number)

    def _write(self, values: Mapping[str, Tensor]) -> None:
        own = model_parameters(self._model)
        for name, value in values.items():
            _write(own[name], self.delta.grid(name), self.delta.ids[name], value)

    @contextlib.contextmanager
    def _all_or_nothing(self, before: Mapping[str, Tensor]) -> Iterator[None]:
        """An error between two parameters (no memory left, Ctrl-C) leaves neither model."""
        try:
            yield
        except BaseException:
            self._write(before)
            raise

    def _hash(self) -> str:
        """Of the values of the delta's blocks as they are now in the model."""
        own = model_parameters(self._model)
        return tensors_hash(
            (name, _read(own[name], self.delta.grid(name), ids))
            for name, ids in self.delta.ids.items()
        )

    @torch.no_grad()
    def revert(self) -> None:
        """Restore the values that stood there before.

        Deltas that were applied one after another are reverted from the last to the first.

        Raises:
            DeltaError: if it was reverted before, another delta was applied after it, its blocks
                were changed since, or the model is partial by now; the model is unchanged then.
        """
        if self.reverted:
            raise DeltaError("this delta was reverted already")
        _check_plain(self._model, "taken back from")
        applied = _APPLIED[self._model]
        if applied[-1] != self._number:
            later = len(applied) - applied.index(self._number) - 1
            raise DeltaError(
                f"{later} later delta(s) were applied on top of this one. Remedy: revert those "
                "first, the last one first"
            )
        if self._hash() != self._written:
            raise DeltaError(
                "weights of this delta were changed since it was applied, so that reverting it "
                "would not give the base weights. Remedy: load the base model again"
            )
        with self._all_or_nothing(self.delta.values):
            self._write(self.before)
        applied.pop()
        self.reverted = True


def save_delta(partial: Partial, path: str | os.PathLike[str]) -> int:
    """Write the trained blocks as safetensors, atomically. Returns the file's size in bytes.

    The file names the base weights and the trained ones by their content hash (one read of the
    weights), so that deltas can be checked link by link. Under ``fully_shard`` all processes have
    to call this, and one of them writes the file.

    Raises:
        DeltaError: if the partial model was made without the hash of its base weights, a trained
            block holds NaN or infinity, or the file cannot be written; what stood at ``path``
            before is unchanged then.
        PartialError: if it was removed.
    """
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
    ids = {
        name: None if selection.is_whole(name) else torch.from_numpy(numbers)
        for name, numbers in selection.blocks.items()
    }
    delta = DeltaFile(
        spec=selection.spec,
        specs={n: selection.specs[n] for n in ids if n in selection.specs},
        shapes={n: selection.shapes[n] for n in ids},
        ids=ids,
        values={n: _read(own[n], selection.grid(n), index) for n, index in ids.items()},
        base_hash=partial.base_hash,
        result_hash=weights_hash(partial.model),
    )
    for name in ids:
        if (where := not_finite(delta, name)) is not None:
            raise DeltaError(
                f"{where} holds NaN or infinity after training: nobody could load this delta. "
                f"{path} is unchanged. Remedy: go back to an earlier checkpoint and a lower "
                "learning rate; Partial.save() and state_dict() keep the present state as it is"
            )
    return sharded.once(partial.model, lambda: write_delta_file(delta, path))


def load_delta(
    model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True
) -> AppliedDelta:
    """Write a delta's blocks into ``model``, which must hold the base weights.

    A delta that was trained on top of another one is loaded after it: its base weights are those
    with the first one.

    Args:
        model: the base model, not partial and not sharded; changed in place.
        path: file written by :func:`save_delta`.
        check_base: compare the content hash of the model with the delta's.

    Raises:
        DeltaError: if the file is missing or damaged, was made for other weights, or the model
            cannot take it (partial, sharded, on the meta device); the model is unchanged then.
    """
    delta = read_delta_file(path)
    _check_plain(model, "loaded into")
    own = model_parameters(model)
    for name, p in own.items():
        if p.is_meta and (check_base or name in delta.shapes):
            raise DeltaError(
                f"{name} is on the meta device and has no content. Remedy: load the base weights "
                "into the model first, then the delta"
            )
        if sharded.is_sharded(p):
            raise DeltaError(
                f"{name} is cut up over processes. Remedy: load the delta before fully_shard"
            )
    for name, shape in delta.shapes.items():
        if name not in own or tuple(own[name].shape) != shape:
            raise DeltaError(
                f"the delta changes {name} of shape {shape}, which this model lacks: "
                "it was made for another model"
            )
        if delta.values[name].dtype != own[name].dtype:
            raise DeltaError(
                f"{name} is {own[name].dtype}, in the delta {delta.values[name].dtype}. "
                "Remedy: load the base model in that dtype"
            )
    if check_base:
        found = weights_hash(model)
        if found != delta.base_hash:
            raise DeltaError(
                f"the delta was made for weights {delta.base_hash[:23]}..., the model has "
                f"{found[:23]}... Remedy: load the base revision it was trained from, and before "
                "a delta that was trained on top of others, those"
            )
    applied = AppliedDelta(model, delta)
    applied._apply()
    if check_base and delta.result_hash is not None:
        try:
            check_result(delta, weights_hash(model))
        except DeltaError:
            applied.revert()
            raise
    return applied


def _check_plain(model: nn.Module, done: str) -> None:
    """Raises DeltaError for a partial model: its own delta would lack these blocks, and its masters
    their digits."""
    try:
        check_plain(model)
    except PartialError:
        raise DeltaError(
            f"a delta cannot be {done} a model that is being trained partially: a delta of this "
            "training would lack the blocks that are not selected. Remedy: load or revert it "
            "before make_partial, or call remove() on the Partial first"
        ) from None


def check_result(delta: DeltaFile, found: str) -> None:
    """Raises DeltaError if a delta has led to the weights ``found`` and not to those that it was
    saved from."""
    if delta.result_hash is not None and found != delta.result_hash:
        raise DeltaError(
            f"base and delta give weights {found[:23]}..., the trained model had "
            f"{delta.result_hash[:23]}...: other weights than those of the selection were changed "
            "too. Remedy: save the trained model itself with save_pretrained; load_delta(..., "
            "check_base=False) loads the blocks all the same"
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
