"""The frozen linear layer with a low-rank term, forward and backward: `lowrank_linear()`.

    y  = col · ( x Wᵀ + scale · out · core(drop(x) Aᵀ) Bᵀ ) + bias
    dx = dy W + mask ∘ (ds A),   dA, dB, dcore, dout, dcol, dbias;   W is frozen

The autograd Function here is thin: it flattens, saves what the gradients that are asked for will need (x by
reference, s [M, Ra], one bit of mask per element of x) and calls two operators (`ops.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .add import lowrank_add
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
from .routes.reference import lowrank_linear_ref
from .routes.small import eager
from .terms import Core, core_kind

__all__ = ["lowrank_linear", "lowrank_linear_ref"]


class LowRankLinearFunction(torch.autograd.Function):
    """Flatten, run the forward operator, keep what backward needs, run the backward operator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        core: Tensor | None,
        bias: Tensor | None,
        drop: Tensor | None,
        options: Options,
        routes: tuple[str, str],
        label: str | None,
    ) -> Tensor:
        y, saved = _run_forward(x, weight, a, b, core, bias, drop, options, routes[0], label)
        save_for_backward(ctx, weight, x, a, b, core, saved, options)
        ctx.route, ctx.label = routes[1], label
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        grads = run_backward(ctx, dy)
        return grads.x, None, grads.a, grads.b, grads.core, grads.bias, None, None, None, None


def _run_forward(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    bias: Tensor | None,
    drop: Tensor | None,
    o: Options,
    route: str,
    label: str | None,
) -> tuple[Tensor, Saved]:
    operands = (rows_of(x), weight, a, b, core, bias, drop, o, route)
    y, saved = guarded(ops.forward, *operands, where=x.device, route=route, label=label)
    if x.dim() != 2:
        # Not a view: to one that a Function returns, autograd lets nobody add a further term in place.
        y = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], weight.shape[0]])
    return y, saved


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    core: Core = None,
    out: Tensor | None = None,
    col: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    route: str = "auto",
    precision: str = "fast",
    seed: Tensor | None = None,
    keep: Tensor | None = None,
    label: str | None = None,
) -> Tensor:
    """y = col · ( x Wᵀ + scale · out · core(drop(x) Aᵀ) Bᵀ ) + bias, differentiable in everything but W.

    Args:
        x: [..., K], any strides; fp32, fp16, bf16 (fp64 on the library routes).
        weight: the frozen W [N, K] in x's dtype, any strides; transformers' Conv1D passes `weight.t()`, uncopied.
        a, b: factors A [Ra, K] and B [N, Rb], in x's dtype or fp32; gradients come back in each one's own dtype.
        scale: a number, alpha / rank say, or a tensor of one element, which compiled graphs do not specialise on.
        core: None, d [R] (v = s ∘ d), C [Rb, Ra] (v = s Cᵀ), or `Gate(g)` with g [..., E] and Rb = E · Ra.
        out, col: vectors [N], over the low-rank term and over the whole product.
        bias: [N].
        dropout_p: probability of dropping an element of the low-rank path's x, kept ones scaled by 1 / (1 − p).
            Applied whenever it is positive: pass 0 when not training.
        route: "auto", or one of `lowrank_fused.routes.ROUTES`, which then works or raises. "auto" leaves a call to
            PyTorch's own operators and mask where a CPU would spend it on Python (`lowrank_fused.routes.small`).
        precision: "fast" rounds fp32 factors beside a 16-bit x to x's dtype, inside the kernels; "match" multiplies
            them as they are and adds in fp32, as a 16-bit layer with an fp32 adapter does outside of autocast.
        seed: int64 [1] on x's device that determines the mask; drawn from torch's generator when absent.
        keep: the mask itself in place of a seed, boolean in x's shape, True where kept.
        label: a name for this call in the error of a kernel that fails.

    Kept for backward: x by reference if A needs a gradient, s (Ra values a token) if B or the core does, the mask
    as bits if dropout is on; nothing else, except the product before `col` if col needs a gradient. Second
    derivatives raise. Calls left to PyTorch's operators keep what these keep.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a weight that requires a gradient.
        UnsupportedError: a route asked for by name that cannot run here.
        LaunchError: a kernel that failed, if there is a label to name it by.
    """
    kind, middle = core_kind(core), core_tensor(core)
    check_input(x)
    _check(x, weight)
    check_dropout(dropout_p)
    shape = (weight.shape[0], weight.shape[1])
    check_factors(x, shape, a, b, middle, kind, {"out": out, "col": col, "bias": bias, "weight": weight})
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, precision = x.to(dtype), weight.to(dtype), "fast"
    if weight.dtype != x.dtype:
        raise TypeError(f"x and weight must share one floating dtype, got {x.dtype} and {weight.dtype}")
    check_dtypes(x, a, b)
    own_mask = seed is None and keep is None
    routes = routes_for(x, shape, a, b, dropout_p, route, precision, own_mask)
    if col is not None and routes[0] == "precise":
        # The product with col has x's dtype, and so would its gradient on the way to A and B.
        y = F.linear(x, weight) * col
        return lowrank_add(
            (y if bias is None else y + bias).to(x.dtype), x, a, b, scale=scale, core=core,
            out=col if out is None else out * col, dropout_p=dropout_p, route=route, precision=precision,
            seed=seed, keep=keep, label=label, inplace=True,
        )  # fmt: skip
    drop = None if routes[0] == "eager" else mask_source(x, dropout_p, seed, keep)
    if isinstance(scale, Tensor):
        b, scale = b * scale.to(b.dtype), 1.0
    if out is not None:
        b = b * out.to(b.dtype)[:, None]
    inner_bias = None if col is not None else bias
    if inner_bias is not None and routes[0] != "precise":
        inner_bias = inner_bias.to(x.dtype)
    if routes[0] == "eager":
        y = eager(x, weight, a, b, middle, inner_bias, scale, kind, dropout_p)
    else:
        options = options_of(scale, kind, dropout_p, x, a, b, middle, inner_bias)
        if any(options.wants):
            y = LowRankLinearFunction.apply(x, weight, a, b, middle, inner_bias, drop, options, routes, label)
        else:
            y = _run_forward(x, weight, a, b, middle, inner_bias, drop, options, routes[0], label)[0]
    if col is not None:
        dtype = y.dtype
        y = y * (col if precision == "match" else col.to(dtype))
        y = (y if bias is None else y + bias.to(dtype)).to(dtype)
    return y


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got {list(weight.shape)}")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x must end in in_features = {k} to match weight {[n, k]}, got {list(x.shape)}")
    if weight.requires_grad:
        raise ValueError("weight must be frozen: call weight.requires_grad_(False); only the low-rank term trains")
