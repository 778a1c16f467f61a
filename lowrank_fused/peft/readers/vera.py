"""VeRA: views of a frozen pair that all layers share, and two vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_fused.terms import Terms

from . import Base, Part, Reader, Remembered, reader


@reader("vera.layer:Linear")
class Vera(Reader):
    methods = ("vera",)
    returns_dtype_of_input = True
    as_fast_in_16_bits = "as fast in 16 bits on a CPU: PEFT keeps the product with B, which we make again for lambda_b"
    break_even = 4.0

    @staticmethod
    def adapters(layer: Any) -> Mapping[str, Any]:
        return layer.vera_lambda_d

    @staticmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        return (layer.vera_dropout[adapter],)

    @staticmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        return layer.vera_lambda_d[adapter], layer.vera_lambda_b[adapter], *_pair(layer, adapter)

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        a, b = _pair(layer, adapter)
        d = layer.vera_lambda_d[adapter]
        a, b = (t.to(d.device) for t in (a[:, : layer.in_features], b[: layer.out_features]))
        return Part(Terms(a, b, core=d, out=layer.vera_lambda_b[adapter]), layer.vera_dropout[adapter])


def _pair(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    return layer.vera_A[adapter], layer.vera_B[adapter]
