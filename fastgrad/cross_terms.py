"""Uses of a parameter that overlap: what their squared norms lack for that of their sum.

``‖a + b‖² = ‖a‖² + ‖b‖² + 2⟨a, b⟩``: each use's own norm comes with its gradient, and the inner
products follow from the factors, without either gradient (docs/maths.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrad.regions import Region
from fastgrad.rows import Rows, wide
from fastgrad_kernels.cpu import gram_products

CANCELLED = 1e-3  # below this share of the uses' own energy, cross terms have lost digits


class Factors(NamedTuple):
    """A use whose gradient is ``leftᵀ right`` in a region of the parameter."""

    left: Tensor
    right: Tensor
    rows: Rows
    region: Region


class Lookup(NamedTuple):
    """A use as embedding: ``grad_out [tokens, cols]`` arrives at the rows ``ids``."""

    ids: Tensor
    grad_out: Tensor
    rows: Rows


class Together:
    """Products and lookups of one and the same region of a parameter, whole blocks.

    Attributes:
        sq: ``[n_blocks, n_examples]``, each use's own squared norms added up.
        dots: ``[k, n_examples]``.
    """

    def __init__(self) -> None:
        self.sq: Tensor | None = None
        self.dots: Tensor | None = None
        self.products: list[Factors] = []
        self.lookups: list[Lookup] = []
        self._gathered: list[tuple[list[Tensor], Factors]] = []
        self._ids: Sequence[tuple[Tensor, Rows]] = ()

    def _add(self, sq: Tensor, dots: Tensor) -> None:
        self.sq = sq if self.sq is None else self.sq + sq
        self.dots = dots if self.dots is None else self.dots + dots

    def add_lookup(self, lookup: Lookup, sq: Tensor, dots: Tensor) -> None:
        self._add(sq, dots)
        self.lookups.append(lookup)

    def add_product(
        self,
        factors: Factors,
        sq: Tensor,
        dots: Tensor,
        n_uses: int,
        ids: Sequence[tuple[Tensor, Rows]],
    ) -> None:
        """Keep what the cross terms need. Against a lookup that is only the columns of ``left``
        that the looked-up ids name: ``[tokens, tokens]`` instead of ``[tokens, vocabulary]``.

        Args:
            n_uses: of the region in this batch.
            ids: those of its lookups, in example order.
        """
        self._add(sq, dots)
        left, rows = factors.left, factors.rows
        even = all(r.per_example is not None for _, r in ids)
        tokens = rows.per_example
        if n_uses > 1 + len(ids) or not even or tokens is None:
            self.products.append(factors)
            return
        split = _split(left, rows)
        pairs = [
            split.gather(2, i.view(r.n_examples, 1, -1).expand(-1, tokens, -1)) for i, r in ids
        ]
        self._gathered.append((pairs, factors._replace(left=left.new_empty(0))))
        self._ids = ids

    @property
    def uses(self) -> list[Factors | Lookup] | None:
        """What the gradients can be formed from; None if it was not kept."""
        return None if self._gathered else [*self.products, *self.lookups]

    def total(self) -> Tensor | None:
        """Squared norms of the sum, ``[n_blocks, n_examples]``; None if the uses nearly cancel: a
        difference of large numbers is not exact any more."""
        assert self.sq is not None
        if len(self.products) + len(self.lookups) + len(self._gathered) < 2:
            return self.sq
        total = self.sq + 2 * self._cross(torch.zeros_like(self.sq[0]))
        return None if bool((total < CANCELLED * self.sq).any()) else total

    def _cross(self, total: Tensor) -> Tensor:
        """``Σ_{a<b} ⟨use_a, use_b⟩`` for each example, ``[n_examples]``, added to ``total``."""
        for one, two in combinations(self.products, 2):
            total = total + _each(_product_product, one, two)
        for first, second in combinations(self.lookups, 2):
            total = total + _each(_lookup_lookup, first, second)
        for lookup in self.lookups:
            for factors in self.products:
                total = total + _each(_product_lookup, factors, lookup)
            for kept, factors in self._gathered:
                # lookups fire in any order: find this lookup's columns by its ids
                for (expected, _), columns in zip(self._ids, kept, strict=True):
                    ids = lookup.ids
                    if expected.data_ptr() == ids.data_ptr() or torch.equal(expected, ids):
                        right = wide(_split(factors.right, factors.rows))
                        grads = wide(_split(lookup.grad_out, lookup.rows))
                        inner = torch.bmm(right, grads.transpose(1, 2))
                        total = total + (wide(columns) * inner).sum((1, 2))
                        break
        return total


def _split(matrix: Tensor, rows: Rows) -> Tensor:
    assert rows.per_example is not None
    return matrix.unflatten(0, (rows.n_examples, rows.per_example))


def _each(inner: Callable[..., Tensor], a: Factors | Lookup, b: Factors | Lookup) -> Tensor:
    """Inner product of two uses for each example; in one go where examples are equally long."""
    if a.rows.per_example is not None and b.rows.per_example is not None:
        return inner(
            *(_split(t, a.rows) for t in a[:2]), *(_split(t, b.rows) for t in b[:2])
        )
    pairs = zip(a.rows.parts(), b.rows.parts(), strict=True)
    return torch.cat(
        [inner(*(t[None, p] for t in a[:2]), *(t[None, q] for t in b[:2])) for p, q in pairs]
    )


def _product_product(l1: Tensor, r1: Tensor, l2: Tensor, r2: Tensor) -> Tensor:
    return gram_products(wide(l1), wide(r1), wide(l2), wide(r2))


def _lookup_lookup(i1: Tensor, g1: Tensor, i2: Tensor, g2: Tensor) -> Tensor:
    same = i1.unsqueeze(2) == i2.unsqueeze(1)
    return (same * torch.bmm(wide(g1), wide(g2).transpose(1, 2))).sum((1, 2))


def _product_lookup(left: Tensor, right: Tensor, ids: Tensor, g: Tensor) -> Tensor:
    columns = wide(left).gather(2, ids.unsqueeze(1).expand(-1, left.shape[1], -1))
    return (columns * torch.bmm(wide(right), wide(g).transpose(1, 2))).sum((1, 2))


__all__ = ["Factors", "Lookup", "Together"]
