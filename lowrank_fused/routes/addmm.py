"""Route `addmm`: library GEMMs, the low-rank term added in place. Any device and floating dtype.

The default on a CPU and the floor on a GPU. Keeps what the kernels keep: s, the packed mask, and x by reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dropout import draw_keep, pack, unpack, unpadded
from .cores import core_forward, core_grad, core_input_grad
from .problem import Grads, Options, Saved

__all__ = ["backward", "forward"]


def forward(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, core: Tensor | None, bias: Tensor | None, seed: Tensor | None, o: Options
) -> tuple[Tensor, Saved]:
    """y = x Wᵀ + bias, then y += scale · core(s) Bᵀ in place; x [M, K]."""
    mask = None
    if o.dropout_p:
        keep = draw_keep(seed, x.shape[0], x.shape[1], o.dropout_p)
        mask = pack(keep)
        s = (x * unpadded(keep, x.shape[1])) @ a.to(x.dtype).t()
        s *= 1.0 / (1.0 - o.dropout_p)
    else:
        s = x @ a.to(x.dtype).t()
    y = torch.nn.functional.linear(x, weight, bias)
    y.addmm_(core_forward(s, o.core_kind, core), b.to(x.dtype).t(), alpha=o.scale)
    return y, Saved(s, mask)


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, core: Tensor | None, saved: Saved, o: Options
) -> Grads:
    """Gradients that `o` asks for; one product with dy gives gv, everything of the core lives on [M, R]."""
    grads = Grads()
    s, mask = saved
    if o.wants_b:
        v = core_forward(s, o.core_kind, core)
        grads.b = torch.mm(v.t(), dy).t() * o.scale
    if o.wants_x or o.wants_a or o.wants_core:
        gv = (dy @ b.to(dy.dtype)).mul_(o.scale)
        if o.wants_core:
            grads.core = core_grad(gv, s, o.core_kind)
        ds = core_input_grad(gv, o.core_kind, core)
        if mask is not None:
            ds = ds * (1.0 / (1.0 - o.dropout_p))
        if o.wants_a:
            keep = None if mask is None else unpack(mask, x.shape[1])
            grads.a = ds.t() @ (x if keep is None else x * keep)
        if o.wants_x:
            grads.x = _input_grad(dy, weight, a, ds, mask)
    if o.wants_bias:
        grads.bias = dy.sum(0)
    return grads


def _input_grad(dy: Tensor, weight: Tensor, a: Tensor, ds: Tensor, mask: Tensor | None) -> Tensor:
    """dx = dy W + mask ∘ (ds A), the library adding the second product into the first, or the reverse."""
    if mask is None:
        return (dy @ weight).addmm_(ds, a.to(dy.dtype))
    dx = (ds @ a.to(dy.dtype)).mul_(unpack(mask, weight.shape[1]))
    return dx.addmm_(dy, weight)
