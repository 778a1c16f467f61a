"""Route `reference`: the formula in plain PyTorch, out of place, any dtype and device. The correctness anchor.

`lowrank_linear_ref` is differentiated by autograd and shares no line with any route's backward, so it is what tests
compare everything against, this route included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import keep_of, pack, unpack, unpadded
from ..terms import Core, Gate
from .cores import core_forward, core_grad, core_input_grad
from .problem import NOWHERE, Grads, Into, Options, Saved

__all__ = ["add_forward", "backward", "forward", "lowrank_linear_ref"]


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


def forward(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    bias: Tensor | None,
    drop: Tensor | None,
    o: Options,
) -> tuple[Tensor, Saved]:
    """y and what backward needs; x [M, K]."""
    y = F.linear(x, weight, bias)
    return y, add_forward(y, x, a, b, core, drop, o)


def add_forward(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, core: Tensor | None, drop: Tensor | None, o: Options
) -> Saved:
    """y += scale · core(s) Bᵀ in place."""
    m, k = x.shape
    keep = None if drop is None else keep_of(drop, m, k, o.dropout_p)
    s = _dropped(x, None if keep is None else unpadded(keep, k), o.dropout_p) @ a.to(x.dtype).t()
    y.add_(core_forward(s, o.core_kind, core) @ b.to(x.dtype).t(), alpha=o.scale)
    if keep is None or drop is None:
        return Saved(s, None)
    return Saved(s, drop if drop.dtype == torch.uint8 else pack(keep))


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    saved: Saved,
    o: Options,
    into: Into = NOWHERE,
) -> Grads:
    """The gradients that `o` asks for, one formula each."""
    s, mask = saved
    keep = None if mask is None else unpack(mask, a.shape[1])
    gv = o.scale * (dy @ b.to(dy.dtype))
    ds = core_input_grad(gv, o.core_kind, core)
    dx = _dropped(ds @ a.to(dy.dtype), keep, o.dropout_p) if o.wants_x else None
    return Grads(
        x=dx if dx is None or weight is None else dy @ weight + dx,
        a=ds.t() @ _dropped(x, keep, o.dropout_p) if o.wants_a and x is not None else None,
        b=o.scale * (dy.t() @ core_forward(s, o.core_kind, core)) if o.wants_b and s is not None else None,
        core=core_grad(gv, s, o.core_kind) if o.wants_core and s is not None else None,
        bias=dy.sum(0) if o.wants_bias else None,
    )


def _dropped(z: Tensor, keep: Tensor | None, p: float) -> Tensor:
    return z if keep is None else torch.where(keep, z / (1.0 - p), 0.0)
