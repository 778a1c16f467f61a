"""AdaLoRA: E [r, 1] between the factors, and the rank that PEFT divides by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_fused.terms import Terms

from . import Base, Part, Reader, Remembered, reader


@reader("adalora.layer:SVDLinear")
class AdaLora(Reader):
    methods = ("adalora",)
    break_even = 2.5

    @staticmethod
    def adapters(layer: Any) -> Mapping[str, Any]:
        return layer.lora_A

    @staticmethod
    def why_not(layer: Any, adapter: str) -> str | None:
        return None if len(layer.lora_A[adapter]) else "every triplet is pruned"

    @staticmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        return (layer.lora_dropout[adapter],)

    @staticmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        return layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_E[adapter]

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        diagonal = layer.lora_E[adapter][:, 0] * (layer.scaling[adapter] / (layer.ranknum[adapter] + 1e-5))
        terms = Terms(layer.lora_A[adapter], layer.lora_B[adapter], core=diagonal)
        return Part(terms, layer.lora_dropout[adapter])


@reader("adalora.bnb:SVDLinear4bit", "adalora.bnb:SVDLinear8bitLt", "adalora.gptq:SVDQuantLinear")
class AdaLoraUncast(AdaLora):
    """Beside a quantised base, where x is not cast under autocast, by which PEFT means that of CUDA wherever x is."""

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        part = AdaLora.read(layer, adapter, base, remembered)
        return replace(part, dropped=(layer.in_features, None)) if torch.is_autocast_enabled() else part
