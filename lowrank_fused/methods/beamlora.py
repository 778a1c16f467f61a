"""BeamLoRA (Gu et al., 2025, arXiv 2502.13604): LoRA whose ranks compete for a fixed total weight. Trains A, B, g.

    y = x Wᵀ + s · ((drop(x) Aᵀ) ∘ r softmax(g / τ)) Bᵀ + bias,    s = alpha / r, or alpha / √r with use_rslora

A [r, in] Kaiming-uniform, B [out, r] zero, g [r] zero: every rank starts with weight one and the layer as the base
layer. τ is `temperature`; at the published 0.05 the weights follow g quickly.

The published training also reassigns ranks: every few thousand steps those beyond 95 % of the total weight are
overwritten by copies of the leading ones, optimiser state included, and each pair shares the mean of its two gates.
That belongs to the training loop and is not part of the package.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fused import initializers
from lowrank_fused.terms import Terms

from . import Start, method


@method
class BeamLora:
    name = "beamlora"
    formula = "y = x Wᵀ + s · ((drop(x) Aᵀ) ∘ r softmax(g / τ)) Bᵀ"

    @staticmethod
    def init(
        weight: Tensor, rank: int = 8, alpha: float = 8.0, *, use_rslora: bool = False, temperature: float = 0.05
    ) -> Start:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        scale = alpha / (math.sqrt(rank) if use_rslora else rank)
        a, b = initializers.get("kaiming").function(weight, rank, scale)
        trained = {"lora_A": a, "lora_B": b, "lora_gate": a.new_zeros(rank)}
        return Start(trained, constants={"scaling": scale, "temperature": temperature})

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        gate = p.lora_gate.to(torch.promote_types(p.lora_gate.dtype, torch.float32))
        return Terms(p.lora_A, p.lora_B, p.scaling, len(gate) * torch.softmax(gate / p.temperature, 0))

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        shares = (p.lora_gate / p.temperature).exp()
        shares = p.lora_A.shape[0] * shares / shares.sum()
        return F.linear(x, weight + p.scaling * (p.lora_B * shares) @ p.lora_A, bias)
