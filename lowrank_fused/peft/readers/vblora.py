"""VB-LoRA: factors mixed from one bank of vectors, once per step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_fused.methods.vblora import mixed
from lowrank_fused.terms import Terms

from . import Base, Part, Reader, Remembered, reader


def factors(bank: Tensor, logits_a: Tensor, logits_b: Tensor, *, topk: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] in the bank's dtype."""
    bank = bank.to(logits_a.device)
    a, b = mixed(logits_a, bank, topk), mixed(logits_b, bank, topk)
    return a.flatten(1), b.transpose(1, 2).flatten(0, 1)


@reader("vblora.layer:Linear")
class VbLora(Reader):
    methods = ("vblora",)

    @staticmethod
    def adapters(layer: Any) -> Mapping[str, Any]:
        return layer.vblora_logits_A

    @staticmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        return (layer.vblora_dropout[adapter],)

    @staticmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        return layer.vblora_vector_bank[adapter], layer.vblora_logits_A[adapter], layer.vblora_logits_B[adapter]

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        a, b = remembered(_checked_factors, *VbLora.tensors(layer, adapter), topk=layer.topk[adapter],
                          training=layer.training)  # fmt: skip
        return Part(Terms(a, b), layer.vblora_dropout[adapter])


def _checked_factors(
    bank: Tensor, logits_a: Tensor, logits_b: Tensor, *, topk: int, training: bool
) -> tuple[Tensor, Tensor]:
    """As PEFT does, refuse to train what `save_only_topk_weights` wrote."""
    if training and logits_a[0, 0].isinf().any():
        raise RuntimeError("infinite VB-LoRA logits: an adapter saved with save_only_topk_weights can't train")
    return factors(bank, logits_a, logits_b, topk=topk)
