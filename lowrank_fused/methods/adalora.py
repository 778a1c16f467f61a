"""AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): an update as an SVD whose rank is pruned. Trains A, E, B.

    y = x Wᵀ + s · ((drop(x) Aᵀ) ∘ E) Bᵀ + bias,    s = alpha / (r + 1e-5)

A [r, in], E [r, 1], B [out, r]; A, B ~ N(0, 0.02²) and E = 0, so that the layer starts as the base layer. The
scale is that of the published code and of PEFT, small number included; r is the rank at the start and stays in
the scale when triplets are pruned.

That A and B stay near orthogonal and that the least important of E become zero is the training loop's part:
`orthogonality_penalty` and `RankAllocator` of lowrank_fused/training/adalora.py, which read target_r (the mean rank
in the end), tinit, tfinal, deltaT, total_step, beta1, beta2 and orth_reg_weight, PEFT's names and defaults. A layer
computes the same whatever these are.

PEFT writes a pruned layer without its pruned triplets; loaded here, these come back as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fused.initializers import compute_dtype
from lowrank_fused.peft_format import PeftFormat
from lowrank_fused.terms import Terms

from . import Start, method


def with_pruned_triplets(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in their full rank: PEFT's rank_pattern {"<path>.lora_E": [kept or not, ...]} says what is left."""
    full = dict(tensors)
    for name, kept in (config.get("rank_pattern") or {}).items():
        rows = torch.tensor(kept, dtype=torch.bool).nonzero()[:, 0]
        path = name.partition(".lora_E")[0]
        for key, dim in ((f"{path}.lora_A", 0), (f"{path}.lora_E", 0), (f"{path}.lora_B", 1)):
            if key in tensors and tensors[key].shape[dim] == len(rows):
                shape = [len(kept) if d == dim else size for d, size in enumerate(tensors[key].shape)]
                full[key] = tensors[key].new_zeros(shape).index_copy_(dim, rows, tensors[key])
    return full


@method
class AdaLora:
    name = "adalora"
    formula = "y = x Wᵀ + s · ((drop(x) Aᵀ) ∘ E) Bᵀ"
    # PEFT's AdaLoRA has neither pattern: its rank_pattern is the record of what was pruned.
    peft = PeftFormat(
        "ADALORA",
        fields={"r": "init_r", "rank_pattern": None, "alpha_pattern": None},
        # PEFT insists on a total_step: one step is no schedule.
        written={"total_step": {None: 1}},
        read={"total_step": {1: None}},
        ignored=("r", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
        unpack=with_pruned_triplets,
    )

    @staticmethod
    def init(
        weight: Tensor,
        rank: int = 12,
        alpha: float = 8.0,
        *,
        target_r: int = 8,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
        total_step: int | None = None,
    ) -> Start:
        if not (0 < beta1 < 1 and 0 < beta2 < 1):
            raise ValueError(f"beta1 and beta2 must be between 0 and 1, got {beta1!r} and {beta2!r}")
        if orth_reg_weight < 0:
            raise ValueError(f"orth_reg_weight must not be negative, got {orth_reg_weight!r}")
        if target_r < 1 or deltaT < 1 or tinit < 0 or tfinal < 0:
            raise ValueError(
                "target_r and deltaT must be at least 1, tinit and tfinal at least 0, got "
                f"target_r={target_r!r}, deltaT={deltaT!r}, tinit={tinit!r}, tfinal={tfinal!r}"
            )
        if tinit + tfinal >= (total_step or 1):
            raise ValueError(f"tinit + tfinal = {tinit + tfinal} leaves no step of total_step={total_step} to prune in")
        out_features, in_features = weight.shape
        shapes = {"lora_A": (rank, in_features), "lora_E": (rank, 1), "lora_B": (out_features, rank)}
        drawn = {name: weight.new_empty(size, dtype=compute_dtype(weight)) for name, size in shapes.items()}
        for value in drawn.values():
            value.normal_(std=0.02)
        drawn["lora_E"].zero_()
        return Start(drawn, constants={"scaling": alpha / (rank + 1e-5)})

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        return Terms(p.lora_A, p.lora_B, p.scaling, core=p.lora_E[:, 0])

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        return F.linear(x, weight + p.scaling * p.lora_B @ (p.lora_A * p.lora_E), bias)
