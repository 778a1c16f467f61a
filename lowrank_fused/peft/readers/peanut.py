"""PEANuT, the PEFT name of NEAT: A_eff = act(A W) once per step, where PEFT forms the whole update in every call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_fused.factors.activations import activation_names
from lowrank_fused.layers import Values
from lowrank_fused.methods.peanut import Peanut
from lowrank_fused.terms import Terms

from . import Base, Part, Reader, Remembered, reader


def hidden(weight: Tensor, a: Tensor, *between: Tensor, act_fn: str, transposed: bool) -> tuple[Tensor, ...]:
    """H [r, in]: the network up to its last matrix, in A's dtype; `between` are its encoders, then its decoders."""
    depth = len(between) // 2
    named = {f"peanut_encoders_{i}": w for i, w in enumerate(between[:depth])}
    named |= {f"peanut_decoders_{i}": w for i, w in enumerate(between[depth:])}
    values = Values({"peanut_A": a, "peanut_act_fn": act_fn, "peanut_depth": depth, "peanut_orientation": "T", **named})
    return Peanut.generate(values, (weight.t() if transposed else weight).detach())


@reader("peanut.layer:Linear")
class PeanutLayer(Reader):
    methods = ("peanut",)

    @staticmethod
    def adapters(layer: Any) -> Mapping[str, Any]:
        return layer.peanut_A

    @staticmethod
    def needs_weight(layer: Any, adapter: str) -> bool:
        return True

    @staticmethod
    def why_not(layer: Any, adapter: str) -> str | None:
        name = layer.act_fn[adapter]
        return None if name in activation_names() else f"activation {name!r}"

    @staticmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        pairs = (*layer.peanut_encoders[adapter], *layer.peanut_decoders[adapter])
        return layer.peanut_A[adapter], layer.peanut_B[adapter], *pairs

    @staticmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        modules: Any = PeanutLayer.modules(layer, adapter)
        return tuple(module.weight for module in modules)

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        assert base is not None, "PEANuT is a function of the base weight"
        a, b, *between = PeanutLayer.tensors(layer, adapter)
        (h,) = remembered(hidden, base.weight, a, *between, act_fn=layer.act_fn[adapter], transposed=base.transposed)
        return Part(Terms(h, b, layer.scaling[adapter]), _NO_DROPOUT)


_NO_DROPOUT = nn.Identity()
