"""Re-selection: other blocks are trained from now on, and the optimizer goes on with what stays.

Everything is planned and allocated first; only then is the model, the optimizer or the Partial
touched, so that a refusal leaves all of them as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastgrad import sharded
from fastgrad.errors import PartialError, SelectionError
from fastgrad.identity import model_parameters
from fastgrad.layouts import (
    Layout,
    Move,
    by_block_counts,
    check_enters,
    check_optimizer,
    migrated,
)
from fastgrad.optim import SparseAdamW
from fastgrad.packed import PackedBlocks, check_owner, install
from fastgrad.partial import as_it_stands, check_fits, mark_trained, owners_of
from fastgrad.selection import Selection
from fastgrad.step_guard import (
    DESELECTED,
    HELD,
    IN_BACKWARD,
    NAME,
    NOT_TOLD,
    REACH,
    end,
    is_pending,
    optimizers_of,
    supersede,
)

if TYPE_CHECKING:
    from fastgrad.partial import Partial

GroupOf = Callable[[str, nn.Parameter], int]


@dataclass(frozen=True)
class Change:
    """Blocks of one weight."""

    kept: int
    added: int
    dropped: int


@dataclass(frozen=True)
class Report:
    """What a re-selection did.

    Attributes:
        changes: parameter name -> its blocks; every weight that was or is selected.
        bytes_freed: of packed values, gradients and optimizer state that were given back.
        bytes_added: of packed values and optimizer state that took their place. An optimizer
            allocates its state of a weight that it did not hold before with its next step only;
            that is not counted.
    """

    changes: Mapping[str, Change]
    bytes_freed: int
    bytes_added: int

    @property
    def kept(self) -> int:
        return sum(c.kept for c in self.changes.values())

    @property
    def added(self) -> int:
        return sum(c.added for c in self.changes.values())

    @property
    def dropped(self) -> int:
        return sum(c.dropped for c in self.changes.values())

    def summary(self) -> str:
        """One line."""
        entered = sum(c.kept + c.dropped == 0 for c in self.changes.values())
        left = sum(c.kept + c.added == 0 for c in self.changes.values())
        return (
            f"re-selected: {self.kept:,} blocks kept, {self.added:,} added, {self.dropped:,} "
            f"dropped; {entered} weights entered, {left} left; {self.bytes_freed:,} bytes freed, "
            f"{self.bytes_added:,} allocated"
        )


@dataclass
class _Holder:
    """The optimizer and the group that hold a trained tensor."""

    optimizer: Optimizer
    group: dict[str, Any]


@dataclass
class _Plan:
    """What becomes of one weight."""

    name: str
    full: nn.Parameter
    old: nn.Parameter | None = None
    old_blocks: PackedBlocks | None = None
    new: nn.Parameter | None = None
    new_blocks: PackedBlocks | None = None
    holder: _Holder | None = None
    state: dict[str, Any] | None = None
    change: Change = field(default_factory=lambda: Change(0, 0, 0))


def reselect(
    partial: Partial,
    selection: Selection,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    group_of: GroupOf | None,
) -> Report:
    """See :meth:`fastgrad.Partial.reselect`."""
    optimizers = _optimizers(optimizer)
    _check(partial, selection, optimizers)
    for blocks in partial.packed:
        blocks.sync_if_stale()
    plans = list(_plans(partial, selection, optimizers))
    groups = [(o, g) for o in optimizers for g in o.param_groups]
    _find_groups(plans, groups, group_of)
    owners = owners_of(partial.model)
    for plan in plans:
        if plan.new_blocks is not None:
            for module, _ in owners[id(plan.full)]:
                check_owner(module, plan.name)
    touched = _union(partial.touched, selection)
    report = _report(plans)
    # From here on nothing can fail.
    orders = [_order_of(partial, g["params"]) for _, g in groups]
    _change_model(partial, plans, owners)
    partial.selection, partial.touched = selection, touched
    _change_optimizers(partial, plans, [g for _, g in groups], orders)
    for plan in plans:
        _release(plan)
    if not optimizers:
        _supersede(partial, plans)
    for o in optimizers:
        early = o.__dict__.get(IN_BACKWARD)
        if early is not None:
            early.rehook()
    return report


def _optimizers(given: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if given is None:
        return []
    found = []
    for o in [given] if isinstance(given, Optimizer) else given:
        inner: Any = o
        while isinstance(getattr(inner, "optimizer", None), Optimizer):  # accelerate's wrapper
            inner = inner.optimizer
        if not isinstance(inner, Optimizer):
            raise PartialError(
                f"reselect takes the optimizer of the trained tensors, not {type(o).__name__}"
            )
        found.append(inner)
    return found


def _check(partial: Partial, selection: Selection, optimizers: Sequence[Optimizer]) -> None:
    if not isinstance(selection, Selection):
        raise SelectionError(
            f"reselect takes a Selection, not {type(selection).__name__}. Remedy: fg.select(...)"
        )
    sharded.check_not_sharded(partial.model, "reselect()")
    selection.check_model(partial.model, allow_other_weights=True)
    check_fits(model_parameters(partial.model), selection)
    for o in optimizers:
        check_optimizer(o)
    for name, p in partial.named_parameters():
        if is_pending(p):
            raise PartialError(
                f"{name} holds a gradient that no optimizer has made a step with; new blocks would "
                "lack their part of it. Remedy: re-select right after optimizer.step(), or after "
                "optimizer.zero_grad() if this gradient is not wanted"
            )


def _plans(
    partial: Partial, selection: Selection, optimizers: Sequence[Optimizer]
) -> Iterator[_Plan]:
    """Per weight that was or will be trained, in the model's order; everything allocated."""
    own, old_selection = model_parameters(partial.model), partial.selection
    trained = dict(partial.named_parameters())
    packed = {b.name: b for b in partial.packed}
    holders = {
        id(p): _Holder(o, g) for o in optimizers for g in o.param_groups for p in g["params"]
    }
    for name, full in own.items():
        if name not in trained and name not in selection.blocks:
            continue
        plan = _Plan(name, full, trained.get(name), packed.get(name))
        if plan.old is not None:
            plan.holder = holders.get(id(plan.old))
        if name not in selection.blocks:
            plan.change = Change(0, 0, len(old_selection.blocks[name]))
        elif plan.old is None:
            plan.change = Change(0, len(selection.blocks[name]), 0)
            plan.holder = holders.get(id(full))  # an optimizer of all parameters of the model
            _make(plan, selection, partial.master_dtype, by_block=False, values=None)
        else:
            _continue(plan, old_selection, selection, partial.master_dtype)
        if optimizers and plan.old is not None and plan.old is not plan.new and not plan.holder:
            raise PartialError(
                f"{name} is trained, and none of the optimizers given holds its trained tensor. "
                "Remedy: pass every optimizer of this partial model"
            )
        yield plan


def _continue(
    plan: _Plan, before: Selection, after: Selection, master_dtype: torch.dtype | None
) -> None:
    """Plan of a weight that stays selected."""
    name, old, blocks = plan.name, plan.old, plan.old_blocks
    assert old is not None
    from_layout = Layout(before.grid(name), before.blocks[name], bool(blocks and not blocks.whole))
    grid, ids = after.grid(name), after.blocks[name]
    # Blocks that were counted one by one stay so: what is the same needs no new tensor.
    kept_form = from_layout.by_block and from_layout.same(Layout(grid, ids, True))
    to_layout = Layout(grid, ids, kept_form or not after.is_whole(name))
    move = Move(from_layout, to_layout)
    optimizer = plan.holder.optimizer if plan.holder else None
    if not to_layout.by_block and by_block_counts(optimizer, old, move):
        to_layout = Layout(grid, ids, True)
        move = Move(from_layout, to_layout)
    added = int((~move.trained).sum())
    plan.change = Change(len(ids) - added, added, move.dropped)
    if from_layout.same(to_layout):
        plan.new, plan.new_blocks = old, blocks
        return
    with torch.no_grad():
        values = move.values(
            None if blocks is None else old.detach(),
            plan.full.detach(),
            master_dtype or plan.full.dtype,
        )
        _make(plan, after, master_dtype, by_block=to_layout.by_block, values=values)
        assert plan.new is not None
        if optimizer is not None:
            plan.state = migrated(optimizer, name, old, plan.new, move)


def _make(
    plan: _Plan,
    selection: Selection,
    master_dtype: torch.dtype | None,
    *,
    by_block: bool,
    values: Tensor | None,
) -> None:
    """The trained tensor from now on."""
    name, full = plan.name, plan.full
    all_by_block = {name} if by_block and selection.is_whole(name) else ()
    if as_it_stands(selection, name, full, master_dtype, all_by_block):
        plan.new = full
        return
    plan.new_blocks = PackedBlocks(
        name, full, selection.grid(name), torch.from_numpy(selection.blocks[name]),
        master_dtype or full.dtype, by_block=bool(all_by_block), values=values,
    )  # fmt: skip
    plan.new_blocks.keeps_dtype = master_dtype is not None
    plan.new = plan.new_blocks.packed


def _find_groups(
    plans: Sequence[_Plan],
    groups: Sequence[tuple[Optimizer, dict[str, Any]]],
    group_of: GroupOf | None,
) -> None:
    """Where weights enter that no optimizer holds yet."""
    if not groups:
        return
    held = {
        id(p): plan.full.ndim for plan in plans for p in (plan.old,) if p is not None
    }
    for plan in plans:
        if plan.old is not None or plan.new is None:
            continue
        if plan.holder is not None and plan.new is plan.full and group_of is None:
            continue  # this optimizer holds the weight already
        if group_of is not None:
            index = group_of(plan.name, plan.full)
            if type(index) is not int or not 0 <= index < len(groups):
                raise PartialError(
                    f"group_of gave {index!r} for {plan.name}; there are groups 0 to "
                    f"{len(groups) - 1}"
                )
        else:
            index = _group_by_shape(plan, [g for _, g in groups], held)
        plan.holder = _Holder(*groups[index])
        check_enters(plan.holder.optimizer, plan.name, plan.new)


def _group_by_shape(
    plan: _Plan, groups: Sequence[dict[str, Any]], held: Mapping[int, int]
) -> int:
    if len(groups) == 1:
        return 0
    dims = [{held[id(p)] for p in g["params"] if id(p) in held} for g in groups]
    wanted = plan.full.ndim
    alike = [i for i, d in enumerate(dims) if wanted in d]
    if not alike:
        alike = [i for i, d in enumerate(dims) if any((n >= 2) == (wanted >= 2) for n in d)]
    if len(alike) == 1:
        return alike[0]
    raise PartialError(
        f"{plan.name} of {wanted} dimensions is new, and "
        + (f"{len(alike)} of {len(groups)} param groups hold" if alike else "no param group holds")
        + " such weights. Remedy: reselect(..., group_of=lambda name, weight: index of its group)"
    )


def _order_of(partial: Partial, params: Sequence[Tensor]) -> str | None:
    """The order that a group's parameters were given in: the Partial's, the model's, or None."""
    for order, everything in (
        ("partial", list(partial.parameters())),
        ("model", list(partial.model.parameters())),
    ):
        place = {id(p): i for i, p in enumerate(everything)}
        if all(id(p) in place for p in params):
            found = [place[id(p)] for p in params]
            if found == sorted(found):
                return order
    return None


def _change_model(
    partial: Partial, plans: Sequence[_Plan], owners: Mapping[int, list[tuple[nn.Module, str]]]
) -> None:
    partial._uninstall()
    trained: dict[str, nn.Parameter] = {}
    packed: list[PackedBlocks] = []
    for plan in plans:
        if plan.old is plan.full is not plan.new:
            plan.full.requires_grad_(False)
            plan.full.grad = None
        if plan.new is None:
            continue
        trained[plan.name] = plan.new
        if plan.new is plan.full:
            places = owners[id(plan.full)]
            mark_trained(plan.full, plan.name, places, partial.master_dtype)
            continue
        assert plan.new_blocks is not None
        packed.append(plan.new_blocks)
        for module, attribute in owners[id(plan.full)]:
            install(module, attribute, plan.new_blocks)
    partial._trained, partial.packed = trained, packed
    partial._watch(owners)


def _change_optimizers(
    partial: Partial,
    plans: Sequence[_Plan],
    groups: Sequence[dict[str, Any]],
    orders: Sequence[str | None],
) -> None:
    replaced = {id(p.old): p for p in plans if p.old is not None and p.old is not p.new}
    for plan in plans:
        if plan.holder is not None and plan.old is not None and plan.old is not plan.new:
            plan.holder.optimizer.state.pop(plan.old, None)
            if plan.new is not None and plan.state is not None:
                plan.holder.optimizer.state[plan.new] = plan.state
            if isinstance(plan.holder.optimizer, SparseAdamW):
                plan.holder.optimizer.forget_step()  # which holds what leaves
    for group, order in zip(groups, orders, strict=True):
        names = group.get("param_names") or [None] * len(group["params"])
        entries: list[tuple[Any, str | None]] = []
        for p, name in zip(group["params"], names, strict=True):
            gone = replaced.get(id(p))
            if gone is None:
                entries.append((p, name))
            elif gone.new is not None:
                entries.append((gone.new, name))
        held = {id(p) for p, _ in entries}
        for plan in plans:
            enters = plan.old is None and plan.holder is not None and plan.holder.group is group
            if enters and id(plan.new) not in held:
                entries.append((plan.new, plan.name))
        if order is not None:
            source = partial.parameters() if order == "partial" else partial.model.parameters()
            place = {id(p): i for i, p in enumerate(source)}
            entries.sort(key=lambda entry: place.get(id(entry[0]), len(place)))
        group["params"] = [p for p, _ in entries]
        if "param_names" in group:
            group["param_names"] = [n for _, n in entries]


def _supersede(partial: Partial, plans: Sequence[_Plan]) -> None:
    """Optimizers of whole weights that are trained no more: the weights themselves live on."""
    left = [p.old for p in plans if p.old is p.full is not p.new]
    if left:
        stale = optimizers_of(left)
        supersede(stale, NOT_TOLD)
        partial._superseded.update(stale)


def _release(plan: _Plan) -> None:
    """Give back the memory of a trained tensor that is none any more."""
    old = plan.old
    if old is None or old is plan.new:
        return
    if plan.old_blocks is None:  # a weight of the model
        for mark in (NAME, HELD, REACH):
            old.__dict__.pop(mark, None)
        return
    plan.old_blocks.watched = False
    old.__dict__.pop("_fastgrad_blocks", None)
    end(old, DESELECTED)
    old.grad = None
    # Whoever still holds the tensor, a list for clipping perhaps, does not hold its memory.
    old.data = torch.empty(0, dtype=old.dtype, device=old.device)


def _report(plans: Sequence[_Plan]) -> Report:
    freed = added = 0
    for plan in plans:
        if plan.old is plan.new:
            continue
        if plan.old is not None:
            freed += sum(_bytes(t) for t in _state(plan) if t.numel() > 1)
            freed += _bytes(plan.old.grad)
            freed += _bytes(plan.old) if plan.old_blocks is not None else 0
        if plan.new_blocks is not None:
            added += _bytes(plan.new)
        added += sum(
            _bytes(t)
            for t in (plan.state or {}).values()
            if isinstance(t, Tensor) and t.numel() > 1
        )
    return Report({p.name: p.change for p in plans}, freed, added)


def _state(plan: _Plan) -> list[Tensor]:
    if plan.holder is None or plan.old is None:
        return []
    found = plan.holder.optimizer.state.get(plan.old, {})
    return [t for t in found.values() if isinstance(t, Tensor)]


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _union(touched: Selection, selection: Selection) -> Selection:
    """Blocks of either; a weight that they divide differently counts as a whole."""
    blocks, specs = {}, {}
    for name in touched.shapes:
        a, b = touched.blocks.get(name), selection.blocks.get(name)
        if a is None and b is None:
            continue
        one = touched if b is None else selection
        specs[name] = one.specs.get(name, one.spec)
        if a is not None and b is not None:
            if touched.grid(name).same_blocks(selection.grid(name)):
                blocks[name] = np.union1d(a, b)
            else:
                specs[name], blocks[name] = "module", np.array([0])
        else:
            found = a if b is None else b
            assert found is not None
            blocks[name] = found
    return Selection(touched.shapes, "module", blocks, specs=specs)
