"""dx = dy W + keep ∘ (ds A) / (1 − p) with the low-rank term in the accumulator: dx is written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_scale
from .factor_rows import as_rows, row_arguments, row_pointers
from .gemm import (
    Access,
    access_of,
    blocks_of,
    choose_gemm_tile,
    descriptor,
    descriptor_product,
    drop,
    gemm_tiles,
    low_rank_product,
    pointer_product,
    rank_multiple,
)
from .launch import Launch, Tile, arch_of, cdiv, sm_count
from .measured import Tuned, tuned_tile
from .tile import cast, dot, grouped_order

__all__ = ["choose_tile", "grad_input", "tiles"]


@triton.jit
def _add_low_rank(
    acc, ds_ptr, a_ptr, a2_ptr, a3_ptr, rows, cols, M, K, R, r2, r3,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + ds[rows, :] · A[:, cols]; A [R, K], contiguous, may come in up to three pieces (see `row_pointers`)."""
    if a2_ptr is None:
        acc = low_rank_product(acc, ds_ptr, a_ptr, rows, cols, M, K, R, R, K, 1, BLOCK_R)
    else:
        offs_r = tl.arange(0, BLOCK_R)
        ds_ptrs = ds_ptr + rows[:, None] * R + offs_r[None, :]
        mask_m, mask_k = rows[:, None] < M, cols[None, :] < K
        for r in range(0, R, BLOCK_R):
            a_ptrs = row_pointers(a_ptr, a2_ptr, a3_ptr, r2, r3, (r + offs_r)[:, None], K) + cols[None, :]
            ds = tl.load(ds_ptrs + r, mask=mask_m & (offs_r[None, :] < R - r), other=0.0)
            a = tl.load(a_ptrs, mask=mask_k & (offs_r[:, None] < R - r), other=0.0)
            acc = dot(ds, cast(a, ds.dtype), acc)
    return acc


@triton.jit(do_not_specialize=["M", "r2", "r3"])
def _grad_input_kernel(
    dy_ptr, w_ptr, ds_ptr, a_ptr, a2_ptr, a3_ptr, mask_ptr, dx_ptr,
    M, N, K, R, r2, r3,
    keep_scale,
    stride_dym, stride_dyn,
    stride_wn, stride_wk,
    ADDS: tl.constexpr, RANK_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of dx [M, K] = dy [M, N] W [N, K] + keep ∘ (ds [M, R] A [R, K]) · keep_scale; keep is packed.

    A masked low-rank product comes first, while the accumulator holds nothing else that the mask would hit. What dx
    holds already is added last if ADDS says so: before the main loop it would take registers all the way.
    """
    R = R // RANK_MULTIPLE * RANK_MULTIPLE  # changes no value, but tells the compiler what divides it
    pid_m, pid_k = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K))
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if mask_ptr is not None:
        acc = _add_low_rank(acc, ds_ptr, a_ptr, a2_ptr, a3_ptr, rows, cols, M, K, R, r2, r3, BLOCK_R)
        acc = drop(acc, mask_ptr, rows, pid_k, M, K, keep_scale, BLOCK_M, BLOCK_K)
    acc = pointer_product(
        acc, dy_ptr, w_ptr, rows, cols, M, K, N, stride_dym, stride_dyn, stride_wn, stride_wk, BLOCK_N
    )
    if ds_ptr is not None and mask_ptr is None:
        acc = _add_low_rank(acc, ds_ptr, a_ptr, a2_ptr, a3_ptr, rows, cols, M, K, R, r2, r3, BLOCK_R)
    dx_ptrs = dx_ptr + rows[:, None] * K + cols[None, :]
    mask_dx = (rows[:, None] < M) & (cols[None, :] < K)
    if ADDS:
        acc += tl.load(dx_ptrs, mask=mask_dx, other=0.0).to(tl.float32)
    tl.store(dx_ptrs, cast(acc, dx_ptr.dtype.element_ty), mask=mask_dx)


@triton.jit(do_not_specialize=["M", "r2", "r3"])
def _grad_input_tma_kernel(
    dy_desc, w_desc, ds_ptr, a_ptr, a2_ptr, a3_ptr, mask_ptr, dx_desc,
    M, N, K, R, r2, r3,
    keep_scale,
    ADDS: tl.constexpr, W_ALONG_N: tl.constexpr, RANK_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same through descriptors of dy, W and dx, with as many programs as SMs taking tiles in turn."""
    R = R // RANK_MULTIPLE * RANK_MULTIPLE
    num_pid_m, num_pid_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    for tile in range(tl.program_id(0), num_pid_m * num_pid_k, tl.num_programs(0)):
        pid_m, pid_k = grouped_order(tile, num_pid_m, num_pid_k)
        row, col = pid_m * BLOCK_M, pid_k * BLOCK_K
        rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        cols = col.to(tl.int64) + tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        if mask_ptr is not None:
            acc = _add_low_rank(acc, ds_ptr, a_ptr, a2_ptr, a3_ptr, rows, cols, M, K, R, r2, r3, BLOCK_R)
            acc = drop(acc, mask_ptr, rows, pid_k, M, K, keep_scale, BLOCK_M, BLOCK_K)
        acc = descriptor_product(acc, dy_desc, w_desc, row, col, N, W_ALONG_N, BLOCK_N)
        if ds_ptr is not None and mask_ptr is None:
            acc = _add_low_rank(acc, ds_ptr, a_ptr, a2_ptr, a3_ptr, rows, cols, M, K, R, r2, r3, BLOCK_R)
        if ADDS:
            acc += dx_desc.load([row, col]).to(tl.float32)
        dx_desc.store([row, col], cast(acc, dx_desc.dtype))


@lru_cache(1024)
def choose_tile(M: int, N: int, K: int, R: int, dtype: torch.dtype, access: Access, sms: int) -> Tile:
    """Block sizes for dx [M, K] on a GPU with `sms` multiprocessors."""
    return _turned(choose_gemm_tile(M, K, R, dtype, access, sms))


def _turned(tile: Tile) -> Tile:
    """A tile of the products' own, whose block_n is along the columns of its output, here K."""
    return replace(tile, block_n=tile.block_k, block_k=tile.block_n)


def tiles(R: int, dtype: torch.dtype, access: Access) -> list[Tuned]:
    """All that `choose_tile` may return for such operands."""
    return [Tuned(_turned(tile)) for tile, _ in gemm_tiles(R, dtype, access)]


def grad_input(
    dy: Tensor,
    w: Tensor,
    ds: Tensor | None = None,
    a: Tensor | Sequence[Tensor] | None = None,
    *,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    add: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """dx = dy W + keep ∘ (ds A) / (1 − p), [M, K] in dy's dtype, accumulated in fp32 and rounded once.

    With `add` [M, K], contiguous and in dy's dtype, dx is added to it in place and it comes back: projections of one
    x chain their gradients through one tensor, each addition rounded once.
    dy [M, N] and w [N, K] share a dtype and may have any strides: a `Conv1D` weight [K, N] is passed as its
    transpose. ds [M, R] has dy's dtype, a [R, K] may be fp32 beside it; several a's, [Rᵢ, K] of one dtype, are read
    as the rows of one; without them dx = dy W. mask uint8 [M, ⌈K / 8⌉] holds the bits of the forward's dropout, bit j
    of byte i for column 8i + j; without it every element is kept and dropout_p must be 0. Reads dy, w, ds, a, mask and
    add once, writes dx once; 2MK(N + R) FLOP.
    """
    (M, N), K, R = dy.shape, w.shape[1], 0 if ds is None else ds.shape[1]
    if add is not None:
        same = add.shape == (M, K) and add.dtype == dy.dtype and add.is_contiguous()
        assert same, f"add must be contiguous [{M}, {K}] of {dy.dtype}, got {list(add.shape)} of {add.dtype}"
    dx = torch.empty((M, K), dtype=dy.dtype, device=dy.device) if add is None else add
    if dx.numel() == 0:
        return dx
    if tile is None:
        access = access_of(dy, w, dx, arch=arch_of(dy))
        variant = access if mask is None else f"{access}, masked"
        tuned = tuned_tile("grad_input", dy, arch_of(dy), (N, K, R), variant, partial(tiles, R, dy.dtype, access))
        tile = tuned.tile if tuned else choose_tile(M, N, K, R, dy.dtype, access, sm_count(dy))
        if ds is None or add is not None:
            # Left to decide, the assembler spills a few bytes of these in order to fit one more small program.
            tile = replace(tile, max_registers=255)
    factors: tuple[Tensor, ...] = ()
    if ds is not None and a is not None:
        ds, factors = ds.contiguous(), as_rows(a)
        factors = tuple(factor.contiguous() for factor in factors)
    else:
        mask = None
    args = {"ds_ptr": ds, **row_arguments(factors), "mask_ptr": mask, "keep_scale": keep_scale(dropout_p)}
    args |= {"M": M, "N": N, "K": K, "R": R, "RANK_MULTIPLE": rank_multiple(R, R), **blocks_of(tile)}
    args["ADDS"] = add is not None
    programs = cdiv(M, tile.block_m) * cdiv(K, tile.block_k)
    if tile.use_tma:
        kernel, grid = _grad_input_tma_kernel, min(programs, sm_count(dy))
        args["dy_desc"] = descriptor(dy, tile.block_m, tile.block_n)
        args["w_desc"] = descriptor(w, tile.block_n, tile.block_k)
        args["dx_desc"] = descriptor(dx, tile.block_m, tile.block_k)
        args["W_ALONG_N"] = w.stride(1) != 1
    else:
        kernel, grid = _grad_input_kernel, programs
        args |= {"dy_ptr": dy, "stride_dym": dy.stride(0), "stride_dyn": dy.stride(1)}
        args |= {"w_ptr": w, "stride_wn": w.stride(0), "stride_wk": w.stride(1), "dx_ptr": dx}
    Launch(kernel, (grid,), args, tile, (dy, w, ds, *factors, mask, add), (dx,), 2 * M * K * (N + R)).run()
    return dx
