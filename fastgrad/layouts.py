"""From one layout of a trained tensor to another: what a re-selection keeps of values and state.

A trained tensor holds selected blocks one after the other, ``[n, block_rows, block_cols]``, or has
the shape of the weight. Whatever an optimizer keeps per element has the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Optimizer, RMSprop, Rprop

from fastgrad.blocks import BlockGrid
from fastgrad.errors import PartialError
from fastgrad.optim import SparseAdamW
from fastgrad_kernels.layout import gather_blocks, matrix_view, write_blocks_

#: torch's optimizers that count steps per tensor and compute nothing from the count, the last one
#: as long as its rate does not decay.
_COUNT_ONLY = (RMSprop, Adadelta, Adagrad)


#: Marks of elements, beside the zeros of padding.
_YES, _NOT = 1.0, 2.0


@dataclass(frozen=True)
class Layout:
    """How a trained tensor holds its blocks.

    Attributes:
        grid: of the weight.
        ids: sorted int64 block numbers.
        by_block: block after block; else all of them in the weight's own shape.
    """

    grid: BlockGrid
    ids: NDArray[np.int64]
    by_block: bool

    @property
    def shape(self) -> tuple[int, ...]:
        if not self.by_block:
            return self.grid.shape
        return len(self.ids), self.grid.block_rows, self.grid.block_cols

    def same(self, other: Layout) -> bool:
        """Tensors of both layouts hold the same elements in the same places."""
        if not (self.by_block or other.by_block):
            return self.grid.shape == other.grid.shape
        return (
            self.by_block == other.by_block
            and self.grid.same_blocks(other.grid)
            and np.array_equal(self.ids, other.ids)
        )

    def spread(self, tensor: Tensor, into: Tensor) -> Tensor:
        """``into``, shaped like the weight, with a tensor of this layout written over it."""
        if not self.by_block:
            return into.copy_(tensor)
        grid, ids = self.grid, torch.from_numpy(self.ids).to(tensor.device)
        return write_blocks_(into, ids, tensor, grid.block_rows, grid.block_cols)

    def gather(self, full: Tensor) -> Tensor:
        """A new tensor of this layout out of one shaped like the weight; padding is zero."""
        if not self.by_block:
            return full.clone()
        grid, ids = self.grid, torch.from_numpy(self.ids).to(full.device)
        return gather_blocks(matrix_view(full), ids, grid.block_rows, grid.block_cols)


class Move:
    """What a weight's trained tensor keeps from ``old`` to ``new``, both of the same weight.

    Attributes:
        trained: bool per new block: all of its elements were trained before.
        dropped: number of old blocks with an element that is trained no more.
    """

    def __init__(self, old: Layout, new: Layout) -> None:
        self.old, self.new = old, new
        self._aligned = old.grid.same_blocks(new.grid)
        if self._aligned:
            self.trained = np.isin(new.ids, old.ids)
            self.dropped = int((~np.isin(old.ids, new.ids)).sum())
        else:
            before = self._blocks(self._mask(old), new)
            self.trained = np.asarray((before != _NOT).all((1, 2)))
            after = self._blocks(self._mask(new), old)
            self.dropped = int((after == _NOT).any((1, 2)).sum())

    @property
    def adds(self) -> bool:
        """Some element was not trained before."""
        return not self.trained.all()

    def carry(self, tensor: Tensor) -> Tensor:
        """Something that an optimizer keeps per element, in the new layout; zero what is new."""
        if self._aligned and self.old.by_block and self.new.by_block:
            out = tensor.new_zeros(self.new.shape)
            return self._copy(tensor, out)
        full = tensor.new_zeros(self.old.grid.shape)
        return self.new.gather(self.old.spread(tensor, full))

    def values(self, tensor: Tensor | None, full: Tensor, dtype: torch.dtype) -> Tensor:
        """Trained values in the new layout: of ``tensor`` where trained before, with all digits,
        else of the full weight."""
        if tensor is None:
            return self.new.gather(full).to(dtype)
        if self._aligned and self.old.by_block and self.new.by_block:
            return self._copy(tensor, self.new.gather(full).to(dtype))
        return self.new.gather(self.old.spread(tensor, full.to(dtype, copy=True)))

    def counts(self, steps: Tensor) -> Tensor | None:
        """Step counts per new block, float32 ``[n_new]`` or one if they are equal; None if a new
        block has elements of different counts."""
        steps = steps.detach().cpu().reshape(-1)
        if self._aligned:
            old = steps.expand(len(self.old.ids)) if steps.numel() == 1 else steps
            found = torch.zeros(len(self.new.ids))
            where = np.searchsorted(self.old.ids, self.new.ids[self.trained])
            found[torch.from_numpy(self.trained)] = old[torch.from_numpy(where)]
        else:
            view = steps.view(-1, 1, 1) if steps.numel() > 1 else steps.reshape(())
            full = self.old.spread(
                view.expand(self.old.shape), torch.zeros(self.old.grid.shape)
            ).numpy()
            per_block = self._blocks(full + 1, self.new)  # zero is padding
            high = per_block.max((1, 2))
            low = np.where(per_block == 0, high[:, None, None], per_block).min((1, 2))
            if (low != high).any():
                return None
            found = torch.from_numpy(high - 1)
        return found[0] if bool((found == found[0]).all()) else found

    def _copy(self, tensor: Tensor, out: Tensor) -> Tensor:
        kept = self.new.ids[self.trained]
        source = torch.from_numpy(np.searchsorted(self.old.ids, kept)).to(tensor.device)
        out[torch.from_numpy(self.trained).to(out.device)] = tensor[source].to(out.dtype)
        return out

    @staticmethod
    def _mask(layout: Layout) -> NDArray[np.float32]:
        """Whether each element is trained; blocks of it have zeros as padding."""
        full = torch.full(layout.grid.shape, _NOT)
        return layout.spread(torch.full(layout.shape, _YES), full).numpy()

    @staticmethod
    def _blocks(full: Any, layout: Layout) -> NDArray[np.float32]:
        as_blocks = Layout(layout.grid, layout.ids, True)
        found: NDArray[np.float32] = as_blocks.gather(torch.from_numpy(full).float()).numpy()
        return found


def migrated(
    optimizer: Optimizer, name: str, old: Tensor, new: nn.Parameter, move: Move
) -> dict[str, Any] | None:
    """The optimizer's state of ``old`` for ``new``; None if it keeps none yet. Nothing is changed.

    Args:
        optimizer: holds ``old``.
        name: of the weight, for messages.
        old: trained tensor so far.
        new: trained tensor from now on.
        move: from the layout of ``old`` to that of ``new``.

    Raises:
        PartialError: if it cannot be done exactly.
    """
    kind = type(optimizer).__name__
    if kind == "Muon" and new.ndim != 2:
        raise PartialError(
            f"{name}: {kind} updates matrices, and the selected blocks of a weight are not one. "
            "Remedy: keep this weight whole, or in another optimizer"
        )
    state = optimizer.state.get(old)
    if not state:
        return None
    if move.adds:
        _check_begins_at_zero(optimizer, name, old)
    exact = type(optimizer) in _COUNT_ONLY
    out: dict[str, Any] = {}
    for key, value in state.items():
        if key == "step" and isinstance(optimizer, SparseAdamW):
            out[key] = _counts(name, value, move)
        elif value is None:
            out[key] = None
        elif _per_element(value, old):
            out[key] = move.carry(value)
        elif isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
            if move.adds and not exact:
                raise PartialError(
                    f"{name}: {kind} keeps one {key!r} for the whole tensor, so blocks that are "
                    "new in it would get the bias correction of the old ones. Remedy: "
                    "fg.SparseAdamW, which counts steps per block; or re-select without new blocks "
                    "in weights that are trained already; or build a new optimizer"
                )
            out[key] = value.clone() if isinstance(value, Tensor) else value
        else:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise PartialError(
                f"{name}: {kind} keeps {key!r} ({shape}) for a tensor of shape {tuple(old.shape)}: "
                "which part of it belongs to which block is not known. Remedy: fg.SparseAdamW, or "
                "build a new optimizer after reselect(selection)"
            )
    return out


def by_block_counts(optimizer: Optimizer | None, old: Tensor, move: Move) -> bool:
    """The new tensor needs a step count per block, so it cannot have the weight's own shape."""
    if not isinstance(optimizer, SparseAdamW):
        return False
    steps = optimizer.state.get(old, {}).get("step")
    if steps is None:
        return False
    counts = move.counts(steps)
    return counts is not None and counts.numel() > 1


def check_enters(optimizer: Optimizer, name: str, new: Tensor) -> None:
    """Raises PartialError if a weight cannot enter this optimizer after it was built."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, Adagrad):
        raise PartialError(
            f"{name}: {kind} makes the state of its parameters when it is built, so none can be "
            "added. Remedy: build a new optimizer after reselect(selection)"
        )
    if kind == "Muon" and new.ndim != 2:
        raise PartialError(
            f"{name}: {kind} updates matrices, and this trained tensor has shape "
            f"{tuple(new.shape)}. Remedy: pass group_of=... that says which optimizer it enters"
        )


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises PartialError for an optimizer whose state is not kept per parameter."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise PartialError(
            "LBFGS keeps one history for all parameters together. Remedy: build a new optimizer "
            "after reselect(selection)"
        )


def _per_element(value: object, old: Tensor) -> bool:
    """An ordinary float tensor in the parameter's layout; a packed 8-bit state is not."""
    return (
        type(value) is Tensor
        and value.is_floating_point()
        and value.shape == old.shape
        and value.ndim > 0
    )


def _counts(name: str, steps: Any, move: Move) -> Tensor:
    counts = move.counts(torch.as_tensor(steps))
    if counts is None:
        raise PartialError(
            f"{name}: its new granularity {move.new.grid.spec!r} has blocks of which a part was "
            f"trained before, as {move.old.grid.spec!r}: one step count cannot be right for both. "
            "Remedy: keep the granularity of weights that stay selected, or leave this weight out "
            "of one re-selection"
        )
    return counts.to(steps.device if isinstance(steps, Tensor) else "cpu", torch.float32)


def _check_begins_at_zero(optimizer: Optimizer, name: str, old: Tensor) -> None:
    group: Mapping[str, Any] = next(
        g for g in optimizer.param_groups if any(p is old for p in g["params"])
    )
    why = None
    if isinstance(optimizer, Rprop):
        why = "begins with a step size of lr, not of zero"
    elif isinstance(optimizer, Adagrad) and (
        group["lr_decay"] or group["initial_accumulator_value"]
    ):
        why = "has a decay counted per tensor, or sums that do not begin at zero"
    elif isinstance(optimizer, SGD) and group["momentum"] and group["dampening"]:
        why = "takes the first gradient undamped, and the following ones damped"
    if why is not None:
        raise PartialError(
            f"{name}: {type(optimizer).__name__} {why}, so blocks that are new in a trained weight "
            "would not begin as under a fresh optimizer. Remedy: re-select without new blocks in "
            "weights that are trained already, or build a new optimizer"
        )
