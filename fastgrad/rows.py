"""How the rows of a matrix belong to examples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from fastgrad_kernels.dispatch import keep, upload


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of such numbers are accumulated in: at least float32, and never without the
    imaginary part."""
    if dtype in (torch.float64, torch.complex64, torch.complex128):
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32


def wide(tensor: Tensor) -> Tensor:
    dtype = wide_dtype(tensor.dtype)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class Rows:
    """Which example each row of a ``[rows, features]`` matrix belongs to.

    Attributes:
        n_examples: number of examples; those without a row count too.
        per_example: rows of each example if all have equally many and they lie one example after
            the other; else None.
        bounds: ``n_examples + 1`` numbers: example j owns the rows ``bounds[j]:bounds[j + 1]`` of a
            matrix in example order, see :meth:`ordered`.
        order: int64, the rows in example order; None if they lie so already.
        rest: int64, rows that no example owns (padding of packed rows); None if there are none.
    """

    __slots__ = ("_offsets", "bounds", "n_examples", "order", "per_example", "rest")

    def __init__(
        self,
        n_examples: int,
        bounds: list[int],
        per_example: int | None,
        offsets: Tensor | None = None,
        order: Tensor | None = None,
        rest: Tensor | None = None,
    ) -> None:
        self.n_examples, self.bounds, self._offsets = n_examples, bounds, offsets
        self.per_example, self.order, self.rest = per_example, order, rest

    @staticmethod
    @lru_cache(maxsize=256)  # every layer of a model asks for the same
    def uniform(n_examples: int, per_example: int) -> Rows:
        bounds = [per_example * j for j in range(n_examples + 1)]
        return Rows(n_examples, bounds, per_example)

    @property
    def offsets(self) -> Tensor:
        """``bounds`` as int64 on the host."""
        if self._offsets is not None:
            return self._offsets
        assert self.per_example is not None  # uniform; not kept here: it may be a fake mode's
        return _uniform_offsets(self.n_examples, self.per_example)

    @classmethod
    def of(cls, owner: Tensor, n_examples: int) -> Rows:
        """From the owner of each row, int64 ``[rows]``, -1 for nobody. Waits for the device."""
        host = owner.detach().cpu()
        counts = torch.bincount(host[host >= 0], minlength=n_examples)
        offsets = torch.zeros(n_examples + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(counts, 0, out=offsets[1:])
        order = rest = None
        nobody = int((host < 0).sum())
        if nobody or (host.numel() and bool((host.diff() < 0).any())):
            order = upload(torch.sort(host, stable=True).indices, owner.device)
            rest, order = (order[:nobody] if nobody else None), order[nobody:]
        even = order is None and n_examples > 0 and bool((counts == counts[0]).all())
        length = int(counts[0]) if even else None
        return cls(n_examples, offsets.tolist(), length, offsets, order, rest)

    def ordered(self, matrix: Tensor) -> Tensor:
        """The matrix with its rows in example order."""
        return matrix if self.order is None else matrix[self.order]

    def parts(self) -> Iterator[slice]:
        """The rows of each example in example order."""
        return (slice(a, b) for a, b in pairwise(self.bounds))

    def sums(self, matrix: Tensor) -> Tensor:
        """Sum of each example's rows of ``[rows, *shape]``, accumulated in :func:`wide_dtype`:
        ``[n_examples, *shape]``."""
        if self.per_example is not None:
            shape = (self.n_examples, self.per_example)
            return matrix.unflatten(0, shape).sum(1, dtype=wide_dtype(matrix.dtype))
        matrix = wide(self.ordered(matrix))
        sums = matrix.new_zeros(self.n_examples, *matrix.shape[1:])
        for total, part in zip(sums, self.parts(), strict=True):
            torch.sum(matrix[part], 0, out=total)
        return sums


@keep
def _uniform_offsets(n_examples: int, per_example: int) -> Tensor:
    return torch.arange(n_examples + 1, dtype=torch.int64, device="cpu") * per_example
