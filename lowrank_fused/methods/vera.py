"""VeRA (Kopiczko et al., 2023, arXiv 2310.11454): one random pair of factors for the model. Trains d and b.

    y = x Wᵀ + s · b ∘ (((drop(x) Aᵀ) ∘ d) Bᵀ) + bias,    s = alpha / r, which is 1 unless an alpha is given

A [r, largest in] and B [largest out, r] are frozen and shared; a layer uses their leading rows and columns, as
views. `vera_lambda_d` [r] starts at `d_initial` and `vera_lambda_b` [out] at zero, so the layer starts as the base
layer; with `init_weights=False` they start at N(0, 1) and one, as in PEFT. Only r + out numbers train per layer,
and backward needs no x.

The paper's A and B are Kaiming-uniform. They are drawn here as PEFT draws them, on the CPU from
`projection_prng_key`, A first, so that an adapter saved with `save_projection=False` meets the same pair again.
Neither paper nor PEFT has an alpha, or ranks that differ between layers: with one of these the adapter is saved in
our own format.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_fused.initializers import compute_dtype
from lowrank_fused.peft_format import SHARED, PeftFormat
from lowrank_fused.terms import Terms

from . import Site, Start, method


def projection(weight: Tensor, site: Site, key: int) -> tuple[nn.Parameter, nn.Parameter]:
    """The pair (A, B) of all layers of `site`, made by the first that asks, in its weight's dtype and device."""
    if "vera_A" not in site.shared:
        rank = max(site.ranks)
        shapes = (rank, max(k for _, k in site.shapes)), (max(n for n, _ in site.shapes), rank)
        generator = torch.Generator().manual_seed(key)
        for name, shape in zip(("vera_A", "vera_B"), shapes, strict=True):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
            drawn = weight.new_empty(shape)
            if not weight.is_meta:
                drawn.copy_(torch.empty(shape).uniform_(-bound, bound, generator=generator))
            site.shared[name] = nn.Parameter(drawn, requires_grad=False)
    return site.shared["vera_A"], site.shared["vera_B"]


@method
class Vera:
    name = "vera"
    formula = "y = x Wᵀ + s · b ∘ (((drop(x) Aᵀ) ∘ d) Bᵀ)"
    keeps = ("s",)
    peft = PeftFormat(
        "VERA",
        fields={
            "lora_dropout": "vera_dropout",
            "lora_alpha": None,
            "rank_pattern": None,
            "alpha_pattern": None,
            "exclude_modules": None,
        },
        written={"bias": {"lora_only": "vera_only"}},
        read={"bias": {"vera_only": "lora_only"}},
        keys={"vera_A": f"{SHARED}vera_A", "vera_B": f"{SHARED}vera_B"},
    )

    @staticmethod
    def init(
        weight: Tensor,
        site: Site,
        rank: int = 256,
        alpha: float | None = None,
        *,
        projection_prng_key: int = 0,
        save_projection: bool = True,
        d_initial: float = 0.1,
        init_weights: bool = True,
    ) -> Start:
        a, b = projection(weight, site, projection_prng_key)
        d = weight.new_full((rank,), d_initial, dtype=compute_dtype(weight))
        lambda_b = weight.new_zeros(weight.shape[0], dtype=d.dtype)
        if not init_weights:
            d.normal_()
            lambda_b.fill_(1.0)
        constants = {"vera_scale": 1.0 if alpha is None else alpha / rank}
        if not save_projection:
            constants["vera_key"] = projection_prng_key
        return Start(
            {"vera_lambda_d": d, "vera_lambda_b": lambda_b},
            {"vera_A": a, "vera_B": b},
            constants,
            unsaved=() if save_projection else ("vera_A", "vera_B"),
        )

    @staticmethod
    def differs_at_start(init_weights: bool, **_: Any) -> str | None:
        return None if init_weights else "b starts at one"

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        (n, k), r = weight.shape, len(p.vera_lambda_d)
        return Terms(p.vera_A[:r, :k], p.vera_B[:n, :r], p.vera_scale, core=p.vera_lambda_d, out=p.vera_lambda_b)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        d, b = p.vera_lambda_d.diag(), p.vera_lambda_b.diag()
        a_l = p.vera_A.narrow(1, 0, weight.shape[1]).narrow(0, 0, len(d))
        b_l = p.vera_B.narrow(0, 0, weight.shape[0]).narrow(1, 0, len(d))
        return F.linear(x, weight + p.vera_scale * b @ b_l @ d @ a_l, bias)
