"""VB-LoRA: factors mixed from one bank of vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_fused.methods.vblora import mixed
from lowrank_fused.terms import Terms

from . import Base, Part, Reader, Remembered, reader, where_launches_cost


def factors(bank: Tensor, logits_a: Tensor, logits_b: Tensor, *, topk: int, training: bool) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] in the bank's dtype; as in PEFT, what `save_only_topk_weights` wrote can't be trained.

    A compiled graph can't look at values, and trains it.
    """
    if training and not torch.compiler.is_compiling() and logits_a[0, 0].isinf().any():
        raise RuntimeError("infinite VB-LoRA logits: an adapter saved with save_only_topk_weights can't train")
    bank = bank.to(logits_a.device)
    a, b = mixed(logits_a, bank, topk), mixed(logits_b, bank, topk)
    return a.flatten(1), b.transpose(1, 2).flatten(0, 1)


@reader("vblora.layer:Linear")
class VbLora(Reader):
    methods = ("vblora",)
    returns_dtype_of_input = True
    break_even = 2.5

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
        topk, tensors = layer.topk[adapter], VbLora.tensors(layer, adapter)
        make = where_launches_cost(remembered, tensors[1])
        a, b = make(factors, *tensors, topk=topk, training=layer.training)
        return Part(Terms(a, b), layer.vblora_dropout[adapter])
