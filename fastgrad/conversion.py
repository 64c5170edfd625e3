"""``model.to()``, ``.double()``, ``.cuda()`` and the like, in a model of which blocks are trained.

PyTorch changes a parameter's contents in place by default. Under ``torch.__future__``'s two flags,
and onto the meta device, it puts another tensor there: what an optimizer holds would be trained,
and no longer be part of the model. Here the tensors of packed blocks stay what they are in any
case, with their marks and hooks, and master copies keep their digits. A weight that is trained as
it stands belongs to its module alone: for it, :class:`Held` tells what happened.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastgrad.errors import PartialError

if TYPE_CHECKING:
    from fastgrad.packed import PackedBlocks

Convert = Callable[[Tensor], Tensor]


@torch.no_grad()
def convert(module: Any, fn: Convert, others: Callable[[], object], suffix: str) -> None:
    """What ``nn.Module._apply`` does, for a module with packed blocks.

    A packed parameter with a dtype of its own (``master_dtype``) follows to another device and
    keeps its dtype; the full weight is written from it again, so that it holds what the master
    rounds to, and not the rounding of a rounding.

    Args:
        module: a :class:`~fastgrad.packed.PartialModule`.
        fn: tensor -> converted tensor.
        others: converts what else the module has, and its children.
        suffix: of the attribute that holds a packed parameter.

    Raises:
        PartialError: if a tensor cannot take over the new contents (from a device to ``meta``), or
            is sharded and has a master copy that would be rounded; the module is unchanged then.
    """
    places: dict[str, tuple[Any, Tensor, Tensor | None]] = {}
    sharded: list[PackedBlocks] = []
    for attribute, blocks in module._fastgrad_packed.items():
        if is_traceable_wrapper_subclass(module._parameters[attribute + suffix]):
            _check_sharded(blocks, fn)
            sharded.append(blocks)
            continue
        blocks.sync_if_stale()
        for key, keeps in ((attribute, False), (attribute + suffix, blocks.keeps_dtype)):
            old = module._parameters[key]
            grad = None if old.grad is None else _converted(old.grad, fn, keeps)
            new = _converted(old, fn, keeps)
            if not torch._has_compatible_shallow_copy_type(old, new):
                raise PartialError(
                    f"{blocks.name} cannot go from {old.device} to {new.device} while its blocks "
                    "are trained: the optimizer's tensors could not go along. Remedy: call "
                    "remove() on the Partial first"
                )
            places[key] = old, new, grad
    for key in places:
        module._parameters[key] = None  # in its place, so that the order stays
    try:
        others()
    finally:
        for key, (old, _, _) in places.items():
            module._parameters[key] = old
    for old, new, grad in places.values():
        if old.data is not new:
            old.data = new.data
        if grad is not None:
            old.grad.data = grad
    for attribute, blocks in module._fastgrad_packed.items():
        if blocks in sharded:  # PyTorch has exchanged what is inside of them, and their marks
            blocks.bind(module._parameters[attribute], module._parameters[attribute + suffix])
            continue
        blocks.written()
        if blocks.packed.dtype != blocks.full.dtype:
            blocks.sync()


def _converted(tensor: Tensor, fn: Convert, keeps_dtype: bool) -> Tensor:
    new = fn(tensor)
    if keeps_dtype and new.dtype != tensor.dtype:
        return torch.empty_like(new, dtype=tensor.dtype).copy_(tensor)
    return new.detach()


def _check_sharded(blocks: PackedBlocks, fn: Convert) -> None:
    blocks.sync_if_stale()
    dtype = fn(torch.empty(0, dtype=blocks.packed.dtype)).dtype
    if blocks.keeps_dtype and dtype != blocks.packed.dtype:
        raise PartialError(
            f"the master copy of {blocks.name} would be rounded to {dtype}. Remedy: convert the "
            "model before make_partial and fully_shard"
        )


class Held:
    """Which modules hold a weight that is trained as it stands.

    Copies and pickles of the weight's marks know of no module.

    Args:
        places: module and attribute.
        dtype: that the weight has to keep, or None.
    """

    def __init__(
        self, places: Iterable[tuple[nn.Module, str]] = (), dtype: torch.dtype | None = None
    ) -> None:
        self._places = [(weakref.ref(module), attribute) for module, attribute in places]
        self._dtype = dtype

    def lost(self, tensor: Tensor) -> str | None:
        """Why a step of ``tensor`` would not train the model as it was meant to; None if all is
        well. Modules that are gone are not asked."""
        if self._dtype is not None and tensor.dtype != self._dtype:
            return (
                f"was converted to {tensor.dtype} after make_partial, which was to train it in "
                f"{self._dtype}: it has no master copy, since it had that dtype. Remedy: convert "
                f"the model first, then make_partial(..., master_dtype={self._dtype}), which "
                "makes one"
            )
        there = False
        for reference, attribute in self._places:
            module = reference()
            if module is None:
                continue
            if module._parameters.get(attribute) is tensor:
                return None
            there = True
        if not there:
            return None
        return (
            "is trained by a partial model, and its module holds another tensor now: an "
            "assignment, or a conversion (.to(), .double()) under "
            "torch.__future__.set_overwrite_module_params_on_conversion(True), has put it there. "
            "A step would train what is no longer part of the model. Remedy: convert or assign "
            "before make_partial, or copy_() new values into the weight under torch.no_grad()"
        )

    def __reduce__(self) -> Any:
        return Held, ()


__all__ = ["Held", "convert"]
