"""Uni-LoRA: factors gathered from one vector of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_fused.terms import Terms

from . import Base, Part, Reader, Remembered, reader, where_launches_cost


def factors(
    theta: Tensor, indices_a: Tensor, scales_a: Tensor, indices_b: Tensor, scales_b: Tensor
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], the entries of θ that the indices name, scaled; the dtype of θ."""
    theta = theta.to(indices_a.device)
    pairs = ((indices_a, scales_a), (indices_b, scales_b))
    a, b = ((theta[index] * scale.to(index.device)).to(theta.dtype) for index, scale in pairs)
    return a, b


@reader("unilora.layer:Linear")
class UniLora(Reader):
    methods = ("unilora",)
    returns_dtype_of_input = True
    break_even = 2.5

    @staticmethod
    def adapters(layer: Any) -> Mapping[str, Any]:
        return layer.unilora_indices_A

    @staticmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        return (layer.unilora_dropout[adapter],)

    @staticmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        return (layer.unilora_theta_d[adapter],)

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        stored = ("unilora_indices_A", "unilora_scales_A", "unilora_indices_B", "unilora_scales_B")
        indices_and_scales = [getattr(layer, name)[adapter] for name in stored]
        make = where_launches_cost(remembered, indices_and_scales[0])
        a, b = make(factors, layer.unilora_theta_d[adapter], *indices_and_scales)
        return Part(Terms(a, b), layer.unilora_dropout[adapter])
