"""The dense weight that a layer's Terms stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UnsupportedError
from .terms import Gate, Terms

__all__ = ["merged_weight"]


def merged_weight(weight: Tensor, terms: Terms) -> Tensor:
    """W' = col · (W + scale · out · B · core · A), rounded once to W's dtype.

    The sum is formed in float64 for a float32 or float64 weight and in float32 for a 16-bit one, so that the
    rounding to W's dtype is the only error that matters: W' is within one unit in the last place of the exact
    sum.

    Args:
        weight: W [N, K], any strides; is not written to.
        terms: what the method makes of its tensors. A per-token gate has no single matrix: UnsupportedError.
    """
    wide = torch.float64 if weight.dtype in (torch.float32, torch.float64) else torch.float32
    b = terms.b.to(wide)
    if isinstance(terms.core, Gate):
        raise UnsupportedError(
            "a per-token gate weights the experts by the input, so there is no weight to merge into"
        )
    if terms.core is not None:
        b = b * terms.core.to(wide) if terms.core.dim() == 1 else b @ terms.core.to(wide)
    if terms.out is not None:
        b = b * terms.out.to(wide)[:, None]
    total = torch.addmm(weight.to(wide), b, terms.a.to(wide), alpha=terms.scale)
    if terms.col is not None:
        total *= terms.col.to(wide)[:, None]
    return total.to(weight.dtype)
