"""LoRA-XS (Bałazy et al., 2024, arXiv 2405.17604): train a small matrix between W's singular vectors. Trains R.

    W ≈ U_r Σ_r V_rᵀ,    y = x Wᵀ + s · ((drop(x) Aᵀ) Rᵀ) Bᵀ + bias,    s = alpha / r

A = Σ_r V_rᵀ [r, in] and B = U_r [out, r] are frozen, R [r, r] starts at N(0, `init_std`²): all singular values are
on the input side, as in paper and published code. W is left alone, so a layer starts beside the base layer by an
amount of order `init_std`; zero makes it exact. Backward needs no x.

The published code finds the singular vectors by a randomised decomposition with 10 iterations; here that is
`svd_niter=10`, which costs seconds instead of minutes on a large layer, and a full one is the default. It has no
counterpart in PEFT.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lowrank_fused.initializers.svd import truncated_svd
from lowrank_fused.terms import Terms

from . import Start, method


@method
class LoraXs:
    name = "lora_xs"
    formula = "y = x Wᵀ + s · ((drop(x) Aᵀ) Rᵀ) Bᵀ"
    keeps = ("s",)
    variants = ({"svd_niter": 4}, {"init_std": 0.0})

    @staticmethod
    def init(
        weight: Tensor,
        rank: int = 16,
        alpha: float = 16.0,
        *,
        init_std: float = 1e-5,
        svd_niter: int | None = None,
    ) -> Start:
        if init_std < 0:
            raise ValueError(f"init_std must not be negative, got {init_std!r}")
        u, s, vh = truncated_svd(weight, rank, svd_niter)
        r = s.new_empty(rank, rank).normal_(std=init_std)
        frozen = {"lora_A": (s[:, None] * vh).to(weight.dtype), "lora_B": u.to(weight.dtype)}
        return Start({"lora_R": r}, frozen, {"scaling": alpha / rank})

    @staticmethod
    def differs_at_start(init_std: float, **_: Any) -> str | None:
        return "R starts at random values of size init_std" if init_std else None

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        return Terms(p.lora_A, p.lora_B, p.scaling, core=p.lora_R)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        return F.linear(x, weight + p.scaling * p.lora_B @ p.lora_R @ p.lora_A, bias)
