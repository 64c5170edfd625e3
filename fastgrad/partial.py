"""Partial training: selected blocks become ordinary parameters of the model."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastgrad import sharded
from fastgrad.conversion import Held
from fastgrad.errors import PartialError, SelectionError
from fastgrad.identity import (
    PACKED_SUFFIX,
    model_parameters,
    reshard,
    sharded_modules,
    weights_hash,
)
from fastgrad.packed import PackedBlocks, PartialModule, check_owner, install, uninstall
from fastgrad.reachable import Reachable
from fastgrad.selection import Selection
from fastgrad.step_guard import (
    BEFORE,
    ENDED,
    HELD,
    NAME,
    REACH,
    REMOVED,
    SUSPENDED,
    end,
    ensure_hooks,
    optimizers_of,
    restore,
    resume,
    supersede,
)

if TYPE_CHECKING:
    from fastgrad.reselection import Report

_SUSPENDED = "_fastgrad_suspended"  # mark on the modules of a model inside suspended()


class Partial:
    """A model of which only a selection is trained. Made by :func:`make_partial`.

    Attributes:
        model: the model, changed in place.
        selection: what is trained now.
        touched: what was trained at any time since the base weights: the selection, and blocks that
            :meth:`reselect` has dropped. Everything else has the base's bits.
        base_hash: content hash of the weights before training, or None if it was not wanted. It
            stays that of the base through re-selections and through :func:`load_partial`.
        master_dtype: as given to :func:`make_partial`.
        packed: the packed blocks, one per weight that is not trained as it stands.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        trained: dict[str, nn.Parameter],
        packed: list[PackedBlocks],
        requires_grad: Mapping[str, bool],
        base_hash: str | None,
        master_dtype: torch.dtype | None,
        touched: Selection | None = None,
    ) -> None:
        self.model, self.selection, self.base_hash = model, selection, base_hash
        self.packed, self.master_dtype = packed, master_dtype
        self.touched = touched or selection
        self._trained, self._requires_grad = trained, requires_grad
        self._removed = self._is_suspended = False
        self._superseded: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles; the optimizers that were superseded are the original's."""
        return {**self.__dict__, "_superseded": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _superseded=weakref.WeakSet())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained tensors under the names of the parameters that they belong to, in the
        model's order.

        Raises:
            PartialError: after :meth:`remove`, or if the model holds other tensors by now.
        """
        self._check_held()
        yield from sharded.current(self.model, self._trained)

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
        self._check_held()
        self._check_model()
        self._sync()

    def _sync(self) -> None:
        reshard(self.model)
        for blocks in self.packed:
            blocks.sync()

    def refresh(self) -> None:
        """Take over values that were written to the full weights from outside."""
        self._check()
        reshard(self.model)
        for blocks in self.packed:
            blocks.refresh()

    def save(self, path: str | os.PathLike[str], *, hash_weights: bool = True) -> int:
        """Write what a normal checkpoint of the model and the optimizer lacks, for an exact resume:
        the selection, float32 masters, the base's hash. One safetensors file, atomically.

        Under ``fully_shard`` all processes have to call this, and one of them writes the file.

        Save ``model.state_dict()`` and ``optimizer.state_dict()`` beside it, as always. To go on:
        build the model, load its weights, call :func:`load_partial`, build the optimizer on
        ``partial.parameters()`` (with the same groups, empty ones too), load its state.

        Args:
            path: of the file; what stood there before is replaced only by a complete file.
            hash_weights: note the content hash of the weights (one read of them), by which
                :func:`load_partial` knows that the checkpoint beside the file is the right one.

        Returns:
            the file's size in bytes.

        Raises:
            PartialError: after :meth:`remove`, inside :meth:`suspended`, or if the file cannot be
                written (a full disk, for instance); no file has changed then.
        """
        from fastgrad.partial_state import save

        self._check_active("save it")
        return save(self, path, hash_weights=hash_weights)

    def reselect(
        self,
        selection: Selection,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        group_of: Callable[[str, nn.Parameter], int] | None = None,
    ) -> Report:
        """Train ``selection`` from now on; the optimizer goes on with what stays.

        Blocks that stay keep their values (masters with all digits), moments and step counts. New
        blocks begin as under a fresh optimizer: moments zero, step count zero, so that their bias
        correction is right. Blocks that leave are frozen at their present values; their packed
        values, gradients and moments are freed. Call it between ``optimizer.step()`` and the next
        backward pass; gradients that were used for a step are dropped where a tensor changes.

        A tensor whose blocks change is replaced by a new parameter: hooks that you registered on
        the old one are gone, lists that you made of ``partial.parameters()`` are out of date. Whole
        weights that are trained as they stand remain themselves.

        Args:
            selection: for this model; the weights that it was made for are not compared, since
                they are under way.
            optimizer: the optimizer or optimizers of the trained tensors, changed in place;
                schedules of learning rates go on. None only if there is none yet.
            group_of: ``(name, full weight) -> index`` of the param group that a weight enters that
                was not trained before, counted through all optimizers. By default the only group,
                or the only one with a weight of as many dimensions, or of the same kind (vector or
                matrix).

        Returns:
            what stayed, came and went, and the bytes of it.

        Raises:
            SelectionError: if the selection does not fit the model.
            PartialError: if something cannot be done exactly, by name and with the remedy: an
                optimizer that counts steps per tensor and would give new blocks of that tensor the
                bias correction of the old ones, state of unknown layout, gradients that no step
                has used, an ambiguous group, a model under ``fully_shard``. Nothing has changed
                then. Inside DistributedDataParallel the next pass raises it, until the model is
                wrapped again.
        """
        from fastgrad.reselection import reselect

        self._check_active("re-select")
        return reselect(self, selection, optimizer, group_of)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[nn.Module]:
        """Give back the plain model for a while, to probe or to evaluate it::

            with partial.suspended() as model, fg.Probe(model) as probe:
                model(**batch).loss.backward()

        Inside, all weights are ordinary parameters with the present values and the
        ``requires_grad`` flags that they had before :func:`make_partial`. On leaving, also by an
        exception, the same packed parameters (masters, gradients under way, optimizer state) are
        back, and gradients that were made inside are gone. Weights that were changed inside are
        taken over. Random numbers drawn inside are drawn: use ``torch.random.fork_rng()`` if
        training must not notice.

        Raises:
            PartialError: after :meth:`remove`, inside another ``suspended()``; from an optimizer of
                the trained tensors that makes a step inside; on leaving, if a trained module or
                parameter was replaced inside.
        """
        self._check_active("suspend it")
        self._check_held()
        sharded.check_not_sharded(self.model, "suspended()")
        for blocks in self.packed:
            blocks.sync_if_stale()
        places = self._places()
        own = model_parameters(self.model)
        before = {name: (p, p.grad, p.requires_grad) for name, p in own.items()}
        self._uninstall()
        for name, p in own.items():
            p.grad = None
            p.requires_grad_(self._requires_grad.get(name, p.requires_grad))
        for p in self._trained.values():
            end(p, SUSPENDED)
        self.model.__dict__[_SUSPENDED] = self._is_suspended = True
        try:
            yield self.model
        finally:
            self._is_suspended = False
            del self.model.__dict__[_SUSPENDED]
            for p in self._trained.values():
                resume(p)
            for p, grad, wanted in before.values():
                p.grad = grad
                p.requires_grad_(wanted)
            for name, p in model_parameters(self.model).items():
                if name in before:  # load_state_dict(assign=True) gives new tensors
                    p.requires_grad_(before[name][2])
            lost = self._reinstall(places)
        if lost:
            raise PartialError(
                f"{', '.join(lost[:3])}: replaced inside suspended(), so that what the optimizer "
                "holds is no longer part of the model. Remedy: copy new values into the weights "
                "(model.load_state_dict does) instead of replacing modules or parameters"
            )

    def remove(self) -> nn.Module:
        """End partial training: the model has its old classes, names and ``requires_grad`` flags
        again, with the trained values. An optimizer of packed blocks refuses to step from then on.
        Returns the model."""
        self._check_active("remove it")
        sharded.check_not_sharded(self.model, "remove()")
        self._sync()
        self._uninstall()
        for blocks in self.packed:
            blocks.watched = False
            for mark in ("_fastgrad_blocks", REACH):
                blocks.packed.__dict__.pop(mark, None)
            end(blocks.packed, REMOVED)
        own = model_parameters(self.model)
        for name, p in own.items():
            for mark in (NAME, HELD, REACH):
                p.__dict__.pop(mark, None)
            resume(p)
            if name in self._requires_grad:  # added since then: not ours to judge
                p.requires_grad_(self._requires_grad[name])
        restore(self._superseded)
        self._removed = True
        return self.model

    def _watch(self, owners: Mapping[int, Sequence[tuple[nn.Module, str]]]) -> None:
        """From now on each step looks whether the modules of what is trained are in the model."""
        fulls = {blocks.name: blocks.full for blocks in self.packed}
        reach = Reachable(
            self.model,
            {n: [m for m, _ in owners[id(fulls.get(n, p))]] for n, p in self._trained.items()},
        )
        for p in self._trained.values():
            p.__dict__[REACH] = reach

    def _places(self) -> list[tuple[nn.Module, str, PackedBlocks]]:
        """Where the packed blocks are installed: module, its attribute, blocks."""
        return [
            (module, attribute, blocks)
            for module in self.model.modules()
            if isinstance(module, PartialModule)
            for attribute, blocks in module._fastgrad_packed.items()
        ]

    def _uninstall(self) -> None:
        for module in self.model.modules():
            uninstall(module)

    def _reinstall(self, places: Sequence[tuple[nn.Module, str, PackedBlocks]]) -> list[str]:
        """Undo :meth:`_uninstall`. Returns names of parameters that are not what they were."""
        lost = []
        present = {id(m) for m in self.model.modules()}
        for module, attribute, blocks in places:
            full = module._parameters.get(attribute)
            if id(module) not in present or full is None or full.shape != blocks.full.shape:
                lost.append(blocks.name)
                continue
            if full is not blocks.full:  # load_state_dict(assign=True)
                full.requires_grad_(False)
                blocks.full = full
                blocks.refresh()
            elif full._version != blocks._full_seen:
                blocks.refresh()
            install(module, attribute, blocks)
        packed, own = {b.name for b in self.packed}, model_parameters(self.model)
        for name, p in self._trained.items():
            if name not in packed and own.get(name) is not p:
                lost.append(name)
        return lost

    def _check(self) -> None:
        if self._removed:
            raise PartialError(
                "this partial model was removed; its packed parameters are no longer part of the "
                "model. Remedy: call make_partial again and build a new optimizer"
            )

    def _check_held(self) -> None:
        """Raises PartialError if what is trained is not what the model holds."""
        self._check()
        if self._is_suspended or next(sharded_modules(self.model), None) is not None:
            return
        for name, p in self._trained.items():
            if "_fastgrad_blocks" in p.__dict__:
                continue
            if NAME not in p.__dict__:  # its contents were exchanged, and the marks with them
                owners = owners_of(self.model).get(id(p), ())
                p.__dict__ |= {NAME: name, HELD: Held(owners, self.master_dtype)}
            if (why := p.__dict__[HELD].lost(p)) is not None:
                raise PartialError(f"{name} {why}")

    def _check_model(self) -> None:
        """Raises PartialError if a trained weight is no longer in the model, or a module reads
        packed weights and does not know it."""
        if self._is_suspended or next(sharded_modules(self.model), None) is not None:
            return
        own, owners = model_parameters(self.model), owners_of(self.model)
        fulls = {blocks.name: blocks.full for blocks in self.packed}
        for name, p in self._trained.items():
            if own.get(name) is not fulls.get(name, p):
                raise PartialError(
                    f"{name} is trained, and the model has another weight of that name or none: "
                    "its module was replaced after make_partial. Remedy: replace modules before "
                    "make_partial, or call remove() on the Partial and make the model partial anew"
                )
        for blocks in self.packed:
            for module, attribute in owners.get(id(blocks.full), ()):
                if attribute not in module.__dict__.get("_fastgrad_packed", {}):
                    raise PartialError(
                        f"{blocks.name} was tied to another {type(module).__name__} after "
                        "make_partial: the gradient of its blocks there would be lost. Remedy: "
                        "tie weights before make_partial"
                    )

    def _check_active(self, what: str) -> None:
        self._check()
        if self._is_suspended:
            raise PartialError(
                f"this partial model is suspended. Remedy: {what} outside the block of suspended()"
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
    Optimizers that were built on the model's parameters before this would leave the selected
    blocks untrained: from now on their ``step()`` raises PartialError.

    Args:
        model: any module; not already partial.
        selection: made for this model.
        master_dtype: dtype of the trained tensors, ``torch.float32`` to keep full-precision
            master copies of bfloat16 weights; by default that of each weight. Masters keep it
            when the model is converted (``model.to(torch.bfloat16)``); whole weights that had it
            already have no copy to keep, and are refused after such a conversion.
        hash_base: compute the content hash of the weights (one read of them), which
            :func:`fastgrad.save_delta` needs and which is compared with the selection's.
        allow_other_weights: accept a selection that was made for other weights.

    Raises:
        PartialError: if the model is partial already, has no content to hash (meta tensors), or
            ``master_dtype`` is not a dtype.
        SelectionError: if the selection names unknown parameters, other shapes or other weights.
    """
    if master_dtype is not None and not isinstance(master_dtype, torch.dtype):
        raise PartialError(
            f"master_dtype is {master_dtype!r}. Remedy: a dtype such as torch.float32"
        )
    check_plain(model)
    sharded.check_not_wrapped(model)
    check_fits(model_parameters(model), selection)
    if hash_base:
        check_has_content(model, "hash_base=False to plan without it")
    base = weights_hash(model) if hash_base else None
    wanted = selection.weights_hash
    if base is not None and wanted is not None and base != wanted and not allow_other_weights:
        raise SelectionError(
            f"this selection was made for weights {wanted[:23]}..., the model has {base[:23]}... "
            "Remedy: select anew, or pass allow_other_weights=True"
        )
    return build(model, selection, master_dtype, base)


def build(
    model: nn.Module,
    selection: Selection,
    master_dtype: torch.dtype | None,
    base_hash: str | None,
    *,
    by_block: Collection[str] = (),
    values: Mapping[str, Tensor] | None = None,
    requires_grad: Mapping[str, bool] | None = None,
    touched: Selection | None = None,
) -> Partial:
    """A partial model of what was checked: see :func:`make_partial`.

    Args:
        by_block: names of weights that are packed block by block although they are whole.
        values: packed values, instead of those of the full weights.
        requires_grad: flags that :meth:`Partial.remove` restores, instead of the present ones.
        touched: see :class:`Partial`.

    Raises:
        PartialError: if a module cannot train blocks; nothing has changed then.
    """
    own, owners = model_parameters(model), owners_of(model)
    for name in selection.blocks:  # before anything is changed
        if not as_it_stands(selection, name, own[name], master_dtype, by_block):
            for module, _ in owners[id(own[name])]:
                check_owner(module, name)
    ensure_hooks()
    before = optimizers_of(own.values())
    supersede(before, BEFORE)
    if requires_grad is None:
        requires_grad = {name: p.requires_grad for name, p in own.items()}
    for p in own.values():
        p.requires_grad_(False)
        p.grad = None
    trained: dict[str, nn.Parameter] = {}
    packed: list[PackedBlocks] = []
    for name, ids in selection.blocks.items():
        p = own[name]
        if as_it_stands(selection, name, p, master_dtype, by_block):
            trained[name] = mark_trained(p, name, owners[id(p)], master_dtype)
            continue
        blocks = PackedBlocks(
            name, p, selection.grid(name), torch.from_numpy(ids), master_dtype or p.dtype,
            by_block=name in by_block, values=None if values is None else values.get(name),
        )  # fmt: skip
        blocks.keeps_dtype = master_dtype is not None
        for module, attribute in owners[id(p)]:
            install(module, attribute, blocks)
        packed.append(blocks)
        trained[name] = blocks.packed
    partial = Partial(
        model, selection, trained, packed, requires_grad, base_hash, master_dtype, touched
    )
    partial._superseded.update(before)
    partial._watch(owners)
    return partial


def as_it_stands(
    selection: Selection,
    name: str,
    p: Tensor,
    master_dtype: torch.dtype | None,
    by_block: Collection[str] = (),
) -> bool:
    """The parameter itself is trained: no packed copy is needed."""
    return (
        selection.is_whole(name)
        and (master_dtype or p.dtype) == p.dtype
        and name not in by_block
    )


def mark_trained(
    p: nn.Parameter,
    name: str,
    owners: Sequence[tuple[nn.Module, str]],
    master_dtype: torch.dtype | None,
) -> nn.Parameter:
    """``p``, trained as it stands by the modules that hold it."""
    p.requires_grad_(True)
    p.__dict__ |= {NAME: name, HELD: Held(owners, master_dtype)}
    p.__dict__.pop(ENDED, None)
    return p


def owners_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Of each parameter, by id: the modules that hold it and its attribute there."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if p is not None and not attribute.endswith(PACKED_SUFFIX):
                owners.setdefault(id(p), []).append((module, attribute))
    return owners


def check_plain(model: nn.Module) -> None:
    """Raises PartialError if the model is partial already, or suspended."""
    for module in model.modules():
        marks = [p.__dict__ for p in module._parameters.values() if p is not None]
        whole = any(NAME in m and ENDED not in m for m in marks)  # trained as they stand
        if whole or isinstance(module, PartialModule):
            raise PartialError(
                "this model is partial already. Remedy: call .remove() on that Partial first, or "
                ".reselect() to train something else"
            )
        if _SUSPENDED in module.__dict__:
            raise PartialError(
                "this model is partial already, and suspended. Remedy: leave the block of "
                "suspended() first"
            )


def check_has_content(model: nn.Module, otherwise: str) -> None:
    """Raises PartialError if a weight is on the meta device."""
    for name, p in model_parameters(model).items():
        if p.is_meta:
            raise PartialError(
                f"{name} is on the meta device and has no content. Remedy: load the model's "
                f"weights first; {otherwise}"
            )


def check_fits(own: Mapping[str, nn.Parameter], selection: Selection) -> None:
    """Raises SelectionError if the selection names what this model cannot train."""
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
        if own[name].layout != torch.strided or sharded.is_wrapper(own[name]):
            raise SelectionError(
                f"{name} is a {type(own[name].data).__name__} of layout {own[name].layout}, which "
                "cannot be trained in blocks; exclude it from the selection"
            )
        if not own[name].is_floating_point():
            raise SelectionError(
                f"{name} has dtype {own[name].dtype} and cannot be trained; "
                "exclude quantised weights from the selection"
            )
