"""One arm of bench/finetune_arms.py in a process of its own: ``arms_worker.py spec.json``."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
import arms_setup
from fastgrad.quickstart import worker
from fastgrad.quickstart.arms import Prepared
from fastgrad.quickstart.settings import Spec


class ArmRun(worker.Run):
    """A run of the quickstart, for any arm here, that also counts operations."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.turns = spec.arm.kind in arms_setup.TAKE_TURNS
        if self.turns:  # long enough for a change of what is trained
            self.measured_steps = max(worker.MEASURED_STEPS, spec.settings.steps // 3)

    def prepare(self, model: nn.Module) -> Prepared:
        return arms_setup.prepare(self.spec, model)

    def costs(self) -> None:
        super().costs()
        steps = self.spec.settings.steps if self.turns else 1
        prepared = self.prepare(self.load())
        counter = FlopCounterMode(display=False)
        with counter:
            self.train(prepared, min(self.spec.settings.rates), steps)
        # Matrix products and attention, forward and backward, by PyTorch's own counter; the
        # optimizer's arithmetic by element is not in it.
        self.result["flops_per_step"] = counter.get_total_flops() / steps


if __name__ == "__main__":
    for package in ("galore_torch", "badam", "bitsandbytes"):  # before memory is measured
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    worker.main(sys.argv[1], ArmRun)
