"""A frozen nn.Linear with LoRA as PEFT's own layer and as ours, over one weight and one pair of factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

import lowrank_fused as lf
from lowrank_fused.benchmark import Case, Operands, Provider, Step

__all__ = ["LAYERS", "BenchLayer", "our_layer", "peft_layer"]


@dataclass
class BenchLayer:
    """A layer ready for training; `weight`, `a` and `b` are the names of its parameters."""

    module: nn.Module
    operands: Operands
    weight: str
    a: str
    b: str

    def step(self) -> Step:
        """Forward and backward with gradients for x, A and B."""
        o = self.operands
        leaves = (o.x, self.module.get_parameter(self.a), self.module.get_parameter(self.b))
        return Step(lambda _: torch.autograd.grad(self.module(o.x), leaves, o.dy))

    def parameters(self) -> list[Tensor]:
        """All that the module holds, trained or frozen."""
        return list(self.module.parameters())

    def provider(self, name: str) -> Provider:
        """The module as a function of its operands, so that the accuracy gate can judge it."""

        def forward(
            x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float
        ) -> Tensor:
            # The module has its scale built in; another one is a factor on B, exact for powers of two.
            b = b * (scale / self.operands.scale)
            return functional_call(self.module, {self.weight: weight, self.a: a, self.b: b}, (x,))

        return Provider(name, forward)


class Holder(nn.Module):
    """A model of one linear: PEFT wants a model to adapt and a name to find."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.proj = linear

    def forward(self, x: Tensor) -> Tensor:
        """proj(x)"""
        return self.proj(x)


def _linear(o: Operands) -> nn.Linear:
    linear = nn.Linear(o.x.shape[1], o.weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(o.weight, requires_grad=False)
    return linear


def _fill(layer: BenchLayer) -> BenchLayer:
    """Give the layer the case's factors: with B = 0 no provider could be told wrong by its output."""
    with torch.no_grad():
        layer.module.get_parameter(layer.a).copy_(layer.operands.a)
        layer.module.get_parameter(layer.b).copy_(layer.operands.b)
    return layer


def peft_layer(case: Case, operands: Operands | None = None) -> BenchLayer:
    """PEFT's lora.Linear, adapters in the dtype of the base weight, in training mode."""
    from peft import LoraConfig, get_peft_model

    o = operands or Operands.random(case)
    config = LoraConfig(
        r=case.rank, lora_alpha=int(o.scale * case.rank), lora_dropout=case.dropout, target_modules=["proj"]
    )
    model = get_peft_model(Holder(_linear(o)), config, autocast_adapter_dtype=False).train()
    at = "base_model.model.proj."
    return _fill(
        BenchLayer(model, o, f"{at}base_layer.weight", f"{at}lora_A.default.weight", f"{at}lora_B.default.weight")
    )


def our_layer(case: Case, operands: Operands | None = None) -> BenchLayer:
    """LowRankLinear with the method lora, adapters in the dtype of the base weight, in training mode."""
    o = operands or Operands.random(case)
    layer = lf.LowRankLinear.from_linear(
        _linear(o),
        method="lora",
        rank=case.rank,
        alpha=o.scale * case.rank,
        dropout=case.dropout,
        autocast_adapter_dtype=False,
    ).train()
    return _fill(BenchLayer(Holder(layer), o, "proj.weight", "proj.lora_A", "proj.lora_B"))


LAYERS: dict[str, Callable[..., BenchLayer]] = {"peft": peft_layer, "ours": our_layer}
