"""Σ A_i [r, K] and Σ B_j [N, r] of stacked factors: `sum_blocks()`, differentiable, one launch each way on a GPU.

    a [M·r, K], b [N, C·r]    ->    Σ_i a[i r : (i + 1) r],    Σ_j b[:, j r : (j + 1) r]

`lowrank_fused::sum_blocks` and `lowrank_fused::repeat_blocks`, its gradient, are operators of torch.library. Elsewhere
than on a GPU they are PyTorch's own sums and copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..library import LIBRARY, define
from ..target import target_of

__all__ = ["repeat_blocks", "sum_blocks", "sum_blocks_op"]


def _uses_kernels(a: Tensor, b: Tensor) -> bool:
    return a.dtype != torch.float64 and a.dtype == b.dtype and target_of(a.device).has_triton


def _sum(a: Tensor, b: Tensor, count_a: int, count_b: int) -> tuple[Tensor, Tensor]:
    if _uses_kernels(a, b):
        from lowrank_fused.kernels.stacked import Stack
        from lowrank_fused.kernels.stacked import sum_blocks as launch

        of_a, of_b = Stack(1, count_a, a.numel() // count_a), Stack(b.shape[0], count_b, b.shape[1] // count_b)
        return launch(a.contiguous(), b.contiguous(), of_a, of_b)
    return a.unflatten(0, (count_a, -1)).sum(0), b.unflatten(1, (count_b, -1)).sum(1)


def _sum_fake(a: Tensor, b: Tensor, count_a: int, count_b: int) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[0] // count_a, a.shape[1]), b.new_empty(b.shape[0], b.shape[1] // count_b)


def _repeat(a: Tensor, b: Tensor, count_a: int, count_b: int) -> tuple[Tensor, Tensor]:
    if _uses_kernels(a, b):
        from lowrank_fused.kernels.stacked import Stack
        from lowrank_fused.kernels.stacked import repeat_blocks as launch

        of_a, of_b = Stack(1, count_a, a.numel()), Stack(b.shape[0], count_b, b.shape[1])
        return launch(a.contiguous(), b.contiguous(), of_a, of_b)
    return a.repeat(count_a, 1), b.repeat(1, count_b)


def _repeat_fake(a: Tensor, b: Tensor, count_a: int, count_b: int) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[0] * count_a, a.shape[1]), b.new_empty(b.shape[0], b.shape[1] * count_b)


sum_blocks_op = define("sum_blocks(Tensor a, Tensor b, int count_a, int count_b) -> (Tensor, Tensor)", _sum, _sum_fake)
repeat_blocks = define(
    "repeat_blocks(Tensor a, Tensor b, int count_a, int count_b) -> (Tensor, Tensor)", _repeat, _repeat_fake
)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Any) -> None:
    ctx.counts = inputs[2:]
    ctx.set_materialize_grads(False)


@torch.autograd.function.once_differentiable
def _pull_back(ctx: Any, da: Tensor | None, db: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
    count_a, count_b = ctx.counts
    if da is not None and db is not None:
        return *repeat_blocks(da, db, count_a, count_b), None, None
    # What nobody asked for stays None, so that a factor seems to depend on its own blocks alone.
    return None if da is None else da.repeat(count_a, 1), None if db is None else db.repeat(1, count_b), None, None


torch.library.register_autograd("lowrank_fused::sum_blocks", _pull_back, setup_context=_keep_for_backward, lib=LIBRARY)


def sum_blocks(a: Tensor, b: Tensor, count_a: int, count_b: int) -> tuple[Tensor, Tensor]:
    """Σ of the `count_a` blocks of rows of a [count_a·r, K] and of the `count_b` blocks of columns of b [N, count_b·r].

    A factor of one block comes back as it is. Second derivatives raise.

    Raises:
        ValueError: a count that does not divide the rows of a or the columns of b.
    """
    if count_a < 1 or count_b < 1 or a.shape[0] % count_a or b.shape[1] % count_b:
        raise ValueError(f"{count_a} and {count_b} blocks do not divide a {list(a.shape)} and b {list(b.shape)}")
    if count_a > 1 and count_b > 1:
        return sum_blocks_op(a, b, count_a, count_b)
    return (
        a if count_a == 1 else a.unflatten(0, (count_a, -1)).sum(0),
        b if count_b == 1 else b.unflatten(1, (count_b, -1)).sum(1),
    )
