"""PiSSA (Meng et al., 2024, arXiv 2404.02948): start from, and train, W's principal singular directions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import check_rank, compute_dtype, initializer

__all__ = ["pissa"]


@initializer("pissa", residual=True)
def pissa(weight: Tensor, rank: int, scale: float, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """A = √(S_r / scale) V_rᵀ, B = U_r √(S_r / scale) from W = U S Vᵀ: scale · B A is W's best rank r.

    `niter` replaces the full decomposition by a randomised one with that many power iterations (seconds
    instead of minutes for a large model), which depends on torch's random state.
    """
    check_rank(weight, rank)
    if scale <= 0:
        raise ValueError(f"PiSSA divides by the scale alpha / rank, which must be positive, got {scale}")
    exact = weight.to(compute_dtype(weight))
    if niter is None:
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(exact, rank, niter=niter)
        vh = v.t()
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
