"""Partial training: selected blocks become ordinary parameters of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastgrad.errors import PartialError, SelectionError
from fastgrad.identity import model_parameters, weights_hash
from fastgrad.packed import PackedBlocks, PartialModule, check_owner, install, uninstall
from fastgrad.selection import Selection

_hook: Any = None


def _write_through(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After any optimizer's step: what it changed appears in the full weights.

    A version counter cannot tell: PyTorch's fused updates do not count up.
    """
    done = getattr(optimizer, "_fastgrad_written", ())
    for group in optimizer.param_groups:
        for p in group["params"]:
            blocks = getattr(p, "_fastgrad_blocks", None)
            if blocks is not None and id(blocks) not in done:
                blocks.sync()


class Partial:
    """A model of which only a selection is trained. Made by :func:`make_partial`.

    Attributes:
        model: the model, changed in place.
        selection: what is trained.
        base_hash: content hash of the weights before training, or None if it was not wanted.
        packed: the packed blocks, one per weight that is not trained as it stands.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        trained: dict[str, nn.Parameter],
        packed: list[PackedBlocks],
        requires_grad: dict[str, bool],
        base_hash: str | None,
    ) -> None:
        self.model, self.selection, self.base_hash = model, selection, base_hash
        self.packed = packed
        self._trained, self._requires_grad = trained, requires_grad
        self._removed = False

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained tensors under the names of the parameters that they belong to.

        Raises:
            PartialError: after :meth:`remove`.
        """
        self._check()
        yield from self._trained.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained tensors, to be given to an optimizer."""
        for _, p in self.named_parameters():
            yield p

    @property
    def n_parameters(self) -> int:
        """Number of trained weights; padding of edge blocks is not counted."""
        return sum(self.selection.n_selected(n) for n in self._trained)

    def sync(self) -> None:
        """Write the packed values through to the full weights.

        Called by itself after the step of every ``torch.optim.Optimizer`` and, after in-place
        changes, before the next forward pass. Needed only after changes that PyTorch does not
        count, such as those through ``.data``.
        """
        self._check()
        for blocks in self.packed:
            blocks.sync()

    def refresh(self) -> None:
        """Take over values that were written to the full weights from outside."""
        self._check()
        for blocks in self.packed:
            blocks.refresh()

    def remove(self) -> nn.Module:
        """End partial training: the model has its old classes, names and ``requires_grad`` flags
        again, with the trained values. Returns the model."""
        self._check()
        self.sync()
        for module in self.model.modules():
            uninstall(module)
        for blocks in self.packed:
            blocks.packed.__dict__.pop("_fastgrad_blocks", None)
        for name, p in model_parameters(self.model).items():
            if name in self._requires_grad:  # added since then: not ours to judge
                p.requires_grad_(self._requires_grad[name])
        self._removed = True
        return self.model

    def _check(self) -> None:
        if self._removed:
            raise PartialError(
                "this partial model was removed; its packed parameters are no longer part of the "
                "model. Remedy: call make_partial again and build a new optimizer"
            )

    def __repr__(self) -> str:
        total = sum(p.numel() for p in model_parameters(self.model).values())
        return (
            f"Partial({type(self.model).__name__}, trains {self.n_parameters:,} of {total:,} "
            f"weights in {len(self._trained)} parameters, {len(self.packed)} of them packed)"
        )


def make_partial(
    model: nn.Module,
    selection: Selection,
    master_dtype: torch.dtype | None = None,
    *,
    hash_base: bool = True,
    allow_other_weights: bool = False,
) -> Partial:
    """Freeze the model except for the selection, in place.

    A parameter that is selected as a whole stays what it is. Selected blocks, and whole
    parameters that want a master copy, become a packed parameter beside the frozen weight.

    Args:
        model: any module; not already partial.
        selection: made for this model.
        master_dtype: dtype of the trained tensors, ``torch.float32`` to keep full-precision
            master copies of bfloat16 weights; by default that of each weight.
        hash_base: compute the content hash of the weights (one read of them), which
            :func:`fastgrad.save_delta` needs and which is compared with the selection's.
        allow_other_weights: accept a selection that was made for other weights.

    Raises:
        PartialError: if the model is partial already, or ``master_dtype`` is not a dtype.
        SelectionError: if the selection names unknown parameters, other shapes or other weights.
    """
    global _hook
    if master_dtype is not None and not isinstance(master_dtype, torch.dtype):
        raise PartialError(
            f"master_dtype is {master_dtype!r}. Remedy: a dtype such as torch.float32"
        )
    if any(isinstance(m, PartialModule) for m in model.modules()):
        raise PartialError(
            "this model is partial already. Remedy: call .remove() on that Partial first"
        )
    own = model_parameters(model)
    _check_fits(own, selection)
    base = weights_hash(model) if hash_base else None
    wanted = selection.weights_hash
    if base is not None and wanted is not None and base != wanted and not allow_other_weights:
        raise SelectionError(
            f"this selection was made for weights {wanted[:23]}..., the model has {base[:23]}... "
            "Remedy: select anew, or pass allow_other_weights=True"
        )
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_write_through)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append((module, attribute))
    for name in selection.blocks:  # before anything is changed
        if not selection.is_whole(name) or (master_dtype or own[name].dtype) != own[name].dtype:
            for module, _ in owners[id(own[name])]:
                check_owner(module, name)
    requires_grad = {name: p.requires_grad for name, p in own.items()}
    for p in own.values():
        p.requires_grad_(False)
        p.grad = None
    trained: dict[str, nn.Parameter] = {}
    packed: list[PackedBlocks] = []
    for name, ids in selection.blocks.items():
        p = own[name]
        dtype = master_dtype or p.dtype
        if selection.is_whole(name) and dtype == p.dtype:
            p.requires_grad_(True)
            p._fastgrad_name = name  # type: ignore[attr-defined]
            trained[name] = p
            continue
        blocks = PackedBlocks(name, p, selection.grid(name), torch.from_numpy(ids), dtype)
        for module, attribute in owners[id(p)]:
            install(module, attribute, blocks)
        packed.append(blocks)
        trained[name] = blocks.packed
    return Partial(model, selection, trained, packed, requires_grad, base)


def _check_fits(own: dict[str, nn.Parameter], selection: Selection) -> None:
    if not selection.blocks:
        raise SelectionError(
            "the selection is empty: nothing would be trained. Remedy: a larger budget"
        )
    for name in selection.blocks:
        if name not in own:
            raise SelectionError(
                f"the selection names {name!r}, which this model lacks; it was "
                "made for another model"
            )
        if tuple(own[name].shape) != tuple(selection.shapes[name]):
            raise SelectionError(
                f"{name} has shape {tuple(own[name].shape)}, expected by the selection: "
                f"{tuple(selection.shapes[name])}"
            )
        if not own[name].is_floating_point():
            raise SelectionError(
                f"{name} has dtype {own[name].dtype} and cannot be trained; "
                "exclude quantised weights from the selection"
            )
