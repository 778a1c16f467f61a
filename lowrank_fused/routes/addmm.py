"""Route `addmm`: library GEMMs, the low-rank term added in place. Any device and floating dtype.

The default on a CPU and the floor on a GPU. Keeps what the kernels keep: s, the packed mask, and x by reference. Every
scalar factor rides as the alpha of a product, so that no result is rounded twice.

Many tokens and a high rank make it cheaper to add scale · B core A to the weight and run one product than to add
v Bᵀ to y (`forms_weight`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dropout import keep_of, pack, unpack, zero_dropped
from ..tiled import is_tiled, shards
from .cores import core_forward, core_grad, core_input_grad
from .problem import NOWHERE, Grads, GroupGrads, GroupOptions, Into, Options, Saved
from .rows import across, readable

__all__ = ["add_forward", "backward", "forms_weight", "forward", "group_backward", "group_forward"]


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
    """y = x Wᵀ + bias, then y += scale · core(s) Bᵀ in place; x [M, K]."""
    if forms_weight(x.shape[0], weight.shape[1], a.shape[0], x.dtype, o):
        s = _shrunk(x, a, 1.0) if o.keeps_s else None
        return torch.nn.functional.linear(x, _formed(weight, a, b, core, o), bias), Saved(s, None)
    y = torch.nn.functional.linear(x, weight, bias)
    return y, add_forward(y, x, a, b, core, drop, o)


def add_forward(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, core: Tensor | None, drop: Tensor | None, o: Options
) -> Saved:
    """y += scale · core(s) Bᵀ in place."""
    mask = None
    dropped = x
    if drop is not None:
        keep = keep_of(drop, x.shape[0], x.shape[1], o.dropout_p)
        mask = drop if drop.dtype == torch.uint8 else pack(keep)
        dropped = zero_dropped(x, keep)
    s = _shrunk(dropped, a, o.keep_scale)
    y.addmm_(core_forward(s, o.core_kind, core), _in(x.dtype, b).t(), alpha=o.scale)
    return Saved(s, mask)


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
    """Gradients that `o` asks for; one product with dy gives gv, everything of the core lives on [M, R]."""
    grads = Grads()
    s, mask = saved
    keep = None if mask is None else unpack(mask, a.shape[1])
    if o.wants_b and s is not None:
        v = core_forward(s, o.core_kind, core)
        if across(b):
            grads.b = _scaled_mm(v.t(), dy, o.scale).t()
        else:
            grads.b = _scaled_mm(dy.t(), v, o.scale, out=_if_like(into.b, dy))
    if o.wants_x and weight is not None and forms_weight(dy.shape[0], weight.shape[0], a.shape[0], dy.dtype, o):
        grads.x = dy @ _formed(weight, a, b, core, o)
    if o.wants_a or o.wants_core or (o.wants_x and grads.x is None):
        gv = _scaled_mm(dy, _in(dy.dtype, b), o.scale)
        if o.wants_core and s is not None:
            grads.core = core_grad(gv, s, o.core_kind)
        ds = core_input_grad(gv, o.core_kind, core)
        dropped = x
        if o.wants_a and x is not None:
            dropped = x if keep is None else zero_dropped(x, keep)
            grads.a = _scaled_mm(ds.t(), dropped, o.keep_scale, out=_if_like(into.a, dropped))
        if o.wants_x and grads.x is None:
            scratch = None if dropped is x else dropped
            grads.x = _input_grad(dy, weight, _in(dy.dtype, a), ds, keep, o.keep_scale, scratch)
    if o.wants_bias:
        grads.bias = dy.sum(0)
    return grads


def group_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    drop: Tensor | None,
    o: GroupOptions,
) -> tuple[list[Tensor], Saved]:
    """Every y, from one product of drop(x) with all A's."""
    keep = None if drop is None else keep_of(drop, x.shape[0], x.shape[1], o.dropout_p)
    s = _scaled_mm(x if keep is None else zero_dropped(x, keep), _joined(a, x.dtype).t(), o.keep_scale)
    ys = []
    for weight, b_i, bias, ranks in zip(weights, b, biases, o.ranks, strict=True):
        y = torch.nn.functional.linear(x, weight, bias)
        ys.append(y.addmm_(readable(s[:, ranks]), _in(x.dtype, b_i).t(), alpha=o.scale))
    mask = pack(keep) if keep is not None and o.keeps_mask else None
    return ys, Saved(s if any(o.wants_b) else None, mask)


def group_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    saved: Saved,
    o: GroupOptions,
) -> GroupGrads:
    """One product of all ds with drop(x) for every dA; dx chained through one tensor."""
    s, mask = saved
    grads = GroupGrads(b=[None] * len(dys), bias=[None] * len(dys))
    for i, (dy, ranks) in enumerate(zip(dys, o.ranks, strict=True)):
        if o.wants_b[i] and s is not None:
            grads.b[i] = _scaled_mm(s[:, ranks].t(), dy, o.scale).t()
        if o.wants_bias[i]:
            grads.bias[i] = dy.sum(0)
    if not (o.wants_x or any(o.wants_a)):
        return grads
    keep = None if mask is None else unpack(mask, a[0].shape[1])
    ds = torch.cat([_scaled_mm(dy, _in(dy.dtype, b_i), o.scale) for dy, b_i in zip(dys, b, strict=True)], 1)
    dropped = x
    if any(o.wants_a) and x is not None:
        dropped = x if keep is None else zero_dropped(x, keep)
        grads.a = _scaled_mm(ds.t(), dropped, o.keep_scale)
    if o.wants_x:
        scratch = None if dropped is x else dropped
        grads.x = _input_grad(dys[0], weights[0], _joined(a, ds.dtype), ds, keep, o.keep_scale, scratch)
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            grads.x.addmm_(dy, weight)
    return grads


def _joined(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[A; A2; …] for one product with all of them."""
    return torch.cat(tuple(a)).to(dtype)


def forms_weight(m: int, inner: int, r: int, dtype: torch.dtype, o: Options) -> bool:
    """Whether a product of m rows with inner dimension `inner` should run with the term added to its weight.

    That trades 2 m r multiplications per output for 2 inner r, and a pass over the output for one over the weight; on a
    CPU it gains 4 to 15 % from these bounds on. A 16-bit sum would round a small update away.
    """
    if r < 64 or m < 2 * inner:
        return False
    return dtype in (torch.float32, torch.float64) and not o.dropout_p and o.core_kind != "gate"


def _formed(weight: Tensor, a: Tensor, b: Tensor, core: Tensor | None, o: Options) -> Tensor:
    """W + scale · B core A."""
    b = b.to(weight.dtype)
    if core is not None:
        core = core.to(weight.dtype)
        b = b * core if o.core_kind == "diag" else b @ core
    return torch.addmm(weight, b, a.to(weight.dtype), alpha=o.scale)


def _input_grad(
    dy: Tensor,
    weight: Tensor | None,
    a: Tensor,
    ds: Tensor,
    keep: Tensor | None,
    keep_scale: float,
    scratch: Tensor | None,
) -> Tensor:
    """dx = dy W + mask ∘ (ds A), the library adding the second product into the first, or the reverse.

    `scratch`, if any, is a tensor like dx to write into: fresh memory of that size costs more than the product.
    """
    if keep is None:
        if weight is None:
            return ds @ a
        dx = dy @ weight
        if not is_tiled(a):
            return dx.addmm_(ds, a)
        shards(dx, len(a)).add_(ds[:, None])
        return dx
    dx = _scaled_mm(ds, a, keep_scale, out=scratch)
    zero_dropped(dx, keep, out=dx)
    return dx if weight is None else dx.addmm_(dy, weight)


def _if_like(out: Tensor | None, operand: Tensor) -> Tensor | None:
    """`out` if a product with `operand` can be written to it as it is."""
    return out if out is not None and out.dtype == operand.dtype else None


def _shrunk(x: Tensor, a: Tensor, keep_scale: float) -> Tensor:
    """s = drop(x) Aᵀ of an x that is dropped already."""
    a = _in(x.dtype, a)
    return shards(x, len(a)).sum(1).mul_(keep_scale) if is_tiled(a) else _scaled_mm(x, a.t(), keep_scale)


def _scaled_mm(p: Tensor, q: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """alpha · p @ q, rounded once."""
    if alpha == 1.0 and out is None:
        return torch.mm(p, q)
    out = p.new_empty(p.shape[0], q.shape[1]) if out is None else out
    return out.addmm_(p, q, beta=0, alpha=alpha)


def _in(dtype: torch.dtype, t: Tensor) -> Tensor:
    """t in that dtype: `to` takes its time even where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)
