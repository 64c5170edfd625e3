"""The update of each parameter runs inside the backward pass, as soon as its gradient is complete.

At any moment only the gradients of a few tensors exist, not those of all (the idea of LOMO, arXiv
2306.09782, and of PyTorch's tutorial "optimizer step in backward", for any optimizer whose state
is kept per parameter).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fastgrad.errors import NonFiniteGradientError, PartialError
from fastgrad.optim import SparseAdamW
from fastgrad.sharded import is_sharded
from fastgrad.step_guard import ENDED, HELD, IN_BACKWARD, ensure_hooks, write_through
from fastgrad_kernels.layout import sum_of_squares

#: Added to a norm that is divided by, as in torch.nn.utils.clip_grad_norm_.
_TINY = 1e-6


def step_in_backward(
    optimizer: Optimizer,
    max_norm: float | None = None,
    *,
    decay: float = 0.0,
    first_norm: float | None = None,
) -> InBackward:
    """Update each parameter of ``optimizer`` inside ``backward()``, and free its gradient::

        optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-3)
        fg.step_in_backward(optimizer)
        for batch in loader:                  # the loop stays as it is
            model(**batch).loss.backward()    # updates happen here
            optimizer.step()                  # counts the iteration; hooks and schedules see it
            scheduler.step()
            optimizer.zero_grad()

    Without ``max_norm`` the result is that of the ordinary loop, bit for bit. ``optimizer.step()``
    has to be called once per backward pass, as before; it updates only what still has a gradient.
    The learning rate is the one at the time of the backward pass.

    **Clipping.** The norm of all gradients is known only when they have all been computed, and by
    then most of them are gone. So this is *not* ``clip_grad_norm_``: with ``max_norm`` the gradient
    of each tensor is multiplied by ``min(1, max_norm / N, max_norm / n)``, where ``n`` is its own
    norm and ``N`` the running norm of the iterations *before* this one: ``N <- decay * N +
    (1 - decay) * norm of all gradients, unclipped``. With ``decay=0`` it is the norm of the
    previous iteration. A sudden spike is therefore limited to ``max_norm`` per tensor, not in all
    (at most ``max_norm * sqrt(number of tensors)``), and scales down the iteration after it. Where
    norms change slowly it comes close to ordinary clipping. The first iteration has no ``N``:
    unless ``first_norm`` is given, its gradients are kept, and clipped exactly by their common norm
    in ``optimizer.step()``. ``clip_grad_norm_`` called by the loop finds no gradients and does
    nothing.

    **Accumulation.** Wrap all backward passes of an iteration but the last one in ``with
    handle.accumulate():``; gradients are kept there, and the last pass updates with the sums. A
    second backward pass without it raises, since the parameters have been updated already.

    Args:
        optimizer: of one partial model or of any parameters; ``torch.optim``'s or your own, as long
            as it keeps its state per parameter.
        max_norm: see above; None for no clipping.
        decay: of the running norm, in [0, 1).
        first_norm: ``N`` of the first iteration.

    Returns:
        a handle: :meth:`InBackward.accumulate`, :meth:`InBackward.remove`, ``state_dict()``.

    Raises:
        ValueError: for impossible numbers.
        PartialError: for what would not be exact: an optimizer that keeps counts for all parameters
            together or needs a closure, stochastic rounding, sharded parameters; in the first
            backward pass, before any update, for a GradScaler in use and for
            DistributedDataParallel around the parameters.
        NonFiniteGradientError: from ``backward()``, for a gradient with NaN or infinity (with
            ``max_norm``, or where the optimizer looks for them). That tensor is not updated; the
            message says how many had been before it in this pass.
    """
    inner: Any = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):  # accelerate's wrapper
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise PartialError(
            f"step_in_backward takes a torch optimizer, not {type(inner).__name__}"
        )
    for what, value in (("max_norm", max_norm), ("first_norm", first_norm)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{what} is {value}, not a positive number")
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}, not in [0, 1)")
    if max_norm is None and (decay or first_norm is not None):
        raise ValueError("decay and first_norm are of clipping, which needs max_norm")
    if IN_BACKWARD in inner.__dict__:
        raise PartialError(
            "this optimizer steps in the backward pass already. Remedy: .remove() that first"
        )
    return InBackward(inner, max_norm, decay, first_norm)


class InBackward:
    """What :func:`step_in_backward` set up.

    Attributes:
        optimizer: the optimizer.
        norm: running norm that the next iteration is clipped by, or None.
        updated: ids of the parameters that were updated since the last ``optimizer.step()``.
    """

    def __init__(
        self, optimizer: Optimizer, max_norm: float | None, decay: float, first_norm: float | None
    ) -> None:
        self.optimizer, self.max_norm, self.decay = optimizer, max_norm, decay
        self.norm = first_norm
        self.updated: set[int] = set()
        self._squares: list[Tensor] = []
        self._holding = 0
        self._busy = False
        self._hooks: list[Any] = []
        self._raw: Any = getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)
        self._check_optimizer()
        ensure_hooks()  # one of them calls finish()
        optimizer.__dict__[IN_BACKWARD] = self
        self._before = optimizer.register_step_pre_hook(self._before_step)
        self._after = optimizer.register_step_post_hook(self._after_step)
        self.rehook()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside keep their gradients; none of them updates anything."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1

    def remove(self) -> None:
        """Back to ordinary steps."""
        for hook in (*self._hooks, self._before, self._after):
            hook.remove()
        self._hooks = []
        self.optimizer.__dict__.pop(IN_BACKWARD, None)

    def rehook(self) -> None:
        """Follow the optimizer's parameters, after they were changed; ``reselect`` calls this."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._looked = [], False
        self._places: dict[int, tuple[int, int]] = {}
        self.updated.clear()
        for group in self.optimizer.param_groups:
            if group.get("stochastic_rounding"):
                raise PartialError(
                    "stochastic rounding draws its numbers by the place of a tensor among all, and "
                    "here each comes alone. Remedy: float32 masters (master_dtype=torch.float32)"
                )
            for p in group["params"]:
                if is_sharded(p):
                    raise PartialError(
                        "gradients of sharded parameters are reduced after they are complete. "
                        "Remedy: ordinary steps under fully_shard"
                    )
        self._held: dict[int, Any] = {}  # by which partial model each whole weight is trained
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                self._held[id(p)] = p.__dict__.get(HELD)
                if p.requires_grad:
                    self._hooks.append(p.register_post_accumulate_grad_hook(self._arrived))

    def state_dict(self) -> dict[str, Any]:
        """The running norm, for an exact resume."""
        return {"norm": self.norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`.

        Raises:
            PartialError: if it is no such state.
        """
        norm = state.get("norm", self)
        if norm is not None and not isinstance(norm, float):
            raise PartialError("this is not the state of step_in_backward")
        self.norm = norm

    # -- in the backward pass ----------------------------------------------------------------

    def _arrived(self, p: Tensor) -> None:
        """A gradient is complete."""
        if ENDED in p.__dict__ or p.grad is None:  # a suspended model is being probed
            return
        if not self._looked:
            self._look_around()
        if p.__dict__.get(HELD) is not self._held[id(p)]:
            raise PartialError(
                f"{self._name(p)} was trained by a partial model that was removed or made anew, "
                "and the updates in the backward pass that were set up before would go on beside "
                "the new ones. Remedy: call remove() on what step_in_backward returned, then "
                "step_in_backward(the new optimizer)"
            )
        if id(p) in self.updated:
            raise PartialError(
                f"a second gradient of {self._name(p)} since the last optimizer.step(): the "
                "parameter was updated with the first one. Remedy: call optimizer.step() after "
                "each backward pass; to accumulate gradients wrap all passes but the last one in "
                "`with handle.accumulate():`; with activation checkpointing pass "
                "use_reentrant=False"
            )
        if self._holding or (self.max_norm is not None and self.norm is None):
            return
        if self._looks_like_a_checkpoint(p):
            return  # left to step()
        if self.max_norm is not None:
            self._clip(p)
        self._update(p)
        p.grad = None
        self.updated.add(id(p))

    def _looks_like_a_checkpoint(self, p: Tensor) -> bool:
        """SparseAdamW takes a first step at rate zero for the initialisation of its state, if all
        gradients are zero, and does not count it: one gradient alone does not tell, nor one group
        at rate zero."""
        optimizer = self.optimizer
        return (
            isinstance(optimizer, SparseAdamW)
            and not optimizer.state
            and not bool(self._find(p)[0]["lr"] != 0)
            and p.grad is not None
            and not bool(p.grad.any())
        )

    @torch.no_grad()
    def _update(self, p: Tensor) -> None:
        """The optimizer's own step, seeing this parameter only, without the step's hooks."""
        groups = self.optimizer.param_groups
        group, place = self._find(p)
        alone = {**group, "params": [p]}
        if "param_names" in group:
            alone["param_names"] = group["param_names"][place : place + 1]
        self.optimizer.param_groups, self._busy = [alone], True
        try:
            self._raw(self.optimizer)
            write_through(self.optimizer, p)
        except NonFiniteGradientError as error:
            raise self._not_finite(error.names) from None
        finally:
            self.optimizer.param_groups, self._busy = groups, False

    @torch.no_grad()
    def _clip(self, p: Tensor) -> None:
        """Scale the gradient by the running norm and by its own."""
        assert self.max_norm is not None
        assert self.norm is not None
        assert p.grad is not None
        square = sum_of_squares(p.grad)
        own = math.sqrt(float(square))
        if not math.isfinite(own):
            raise self._not_finite([self._name(p)])
        self._squares.append(square)
        factor = self.max_norm / (max(self.norm, own) + _TINY)
        if factor < 1:
            p.grad.mul_(factor)

    def _not_finite(self, names: list[str]) -> NonFiniteGradientError:
        done, total = len(self.updated), sum(len(g["params"]) for g in self.optimizer.param_groups)
        self.updated.clear()  # whoever goes on begins a new iteration
        self._squares.clear()
        return NonFiniteGradientError(
            names,
            f"This tensor was not updated; {done} of {total} had been, earlier in this backward "
            "pass.",
        )

    def _look_around(self) -> None:
        """Before the first update: is there what would make it wrong?"""
        mine = {id(p) for g in self.optimizer.param_groups for p in g["params"]}
        for o in gc.get_objects():
            kind = type(o)
            if issubclass(kind, torch.amp.GradScaler) and o.is_enabled() and o._scale is not None:
                raise PartialError(
                    "a GradScaler is in use: it looks for infinities in all gradients before a "
                    "step, and here there is one gradient at a time. Remedy: bfloat16 without a "
                    "scaler, or ordinary steps"
                )
            if issubclass(kind, nn.parallel.DistributedDataParallel) and any(
                id(p) in mine for p in o.parameters()
            ):
                raise PartialError(
                    "DistributedDataParallel averages gradients over processes after they are "
                    "complete; updates in the backward pass would come before that. Remedy: "
                    "ordinary steps under DistributedDataParallel"
                )
        self._looked = True

    # -- optimizer.step() --------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._busy:  # a step that calls that of its base class
            return
        if kwargs.get("closure") is not None or any(a is not None for a in args[1:]):
            raise PartialError(
                "a closure is called inside the step, after which nothing is left to update. "
                "Remedy: loss.backward(), then optimizer.step()"
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise PartialError("a GradScaler is in use. Remedy: bfloat16, or ordinary steps")
        if self.max_norm is None:
            return
        left = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if self.norm is None:
            self._clip_together(left)
            return
        for p in left:
            self._clip(p)

    @torch.no_grad()
    def _clip_together(self, params: list[Tensor]) -> None:
        """All gradients are at hand: by their common norm, exactly."""
        assert self.max_norm is not None
        squares = [sum_of_squares(p.grad) for p in params if p.grad is not None]
        bad = [p for p, s in zip(params, squares, strict=True) if not math.isfinite(float(s))]
        if bad:
            raise NonFiniteGradientError(
                [self._name(p) for p in bad], "No parameter and no state was changed."
            )
        self._squares += squares
        factor = self.max_norm / (_root(squares) + _TINY)
        if factor < 1:
            for p in params:
                assert p.grad is not None
                p.grad.mul_(factor)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._busy:
            return
        if self._squares:
            norm = _root(self._squares)
            self.norm = norm if self.norm is None else (
                self.decay * self.norm + (1 - self.decay) * norm
            )  # fmt: skip
            self._squares = []

    def finish(self) -> None:
        """An iteration is over; called after all hooks of its step."""
        if not self._busy:
            self.updated.clear()

    # -- what it works with ------------------------------------------------------------------

    def _check_optimizer(self) -> None:
        """Each group makes a step of a zero gradient, on a copy: only states may change."""
        optimizer, kind = self.optimizer, type(self.optimizer)
        if isinstance(optimizer, LBFGS):
            raise PartialError("LBFGS needs all gradients together. Remedy: ordinary steps")
        if kind is SparseAdamW or kind.__module__.startswith("torch.optim."):
            return
        for group in optimizer.param_groups:
            if not group["params"]:
                continue
            smallest = min(group["params"], key=lambda p: p.numel())
            trial = nn.Parameter(torch.zeros_like(smallest))
            trial.grad = torch.zeros_like(trial)
            copy = dict(group)
            before = _numbers(copy), _numbers(optimizer.__dict__)
            groups, alone = optimizer.param_groups, {**copy, "params": [trial]}
            alone.pop("param_names", None)
            optimizer.param_groups = [alone]
            try:
                self._raw(optimizer)
            except TypeError as error:
                raise PartialError(
                    f"{kind.__name__} cannot make a step of one parameter: {error}. Remedy: "
                    "ordinary steps"
                ) from error
            finally:
                optimizer.param_groups = groups
                optimizer.state.pop(trial, None)
            after = _numbers(alone), _numbers(optimizer.__dict__)
            for was, now in zip(before, after, strict=True):
                changed = [key for key in now if was.get(key) != now[key]]
                if changed:
                    raise PartialError(
                        f"{kind.__name__} keeps {changed[0]!r} for all parameters together and "
                        "changes it in each step; here each parameter makes a step of its own. "
                        "Remedy: ordinary steps"
                    )

    def _find(self, p: Tensor) -> tuple[dict[str, Any], int]:
        """The group that holds the parameter, and its place there."""
        groups = self.optimizer.param_groups
        found = self._places.get(id(p))
        if found is None or groups[found[0]]["params"][found[1]] is not p:
            self._places = {
                id(q): (i, j) for i, g in enumerate(groups) for j, q in enumerate(g["params"])
            }
            found = self._places[id(p)]
        return groups[found[0]], found[1]

    def _name(self, p: Tensor) -> str:
        group, place = self._find(p)
        if "param_names" in group:
            return str(group["param_names"][place])
        return str(p.__dict__.get("_fastgrad_name", f"a parameter of shape {tuple(p.shape)}"))


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, and small tensors as numbers, which may be counted up in place."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            found[key] = float(value)
        elif type(value) in (int, float):
            found[key] = value
    return found


def _root(squares: list[Tensor]) -> float:
    return math.sqrt(math.fsum(float(s) for s in squares))
