"""y = x Wᵀ + v Bᵀ + bias with the low-rank term in the accumulator of the big product: y is written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .factor_rows import MOST
from .gemm import (
    Access,
    access_of,
    blocks_of,
    choose_gemm_tile,
    descriptor,
    descriptor_product,
    gemm_tiles,
    has_aligned_rows,
    low_rank_descriptor_product,
    low_rank_product,
    pointer_product,
    rank_multiple,
)
from .launch import Launch, Tile, arch_of, cdiv, sm_count, with_adjacent_ranks
from .measured import Tuned, tuned_tile
from .tile import cast, grouped_order

__all__ = ["aligned_rows", "choose_tile", "lowrank_forward", "tiles"]


@triton.jit(do_not_specialize=["M"])
def _lowrank_forward_kernel(
    x_ptr, w_ptr, v_ptr, b_ptr, bias_ptr, y_ptr,
    M, N, K, R,
    stride_xm, stride_xk,
    stride_wn, stride_wk,
    stride_vm,
    RANK_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of y [M, N] = x [M, K] Wᵀ [K, N] + v [M, R] Bᵀ [R, N] + bias [N]; x and W have any strides."""
    # Changes no value, but tells the compiler what divides them.
    R, stride_vm = R // RANK_MULTIPLE * RANK_MULTIPLE, stride_vm // RANK_MULTIPLE * RANK_MULTIPLE
    pid_m, pid_n = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = pointer_product(acc, x_ptr, w_ptr, rows, cols, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_K)
    acc = low_rank_product(acc, v_ptr, b_ptr, rows, cols, M, N, R, stride_vm, 1, R, BLOCK_R)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * N + cols[None, :]
    tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (cols[None, :] < N))


@triton.jit(do_not_specialize=["M"])
def _lowrank_forward_tma_kernel(
    x_desc, w_desc, v_desc, b_desc, v_ptr, b_ptr, bias_ptr, y_desc,
    M, N, K, R,
    stride_vm,
    W_ALONG_K: tl.constexpr, RANK_MULTIPLE: tl.constexpr, IN_ONE_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same through descriptors of x, W and y, with as many programs as SMs taking tiles in turn.

    v and B come through descriptors or through pointers, and there are those that they come through.
    The low-rank product comes after the main loop: before it, or pipelined with it, its blocks would need
    shared memory beside those of x and W.
    """
    R, stride_vm = R // RANK_MULTIPLE * RANK_MULTIPLE, stride_vm // RANK_MULTIPLE * RANK_MULTIPLE
    num_pid_m, num_pid_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), num_pid_m * num_pid_n, tl.num_programs(0)):
        pid_m, pid_n = grouped_order(tile, num_pid_m, num_pid_n)
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        cols = col.to(tl.int64) + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = descriptor_product(acc, x_desc, w_desc, row, col, K, W_ALONG_K, BLOCK_K)
        if v_desc is not None:
            acc = low_rank_descriptor_product(acc, v_desc, b_desc, row, col, R, IN_ONE_STEP, BLOCK_R)
        else:
            acc = low_rank_product(acc, v_ptr, b_ptr, rows, cols, M, N, R, stride_vm, 1, R, BLOCK_R)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        y_desc.store([row, col], cast(acc, y_desc.dtype))


@lru_cache(1024)
def choose_tile(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    access: Access,
    sms: int,
    *,
    thin_descriptors: bool = False,
    bounded: bool = False,
) -> Tile:
    """Block sizes for y [M, N] on a GPU with `sms` multiprocessors; `bounded` as `tiles` has it.

    Through descriptors v and B are read in one step up to rank 128: into the shared memory of the main loop, and each
    further step would wait for memory once more.
    """
    return _for_thin(choose_gemm_tile(M, N, R, dtype, access, sms), R, thin_descriptors, bounded)


# Registers of a thread on sm_90, which come in eights, for the tiles whose accumulator takes 128 or 64 of them. So many
# has the product without a low-rank term; with one the assembler takes up to 8 more, unless it is told that it may not.
_REGISTERS = {(128, 256): 160, (128, 128): 104}


def _for_thin(tile: Tile, R: int, thin_descriptors: bool, bounded: bool) -> Tile:
    """The tile with the block of ranks in which v and B are read, and the registers for it."""
    if not (tile.use_tma and thin_descriptors):
        return tile
    limit = _REGISTERS.get((tile.block_m, tile.block_n)) if bounded else None
    return replace(tile, block_r=16 if R <= 16 else 64 if R <= 64 else 128, max_registers=limit)


def tiles(
    R: int, dtype: torch.dtype, access: Access, *, thin_descriptors: bool = False, bounded: bool = False
) -> list[Tuned]:
    """All that `choose_tile` may return for such operands.

    `thin_descriptors`: v and B come through descriptors too. `bounded`: then no more registers than without them; not
    for a bias in fp32, which would be spilled.
    """
    return [Tuned(_for_thin(tile, R, thin_descriptors, bounded)) for tile, _ in gemm_tiles(R, dtype, access)]


def _thin_operands(v: Tensor, b: Tensor, tile: Tile, by_descriptor: bool) -> dict[str, Any]:
    """v and B as arguments of the kernel with descriptors.

    What the low-rank term adds to the registers of the product on sm_90 at ranks up to 128: through descriptors at most
    4 (5 beside a bias in fp32). Through pointers 27 to 40 at ranks that are multiples of 4, 29 to 59 at those of 2, 3
    to 101 at odd ones, 23 to 96 with B in fp32. Never shared memory, never a spill. With v through a descriptor and B
    through pointers it would be up to 100. So `aligned_rows` has B copied where its rows or its dtype ask for pointers;
    only layers of a group whose ranks differ then keep to them.
    """
    if not by_descriptor:
        return {"v_desc": None, "b_desc": None, "v_ptr": v, "b_ptr": b.contiguous()}
    blocks = {"v_desc": descriptor(v, tile.block_m, tile.block_r), "b_desc": descriptor(b, tile.block_n, tile.block_r)}
    return {**blocks, "v_ptr": None, "b_ptr": None}


def _has_aligned_ranks(u: Tensor) -> bool:
    return u.stride(1) == 1 and has_aligned_rows(u, 16)


def aligned_rows(b: Sequence[Tensor], x: Tensor, w: Sequence[Tensor]) -> Tensor | None:
    """Room for copies of the b's [Nᵢ, R] in x's dtype, one after the other in rows that a descriptor can read.

    `shrink` fills it. None where the b's, one for each w [Nᵢ, K], may be read as they are, where x, the w's and the y's
    are not read through descriptors anyway, where the ranks of several differ, or where there are more than it joins.
    """
    R = b[0].shape[1]
    if all(factor.dtype == x.dtype and _has_aligned_ranks(factor) for factor in b):
        return None
    if len(b) > MOST:
        return None
    if any(factor.shape[1] != R or factor.dtype != b[0].dtype or factor.shape[0] % 8 for factor in b):
        return None
    rows = sum(factor.shape[0] for factor in b)
    if rows * R >= 2**30 or any(access_of(x, weight, arch=arch_of(x)) != "descriptors" for weight in w):
        return None
    return torch.empty((rows, 8 * cdiv(R, 8)), dtype=x.dtype, device=x.device)[:, :R]


def lowrank_forward(
    x: Tensor, w: Tensor, v: Tensor, b: Tensor, *, bias: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """y = x Wᵀ + v Bᵀ + bias, [M, N] in x's dtype, accumulated in fp32 and rounded once.

    x [M, K] and w [N, K] share a dtype and may have any strides: a `Conv1D` weight [K, N] is passed as its
    transpose. v [M, R] has x's dtype and may be some columns of a wider matrix; b [N, R] and bias [N] may be fp32
    beside 16-bit x. Reads every operand once, writes y once; 2MN(K + R) FLOP.
    """
    (M, K), N, R = x.shape, w.shape[0], v.shape[1]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    v, b = with_adjacent_ranks(v), with_adjacent_ranks(b)
    thin_descriptors = v.dtype == b.dtype and _has_aligned_ranks(v) and _has_aligned_ranks(b)
    if tile is None:
        arch = arch_of(x)
        access = access_of(x, w, y, arch=arch)
        variant = f"{access}, v and B too" if thin_descriptors else access
        bounded = arch == 90 and (bias is None or bias.dtype == x.dtype)
        thin = {"thin_descriptors": thin_descriptors, "bounded": bounded}
        tuned = tuned_tile("lowrank_forward", x, arch, (N, K, R), variant, partial(tiles, R, x.dtype, access, **thin))
        tile = tuned.tile if tuned else choose_tile(M, N, K, R, x.dtype, access, sm_count(x), **thin)
    args = {"bias_ptr": None if bias is None else bias.contiguous(), **blocks_of(tile)}
    args |= {"M": M, "N": N, "K": K, "R": R, "stride_vm": v.stride(0), "RANK_MULTIPLE": rank_multiple(R, v.stride(0))}
    programs = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    if tile.use_tma:
        kernel, grid = _lowrank_forward_tma_kernel, min(programs, sm_count(x))
        args["x_desc"] = descriptor(x, tile.block_m, tile.block_k)
        args["w_desc"] = descriptor(w, tile.block_n, tile.block_k)
        args["y_desc"] = descriptor(y, tile.block_m, tile.block_n)
        args |= {"W_ALONG_K": w.stride(1) == 1, "IN_ONE_STEP": thin_descriptors and tile.block_r >= R}
        args |= _thin_operands(v, b, tile, thin_descriptors)
    else:
        kernel, grid = _lowrank_forward_kernel, programs
        args |= {"x_ptr": x, "stride_xm": x.stride(0), "stride_xk": x.stride(1)}
        args |= {"w_ptr": w, "stride_wn": w.stride(0), "stride_wk": w.stride(1), "y_ptr": y}
        args |= {"v_ptr": v, "b_ptr": b.contiguous()}
    Launch(kernel, (grid,), args, tile, (x, w, v, b, bias), (y,), 2 * M * N * (K + R)).run()
    return y
