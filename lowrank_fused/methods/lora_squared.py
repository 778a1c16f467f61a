"""LoRA² (Zhang et al., 2024, arXiv 2408.06854): both of AdaLoRA's factors are products themselves. Trains all five.

    ΔW = s · (B₂ A₂) diag(E) (B₁ A₁),    y = x Wᵀ + drop(x) ΔWᵀ + bias,    s = alpha / (r + 10⁻⁵)

A₁ [k, in], B₁ [r, k], E [r], A₂ [k, r] and B₂ [out, k], the inner width k being `inner`. The published code multiplies
out [in, r] and [r, out] and from these the dense [in, out] in every call. Taken from the middle, B₂ (A₂ diag(E) B₁) A₁
is an adapter of rank k with a core [k, k], whatever r is.

E starts at zero and the rest from N(0, 0.02²), so the layer starts as the base layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lowrank_fused.initializers import compute_dtype
from lowrank_fused.terms import Terms

from . import Start, method


@method
class LoraSquared:
    name = "lora_squared"
    formula = "y = x Wᵀ + s · drop(x) (B₁ A₁)ᵀ diag(E) (B₂ A₂)ᵀ"

    @staticmethod
    def init(weight: Tensor, rank: int = 8, alpha: float | None = None, *, inner: int = 8) -> Start:
        if isinstance(inner, bool) or not isinstance(inner, int) or inner < 1:
            raise ValueError(f"inner must be a positive integer, got {inner!r}")
        out_features, in_features = weight.shape
        shapes = {
            "lora2_A1": (inner, in_features),
            "lora2_B1": (rank, inner),
            "lora2_A2": (inner, rank),
            "lora2_B2": (out_features, inner),
        }
        dtype = compute_dtype(weight)
        trained = {name: weight.new_empty(shape, dtype=dtype).normal_(std=0.02) for name, shape in shapes.items()}
        trained["lora2_E"] = weight.new_zeros(rank, dtype=dtype)
        return Start(trained, constants={"scaling": (rank if alpha is None else alpha) / (rank + 1e-5)})

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        return Terms(p.lora2_A1, p.lora2_B2, p.scaling, (p.lora2_A2 * p.lora2_E) @ p.lora2_B1)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        left, right = p.lora2_B2 @ p.lora2_A2, p.lora2_B1 @ p.lora2_A1
        return F.linear(x, weight + p.scaling * left @ p.lora2_E.diag() @ right, bias)
