"""TinyLoRA: frozen singular vectors around a small matrix that PEFT makes of a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_fused.terms import Terms

from . import Base, Part, Reader, Remembered, reader


@reader("tinylora.layer:Linear")
class TinyLora(Reader):
    methods = ("tinylora",)
    returns_dtype_of_input = True
    break_even = 2.5

    @staticmethod
    def adapters(layer: Any) -> Mapping[str, Any]:
        return layer.tinylora_A

    @staticmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        return (layer.tinylora_dropout[adapter],)

    @staticmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        return layer.tinylora_A[adapter], layer.tinylora_B[adapter]

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        a, b = TinyLora.tensors(layer, adapter)
        terms = Terms(a, b, core=layer._compute_R(adapter).to(a.device))
        # PEFT casts x after the dropout.
        return Part(terms, layer.tinylora_dropout[adapter], dropped=(layer.in_features, None))
