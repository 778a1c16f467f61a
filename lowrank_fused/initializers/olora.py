"""OLoRA (Büyükakyüz, 2024, arXiv 2406.01775): start from an orthonormal basis of W's leading columns."""

from __future__ import annotations

import torch
from torch import Tensor

from . import check_rank, compute_dtype, initializer

__all__ = ["olora"]


@initializer("olora", residual=True)
def olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A = R_r, B = Q_r from W = Q R: B has orthonormal columns. As in the paper, scale is not divided out."""
    check_rank(weight, rank)
    q, r = torch.linalg.qr(weight.to(compute_dtype(weight)))
    return r[:rank].contiguous(), q[:, :rank].contiguous()
