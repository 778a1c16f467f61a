"""Nyström start (Li et al., 2024, arXiv 2410.18965): B is a random sketch of W's column space, A is zero.

From memory, not checked against the paper's text: it starts the first factor of a factorisation of M from M Ω with a
Gaussian Ω and the second from zero (NyGD; for LoRA, with W in the place of M, NoRA), and proves fast convergence for
gradient descent preconditioned by the factors' Gram matrices. That leaves Ω's variance free, as the preconditioner
cancels it; under AdamW it matters, and 1/r is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import compute_dtype, initializer

__all__ = ["nystrom"]


@initializer("nystrom")
def nystrom(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """B = W Ω, Ω [in, r] ~ N(0, 1/r), so that B Bᵀ is W Wᵀ on average; A = 0. W stays as it is.

    The layer starts as the base layer, and its first step moves A alone.
    """
    exact = weight.to(compute_dtype(weight))
    sketch = torch.randn(weight.shape[1], rank, dtype=exact.dtype, device=exact.device) * rank**-0.5
    return exact.new_zeros(rank, weight.shape[1]), exact @ sketch
