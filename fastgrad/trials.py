"""Functions as functions of single examples: whether they are such, and what they give then."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastgrad.ownership import NONE, Mark
from fastgrad.random_state import random_states, restore

_CANNOT = (RuntimeError, ValueError, IndexError, TypeError)


def split(tensor: Tensor, dim: int, n: int) -> Tensor:
    """``[n, ...]``: what is each example's along a dimension."""
    return tensor.unflatten(dim, (n, -1)).movedim(dim, 0)


def each(one: Callable[..., list[Tensor]], given: Sequence[Tensor]) -> list[Tensor] | None:
    """``one`` of each example at once, or one after the other if it cannot be done at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch goes through some of them one by one itself
        try:
            return list(torch.vmap(one)(*given))
        except _CANNOT:
            pass
        return in_turn(one, given)


def in_turn(one: Callable[..., list[Tensor]], given: Sequence[Tensor]) -> list[Tensor] | None:
    """``one`` of each example, one after the other."""
    try:
        found = [one(*(t[j] for t in given)) for j in range(len(given[0]))]
        return [torch.stack(column) for column in zip(*found, strict=True)]
    except _CANNOT:
        return None


def joined(each: Tensor, full: Tensor) -> int | None:
    """The dimension along which results ``[n, ...]`` of single examples make up that of all."""
    if each.ndim != full.ndim + 1:
        return None
    for d in range(full.ndim):
        if each.shape[0] * each.shape[d + 1] == full.shape[d]:
            together = each.movedim(0, d).flatten(d, d + 1)
            if together.shape == full.shape and equal(together, full):
                return d
    return None


def equal(a: Tensor, b: Tensor) -> bool:
    """The same but for rounding: functions choose other algorithms for other sizes."""
    if not b.is_floating_point() and not b.is_complex():
        return torch.equal(a, b)
    allowed = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-8}.get(b.dtype, 1e-4)
    if b.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return False
    a, b = a[finite].double(), b[finite].double()
    return not b.numel() or bool((a - b).abs().max() <= allowed * b.abs().max())


# what was found of a function with arguments of such shapes; forgotten when it grows
_known: dict[Any, list[int] | None] = {}
_KNOWN = 512


def tried(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Sequence[tuple[Tensor, Mark]],
    outs: Sequence[Tensor],
    n: int,
) -> list[Mark] | None:
    """Marks of what an unknown function gave: it is called again for each example alone, and what
    comes of it has to make up what came of the batch. None if it does not.

    One answer serves all calls with the same arguments but for the numbers in tensors.
    """
    name = getattr(func, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or not outs:
        return None  # it would write a second time
    if kwargs.get("out") is not None:
        return None
    leaves, spec = tree_flatten((args, kwargs))
    owned = {id(t): m for t, m in known if m.owned}
    if any(m.owner is not None for m in owned.values()):
        return None
    key = _key(func, leaves, owned, spec, n)
    if key is None or key not in _known:
        if len(_known) >= _KNOWN:
            _known.clear()
        dims = _dims(func, leaves, spec, owned, outs, n)
        if key is not None:
            _known[key] = dims
    else:
        dims = _known[key]
    return None if dims is None else [Mark(d) for d in dims]


def _key(func: Any, leaves: Sequence[Any], owned: dict[int, Mark], spec: Any, n: int) -> Any:
    parts: list[Any] = [func, str(spec), n]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            dim = owned[id(leaf)].dim if id(leaf) in owned else NONE
            parts.append((tuple(leaf.shape), leaf.dtype, dim))
        elif isinstance(leaf, int | float | bool | str | type(None) | torch.dtype | torch.device):
            parts.append((type(leaf), leaf))
        else:
            return None
    try:
        hash(func)
    except TypeError:
        return None
    return tuple(parts)


def _dims(
    func: Any, leaves: Sequence[Any], spec: Any, owned: dict[int, Mark], outs: Sequence[Tensor],
    n: int,
) -> list[int] | None:  # fmt: skip
    places = {i: owned[id(t)].dim for i, t in enumerate(leaves) if id(t) in owned}
    if any(leaves[i].shape[d] % n or not leaves[i].shape[d] for i, d in places.items()):
        return None

    def one(*given: Tensor) -> list[Tensor]:
        # copies: it may write into buffers
        new = [
            t.clone() if isinstance(t, Tensor) and i not in places else t
            for i, t in enumerate(leaves)
        ]
        for i, t in zip(places, given, strict=True):
            new[i] = t
        new_args, new_kwargs = tree_unflatten(new, spec)
        found = tree_flatten(func(*new_args, **new_kwargs))[0]
        return [t for t in found if isinstance(t, Tensor)]

    seen = [leaves[i].detach() for i in places]
    all_ = [t for t in leaves if isinstance(t, Tensor)]
    random, versions = random_states(seen), versions_of(all_)
    try:
        with torch.no_grad():
            dims = _agree(one, [o.detach() for o in outs], seen, places, n)
            # zeros, as a fresh adapter gives them, would hide what a function does
            other = [_disturbed(t) for t in seen]
            if dims is None or _agree(one, one(*other), other, places, n) != dims:
                return None
    except _CANNOT:
        return None
    finally:
        restore(random)
    return dims if versions_of(all_) == versions else None


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def _agree(
    one: Callable[..., list[Tensor]],
    full: Sequence[Tensor],
    given: Sequence[Tensor],
    places: dict[int, int],
    n: int,
) -> list[int] | None:
    """The dimensions along which results of single examples make up those of all."""
    if any(t.layout != torch.strided for t in full):
        return None
    results = each(one, [split(t, d, n) for t, d in zip(given, places.values(), strict=True)])
    if results is None or len(results) != len(full):
        return None
    dims = [joined(r, o) for r, o in zip(results, full, strict=True)]
    return None if None in dims else [d for d in dims if d is not None]


def _disturbed(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return tensor
    tensor = tensor.nan_to_num(1.0, 1.0, -1.0)
    size = tensor.abs().mean()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return tensor * (1 + 0.1 * torch.rand_like(tensor)) + 0.1 * size * torch.rand_like(tensor)
