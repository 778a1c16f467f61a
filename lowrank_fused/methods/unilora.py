"""Uni-LoRA (Li et al., 2025, arXiv 2506.00799): one vector fills every factor of the model. Trains θ [d].

    y = x Wᵀ + drop(x) Aᵀ Bᵀ + bias,    A [r, in] and B [out, r] of all layers = consecutive parts of P θ

P [D, d] has one element a row, n_j^(-1/2) in a column that a seed chooses (factors/projection.py). Indices are
global over all layers, in model order with A before B, and balanced: PᵀP = I, so ‖P θ‖ = ‖θ‖. θ starts uniform in
±`init_theta_d_bound`; neither factor is zero, so that both get a gradient, and a layer starts a little beside its base
layer. There is no alpha, the scale is 1.

Names and defaults are PEFT's but for the length: PEFT's 256 is known to train to nothing. The default here is the
23,040 that the paper takes for RoBERTa; for language models it takes 524,288 (7B) to 1,048,576 (13B). A length above D,
which PEFT allows too, leaves entries that nothing reads, with a warning.

`index="table"` is PEFT's index for a `proj_seed`, and adapters go both ways. A file that carries its indices
(`save_indices`) is compared with the recipe. PEFT rounds n^(-1/2) and the first θ to the base weight's dtype, which is
off by up to 0.25 % in bf16 and no longer isometric; here both are fp32. The paper draws indices independently and
flattens B before A; both published codes balance, and flatten A first. `index="bijection"` computes the indices from
the seed and stores none; PEFT does not have it. `deterministic=False` lets the gradient of θ be summed atomically on a
GPU, which needs no inverted index.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_fused.factors.gather import SharedFactors
from lowrank_fused.factors.projection import MAX_TOTAL, Projection, projection
from lowrank_fused.peft_format import PeftFormat
from lowrank_fused.terms import Terms

from . import Site, Start, method


@method
class UniLora:
    name = "unilora"
    formula = "y = x Wᵀ + drop(x) A(P θ)ᵀ B(P θ)ᵀ"
    variants = ({"index": "bijection"},)
    small = {"theta_d_length": 16, "init_theta_d_bound": 0.5}
    differs_at_start = "neither factor starts at zero, so that both get a gradient"
    peft = PeftFormat(
        "UNILORA",
        fields={
            "lora_alpha": None, "alpha_pattern": None, "rank_pattern": None, "exclude_modules": None,
            "deterministic": None, "lora_dropout": "unilora_dropout",
        },
        requires={"index": "table"},
        written={"bias": {"lora_only": "unilora_only"}},
        read={"bias": {"unilora_only": "lora_only"}},
        ignored=("save_indices", "init_weights"),
        keys={"unilora_theta_d": "shared:unilora_theta_d"},
    )  # fmt: skip

    @staticmethod
    def init(
        weight: Tensor,
        site: Site,
        rank: int = 4,
        alpha: float | None = None,
        *,
        theta_d_length: int = 23_040,
        proj_seed: int = 42,
        init_theta_d_bound: float = 0.02,
        index: str = "table",
        deterministic: bool = True,
    ) -> Start:
        _check("theta_d_length", theta_d_length, 1, MAX_TOTAL)
        _check("proj_seed", proj_seed, 0, 2**63 - 1)
        if not (math.isfinite(init_theta_d_bound) and init_theta_d_bound > 0):
            raise ValueError(f"init_theta_d_bound must be positive, got {init_theta_d_bound!r}")
        layout = [(n, k, r) for (n, k), r in zip(site.shapes, site.ranks, strict=True)]
        sizes = [r * (n + k) for n, k, r in layout]
        if "unilora" not in site.shared:
            if theta_d_length > sum(sizes):
                warnings.warn(
                    f"theta_d_length={theta_d_length:,} is more than the {sum(sizes):,} elements of all factors; the "
                    "rest of the vector trains nothing",
                    stacklevel=2,
                )
            drawn = torch.empty(theta_d_length, device=weight.device)
            theta = nn.Parameter(drawn.uniform_(-init_theta_d_bound, init_theta_d_bound))
            p = projection(sum(sizes), theta_d_length, proj_seed, index)
            site.shared["unilora"] = theta, SharedFactors(p, layout, deterministic)
        theta, factors = site.shared["unilora"]
        place = {"unilora_first": sum(sizes[: site.index]), "unilora_rank": rank}
        return Start({"unilora_theta_d": theta}, constants={"unilora_factors": factors, **place})

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        return Terms(*p.unilora_factors.of_layer(p.unilora_theta_d, p.unilora_first, p.unilora_rank, weight))

    @staticmethod
    def implied(p: Any, weight: Tensor) -> dict[str, Tensor]:
        """PEFT's indices and scales, which `save_indices` puts into its files."""
        (n, k), r, first = weight.shape, p.unilora_rank, p.unilora_first
        projected: Projection = p.unilora_factors.projection
        scale = projected.scale(weight.device, torch.float32)
        found: dict[str, Tensor] = {}
        for letter, at, shape in (("A", first, (r, k)), ("B", first + r * k, (n, r))):
            entries = projected.entries(at, shape[0] * shape[1], weight.device).view(shape)
            found |= {f"unilora_indices_{letter}": entries, f"unilora_scales_{letter}": scale[entries.long()]}
        return found

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        projected = p.unilora_factors.projection
        index = projected.entries(0, projected.total, x.device).long()
        counts = index.bincount(minlength=projected.length).to(p.unilora_theta_d.dtype)
        all_factors = (p.unilora_theta_d / counts.sqrt())[index]
        (n, k), r = weight.shape, p.unilora_rank
        own = all_factors[p.unilora_first :][: r * (k + n)]
        return F.linear(x, weight + own[r * k :].view(n, r) @ own[: r * k].view(r, k), bias)


def _check(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
