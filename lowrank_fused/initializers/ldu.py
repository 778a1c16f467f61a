"""The leading part of a pivoted factorisation W = P L D U, and LoLDU's starts of the diagonal."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_fused.errors import SingularPivotError

from . import check_rank, compute_dtype

__all__ = ["LDU", "diagonal", "ldu"]


class LDU(NamedTuple):
    """W's leading r pivots: `lower` = P L_r [out, r], `diagonal` = D_r [r], `upper` = unit U_r [r, in].

    `pivots` [r] int32 are LAPACK's, one-based: in step k row k was swapped with row pivots[k]. The
    permutation is already in `lower`; they tell which of several equal pivots was taken.
    """

    lower: Tensor
    diagonal: Tensor
    upper: Tensor
    pivots: Tensor


def ldu(weight: Tensor, rank: int) -> LDU:
    """The leading `rank` columns of L and rows of U of W [out, in], in float32 or better.

    Partial pivoting looks at one column at a time, so the leading part comes from W's first `rank` columns
    alone, and the rest of U_r from one triangular solve: O(out · r² + r² · in) instead of a whole
    factorisation.

    Raises SingularPivotError if one of these pivots is zero within the rounding of the elimination, or so
    small that the unit U does not fit W's dtype; ValueError if rank exceeds min(out, in).
    """
    check_rank(weight, rank)
    exact = weight.to(compute_dtype(weight))
    packed, pivots = torch.linalg.lu_factor_ex(exact[:, :rank])[:2]
    if weight.is_meta:
        return LDU(packed, exact[0, :rank], exact[:rank], pivots)
    order = torch.arange(len(weight))
    for k, swapped in enumerate(pivots.tolist()):
        order[[k, swapped - 1]] = order[[swapped - 1, k]]
    order = order.to(weight.device)
    lower = packed.tril(-1)
    lower.diagonal().fill_(1.0)
    rest = torch.linalg.solve_triangular(lower[:rank], exact[order[:rank], rank:], upper=False, unitriangular=True)
    scaled = torch.cat([packed[:rank].triu(), rest], dim=1)
    pivot = packed.diagonal().clone()
    _check_pivots(weight, scaled, pivot)
    return LDU(torch.empty_like(lower).index_copy_(0, order, lower), pivot, scaled / pivot[:, None], pivots)


def _check_pivots(weight: Tensor, scaled: Tensor, pivot: Tensor) -> None:
    noise = max(weight.shape) * torch.finfo(scaled.dtype).eps * weight.abs().max()
    overflows = scaled.abs().amax(dim=1) > torch.finfo(weight.dtype).max * pivot.abs()
    bad = (pivot.abs() <= noise) | overflows | ~torch.isfinite(pivot)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise SingularPivotError(
            f"pivot {first} of the leading {len(pivot)} is {pivot[first].item():.3g} (largest weight "
            f"{weight.abs().max().item():.3g}): W is singular there and U = U₀ / D would blow up. Take a "
            f"rank of at most {first}, or leave this layer out with exclude_modules"
        )


def diagonal(pivot: Tensor, method: str) -> Tensor:
    """LoLDU's start of the trained diagonal from the pivots D_r [r], by its published name.

    lu: D_r · uniform: U(−|m|/2, |m|/2) with m the mean of D_r · normal: N(m, std of D_r) · constant: m · ones
    · zeros ·
    s_uniform: U(−1, 1) · s_normal: N(0, 1).
    """
    mean = pivot.mean()
    starts = {
        "lu": lambda: pivot.clone(),
        "uniform": lambda: (torch.rand_like(pivot) - 0.5) * mean.abs(),
        "normal": lambda: mean + torch.randn_like(pivot) * pivot.std(correction=min(1, len(pivot) - 1)),
        "constant": lambda: mean.expand_as(pivot).clone(),
        "ones": lambda: torch.ones_like(pivot),
        "zeros": lambda: torch.zeros_like(pivot),
        "s_uniform": lambda: 2.0 * torch.rand_like(pivot) - 1.0,
        "s_normal": lambda: torch.randn_like(pivot),
    }
    if method not in starts:
        raise ValueError(f"init_method must be one of {', '.join(starts)}, got {method!r}")
    return starts[method]()
