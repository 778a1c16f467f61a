"""Small transformers models with random weights and an input for each: tests and examples without a hub."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TINY_MODELS", "logits", "tiny_model"]

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {"vocab_size": 64, "max_position_embeddings": 24}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}

# Name -> model class, config class, settings.
TINY_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_SIZES, **_TEXT, "num_key_value_heads": 2}),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_SIZES, **_TEXT}),
    "bert": ("BertForMaskedLM", "BertConfig", {**_SIZES, **_TEXT}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_SIZES, "image_size": 16, "patch_size": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, "vocab_size": 64, "n_positions": 24}),
}


def tiny_model(kind: str, seed: int = 0) -> nn.Module:
    """A model of `TINY_MODELS` in eval mode, the same weights for the same seed."""
    transformers = importlib.import_module("transformers")
    model, config, settings = TINY_MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def logits(model: Any) -> Tensor:
    """The model's output for a fixed input: 2 sequences of 9 tokens, or 2 images."""
    generator = torch.Generator().manual_seed(1)
    parameter = next(iter(model.parameters()))
    if hasattr(model.config, "image_size"):
        size = model.config.image_size
        pixels = torch.randn(2, 3, size, size, generator=generator)
        return model(pixel_values=pixels.to(parameter.device, parameter.dtype)).logits
    tokens = torch.randint(3, model.config.vocab_size, (2, 9), generator=generator)
    return model(input_ids=tokens.to(parameter.device)).logits
