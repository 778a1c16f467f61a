"""DoRA (Liu et al., 2024, arXiv 2402.09353): the length of each weight row apart from its direction. Trains A, B, m.

    V = W + s B A,    y = (m / ‖V‖) ∘ (x Vᵀ) + bias,    ‖V‖ [out] the norms of V's rows, m = ‖V‖ at the start

A [r, in], B [out, r], m [out]; s and the starts of A and B are LoRA's, residual ones included. ‖V‖² is
‖W‖² + 2 s (W Aᵀ)·B + s² (B A Aᵀ)·B, row by row, once per optimiser step: V is never formed.

As the paper suggests (section 4.3) and PEFT does, ‖V‖ is a constant for the gradient; `detach_norm=False` takes the
full gradient. With dropout, PEFT sends the dropped-out x through W as well; here dropout acts on the low-rank path
alone, as in LoRA and as merging assumes, so a PEFT run with dropout continues with another noise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fused.terms import Terms

from . import Start, method
from .lora import Lora


def row_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + scale · B A‖ of every row [out], in B's dtype and without the sum.

    Summed in float32 or wider; in a 16-bit layer W Aᵀ is a 16-bit product, so that W is not copied. Where the sum
    cancels to less than the rounding of its parts, that rounding stands in for it.

    Args:
        weight: W [out, in], any strides.
        a, b: A [r, in] and B [out, r].
    """
    wide = torch.promote_types(b.dtype, torch.float32)
    of_weight = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    mixed = (weight @ a.to(weight.dtype).t()).to(wide)  # [out, r]
    a, wide_b = a.to(wide), b.to(wide)
    of_update = scale**2 * ((wide_b @ (a @ a.t())) * wide_b).sum(1)
    limits = torch.finfo(wide)
    floor = limits.eps * (of_weight + of_update) + limits.tiny
    return torch.maximum(of_weight + 2 * scale * (mixed * wide_b).sum(1) + of_update, floor).sqrt().to(b.dtype)


@method
class Dora:
    name = "dora"
    formula = "y = (m / ‖W + s B A‖) ∘ (x Wᵀ + s · drop(x) Aᵀ Bᵀ)"
    keeps = ("x", "s", "y")
    variants = ({"init_lora_weights": "pissa"}, {"init_lora_weights": "init_b"})
    peft = replace(
        Lora.peft,
        fixed={"use_dora": True},
        requires={**Lora.peft.requires, "detach_norm": True},
        keys={**Lora.peft.keys, "lora_magnitude_vector": "{path}.lora_magnitude_vector"},
    )

    @staticmethod
    def init(
        weight: Tensor,
        rank: int = 8,
        alpha: float = 8.0,
        *,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        detach_norm: bool = True,
    ) -> Start:
        start = Lora.init(weight, rank, alpha, use_rslora=use_rslora, init_lora_weights=init_lora_weights)
        a, b = start.parameters["lora_A"], start.parameters["lora_B"]
        # Beside the residual of a start, V is the original weight.
        magnitude = row_norm(weight, a, torch.zeros_like(b) if start.residual else b, start.constants["scaling"])
        start.parameters["lora_magnitude_vector"] = magnitude
        start.constants["detach_norm"] = detach_norm
        return start

    @staticmethod
    def differs_at_start(use_rslora: bool, init_lora_weights: bool | str, detach_norm: bool) -> str | None:
        return Lora.differs_at_start(use_rslora, init_lora_weights)

    # Beside a residual the rows keep their length: m / ‖V‖ starts at one.
    taken_out = staticmethod(Lora.terms)

    @staticmethod
    def generate(p: Any, weight: Tensor) -> tuple[Tensor, ...]:
        a, b = (p.lora_A.detach(), p.lora_B.detach()) if p.detach_norm else (p.lora_A, p.lora_B)
        return (row_norm(weight, a, b, p.scaling),)

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        return Terms(p.lora_A, p.lora_B, p.scaling, col=p.lora_magnitude_vector / p.generated[0])

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        v = weight + p.scaling * p.lora_B @ p.lora_A
        length = v.norm(dim=1, keepdim=True)
        direction = v / (length.detach() if p.detach_norm else length)
        return F.linear(x, p.lora_magnitude_vector[:, None] * direction, bias)
