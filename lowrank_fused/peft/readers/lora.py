"""LoRA on plain, Conv1D and quantised linear layers, and its variant DoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_fused.methods.dora import row_norm
from lowrank_fused.terms import Terms

from . import Base, Part, Reader, Remembered, reader


@reader(
    "lora.bnb:Linear4bit",
    "lora.bnb:Linear8bitLt",
    "lora.gptq:GPTQLoraLinear",
    "lora.hqq:HqqLoraLinear",
    "lora.awq:AwqLoraLinear",
    "lora.aqlm:AqlmLoraLinear",
    "lora.eetq:EetqLoraLinear",
    "lora.torchao:TorchaoLoraLinear",
    "lora.inc:IncLoraLinear",
)
class Lora(Reader):
    methods: tuple[str, ...] = ("lora",)

    @staticmethod
    def adapters(layer: Any) -> Mapping[str, Any]:
        return layer.lora_A

    @staticmethod
    def why_not(layer: Any, adapter: str) -> str | None:
        variant = layer.lora_variant.get(adapter)
        return None if variant is None else f"variant {type(variant).__name__}"

    @staticmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        return layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]

    @staticmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        a, b, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
        bias = None if b.bias is None else b.bias * scaling
        return Part(Terms(a.weight, b.weight, scaling), layer.lora_dropout[adapter], bias)


def norms(weight: Tensor, a: Tensor, b: Tensor, *, transposed: bool, scale: float) -> tuple[Tensor]:
    """‖W + scale · B A‖ of every row [out], a constant for the gradient as in PEFT."""
    return (row_norm((weight.t() if transposed else weight).detach(), a.detach(), b.detach(), scale),)


@reader("lora.layer:Linear")
class LoraOrDora(Lora):
    methods = ("lora", "dora")

    @classmethod
    def method(cls, layer: Any, adapter: str) -> str:
        return "dora" if cls.needs_weight(layer, adapter) else "lora"

    @staticmethod
    def needs_weight(layer: Any, adapter: str) -> bool:
        return type(layer.lora_variant.get(adapter)).__name__ == "DoraLinearVariant"

    @staticmethod
    def why_not(layer: Any, adapter: str) -> str | None:
        if not LoraOrDora.needs_weight(layer, adapter):
            return Lora.why_not(layer, adapter)
        if layer.training and type(layer.lora_dropout[adapter]) is not nn.Identity:
            return "DoRA with dropout, which in PEFT acts on the input of the base weight too"
        if layer.lora_B[adapter].bias is not None:
            return "DoRA with lora_bias"
        return None if isinstance(layer.scaling[adapter], float | int) else "DoRA with a scaling that is a tensor"

    @staticmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        own = Lora.modules(layer, adapter)
        return (*own, layer.lora_magnitude_vector[adapter]) if LoraOrDora.needs_weight(layer, adapter) else own

    @staticmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        own = Lora.tensors(layer, adapter)
        if not LoraOrDora.needs_weight(layer, adapter):
            return own
        return *own, layer.lora_magnitude_vector[adapter].weight

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        part = Lora.read(layer, adapter, base, remembered)
        if base is None or not LoraOrDora.needs_weight(layer, adapter):
            return part
        t = part.terms
        (norm,) = remembered(norms, base.weight, t.a, t.b, transposed=base.transposed, scale=t.scale)
        return Part(Terms(t.a, t.b, t.scale, col=layer.lora_magnitude_vector[adapter].weight / norm), part.dropout)
