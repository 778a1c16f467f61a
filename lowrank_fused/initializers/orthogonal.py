"""Orthogonal start: two factors that are both non-zero and yet multiply to nothing (PEFT's "orthogonal").

The recipe, with its constant 1/10, is PEFT's, which names https://datta0.github.io/posts/rethink-lora-init as source.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import compute_dtype, initializer

__all__ = ["orthogonal"]


@initializer("orthogonal")
def orthogonal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A = (X Q_even)ᵀ / 10 and B = Y Q_odd / 10, so that B A = 0; neither factor waits for the other's first step.

    Q_even and Q_odd [r/2, r] are every second row of a random orthogonal matrix, X [in, r/2] and Y [out, r/2] are
    standard normal. Raises ValueError for an odd rank.
    """
    if rank % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, got {rank}")
    draw = partial(torch.randn, dtype=compute_dtype(weight), device=weight.device)
    basis, _ = torch.linalg.qr(draw(rank, rank))
    a = (draw(weight.shape[1], rank // 2) @ basis[0::2]).t() / 10
    b = draw(weight.shape[0], rank // 2) @ basis[1::2] / 10
    return a.contiguous(), b
