"""Stage 2: a small Llama-architecture model, trained with the Trainer as a user would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from fastgrad.integrations.transformers import BlueprintCallback
from fastgrad.quickstart.settings import Settings

Progress = Callable[[int, float | None], None]


class Rows(Dataset[dict[str, Tensor]]):
    """Token rows as a data set for a causal language model."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def batches(rows: Tensor, size: int, count: int) -> list[dict[str, Tensor]]:
    """The first ``count`` batches, as a model's keyword arguments."""
    return [{"input_ids": part, "labels": part} for part in rows[: size * count].split(size)]


class _Report(TrainerCallback):
    """Tells the progress bar about steps and losses."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, None)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        if logs and "loss" in logs:
            self.progress(state.global_step, float(logs["loss"]))


def new_model(settings: Settings, seed: int) -> nn.Module:
    """A Llama-architecture model with tied embeddings and random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads // 2,
        max_position_embeddings=4 * settings.length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def pretrain(
    settings: Settings,
    rows: Tensor,
    validation: Tensor,
    tokenizer: Any,
    folder: Path,
    seed: int,
    progress: Progress,
) -> BlueprintCallback:
    """Train on ``rows``, save model, tokenizer and blueprint in ``folder``.

    Returns the blueprint callback, which keeps what it measured.
    """
    set_seed(seed)
    model = new_model(settings, seed)
    blueprint = BlueprintCallback(
        batches(validation, settings.probe_rows, settings.probe_batches),
        at=(0.5, 0.8, 1.0),
        blocks=settings.tile,  # so that submodules and tiles can both be chosen from it
        domain_tags=["python-source"],
        output_dir=folder,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.pretrain_steps,
        per_device_train_batch_size=settings.pretrain_rows,
        learning_rate=settings.pretrain_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.pretrain_steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=seed,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(rows),
        processing_class=tokenizer,
        callbacks=[blueprint, _Report(progress)],
    )
    trainer.pop_callback(PrinterCallback)  # the progress bar shows the losses
    trainer.train()
    trainer.save_model(str(folder))
    return blueprint
