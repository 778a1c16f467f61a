"""DoRA with dynamic rank (Mao et al., 2024, arXiv 2405.17357): rank-one terms, each under a weight. Trains A, B, c.

    y = x Wᵀ + s · ((drop(x) Aᵀ) ∘ c) Bᵀ + bias,    s = alpha / r, r the rank at the start

A [r, in], B [out, r], c [r]. c starts at zero, A and B Kaiming-uniform in ±√(6 / fan-in) as in the published code, so
the layer starts as the base layer and c alone has a gradient in the first step. Training prunes: terms that weigh
little have their c held at zero (`lowrank_fused.training.dynamic_rank`), which is the paper's dynamic rank; s stays.

This DoRA is not the weight-decomposed one (dora.py), which goes by the same name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.init import kaiming_uniform_

from lowrank_fused.initializers import compute_dtype
from lowrank_fused.terms import Terms

from . import Start, method


@method
class DynamicRank:
    name = "dynamic_rank"
    formula = "y = x Wᵀ + s · ((drop(x) Aᵀ) ∘ c) Bᵀ"

    @staticmethod
    def init(weight: Tensor, rank: int = 8, alpha: float | None = None) -> Start:
        out_features, in_features = weight.shape
        dtype = compute_dtype(weight)
        trained = {
            "lora_A": kaiming_uniform_(weight.new_empty(rank, in_features, dtype=dtype)),
            "lora_B": kaiming_uniform_(weight.new_empty(out_features, rank, dtype=dtype)),
            "lora_c": weight.new_zeros(rank, dtype=dtype),
        }
        return Start(trained, constants={"scaling": 1.0 if alpha is None else alpha / rank})

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        return Terms(p.lora_A, p.lora_B, p.scaling, p.lora_c)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        delta = p.lora_B @ p.lora_c.diag() @ p.lora_A
        return F.linear(x, weight + p.scaling * delta, bias)
