"""QR-LoRA (Yang et al., 2025, arXiv 2507.04599): train the triangular factor of W's principal part. Trains ΔR.

    U_r S_r V_rᵀ = s · Q R₀,    y = x Wᵀ + s · drop(x) (mask ∘ ΔR)ᵀ Qᵀ + bias,    s = alpha / r

Q [out, r] has orthonormal columns and is frozen, ΔR [r, in] starts at zero, the mask is the upper trapezoid: entries
below the diagonal count for nothing, get no gradient and so stay zero. R₀ never trains, hence this `form="delta"` is
the published model without its rounding; `form="residual"` is that model as written, A = R₀ + mask ∘ ΔR beside
W − s Q R₀.

`delta_scale` > 0 draws ΔR from N(0, delta_scale²), as the published code does on request (with 0.01) without counting
it in its residual; here the residual form subtracts it too and starts as the base layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fused.initializers import check_rank, compute_dtype
from lowrank_fused.terms import Terms

from . import Start, method


@method
class QrLora:
    name = "qrlora"
    formula = "y = x Wᵀ + s · drop(x) (mask ∘ ΔR)ᵀ Qᵀ"
    keeps = ("x",)
    variants = ({"form": "residual"}, {"delta_scale": 0.01})

    @staticmethod
    def init(
        weight: Tensor, rank: int = 64, alpha: float | None = None, *, form: str = "delta", delta_scale: float = 0.0
    ) -> Start:
        if form not in ("delta", "residual"):
            raise ValueError(f"form must be 'delta' or 'residual', got {form!r}")
        if delta_scale < 0:
            raise ValueError(f"delta_scale must not be negative, got {delta_scale}")
        check_rank(weight, rank)
        scale = 1.0 if alpha is None else alpha / rank
        u, s, vh = torch.linalg.svd(weight.to(compute_dtype(weight)), full_matrices=False)
        # Q R of the principal part, of which the QR factors are those of its thin right half, turned by U.
        q, r = torch.linalg.qr((s[:rank] / scale)[:, None] * vh[:rank])
        residual = form == "residual"
        frozen = {"qrlora_Q": (u[:, :rank] @ q).to(weight.dtype)}
        if residual:
            frozen["qrlora_R"] = r.to(weight.dtype)
        delta = (delta_scale * torch.randn_like(r)).triu()
        return Start({"qrlora_delta": delta}, frozen, {"scaling": scale, "qrlora_form": form}, residual=residual)

    @staticmethod
    def differs_at_start(form: str, delta_scale: float) -> str | None:
        return "ΔR does not start at zero" if delta_scale and form == "delta" else None

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        r = p.qrlora_delta.triu()
        if p.qrlora_form == "residual":
            r = r + p.qrlora_R
        return Terms(r, p.qrlora_Q, p.scaling)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        rows, columns = p.qrlora_delta.shape
        mask = torch.arange(columns) >= torch.arange(rows)[:, None]
        base = p.qrlora_Q @ p.qrlora_R if p.qrlora_form == "residual" else 0.0
        return F.linear(x, weight + p.scaling * (base + p.qrlora_Q @ (p.qrlora_delta * mask)), bias)
