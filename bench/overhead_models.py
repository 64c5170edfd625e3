"""The models and batches of the step-overhead benchmark.

Every example of a batch has as many label tokens as the others, so that the batch's loss is the
mean of the examples' own and all contenders speak of the same per-example gradients. Dropout is
off: two steps on the same batch must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

VOCAB = 4096
LONGEST = 4096
MASKED = 0.15  # share of the tokens that a masked language model has to guess
MASK_TOKEN = 3
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Size of a model; tied: the output layer shares the embedding's weight."""

    width: int = 512
    layers: int = 4
    tied: bool = False


@dataclass(frozen=True)
class Case:
    """A model, how to build it again with its output layer tied or not, and one batch."""

    model: PreTrainedModel
    build: Callable[[bool], PreTrainedModel]
    inputs: Inputs

    @property
    def tied(self) -> bool:
        return bool(self.model.config.tie_word_embeddings)

    @property
    def examples(self) -> int:
        return self.inputs["input_ids"].shape[0]

    def only(self, examples: slice) -> Case:
        """The same model with a part of the batch."""
        return replace(self, inputs={name: t[examples] for name, t in self.inputs.items()})

    def again(self, tied: bool) -> Case:
        """The same batch with a model of its own."""
        return replace(self, model=self.build(tied))

    def loss(self) -> Tensor:
        return self.model(**self.inputs).loss


def llama(shape: Shape, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=shape.width,
            intermediate_size=int(shape.width * 8 / 3) // 16 * 16,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // 64,
            num_key_value_heads=shape.width // 64,
            max_position_embeddings=LONGEST,
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
    )


def bert(shape: Shape, tied: bool) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=shape.width,
            intermediate_size=shape.width * 4,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // 64,
            max_position_embeddings=LONGEST,
            tie_word_embeddings=tied,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def next_token(ids: Tensor, generator: torch.Generator) -> Inputs:
    return {"input_ids": ids, "labels": ids}


def masked(ids: Tensor, generator: torch.Generator) -> Inputs:
    """The same number of masked tokens in each example, at places of its own."""
    places = torch.rand(ids.shape, generator=generator).argsort(1)
    chosen = places < max(1, round(MASKED * ids.shape[1]))
    return {
        "input_ids": ids.masked_fill(chosen, MASK_TOKEN),
        "labels": ids.masked_fill(~chosen, -100),
    }


MODELS: dict[str, tuple[Callable[[Shape, bool], PreTrainedModel], Callable[..., Inputs], bool]] = {
    # name: (build, batch, whether the architecture itself ties its output layer)
    "llama": (llama, next_token, False),
    "bert": (bert, masked, True),
}


def make(name: str, shape: Shape, examples: int, tokens: int) -> Case:
    build, batch, ties = MODELS[name]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(MASK_TOKEN + 1, VOCAB, (examples, tokens), generator=generator)
    return Case(
        build(shape, shape.tied or ties),
        lambda tied: build(shape, tied),
        batch(ids, generator),
    )


__all__ = ["MODELS", "Case", "Inputs", "Shape", "make"]
