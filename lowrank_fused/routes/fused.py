"""Routes `thin` and `split`: Triton kernels. They share everything but the two big products.

| pass            | thin                                    | split                       |
|-----------------|-----------------------------------------|-----------------------------|
| s, v, mask      | shrink                                  | shrink                      |
| y               | expand, then the library adds x Wᵀ       | lowrank_forward             |
| ds, dB, dcore   | dy_factors                              | dy_factors                  |
| dA              | x_factors, which also writes mask ∘ ds A | x_factors                   |
| dx              | the library adds dy W                    | grad_input                  |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_fused.kernels.dy_factors import dy_factors, one_pass_max_rank
from lowrank_fused.kernels.expand import expand
from lowrank_fused.kernels.grad_input import grad_input
from lowrank_fused.kernels.launch import arch_of
from lowrank_fused.kernels.lowrank_forward import lowrank_forward
from lowrank_fused.kernels.shrink import shrink
from lowrank_fused.kernels.x_factors import factor_grad, x_factors

from .cores import core_forward, core_grad, core_input_grad
from .problem import Grads, Options, Saved

__all__ = ["SPLIT", "THIN"]


@dataclass(frozen=True)
class KernelRoute:
    """forward() and backward() on kernels; `carries` says whether the GEMMs carry the low-rank term."""

    carries: bool

    def forward(
        self,
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
        v, saved = _shrunk(x, a, core, drop, o)
        if self.carries:
            return lowrank_forward(x, weight, v, b, bias=bias), saved
        return expand(v, b, bias=bias).addmm_(x, weight.t()), saved

    def add_forward(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, core: Tensor | None, drop: Tensor | None, o: Options
    ) -> Saved:
        """y += v Bᵀ in place, by the library."""
        v, saved = _shrunk(x, a, core, drop, o)
        y.addmm_(v, b.to(v.dtype).t())
        return saved

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        a: Tensor,
        b: Tensor,
        core: Tensor | None,
        saved: Saved,
        o: Options,
    ) -> Grads:
        """Gradients that `o` asks for."""
        grads = Grads(bias=dy.sum(0) if o.wants_bias else None)
        wants_ds = o.wants_x or o.wants_a
        if not (wants_ds or o.wants_b or o.wants_core):
            return grads
        ds = _dy_side(dy, b, core, saved.s, o, grads)
        dx0, carrier = None, weight if self.carries else None
        if o.wants_a and x is not None:
            wants_dx0 = o.wants_x and carrier is None
            grads.a, dx0 = x_factors(x, ds, a, mask=saved.mask, dropout_p=o.dropout_p, want_dx0=wants_dx0)
        if o.wants_x and carrier is not None:
            grads.x = grad_input(dy, carrier, ds, a, mask=saved.mask, dropout_p=o.dropout_p)
        elif o.wants_x:
            if dx0 is None:
                dx0 = expand(ds, a.t(), mask=saved.mask, dropout_p=o.dropout_p)
            grads.x = dx0 if weight is None else dx0.addmm_(dy, weight)
        return grads


def _shrunk(x: Tensor, a: Tensor, core: Tensor | None, drop: Tensor | None, o: Options) -> tuple[Tensor, Saved]:
    """v = scale · core(s), and what backward needs."""
    bits = drop if drop is not None and drop.dtype == torch.uint8 else None
    s, v, mask = shrink(
        x, a, scale=o.scale, core=core, core_kind=o.core_kind,
        dropout_p=o.dropout_p, seed=drop if bits is None else None, bits=bits, keep_s=o.keeps_s,
    )  # fmt: skip
    return v, Saved(s if o.keeps_s else None, mask if o.dropout_p else None)


def _dy_side(dy: Tensor, b: Tensor, core: Tensor | None, s: Tensor | None, o: Options, grads: Grads) -> Tensor:
    """ds, with dB and dcore put into `grads`: one pass over dy where rank and core allow."""
    on_the_way = o.core_kind in ("none", "diag")
    if on_the_way and (not o.wants_b or b.shape[1] <= one_pass_max_rank(dy.dtype, arch_of(dy))):
        diagonal = core if o.core_kind == "diag" else None
        ds, grads.b, grads.core = dy_factors(
            dy, b, s, scale=o.scale, core=diagonal, want_db=o.wants_b, want_dcore=o.wants_core
        )
        return ds
    gv = shrink(dy, b.t(), scale=o.scale, keep_s=False)[1]
    if o.wants_b and s is not None:
        v = core_forward(s, o.core_kind, core)
        grads.b = factor_grad(dy, v, scale=o.scale, dtype=b.dtype).t()
    if o.wants_core and s is not None:
        grads.core = core_grad(gv, s, o.core_kind)
    return core_input_grad(gv, o.core_kind, core)


SPLIT = KernelRoute(carries=True)
THIN = KernelRoute(carries=False)
