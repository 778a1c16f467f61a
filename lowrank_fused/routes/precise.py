"""Route `precise`: factors of fp32 beside a 16-bit x and W, multiplied as they are. Any device and floating dtype.

    y = x Wᵀ + bias rounded to x's dtype, then + scale · core(drop(x) Aᵀ) Bᵀ in fp32, rounded again

This is what a 16-bit layer with an fp32 adapter computes outside of autocast (PEFT's default), where the other routes
round A and B to x's dtype. x, y and dy are widened a block of rows at a time and never as a whole on a CPU, each block
into the memory of the one before: fresh memory costs more than to fill it. s is kept in fp32, x in its own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import keep_of, pack, rows_at_a_time, unpack, zero_dropped
from ..tiled import is_tiled, shards
from .cores import core_forward, core_grad, core_input_grad
from .problem import NOWHERE, Grads, GroupGrads, GroupOptions, Into, Options, Saved
from .rows import across

__all__ = ["add_forward", "backward", "forward", "group_backward", "group_forward"]


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
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y, add_forward(y, x, a, b, core, drop, o)


def add_forward(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, core: Tensor | None, drop: Tensor | None, o: Options
) -> Saved:
    """y += scale · core(s) Bᵀ in place."""
    keep = None if drop is None else keep_of(drop, x.shape[0], x.shape[1], o.dropout_p)
    s = _shrunk(x, _widened(a), keep, o.keep_scale)
    _add_product(y, core_forward(s, o.core_kind, core), _widened(b).t(), o.scale)
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
    """Gradients that `o` asks for: one pass over dy for gv and dB, one over x for dA, one over dx."""
    grads = Grads(bias=dy.sum(0, dtype=_wide(dy)) if o.wants_bias else None)
    a, b = _widened(a), _widened(b)
    keep = None if saved.mask is None else unpack(saved.mask, a.shape[1])
    gv = torch.empty(dy.shape[0], b.shape[1], dtype=b.dtype, device=dy.device)
    v = core_forward(saved.s, o.core_kind, core) if o.wants_b and saved.s is not None else None
    grads.b = _dy_side(dy, b, v, o.scale, gv, into.b)
    if o.wants_core and saved.s is not None:
        grads.core = core_grad(gv, saved.s, o.core_kind)
    ds = core_input_grad(gv, o.core_kind, core)
    if o.wants_a and x is not None:
        grads.a = _factor_grad(x, ds, keep, o.keep_scale, into.a)
    if o.wants_x:
        grads.x = dy.new_zeros(dy.shape[0], a.shape[1]) if weight is None else dy @ weight
        _add_product(grads.x, ds, a, o.keep_scale, keep)
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
    """Every y, x being widened once for all A's."""
    keep = None if drop is None else keep_of(drop, x.shape[0], x.shape[1], o.dropout_p)
    s = _shrunk(x, torch.cat([_widened(a_i) for a_i in a]), keep, o.keep_scale)
    ys = []
    for weight, b_i, bias, ranks in zip(weights, b, biases, o.ranks, strict=True):
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        _add_product(y, s[:, ranks], _widened(b_i).t(), o.scale)
        ys.append(y)
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
    """One pass over each dy, one over x for every dA; dx chained through one tensor, its low-rank part added last."""
    of_bias = [dy.sum(0, dtype=_wide(dy)) if wanted else None for dy, wanted in zip(dys, o.wants_bias, strict=True)]
    grads = GroupGrads(b=[None] * len(dys), bias=of_bias)
    if not (o.wants_x or any(o.wants_a) or any(o.wants_b)):
        return grads
    ds = dys[0].new_empty(dys[0].shape[0], o.ranks[-1].stop, dtype=_wide(dys[0]))
    for i, ranks in enumerate(o.ranks):
        v = saved.s[:, ranks] if o.wants_b[i] and saved.s is not None else None
        grads.b[i] = _dy_side(dys[i], _widened(b[i]), v, o.scale, ds[:, ranks])
    keep = None if saved.mask is None else unpack(saved.mask, a[0].shape[1])
    if any(o.wants_a) and x is not None:
        grads.a = _factor_grad(x, ds, keep, o.keep_scale)
    if o.wants_x:
        grads.x = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            grads.x.addmm_(dy, weight)
        _add_product(grads.x, ds, torch.cat([_widened(a_i) for a_i in a]), o.keep_scale, keep)
    return grads


def _shrunk(x: Tensor, a: Tensor, keep: Tensor | None, keep_scale: float) -> Tensor:
    """s = drop(x) Aᵀ."""
    s = a.new_empty(x.shape[0], a.shape[0])
    tiled = is_tiled(a)
    for rows, wide in _widened_blocks(x, keep):
        if tiled:
            torch.sum(shards(wide, len(a)), 1, out=s[rows]).mul_(keep_scale)
        else:
            _product(wide, a.t(), keep_scale, s[rows])
    return s


def _dy_side(
    dy: Tensor, b: Tensor, v: Tensor | None, scale: float, gv: Tensor, into: Tensor | None = None
) -> Tensor | None:
    """scale · dy B, written to `gv`, and given v the gradient scale · dyᵀ v of B."""
    turned = across(b)
    of_b = None
    if v is not None:
        of_b = b.new_empty(b.shape[::-1]) if turned else _like_or_new(into, b, b.shape)
    for rows, wide in _widened_blocks(dy):
        _product(wide, b, scale, gv[rows])
        if of_b is not None and v is not None:
            p, q = (v[rows].t(), wide) if turned else (wide.t(), v[rows])
            _product(p, q, scale, of_b, onto=rows.start > 0)
    if of_b is None:
        return None
    if not len(dy):
        of_b.zero_()
    return of_b.t() if turned else of_b


def _factor_grad(x: Tensor, ds: Tensor, keep: Tensor | None, keep_scale: float, into: Tensor | None = None) -> Tensor:
    """dA = dsᵀ drop(x)."""
    grad = _like_or_new(into, ds, (ds.shape[1], x.shape[1]))
    for rows, wide in _widened_blocks(x, keep):
        _product(ds[rows].t(), wide, keep_scale, grad, onto=rows.start > 0)
    return grad if len(x) else grad.zero_()


def _like_or_new(into: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`into` if it has the dtype of a sum, else a new tensor."""
    return like.new_empty(shape) if into is None or into.dtype != like.dtype else into


def _add_product(into: Tensor, p: Tensor, q: Tensor, alpha: float, keep: Tensor | None = None) -> None:
    """`into` += alpha · p q, zero where not kept, rounded once."""
    tiled = is_tiled(q)
    # Widened here, because an addition of two dtypes takes twice as long.
    for rows, wide in _widened_blocks(into):
        if keep is None and tiled:
            shards(wide, len(q)).add_(p[rows, None], alpha=alpha)
        elif keep is None:
            wide.addmm_(p[rows], q, alpha=alpha)
        else:
            product = p[rows] @ q
            wide.add_(zero_dropped(product, keep[rows], out=product), alpha=alpha)
        if wide.dtype != into.dtype:
            into[rows].copy_(wide)


def _product(p: Tensor, q: Tensor, alpha: float, out: Tensor, onto: bool = False) -> None:
    """`out` = alpha · p q, or += with `onto`."""
    torch.addmm(out, p, q, beta=int(onto), alpha=alpha, out=out)


def _widened_blocks(t: Tensor, keep: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of t at a time and their values, widened and zero where dropped: valid until the next are asked for.

    Those of a t that is wide already and has no mask are t's own.
    """
    step, wide = rows_at_a_time(t), _wide(t)
    buffer = None if wide == t.dtype else t.new_empty(min(step, t.shape[0]), t.shape[1], dtype=wide)
    for first in range(0, t.shape[0], step):
        rows = slice(first, first + step)
        some = t[rows] if keep is None else zero_dropped(t[rows], keep[rows])
        yield rows, some if buffer is None else buffer[: len(some)].copy_(some)


def _widened(t: Tensor) -> Tensor:
    return t.to(_wide(t))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
