"""A Trainer callback by which each parameter is updated inside the backward pass."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fastgrad.errors import PartialError
from fastgrad.in_backward import InBackward, step_in_backward

#: In the Trainer's state, which each checkpoint holds.
_STATE = "fastgrad_in_backward"


class StepInBackwardCallback(TrainerCallback):
    """:func:`fastgrad.step_in_backward` in a Trainer, whatever its optimizer::

        Trainer(..., args=TrainingArguments(..., max_grad_norm=0.0),
                optimizer_cls_and_kwargs=sparse_adamw(...),
                callbacks=[StepInBackwardCallback(max_norm=1.0)])

    Without ``max_norm`` the run is that of the ordinary steps with ``max_grad_norm=0``, bit for
    bit. The Trainer's own clipping looks at gradients that are gone by then: what it logs as
    ``grad_norm`` is zero. The running norm is kept in checkpoints.

    Args:
        max_norm, decay, first_norm: of clipping, see :func:`fastgrad.step_in_backward`.

    Attributes:
        handle: what :func:`fastgrad.step_in_backward` returned; None outside of training.

    Raises:
        PartialError: when training begins: for ``max_grad_norm`` above zero, which would do nothing
            in silence; for ``gradient_accumulation_steps`` above one, since the Trainer does not
            say which backward pass is the last one; and what :func:`fastgrad.step_in_backward`
            refuses (a GradScaler and several processes in the first backward pass).
    """

    def __init__(
        self, max_norm: float | None = None, *, decay: float = 0.0, first_norm: float | None = None
    ) -> None:
        self._options: dict[str, Any] = {
            "max_norm": max_norm, "decay": decay, "first_norm": first_norm
        }  # fmt: skip
        self.handle: InBackward | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if args.max_grad_norm:
            raise PartialError(
                f"the Trainer would clip to max_grad_norm={args.max_grad_norm} after the backward "
                "pass, when the gradients have been used and freed: nothing would be clipped. "
                "Remedy: TrainingArguments(max_grad_norm=0.0), and "
                "StepInBackwardCallback(max_norm=...), which clips by the running norm"
            )
        if args.gradient_accumulation_steps > 1:
            raise PartialError(
                f"gradient_accumulation_steps is {args.gradient_accumulation_steps}, and the "
                "first backward pass of a step would update already. Remedy: 1 and larger "
                "batches, or ordinary steps"
            )
        self.handle = step_in_backward(optimizer, **self._options)
        if _STATE in state.stateful_callbacks:
            self.handle.load_state_dict(state.stateful_callbacks[_STATE])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.handle is not None:
            state.stateful_callbacks[_STATE] = self.handle.state_dict()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
