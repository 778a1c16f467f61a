"""The frozen linear layer with a low-rank term: lowrank_linear() and its plain PyTorch witness."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .terms import Core, Gate

__all__ = ["lowrank_linear", "lowrank_linear_ref"]


def lowrank_linear_ref(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    core: Core = None,
    out: Tensor | None = None,
    col: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """The formula of `lowrank_linear` in plain differentiable PyTorch, any dtype and device.

    `keep` is the boolean dropout mask (True = kept) in the shape of x; without it nothing is dropped. Adapters are
    cast to x's dtype, as the fused routes do.
    """
    dropped = x if keep is None else x * keep * (1.0 / (1.0 - dropout_p))
    s = F.linear(dropped, a.to(x.dtype))
    if isinstance(core, Gate):
        v = (core.g.to(x.dtype)[..., :, None] * s[..., None, :]).flatten(-2)
    elif core is None:
        v = s
    else:
        v = s * core.to(x.dtype) if core.dim() == 1 else F.linear(s, core.to(x.dtype))
    low_rank = F.linear(v, b.to(x.dtype)) * scale
    if out is not None:
        low_rank = low_rank * out.to(x.dtype)
    y = F.linear(x, weight) + low_rank
    if col is not None:
        y = y * col.to(x.dtype)
    return y if bias is None else y + bias


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    core: Core = None,
    out: Tensor | None = None,
    col: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    route: str = "auto",
    seed: Tensor | None = None,
) -> Tensor:
    keep = None
    if dropout_p:
        keep = torch.rand_like(x, dtype=torch.float32) >= dropout_p
    return lowrank_linear_ref(
        x, weight, a, b, scale=scale, core=core, out=out, col=col, bias=bias, dropout_p=dropout_p, keep=keep
    )
