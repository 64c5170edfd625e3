"""The forward pass that is under way, and parts of it that are computed again later.

Functions that the probe sees belong to the latest forward pass of the model, also where the model
has ended and the loss is computed. A checkpoint computes something again inside a backward pass,
when other forward passes may have begun: then they belong to the one that it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgrad.ownership import carry, mark, marked
from fastgrad.records import Batch
from fastgrad.taps import TapMode


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, or differentiation in forward mode. Neither
    knows how to pass a tap, and under vmap the examples are out of sight."""
    transforms = torch._C._functorch.peek_interpreter_stack() is not None
    return transforms or forward_ad._current_level >= 0


class UnderWay:
    """Which batch the functions belong to that ``mode`` sees.

    Args:
        model: the probed model.
        live: gives the batches that still may have a backward pass.
    """

    def __init__(self, model: nn.Module, live: Callable[[], Sequence[Batch]]) -> None:
        self.model, self.live = model, live
        self.mode = TapMode(self.attributable)
        self.batch: Batch | None = None
        self.again = False  # part of a forward pass is computed again
        self._module: tuple[nn.Module, ExitStack] | None = None  # that does so

    def attributable(self) -> Batch | None:
        """The batch to whose examples uses of parameters can be attributed."""
        batch = self.batch
        if batch is None or not batch.n_examples or is_transformed():
            return None
        return batch

    @contextmanager
    def computing_again(self, batch: Batch, count: bool) -> Iterator[None]:
        """A checkpoint computes part of a forward pass again. The autograd engine runs that without
        the caller's function modes."""
        before = self.batch, self.again, batch.counting, batch.nested
        self.batch, self.again, batch.counting, batch.nested = batch, True, count, True
        try:
            with self.mode:
                yield
        finally:
            self.batch, self.again, batch.counting, batch.nested = before

    def begin_again(self, module: nn.Module, batch: Batch, count: bool) -> None:
        """The same, until ``module`` ends."""
        self._module = module, ExitStack()
        self._module[1].enter_context(self.computing_again(batch, count))

    # -- hooks of all modules ------------------------------------------------------------

    def begin_module(self, module: nn.Module, args: Any) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if torch._C._current_graph_task_id() == -1:
            if self.batch is not None:
                self.batch.given[id(module)] = [marked(t, self.batch.index) for t in tensors]
                if torch.is_grad_enabled():
                    self.batch.modules.add(id(module))
            return
        if not torch.is_grad_enabled():
            return
        if not self.again and module is not self.model:
            # In a checkpoint that was not found, as another library's. The engine goes backwards:
            # the latest forward pass that ran this module comes first.
            ran = [b for b in self.live() if id(module) in b.modules - b.recomputed]
            batch = max(ran, key=lambda b: b.index) if ran else self.batch
            if batch is None:
                return
            batch.recomputed.add(id(module))
            self.begin_again(module, batch, count=not ran)
        if self.batch is not None:  # it may have been given copies
            for tensor, known in zip(tensors, self.batch.given.get(id(module), []), strict=False):
                if known is not None and marked(tensor, self.batch.index) is None:
                    mark(tensor, self.batch.index, known)

    def end_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.batch is not None:
            carry(module, args, output, self.batch.index)
        if self._module is not None and module is self._module[0]:
            stack, self._module = self._module[1], None
            stack.close()


__all__ = ["UnderWay", "is_transformed"]
