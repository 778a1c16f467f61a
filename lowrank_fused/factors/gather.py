"""P θ and Pᵀ g of a `Projection` as operators of torch.library, and the factors of all layers made with them.

`lowrank_fused::project` and `lowrank_fused::project_back` are pure functions of a tensor and the projection's numbers;
what these stand for (an index, its inverse) is looked up when an operator runs, so no graph holds it. On a GPU they are
the kernels of kernels/gather.py, elsewhere plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..flat_gradient import FlatGradient
from ..library import define
from ..target import target_of
from .generated import Generated
from .projection import Projection, projection

__all__ = ["SharedFactors", "project", "project_back"]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scales and sums are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _uses_kernels(like: Tensor) -> bool:
    return like.dtype != torch.float64 and target_of(like.device).has_triton


def _project(theta: Tensor, first: int, count: int, *, total: int, seed: int, index: str) -> Tensor:
    """(P θ)[first : first + count] in θ's dtype, from θ ∘ n^(-1/2) in fp32 (fp64 for fp64)."""
    p = projection(total, theta.numel(), seed, index)
    dtype = _sum_dtype(theta.dtype)
    scale = p.scale(theta.device, dtype)
    if not _uses_kernels(theta):
        scaled = theta.to(dtype) * scale
        return scaled.index_select(0, p.entries(first, count, theta.device)).to(theta.dtype)
    from lowrank_fused.kernels.gather import gather

    return gather(theta.contiguous(), _for_kernels(p, theta.device), scale, first=first, count=count)


def _project_fake(theta: Tensor, first: int, count: int, *, total: int, seed: int, index: str) -> Tensor:
    return theta.new_empty(count)


def _project_back(
    grad: Tensor, first: int, *, total: int, length: int, seed: int, index: str, deterministic: bool
) -> Tensor:
    """P[first : first + len(grad)]ᵀ grad, fp32 or fp64 [d].

    All of P in one deterministic segmented sum, or atomically if that is allowed. A part of it (one layer's, in a
    compiled graph) by PyTorch's own accumulation, which sorts the entries on a GPU: deterministic too.
    """
    p = projection(total, length, seed, index)
    dtype = _sum_dtype(grad.dtype)
    scale = p.scale(grad.device, dtype)
    if not _uses_kernels(grad):
        entries = p.entries(first, grad.numel(), grad.device)
        return _accumulated(grad.to(dtype), entries, length).mul_(scale)
    from lowrank_fused.kernels.gather import scatter_add, segment_sum

    if not deterministic:
        return scatter_add(grad, _for_kernels(p, grad.device), length, first=first).mul_(scale)
    if grad.numel() == total:
        inverse = p.segments(grad.device) if index == "table" else _for_kernels(p, grad.device)
        return segment_sum(grad, inverse, scale)
    return _accumulated(grad.to(dtype), p.entries(first, grad.numel(), grad.device), length).mul_(scale)


def _accumulated(values: Tensor, entries: Tensor, length: int) -> Tensor:
    out = values.new_zeros(length)
    if values.is_cuda:  # index_add_ is atomic there
        return out.index_put_((entries.long(),), values, accumulate=True)
    return out.index_add_(0, entries, values)


def _project_back_fake(
    grad: Tensor, first: int, *, total: int, length: int, seed: int, index: str, deterministic: bool
) -> Tensor:
    return grad.new_empty(length, dtype=_sum_dtype(grad.dtype))


def _for_kernels(p: Projection, device: torch.device) -> Any:
    """What the kernels take: the stored index, or the numbers of the permutation."""
    from lowrank_fused.kernels.gather import Permutation

    return p.table(device) if p.index == "table" else Permutation(*p.permutation)


project = define(
    "project(Tensor theta, SymInt first, SymInt count, *, int total, int seed, str index) -> Tensor",
    _project,
    _project_fake,
)
project_back = define(
    "project_back(Tensor grad, SymInt first, *, int total, int length, int seed, str index, bool deterministic) "
    "-> Tensor",
    _project_back,
    _project_back_fake,
)


class _Numbers(NamedTuple):
    """A projection as plain numbers, which a traced graph can hold."""

    total: int
    length: int
    seed: int
    recipe: str
    deterministic: bool


class _Gather(torch.autograd.Function):
    """Consecutive matrices of P θ from one gather; backward sums all their gradients at once.

    Outside of graphs whoever computes these writes them where that sum reads them (`FlatGradient`).
    """

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, first: int, shapes: Sequence[tuple[int, int]], p: _Numbers
    ) -> tuple[Tensor, ...]:
        sizes = [rows * columns for rows, columns in shapes]
        flat = project(theta, first, sum(sizes), total=p.total, seed=p.seed, index=p.recipe)
        ctx.first, ctx.sizes, ctx.numbers, ctx.dtype = first, sizes, p, theta.dtype
        ctx.set_materialize_grads(False)
        parts = tuple(part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))
        ctx.gradient = None if torch.compiler.is_compiling() else FlatGradient(parts)
        return parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        p = ctx.numbers
        if all(grad is None for grad in grads):
            return None, None, None, None
        # None are those of layers that are frozen, removed or not reached.
        flat = _joined(grads, ctx.sizes) if ctx.gradient is None else ctx.gradient.take(grads)
        summed = project_back(
            flat, ctx.first, total=p.total, length=p.length, seed=p.seed, index=p.recipe,
            deterministic=p.deterministic,
        )  # fmt: skip
        return summed.to(ctx.dtype), None, None, None


def _joined(grads: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    like = next(grad for grad in grads if grad is not None)
    pairs = zip(grads, sizes, strict=True)
    return torch.cat([like.new_zeros(size) if grad is None else grad.reshape(-1) for grad, size in pairs])


class SharedFactors:
    """A [r, in] and B [out, r] of every layer of a model, views of one buffer P θ.

    All layers hold the same object. It remembers the factors until θ changes (`generated`): one gather serves all
    layers, micro-batches and recomputations of an optimiser step, and one segmented sum all gradients of a backward.
    In a compiled or captured graph, where nothing may be remembered, each layer gathers its own part. (One graph then
    serves layers at different places of P θ only if torch._dynamo.config.allow_unspec_int_on_nn_module is on.)

    Objects of equal numbers are equal; copies and pickles hold the numbers alone.
    """

    def __init__(self, p: Projection, layout: Sequence[tuple[int, int, int]], deterministic: bool) -> None:
        """`layout`: (out, in, rank) of every layer in model order; in P θ each layer's A comes first, then its B."""
        self.projection, self.layout, self.deterministic = p, tuple(layout), deterministic
        self.generated = Generated(self._gather_all)
        self._place: dict[int, int] = {}
        first = 0
        for i, (out_features, in_features, rank) in enumerate(self.layout):
            self._place[first] = i
            first += rank * (out_features + in_features)

    def __reduce__(self) -> tuple:
        return SharedFactors, (self.projection, self.layout, self.deterministic)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedFactors) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash(self.layout)

    def __repr__(self) -> str:
        return f"SharedFactors({self.projection}, {len(self.layout)} layers)"

    @property
    def numbers(self) -> _Numbers:
        p = self.projection
        return _Numbers(p.total, p.length, p.seed, p.index, self.deterministic)

    def _gather_all(self, theta: Tensor) -> tuple[Tensor, ...]:
        shapes = [shape for n, k, rank in self.layout for shape in ((rank, k), (n, rank))]
        return _Gather.apply(theta, 0, shapes, self.numbers)

    def of_layer(self, theta: Tensor, first: int, rank: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of the layer whose elements begin at `first`, beside its weight [out, in]; dtype of θ."""
        if self.generated.remembers(theta):
            i = 2 * self._place[first]
            a, b = self.generated(theta)[i : i + 2]
        else:
            n, k = weight.shape
            a, b = _Gather.apply(theta, first, [(rank, k), (n, rank)], self.numbers)
        return a.to(weight.device), b.to(weight.device)
