"""Sums over the blocks of two stacked factors in one launch, and the gradients handed back to the blocks in another.

A factor is seen as [outer, blocks, inner], of which the middle axis is summed: stacked A's [M·r, K] are
[1, M, r·K], stacked B's [N, C·r] are [N, C, r].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Tile, cdiv
from .tile import cast

__all__ = ["Stack", "repeat_blocks", "sum_blocks"]

_TILE = Tile(block_m=1024, num_warps=4, num_stages=1)


class Stack(NamedTuple):
    """A factor [rows, columns] as `outer` runs of `blocks` blocks of `inner` consecutive elements."""

    outer: int
    blocks: int
    inner: int

    @property
    def size(self) -> int:
        """Elements of the sum."""
        return self.outer * self.inner


@triton.jit
def _run_of(block, size, inner, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of BLOCK elements of a sum, which of them exist, and where their first block has them."""
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offs, offs < size, offs // inner * (inner * COUNT) + offs % inner


@triton.jit
def _sum_run(stacked_ptr, out_ptr, block, size, inner, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    offs, mask, first = _run_of(block, size, inner, COUNT, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for c in tl.static_range(COUNT):
        acc += tl.load(stacked_ptr + first + c * inner, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, cast(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _repeat_run(summed_ptr, out_ptr, block, size, inner, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    offs, mask, first = _run_of(block, size, inner, COUNT, BLOCK)
    value = tl.load(summed_ptr + offs, mask=mask, other=0.0)
    for c in tl.static_range(COUNT):
        tl.store(out_ptr + first + c * inner, value, mask=mask)


@triton.jit
def _sum_blocks_kernel(
    a_ptr, b_ptr, a_out_ptr, b_out_ptr,
    blocks_a, size_a, inner_a, size_b, inner_b,
    COUNT_A: tl.constexpr, COUNT_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `blocks_a` programs sum the blocks of a, the others those of b."""
    block = tl.program_id(0)
    if block < blocks_a:
        _sum_run(a_ptr, a_out_ptr, block, size_a, inner_a, COUNT_A, BLOCK)
    else:
        _sum_run(b_ptr, b_out_ptr, block - blocks_a, size_b, inner_b, COUNT_B, BLOCK)


@triton.jit
def _repeat_blocks_kernel(
    a_ptr, b_ptr, a_out_ptr, b_out_ptr,
    blocks_a, size_a, inner_a, size_b, inner_b,
    COUNT_A: tl.constexpr, COUNT_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `blocks_a` programs write a to all of its blocks, the others b."""
    block = tl.program_id(0)
    if block < blocks_a:
        _repeat_run(a_ptr, a_out_ptr, block, size_a, inner_a, COUNT_A, BLOCK)
    else:
        _repeat_run(b_ptr, b_out_ptr, block - blocks_a, size_b, inner_b, COUNT_B, BLOCK)


def _launch(kernel, a: Tensor, b: Tensor, a_out: Tensor, b_out: Tensor, of_a: Stack, of_b: Stack, tile: Tile) -> None:
    blocks_a = cdiv(of_a.size, tile.block_m)
    Launch(
        kernel,
        (blocks_a + cdiv(of_b.size, tile.block_m),),
        dict(
            a_ptr=a, b_ptr=b, a_out_ptr=a_out, b_out_ptr=b_out, blocks_a=blocks_a,
            size_a=of_a.size, inner_a=of_a.inner, size_b=of_b.size, inner_b=of_b.inner,
            COUNT_A=of_a.blocks, COUNT_B=of_b.blocks, BLOCK=tile.block_m,
        ),
        tile,
        reads=(a, b),
        writes=(a_out, b_out),
        flops=of_a.size * of_a.blocks + of_b.size * of_b.blocks,
    ).run()  # fmt: skip


def sum_blocks(a: Tensor, b: Tensor, of_a: Stack, of_b: Stack, *, tile: Tile = _TILE) -> tuple[Tensor, Tensor]:
    """Σ_i A_i [r, K] and Σ_j B_j [N, r] of a [M·r, K] and b [N, C·r], contiguous; summed in fp32, rounded once."""
    a_out = torch.empty(a.shape[0] // of_a.blocks, a.shape[1], dtype=a.dtype, device=a.device)
    b_out = torch.empty(b.shape[0], b.shape[1] // of_b.blocks, dtype=b.dtype, device=b.device)
    _launch(_sum_blocks_kernel, a, b, a_out, b_out, of_a, of_b, tile)
    return a_out, b_out


def repeat_blocks(a: Tensor, b: Tensor, of_a: Stack, of_b: Stack, *, tile: Tile = _TILE) -> tuple[Tensor, Tensor]:
    """a [r, K] to each block of [M·r, K], and b [N, r] to each of [N, C·r]: the gradient of `sum_blocks`."""
    a_out = torch.empty(a.shape[0] * of_a.blocks, a.shape[1], dtype=a.dtype, device=a.device)
    b_out = torch.empty(b.shape[0], b.shape[1] * of_b.blocks, dtype=b.dtype, device=b.device)
    _launch(_repeat_blocks_kernel, a, b, a_out, b_out, of_a, of_b, tile)
    return a_out, b_out
