"""Sums of products with a parameter as one factor, in all the ways in which PyTorch writes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrad.derived import Sink, beyond, expanded_size, roots_of, set_derived
from fastgrad.handlers_common import cast, constant, ownership, refuse, shares, watch_sinks
from fastgrad.ownership import Mark
from fastgrad.records import Batch
from fastgrad.regions import Region, region_of
from fastgrad.rows import Rows
from fastgrad.tap_contraction import ContractTap, Letters, Plan, split

_LOOPS = 64  # matrices of a stack that are taken one after the other, rather than all formed
_ALPHABET = "abcdefghijklmnopqrstuvwx"  # two more are needed inside


class _Factor(NamedTuple):
    """A tensor with a letter for each dimension, less those along which it is repeated."""

    tensor: Tensor
    letters: str
    gone: list[int]
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor, letters: str, other: Tensor, others: str, own: bool) -> _Factor:
        """``own``: the parameter's, which a model may have expanded itself."""
        sizes = dict(zip(others, other.shape, strict=True))
        gone: list[int] = []
        for d in reversed(range(tensor.ndim)):
            broadcast = tensor.shape[d] == 1 and sizes.get(letters[d], 1) > 1
            if broadcast or (own and tensor.shape[d] > 1 and tensor.stride(d) == 0):
                gone.insert(0, d)
        less = tensor
        for d in reversed(gone):
            less = less.select(d, 0)
        left = "".join(c for d, c in enumerate(letters) if d not in gone)
        return cls(less, left, gone, tensor.shape)

    def whole(self, tensor: Tensor) -> Tensor:
        """As the model gave it."""
        for d in self.gone:
            tensor = tensor.unsqueeze(d)
        return tensor.expand(self.shape) if self.gone else tensor

    def moved(self, mark: Mark) -> Mark:
        """The mark of the tensor, less those dimensions."""
        if mark.owner is None:
            return Mark(mark.dim - sum(d < mark.dim for d in self.gone))
        kept = [k for d, k in enumerate(mark.owner.shape) if d not in self.gone]
        return Mark(mark.dim, mark.owner.reshape(kept))


def contract(
    batch: Batch,
    terms: Sequence[str],
    operands: Sequence[Tensor],
    compute: Callable[..., Tensor],
    bias: Tensor | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Any:
    """``scales[0] * einsum(a, b) + scales[1] * bias``; ``terms`` of both operands and the output.

    ``compute(a, b, bias)`` is the function itself.
    """
    found = [roots_of(t, batch) for t in operands]
    if bool(found[0]) == bool(found[1]) or len({*terms[0], *terms[1]}) > len(_ALPHABET):
        return NotImplemented
    at = int(bool(found[1]))  # which operand is the parameter's
    (x, w), (of_x, of_w) = (operands[1 - at], operands[at]), (terms[1 - at], terms[at])
    mark, roots, n = ownership(x, batch), found[at], batch.n_examples
    if constant(x, batch) or not mark.owned or 0 in (*x.shape, *w.shape):
        return NotImplemented
    first, second = _Factor.of(x, of_x, w, of_w, False), _Factor.of(w, of_w, x, of_x, True)
    names = dict(zip(dict.fromkeys(of_x + of_w), _ALPHABET, strict=False))
    short = ("".join(names[c] for c in t) for t in (first.letters, second.letters, terms[2]))
    letters, mark = Letters(*short), first.moved(mark)
    sizes = dict(zip(letters.x + letters.w, (*first.tensor.shape, *second.tensor.shape),
                     strict=True))  # fmt: skip
    lead, rows = _rows(batch, letters, mark, sizes)
    if not letters.sound or rows is None:
        return NotImplemented
    if second.gone:
        w = second.tensor
        set_derived(w, roots)
    sink, bias_sink, sums = watch_sinks(batch, w)[0], None, None
    if bias is not None and (bias_sink := watch_sinks(batch, bias)[0]) is not None:
        like = w.new_empty(1).expand([sizes[c] for c in letters.out])
        sums = shares(batch, _mark_of_output(letters, mark), like, bias.shape)
        if sums is None:
            return NotImplemented
    order, places = split(letters), None
    if sink is not None:
        size = expanded_size(w, roots, n)
        places = None if order is None else _places(w, sink, order, sizes)
        if places is not None and len(places) > _LOOPS and size <= sink.limit:
            places = None
        if places is None and size > sink.limit:
            return refuse([sink, bias_sink], beyond(size, sink.limit))
        if places is None:
            sink = Sink.at(w, roots)
            sink.expect_dense(w)
        for region, _ in places or ():
            sink.roots[0].record.expect("product", region)
    if bias_sink is not None and bias is not None:
        bias_sink.expect_dense(bias)
    plan = Plan(letters, lead, rows, *(order or ("", "", "")), places, sizes)

    def run(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        pair = first.whole(x), second.whole(w)
        return compute(*(pair if at == 1 else reversed(pair)), bias)

    given = cast(first.tensor, w, bias)
    with torch.autocast(x.device.type, enabled=False):
        return ContractTap.apply(*given, run, plan, sink, bias_sink, sums, scales)


def _rows(
    batch: Batch, letters: Letters, mark: Mark, sizes: dict[str, int]
) -> tuple[str, Rows | None]:
    """The letters that are rows, and whose these are; None if the examples lie elsewhere."""
    lead = [c for c in letters.x if c in letters.out and c not in letters.w]
    n, total = batch.n_examples, math.prod(sizes[c] for c in lead)
    if n == 1:
        return "".join(lead), Rows.uniform(1, total)
    if mark.owner is None:
        letter = letters.x[mark.dim]
        if letter not in lead or sizes[letter] % n:
            return "", None
        lead.sort(key=lambda c: c != letter)  # example by example
        return "".join(lead), Rows.uniform(n, total // n)
    owner = mark.owner
    if any(k > 1 and c not in lead for c, k in zip(letters.x, owner.shape, strict=True)):
        return "", None
    owner = owner.reshape([k for c, k in zip(letters.x, owner.shape, strict=True) if c in lead])
    return "".join(lead), batch.rows_of(owner, torch.Size(sizes[c] for c in lead))


def _mark_of_output(letters: Letters, mark: Mark) -> Mark:
    """All that tells examples apart are rows, which the output has too."""
    if mark.owner is None:
        return Mark(letters.out.find(letters.x[mark.dim]))
    kept = [c for c in letters.x if c in letters.out]
    owner = mark.owner.reshape(
        [k for c, k in zip(letters.x, mark.owner.shape, strict=True) if c in letters.out]
    )
    owner = owner.permute([kept.index(c) for c in letters.out if c in kept])
    at = [slice(None) if c in kept else None for c in letters.out]
    return Mark(mark.dim, owner[tuple(at)])


def _places(
    w: Tensor, sink: Sink, order: tuple[str, str, str], sizes: dict[str, int]
) -> list[tuple[Region, bool]] | None:
    """Where the matrices of a stack lie in the parameter; None if they are no views of it."""
    if len(sink.roots) > 1 or sink.roots[0].ids is not None:
        return None
    loop, *matrix = order
    shape, places = [math.prod(sizes[c] for c in part) for part in matrix], []
    for index in itertools.product(*(range(sizes[c]) for c in loop)):
        place = region_of(w[index].reshape(shape), sink.roots[0].tensor)
        if place is None:
            return None
        places.append(place)
    return places


# -- the functions -----------------------------------------------------------------------


def _of_matmul(a: int, b: int) -> tuple[str, str, str]:
    """Terms of ``matmul`` for so many dimensions."""
    batch = "abcdefghijklmnopqrst"[: max(a, b, 2) - 2]
    first = batch[len(batch) - max(a - 2, 0) :] + "xy"[max(2 - a, 0) :]
    second = batch[len(batch) - max(b - 2, 0) :] + ("yz" if b > 1 else "y")
    return first, second, batch + ("x" if a > 1 else "") + ("z" if b > 1 else "")


def matmul(batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    """``matmul``, ``mm``, ``bmm``, ``mv`` and ``dot``."""
    if kwargs or len(args) != 2 or not all(isinstance(a, Tensor) for a in args):
        return NotImplemented
    terms = _of_matmul(args[0].ndim, args[1].ndim)
    return contract(batch, terms, args, lambda a, b, _: func(a, b))


def inner(batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 2 or not all(a.ndim for a in args):
        return NotImplemented
    letters, k = "abcdefghijklmnopqrst", args[0].ndim - 1
    first, second = letters[:k], letters[k : k + args[1].ndim - 1]
    terms = (first + "z", second + "z", first + second)
    return contract(batch, terms, args, lambda a, b, _: func(a, b))


def tensordot(
    batch: Batch, func: Any, a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None
) -> Any:
    if isinstance(dims, Tensor) or out is not None or a.ndim + b.ndim > len(_ALPHABET):
        return NotImplemented
    if isinstance(dims, int):
        over = [list(range(a.ndim - dims, a.ndim)), list(range(dims))]
    else:
        over = [[d] if isinstance(d, int) else list(d) for d in dims]
    first = list(_ALPHABET[: a.ndim])
    second = list(_ALPHABET[a.ndim : a.ndim + b.ndim])
    gone = set()
    for i, k in zip(*over, strict=True):
        second[k % b.ndim] = first[i % a.ndim]
        gone.add(first[i % a.ndim])
    left = "".join(c for c in (*first, *second) if c not in gone)
    terms = ("".join(first), "".join(second), left)
    return contract(batch, terms, (a, b), lambda a, b, _: func(a, b, dims))


def einsum(batch: Batch, func: Any, equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return NotImplemented
    terms = _of_equation(equation, operands)
    if terms is None:
        return NotImplemented
    return contract(batch, terms, operands, lambda a, b, _: func(equation, a, b))


def _of_equation(equation: str, operands: Sequence[Tensor]) -> tuple[str, str, str] | None:
    """Terms without dots; None if they cannot be read."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    letters = {c for c in left if c.isalpha()}
    spare = [c for c in "zyxwvutsrqponmlkjihgfedcbaZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in letters]
    dots = [t.ndim - len(term.replace("...", "")) for t, term in zip(operands, terms, strict=True)]
    shared = "".join(spare[: max(0, *dots)])
    for i, term in enumerate(terms):
        if "..." in term:
            terms[i] = term.replace("...", shared[len(shared) - dots[i] :])
    if not arrow:
        joined = "".join(terms)
        once = sorted(c for c in letters if joined.count(c) == 1)
        right = (shared if "..." in left else "") + "".join(once)
    out = right.replace("...", shared)
    fits = all(len(t) == o.ndim for t, o in zip(terms, operands, strict=True))
    return (terms[0], terms[1], out) if fits else None


_SUMS = {
    "addmm": ("xy", "yz", "xz"),
    "baddbmm": ("bxy", "byz", "bxz"),
    "addbmm": ("bxy", "byz", "xz"),
    "addmv": ("xy", "y", "x"),
}


def added(batch: Batch, func: Any, *args: Any, **kwargs: Any) -> Any:
    """``beta * bias + alpha * product``."""
    terms = _SUMS[func.__name__]
    if len(args) != 3 or kwargs.keys() - {"alpha", "beta"}:
        return NotImplemented
    bias, *factors = args
    if bias.ndim > len(terms[2]):
        return NotImplemented
    scales = float(kwargs.get("alpha", 1)), float(kwargs.get("beta", 1))
    return contract(
        batch, terms, factors, lambda a, b, bias: func(bias, a, b, **kwargs), bias, scales
    )
