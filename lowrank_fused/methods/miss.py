"""MiSS, first published as Bone (Kang et al., 2024, arXiv 2409.15371): one block for all shards of x. Trains D.

    y = x Wᵀ + s · (Σ_j drop(x)[j r : (j + 1) r]) D + bias,    s = alpha / r, which is 1 unless an alpha is given

D (`miss_block`) is [r, out] and starts at zero, so the layer starts as the base layer; with `init_weights=False` it
starts Kaiming-uniform, as in PEFT. `init_weights="mini"` trains [r, mini_r] and repeats it along the outputs, which
mini_r must divide. x counts as zero beyond its end where r does not divide its length.

Here B = Dᵀ, and A [r, in] is the tiled identity, A[k, c] = 1 where c ≡ k mod r, one for all layers of a width. It
follows from the sizes and is not saved. Since it is frozen, backward needs no x.

The variant "bat" is not here: its update W_block D + D multiplies the weight itself, block by block, and has full
rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_fused.initializers import compute_dtype
from lowrank_fused.peft_format import PeftFormat
from lowrank_fused.terms import Terms
from lowrank_fused.tiled import repeated_identity

from . import Site, Start, method


def tiles(weight: Tensor, rank: int, site: Site) -> nn.Parameter:
    """The tiled identity [rank, in] in the weight's dtype, one for all layers of a width."""
    in_features = weight.shape[1]
    name = f"miss_A.{rank}x{in_features}.{weight.dtype}.{weight.device}"
    if name not in site.shared:
        tiled = repeated_identity(rank, in_features, weight.dtype, weight.device)
        site.shared[name] = nn.Parameter(tiled, requires_grad=False)
    return site.shared[name]


@method
class Miss:
    name = "miss"
    formula = "y = x Wᵀ + s · (Σ_j drop(x)_j) D"
    keeps = ("s",)
    variants = ({"init_weights": "mini", "mini_r": 4},)
    peft = PeftFormat(
        "MISS",
        fields={
            "lora_dropout": "miss_dropout",
            "lora_alpha": None,
            "rank_pattern": None,
            "alpha_pattern": None,
            "fan_in_fan_out": None,
        },
        written={"bias": {"lora_only": "MiSS_only"}},
        read={"bias": {"MiSS_only": "lora_only"}},
    )

    @staticmethod
    def init(
        weight: Tensor,
        site: Site,
        rank: int = 64,
        alpha: float | None = None,
        *,
        init_weights: bool | str = True,
        mini_r: int = 1,
    ) -> Start:
        out_features, in_features = weight.shape
        if init_weights == "bat":
            raise ValueError(
                "init_weights='bat' updates the weight by W_block D + D, a change of full rank, which is no low-rank "
                "term beside the weight; use True or 'mini'"
            )
        if init_weights not in (True, False, "mini"):
            raise ValueError(f"init_weights must be True, False or 'mini', got {init_weights!r}")
        if rank > in_features:
            raise ValueError(f"rank {rank} is more than in_features = {in_features}, which it cuts into shards")
        mini = init_weights == "mini"
        if mini and (mini_r < 1 or out_features % mini_r):
            raise ValueError(f"mini_r must divide out_features = {out_features}, got {mini_r!r}")
        block = weight.new_zeros(rank, mini_r if mini else out_features, dtype=compute_dtype(weight))
        if init_weights is False:
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        constants = {"miss_scale": 1.0 if alpha is None else alpha / rank, "miss_mini": mini}
        return Start({"miss_block": block}, {"miss_A": tiles(weight, rank, site)}, constants, unsaved=("miss_A",))

    @staticmethod
    def differs_at_start(init_weights: bool | str, **_: Any) -> str | None:
        return "D starts at random values" if init_weights is False else None

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        b = p.miss_block.t()
        return Terms(p.miss_A, b.repeat(weight.shape[0] // len(b), 1) if p.miss_mini else b, p.miss_scale)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        rank, width = p.miss_block.shape
        shards = F.pad(x, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank))
        repeated = p.miss_block[:, torch.arange(weight.shape[0], device=x.device) % width]
        return F.linear(x, weight, bias) + p.miss_scale * shards.sum(-2) @ repeated
