"""The general rule: what a function without a handler of its own does for each example alone.

It serves where a small parameter enters such a function. The function itself runs once, as the
model called it, and its gradients are autograd's. That it treats examples independently is not
assumed but tested: what it gives for single examples must make up what it gave for the batch. In
the backward pass it is called for single examples again, with gradients of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastgrad.derived import Sink, beyond, expanded_size, expect, roots_of, spread_over
from fastgrad.handlers_common import ownership
from fastgrad.ownership import Mark, mark
from fastgrad.random_state import random_states, restore
from fastgrad.records import Batch
from fastgrad.tap_watch import Sinks, give, refuse_late, watched
from fastgrad.trials import each, in_turn, joined, split, versions_of

_NO_BACK = "it cannot be differentiated for one example alone"
_APART = "its results for single examples do not make up its result for the batch"


class _Single(NamedTuple):
    """A function as one of single examples: all its arguments, and which of them are whose.

    ``own`` are made of parameters and serve all examples, or are repeated for each at ``places``;
    what else has a place has rows of each example there.
    """

    func: Any
    leaves: list[Any]  # None in place of the tensors
    spec: Any
    tensors: list[int]
    own: list[int]
    places: dict[int, int]
    n: int
    autocast: tuple[str, bool, torch.dtype]

    def parts(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors: ``[n, ...]`` those with a place, and the others."""
        apart, shared = [], []
        for i, t in zip(self.tensors, tensors, strict=True):
            if i in self.places:
                apart.append(split(t, self.places[i], self.n))
            else:
                shared.append(t)
        return apart, shared

    def call(self, apart: Sequence[Tensor], shared: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that the function gives for one example."""
        leaves, one, all_ = list(self.leaves), iter(apart), iter(shared)
        for i in self.tensors:
            leaves[i] = next(one) if i in self.places else next(all_)
        args, kwargs = tree_unflatten(leaves, self.spec)
        device, enabled, dtype = self.autocast
        with torch.autocast(device, dtype, enabled=enabled):
            out = self.func(*args, **kwargs)
        return [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]

    def results(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Of all examples, ``[n, ...]``; None if it does not take one example alone."""
        apart, shared = self.parts(tensors)
        with torch.no_grad():
            return each(lambda *one: self.call(one, shared), apart)

    def gradients(
        self, tensors: Sequence[Tensor], chosen: Sequence[int], grads: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """Of the ``own`` tensors, ``[n, *shape]``; ``grads`` ``[n, ...]`` of the chosen results."""
        apart, shared = self.parts(tensors)
        at = {i: k for k, i in enumerate(i for i in self.tensors if i in self.places)}
        every = {i: k for k, i in enumerate(i for i in self.tensors if i not in self.places)}

        def prepared(given: Sequence[Tensor]) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
            """The function of the ``own`` tensors of one example, and these."""
            mine, others = list(given[: len(apart)]), list(shared)

            def of_own(*own: Tensor) -> list[Tensor]:
                for i, t in zip(self.own, own, strict=True):
                    if i in at:
                        mine[at[i]] = t
                    else:
                        others[every[i]] = t
                found = self.call(mine, others)
                return [found[k] for k in chosen]

            return of_own, [mine[at[i]] if i in at else others[every[i]] for i in self.own]

        def one(*given: Tensor) -> list[Tensor]:
            of_own, own = prepared(given)
            back: Callable[..., Sequence[Tensor]] = torch.func.vjp(of_own, *own)[1]
            return list(back(list(given[len(apart) :])))

        def plainly(*given: Tensor) -> list[Tensor]:
            of_own, own = prepared(given)
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in own]
                got = torch.autograd.grad(of_own(*leaves), leaves, given[len(apart) :])
            return list(got)

        # Under autocast torch.func may differentiate fused functions without their casts.
        found = None if self.autocast[1] else each(one, [*apart, *grads])
        if found is None:
            found = in_turn(plainly, [*apart, *grads])
        if found is None:
            return None
        for k, i in enumerate(self.own):
            if i in self.places:
                found[k] = _put_back(found[k], self.places[i])
        return found


def _put_back(each: Tensor, dim: int) -> Tensor:
    """Gradients of the parts of a tensor as gradients of all of it."""
    n, size = len(each), each.shape[dim + 1]
    shape = list(each.shape)
    shape[dim + 1] *= n
    whole = each.new_zeros(shape)
    for j in range(n):
        whole[j].narrow(dim, j * size, size).copy_(each[j])
    return whole


def one_by_one(
    batch: Batch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: set[int]
) -> Any:
    """The result, or why it cannot be had this way.

    ``known``: ids of the tensors that are parameters or made of parameters alone.
    """
    name = getattr(func, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or func is Tensor.__setitem__:
        return "it works in place"
    leaves, spec = tree_flatten((args, kwargs))
    n = batch.n_examples
    own = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and id(t) in known]
    owned = {
        i: m
        for i, t in enumerate(leaves)
        if isinstance(t, Tensor) and i not in own and (m := ownership(t, batch)).owned
    }
    if any(m.owner is not None for m in owned.values()):
        return "examples are not told apart by one dimension of their own here"
    expanded = _expanded(batch, leaves, own, owned)
    if isinstance(expanded, str):
        return expanded
    own, leaves = expanded
    if not own:
        new_args, new_kwargs = tree_unflatten(leaves, spec)
        return func(*new_args, **new_kwargs)
    places = {i: m.dim for i, m in owned.items()}
    if any(leaves[i].shape[d] % n for i, d in places.items()):
        return "examples are not told apart by one dimension of their own here"
    for i in own:
        roots = roots_of(leaves[i], batch)
        size, limit = expanded_size(leaves[i], roots, n), roots[0].record.target.dense_limit
        if size > limit:
            return beyond(size, limit)
    return _watched(batch, func, leaves, spec, own, places)


def _watched(
    batch: Batch, func: Any, leaves: list[Any], spec: Any, own: list[int], places: dict[int, int]
) -> Any:
    tensors = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
    sinks: list[Sink | None] = []
    for i in own:
        at = Sink.at(leaves[i], roots_of(leaves[i], batch))
        sinks.append(at if leaves[i].requires_grad else None)
    given: list[Tensor] = [leaves[i] for i in tensors]
    how: list[tuple[_Single, list[int], list[int]]] = []
    made: list[Any] = []

    def run(*gated: Tensor) -> list[Tensor]:
        new = list(leaves)
        for i, t in zip(own, gated, strict=True):
            new[i] = t
        new_args, new_kwargs = tree_unflatten(new, spec)
        random, versions = random_states(given), versions_of(given)
        out = func(*new_args, **new_kwargs)
        flat, out_spec = tree_flatten(out)
        outs = [t for t in flat if isinstance(t, Tensor)]
        chosen = [k for k, t in enumerate(outs) if t.requires_grad]
        made[:] = flat, out_spec, chosen
        reason = ""
        if versions != versions_of(given):
            reason = "it writes into what it is given"
        elif any(not torch.equal(a, b) for a, b in zip(
            random.values(), random_states(given).values(), strict=True
        )):  # fmt: skip
            reason = "it draws random numbers"
        else:
            found = _single(batch, func, leaves, spec, own, places, outs)
            restore(random)
            if isinstance(found, str):
                reason = found
            else:
                how.append((*found, chosen))
        if reason:
            for i in own:
                for root in roots_of(leaves[i], batch):
                    root.record.refuse(
                        f"used by {resolve_name(func) or func}, which has no tap: {reason}"
                    )
        else:
            for i, sink in zip(own, sinks, strict=True):
                if sink is not None:
                    expect(leaves[i], sink.roots)
        return [outs[k] for k in chosen]

    def measure(
        sinks: Sinks, grads: Sequence[Tensor], saved: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        if not how:
            return []
        single, dims, chosen = how[0]
        parts = [split(g, dims[k], single.n) for k, g in zip(chosen, grads, strict=True)]
        found = single.gradients(saved, chosen, parts)
        if found is None:
            name = resolve_name(func) or func
            refuse_late(sinks, f"used by {name}, which has no tap: {_NO_BACK}")
            return []
        return [give(s, f, grads[0].dtype) for s, f in zip(sinks, found, strict=True)]

    if not any(sinks):
        new_args, new_kwargs = tree_unflatten(leaves, spec)
        return func(*new_args, **new_kwargs)
    outs = watched(run, [leaves[i] for i in own], sinks, measure, *given)
    flat, out_spec, chosen = made
    places_of = [i for i, t in enumerate(flat) if isinstance(t, Tensor)]
    for k, out in zip(chosen, outs, strict=True):
        flat[places_of[k]] = out
    if how:  # as the trial with single examples has shown
        for i, dim in zip(places_of, how[0][1], strict=True):
            mark(flat[i], batch.index, Mark(dim))
    return tree_unflatten(flat, out_spec)


def _single(
    batch: Batch,
    func: Any,
    leaves: list[Any],
    spec: Any,
    own: list[int],
    places: dict[int, int],
    outs: Sequence[Tensor],
) -> tuple[_Single, list[int]] | str:
    """The function for single examples, and the dimension of each output that tells these apart."""
    n = batch.n_examples
    tensors = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
    bare = [None if isinstance(t, Tensor) else t for t in leaves]
    given = [leaves[i].detach() for i in tensors]
    device = given[0].device.type
    autocast = (
        device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    )  # fmt: skip
    repeated, states = _repeated(leaves, own, places), _states(leaves, own, places, n)
    reason = _APART
    tried = []
    # states: a recurrent layer's have rows for each example too
    for more in ({}, states, repeated, {**repeated, **states}):
        if more in tried:
            continue
        tried.append(more)
        single = _Single(func, bare, spec, tensors, own, {**places, **more}, n, autocast)
        results = single.results(given)
        if results is None:
            reason = "it does not take one example alone"
            continue
        dims = [joined(r, o) for r, o in zip(results, outs, strict=False)]
        if len(results) == len(outs) and None not in dims:
            return single, [d for d in dims if d is not None]
        reason = _APART
    return reason


def _states(leaves: list[Any], own: list[int], places: dict[int, int], n: int) -> dict[int, int]:
    """Constants with one dimension as long as the batch, as a recurrent layer's zeros are."""
    found = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and i not in own and i not in places:
            dims = [d for d, size in enumerate(leaf.shape) if size == n]
            if len(dims) == 1 and not leaf.requires_grad:
                found[i] = dims[0]
    return found


def _repeated(leaves: list[Any], own: list[int], places: dict[int, int]) -> dict[int, int]:
    """What has a dimension as long as the examples' in the same place, as a table has that was
    repeated for each of them. That this is no accident is tested with the results."""
    found = {}
    for i in own:
        for k, d in places.items():
            if leaves[k].ndim == leaves[i].ndim and leaves[k].shape[d] == leaves[i].shape[d]:
                found[i] = d
                break
    return found


def _expanded(
    batch: Batch, leaves: list[Any], own: list[int], owned: dict[int, Mark]
) -> tuple[list[int], list[Any]] | str:
    """Replace what was expanded over the examples beforehand, as a class token is before it is put
    in front of its row: that meets them dimension by dimension."""
    new, left = list(leaves), []
    for i in own:
        tensor = leaves[i]
        partner = next(
            (
                (leaves[k], m)
                for k, m in owned.items()
                if leaves[k].ndim == tensor.ndim
                and leaves[k].shape[m.dim] == tensor.shape[m.dim]
                and (tensor.stride(m.dim) == 0 or tensor.shape[m.dim] == 1)
            ),
            None,
        )
        if partner is None:
            left.append(i)
            continue
        x, m = partner
        shape = [k if d == m.dim else 1 for d, k in enumerate(x.shape)]
        spread = spread_over(tensor, roots_of(tensor, batch), x.new_empty(shape), m, batch)
        if isinstance(spread, str):
            return spread
        new[i] = spread
    return left, new
