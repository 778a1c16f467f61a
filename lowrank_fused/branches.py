"""Several frozen linears that read one x (q, k, v; gate, up), each with a low-rank term: `lowrank_group()`.

    yᵢ = x Wᵢᵀ + scale · (drop(x) Aᵢᵀ) Bᵢᵀ + biasᵢ
    dx = Σᵢ dyᵢ Wᵢ + mask ∘ (ds A),   ds = [ds₁ … ds_G],  A = [A₁; …; A_G],   dA = dsᵀ drop(x),  dBᵢ = dyᵢᵀ vᵢ

One Function for all of them: x is read once for every A together, one mask is drawn, the gradients chain through one
dx. Tracers see the single products, so nothing here is an operator of torch.library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .operands import check_dropout, check_dtypes, check_factors, check_input, guarded, mask_source, rows_of
from .routes import MAX_THIN_RANK, choose_for_group, group_implementation
from .routes.problem import GroupGrads, GroupOptions, Saved
from .routes.rows import readable
from .routes.small import is_small

__all__ = ["Branch", "lowrank_group", "too_small_to_share", "why_not_one_pass"]


@dataclass(frozen=True)
class Branch:
    """One of the linears: frozen weight [N, K], factors a [R, K] and b [N, R], bias [N]."""

    weight: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None = None


class LowRankGroupFunction(torch.autograd.Function):
    """Tensors come as x and the mask's source, then every weight, every a, every b, every bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        drop: Tensor | None,
        options: GroupOptions,
        routes: tuple[str, str],
        label: str | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = readable(rows_of(x))
        weights, a, b, biases = _fourths(tensors)
        run = group_implementation(routes[0], rows).group_forward
        operands = (rows, weights, a, b, biases, drop, options)
        ys, saved = guarded(run, *operands, where=x.device, route=routes[0], label=label)
        ctx.save_for_backward(x if any(options.wants_a) else None, *saved, *weights, *a, *b)
        ctx.options, ctx.route, ctx.label = options, routes[1], label
        ctx.set_materialize_grads(False)
        if x.dim() == 2:
            return tuple(ys)
        # Not views: to these autograd lets nobody add a further term in place.
        return tuple(torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]]) for y in ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        x, s, mask, *operands = ctx.saved_tensors
        count = len(given)
        weights, a, b = operands[:count], operands[count : 2 * count], operands[2 * count :]
        dy = next((dy for dy in given if dy is not None), None)
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        dys = _all_rows(given, dy, weights)
        run = group_implementation(ctx.route, dys[0]).group_backward
        grads: GroupGrads = guarded(
            run, dys, None if x is None else rows_of(x), weights, a, b, Saved(s, mask), ctx.options,
            where=dy.device, route=ctx.route, label=ctx.label,
        )  # fmt: skip
        dx = None if grads.x is None else grads.x.view(*dy.shape[:-1], grads.x.shape[1])
        of_a = [None] * count if grads.a is None else grads.a.split([factor.shape[0] for factor in a])
        wanted = zip((*of_a, *grads.b), (*ctx.options.wants_a, *ctx.options.wants_b), strict=True)
        factors = [grad if wants else None for grad, wants in wanted]
        return dx, None, None, None, None, *[None] * count, *factors, *grads.bias


def _all_rows(given: Sequence[Tensor | None], like: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Every dy [M, N]; zeros for a linear that the loss does not depend on, which is rare enough to pay for it."""
    m = like.numel() // like.shape[-1]
    pairs = zip(given, weights, strict=True)
    return [like.new_zeros(m, w.shape[0]) if dy is None else readable(rows_of(dy)) for dy, w in pairs]


def _fourths(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    count = len(tensors) // 4
    return tuple(tensors[i * count : (i + 1) * count] for i in range(4))


def why_not_one_pass(x: Tensor, branches: Sequence[Branch]) -> str | None:
    """Why these had better be computed one by one, in words."""
    ranks = sum(branch.a.shape[0] for branch in branches)
    return f"ranks add up to more than {MAX_THIN_RANK}" if x.is_cuda and ranks > MAX_THIN_RANK else None


def too_small_to_share(x: Tensor, width: int) -> bool:
    """Whether a CPU computes results of this many columns in all as fast one by one, dropout or not."""
    return is_small(x, width, drops=True)


def lowrank_group(
    x: Tensor,
    branches: Sequence[Branch],
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    route: str = "auto",
    seed: Tensor | None = None,
    label: str | None = None,
) -> tuple[Tensor, ...]:
    """yᵢ = x Wᵢᵀ + scale · (drop(x) Aᵢᵀ) Bᵢᵀ + biasᵢ for every branch, differentiable in everything but the weights.

    Args:
        x: [..., K] in one dtype with every weight; factors in it or in fp32, each group of factors in one dtype.
        branches: see `Branch`; ranks and output sizes may differ.
        scale, dropout_p, seed, label: as in `lowrank_linear`. One mask serves all branches, where separate layers
            would draw one each.
        route: "auto", or one of `lowrank_fused.routes.GROUP_ROUTES`, which then works or raises.

    Kept for backward: x if an A trains, s (the sum of the ranks a token) if a B does, one mask. Second derivatives
    raise.

    Raises ValueError, TypeError and UnsupportedError as `lowrank_linear`.
    """
    check_input(x)
    for branch in branches:
        n = branch.weight.shape[0]
        others = {"bias": branch.bias, "weight": branch.weight}
        check_factors(x, (n, branch.weight.shape[1]), branch.a, branch.b, None, "none", others)
        if branch.weight.requires_grad:
            raise ValueError("weights must be frozen: call weight.requires_grad_(False); only low-rank terms train")
        if branch.weight.shape[1] != x.shape[-1]:
            raise ValueError(f"x must end in in_features = {branch.weight.shape[1]}, got {list(x.shape)}")
    if len({branch.a.dtype for branch in branches}) != 1:
        raise TypeError(f"the branches' a must share one dtype, got {[b.a.dtype for b in branches]}")
    check_dropout(dropout_p)
    drop = mask_source(x, dropout_p, seed, None)
    weights = [branch.weight for branch in branches]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    for branch, weight in zip(branches, weights, strict=True):
        if weight.dtype != x.dtype:
            raise TypeError(f"x and weights must share one floating dtype, got {x.dtype} and {weight.dtype}")
        check_dtypes(x, branch.a, branch.b)
    shapes = [(weight.shape[0], branch.a.shape[0]) for weight, branch in zip(weights, branches, strict=True)]
    k = x.shape[-1]
    routes = choose_for_group(route, x.numel() // k if k else 0, k, shapes, x.dtype, dropout_p > 0, x.device)
    biases = [branch.bias for branch in branches]
    if routes[0] != "precise":
        biases = [None if bias is None else bias.to(x.dtype) for bias in biases]
    options = _options(scale, dropout_p, x, branches, biases)
    operands = (*weights, *(b.a for b in branches), *(b.b for b in branches), *biases)
    return LowRankGroupFunction.apply(x, drop, options, routes, label, *operands)


def _options(
    scale: float, dropout_p: float, x: Tensor, branches: Sequence[Branch], biases: Sequence[Tensor | None]
) -> GroupOptions:
    """The gradients that every tensor wants at the moment."""
    grad = torch.is_grad_enabled()

    def wants(tensors: Sequence[Tensor | None]) -> tuple[bool, ...]:
        return tuple(grad and t is not None and t.requires_grad for t in tensors)

    bounds = (0, *accumulate(branch.a.shape[0] for branch in branches))
    return GroupOptions(
        scale=scale,
        dropout_p=dropout_p,
        ranks=tuple(slice(*pair) for pair in pairwise(bounds)),
        wants_x=wants([x])[0],
        wants_a=wants([b.a for b in branches]),
        wants_b=wants([b.b for b in branches]),
        wants_bias=wants(biases),
    )
