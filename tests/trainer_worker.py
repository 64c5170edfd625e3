"""A Trainer run of a partial model, and the same run resumed: in one process or under torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import tests.conftest  # noqa: F401  (quiet, one thread)
from fastgrad.integrations.transformers import sparse_adamw
from tests.models import llama, randomised
from tests.processes import leaving_together
from tests.training_runs import trainer


def train(folder, resume=None):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    plug = sparse_adamw(ranking="random", fraction=0.4, blocks="16x16",
                        master_dtype=torch.float32)  # fmt: skip
    run = trainer(
        randomised(llama).to(torch.bfloat16), folder / "run", optimizer=plug,
        save_strategy="steps", save_steps=5, learning_rate=1e-3,
        per_device_train_batch_size=4 // processes,
        ddp_backend="gloo" if processes > 1 else None,
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume)
    return run, dict(plug[0].partial.named_parameters())


def main(folder):
    run, straight = train(folder)
    _, resumed = train(folder, str(folder / "run" / "checkpoint-5"))
    result = {
        "wrapped": type(run.model_wrapped).__name__,
        "straight": {n: p.detach().clone() for n, p in straight.items()},
        "resumed": {n: p.detach().clone() for n, p in resumed.items()},
        "losses": [e["loss"] for e in run.state.log_history if "loss" in e],
    }
    torch.save(result, folder / f"result-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    with leaving_together():
        main(Path(sys.argv[1]))
