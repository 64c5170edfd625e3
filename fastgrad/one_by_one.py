"""The general rule: a function is called once for each example, with parameters of its own.

It serves where a small parameter enters a function that has no tap. That the function treats
examples independently is not assumed but tested: the results together must equal the function's
result on the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastgrad.derived import aligned, roots_of, spread_over
from fastgrad.handlers import ownership
from fastgrad.ownership import Mark
from fastgrad.records import Batch


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
    repeated = _repeated(batch, leaves, own, owned)
    if isinstance(repeated, str):
        return repeated
    own, leaves, owned = repeated
    copies: dict[int, Tensor] = {}
    for i in own:
        roots = roots_of(leaves[i], batch)
        partner = leaves[i].new_empty(n, *[1] * leaves[i].ndim)
        spread = spread_over(leaves[i], roots, partner, Mark(0), batch)
        if isinstance(spread, str):
            return spread
        copies[i] = spread
    with torch.no_grad():
        whole = func(*args, **kwargs)
    found: Any = ""
    for states in ({}, _states(leaves, copies, owned, n)):  # initial states have rows for each too
        places = {**owned, **states}
        results = _results(func, leaves, spec, copies, places, n)
        found = results if isinstance(results, str) else _joined(whole, results, n)
        if not isinstance(found, str):
            break
    return found


def _states(
    leaves: list[Any], copies: dict[int, Tensor], owned: dict[int, Mark], n: int
) -> dict[int, Mark]:
    """Constants with one dimension as long as the batch, as a recurrent layer's zeros are."""
    found = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and i not in copies and i not in owned:
            places = [d for d, size in enumerate(leaf.shape) if size == n]
            if len(places) == 1 and not leaf.requires_grad:
                found[i] = Mark(places[0])
    return found


def _results(
    func: Any,
    leaves: list[Any],
    spec: Any,
    copies: dict[int, Tensor],
    places: dict[int, Mark],
    n: int,
) -> list[tuple[list[Any], Any]] | str:
    """What the function gives for each example alone."""
    results = []
    for j in range(n):
        mine = list(leaves)
        for i, copy in copies.items():
            mine[i] = copy[j]
        for i, m in places.items():
            step = leaves[i].shape[m.dim] // n
            mine[i] = leaves[i].narrow(m.dim, j * step, step)
        new_args, new_kwargs = tree_unflatten(mine, spec)
        try:
            results.append(tree_flatten(func(*new_args, **new_kwargs)))
        except (RuntimeError, ValueError, IndexError):
            return "it does not take one example alone"
    return results


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


def _repeated(
    batch: Batch, leaves: list[Any], own: list[int], owned: dict[int, Mark]
) -> tuple[list[int], list[Any], dict[int, Mark]] | str:
    """Replace what has a dimension as long as the examples' in the same place, as a table has that
    was repeated for each of them. That this is no accident is tested with the results."""
    new, left, marks = list(leaves), [], dict(owned)
    for i in own:
        tensor = leaves[i]
        dim = next(
            (
                m.dim
                for k, m in owned.items()
                if leaves[k].ndim == tensor.ndim and leaves[k].shape[m.dim] == tensor.shape[m.dim]
            ),
            None,
        )
        if dim is None:
            left.append(i)
            continue
        tapped = aligned(tensor, roots_of(tensor, batch), dim, batch)
        if isinstance(tapped, str):
            return tapped
        new[i], marks[i] = tapped, Mark(dim)
    return left, new, marks


def _joined(whole: Any, results: list[tuple[list[Any], Any]], n: int) -> Any:
    """The examples' results put together, if they equal the result of all at once."""
    parts, spec = tree_flatten(whole)
    out = []
    for k, full in enumerate(parts):
        each = [leaves[k] for leaves, _ in results]
        if not isinstance(full, Tensor):
            out.append(full)
            continue
        differing = [
            d
            for d in range(full.ndim)
            if each[0].ndim == full.ndim and each[0].shape[d] * n == full.shape[d]
        ]
        for d in differing:
            joined = torch.cat(each, d)
            if joined.shape == full.shape and _equal(joined, full):
                out.append(joined)
                break
        else:
            return "its results for single examples do not make up its result for the batch"
    return tree_unflatten(out, spec)


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same but for rounding: functions choose other algorithms for other sizes."""
    if not b.is_floating_point():
        return torch.equal(a, b)
    allowed = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-8}.get(b.dtype, 1e-4)
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return False
    a, b = a[finite].double(), b[finite].double()
    return not b.numel() or bool((a - b).abs().max() <= allowed * b.abs().max())
