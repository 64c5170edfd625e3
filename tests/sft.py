"""A word-level tokenizer and sentences for supervised fine-tuning, built without a network."""

from __future__ import annotations

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_WORDS = [
    "the", "a", "cat", "dog", "bird", "sees", "hears", "follows", "and", "sleeps", "runs", "sings",
]  # fmt: skip


def tokenizer():
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *_WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def sentences(n=24):
    animals, verbs, ends = ("cat", "dog", "bird"), ("sees", "hears"), ("runs", "sings")
    texts = [
        f"the {animals[i % 3]} {verbs[i % 2]} a {animals[(i + 1) % 3]} and {ends[i // 2 % 2]}"
        for i in range(n)
    ]
    return Dataset.from_dict({"text": texts})
