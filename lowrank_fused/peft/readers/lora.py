"""LoRA on plain, Conv1D and quantised linear layers, and its variant DoRA.

PEFT's layers for AQLM, EETQ and INC were run on stand-ins for what those libraries put below them, never on the
libraries themselves; bitsandbytes, GPTQ, HQQ and torchao on a CPU alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_fused.dropout import rows_at_a_time
from lowrank_fused.methods.dora import row_norm
from lowrank_fused.terms import Terms

from . import Base, Part, Reader, Remembered, child_of, reader, weight_of


def is_dora(layer: Any, adapter: str) -> bool:
    """Whether PEFT's variant object makes the adapter a DoRA."""
    return type(layer.lora_variant.get(adapter)).__name__ == "DoraLinearVariant"


@reader("lora.gptq:GPTQLoraLinear", "lora.torchao:TorchaoLoraLinear", "lora.inc:IncLoraLinear")
class Lora(Reader):
    """Beside a base layer that multiplies by itself."""

    methods = ("lora", "dora")

    @classmethod
    def method(cls, layer: Any, adapter: str) -> str:
        return "dora" if is_dora(layer, adapter) else "lora"

    @staticmethod
    def adapters(layer: Any) -> Mapping[str, Any]:
        return child_of(layer, "lora_A")._modules

    @staticmethod
    def why_not(layer: Any, adapter: str) -> str | None:
        variant = layer.lora_variant.get(adapter)
        if is_dora(layer, adapter):
            return "DoRA beside a base layer that multiplies by itself"
        return None if variant is None else f"variant {type(variant).__name__}"

    @staticmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        children = layer._modules
        a, b, dropout = children["lora_A"], children["lora_B"], children["lora_dropout"]
        return a._modules[adapter], b._modules[adapter], dropout._modules[adapter]

    @staticmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        a, b, _ = Lora.modules(layer, adapter)
        return weight_of(a), weight_of(b)

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        (a, b, dropout), scaling = Lora.modules(layer, adapter), layer.scaling[adapter]
        bias = None if b.bias is None else b.bias * scaling
        return Part(Terms(weight_of(a), weight_of(b), scaling), dropout, bias)


@reader(
    "lora.bnb:Linear4bit",
    "lora.bnb:Linear8bitLt",
    "lora.hqq:HqqLoraLinear",
    "lora.awq:AwqLoraLinear",
    "lora.aqlm:AqlmLoraLinear",
    "lora.eetq:EetqLoraLinear",
)
class LoraUncast(Lora):
    """The same, but x is not cast under autocast, by which PEFT means that of CUDA wherever x is."""

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        part = Lora.read(layer, adapter, base, remembered)
        return replace(part, dropped=(layer.in_features, None)) if torch.is_autocast_enabled() else part


def norms(weight: Tensor, a: Tensor, b: Tensor, *, transposed: bool, scale: float) -> tuple[Tensor]:
    """‖W + scale · B A‖ of every row [out], a constant for the gradient as in PEFT.

    fp32 factors beside a 16-bit weight are not rounded to it, as in PEFT; its rows are widened some at a time.
    """
    weight, a, b = (weight.t() if transposed else weight).detach(), a.detach(), b.detach()
    wide = torch.promote_types(weight.dtype, a.dtype)
    if wide == weight.dtype:
        return (row_norm(weight, a, b, scale),)
    step = rows_at_a_time(weight)
    parts = zip(weight.split(step), b.split(step), strict=True)
    return (torch.cat([row_norm(rows.to(wide), a, of_rows, scale) for rows, of_rows in parts]),)


@reader("lora.layer:Linear")
class LoraOrDora(Lora):
    @staticmethod
    def needs_weight(layer: Any, adapter: str) -> bool:
        return is_dora(layer, adapter)

    @staticmethod
    def why_not(layer: Any, adapter: str) -> str | None:
        if not is_dora(layer, adapter):
            return Lora.why_not(layer, adapter)
        if layer.training and type(layer.lora_dropout[adapter]) is not nn.Identity:
            return "DoRA with dropout, which in PEFT acts on the input of the base weight too"
        if layer.lora_B[adapter].bias is not None:
            return "DoRA with lora_bias"
        return None if isinstance(layer.scaling[adapter], float | int) else "DoRA with a scaling that is a tensor"

    @staticmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        own = Lora.modules(layer, adapter)
        return (*own, layer.lora_magnitude_vector[adapter]) if is_dora(layer, adapter) else own

    @staticmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        own = Lora.tensors(layer, adapter)
        if not is_dora(layer, adapter):
            return own
        return *own, layer.lora_magnitude_vector[adapter].weight

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        part = Lora.read(layer, adapter, base, remembered)
        if base is None or not is_dora(layer, adapter):
            return part
        t = part.terms
        (norm,) = remembered(norms, base.weight, t.a, t.b, transposed=base.transposed, scale=t.scale)
        return Part(Terms(t.a, t.b, t.scale, col=layer.lora_magnitude_vector[adapter].weight / norm), part.dropout)
