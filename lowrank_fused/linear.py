"""The frozen linear layer with a low-rank term, forward and backward: `lowrank_linear()`.

    y  = col · ( x Wᵀ + scale · out · core(drop(x) Aᵀ) Bᵀ ) + bias
    dx = dy W + mask ∘ (ds A),   dA, dB, dcore, dout, dcol, dbias;   W is frozen

The autograd Function here is thin: it flattens, saves what the gradients that are asked for will need (x by
reference, s [M, Ra], one bit of mask per element of x) and calls two operators (`ops.py`).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import ops
from .dropout import draw_seed
from .errors import UnsupportedError
from .routes import choose, unavailable
from .routes.problem import Options
from .routes.reference import lowrank_linear_ref
from .target import target_of
from .terms import Core, Gate, core_kind

__all__ = ["lowrank_linear", "lowrank_linear_ref", "routes_for"]


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
        seed: Tensor | None,
        options: Options,
        routes: tuple[str, str],
    ) -> Tensor:
        y, s, mask = _run_forward(x, weight, a, b, core, bias, seed, options, routes[0])
        ctx.save_for_backward(
            x if options.keeps_x else None,
            weight,
            a,
            b,
            core,
            s if options.keeps_s else None,
            mask if options.dropout_p and options.keeps_mask else None,
        )
        ctx.options, ctx.route = options, routes[1]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, core, s, mask = ctx.saved_tensors
        wants_x, _, wants_a, wants_b, wants_core, wants_bias, *_ = ctx.needs_input_grad
        wants = (wants_x, wants_a, wants_b, wants_core, wants_bias)
        o = ctx.options
        with _without_autocast(dy.device.type):
            dx, da, db, dcore, dbias = ops.backward(
                dy.reshape(-1, dy.shape[-1]),
                None if x is None else x.reshape(-1, x.shape[-1]),
                weight,
                a,
                b,
                core,
                s,
                mask,
                scale=o.scale,
                core_kind=o.core_kind,
                dropout_p=o.dropout_p,
                wants=wants,
                route=ctx.route,
            )
        return (
            dx.view(*dy.shape[:-1], weight.shape[1]) if wants_x else None,
            None,
            da if wants_a else None,
            db if wants_b else None,
            dcore if wants_core else None,
            dbias if wants_bias else None,
            None,
            None,
            None,
        )


def _run_forward(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: Options,
    route: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with _without_autocast(x.device.type):
        y, s, mask = ops.forward(
            x.reshape(-1, x.shape[-1]),
            weight,
            a,
            b,
            core,
            bias,
            seed,
            scale=options.scale,
            core_kind=options.core_kind,
            dropout_p=options.dropout_p,
            wants=options[3:],
            route=route,
        )
    return y.view(*x.shape[:-1], weight.shape[0]), s, mask


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Inside an operator every dtype is chosen; autocast would round the fp32 sums of gradients."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


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
    """y = col · ( x Wᵀ + scale · out · core(drop(x) Aᵀ) Bᵀ ) + bias, differentiable in everything but W.

    Args:
        x: [..., K], any strides; fp32, fp16, bf16 (fp64 on the routes `reference` and `addmm`).
        weight: the frozen W [N, K] in x's dtype, any strides; transformers' Conv1D passes `weight.t()`, uncopied.
        a, b: factors A [Ra, K] and B [N, Rb], in x's dtype or fp32; gradients come back in each one's own dtype.
        scale: a plain number; alpha / rank, say.
        core: None, d [R] (v = s ∘ d), C [Rb, Ra] (v = s Cᵀ), or `Gate(g)` with g [..., E] and Rb = E · Ra.
        out, col: vectors [N], over the low-rank term and over the whole product.
        bias: [N].
        dropout_p: probability of dropping an element of the low-rank path's x, kept ones scaled by 1 / (1 − p).
            Applied whenever it is positive: pass 0 when not training.
        route: "auto", or one of `lowrank_fused.routes.ROUTES`, which then works or raises.
        seed: int64 [1] on x's device that determines the mask; drawn from torch's generator when absent.

    Kept for backward: x by reference if A needs a gradient, s (Ra values a token) if B or the core does, the mask
    as bits if dropout is on; nothing else, except the product before `col` if col needs a gradient. Second
    derivatives raise.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a weight that requires a gradient.
        UnsupportedError: a route asked for by name that cannot run here.
    """
    kind = core_kind(core)
    core_tensor = core.g.reshape(-1, core.g.shape[-1]) if isinstance(core, Gate) else core
    _check(x, weight, a, b, core_tensor, kind, out, col, bias, dropout_p)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    _check_dtypes(x, weight, a, b)
    if out is not None:
        b = b * out.to(b.dtype)[:, None]
    inner_bias = None if bias is None or col is not None else bias.to(x.dtype)
    options = Options(scale, kind, dropout_p, *_wanted(x, a, b, core_tensor, inner_bias))
    if not dropout_p:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    routes = routes_for(x, weight, a, dropout_p, route)
    if any(options[3:]):
        y = LowRankLinearFunction.apply(x, weight, a, b, core_tensor, inner_bias, seed, options, routes)
    else:
        y = _run_forward(x, weight, a, b, core_tensor, inner_bias, seed, options, routes[0])[0]
    if col is not None:
        y = y * col.to(y.dtype)
        y = y if bias is None else y + bias.to(y.dtype)
    return y


def routes_for(x: Tensor, weight: Tensor, a: Tensor, dropout_p: float, route: str = "auto") -> tuple[str, str]:
    """The routes that serve forward and backward of such a call; a named route serves both or raises."""
    if route != "auto":
        if reason := unavailable(route, x.device, x.dtype):
            error = UnsupportedError if route in ("thin", "split") else ValueError
            raise error(f"route {route!r} cannot run: {reason}")
        return route, route
    target = target_of(x.device)
    n, k = weight.shape
    m = x.numel() // k if k else 0
    shape = (m, n, k, a.shape[0], x.dtype, dropout_p > 0, target)
    return choose("forward", *shape), choose("backward", *shape)


def _wanted(*tensors: Tensor | None) -> tuple[bool, ...]:
    grad = torch.is_grad_enabled()
    return tuple(grad and t is not None and t.requires_grad for t in tensors)


def _check(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    kind: str,
    out: Tensor | None,
    col: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
) -> None:
    """Shapes, devices, ranges; a message says what was expected and what came."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got {list(weight.shape)}")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x must end in in_features = {k} to match weight {[n, k]}, got {list(x.shape)}")
    if a.dim() != 2 or a.shape[1] != k:
        hint = "; did you pass its transpose?" if a.dim() == 2 and a.shape[0] == k else ""
        raise ValueError(f"a must be [rank, in_features] = [rank, {k}], got {list(a.shape)}{hint}")
    if b.dim() != 2 or b.shape[0] != n:
        hint = "; did you pass its transpose?" if b.dim() == 2 and b.shape[1] == n else ""
        raise ValueError(f"b must be [out_features, rank] = [{n}, rank], got {list(b.shape)}{hint}")
    ra, rb = a.shape[0], b.shape[1]
    if ra < 1 or rb < 1:
        raise ValueError(f"the rank must be at least 1, got a {list(a.shape)} and b {list(b.shape)}")
    if kind in ("none", "diag") and ra != rb:
        raise ValueError(f"a has rank {ra} but b has rank {rb}; only a dense core or a gate may change the rank")
    if core is not None and kind != "gate" and list(core.shape) != (expected := [rb, ra][-core.dim() :]):
        raise ValueError(f"a {kind} core must be {expected}, got {list(core.shape)}")
    if (
        core is not None
        and kind == "gate"
        and (core.numel() != x.numel() // k * core.shape[1] or core.shape[1] * ra != rb)
    ):
        raise ValueError(
            f"a gate must have a row per token and E columns with b of rank E · {ra}; got g {list(core.shape)}, "
            f"x {list(x.shape)}, b {list(b.shape)}"
        )
    for name, vector in (("out", out), ("col", col), ("bias", bias)):
        if vector is not None and list(vector.shape) != [n]:
            raise ValueError(f"{name} must be [out_features] = [{n}], got {list(vector.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if weight.requires_grad:
        raise ValueError("weight must be frozen: call weight.requires_grad_(False); only the low-rank term trains")
    for name, tensor in (("weight", weight), ("a", a), ("b", b), ("core", core), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move them to one device")


def _check_dtypes(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> None:
    if not x.is_floating_point() or weight.dtype != x.dtype:
        raise TypeError(f"x and weight must share one floating dtype, got {x.dtype} and {weight.dtype}")
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name} must be {x.dtype} like x, or torch.float32, got {tensor.dtype}")
