"""PEANuT, the PEFT name of NEAT: A_eff = act(A W) once per step, where PEFT forms the whole update in every call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_fused.factors.activations import activation, activation_names
from lowrank_fused.factors.weight_factor import weight_factor
from lowrank_fused.methods.peanut import deepened
from lowrank_fused.terms import Terms

from . import Base, Part, Reader, Remembered, reader


class _ProductInDtypeOfA(torch.autograd.Function):
    """A W in A's dtype, to which the frozen W is cast in either direction; it is kept as it is."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return a @ weight.to(a.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return dz @ weight.to(dz.dtype).t(), None


def hidden(weight: Tensor, a: Tensor, *between: Tensor, act_fn: str, transposed: bool) -> tuple[Tensor]:
    """H [r, in]: the network up to its last matrix; `between` are its encoders, then its decoders.

    All in A's dtype, as in PEFT: fp32 matrices beside a 16-bit weight are not rounded to it.
    """
    weight, act = (weight.t() if transposed else weight).detach(), activation(act_fn)
    alike = a.dtype == weight.dtype
    h = weight_factor(a, weight, act_fn) if alike else act(_ProductInDtypeOfA.apply(a, weight))
    depth = len(between) // 2
    return (deepened(h, between[:depth], between[depth:], act),)


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
