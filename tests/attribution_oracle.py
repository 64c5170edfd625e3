"""Whose rows a result has, for every function of PyTorch that its own tests have inputs for.

One example's rows are changed: only what a mark says is that example's may change. Two examples'
rows are changed: if the result is nobody's and no mixing was reported, it is a sum over examples,
so both changes together are the sum of both.

``python -m tests.attribution_oracle 4`` takes four inputs of each function in each situation, and
prints what is wrong. It has a process of its own, since PyTorch's collection of inputs forbids all
that runs beside it to set flags.
"""

from __future__ import annotations

import sys
import warnings
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastgrad.ownership import NOBODY, Mark, mark, marked, tensors_in
from fastgrad.propagation import propagate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

SKIPPED = {
    "empty_like": "its result is not defined",
    "new_empty": "its result is not defined",
    "new_empty_strided": "its result is not defined",
    "empty_strided": "its result is not defined",
    "empty_permuted": "its result is not defined",
    "empty": "its result is not defined",
    "multinomial": "what it draws for a row depends on what it drew before",
    "lu_unpack": "crashes on factors that are not what lu_factor gave",
}
PLACES = [(arg, dim, explicit) for arg in (0, 1) for dim in (0, 1, -1)
          for explicit in (False, True)]  # fmt: skip


class Following(torch.overrides.TorchFunctionMode):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.mixed = n, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if propagate(func, args, kwargs or {}, out, 1, self.n):
            self.mixed |= any(t.requires_grad for t in tensors_in((out,)))
        return out


class Case:
    """A function of one of its tensors, along one dimension of which the examples lie."""

    def __init__(self, op: Any, sample: Any, arg: int, dim: int, explicit: bool) -> None:
        self.op = op
        self.leaves, self.spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        self.at = [i for i, t in enumerate(self.leaves) if isinstance(t, Tensor)][arg]
        self.x: Tensor = self.leaves[self.at]
        self.dim = dim % self.x.ndim
        self.n = self.x.shape[self.dim]
        self.owner = torch.arange(self.n)
        if explicit:
            self.owner = self.owner.roll(1)
        self.mark = Mark(self.dim)
        if explicit:
            shape = [self.n if d == self.dim else 1 for d in range(self.x.ndim)]
            self.mark = Mark(-1, self.owner.view(shape))

    def call(self, x: Tensor, mode: Following | None = None) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [t.clone() if isinstance(t, Tensor) else t for t in self.leaves]
        if mode is not None:
            x = x.clone().requires_grad_(x.is_floating_point()) * 1
            mark(x, 1, self.mark)
        leaves[self.at] = x if mode is not None else x.clone()
        args, kwargs = tree_unflatten(leaves, self.spec)
        if mode is None:
            out = self.op.op(*args, **kwargs)
        else:
            with mode:
                out = self.op.op(*args, **kwargs)
        tensors = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        return [t for t in tensors if t.layout == torch.strided]

    def changed(self, *examples: int) -> Tensor:
        y = self.x.clone()
        for j in examples:
            rows = y.narrow(self.dim, int((self.owner == j).nonzero()), 1)
            noise = torch.rand(rows.shape, generator=torch.Generator().manual_seed(j))
            rows.mul_(0.7).add_(0.05 + 0.1 * noise)
        return y

    def problems(self) -> list[str]:
        mode = Following(self.n)
        try:
            before, alone = self.call(self.x), [self.call(self.changed(j)) for j in range(self.n)]
            both, outs = self.call(self.changed(0, 1)), self.call(self.x, mode)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            return []  # not for such numbers, or not differentiable
        if any([t.shape for t in o] != [t.shape for t in before] for o in (*alone, both, outs)):
            return []
        found = []
        for i, out in enumerate(outs):
            known = marked(out, 1) or NOBODY
            if mode.mixed:
                continue
            if known.owned:
                owner = known.explicit(out, self.n).expand(out.shape)
                wrong = any(
                    bool((_differ(before[i], alone[j][i]) & (owner != j)).any())
                    for j in range(self.n)
                )
                found += ["claims rows of others"] if wrong else []
            elif out.requires_grad:
                one, two = alone[0][i] - before[i], alone[1][i] - before[i]
                left = both[i] - before[i] - one - two
                size = (one.abs() + two.abs()).clamp(min=1e-3)
                fine = torch.isfinite(left)
                if bool((left.abs() > 1e-6 * size)[fine].any()):
                    found.append("mixes without a report")
        return [f"{self.op.name}, examples along {self.dim} of {tuple(self.x.shape)}: {f}"
                for f in found]  # fmt: skip


def _differ(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_floating_point() and not a.is_complex():
        return a != b
    return ~torch.isclose(a, b, rtol=1e-9, atol=1e-10, equal_nan=True)


def cases(op: Any, samples: list[Any], arg: int, dim: int, explicit: bool):
    for sample in samples:
        tensors = [t for t in tree_flatten(((sample.input, *sample.args), sample.kwargs))[0]
                   if isinstance(t, Tensor)]  # fmt: skip
        if len(tensors) <= arg:
            continue
        x = tensors[arg]
        fits = x.is_floating_point() and x.ndim > max(dim, 0) and 2 <= x.shape[dim] <= 6
        if fits and x.numel() < 3000 and x.layout == torch.strided:
            yield Case(op, sample, arg, dim, explicit)


def main(at_most: int) -> int:
    found, tried = set(), 0
    for op in op_db:
        if torch.float64 not in op.dtypes or op.name in SKIPPED:
            continue
        samples = op.sample_inputs("cpu", torch.float64, requires_grad=False)
        samples = list(islice(samples, 4 * at_most))
        for place in PLACES:
            for case in islice(cases(op, samples, *place), at_most):
                tried += 1
                found.update(case.problems())
    print("\n".join(sorted(found)))
    print(f"{tried} situations, {len(found)} misunderstood")
    return 1 if found or tried < 2000 else 0


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main(int(sys.argv[1])))
