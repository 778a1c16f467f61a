"""HydraLoRA (Tian et al., 2024, arXiv 2404.19245): experts that share A, mixed per token. Trains A, all B, the router.

    y = x Wᵀ + s Σ_e softmax(x Gᵀ)_e · drop(x) Aᵀ B_eᵀ + bias,    s = alpha / r

A [r, in] and the router G [E, in] Kaiming-uniform, the experts' B [out, E · r] side by side and zero. The router sees
x without dropout, as in the published code, and trains x through itself too. A token's mixture of experts is no
single matrix, so merging is refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lowrank_fused import initializers
from lowrank_fused.terms import Gate, Terms

from . import Start, method


@method
class HydraLora:
    name = "hydralora"
    formula = "y = x Wᵀ + s Σ_e softmax(x Gᵀ)_e · drop(x) Aᵀ B_eᵀ"
    keeps = ("x", "s", "gate")

    @staticmethod
    def init(weight: Tensor, rank: int = 8, alpha: float = 8.0, *, experts: int = 3) -> Start:
        if isinstance(experts, bool) or not isinstance(experts, int) or experts < 1:
            raise ValueError(f"experts must be a positive integer, got {experts!r}")
        kaiming, scale = initializers.get("kaiming").function, alpha / rank
        (a, _), (router, _) = kaiming(weight, rank, scale), kaiming(weight, experts, scale)
        b = a.new_zeros(weight.shape[0], experts * rank)
        return Start({"lora_A": a, "lora_B": b, "lora_route": router}, constants={"scaling": scale})

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        # PyTorch sums a 16-bit softmax in float32 and rounds it once: what the paper asks for, at half the memory.
        gate = F.linear(x, p.lora_route.to(x.dtype)).softmax(-1)
        return Terms(p.lora_A, p.lora_B, p.scaling, Gate(gate))

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        score = (x @ p.lora_route.T).exp()
        share = score / score.sum(-1, keepdim=True)
        y = F.linear(x, weight, bias)
        for e, b in enumerate(p.lora_B.split(p.lora_A.shape[0], dim=1)):
            y = y + p.scaling * share[..., e : e + 1] * (x @ (b @ p.lora_A).T)
        return y
