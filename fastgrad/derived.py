"""Tensors made of parameters alone, and where they meet the examples.

``1 + w``, ``-exp(w)``, a table of positions looked up with ids that all examples share, the norm of
an adapted weight: such a tensor D has no example dimension of its own. Where it meets an
activation it is expanded over the examples (no copy), so that autograd brings D's gradient for
each example; the chain rule through the part of the graph between the parameters and D, which
is still there, then gives theirs. Roots of that part are parameters, or lookups in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastgrad.chain_rule import Edge, edge, through
from fastgrad.ownership import Mark
from fastgrad.records import Batch, ParamRecord
from fastgrad.regions import Region, region_of
from fastgrad.rows import Rows, wide

_MADE = "_fastgrad_made"  # what a tensor is made of: the parts of its own root, or its roots
_ONWARD = "_fastgrad_onward"  # where the gradient goes on that a detached copy receives


class Root(NamedTuple):
    """A parameter, or the result of looking up shared ids in one."""

    record: ParamRecord
    tensor: Tensor
    ids: Tensor | None = None
    padding: int | None = None  # id whose gradient does not count
    # behind detached copies: where gradients arrive at one and where they go on, in turn
    way: tuple[Edge, ...] = ()

    def kept(self) -> Root:
        """Without the memory of what was looked up."""
        return self if self.ids is None else self._replace(tensor=self.record.parameter)

    def arrive(self, gradients: Tensor, batch: Batch, dtype: torch.dtype) -> None:
        """``[n_examples, *tensor.shape]`` of this root; they went through ``dtype``."""
        if self.ids is None:
            self.record.add_dense(gradients, dtype)
            return
        n = batch.n_examples
        ids = self.ids.expand(n, *self.ids.shape).reshape(-1)
        rows = Rows.uniform(n, self.ids.numel())
        gradients = masked(ids, gradients.reshape(len(ids), -1), self)
        self.record.add_lookup(ids, gradients, rows, dtype)


def masked(ids: Tensor, gradients: Tensor, root: Root) -> Tensor:
    if root.padding is None:
        return gradients
    return gradients.masked_fill((ids == root.padding).unsqueeze(1), 0)


def may_have_roots(tensors: Sequence[Tensor], batch: Batch) -> bool:
    """False for nearly all tensors, at little cost: they are no parameters and made of none."""
    targets = batch.targets
    return any([id(tensor) in targets or hasattr(tensor, _MADE) for tensor in tensors])


def roots_of(tensor: Tensor, batch: Batch) -> tuple[Root, ...]:
    """What a tensor is made of; empty if it is no probed parameter's."""
    record = batch.lookup(tensor)
    if record is not None:
        return (Root(record, tensor),)
    made = getattr(tensor, _MADE, None)
    if made is None:
        return ()
    if isinstance(made, _Lookup):
        made = (Root(made.record, tensor, made.ids, made.padding),)
    first = made[0].record.batch
    if first is not batch:  # made of parameters alone, it serves each forward pass
        if first.targets is not batch.targets:
            return ()
        made = tuple(r._replace(record=batch.record_of(r.record.target)) for r in made)
    onward = getattr(tensor, _ONWARD, None)
    if onward is None:
        return made
    return tuple(r._replace(way=(edge(tensor), onward, *r.way)) for r in made)


class _Lookup(NamedTuple):
    """A root without its tensor: that must not refer to itself, or the circle would stay."""

    record: ParamRecord
    ids: Tensor
    padding: int | None


def set_root(tensor: Tensor, record: ParamRecord, ids: Tensor, padding: int | None) -> None:
    """``tensor`` is a lookup of shared ids."""
    setattr(tensor, _MADE, _Lookup(record, ids, padding))


def set_derived(tensor: Tensor, roots: Sequence[Root]) -> None:
    unique = {(id(r.tensor), r.way): r for r in roots}
    setattr(tensor, _MADE, tuple(unique.values()))


def for_a_copy(tensor: Tensor, batch: Batch) -> dict[str, Any]:
    """What a detached copy must remember to stand for ``tensor``, if its gradient is handed on."""
    roots = roots_of(tensor, batch)
    looked_up = bool(roots) and roots[0].tensor is tensor and roots[0].ids is not None
    if not roots or looked_up or not tensor.requires_grad:
        return {}  # what was looked up needs no way to its parameter
    return {_MADE: roots, _ONWARD: edge(tensor)}


@contextmanager
def kept_from_checkpoints() -> Iterator[None]:
    """What functions of parameters alone save stays where it is: the way from a derived tensor to
    its roots is walked in addition to autograd's own, and a checkpoint hands out once what it
    computed again."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        yield
        return
    # detached: a node that keeps its own output would never go
    with saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
        yield


def expanded_size(tensor: Tensor, roots: Sequence[Root], n: int) -> int:
    """Elements that the gradients of each example take: of the tensor and of its roots."""
    sizes = [r.tensor.numel() for r in roots]
    return n * max(tensor.numel(), *sizes)


def expect(tensor: Tensor, roots: Sequence[Root]) -> None:
    for root in roots:
        if root.ids is None:
            root.record.expect("dense", None)
        else:
            n = root.record.batch.n_examples
            ids = root.ids.expand(n, *root.ids.shape).reshape(-1)
            root.record.expect_lookup(ids, Rows.uniform(n, root.ids.numel()))


class Made(NamedTuple):
    """A tensor made of roots: its place in the graph, whose way to them is known even if the
    tensors are no more or have been written into."""

    start: Edge
    ways: tuple[tuple[Edge, ...], ...]  # to each root: an end, or ends and new starts in turn
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, roots: Sequence[Root]) -> Made:
        ways = tuple((*r.way, edge(r.tensor)) for r in roots)
        return cls(edge(tensor), ways, tensor.shape, tensor.dtype)

    def arrive(self, gradients: Tensor, roots: Sequence[Root], dtype: torch.dtype) -> None:
        """The gradients of each example, through the graph to the roots."""
        batch = roots[0].record.batch
        if batch.nested:
            return
        batch.on_arrival(batch)
        if self.dtype in (torch.bfloat16, torch.float16):
            dtype = self.dtype
        gradients = gradients.reshape(len(gradients), *self.shape).to(self.dtype)
        reached = through(self.start, [way[0] for way in self.ways], gradients)
        for root, way, found in zip(roots, self.ways, reached, strict=True):
            for onward, end in zip(way[1::2], way[2::2], strict=True):
                (found,) = through(onward, (end,), found)
            root.arrive(found, batch, dtype)


def into_record(
    record: ParamRecord,
    left: Tensor,
    right: Tensor,
    rows: Rows,
    dtype: torch.dtype,
    region: Region | None,
    flipped: bool,
) -> Tensor:
    """Gradient ``leftᵀ right`` of a matrix that lies in a parameter, perhaps transposed."""
    a, b = rows.ordered(left), rows.ordered(right)
    if flipped:
        grad = record.add_product(b, a, rows, dtype, region).T
    else:
        grad = record.add_product(a, b, rows, dtype, region)
    if rows.rest is not None:
        grad = grad + left[rows.rest].T @ right[rows.rest]
    return grad


class Sink(NamedTuple):
    """Where the gradients of a matrix or bias that meets examples go."""

    roots: tuple[Root, ...]
    direct: bool  # the tensor is a parameter
    region: Region | None = None  # it is a view of a parameter
    flipped: bool = False
    made: Made | None = None  # neither: what is left of it

    @classmethod
    def of(cls, tensor: Tensor, batch: Batch) -> Sink | None:
        """None if the tensor is no probed parameter's."""
        roots = roots_of(tensor, batch)
        if not roots:
            return None
        parameter = roots[0].tensor
        if len(roots) == 1 and roots[0].ids is None and tensor is not parameter:
            found = region_of(tensor, parameter)
            if found is not None:
                return cls(roots, False, *found)
        return cls.at(tensor, roots)

    @classmethod
    def at(cls, tensor: Tensor, roots: tuple[Root, ...]) -> Sink:
        """For gradients of the whole tensor, one for each example."""
        if roots[0].tensor is tensor and roots[0].ids is None:
            return cls(roots, True)
        return cls(roots, False, made=Made.of(tensor, roots))

    def kept(self) -> Sink:
        """What the backward pass needs: without the memory of what was looked up."""
        if self.direct or self.region is not None:
            return self
        return self._replace(roots=tuple(r.kept() for r in self.roots))

    @property
    def limit(self) -> int:
        return self.roots[0].record.target.dense_limit

    def expect_dense(self, tensor: Tensor) -> None:
        expect(tensor, self.roots)

    def expect_product(self, weight: Tensor) -> None:
        if self.direct or self.region is not None:
            self.roots[0].record.expect("product", self.region)
        else:
            expect(weight, self.roots)

    def refuse(self, reason: str) -> None:
        for root in self.roots:
            root.record.refuse(reason)

    def differentiated(self) -> None:
        """The backward pass is to be differentiated itself: see :class:`ParamRecord`."""
        for root in self.roots:
            root.record.differentiated()

    def too_large(self, weight: Tensor, n: int) -> str | None:
        """Why per-example gradients of a derived matrix cannot be formed."""
        if self.direct or self.region is not None:
            return None
        size, limit = expanded_size(weight, self.roots, n), self.roots[0].record.target.dense_limit
        return None if size <= limit else beyond(size, limit)

    def product(self, left: Tensor, right: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Gradient ``leftᵀ right`` of a matrix; rows as the activation has them."""
        if self.direct or self.region is not None:
            record = self.roots[0].record
            return into_record(record, left, right, rows, dtype, self.region, self.flipped)
        a, b = wide(rows.ordered(left)), wide(rows.ordered(right))
        if rows.per_example is not None:
            shape = (rows.n_examples, rows.per_example)
            each = torch.bmm(a.unflatten(0, shape).transpose(1, 2), b.unflatten(0, shape))
        else:
            each = torch.stack([a[p].T @ b[p] for p in rows.parts()])
        self.dense(each, left.dtype)
        grad = each.sum(0).to(dtype)
        if rows.rest is not None:
            grad = grad + left[rows.rest].T @ right[rows.rest]
        return grad

    def dense(self, per_example: Tensor, dtype: torch.dtype) -> None:
        """Gradients ``[n_examples, *shape]``, or in another shape of as many elements, of a tensor
        that is small enough."""
        if self.made is None:
            self.roots[0].record.add_dense(per_example, dtype)
        else:
            self.made.arrive(per_example, self.roots, dtype)


def beyond(size: int, limit: int) -> str:
    return (
        f"its gradients of all examples would take {size:,} elements, more than "
        f"dense_limit={limit:,}. Remedy: Probe(..., dense_limit={size}), or smaller batches"
    )


class SharedTap(torch.autograd.Function):
    """A derived tensor expanded over the examples, so that its gradient comes per example.

    ``shape`` is the tensor's, aligned with the activation it meets, with the activation's size
    in the dimensions that tell examples apart; ``spread`` are these dimensions, ``rows`` the
    owners along them. Without ``spread`` the tensor has these dimensions itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        shape: Sequence[int],
        spread: Sequence[int],
        rows: Rows,
        sink: Sink,
    ) -> Tensor:
        ctx.shape, ctx.spread, ctx.rows, ctx.sink = tensor.shape, spread, rows, sink.kept()
        return tensor.view([1] * (len(shape) - tensor.ndim) + list(tensor.shape)).expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            ctx.sink.differentiated()
            total = grad.sum(ctx.spread) if ctx.spread else grad
            return total.reshape(ctx.shape), None, None, None, None
        lead = grad.movedim(list(ctx.spread), list(range(len(ctx.spread))))
        rest = lead.shape[len(ctx.spread) :]
        lead = lead.reshape(math.prod(lead.shape[: len(ctx.spread)]), *rest)
        per_example = ctx.rows.sums(lead)
        per_example = per_example.reshape(len(per_example), *ctx.shape)
        ctx.sink.dense(per_example, grad.dtype)
        total = per_example.sum(0).to(grad.dtype)
        if ctx.rows.rest is not None:
            total = total + lead[ctx.rows.rest].sum(0).view(ctx.shape)
        return total, None, None, None, None


class AlignedTap(torch.autograd.Function):
    """A derived tensor that has the example dimension itself, as a table that was repeated for each
    example: what arrives in an example's rows is its share of the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, rows: Rows, sink: Sink) -> Tensor:
        ctx.dim, ctx.rows, ctx.sink = dim, rows, sink.kept()
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            ctx.sink.differentiated()
            return grad, None, None, None
        shares = grad.new_zeros(ctx.rows.n_examples, *grad.shape)
        for share, part in zip(shares, ctx.rows.parts(), strict=True):
            at = (*[slice(None)] * ctx.dim, part)
            share[at] = grad[at]
        ctx.sink.dense(shares, grad.dtype)
        return grad, None, None, None


def aligned(tensor: Tensor, roots: tuple[Root, ...], dim: int, batch: Batch) -> Tensor | str:
    """``tensor`` with a tap that gives each example what arrives at its indices of ``dim``; or why
    not. Whether the dimension counts examples is for the caller to know."""
    n = batch.n_examples
    size, limit = n * tensor.numel(), roots[0].record.target.dense_limit
    if size > limit:
        return beyond(size, limit)
    expect(tensor, roots)
    rows = Rows.uniform(n, tensor.shape[dim] // max(n, 1))
    return AlignedTap.apply(tensor, dim, rows, Sink.at(tensor, roots))


def lookup_hook(root: Root, ids: Tensor, rows: Rows) -> Any:
    """For the gradient of looked-up rows ``[..., cols]``: ``ids`` as many, in memory's order."""
    root = root.kept()

    def hook(grad: Tensor) -> None:
        if torch.is_grad_enabled():
            root.record.differentiated()
            return
        flat_ids, flat = ids.reshape(-1).long(), grad.reshape(ids.numel(), -1)
        flat = masked(flat_ids, flat, root)
        root.record.add_lookup(rows.ordered(flat_ids), rows.ordered(flat), rows)

    return hook


def spread_over(
    tensor: Tensor, roots: tuple[Root, ...], x: Tensor, found: Mark, batch: Batch
) -> Tensor | str:
    """``tensor`` as an activation that meets ``x``, with a tap on it; or why not.

    Dimensions are aligned from the right, as in broadcasting.
    """
    n = batch.n_examples
    if tensor.ndim > x.ndim:
        return f"of shape {tuple(tensor.shape)} met an activation of shape {tuple(x.shape)}"
    shape = [1] * (x.ndim - tensor.ndim) + list(tensor.shape)
    owner = None if found.owner is None else found.owner
    owned = [found.dim] if owner is None else [d for d in range(x.ndim) if owner.shape[d] > 1]
    own = [d for d in owned if shape[d] > 1]  # the tensor has the example dimension itself
    if any(shape[d] != x.shape[d] for d in own):
        return f"of shape {tuple(tensor.shape)} met an activation of shape {tuple(x.shape)}"
    at_root = len(roots) == 1 and roots[0].ids is not None and roots[0].tensor is tensor
    if own and not at_root:
        # expanded beforehand, as class tokens are: all its rows are one
        view = tensor if len(shape) == tensor.ndim else tensor.reshape(shape)
        if any(view.stride(d) for d in own):
            if owner is not None or len(shape) != tensor.ndim:
                return "met packed examples with rows of its own for each of them"
            return aligned(tensor, roots, found.dim, batch)
        for d in own:
            view = view.narrow(d, 0, 1)
        return spread_over(view, roots, x, found, batch)
    size, limit = expanded_size(tensor, roots, n), roots[0].record.target.dense_limit
    if at_root:
        root = roots[0]
        assert root.ids is not None
        cols = tensor.ndim - root.ids.ndim  # dimensions that a looked-up row has
        lead = [x.shape[d] if d in owned else shape[d] for d in range(x.ndim - cols)]
        if any(d >= x.ndim - cols for d in owned):
            return "was looked up, and met examples along a looked-up row"
        ids = root.ids.expand(lead)
        rows = _lead_rows(lead, owned, owner, batch)
        flat = ids.reshape(-1).long()
        root.record.expect_lookup(rows.ordered(flat), rows)
        out = tensor.expand(*lead, *tensor.shape[root.ids.ndim :])
        if out.requires_grad:
            out = out.view_as(out) if out is tensor else out
            out.register_hook(lookup_hook(root, ids, rows))
        return out
    if size > limit:
        return beyond(size, limit)
    full = [x.shape[d] if d in owned else k for d, k in enumerate(shape)]
    if owner is None:
        rows = Rows.uniform(n, x.shape[found.dim] // n)
    else:
        rows = batch.rows_of(owner, torch.Size(owner.shape))
    expect(tensor, roots)
    return SharedTap.apply(tensor, full, owned, rows, Sink.at(tensor, roots))


def _lead_rows(
    lead: Sequence[int], owned: Sequence[int], owner: Tensor | None, batch: Batch
) -> Rows:
    total = 1
    for k in lead:
        total *= k
    if owner is None and owned == [0]:
        return Rows.uniform(batch.n_examples, total // batch.n_examples)
    if owner is None:
        size = lead[owned[0]]
        each = torch.arange(batch.n_examples).repeat_interleave(size // batch.n_examples)
        owner = each.view([size if d == owned[0] else 1 for d in range(len(lead))])
        return Rows.of(owner.expand(list(lead)).reshape(-1), batch.n_examples)
    owner = owner.reshape(owner.shape[: len(lead)])
    return batch.rows_of(owner, torch.Size(lead))
