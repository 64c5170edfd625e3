"""The look for NaN in each gradient as the backward pass leaves it, while it is in cache.

An update may not begin before all gradients are known to be finite, and reading them for that alone
takes a quarter of the time of an update on all weights (``bench/optim_step.py``). What the backward
pass has just written is read at once instead; the step asks only whether it still is the same.
"""

from __future__ import annotations

import cmath
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# After so many steps in a row in which looking early was of no use it is given up.
PATIENCE = 2


class BackwardLooks:
    """Hooks on some parameters of a host, which remember gradients that were found finite.

    A gradient that was changed, exchanged or accumulated afterwards is not known any more: its
    version in autograd's count says so. Writing to ``grad.data`` or through NumPy escapes that
    count, as it escapes autograd. Where gradients are always changed (clipping multiplies them),
    or several backward passes make one step, looking early is wasted, and ends by itself.

    The hooks do not keep the optimizer alive; :meth:`remove` takes them away.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        # gradient, its version, its place in memory, by the parameter's id
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._taken = self._useless = 0
        self._handles = [p.register_post_accumulate_grad_hook(self._look) for p in params]

    def _look(self, p: Tensor) -> None:
        grad = p.grad
        if grad is None or type(grad) is not Tensor or grad.layout is not torch.strided:
            return
        if torch.compiler.is_compiling() or together_with_others():
            return  # what others contribute arrives later
        self._taken += 1
        if looks_finite(grad.detach()):
            self._known[id(p)] = weakref.ref(grad), grad._version, grad.data_ptr()

    def knows(self, p: Tensor, grad: Tensor) -> bool:
        """This gradient was looked at, and is finite and unchanged."""
        known = self._known.get(id(p))
        return (
            known is not None
            and known[0]() is grad
            and known[1] == grad._version
            and known[2] == grad.data_ptr()
        )

    def stepped(self, gradients: int, known: int) -> None:
        """After a step with so many gradients, of which so many were known."""
        useful = 2 * known >= gradients and self._taken <= gradients
        self._useless = 0 if useful else self._useless + 1
        self._taken = 0
        if self._useless == PATIENCE:
            self.remove()

    def remove(self) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._known.clear()

    @property
    def given_up(self) -> bool:
        """No hook is left."""
        return not self._handles

    def __deepcopy__(self, memo: dict[int, Any]) -> BackwardLooks:
        return BackwardLooks([])  # a copy of a hooked tensor has gradients of its own


def looks_finite(gradient: Tensor) -> bool:
    """No NaN and no infinity in a tensor on the host; False also where a sum overflows though
    every entry is finite, so that a closer look decides. No reading is faster than a sum."""
    return cmath.isfinite(gradient.sum().item())


def together_with_others() -> bool:
    """Gradients may be summed over processes after the backward pass has made them."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()


__all__ = ["PATIENCE", "BackwardLooks", "looks_finite", "together_with_others"]
