"""A Trainer callback that meters training, and stops it when a resource buys too little."""

from __future__ import annotations

import dataclasses
import os
import warnings
import weakref
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from fastgrad.errors import FastgradError, ResourceError
from fastgrad.integrations.trainer_checkpoints import calling_trainer
from fastgrad.meter import Meter
from fastgrad.meter_log import finite, read_file, read_state

#: In the Trainer's state, which each checkpoint holds.
_STATE = "fastgrad_meter"


class MeterCallback(TrainerCallback):
    """Meters each optimizer step, and checks at each evaluation what was gained.

        callback = MeterCallback(fg.Meter(eta=1e-4, resource="joules"), metric="loss")
        Trainer(..., callbacks=[callback])           # with eval_strategy="steps" or "epoch"

    Each check adds flat numbers to the Trainer's log, and so to what it reports to:
    ``meter/psi``, ``meter/spent/<resource>`` and ``meter/gain_per/<resource>``. Psi is the metric,
    or minus it where less is better. With ``eta`` training stops when the last checks each gained
    less, as it does under ``EarlyStoppingCallback``, and ``meter/stop`` is 1. Evaluation, saving
    and the loading of data are not in what is spent.

    Checkpoints hold the meter: a resumed run adds to what was spent up to its checkpoint. Steps
    that were taken after it and are lost are not in the sum; if the meter has a ``log``, what they
    took by the last check in it stands in ``meter.sessions`` as ``discarded``.

    In a run of several processes each one meters itself, process 0 writes the log and what is
    resumed from, and its verdict stops all.

    Args:
        meter: options as wanted; the callback begins its steps and makes its checks.
        metric: name of an evaluation metric, with or without ``eval_``; by default the
            ``metric_for_best_model`` of the TrainingArguments.
        greater_is_better: of the metric; by default as the Trainer has it: its argument for
            ``metric_for_best_model``, else unless the name ends in ``loss``.

    Attributes:
        meter: the :class:`fastgrad.Meter`; a new one with its options if training begins anew.

    Raises:
        FastgradError: when training begins, without a metric, or with a stopping rule and no
            evaluation; after an evaluation without that metric, naming those that there are.
    """

    def __init__(
        self,
        meter: Meter | None = None,
        *,
        metric: str | None = None,
        greater_is_better: bool | None = None,
    ) -> None:
        self.meter = Meter() if meter is None else meter
        self.metric, self.greater_is_better = metric, greater_is_better
        self._seen: set[str] = set()
        self._found = False

    # -- beginning -------------------------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        _close_left_open()
        self._name(args)
        if self.meter.eta is not None and str(getattr(args.eval_strategy, "value", "no")) == "no":
            raise FastgradError(
                "the meter's stopping rule is asked at each evaluation, and this Trainer does none "
                "(eval_strategy='no'). Remedy: eval_strategy='steps', or a Meter without eta"
            )
        if args.n_gpu > 1:
            raise FastgradError(
                f"MeterCallback meters one GPU of each process, and this Trainer runs {args.n_gpu} "
                "in one (DataParallel). Remedy: torchrun, or CUDA_VISIBLE_DEVICES with one GPU"
            )
        saved = state.stateful_callbacks.get(_STATE)
        if saved is not None:
            self.meter = self._anew(args)
            self.meter.load_state_dict(saved)
            self._say_what_was_lost()
        elif self.meter.steps:  # a second training, or another trial of a search
            self.meter = self._anew(args)
        elif not self.meter.device_given and self.meter.device != str(args.device):
            # Known only now, under torchrun.
            checks = self.meter.checks
            self.meter = self._anew(args)
            self.meter.checks = checks
        if saved is None and state.global_step:
            self.meter.sessions[-1]["unmetered_steps"] = state.global_step
        if not state.is_world_process_zero:
            self.meter.log = None
        if model is not None and optimizer is not None:
            self.meter.watch(model, optimizer)

    def _anew(self, args: Any) -> Meter:
        """A meter of the same options that has measured nothing, on the Trainer's device unless
        one was given."""
        fresh: dict[str, Any] = {
            "checks": [], "steps": 0, "spent": {}, "modes": {}, "sessions": [],
            "device": self.meter.device if self.meter.device_given else str(args.device),
        }  # fmt: skip
        return dataclasses.replace(self.meter, **fresh)

    def _say_what_was_lost(self) -> None:
        meter = self.meter
        if meter.log is None or not os.path.exists(meter.log):
            return
        logged = read_state(read_file(meter.log), str(meter.log))
        if logged["steps"] > meter.steps:
            meter.sessions[-1]["discarded"] = {
                "steps": logged["steps"] - meter.steps,
                **{n: logged["spent"][n] - v for n, v in meter.spent.items()
                   if n in logged["spent"] and n != "peak_bytes"},
            }  # fmt: skip

    def _name(self, args: Any) -> tuple[str, bool]:
        """The metric's key in what an evaluation gives, and whether more of it is better."""
        metric = self.metric or args.metric_for_best_model
        if metric is None:
            raise FastgradError(
                "MeterCallback is not told which metric to look at. Remedy: "
                "MeterCallback(metric='loss'), or metric_for_best_model in the TrainingArguments"
            )
        better = self.greater_is_better
        if better is None and self.metric in (None, args.metric_for_best_model):
            better = args.greater_is_better
        if better is None:
            better = not metric.endswith("loss")
        return metric if metric.startswith("eval_") else f"eval_{metric}", better

    # -- steps -----------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look_for_metric(args)
        self.meter.begin_step()
        _OPEN.add(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _OPEN.discard(self)
        self.meter.end_step(args.gradient_accumulation_steps)
        state.stateful_callbacks[_STATE] = self.meter.state_dict()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look_for_metric(args)
        if self.meter.log is not None and self.meter.steps:
            self.meter.save(self.meter.log)

    # -- checks ----------------------------------------------------------------------------

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        key, better = self._name(args)
        if key not in metrics:  # with several evaluation sets each one comes here
            self._seen.update(metrics)
            return
        self._found = True
        value = metrics[key]
        stop = self.meter.eta is not None and not finite(value)
        if not finite(value):
            warnings.warn(
                f"{key} is {value} at step {state.global_step}: no check of the meter"
                + (", and training stops, as it buys nothing any more" if stop else ""),
                stacklevel=2,
            )
            entry = {"meter/not_finite": 1.0}
        else:
            check = self.meter.check(float(value) if better else -float(value))
            entry = {"meter/psi": check.psi}
            entry |= {f"meter/spent/{n}": v for n, v in check.spent.items()}
            entry |= {f"meter/gain_per/{n}": v for n, v in check.gain_per.items() if v is not None}
            stop = self.meter.should_stop
        if self.meter.eta is not None and _one_verdict(stop, args):
            control.should_training_stop = True
            entry["meter/stop"] = 1.0
        state.stateful_callbacks[_STATE] = self.meter.state_dict()
        trainer = calling_trainer()
        if trainer is not None and trainer.state is state:
            trainer.log(entry)
        else:
            state.log_history.append({**entry, "step": state.global_step})

    def _look_for_metric(self, args: Any) -> None:
        """After the first evaluation, all sets of which were seen."""
        if self._seen and not self._found:
            key, _ = self._name(args)
            raise FastgradError(
                f"the evaluation gives no {key!r}, which MeterCallback was to look at; it gives "
                f"{', '.join(sorted(self._seen))}. Remedy: MeterCallback(metric=...), one of these"
            )


#: Callbacks with a step under way. A training that raised leaves it open, and with it the counter
#: of operations, which sees whatever PyTorch does; the next training of any Trainer closes it.
_OPEN: weakref.WeakSet[MeterCallback] = weakref.WeakSet()


def _close_left_open() -> None:
    for callback in list(_OPEN):
        _OPEN.discard(callback)
        callback.meter.drop_step()


def _one_verdict(stop: bool, args: Any) -> bool:
    """That of process 0: clocks differ, and all have to stop together."""
    if args.world_size <= 1:
        return stop
    if not (dist.is_available() and dist.is_initialized()):
        raise ResourceError(
            f"this run has {args.world_size} processes and no torch.distributed, through which "
            "they would agree on when to stop. Remedy: start it with torchrun or accelerate launch"
        )
    flag = torch.tensor([stop], dtype=torch.int32, device=args.device)
    dist.broadcast(flag, src=0)
    return bool(flag.item())
