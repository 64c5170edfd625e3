"""Metered Trainer runs in several processes, whose clocks differ."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import tests.conftest  # noqa: F401  (quiet, one thread)
from fastgrad.errors import ResourceError
from fastgrad.integrations.transformers import MeterCallback
from fastgrad.meter_processes import over_processes
from tests.meters import Clock, plain
from tests.models import llama, randomised
from tests.processes import leaving_together
from tests.test_meter_trainer import SLOWING, Losses, Ticks
from tests.training_runs import trainer


def main(folder):
    rank = int(os.environ["RANK"])
    clock = Clock()
    # By its own clock process 1 is a thousand times as fast, and would never stop.
    clock_of = clock if rank == 0 else lambda: clock() / 1000
    meter = plain(clock=clock_of, cpu_clock=clock_of, window=1, eta=0.5, patience=2,
                  log=folder / "m.json", flops="first")  # fmt: skip
    callback = MeterCallback(meter, metric="loss")
    run = trainer(
        randomised(llama), folder, [Losses(SLOWING), Ticks(clock), callback],
        eval_strategy="steps", eval_steps=2, per_device_train_batch_size=2, ddp_backend="gloo",
    )  # fmt: skip
    run.train()
    meter.modes["cpu_seconds"] = "measured (whole machine)"
    spent, together = dict(meter.spent), over_processes(meter)
    if rank == 0:
        with meter.step():
            pass
    try:
        over_processes(meter)
    except ResourceError as error:
        refused = str(error)
    result = {
        "stopped_at": run.state.global_step, "spent": spent, "would_stop": meter.should_stop,
        "sessions": meter.sessions, "together": together.spent, "left_out": together.left_out,
        "processes": together.processes, "refused": refused, "log": str(meter.log),
    }  # fmt: skip
    (folder / f"result-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    with leaving_together():
        main(Path(sys.argv[1]))
