"""Exact resume under a Trainer: a partial file in each checkpoint folder, written and read.

A checkpoint folder holds the full weights, the optimizer's state, the schedule and the random
state. What it lacks for a partial model is which blocks are trained, their float32 master copies
and which weights the run began with; the partial file adds that.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastgrad.errors import PartialError
from fastgrad.partial import Partial
from fastgrad.partial_state import load_partial

#: Beside ``model.safetensors`` and ``optimizer.pt`` in each checkpoint folder.
PARTIAL_FILE = "fastgrad_partial.safetensors"


def calling_trainer() -> Trainer | None:
    """The Trainer whose method is being run, however deep; None outside of any.

    An optimizer factory is given the model alone: neither the TrainingArguments nor the folder
    that training resumes from.
    """
    for frame in _frames():
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
    return None


def resumed_folder(trainer: Trainer) -> Path | None:
    """The checkpoint folder that ``trainer`` is resuming from, or None if training is fresh.

    Raises:
        PartialError: if the Trainer's state is that of a checkpoint and the folder is not known.
    """
    if trainer.state.global_step == 0:
        return None
    for frame in _frames():
        if frame.f_locals.get("self") is trainer:
            folder = frame.f_locals.get("resume_from_checkpoint")
            if isinstance(folder, str | os.PathLike):
                return Path(folder)
    raise PartialError(
        f"the Trainer goes on at step {trainer.state.global_step}, and the checkpoint folder is "
        "not known here. Remedy: trainer.train(resume_from_checkpoint=folder) on a new Trainer, "
        "without create_optimizer() before it"
    )


def read_partial(model: nn.Module, folder: Path) -> Partial:
    """The partial model that a checkpoint folder holds, on ``model`` with its weights.

    Raises:
        PartialError: if the folder has no partial file.
    """
    if not (folder / PARTIAL_FILE).is_file():
        raise PartialError(
            f"{folder} has no {PARTIAL_FILE}: which blocks were trained, and their master copies, "
            "are not known, so that training cannot go on exactly. It was written without "
            "sparse_adamw, with save_only_model=True, or its writing was cut short. Remedy: "
            "resume from another checkpoint, or load its weights with from_pretrained and begin "
            "a new run with them"
        )
    return load_partial(model, folder / PARTIAL_FILE)


def check_engine(trainer: Trainer) -> None:
    """Raises PartialError for a Trainer whose engine replaces the model's parameters."""
    for engine in ("fsdp", "deepspeed"):
        if getattr(trainer, f"is_{engine}_enabled", False):
            raise PartialError(
                f"sparse_adamw does not work with the Trainer's {engine} engine, which replaces "
                "the parameters that were selected. Remedy: DistributedDataParallel (torchrun), "
                "or a loop of your own with fully_shard, see docs/distributed.md"
            )


def keep_in_checkpoints(trainer: Trainer, partial: Partial) -> None:
    """From now on the Trainer's checkpoints hold a file of ``partial``, and of no other."""
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, PartialCheckpoints):  # of the model before, under model_init
            trainer.remove_callback(callback)
    trainer.add_callback(PartialCheckpoints(trainer, partial, trainer.state.global_step))


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


class PartialCheckpoints(TrainerCallback):
    """Writes the partial file; put into the Trainer by the optimizer factory itself.

    Args:
        trainer: whose checkpoints are meant.
        partial: what its optimizer trains.
        resumed_at: step of the checkpoint that ``partial`` was read from, 0 for a fresh start.
    """

    def __init__(self, trainer: Trainer, partial: Partial, resumed_at: int) -> None:
        self._trainer = weakref.ref(trainer)
        self.partial = partial
        self._resumed_at, self._saved_at = resumed_at, -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check()
        if state.global_step not in (0, self._resumed_at):
            raise PartialError(
                f"training resumes at step {state.global_step}, and this optimizer was built for "
                "another run: which blocks the checkpoint trains was not read. Remedy: a new "
                "model and a new Trainer, and trainer.train(resume_from_checkpoint=...) as its "
                "first call"
            )
        self._resumed_at, self._saved_at = 0, -1  # the same folder cannot be resumed twice

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check()

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:  # a checkpoint folder is about to be uploaded, before on_save
            self._save(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(args, state)

    def check(self) -> None:
        """Raises PartialError if the partial model was removed: its optimizer trains nothing."""
        next(self.partial.named_parameters(), None)

    def _save(self, args: Any, state: Any) -> None:
        trainer = self._trainer()
        if args.save_only_model or not args.should_save or trainer is None:
            return
        if self._saved_at == state.global_step:
            return
        # Private in Trainer: a hyperparameter search has a folder for each trial.
        run = trainer._get_output_dir(trial=getattr(trainer, "_trial", None))
        folder = Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.partial.save(folder / PARTIAL_FILE)
        self._saved_at = state.global_step
