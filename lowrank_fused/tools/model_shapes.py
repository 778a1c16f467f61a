"""Linear layers of well-known models by name, from their real configurations, without weights and without a
hub.

A model is built on the meta device, so that names, shapes and biases are those of the model class itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adaptable import as_matrix
from ..config import ALL_LINEAR, AdapterConfig
from ..registry import did_you_mean
from ..target_modules import find_targets

__all__ = ["MODELS", "LinearShape", "ModelSpec", "build", "build_from_config", "linear_shapes", "target_modules"]


@dataclass(frozen=True)
class ModelSpec:
    """A transformers model class, its config class and what differs from that config's defaults."""

    model: str
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        """Whether the model predicts the next token and computes its own loss from `labels`."""
        return self.model.endswith(("ForCausalLM", "LMHeadModel"))


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> ModelSpec:
    settings = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }
    return ModelSpec("LlamaForCausalLM", "LlamaConfig", settings)


_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_NO_POOLER = {"add_pooling_layer": False}
_LLAMA_3_8B = _llama(4096, 14336, 32, 32, 8, 128256)

MODELS: dict[str, ModelSpec] = {
    "minilm-l6": ModelSpec(
        "BertModel",
        "BertConfig",
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
        _NO_POOLER,
    ),
    "roberta-base": ModelSpec("RobertaModel", "RobertaConfig", {"vocab_size": 50265}, _NO_POOLER),
    "roberta-large": ModelSpec("RobertaModel", "RobertaConfig", {"vocab_size": 50265, **_LARGE}, _NO_POOLER),
    "vit-b": ModelSpec("ViTModel", "ViTConfig", {}, _NO_POOLER),
    "vit-l": ModelSpec("ViTModel", "ViTConfig", _LARGE, _NO_POOLER),
    "gpt2": ModelSpec("GPT2LMHeadModel", "GPT2Config"),
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3.1-8b": _LLAMA_3_8B,
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True),
    "mistral-7b": ModelSpec(
        "MistralForCausalLM",
        "MistralConfig",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8},
    ),
    "qwen2.5-7b": ModelSpec(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    "gemma-7b": ModelSpec(
        "GemmaForCausalLM",
        "GemmaConfig",
        {
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "vocab_size": 256000,
        },
    ),
}


def build(name: str, device: torch.device | str = "meta", **settings: Any) -> nn.Module:
    """The model of that name with random weights on `device`; on the meta device it costs neither time nor
    memory.

    `settings` override fields of its config (`num_hidden_layers=2`). Raises ValueError for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; {did_you_mean(name, MODELS)}")
    spec = MODELS[name]
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, spec.config)(**{**spec.settings, **settings})
    with torch.device(device):
        return getattr(transformers, spec.model)(config, **spec.build)


def build_from_config(path: Path, device: torch.device | str = "meta") -> nn.Module:
    """The model that a transformers config describes: a config.json, or the folder that it lies in.

    Its class is the first of the config's `architectures`, or the bare model of its type. Nothing is downloaded.
    Raises ValueError where there is no config that transformers knows.
    """
    transformers = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is neither a known model nor the config of one: {reason}") from error
    model = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    with torch.device(device):
        return transformers.AutoModel.from_config(config) if model is None else model(config)


# Names of the projections of queries and values; transformers has renamed some models' between versions.
_QUERY_AND_VALUE = (("q_proj", "v_proj"), ("query", "value"))


def target_modules(model: nn.Module, text: str) -> str | list[str]:
    """What a person types, as `AdapterConfig.target_modules`.

    "all" is every linear but the output head, "qv" the projections of queries and values under whatever name
    this model has for them, anything else names of modules with commas between them. Raises ValueError where
    "qv" finds nothing.
    """
    if text in ("all", ALL_LINEAR):
        return ALL_LINEAR
    if text != "qv":
        return [name.strip() for name in text.split(",") if name.strip()]
    endings = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    for names in _QUERY_AND_VALUE:
        if endings.issuperset(names):
            return list(names)
    raise ValueError(
        f"{type(model).__name__} has no separate projections of queries and values; name its modules instead"
    )


@dataclass(frozen=True)
class LinearShape:
    """A linear layer's size, whether it has a bias, and how many layers of this name and size a model has."""

    name: str
    in_features: int
    out_features: int
    bias: bool
    count: int


def linear_shapes(model: nn.Module, targets: str | Sequence[str] = ALL_LINEAR) -> list[LinearShape]:
    """The distinct linears that an adapter with these `target_modules` would sit on, in model order."""
    found: dict[tuple[str, int, int, bool], int] = {}
    for target in find_targets(model, AdapterConfig(target_modules=targets)).found:
        out_features, in_features = as_matrix(target.module).shape
        name = target.paths[0].rpartition(".")[2]
        key = (name, in_features, out_features, target.module.bias is not None)
        found[key] = found.get(key, 0) + 1
    return [LinearShape(*key, count=count) for key, count in found.items()]
