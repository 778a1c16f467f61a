"""LoRA (Hu et al., 2021, arXiv 2106.09685): a low-rank update beside the frozen weight. Trains A and B.

    y = x Wᵀ + scale · drop(x) Aᵀ Bᵀ + bias,    scale = alpha / r,  or alpha / √r with use_rslora (arXiv
    2312.03732)

A [r, in], B [out, r]. `init_lora_weights` chooses the start (lowrank_fused/initializers); those of PiSSA and
OLoRA are
residual: the base weight becomes W − scale · B A, so that the layer still starts as the original one.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lowrank_fused import initializers
from lowrank_fused.peft_format import PeftFormat
from lowrank_fused.terms import Terms

from . import Start, method


@method
class Lora:
    name = "lora"
    formula = "y = x Wᵀ + s · drop(x) Aᵀ Bᵀ"
    variants = ({"init_lora_weights": "pissa"}, {"init_lora_weights": "init_b"})
    # Of starts that PEFT does not know, and of data-driven ones, the values are in the file.
    peft = PeftFormat(
        "LORA",
        fixed={"use_dora": False},
        written={"init_lora_weights": dict.fromkeys(("kaiming", "init_a", "init_b", "nystrom", "random"), True)},
        read={"init_lora_weights": {"eva": True}},
        keys={"lora_A": "{path}.lora_A.weight", "lora_B": "{path}.lora_B.weight"},
    )

    @staticmethod
    def init(
        weight: Tensor,
        rank: int = 8,
        alpha: float = 8.0,
        *,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> Start:
        scale = alpha / (math.sqrt(rank) if use_rslora else rank)
        start = initializers.get(init_lora_weights)
        a, b = start.function(weight, rank, scale)
        return Start({"lora_A": a, "lora_B": b}, constants={"scaling": scale}, residual=start.residual)

    @staticmethod
    def differs_at_start(use_rslora: bool, init_lora_weights: bool | str) -> str | None:
        drawn = init_lora_weights is False or init_lora_weights == "random"
        return "neither factor starts at zero" if drawn else None

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        return Terms(p.lora_A, p.lora_B, p.scaling)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        return F.linear(x, weight + p.scaling * p.lora_B @ p.lora_A, bias)
