"""The form that speed-minded trainers (unsloth, axolotl) run instead of PEFT's: library products only, added in place.

    y = x Wᵀ + bias;   y += scale · (x̂ Aᵀ) Bᵀ                      three products, x̂ = drop(x)
    g = dy B;   dA = scale · gᵀ x̂;   dB = scale · dyᵀ (x̂ Aᵀ)       four, x̂ Aᵀ computed anew
    dx = dy W;   dx += scale · g A                                 two; under dropout the second is autograd's to mask

Without dropout x is the only activation kept. Written from that description, as a provider to compare with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["three_gemm"]


def three_gemm(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float) -> Tensor:
    """y [M, N] in x's dtype from x [M, K], weight [N, K], a [R, K], b [N, R]; factors are cast to that dtype."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    dropped = F.dropout(x, p) if p else None
    return _ThreeGemm.apply(x, dropped, weight, a, b, bias, scale)


class _ThreeGemm(torch.autograd.Function):
    """Separate inputs x and x̂: autograd applies the mask to x̂'s gradient and adds the two."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, bias: Any, scale: float
    ) -> Tensor:
        low_rank_input = x if dropped is None else dropped
        y = F.linear(x, weight, bias)
        y.addmm_(low_rank_input @ a.t(), b.t(), alpha=scale)
        ctx.save_for_backward(low_rank_input, weight, a, b)
        ctx.scale, ctx.shares_input = scale, dropped is None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        low_rank_input, weight, a, b = ctx.saved_tensors
        g = dy @ b
        da = torch.addmm(torch.empty_like(a), g.t(), low_rank_input, beta=0, alpha=ctx.scale)
        s = low_rank_input @ a.t()
        db = torch.addmm(torch.empty_like(b), dy.t(), s, beta=0, alpha=ctx.scale)
        dx = dy @ weight
        if ctx.shares_input:
            dx.addmm_(g, a, alpha=ctx.scale)
            return dx, None, None, da, db, None, None
        dropped_grad = torch.addmm(torch.empty_like(dx), g, a, beta=0, alpha=ctx.scale)
        return dx, dropped_grad, None, da, db, None, None
