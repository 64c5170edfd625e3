"""What every optimizer's step is asked before it runs, and what it leaves behind afterwards.

PyTorch calls these for each ``torch.optim.Optimizer`` of the process, so that any of them can train
a partial model, and none of them does nothing in silence.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fastgrad.errors import PartialError
from fastgrad.packed import frozen_by_others

#: Marks on tensors: the name of what is trained; why it is not trained any more.
NAME, ENDED = "_fastgrad_name", "_fastgrad_ended"
#: Marks on an optimizer: why it must not step; its updates in the backward pass, if so.
SUPERSEDED, IN_BACKWARD = "_fastgrad_superseded", "_fastgrad_in_backward"
#: Mark on a weight that is trained as it stands: the modules that hold it.
HELD = "_fastgrad_held"
#: Mark on what is trained: the ways from the model to the modules that hold it.
REACH = "_fastgrad_reach"
#: Mark on a gradient: its version when an optimizer made a step with it.
STEPPED = "_fastgrad_stepped"

REMOVED = (
    "was trained by a partial model that was removed: this tensor is no longer part of the model, "
    "a step would change nothing. Remedy: call make_partial again, or go on with the model's own "
    "parameters, and build a new optimizer"
)
DESELECTED = (
    "was re-selected without this optimizer: the tensor that it holds is no longer part of the "
    "model. Remedy: pass the optimizer to reselect(), or build a new one from "
    "partial.parameters()"
)
REPLACED = (
    "is trained, and no module that holds it is part of the model any more: it was replaced or "
    "deleted after make_partial, so that a step would train what nobody calls. Remedy: replace "
    "modules before make_partial, or call remove() on the Partial and make the model partial anew"
)
BEFORE = (
    "was built on the model's parameters before make_partial, which froze them: it trains none of "
    "the selected blocks. Remedy: build the optimizer after make_partial, on partial.parameters()"
)
NOT_TOLD = (
    "holds weights that were re-selected without it. Remedy: pass the optimizer to reselect(), or "
    "build a new one from partial.parameters()"
)
SUSPENDED = (
    "is trained by a partial model that is suspended; a step would change the weights that are "
    "being looked at. Remedy: leave the block of suspended() first"
)

_hooks: list[Any] = []


def ensure_hooks() -> None:
    """Register the hooks, once in a process."""
    if not _hooks:
        # Whatever optimizer of the process is compiled, they stay what they are: Python that looks
        # at marks. (torch.compiler.disable would import the compiler here and now.)
        uncompiled = torch._disable_dynamo
        _hooks.append(register_optimizer_step_pre_hook(uncompiled(_before_step)))
        _hooks.append(register_optimizer_step_post_hook(uncompiled(_after_step)))


def end(tensor: Tensor, why: str) -> None:
    """From now on an optimizer that steps with ``tensor`` is told why it must not."""
    tensor.__dict__[ENDED] = why


def resume(tensor: Tensor) -> None:
    """Take back :func:`end`."""
    tensor.__dict__.pop(ENDED, None)


def optimizers_of(parameters: Iterable[Tensor]) -> list[Optimizer]:
    """Every optimizer of the process that holds one of these tensors.

    PyTorch keeps no list of them; the garbage collector does. Costs a walk over all objects, some
    tenths of a second.
    """
    wanted = {id(p) for p in parameters}
    return [
        o
        for o in gc.get_objects()
        # by its type: to ask some proxies for their class would import what they stand for
        if issubclass(type(o), Optimizer)
        and any(id(p) in wanted for g in o.__dict__.get("param_groups", ()) for p in g["params"])
    ]


def supersede(optimizers: Iterable[Optimizer], why: str) -> None:
    """From now on these optimizers are told why they must not step."""
    for optimizer in optimizers:
        optimizer.__dict__[SUPERSEDED] = f"this {type(optimizer).__name__} {why}"


def restore(optimizers: Iterable[Optimizer]) -> None:
    """Take back :func:`supersede`: the model is not partial any more."""
    for optimizer in optimizers:
        optimizer.__dict__.pop(SUPERSEDED, None)


def is_pending(parameter: Tensor) -> bool:
    """Holds a gradient that no optimizer has made a step with."""
    grad = parameter.grad
    if grad is None or grad.__dict__.get(STEPPED) == grad._version:
        return False
    return bool(grad.count_nonzero())  # zeroed in place: nothing to be lost


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Raises PartialError where a step would do nothing, or harm."""
    if SUPERSEDED in optimizer.__dict__:
        raise PartialError(optimizer.__dict__[SUPERSEDED])
    models = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            marks = p.__dict__
            if NAME not in marks:
                continue
            if ENDED in marks:
                raise PartialError(f"{marks[NAME]} {marks[ENDED]}")
            if HELD in marks and (why := marks[HELD].lost(p)) is not None:
                raise PartialError(f"{marks[NAME]} {why}")
            blocks = marks.get("_fastgrad_blocks")
            if not p.requires_grad and (blocks is None or blocks.watched):
                raise PartialError(frozen_by_others(marks[NAME]))
            models.add(marks.get(REACH))
    for reach in models:
        if reach is not None and (name := reach.lost()) is not None:
            raise PartialError(f"{name} {REPLACED}")


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """What the step changed appears in the full weights.

    A version counter cannot tell: PyTorch's fused updates do not count up.
    """
    done = getattr(optimizer, "_fastgrad_written", ())
    early = optimizer.__dict__.get(IN_BACKWARD)
    for group in optimizer.param_groups:
        for p in group["params"]:
            marks = p.__dict__
            if NAME not in marks:
                continue
            if p.grad is not None:
                p.grad.__dict__[STEPPED] = p.grad._version
            blocks = marks.get("_fastgrad_blocks")
            if blocks is None or id(blocks) in done:
                continue
            if early is None or id(p) not in early.updated or p.grad is not None:
                blocks.sync()
    if early is not None:
        early.finish()


def write_through(optimizer: Optimizer, parameter: Tensor) -> None:
    """:func:`_after_step` for one parameter, after an update of it alone."""
    blocks = parameter.__dict__.get("_fastgrad_blocks")
    if blocks is not None and id(blocks) not in getattr(optimizer, "_fastgrad_written", ()):
        with torch.no_grad():
            blocks.sync()
