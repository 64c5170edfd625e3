"""One arm in a process of its own: ``python -m fastgrad.quickstart.worker spec.json``.

Its peak memory and its time are then its own. Progress goes to standard output, one JSON object
per line; the result goes to the file that the spec names.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import fastgrad as fg
from fastgrad.blueprint_schema import finite_or_none
from fastgrad.files import write_text
from fastgrad.quickstart import measure
from fastgrad.quickstart.arms import Prepared, prepare
from fastgrad.quickstart.settings import THREADS, Spec, next_rate

WARM_UP = 0.1  # share of the steps
CLIP = 1.0
MEASURED_STEPS = 4  # state exists from the first step on, so the second has the peak


def data_order(n_rows: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """Row numbers of every step's batch: the same for all arms of one seed."""
    generator = torch.Generator().manual_seed(seed)
    need, rows = batch * steps, torch.empty(0, dtype=torch.int64)
    while len(rows) < need:
        rows = torch.cat([rows, torch.randperm(n_rows, generator=generator)])
    return list(rows[:need].split(batch))


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Run:
    """One arm, all its learning rates, and what it used."""

    measured_steps = MEASURED_STEPS

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.data = load_file(spec.data)
        self.result: dict[str, Any] = {}
        self.tried: list[dict[str, float]] = []

    def load(self) -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(self.spec.model, dtype=torch.float32)
        model.config.use_cache = False
        return model.train()

    def prepare(self, model: nn.Module) -> Prepared:
        return prepare(self.spec, model)

    def costs(self) -> None:
        """Memory and bytes of a few steps, before anything else has been trained here."""
        model = self.load()
        self.losses(model, "prose_valid", 1)  # threads and BLAS buffers belong to the baseline
        baseline = measure.current_memory()
        restarted = measure.restart_peak()
        prepared = self.prepare(model)
        used = self.train(prepared, min(self.spec.settings.rates), self.measured_steps)
        self.result |= {
            "baseline": baseline if restarted else None,
            "peak": measure.peak_memory(),
            "gradient_bytes": used["gradient_bytes"],
            "state_bytes": used["state_bytes"],
            "copy_bytes": used["copy_bytes"],
        }

    def one_rate(self, number: int, rate: float) -> tuple[Prepared, dict[str, float]]:
        """Train at one rate from the saved model; a loss that is not finite is infinitely bad."""
        model = self.load()
        torch.manual_seed(self.spec.seed)
        prepared = self.prepare(model)
        used: dict[str, float] = {}
        valid = math.nan
        with contextlib.suppress(fg.errors.NonFiniteGradientError):
            used = self.train(prepared, rate, self.spec.settings.steps, number)
            valid = self.loss(prepared.model, "prose_valid")
        valid = valid if math.isfinite(valid) else math.inf
        return prepared, {
            "rate": rate,
            "valid": valid,
            "seconds": used.get("seconds", math.nan),
            "cpu_seconds": used.get("cpu_seconds", math.nan),
        }

    def batch(self, prepared: Prepared, rows: Tensor) -> Tensor:
        """What a step trains on, given the rows whose turn it is."""
        return rows

    def train(
        self, prepared: Prepared, rate: float, steps: int, number: int | None = None
    ) -> dict[str, float]:
        """Train, and report progress as that of rate ``number``. Returns seconds, processor
        seconds and, without a number, the bytes of gradients, optimizer state and copies at the
        step that holds most."""
        settings, rows = self.spec.settings, self.data["prose_train"]
        optimizer = prepared.optimizer(rate)
        order = data_order(len(rows), settings.rows, settings.steps, self.spec.seed)
        meter = fg.Meter(flops="off")
        held: dict[str, int] = {}
        cpu = time.process_time()
        for step, index in enumerate(order[:steps]):
            with meter.step():
                for group in optimizer.param_groups:
                    group["lr"] = rate * rate_factor(step, settings.steps)
                part = self.batch(prepared, rows[index])
                loss = prepared.model(input_ids=part, labels=part).loss
                loss.backward()
                if number is None:
                    held = max(held, held_bytes(prepared, optimizer), key=lambda h: sum(h.values()))
                nn.utils.clip_grad_norm_(prepared.trained, CLIP)
                optimizer.step()
                optimizer.zero_grad()
                if prepared.after_step is not None:
                    prepared.after_step(step + 1, optimizer)
            if number is not None:
                say(rate=number, step=step + 1, loss=round(float(loss.detach()), 4))
        return {
            "seconds": meter.spent["seconds"],
            "cpu_seconds": time.process_time() - cpu,
            **held,
        }

    def losses(self, model: nn.Module, part: str, most: int | None = None) -> list[float]:
        rows = self.data[part][:most]
        return measure.row_losses(model, rows, self.spec.settings.rows).tolist()

    def loss(self, model: nn.Module, part: str) -> float:
        return mean(self.losses(model, part))

    def all_rates(self) -> dict[str, Any]:
        """Choose the rate on the validation part; the test part is read for a better one only."""
        best, settings = math.inf, self.spec.settings
        for number in range(len(settings.rates) + settings.refine):
            if number < len(settings.rates):
                rate = settings.rates[number]
            else:
                rate = next_rate({t["rate"]: t["valid"] for t in self.tried})
            prepared, outcome = self.one_rate(number, rate)
            self.tried.append(outcome)
            if outcome["valid"] < best:
                best = outcome["valid"]
                self.keep(prepared, outcome)
            del prepared  # the next rate begins without this one's memory
        self.result["tried"] = self.tried
        if math.isinf(best):
            raise fg.errors.FastgradError(
                f"{self.spec.arm.label}: the loss was not finite at any of the rates "
                f"{', '.join(str(t['rate']) for t in self.tried)}"
            )
        return self.result

    def keep(self, prepared: Prepared, outcome: dict[str, float]) -> None:
        test_rows = self.losses(prepared.model, "prose_test")
        self.result |= outcome | {
            "test": mean(test_rows),
            "test_rows": [round(loss, 6) for loss in test_rows],
            "code": self.loss(prepared.model, "code_test"),
            "n_trained": prepared.n_trained,
            "selected": prepared.selected,
            "note": prepared.note,
        }
        if self.spec.delta is not None and prepared.partial is not None:
            self.result["delta_bytes"] = fg.save_delta(prepared.partial, self.spec.delta)
            self.result["delta_restores"] = self.restores(prepared)

    def restores(self, prepared: Prepared) -> bool:
        """Whether base model plus delta is the trained model, bit by bit."""
        assert self.spec.delta is not None
        base = self.load()
        fg.load_delta(base, self.spec.delta)
        trained = prepared.model.state_dict()
        return all(torch.equal(t, trained[name]) for name, t in base.state_dict().items())


def held_bytes(prepared: Prepared, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """What training holds besides the model and its activations, between backward and step."""
    return {
        "gradient_bytes": measure.tensor_bytes(p.grad for p in prepared.trained),
        "state_bytes": measure.tensor_bytes(prepared.state(optimizer)),
        "copy_bytes": measure.tensor_bytes(prepared.copies()),
    }


def say(**message: Any) -> None:
    """One line of progress for the process that started this one."""
    print(json.dumps(message), flush=True)


def main(path: str, kind: type[Run] = Run) -> None:
    """Do what the spec at ``path`` says, as a run of this kind."""
    started = time.perf_counter()
    spec = Spec.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    torch.set_num_threads(THREADS)
    # A bar for loading a dozen tensors would end up among the progress lines.
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for module in ("fastgrad.blueprint", "fastgrad.delta", "peft"):
        importlib.import_module(module)  # all arms alike, before memory is measured
    run = kind(spec)
    run.costs()
    result = run.all_rates() | {
        "key": spec.arm.key,
        "label": spec.arm.label,
        "kind": spec.arm.kind,
        "process_seconds": time.perf_counter() - started,
        "pid": os.getpid(),
    }
    write_text(spec.result, json.dumps(finite_or_none(result), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
