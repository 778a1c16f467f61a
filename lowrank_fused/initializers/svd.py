"""The leading singular directions of a weight, for methods whose factors are these."""

from __future__ import annotations

import torch
from torch import Tensor

from . import check_rank, compute_dtype

__all__ = ["truncated_svd"]


def truncated_svd(weight: Tensor, rank: int, niter: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, rank], S [rank], Vᵀ [rank, in] of the best approximation U diag(S) Vᵀ of that rank.

    Computed in float32 or better. `niter` replaces the full decomposition by a randomised one with that many power
    iterations, which depends on torch's random state. Raises ValueError for a rank above min(out, in).
    """
    check_rank(weight, rank)
    exact = weight.to(compute_dtype(weight))
    if niter is None:
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(exact, rank, niter=niter)
        vh = v.t()
    return u[:, :rank], s[:rank], vh[:rank]
