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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_fused.kernels.dy_factors import dy_factors, one_pass_max_rank
from lowrank_fused.kernels.expand import expand
from lowrank_fused.kernels.grad_input import grad_input
from lowrank_fused.kernels.launch import arch_of
from lowrank_fused.kernels.lowrank_forward import aligned_rows, lowrank_forward
from lowrank_fused.kernels.shrink import shrink
from lowrank_fused.kernels.x_factors import factor_grad, x_factors

from .cores import core_forward, core_grad, core_input_grad
from .problem import NOWHERE, Grads, GroupGrads, GroupOptions, Into, Options, Saved

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
        rows = aligned_rows([b], x, [weight]) if self.carries else None
        v, saved = _shrunk(x, a, core, drop, o, None if rows is None else (b, rows))
        if self.carries:
            return lowrank_forward(x, weight, v, b if rows is None else rows, bias=bias), saved
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
        into: Into = NOWHERE,
    ) -> Grads:
        """Gradients that `o` asks for."""
        grads = Grads(bias=dy.sum(0) if o.wants_bias else None)
        wants_ds = o.wants_x or o.wants_a
        if not (wants_ds or o.wants_b or o.wants_core):
            return grads
        ds = _dy_side(dy, b, core, saved.s, o, grads, into.b)
        dx0, carrier = None, weight if self.carries else None
        if o.wants_a and x is not None:
            wants_dx0 = o.wants_x and carrier is None
            grads.a, dx0 = x_factors(x, ds, a, mask=saved.mask, dropout_p=o.dropout_p, want_dx0=wants_dx0, out=into.a)
        if o.wants_x and carrier is not None:
            grads.x = grad_input(dy, carrier, ds, a, mask=saved.mask, dropout_p=o.dropout_p)
        elif o.wants_x:
            if dx0 is None:
                dx0 = expand(ds, a.t(), mask=saved.mask, dropout_p=o.dropout_p)
            grads.x = dx0 if weight is None else dx0.addmm_(dy, weight)
        return grads

    def group_forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        drop: Tensor | None,
        o: GroupOptions,
    ) -> tuple[list[Tensor], Saved]:
        """Every y, from one pass over x for all A's."""
        rows = aligned_rows(b, x, weights) if self.carries else None
        copy = None if rows is None else (b, rows)
        s, v, mask = shrink(x, a, scale=o.scale, dropout_p=o.dropout_p, seed=drop, keep_s=any(o.wants_b), copy=copy)
        columns: Sequence[slice] = o.ranks
        factors = b
        if rows is not None:
            rank, step = rows.shape[1], rows.stride(0)
            columns = [slice(first, first + rank) for first in range(0, v.shape[1], step)]
            factors = rows.split([b_i.shape[0] for b_i in b])
        ys = []
        for weight, b_i, bias, own in zip(weights, factors, biases, columns, strict=True):
            if self.carries:
                ys.append(lowrank_forward(x, weight, v[:, own], b_i, bias=bias))
            else:
                ys.append(expand(v[:, own], b_i, bias=bias).addmm_(x, weight.t()))
        return ys, Saved(s if any(o.wants_b) else None, mask if o.keeps_mask else None)

    def group_backward(
        self,
        dys: Sequence[Tensor],
        x: Tensor | None,
        weights: Sequence[Tensor],
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        saved: Saved,
        o: GroupOptions,
    ) -> GroupGrads:
        """One pass over each dy, one over x for every dA; dx chained through one tensor.

        The library adds the products with the weights. Only the last of them, of the smallest weight, runs in Triton
        where that carries the low-rank term.
        """
        of_bias = [dy.sum(0) if wanted else None for dy, wanted in zip(dys, o.wants_bias, strict=True)]
        grads = GroupGrads(b=[None] * len(dys), bias=of_bias)
        wants_a = any(o.wants_a)
        if not (o.wants_x or wants_a or any(o.wants_b)):
            return grads
        ds = dys[0].new_empty(dys[0].shape[0], o.ranks[-1].stop)
        for i, ranks in enumerate(o.ranks):
            grads.b[i] = _dy_side_of(dys[i], b[i], saved.s, ranks, ds, o.scale, o.wants_b[i])
        dx = None
        if wants_a and x is not None:
            wants_dx0 = o.wants_x and not self.carries
            grads.a, dx = x_factors(x, ds, a, mask=saved.mask, dropout_p=o.dropout_p, want_dx0=wants_dx0)
        if not o.wants_x:
            return grads
        pairs = sorted(zip(dys, weights, strict=True), key=lambda pair: -pair[1].numel())
        if not self.carries:
            dx = expand(ds, [a_i.t() for a_i in a], mask=saved.mask, dropout_p=o.dropout_p) if dx is None else dx
            for dy, weight in pairs:
                dx.addmm_(dy, weight)
            grads.x = dx
            return grads
        *others, (dy, weight) = pairs
        for other, its_weight in others:
            dx = other @ its_weight if dx is None else dx.addmm_(other, its_weight)
        grads.x = grad_input(dy, weight, ds, a, mask=saved.mask, dropout_p=o.dropout_p, add=dx)
        return grads


def _dy_side_of(
    dy: Tensor, b: Tensor, s: Tensor | None, ranks: slice, ds: Tensor, scale: float, wants_b: bool
) -> Tensor | None:
    """dB of one linear of a group, its ds written into its columns; one pass over dy where the rank allows."""
    s = None if s is None else s[:, ranks]
    if not wants_b or b.shape[1] <= one_pass_max_rank(dy.dtype, arch_of(dy)):
        return dy_factors(dy, b, s if wants_b else None, scale=scale, want_db=wants_b, out=ds[:, ranks])[1]
    dy_factors(dy, b, None, scale=scale, want_db=False, out=ds[:, ranks])
    return None if s is None else factor_grad(dy, s.contiguous(), scale=scale, dtype=b.dtype).t()


def _shrunk(
    x: Tensor,
    a: Tensor,
    core: Tensor | None,
    drop: Tensor | None,
    o: Options,
    copy: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Saved]:
    """v = scale · core(s), and what backward needs; `copy` as `shrink` has it."""
    bits = drop if drop is not None and drop.dtype == torch.uint8 else None
    s, v, mask = shrink(
        x, a, scale=o.scale, core=core, core_kind=o.core_kind,
        dropout_p=o.dropout_p, seed=drop if bits is None else None, bits=bits, keep_s=o.keeps_s, copy=copy,
    )  # fmt: skip
    return v, Saved(s if o.keeps_s else None, mask if o.dropout_p else None)


def _dy_side(
    dy: Tensor, b: Tensor, core: Tensor | None, s: Tensor | None, o: Options, grads: Grads, into: Tensor | None
) -> Tensor:
    """ds, with dB and dcore put into `grads`: one pass over dy where rank and core allow."""
    on_the_way = o.core_kind in ("none", "diag")
    if on_the_way and (not o.wants_b or b.shape[1] <= one_pass_max_rank(dy.dtype, arch_of(dy))):
        diagonal = core if o.core_kind == "diag" else None
        ds, grads.b, grads.core = dy_factors(
            dy, b, s, scale=o.scale, core=diagonal, want_db=o.wants_b, want_dcore=o.wants_core, into=into
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
