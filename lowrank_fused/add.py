"""The low-rank term beside a product that somebody else computes, a quantised layer say: `lowrank_add()`.

    y' = y + scale · out · core(drop(x) Aᵀ) Bᵀ
    dx = mask ∘ (ds A),   dy = dy',   dA, dB, dcore, dout

x is read once forward and once backward, and the term is added in the library's product rather than written first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .operands import (
    check_dropout,
    check_dtypes,
    check_factors,
    check_input,
    core_tensor,
    guarded,
    mask_source,
    options_of,
    routes_for,
    rows_of,
    run_backward,
    save_for_backward,
)
from .routes.problem import Options, Saved
from .terms import Core, core_kind

__all__ = ["lowrank_add"]


class LowRankAddFunction(torch.autograd.Function):
    """Run the operator that adds in place, on y or a copy of it; backward hands dy on and computes the rest.

    Of a view the memory alone is taken over: autograd would replay the view in every backward, and refuses where a
    Function made it, bitsandbytes' products for one. A `detach` counts writes together with what it came from, so
    that a backward in need of y as it was still notices.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        core: Tensor | None,
        drop: Tensor | None,
        options: Options,
        routes: tuple[str, str],
        inplace: bool,
        is_view: bool,
        label: str | None,
    ) -> Tensor:
        if not inplace:
            y = y.clone(memory_format=torch.contiguous_format)
        elif is_view:
            y = y.detach()
        else:
            ctx.mark_dirty(y)
        saved = _run(y, x, a, b, core, drop, options, routes[0], label)
        save_for_backward(ctx, None, x, a, b, core, saved, options)
        ctx.route, ctx.label = routes[1], label
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        grads = run_backward(ctx, dy)
        return dy, grads.x, grads.a, grads.b, grads.core, None, None, None, None, None, None


def _run(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    drop: Tensor | None,
    o: Options,
    route: str,
    label: str | None,
) -> Saved:
    rows = y.view(-1, y.shape[-1])
    operands = (rows, rows_of(x), a, b, core, drop, o, route)
    return guarded(ops.add_, *operands, where=x.device, route=route, label=label)


def lowrank_add(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    core: Core = None,
    out: Tensor | None = None,
    dropout_p: float = 0.0,
    route: str = "auto",
    precision: str = "fast",
    seed: Tensor | None = None,
    keep: Tensor | None = None,
    label: str | None = None,
    inplace: bool = False,
) -> Tensor:
    """y + scale · out · core(drop(x) Aᵀ) Bᵀ, differentiable in all of them.

    y [..., N] and x [..., K] share leading dimensions; if their dtypes differ the term is formed in x's and the sum in
    the wider of both, then rounded to y's. `inplace=True` writes into y, which nobody else may need as it was: not for
    a result that its own backward looks at (which raises there), for a view of something that is used afterwards, or
    for the memory of x. Everything else is as in `lowrank_linear`, and so is what is kept for backward.
    """
    kind, middle = core_kind(core), core_tensor(core)
    check_input(x)
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y must have a row for each of x's, got y {list(y.shape)} and x {list(x.shape)}")
    if inplace and y.is_leaf and y.requires_grad and torch.is_grad_enabled():
        raise ValueError("y is a leaf that requires a gradient, which has to stay as it is; pass inplace=False")
    shape = (y.shape[-1], x.shape[-1])
    check_factors(x, shape, a, b, middle, kind, {"out": out, "y": y})
    check_dropout(dropout_p)
    drop = mask_source(x, dropout_p, seed, keep)
    if torch.is_autocast_enabled(x.device.type):
        x, precision = x.to(torch.get_autocast_dtype(x.device.type)), "fast"
    check_dtypes(x, a, b)
    if isinstance(scale, Tensor):
        b, scale = b * scale.to(b.dtype), 1.0
    if out is not None:
        b = b * out.to(b.dtype)[:, None]
    options = options_of(scale, kind, dropout_p, x, a, b, middle, None)
    routes = routes_for(x, shape, a, b, dropout_p, route, precision, own_mask=False)
    into = y if y.dtype == x.dtype else y.new_zeros(y.shape, dtype=x.dtype)
    # A compiler decides by itself where the copy can be left out.
    inplace = inplace and y.is_contiguous() and not torch.compiler.is_compiling()
    is_view = inplace and y._is_view()
    fresh = inplace or into is not y
    if any(options.wants):
        how = (fresh, is_view and into is y)
        result = LowRankAddFunction.apply(into, x, a, b, middle, drop, options, routes, *how, label)
    else:
        result = into if fresh else into.clone(memory_format=torch.contiguous_format)
        # A constant for autograd, which only has to count the write.
        _run(result.detach(), x, a, b, middle, drop, options, routes[0], label)
    if into is y:
        return result
    return y.add_(result) if inplace and not is_view else (y + result).to(y.dtype)
