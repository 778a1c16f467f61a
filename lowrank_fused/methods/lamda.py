"""LaMDA (Azizi et al., 2024, arXiv 2406.12832): a small matrix between two projections. Trains Σ, and B for a while.

    y = x Wᵀ + s · ((drop(x) Aᵀ) Σᵀ) Bᵀ + bias,    s = alpha / r

A [r, in] is frozen, so backward needs no x; Σ [r, r] is trained; B [out, r] is trained at first and then frozen column
by column over the first 30 % of the steps (`lowrank_fused.training.lamda`).

The paper starts spectrally and the published code does not. `init_lamda="spectral"`, the default, is the consistent
reading: with W ≈ U S Vᵀ of rank r, A = Vᵀ, Σ = S / s and B = U beside the residual W − U S Vᵀ, which starts as the base
layer. "random" is the code's: A Kaiming-uniform, Σ uniform in ±1/√r, B zero, W untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.init import kaiming_uniform_

from lowrank_fused import initializers
from lowrank_fused.terms import Terms

from . import Start, method


@method
class Lamda:
    name = "lamda"
    formula = "y = x Wᵀ + s · ((drop(x) Aᵀ) Σᵀ) Bᵀ"
    keeps = ("s",)
    variants = ({"init_lamda": "random"},)

    @staticmethod
    def init(weight: Tensor, rank: int = 32, alpha: float | None = None, *, init_lamda: str = "spectral") -> Start:
        scale = 1.0 if alpha is None else alpha / rank
        if init_lamda == "spectral":
            initializers.check_rank(weight, rank)
            exact = weight.to(initializers.compute_dtype(weight))
            u, s, vh = torch.linalg.svd(exact, full_matrices=False)
            a, sigma, b = vh[:rank], (s[:rank] / scale).diag(), u[:, :rank]
        elif init_lamda == "random":
            a, b = initializers.get("kaiming").function(weight, rank, scale)
            sigma = kaiming_uniform_(a.new_empty(rank, rank), a=5**0.5)
        else:
            raise ValueError(f"init_lamda must be 'spectral' or 'random', got {init_lamda!r}")
        return Start(
            {"lamda_sigma": sigma, "lamda_B": b},
            {"lamda_A": a.to(weight.dtype).contiguous()},
            {"scaling": scale},
            residual=init_lamda == "spectral",
        )

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        return Terms(p.lamda_A, p.lamda_B, p.scaling, p.lamda_sigma)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        return F.linear(x, weight + p.scaling * p.lamda_B @ p.lamda_sigma @ p.lamda_A, bias)
