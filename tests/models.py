"""Tiny random models of the architectures that the tests use, and batches for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCAB = 61


def llama(tied: bool = False, layers: int = 2, **kwargs: object) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **kwargs,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def gemma() -> nn.Module:
    """Norms that scale by ``1 + weight``, embeddings that are scaled and tied."""
    return GemmaForCausalLM(
        GemmaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "bert": bert,
    "gemma": gemma,
}


def randomised(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model whose norms and biases are not at their trivial initial values."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def batch_of(
    n: int = 3, tokens: int = 9, *, padding: str | None = None, masked: bool = False, seed: int = 1
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (n, tokens), generator=g)
    labels = ids.clone()
    mask = torch.ones_like(ids)
    if padding:
        for j in range(n):
            length = tokens - 2 * j
            out = slice(length, None) if padding == "right" else slice(0, tokens - length)
            ids[j, out], mask[j, out], labels[j, out] = 0, 0, -100
    if masked:
        labels[:, :3] = -100
        labels[0, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def one_example(batch: dict[str, Tensor], j: int) -> dict[str, Tensor]:
    return {k: v[j : j + 1] for k, v in batch.items()}
