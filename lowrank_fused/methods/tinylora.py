"""TinyLoRA (2026, arXiv 2602.04118): LoRA-XS whose small matrix is a projection of a few numbers. Trains v.

    W ≈ U_r Σ_r V_rᵀ,    R = Σ_i v_i P_i,    y = x Wᵀ + s · ((drop(x) Aᵀ) Rᵀ) Bᵀ + bias

A = √Σ_r V_rᵀ [r, in], B = U_r √Σ_r [out, r] and P [u, r, r] are frozen; s = alpha / r, which is 1 unless an alpha is
given. v [u] starts at zero ("uniform": within ±`init_v_bound`; False, which in PEFT leaves memory uninitialised, is
the same here), so the layer starts as the base layer. `weight_tying` from 0 (a v per layer) to 1 (one for all) says
how many neighbouring layers share a v. Backward needs no x.

The paper leaves the distribution of P open; it is drawn here as PEFT draws it, N(0, 1 / r) from `projection_seed`
plus the layer's place in the model, so that an adapter saved with `save_projection=False` meets the same P again. As
in PEFT a rank above min(in, out) counts as that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_fused.initializers import compute_dtype
from lowrank_fused.initializers.svd import truncated_svd
from lowrank_fused.peft_format import SHARED, PeftFormat
from lowrank_fused.terms import Terms

from . import Site, Start, method


def group_of(site: Site, weight_tying: float) -> int:
    """Which of the vectors v a layer uses: neighbours share one, the last takes those left over."""
    layers = len(site.paths)
    groups = max(1, round(layers * (1.0 - weight_tying)))
    return min(site.index // max(1, layers // groups), groups - 1)


def projection(weight: Tensor, u: int, rank: int, seed: int) -> Tensor:
    """P [u, rank, rank] in float32 on the weight's device."""
    shape = (u, rank, rank)
    if weight.is_meta:
        return weight.new_empty(shape, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    return torch.normal(0.0, rank**-0.5, shape, generator=generator).to(weight.device)


@method
class TinyLora:
    name = "tinylora"
    formula = "y = x Wᵀ + s · ((drop(x) Aᵀ) (Σ_i v_i P_i)ᵀ) Bᵀ"
    keeps = ("s",)
    variants = ({"weight_tying": 1.0}, {"init_weights": "uniform"})
    peft = PeftFormat(
        "TINYLORA",
        fields={
            "lora_dropout": "tinylora_dropout",
            "lora_alpha": None,
            "rank_pattern": None,
            "alpha_pattern": None,
            "exclude_modules": None,
        },
        written={"bias": {"lora_only": "tinylora_only"}},
        read={"bias": {"tinylora_only": "lora_only"}},
        keys={"tinylora_v": f"{SHARED}tinylora_v.{{tinylora_group}}"},
    )

    @staticmethod
    def init(
        weight: Tensor,
        site: Site,
        rank: int = 2,
        alpha: float | None = None,
        *,
        u: int = 64,
        weight_tying: float = 0.0,
        projection_seed: int = 42,
        save_projection: bool = True,
        init_weights: bool | str = True,
        init_v_bound: float = 0.02,
    ) -> Start:
        if u < 1:
            raise ValueError(f"u, the length of v, must be at least 1, got {u!r}")
        if not 0.0 <= weight_tying <= 1.0:
            raise ValueError(f"weight_tying must be from 0 to 1, got {weight_tying!r}")
        if init_weights not in (True, False, "uniform"):
            raise ValueError(f"init_weights must be True, False or 'uniform', got {init_weights!r}")
        scale = 1.0 if alpha is None else alpha / rank
        rank = min(rank, *weight.shape)
        left, s, right = truncated_svd(weight, rank)
        group, seed = group_of(site, weight_tying), projection_seed + site.index
        name = f"tinylora_v.{group}"
        if name not in site.shared:
            v = weight.new_zeros(u, dtype=compute_dtype(weight))
            site.shared[name] = nn.Parameter(v if init_weights is True else v.uniform_(-init_v_bound, init_v_bound))
        frozen = {
            "tinylora_A": (s.sqrt()[:, None] * right).to(weight.dtype),
            "tinylora_B": (left * s.sqrt()).to(weight.dtype),
            "tinylora_P": projection(weight, u, rank, seed),
        }
        constants = {"tinylora_scale": scale, "tinylora_group": group}
        if not save_projection:
            constants["tinylora_seed"] = seed
        return Start(
            {"tinylora_v": site.shared[name]}, frozen, constants, unsaved=() if save_projection else ("tinylora_P",)
        )

    @staticmethod
    def differs_at_start(init_weights: bool | str, **_: Any) -> str | None:
        return None if init_weights is True else "v does not start at zero"

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        core = torch.tensordot(p.tinylora_v, p.tinylora_P.to(p.tinylora_v.dtype), dims=1)
        return Terms(p.tinylora_A, p.tinylora_B, p.tinylora_scale, core=core)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        r = sum(v_i * p_i for v_i, p_i in zip(p.tinylora_v, p.tinylora_P.to(p.tinylora_v.dtype), strict=True))
        return F.linear(x, weight + p.tinylora_scale * p.tinylora_B @ r @ p.tinylora_A, bias)
