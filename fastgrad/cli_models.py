"""Models of the ``fastgrad`` command: a transformers folder or hub id becomes a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastgrad.cli_common import first_line, split_revision, usage
from fastgrad.cli_imports import imported_lightly, importing
from fastgrad.errors import MissingExtraError, ProbeError, ResourceError

if TYPE_CHECKING:
    import torch
    from torch import nn

Kind = Literal["decoder", "masked", "encoder-decoder"]


#: What transformers imports with its models, if it is installed, and no model needs that has no
#: weights to load: for losses of object detection, and for checkpoints in formats of its own.
FOR_WEIGHTS_AND_BOXES = ("scipy", "torchao")


def transformers_module(without: Sequence[str] = ()) -> Any:
    """transformers, without its progress bars and advice.

    Args:
        without: packages to import it without, see
            :func:`~fastgrad.cli_imports.imported_lightly`.

    Raises:
        MissingExtraError: if it is not installed.
    """

    def load() -> Any:
        import transformers

        # Most of transformers is imported when first used, which is here and not on the way.
        transformers.PreTrainedModel  # noqa: B018
        return transformers

    try:
        with importing():
            transformers = imported_lightly("transformers", load, without)
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def located(reference: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` is given: a folder, or a hub id with its revision."""
    if os.path.isdir(reference):
        return reference, {"local_files_only": True}
    from fastgrad.hub import is_repo_id

    name, revision = split_revision(reference)
    if os.path.exists(name) or not is_repo_id(name):
        usage(f"{reference!r} is neither a folder nor a hub id such as org/name", "MODEL")
    return name, {"revision": revision}


def config_of(reference: str, without: Sequence[str] = ()) -> Any:
    """A model's transformers config.

    Args:
        without: as for :func:`transformers_module`.

    Raises:
        ProbeError: if there is none that can be read.
    """
    transformers = transformers_module(without)
    name, where = located(reference)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ProbeError(f"{name} holds no config.json: it is not a transformers model folder")
    try:
        return transformers.AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError, KeyError) as error:
        raise ProbeError(
            f"the config of {name} cannot be read: {first_line(error)} Remedy: a folder with a "
            "config.json that transformers reads, or a hub id that exists and may be downloaded"
        ) from error


def kind_of(config: Any) -> Kind:
    """How a language model is trained, by its config."""
    if any(name.endswith("ForMaskedLM") for name in config.architectures or ()):
        return "masked"
    return "encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "decoder"


def _auto_class(config: Any) -> Any:
    transformers = transformers_module()
    return {
        "masked": transformers.AutoModelForMaskedLM,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
        "decoder": transformers.AutoModelForCausalLM,
    }[kind_of(config)]


def _pinned(reference: str, config: Any) -> tuple[str, dict[str, Any]]:
    """As :func:`located`, at the very commit that the config came from."""
    name, where = located(reference)
    if "revision" in where:
        where["revision"] = getattr(config, "_commit_hash", None) or where["revision"]
    return name, where


def load_model(reference: str, dtype: torch.dtype | None = None) -> Any:
    """A model with its weights.

    Raises:
        ProbeError: if it cannot be loaded.
    """
    from safetensors import SafetensorError

    config = config_of(reference)
    name, where = _pinned(reference, config)
    try:
        return _auto_class(config).from_pretrained(
            name, config=config, dtype=dtype or "auto", **where
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ProbeError(f"the model in {name} cannot be loaded: {first_line(error)}") from error


def meta_model(reference: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A model without weights, from its config alone.

    Raises:
        ResourceError: if none can be built of it.
        ProbeError: if the config cannot be read.
    """
    config = config_of(reference, FOR_WEIGHTS_AND_BOXES)
    import torch  # is there by now

    wanted = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model: nn.Module = _auto_class(config).from_config(config, dtype=wanted)
    except (ValueError, KeyError) as error:
        raise ResourceError(
            f"no model can be built from the config of {reference}: {first_line(error)} Remedy: "
            "the command line knows causal, masked and encoder-decoder language models; in Python "
            "fastgrad takes any module"
        ) from error
    return model


def load_tokenizer(reference: str, config: Any) -> Any:
    """The tokenizer beside a model.

    Raises:
        ProbeError: if there is none that can be loaded.
    """
    name, where = _pinned(reference, config)
    try:
        return transformers_module().AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError, KeyError) as error:
        raise ProbeError(
            f"no tokenizer can be loaded from {name}: {first_line(error)} Remedy: save the model's "
            "tokenizer beside it"
        ) from error
