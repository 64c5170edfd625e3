"""A zoo of tiny random models: one of each architecture that people train, and inputs for it.

Everything is built from a configuration, so nothing is downloaded. Dropout is off, and so is every
loss that mixes examples (a router's auxiliary loss), because the reference of the coverage
matrix is each example alone; the scenario "router loss" turns it on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tests.models import randomised

VOCAB = 61
TOKENS = 9
BatchOf = Callable[[int, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One architecture.

    ``make()`` gives the same random weights every time, norms and biases away from their trivial
    initial values; ``batch(n, seed)`` n examples, one per position of each tensor's leading
    dimension; ``shift`` says whether the loss predicts the next token, so that the first label
    of a row does not count; ``reduction`` how the loss combines examples (Probe's word for it).
    """

    name: str
    family: str  # decoder, moe, ssm, encoder, seq2seq, image, audio
    make: Callable[[], nn.Module]
    batch: BatchOf
    shift: bool
    reduction: str = "token_mean"


ZOO: dict[str, Case] = {}


# -- inputs ----------------------------------------------------------------------------------


def text(n: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (n, TOKENS), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def text_to_text(n: int, seed: int) -> dict[str, Tensor]:
    """Source and target of different lengths, so that no test passes by confusing them."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, VOCAB, (n, TOKENS - 2), generator=g)
    return {**text(n, seed + 1), "labels": labels}


def images(size: int = 16) -> BatchOf:
    def batch(n: int, seed: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        pixels = torch.randn(n, 3, size, size, generator=g)
        return {"pixel_values": pixels, "labels": torch.randint(0, 5, (n,), generator=g)}

    return batch


def log_mel(n: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, VOCAB, (n, TOKENS - 2), generator=g)
    return {"input_features": torch.randn(n, 8, 24, generator=g), "labels": labels}


def waveform(n: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, VOCAB, (n, 5), generator=g)
    sound = torch.randn(n, 220, generator=g)
    mask = torch.ones(n, 220, dtype=torch.int64)
    return {"input_values": sound, "attention_mask": mask, "labels": labels}


# -- configurations --------------------------------------------------------------------------

LLAMA_LIKE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
BERT_LIKE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
IMAGE_LIKE: dict[str, Any] = dict(num_labels=5, num_channels=3, image_size=16)
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, output_router_logits=False)


def _add(
    name: str,
    family: str,
    model: str,
    config: str,
    options: dict[str, Any],
    batch: BatchOf = text,
    *,
    reduction: str = "token_mean",
    experts: str | None = None,
) -> None:
    def build() -> nn.Module:
        made = getattr(tf, config)(**options)
        if experts is not None:
            made._experts_implementation = experts
        return getattr(tf, model)(made)

    ZOO[name] = Case(
        name,
        family,
        lambda: randomised(build),
        batch,
        family in ("decoder", "moe", "ssm"),
        reduction,
    )


def _decoder(name: str, prefix: str, options: dict[str, Any], head: str = "ForCausalLM") -> None:
    _add(name, "decoder", f"{prefix}{head}", f"{prefix}Config", options)


_decoder("llama", "Llama", LLAMA_LIKE)
_decoder("llama-tied", "Llama", {**LLAMA_LIKE, "tie_word_embeddings": True})
_decoder("qwen3", "Qwen3", {**LLAMA_LIKE, "head_dim": 8})
_add(
    "gemma3",
    "decoder",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    {
        **LLAMA_LIKE,
        "tie_word_embeddings": True,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
)
_decoder("mistral", "Mistral", {**LLAMA_LIKE, "sliding_window": 4})
_decoder("phi3", "Phi3", LLAMA_LIKE)
_decoder("olmo2", "Olmo2", LLAMA_LIKE)
_decoder("stablelm", "StableLm", {**LLAMA_LIKE, "use_qkv_bias": True, "hidden_dropout": 0.0})
_decoder(
    "gpt2",
    "GPT2",
    dict(
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
    ),
    "LMHeadModel",
)
_decoder(
    "gptj",
    "GPTJ",
    dict(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
)
_decoder("gpt-neox", "GPTNeoX", {**LLAMA_LIKE, "attention_dropout": 0.0, "hidden_dropout": 0.0})
_decoder(
    "opt",
    "OPT",
    dict(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.0,
        attention_dropout=0.0,
    ),
)
_decoder(
    "bloom",
    "Bloom",
    dict(
        vocab_size=VOCAB,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
)
_decoder(
    "falcon",
    "Falcon",
    dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
)

# -- mixtures of experts: one case for each way that transformers runs the experts ------------

for _how in ("eager", "batched_mm", "grouped_mm"):
    _add(
        f"mixtral-{_how}",
        "moe",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**LLAMA_LIKE, **EXPERTS, "num_local_experts": 4, "router_aux_loss_coef": 0.0},
        experts=_how,
    )
    _add(
        f"qwen3-moe-{_how}",
        "moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **LLAMA_LIKE,
            **EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "head_dim": 8,
            "router_aux_loss_coef": 0.0,
        },
        experts=_how,
    )
    _add(
        f"olmoe-{_how}",
        "moe",
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {**LLAMA_LIKE, **EXPERTS, "num_experts": 4, "router_aux_loss_coef": 0.0},
        experts=_how,
    )

# -- state spaces ------------------------------------------------------------------------------

_add(
    "mamba",
    "ssm",
    "MambaForCausalLM",
    "MambaConfig",
    dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, use_cache=False),
)
_add(
    "mamba2",
    "ssm",
    "Mamba2ForCausalLM",
    "Mamba2Config",
    dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
        use_cache=False,
        tie_word_embeddings=False,
    ),
)

# -- encoders ----------------------------------------------------------------------------------

_add("bert", "encoder", "BertForMaskedLM", "BertConfig", BERT_LIKE)
_add(
    "roberta",
    "encoder",
    "RobertaForMaskedLM",
    "RobertaConfig",
    {**BERT_LIKE, "pad_token_id": 0},
)
_add(
    "albert",
    "encoder",
    "AlbertForMaskedLM",
    "AlbertConfig",
    {**BERT_LIKE, "embedding_size": 16, "classifier_dropout_prob": 0.0},
)
_add(
    "deberta-v2",
    "encoder",
    "DebertaV2ForMaskedLM",
    "DebertaV2Config",
    {
        **BERT_LIKE,
        "relative_attention": True,
        "position_buckets": 4,
        "max_relative_positions": 16,
        "pos_att_type": ["c2p", "p2c"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "pooler_dropout": 0.0,
    },
)
_add(
    "distilbert",
    "encoder",
    "DistilBertForMaskedLM",
    "DistilBertConfig",
    dict(
        vocab_size=VOCAB,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
    ),
)
_add(
    "modernbert",
    "encoder",
    "ModernBertForMaskedLM",
    "ModernBertConfig",
    dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        global_attn_every_n_layers=2,
        local_attention=6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
)

# -- encoder and decoder -----------------------------------------------------------------------

_add(
    "t5",
    "seq2seq",
    "T5ForConditionalGeneration",
    "T5Config",
    dict(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=6,
        relative_attention_max_distance=12,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    ),
    text_to_text,
)
_add(
    "bart",
    "seq2seq",
    "BartForConditionalGeneration",
    "BartConfig",
    dict(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    ),
    text_to_text,
)

# -- images ------------------------------------------------------------------------------------

_add(
    "vit",
    "image",
    "ViTForImageClassification",
    "ViTConfig",
    {
        **IMAGE_LIKE,
        "patch_size": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    images(),
)
_add(
    "dinov2",
    "image",
    "Dinov2ForImageClassification",
    "Dinov2Config",
    {
        **IMAGE_LIKE,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
    },
    images(),
)
_add(
    "swin",
    "image",
    "SwinForImageClassification",
    "SwinConfig",
    {
        **IMAGE_LIKE,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 1],
        "num_heads": [2, 4],
        "window_size": 4,
        "drop_path_rate": 0.0,
    },
    images(),
)
_add(
    "convnext",
    "image",
    "ConvNextForImageClassification",
    "ConvNextConfig",
    {
        **IMAGE_LIKE,
        "image_size": 32,
        "patch_size": 4,
        "num_stages": 2,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "drop_path_rate": 0.0,
    },
    images(32),
)

# -- sound -------------------------------------------------------------------------------------

_add(
    "whisper",
    "audio",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    dict(
        vocab_size=VOCAB,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=12,
        max_target_positions=32,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    log_mel,
)
_add(
    "wav2vec2",
    "audio",
    "Wav2Vec2ForCTC",
    "Wav2Vec2Config",
    dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
        ctc_loss_reduction="mean",
        pad_token_id=0,
    ),
    waveform,
    reduction="row_mean",
)
