"""The dense weight that a layer's Terms stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UnsupportedError
from .terms import Gate, Terms

__all__ = ["merged_weight"]

# Elements of W that are widened at a time: 128 MiB in float64, whatever the size of W.
_BLOCK = 2**24


def merged_weight(weight: Tensor, terms: Terms) -> Tensor:
    """W' = col · (W + scale · out · B · core · A), summed in float64 and rounded to W's dtype.

    The rounding to W's dtype is the only error that counts: W' is within one unit in the last place of the
    exact sum in every dtype, on every device, and whether or not TF32 is allowed.

    Args:
        weight: W [N, K], any strides; it is not written to.
        terms: what the method makes of its tensors.

    Raises UnsupportedError for a per-token gate, which no single matrix stands for.
    """
    if isinstance(terms.core, Gate):
        raise UnsupportedError("a per-token gate weights the experts by the input: no weight to merge into")
    a, b = terms.a.double(), terms.b.double()
    if terms.core is not None:
        core = terms.core.double()
        b = b * core if core.dim() == 1 else b @ core
    if terms.out is not None:
        b = b * terms.out.double()[:, None]
    merged = torch.empty_like(weight)
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        total = torch.addmm(weight[rows].double(), b[rows], a, alpha=terms.scale)
        if terms.col is not None:
            total *= terms.col[rows].double()[:, None]
        merged[rows] = total.to(weight.dtype)
    return merged
