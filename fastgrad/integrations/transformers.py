"""Plugs for the transformers Trainer and what is built on it, such as TRL's SFTTrainer.

    callback = BlueprintCallback(validation_batches, domain_tags=["python-source"])
    Trainer(model=model, args=args, train_dataset=ds, callbacks=[callback])

    Trainer(model=model, args=args, train_dataset=ds,
            optimizer_cls_and_kwargs=sparse_adamw(blueprint="my-model/", fraction=0.2))

Checkpoints that the Trainer writes then hold a partial file too, and
``trainer.train(resume_from_checkpoint=...)`` goes on bit for bit.
"""

from __future__ import annotations

from fastgrad.errors import MissingExtraError

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise MissingExtraError("transformers", "hf") from error

from fastgrad.integrations.trainer_blueprint import BlueprintCallback, Measurement
from fastgrad.integrations.trainer_in_backward import StepInBackwardCallback
from fastgrad.integrations.trainer_meter import MeterCallback
from fastgrad.integrations.trainer_optimizer import SparseAdamWFactory, sparse_adamw
from fastgrad.integrations.trainer_reselection import ReselectionCallback
from fastgrad.measuring import measure, untouched

__all__ = [
    "BlueprintCallback",
    "Measurement",
    "MeterCallback",
    "ReselectionCallback",
    "SparseAdamWFactory",
    "StepInBackwardCallback",
    "measure",
    "sparse_adamw",
    "untouched",
]
