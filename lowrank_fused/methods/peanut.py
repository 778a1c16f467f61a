"""NEAT, in PEFT PEANuT (Zhong et al., 2024, arXiv 2410.01870): a factor is a function of W. Trains A, B, E_i, D_i.

    T (default):  y = x Wᵀ + s · drop(x) Hᵀ Bᵀ + bias,   H = net(A W) [r, in],    A [r, out], B [out, r]
    N:            y = x Wᵀ + s · drop(x) Bᵀ H + bias,    H = net(A Wᵀ) [r, out],  A [r, in],  B [r, in]

net is act alone at depth 0. With d pairs of hidden layers [r, r] it is h₀ = act(·), hᵢ₊₁ = act(Eᵢ hᵢ), then
h = act(Dᵢ h) + h_{d−1−i} for each decoder. `depth` counts pairs as PEFT's does: the authors' depth is 2 · depth + 2.
A, E and D start uniform in ±1/√fan_in and B at zero, so the layer starts as the base layer.

The two orientations are incompatible, and nothing in the shapes of a square W tells them apart. T is what the authors'
NLU and ViT code and PEFT compute; N is the formula of the paper, σ(W Θ₁) Θ₂ with A = Θ₁ᵀ and B = Θ₂ (transposed,
`lora_B` there), and the authors' LLM code. Either way the update has rank r: H is made from one read of W per optimiser
step, and no [out, in] update is formed, where the published code and PEFT form one in every call.

s = scaling · alpha / r. PEFT has `scaling` alone: leave alpha at its default, r, and give `scaling`, for adapters that
PEFT is to read. The published code accepts a dropout and applies none; here it is the usual one, on the low-rank input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.init import kaiming_uniform_

from lowrank_fused.factors.activations import Activation, activation, activation_names
from lowrank_fused.factors.weight_factor import weight_factor
from lowrank_fused.initializers import compute_dtype
from lowrank_fused.peft_format import PeftFormat
from lowrank_fused.terms import Terms

from . import Start, method


@method
class Peanut:
    name = "peanut"
    formula = "y = x Wᵀ + s · drop(x) σ(A W)ᵀ Bᵀ"
    variants = (
        {"orientation": "N"},
        {"depth": 2, "act_fn": "gelu"},
        {"depth": 1, "orientation": "N", "act_fn": "tanh"},
        {"act_fn": "sin"},
        {"scaling": 2.0, "act_fn": "silu"},
    )
    peft = PeftFormat(
        "PEANUT",
        fields=dict.fromkeys(("lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out")),
        requires={"orientation": "T"},
        values={"act_fn": [name for name in activation_names() if name != "sin"]},
        keys={
            r"peanut_([AB])": "{path}.peanut_{0}.weight",
            r"peanut_(encoders|decoders)_(\d+)": "{path}.peanut_{0}.{1}.weight",
        },
    )

    @staticmethod
    def init(
        weight: Tensor,
        rank: int = 32,
        alpha: float | None = None,
        *,
        orientation: str = "T",
        depth: int = 0,
        act_fn: str = "relu",
        scaling: float = 1.0,
        init_weights: bool = True,
    ) -> Start:
        if orientation not in ("T", "N"):
            raise ValueError(f"orientation must be 'T' (PEFT's) or 'N' (the paper's), got {orientation!r}")
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
            raise ValueError(f"depth must be the number of encoder and decoder pairs, 0 or more, got {depth!r}")
        activation(act_fn)
        draw = partial(_uniform, dtype=compute_dtype(weight), device=weight.device)
        (n, k), r = weight.shape, rank
        trained = {"peanut_A": draw(r, n if orientation == "T" else k)}
        for kind in ("encoders", "decoders"):
            trained |= {f"peanut_{kind}_{i}": draw(r, r) for i in range(depth)}
        trained["peanut_B"] = draw(n, r) if orientation == "T" else draw(r, k)
        if init_weights:
            trained["peanut_B"].zero_()
        scale = scaling * (1.0 if alpha is None else alpha / rank)
        return Start(
            trained,
            constants={
                "scaling": scale, "peanut_orientation": orientation, "peanut_depth": depth, "peanut_act_fn": act_fn
            },
        )  # fmt: skip

    @staticmethod
    def differs_at_start(init_weights: bool, **_: Any) -> str | None:
        return None if init_weights else "B does not start at zero"

    @staticmethod
    def generate(p: Any, weight: Tensor) -> tuple[Tensor, ...]:
        """H [r, in], or [r, out] in orientation N."""
        h = weight_factor(p.peanut_A, weight if p.peanut_orientation == "T" else weight.t(), p.peanut_act_fn)
        encoders, decoders = (
            [getattr(p, f"peanut_{kind}_{i}") for i in range(p.peanut_depth)] for kind in ("encoders", "decoders")
        )
        return (deepened(h, encoders, decoders, activation(p.peanut_act_fn)),)

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        (h,) = p.generated
        if p.peanut_orientation == "T":
            return Terms(h, p.peanut_B, p.scaling)
        return Terms(p.peanut_B, h.t(), p.scaling)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        act, depth = activation(p.peanut_act_fn), p.peanut_depth
        w0 = weight.t() if p.peanut_orientation == "T" else weight  # rows of the network's batch
        hidden = [act(w0 @ p.peanut_A.t())]
        for i in range(depth):
            hidden.append(act(F.linear(hidden[-1], getattr(p, f"peanut_encoders_{i}"))))
        out = hidden[depth]
        for i in range(depth):
            out = act(F.linear(out, getattr(p, f"peanut_decoders_{i}"))) + hidden[depth - 1 - i]
        delta = (out @ p.peanut_B.t()).t() if p.peanut_orientation == "T" else out @ p.peanut_B
        return F.linear(x, weight + p.scaling * delta, bias)


def deepened(h: Tensor, encoders: Sequence[Tensor], decoders: Sequence[Tensor], act: Activation) -> Tensor:
    """h₀ = act(A W) [r, in] sent through the pairs of hidden layers."""
    encoded = []
    for encoder in encoders:
        encoded.append(h)
        h = act(encoder @ h)
    for decoder in decoders:
        h = act(decoder @ h) + encoded.pop()
    return h


def _uniform(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uniform in ±1/√columns."""
    return kaiming_uniform_(torch.empty(rows, columns, dtype=dtype, device=device), a=math.sqrt(5))
