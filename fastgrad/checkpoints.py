"""Activation checkpoints: what they compute again in the backward pass meets the same taps.

The autograd engine runs a backward pass without the caller's function modes, so a function that a
checkpoint computes again there would pass no tap. Each function of a forward pass therefore asks
under which checkpoints it runs, and these are given another function to call: one that brings the
taps back, for the batch that it belongs to, and what is known of the arguments.

PyTorch has no interface for this. Checkpoints are found among the local variables of the callers:
nothing else knows their arguments. Those of another kind, or of a version of PyTorch that names
things otherwise, are not found; then the probe notices modules that run in a backward pass.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint as checkpoints

from fastgrad.derived import for_a_copy
from fastgrad.ownership import mark
from fastgrad.records import Batch

_PREFIX = "_fastgrad_"  # of all that this library remembers on a tensor


def _code(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)


_NOT_REENTRANT = _code(checkpoints.checkpoint)
_REENTRANT = _code(getattr(getattr(checkpoints, "CheckpointFunction", None), "forward", None))


def under_checkpoint(batch: Batch) -> None:
    """Prepare the checkpoints that a function of the forward pass runs under, if there are any."""
    kept = None
    if torch.is_grad_enabled():  # a reentrant checkpoint runs without gradients
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is None:
            return
        kept = _kept_by(hooks[0])
        known = getattr(kept, "recompute_fn", None)
        if isinstance(known, Recomputation) and known.batch is batch:
            return
    caller: FrameType | None = sys._getframe(1)
    # what is computed again runs under checkpoints that were found the first time
    while caller is not None and caller.f_code is not Recomputation.__call__.__code__:
        if caller.f_code is _REENTRANT:
            its = caller.f_locals
            if _prepare(its.get("ctx"), "run_function", its.get("args", ()), batch, first=True):
                return  # and then all around it are
        elif caller.f_code is _NOT_REENTRANT:
            inside = getattr(caller.f_locals.get("gen"), "gi_frame", None)
            its = {} if inside is None else inside.f_locals
            if _prepare(its.get("new_frame"), "recompute_fn", its.get("args", ()), batch):
                return
        caller = caller.f_back
    _prepare(kept, "recompute_fn", (), batch)  # a checkpoint made of a module's hooks


def _kept_by(hook: Any) -> Any:
    """What a checkpoint that is not reentrant keeps, from its hook for saved tensors."""
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    return hook.__closure__[names.index("frame")].cell_contents if "frame" in names else None


def _prepare(
    keeper: Any, name: str, args: Sequence[Any], batch: Batch, first: bool = False
) -> bool:
    """``keeper`` has under this ``name`` what the checkpoint will compute again. True if it was
    prepared before."""
    run = getattr(keeper, name, None)
    if isinstance(run, Recomputation):
        if run.batch is batch:
            return True
        run = run.run  # a batch began inside: the model itself is called there
    if callable(run):
        setattr(keeper, name, Recomputation(run, args, batch, first))
    return False


class Recomputation:
    """What a checkpoint calls in the backward pass: ``run``, under the taps of ``batch``.

    ``first``: it is reentrant. Its forward pass ran without gradients, so the uses of parameters
    count only now, and its arguments will be detached.
    """

    def __init__(
        self, run: Callable[..., Any], args: Sequence[Any], batch: Batch, first: bool
    ) -> None:
        self.run, self.batch, self.first = run, batch, first
        self.args = [_Argument(a, batch, first) if isinstance(a, Tensor) else None for a in args]

    def __call__(self, *args: Any) -> Any:
        batch, given = self.batch, list(args)
        assert batch.again is not None
        with _inputs_marked(batch), batch.again(batch, self.first):
            # some versions of PyTorch put an argument of their own first
            for i, known in enumerate(self.args, len(given) - len(self.args)):
                if known is not None:
                    given[i] = known.restored(given[i])
            return self.run(*given)


class _Argument:
    """What the forward pass knows of a tensor that a checkpoint may hand out as a copy."""

    def __init__(self, tensor: Tensor, batch: Batch, detached: bool) -> None:
        # gradients of a detached copy are handed on to the parameter by the checkpoint itself
        known = not detached and batch.lookup(tensor) is not None
        self.parameter = tensor if known else None
        self.memory = _memory(tensor)
        if detached:
            self.memory |= for_a_copy(tensor, batch)

    def restored(self, copy: Tensor) -> Tensor:
        if self.parameter is not None:
            return self.parameter
        vars(copy).update(self.memory)
        return copy


def _memory(tensor: Tensor) -> dict[str, Any]:
    return {name: value for name, value in vars(tensor).items() if name.startswith(_PREFIX)}


@contextmanager
def _inputs_marked(batch: Batch) -> Iterator[None]:
    """A later forward pass with the same inputs has marked them as its own."""
    inputs = [(tensor, found) for ref, found in batch.inputs if (tensor := ref()) is not None]
    others = [(tensor, _memory(tensor)) for tensor, _ in inputs]
    for tensor, found in inputs:
        mark(tensor, batch.index, found)
    try:
        yield
    finally:
        for tensor, memory in others:
            vars(tensor).update(memory)
