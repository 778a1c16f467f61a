"""What the examples train on: sums of small numbers, and a Llama of 115,000 weights where no model is named.

Nothing is downloaded. `load(path)` takes a model and its tokenizer from a folder, as all examples do with `--model`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SUMS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(16) for b in range(16)]


def load(path: str = "") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that predicts the next token, and its tokenizer: those in a folder, or a tiny Llama on bytes."""
    torch.manual_seed(0)
    if path:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(path), tokenizer
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, use_cache=False,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte of UTF-8."""
    tokens = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, str]]], dict[str, Tensor]]:
    """Rows of SUMS -> a batch, padded to few different widths, whose labels skip the padding."""

    def collate(rows: list[dict[str, str]]) -> dict[str, Tensor]:
        texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
        batch = tokenizer(texts, padding=True, pad_to_multiple_of=16, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    return collate
