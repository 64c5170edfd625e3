"""Short Trainer runs on tiny models, and what the tests look at afterwards."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from fastgrad.identity import model_parameters
from tests.models import VOCAB, batch_of

STEPS = 10
HELD_OUT = [batch_of(n=3, seed=s) for s in (7, 8)]


class Rows(Dataset):
    def __init__(self, n=24, tokens=9):
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randint(3, VOCAB, (n, tokens), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def arguments_of(folder, kind=TrainingArguments, **arguments):
    options = {
        "max_steps": STEPS, "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
        "save_strategy": "no", "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "logging_steps": 5, "seed": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    return kind(output_dir=str(folder), **(options | arguments))


def trainer(model, folder, callbacks=(), optimizer=None, **arguments):
    """A Trainer on 24 rows; ``model`` may be a function that makes one."""
    makes = {"model": model} if isinstance(model, torch.nn.Module) else {"model_init": model}
    made = Trainer(
        args=arguments_of(folder, **arguments), train_dataset=Rows(), eval_dataset=Rows(n=4),
        callbacks=list(callbacks), optimizer_cls_and_kwargs=optimizer, **makes,
    )  # fmt: skip
    made.pop_callback(PrinterCallback)
    return made


def state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def logged(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


def assert_only_selected_moved(model, before, *selections):
    """Weights outside every selection have the bits they had; each selected parameter moved."""
    now = model_parameters(model)
    for name, old in before.items():
        moved = (now[name].detach() != old).reshape(old.shape[0], -1)
        if any(name in selection.blocks for selection in selections):
            assert moved.any(), f"{name} is selected and was not trained"
        for selection in selections:
            if name not in selection.blocks:
                continue
            grid = selection.grid(name)
            moved = moved.reshape(grid.rows, grid.cols)
            for block in selection.blocks[name].tolist():
                top, bottom, left, right = grid.bounds(block)
                moved[top:bottom, left:right] = False
        assert not moved.any(), f"{name} was changed outside the selection"
