"""A low-rank factor that is a function of the frozen weight, act(A W): `weight_factor()`, differentiable in A.

    h = act(A W)  [R, K],    dA = (dh ∘ act'(A W)) Wᵀ  [R, N],    W [N, K] of any strides

`lowrank_fused::weight_factor` and its gradient are operators of torch.library. On a GPU each is one launch that reads W
once (kernels/weight_factor.py) and applies act where it sums; elsewhere a library GEMM. Backward uses the slope, for
relu the sign, of the values that forward returned: nothing of A W is computed a second time, where rounding could
put an element on the other side of zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..library import LIBRARY, define
from ..target import target_of
from .activations import activation as activation_of

__all__ = ["FUSED", "weight_factor", "weight_factor_grad_op", "weight_factor_op"]

# What the operators apply themselves. Other activations follow as operations of their own, on [R, K].
FUSED = ("gelu", "linear", "relu", "silu", "sin")

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def weight_factor(a: Tensor, w: Tensor, activation: str = "relu") -> Tensor:
    """act(A W) [R, K] in a's dtype.

    Args:
        a: [R, N] in w's dtype or fp32. Products take it in w's dtype and sum in fp32.
        w: the frozen weight [N, K], any strides; pass `weight.t()` for products over its rows.
        activation: a name of `lowrank_fused.factors.activations`.

    Reads W once forward and once backward. Second derivatives raise.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, an unknown activation, a weight that
            requires a gradient.
    """
    function = activation_of(activation)
    if a.dim() != 2 or w.dim() != 2 or a.shape[1] != w.shape[0]:
        raise ValueError(f"a must be [rank, {w.shape[0]}] to match w {list(w.shape)}, got {list(a.shape)}")
    if not w.is_floating_point() or a.dtype not in (w.dtype, torch.float32):
        raise TypeError(f"w must be floating-point and a must have its dtype or float32, got {w.dtype} and {a.dtype}")
    if a.device != w.device:
        raise ValueError(f"a is on {a.device} but w is on {w.device}; move them to one device")
    if w.requires_grad:
        raise ValueError("w must be frozen: call w.requires_grad_(False); only a trains")
    if activation in FUSED:
        return weight_factor_op(a, w, activation)[0]
    return function(weight_factor_op(a, w, "linear")[0])


def _uses_kernels(w: Tensor) -> bool:
    return w.dtype in _KERNEL_DTYPES and target_of(w.device).has_triton


def _keeps_slope(activation: str) -> bool:
    """Not for linear, nor for relu, where h says it."""
    return activation not in ("linear", "relu")


def _slope(z: Tensor, activation: str) -> Tensor:
    """act'(z) of those activations that keep it."""
    if activation == "sin":
        return torch.cos(z)
    if activation == "silu":
        gate = torch.sigmoid(z)
        return gate * (1.0 + z * (1.0 - gate))
    assert activation == "gelu", f"no slope for {activation!r}"
    bell = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5))) + z * bell


def _forward(a: Tensor, w: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if _uses_kernels(w):
        from lowrank_fused.kernels.weight_factor import weight_factor as launch

        return launch(a.contiguous(), w, activation=activation)
    with torch.autocast(w.device.type, enabled=False):
        z = torch.mm(a.to(w.dtype), w)
        z = z.to(torch.promote_types(w.dtype, torch.float32))
        h = activation_of(activation)(z).to(a.dtype, copy=activation == "linear")
        return h, _slope(z, activation).to(a.dtype) if _keeps_slope(activation) else a.new_empty(0)


def _forward_fake(a: Tensor, w: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    h = a.new_empty(a.shape[0], w.shape[1])
    return h, torch.empty_like(h) if _keeps_slope(activation) else a.new_empty(0)


def _backward(dh: Tensor, kept: Tensor, w: Tensor, activation: str) -> Tensor:
    if _uses_kernels(w):
        from lowrank_fused.kernels.weight_factor import weight_factor_grad

        return weight_factor_grad(dh.contiguous(), kept, w, activation=activation)
    with torch.autocast(w.device.type, enabled=False):
        if activation == "relu":
            dh = dh * (kept > 0)
        elif _keeps_slope(activation):
            dh = dh * kept
        # The transpose of dh Wᵀ: the library is a third faster with W as it lies.
        return torch.mm(w, dh.to(w.dtype).t()).t().to(dh.dtype).contiguous()


def _backward_fake(dh: Tensor, kept: Tensor, w: Tensor, activation: str) -> Tensor:
    return dh.new_empty(dh.shape[0], w.shape[0])


weight_factor_op = define(
    "weight_factor(Tensor a, Tensor w, str activation) -> (Tensor h, Tensor slope)", _forward, _forward_fake
)
weight_factor_grad_op = define(
    "weight_factor_grad(Tensor dh, Tensor kept, Tensor w, str activation) -> Tensor", _backward, _backward_fake
)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    _, w, ctx.activation = inputs
    h, slope = output
    ctx.save_for_backward(h if ctx.activation == "relu" else slope, w)
    ctx.mark_non_differentiable(slope)
    ctx.set_materialize_grads(False)


@torch.autograd.function.once_differentiable
def _pull_back(ctx: Any, dh: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    kept, w = ctx.saved_tensors
    return None if dh is None else weight_factor_grad_op(dh, kept, w, ctx.activation), None, None


torch.library.register_autograd(
    "lowrank_fused::weight_factor", _pull_back, setup_context=_keep_for_backward, lib=LIBRARY
)
