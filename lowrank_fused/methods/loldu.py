"""LoLDU (Shi et al., 2024, arXiv 2410.13618): train only the diagonal of W's own LDU factors. Trains z.

    W = P L D U,    y = x Wᵀ + ((x U_rᵀ) ∘ (σ z − σ₀ z₀)) (P L_r)ᵀ + bias,    σ = alpha / r, z₀ and σ₀ the
    start

L_r [out, r] and U_r [r, in] are the leading columns and rows of the unit factors, frozen, so backward needs
no x. This `form="delta"` starts exactly as the base layer and leaves W alone. As long as σ is fixed it is the
published model: `form="residual"`, σ₀ = 0 beside W − σ P L_r diag(z₀) U_r, which cancels two large terms and
so is coarse in 16 bits.

`init_method` names the published starts of z; only differences from it act on y, so they differ by weight
decay, by a trained σ (`train_sigma=True`) and by rounding. The published code subtracts another z than it
starts from for ones, zeros, s_uniform and s_normal, and so does not start as the base layer with these; here
all eight do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lowrank_fused.initializers.ldu import diagonal, ldu
from lowrank_fused.terms import Terms

from . import Start, method


@method
class Loldu:
    name = "loldu"
    formula = "y = x Wᵀ + ((x Uᵀ) ∘ (σ z − σ₀ z₀)) (P L)ᵀ"
    keeps = ("s",)
    variants = ({"form": "residual"}, {"init_method": "uniform"})

    @staticmethod
    def init(
        weight: Tensor,
        rank: int = 64,
        alpha: float | None = None,
        *,
        form: str = "delta",
        init_method: str = "lu",
        train_sigma: bool = False,
    ) -> Start:
        if form not in ("delta", "residual"):
            raise ValueError(f"form must be 'delta' or 'residual', got {form!r}")
        sigma = 1.0 if alpha is None else alpha / rank
        factors = ldu(weight, rank)
        z = diagonal(factors.diagonal, init_method)
        trained = {"loldu_z": z}
        constants = {"loldu_sigma0": sigma if form == "delta" else 0.0}
        if train_sigma:
            trained["loldu_sigma"] = z.new_full((1,), sigma)
        else:
            constants["loldu_sigma"] = sigma
        frozen = {
            "loldu_z0": z.clone(),
            "loldu_L": factors.lower.to(weight.dtype),
            "loldu_U": factors.upper.to(weight.dtype),
            "loldu_pivots": factors.pivots,
        }
        return Start(trained, frozen, constants, residual=form == "residual")

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        core = p.loldu_sigma * p.loldu_z - p.loldu_sigma0 * p.loldu_z0
        return Terms(p.loldu_U, p.loldu_L, core=core)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        now = p.loldu_L @ (p.loldu_sigma * p.loldu_z).diag() @ p.loldu_U
        start = p.loldu_L @ (p.loldu_sigma0 * p.loldu_z0).diag() @ p.loldu_U
        return F.linear(x, weight + now - start, bias)
