"""Packed blocks: the selected blocks of one weight as an ordinary parameter of its module.

The full weight stays where it is, frozen, and every forward pass reads it as before. What is
trained is a packed tensor ``[n_selected, block_rows, block_cols]``; its values are written
through to the full weight after each optimizer step. Nothing else about the model changes:
``state_dict`` shows the full weights alone.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.blocks import BlockGrid
from fastgrad.conversion import convert
from fastgrad.errors import PartialError
from fastgrad.identity import PACKED_SUFFIX
from fastgrad.readings import check_own, is_reading_of, read
from fastgrad.sparse_layers import SparseRows, linear
from fastgrad_kernels.layout import gather_blocks, matrix_view, write_blocks_


class PackedBlocks:
    """The selected blocks of one weight and their packed parameter.

    Attributes:
        name: the weight's parameter name.
        full: the full weight, frozen.
        packed: the trained parameter, ``[n, block_rows, block_cols]``, or the weight's own shape
            if the whole weight is selected.
        ids: int64 ``[n]`` block numbers on the weight's device.
        by_block: packed block by block even if all blocks are selected, since an optimizer counts
            steps per block.
        watched: belongs to a live :class:`~fastgrad.partial.Partial`; copies of a model do not.
        keeps_dtype: a dtype was asked for, which ``model.to(dtype)`` does not change.
    """

    keeps_dtype = False

    def __init__(
        self,
        name: str,
        full: nn.Parameter,
        grid: BlockGrid,
        ids: Tensor,
        dtype: torch.dtype,
        *,
        by_block: bool = False,
        values: Tensor | None = None,
    ) -> None:
        self.name, self.full, self.grid = name, full, grid
        self.by_block, self.watched = by_block, True
        self._ids = ids.to(full.device)
        if values is None:
            values = self.gather(full.detach()).to(dtype)
        self.packed = nn.Parameter(values)
        self.packed._fastgrad_blocks = self  # type: ignore[attr-defined]
        self.packed._fastgrad_name = name  # type: ignore[attr-defined]
        self.written()

    def bind(self, full: Any, packed: Any) -> None:
        """Belong to these tensors, which hold what the former ones held."""
        self.full, self.packed = full, packed
        packed._fastgrad_blocks, packed._fastgrad_name = self, self.name
        self.written()

    @property
    def ids(self) -> Tensor:
        """Block numbers, on the weight's device: a model that is moved takes them along."""
        if self._ids.device != self.full.device:
            self._ids = self._ids.to(self.full.device)
        return self._ids

    @property
    def in_sync(self) -> bool:
        """The packed values are those that were last written to the full weight."""
        return self.packed._version == self._synced

    @property
    def whole(self) -> bool:
        """The packed tensor has the weight's own shape."""
        everything = self.grid.is_whole or self._ids.numel() == self.grid.n_blocks
        return everything and not self.by_block

    def gather(self, tensor: Tensor) -> Tensor:
        """Packed copy of the selected blocks of a tensor shaped like the full weight."""
        if self.whole:
            return tensor.clone()
        grid = self.grid
        return gather_blocks(matrix_view(tensor), self.ids, grid.block_rows, grid.block_cols)

    @torch.no_grad()
    def sync(self) -> None:
        """Write the packed values through to the full weight, rounding to its dtype.

        Raises:
            PartialError: if somebody else has written to the full weight in the meantime.
        """
        grid = self.grid
        self.check_untouched()
        if self.whole:
            self.full.copy_(self.packed)
        else:
            write_blocks_(
                self.full.detach(), self.ids, self.packed, grid.block_rows, grid.block_cols
            )
        self.written()

    def check_untouched(self) -> None:
        """Raises PartialError if somebody else has written to the full weight."""
        if self.full._version != self._full_seen and not self._broadcast():
            raise PartialError(
                f"{self.name} was changed from outside while its selected blocks are trained; the "
                "change would be overwritten. Remedy: call refresh() on the Partial after "
                "changing weights, before the next optimizer step"
            )

    @torch.no_grad()
    def _broadcast(self) -> bool:
        """Both sides were written from outside and hold the same: DistributedDataParallel does
        so, when it is made, with what process 0 has."""
        alike = not self.in_sync and torch.equal(
            self.gather(self.full.detach()), self.packed.detach().to(self.full.dtype)
        )
        if alike:
            self.written()
        return alike

    def written(self) -> None:
        """Both sides hold the same values now."""
        self._synced, self._full_seen = self.packed._version, self.full._version

    def write_again(self) -> None:
        """An optimizer's kernel had the full weight in hand but may have skipped its step."""
        self._full_seen = self.full._version
        self.sync()

    def target(self) -> tuple[Tensor, Tensor] | None:
        """What an optimizer's kernel writes through to: the full weight, as a matrix where blocks
        are selected, and the block numbers (empty for all of it); None where its memory is not
        laid out for that and :meth:`sync` must do it."""
        full = self.full.detach()
        if self.whole:
            alike = self.packed.is_contiguous() and full.is_contiguous()
            return (full, self.ids.new_empty(0)) if alike else None
        if full.ndim > 2 and not full.is_contiguous():
            return None
        return matrix_view(full), self.ids

    def check_trained(self) -> None:
        """Raises PartialError if somebody else has frozen the packed parameter."""
        if self.watched and not self.packed.requires_grad:
            raise PartialError(frozen_by_others(self.name))

    def sync_if_stale(self) -> None:
        """Catches in-place changes of either side that no optimizer step announced."""
        if not self.in_sync:
            self.sync()
        elif self.full._version != self._full_seen:
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the full weight's values, after they were loaded from elsewhere.

        Where the full weight is what the packed value rounds to, the packed value keeps the
        digits that only a master copy has: a reload of the same weights changes nothing.
        """
        new = self.gather(self.full.detach())
        same = self.packed.to(new.dtype) == new
        self.packed.copy_(torch.where(same, self.packed, new.to(self.packed.dtype)))
        self.written()


def frozen_by_others(name: str) -> str:
    """What to say about a trained tensor that no longer requires a gradient."""
    return (
        f"{name} is trained by a partial model, but its trained tensor no longer requires a "
        "gradient: get_peft_model, or a call of requires_grad_(False), has frozen it. Remedy: put "
        "adapters on the model before make_partial; to train fewer blocks call reselect() on the "
        "Partial; else requires_grad_(True) on partial.parameters()"
    )


def packed_attribute(attribute: str) -> str:
    return attribute + PACKED_SUFFIX


_GET_PARAMETER = nn.Module.get_parameter.__code__


def _wants_parameter() -> bool:
    """``get_parameter(name)`` reads an attribute and takes nothing but a parameter; so the caller
    of whoever asks this is looked at."""
    return not torch.compiler.is_compiling() and sys._getframe(2).f_code is _GET_PARAMETER


def sharded() -> Any:
    """What several processes need, which builds on this file."""
    from fastgrad import sharded

    return sharded


def class_before(module: nn.Module) -> Any:
    """The class that a partial module had; fully_shard puts one of its own in front."""
    order = type(module).__mro__
    return order[order.index(PartialModule) + 1]


class PartialModule(nn.Module):
    """Mixed into the class of each module that owns packed blocks."""

    _fastgrad_packed: dict[str, PackedBlocks]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for attribute, blocks in self._fastgrad_packed.items():
            if attribute not in self._parameters:
                raise PartialError(
                    f"{blocks.name} was taken out of its module after make_partial "
                    "(parametrized or deleted): gradients of its blocks would be lost. Remedy: do "
                    "so before make_partial, or call remove() on the Partial first"
                )
            blocks.sync_if_stale()
            if torch.is_grad_enabled():
                blocks.check_trained()
                if nn.parallel.DistributedDataParallel._active_ddp_module is not None:
                    sharded().check_reducer(blocks)
        fast = torch.is_grad_enabled() and self._fastgrad_fast is not None
        if fast and len(args) == 1 and not kwargs:
            return self._fast_forward(args[0])
        return super().forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Whoever reads the weight where gradients are on, the module itself or another one (a
        # tied head that calls F.linear, a parametrization), must reach the packed parameter.
        value = super().__getattr__(name)
        blocks = self.__dict__.get("_fastgrad_packed", {}).get(name)
        if blocks is None or sharded().is_sharded(value):
            return value
        blocks.sync_if_stale()
        if not torch.is_grad_enabled() or _wants_parameter():
            return value
        return read(value, self._parameters[packed_attribute(name)], blocks)

    def __setattr__(self, name: str, value: Any) -> None:
        # fully_shard puts other tensors in place this way, around every pass of the module; so
        # does load_state_dict(assign=True), while the packed parameters are out of the way.
        blocks = self.__dict__.get("_fastgrad_packed", {}).get(name)
        if blocks is not None and is_reading_of(value, blocks):
            return  # one.weight = other.weight, which are one already
        if (
            type(blocks) is PackedBlocks
            and value is not blocks.full
            and packed_attribute(name) in self._parameters
            and not sharded().is_sharded(value)
        ):
            raise PartialError(
                f"{blocks.name} was given another tensor while its blocks are trained: the "
                "optimizer would train the old one. Remedy: copy_() the new values into it under "
                "torch.no_grad(), or assign before make_partial"
            )
        super().__setattr__(name, value)
        if name in self._parameters:
            sharded().swapped(self, name, value)

    @property
    def _fastgrad_fast(self) -> str | None:
        """The kind of module whose gradient can be computed block by block, or None."""
        blocks = self._fastgrad_packed.get("weight")
        if blocks is None or blocks.whole:
            return None
        kind = class_before(self)
        if kind.forward is nn.Linear.forward:
            return "linear"
        if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
            return "conv1d"
        if kind.forward is nn.Embedding.forward:
            plain = self.max_norm is None and not (self.scale_grad_by_freq or self.sparse)
            return "embedding" if plain else None
        return None

    def _fast_forward(self, x: Tensor) -> Tensor:
        blocks = self._fastgrad_packed["weight"]
        full, packed = self._parameters["weight"], self._parameters[packed_attribute("weight")]
        check_own(full, packed, blocks)
        if self._fastgrad_fast == "embedding":
            return SparseRows.apply(packed, x, full, blocks, self.padding_idx)
        return linear(x, full, packed, self.bias, blocks, self._fastgrad_fast == "conv1d")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        convert(self, fn, lambda: super(PartialModule, self)._apply(fn, recurse), PACKED_SUFFIX)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made on the spot: pickle and deepcopy find it by the class underneath.
        return _new_partial, (class_before(self),), self.__getstate__()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        for attribute, blocks in self._fastgrad_packed.items():  # of a copy: bind to its tensors
            blocks.bind(self._parameters[attribute], self._parameters[packed_attribute(attribute)])
            blocks.watched = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for blocks in self._fastgrad_packed.values():
            blocks.sync_if_stale()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for attribute in self._fastgrad_packed:
            destination.pop(prefix + packed_attribute(attribute), None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        hidden = {}
        for attribute in self._fastgrad_packed:
            hidden[packed_attribute(attribute)] = self._parameters.pop(packed_attribute(attribute))
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            self._parameters.update(hidden)
        for attribute, blocks in self._fastgrad_packed.items():
            loaded = self._parameters[attribute]
            if loaded is not None and loaded is not blocks.full:  # assign=True
                loaded.requires_grad_(False)
                blocks.full = loaded
            blocks.refresh()


_CLASSES: dict[Any, Any] = {}


def partial_class(cls: type[nn.Module]) -> Any:
    """``cls`` with :class:`PartialModule` in front; it keeps the name that users know."""
    if cls not in _CLASSES:

        @wraps(cls.forward)  # callers look at the signature (Trainer drops unknown columns)
        def forward(self: PartialModule, *args: Any, **kwargs: Any) -> Any:
            return PartialModule.forward(self, *args, **kwargs)

        names = {"__module__": cls.__module__, "forward": forward}
        _CLASSES[cls] = type(cls.__name__, (PartialModule, cls), names)
    return _CLASSES[cls]


def check_owner(module: nn.Module, name: str) -> None:
    """Refuse a module whose parameter cannot be packed.

    Raises:
        PartialError: if reads of its parameters cannot be followed.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise PartialError(
            f"{name}: its module {type(module).__name__} is compiled by TorchScript, so blocks of "
            "its weight cannot be trained. Remedy: select whole parameters there, without a "
            "master copy"
        )


def _new_partial(cls: type[nn.Module]) -> nn.Module:
    made = partial_class(cls)
    return made.__new__(made)


def install(module: nn.Module, attribute: str, blocks: PackedBlocks) -> None:
    """Make ``module`` train ``blocks`` in place of its parameter ``attribute``."""
    if not isinstance(module, PartialModule):
        module.__dict__["_fastgrad_packed"] = {}
        module.__class__ = partial_class(type(module))
    module.register_parameter(packed_attribute(attribute), blocks.packed)
    module.__dict__["_fastgrad_packed"][attribute] = blocks


def uninstall(module: nn.Module) -> None:
    """Undo :func:`install`: the module is of its old class again and owns full weights only."""
    if isinstance(module, PartialModule):
        for attribute in list(module._fastgrad_packed):
            del module._parameters[packed_attribute(attribute)]
        del module.__dict__["_fastgrad_packed"]
        module.__class__ = class_before(module)
