"""RAC-LoRA (Malinovsky et al., 2024, arXiv 2410.08305): one factor random, frozen and redrawn. Trains the other.

    y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias,    s = alpha / r

`side="B"` trains B [out, r] from zero under a frozen A [r, in] ~ N(0, 1/in), and backward needs no x. `side="A"` trains
A from zero under a frozen B ~ N(0, 1/r). The chain that makes the method converge like full fine-tuning is
`lowrank_fused.training.raclora.redraw`: put the product into W, draw the frozen factor anew, go on from zero.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lowrank_fused import initializers
from lowrank_fused.terms import Terms

from . import Start, method


@method
class RacLora:
    name = "raclora"
    formula = "y = x Wᵀ + s · drop(x) Aᵀ Bᵀ, A or B frozen"
    keeps = ("s",)
    variants = ({"side": "A"},)

    @staticmethod
    def init(weight: Tensor, rank: int = 8, alpha: float = 8.0, *, side: str = "B") -> Start:
        if side not in ("A", "B"):
            raise ValueError(f"side must be 'A' or 'B', the factor that trains, got {side!r}")
        scale = alpha / rank
        a, b = initializers.get("init_a" if side == "B" else "init_b").function(weight, rank, scale)
        factors = {"lora_A": a, "lora_B": b}
        trained = {f"lora_{side}": factors.pop(f"lora_{side}")}
        frozen = {name: value.to(weight.dtype) for name, value in factors.items()}
        return Start(trained, frozen, {"scaling": scale, "side": side})

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        return Terms(p.lora_A, p.lora_B, p.scaling)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        return F.linear(x, weight + p.scaling * p.lora_B @ p.lora_A, bias)
