"""What a pass over x yields: dA, and on request dx0 = keep ∘ (ds A) / (1 − p)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_scale, spread_bits
from .dy_factors import rows_per_chunk
from .expand import expand
from .factor_rows import as_rows, row_arguments, row_pointers
from .launch import Launch, Tile, arch_of, cdiv, sm_count, zeroed_counters
from .shrink import block_of_rank
from .tile import cast, dot, is_last_to_arrive, sum_of_parts

__all__ = ["choose_tile", "factor_grad", "x_factors"]


@triton.jit
def _sum_parts(parts_ptr, da_ptr, first_r, offs_k, chunks, R, K, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """da[r, k] = Σ_c parts[c, r, k] for one strip of columns; 16 ranks at a time."""
    for r in range(0, BLOCK_R, 16):
        rows = first_r + r + tl.arange(0, 16)
        offs = rows.to(tl.int64)[:, None] * K + offs_k[None, :]
        mask = (rows < R)[:, None] & (offs_k < K)[None, :]
        total = sum_of_parts(parts_ptr + offs, mask, chunks, tl.cast(R, tl.int64) * K)
        tl.store(da_ptr + offs, cast(total, da_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _accumulate(
    x_ptr, a_ptr, a2_ptr, a3_ptr, mask_ptr, ds_ptr, dx0_ptr,
    offs_k, offs_r, first_row, last_row, K, R, r2, r3, keep_scale, stride_xm, stride_xk, stride_ar, stride_ak,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dsᵀ (keep ∘ x) / (1 − p) over some rows, fp32 [BLOCK_R, BLOCK_K]; stores dx0 of these rows if given A."""
    IO: tl.constexpr = x_ptr.dtype.element_ty
    mask_k, mask_r = offs_k < K, offs_r < R
    if a_ptr is not None:
        rows = row_pointers(a_ptr, a2_ptr, a3_ptr, r2, r3, offs_r[:, None], stride_ar)
        a_ptrs = rows + offs_k[None, :] * stride_ak
        a = cast(tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0), IO)
    if mask_ptr is not None:
        row_bytes = tl.cdiv(K, 8)
        offs_byte = tl.min(offs_k, axis=0) // 8 + tl.arange(0, BLOCK_K // 8)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for row in range(first_row, last_row, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last_row
        mask_x = mask_m[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=mask_x, other=0.0)
        ds_ptrs = ds_ptr + offs_m[:, None] * R + offs_r[None, :]
        ds = tl.load(ds_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if mask_ptr is not None:
            bit_ptrs = mask_ptr + offs_m[:, None] * row_bytes + offs_byte[None, :]
            bits = tl.load(bit_ptrs, mask=mask_m[:, None] & (offs_byte < row_bytes)[None, :], other=0)
            keep = spread_bits(bits, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc = dot(tl.trans(ds), x, acc)
        # Always true; a region of its own gives this product its own warp layout (see dy_factors).
        if row < last_row:
            if a_ptr is not None:
                dx0 = dot(ds, a, tl.zeros((BLOCK_M, BLOCK_K), tl.float32)) * keep_scale
                if mask_ptr is not None:
                    dx0 = tl.where(keep, dx0, 0.0)
                tl.store(dx0_ptr + offs_m[:, None] * K + offs_k[None, :], cast(dx0, IO), mask=mask_x)
    return acc * keep_scale


@triton.jit(do_not_specialize=["M", "chunk_rows", "chunks", "r2", "r3"])
def _x_factors_kernel(
    x_ptr, a_ptr, a2_ptr, a3_ptr, mask_ptr, ds_ptr,
    dx0_ptr, da_parts_ptr, da_ptr, counters_ptr,
    M, K, R, r2, r3, chunk_rows, chunks,
    keep_scale,
    stride_xm, stride_xk,
    stride_ar, stride_ak,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """da [R, K] = dsᵀ (keep ∘ x) · keep_scale and dx0 [M, K] = keep ∘ (ds A) · keep_scale.

    A program owns a strip of columns, a block of ranks and a chunk of rows. It stores its part of da; the last one to
    arrive at a strip sums the parts in the order of the chunks. A may come in up to three pieces, see `row_pointers`.
    """
    strip, chunk, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_k = strip.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    first_row = chunk.to(tl.int64) * chunk_rows
    last_row = tl.minimum(first_row + chunk_rows, M)
    acc = _accumulate(
        x_ptr, a_ptr, a2_ptr, a3_ptr, mask_ptr, ds_ptr, dx0_ptr, offs_k, offs_r, first_row, last_row, K, R, r2, r3,
        keep_scale, stride_xm, stride_xk, stride_ar, stride_ak, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    offs = offs_r.to(tl.int64)[:, None] * K + offs_k[None, :]
    mask = (offs_r < R)[:, None] & (offs_k < K)[None, :]
    if da_parts_ptr is None:
        tl.store(da_ptr + offs, cast(acc, da_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(da_parts_ptr + chunk.to(tl.int64) * R * K + offs, acc, mask=mask)
        if is_last_to_arrive(counters_ptr + pid_r * tl.num_programs(0) + strip, chunks):
            _sum_parts(da_parts_ptr, da_ptr, pid_r * BLOCK_R, offs_k, chunks, R, K, BLOCK_R, BLOCK_K)


@lru_cache(1024)
def choose_tile(K: int, R: int, dtype: torch.dtype, wants_dx0: bool, masked: bool, arch: int, pieces: int = 1) -> Tile:
    """Blocks of x narrow enough that few chunks occupy the GPU: parts of dA cost more than reading ds again."""
    block_r = block_of_rank(R, dtype)
    if dtype == torch.float32:
        # Without tensor cores a product is unrolled: two of them, or one and a mask, leave room for 16 ranks.
        return Tile(block_m=16, block_k=64, block_r=16 if wants_dx0 or masked else block_r, num_warps=4, num_stages=3)
    # Rows that are not aligned are read element by element, and each of these takes a register.
    aligned = K % 16 == 0
    # Without wgmma or tensor memory both products keep their operands in registers; so does what a mask selects.
    short = masked or not aligned or (wants_dx0 and arch not in (90, 100))
    # What both products and a mask hold is then too much for the registers of four warps; of eight it is not, unless
    # the assembler is left to decide: it spills a few bytes in order to fit two programs.
    crowded = block_r == 64 and masked and wants_dx0 and arch >= 120
    # So is what leads to an A in pieces, and narrower blocks are what then leaves room.
    narrow = not aligned or (pieces > 1 and wants_dx0)
    return Tile(
        block_m=32 if short else 64,
        block_k=64 if narrow else 128,
        block_r=block_r,
        num_warps=8 if block_r == 128 or crowded else 4,
        num_stages=(4 if short else 3) + (aligned and narrow),
        max_registers=255 if crowded else None,
    )


def x_factors(
    x: Tensor,
    ds: Tensor,
    a: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    want_dx0: bool = False,
    out: Tensor | None = None,
    tile: Tile | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dA = dsᵀ (keep ∘ x) / (1 − p) [R, K] from one pass over x [M, K], and dx0 = keep ∘ (ds A) / (1 − p) if wanted.

    ds [M, R] has x's dtype. a [R, K]: dA takes its dtype, dx0 its values; several a's, [Rᵢ, K] of one dtype, are read
    as the rows of one. mask: packed bits [M, ⌈K / 8⌉]. dA is written to `out` [R, K] if given, contiguous.
    Reads x once, 2MKR FLOP, twice that with dx0. Deterministic: every sum has an order that the shapes fix.
    """
    factors = as_rows(a)
    R = ds.shape[1]
    if tile is None:
        tile = choose_tile(x.shape[1], R, x.dtype, want_dx0, mask is not None, arch_of(x), len(factors))
    # Rank blocks cannot share a sum over the rank: beyond one, dx0 is a launch of its own.
    fused = want_dx0 and tile.block_r >= R
    K, dtype = x.shape[1], factors[0].dtype
    da = torch.empty((R, K), dtype=dtype, device=x.device) if out is None else out
    assert da.shape == (R, K) and da.dtype == dtype and da.is_contiguous(), "out must be a contiguous [R, K] like a"
    dx0 = torch.empty(x.shape, dtype=x.dtype, device=x.device) if fused else None
    _launch(x, ds, da, factors if fused else (), dx0, mask, keep_scale(dropout_p), tile, chunk_rows)
    if want_dx0 and not fused:
        dx0 = expand(ds, [factor.t() for factor in factors], mask=mask, dropout_p=dropout_p)
    return da, dx0


def factor_grad(
    z: Tensor,
    t: Tensor,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """scale · tᵀ z [R, C] for z [M, C] of any strides and a thin t [M, R], in `dtype` (z's by default).

    Any rank; z is read once per block of ranks, in the main from L2. Sums in fp32, in an order that the shapes fix.
    """
    if tile is None:
        tile = choose_tile(z.shape[1], t.shape[1], z.dtype, False, False, arch_of(z))
    grad = torch.empty((t.shape[1], z.shape[1]), dtype=dtype or z.dtype, device=z.device)
    _launch(z, t.contiguous(), grad, (), None, None, scale, tile, chunk_rows)
    return grad


def _launch(
    x: Tensor,
    ds: Tensor,
    da: Tensor,
    a: Sequence[Tensor],
    dx0: Tensor | None,
    mask: Tensor | None,
    multiplier: float,
    tile: Tile,
    chunk_rows: int | None,
) -> None:
    """One launch that fills da and, given the factors for it, dx0."""
    (M, K), R = x.shape, da.shape[0]
    strips, rank_blocks = cdiv(K, tile.block_k), cdiv(R, tile.block_r)
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(M, strips * rank_blocks, tile.block_m, 2 * sm_count(x))
    chunks = cdiv(M, chunk_rows)
    da_parts = torch.empty((chunks, R, K), dtype=torch.float32, device=x.device) if chunks > 1 else None
    Launch(
        _x_factors_kernel,
        (strips, chunks, rank_blocks),
        dict(
            x_ptr=x, **row_arguments(a), mask_ptr=mask, ds_ptr=ds,
            dx0_ptr=dx0, da_parts_ptr=da_parts, da_ptr=da,
            counters_ptr=None if da_parts is None else zeroed_counters(x, strips * rank_blocks),
            M=M, K=K, R=R, chunk_rows=chunk_rows, chunks=chunks, keep_scale=float(multiplier),
            stride_xm=x.stride(0), stride_xk=x.stride(1),
            stride_ar=a[0].stride(0) if a else 0, stride_ak=a[0].stride(1) if a else 0,
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r,
        ),
        tile,
        reads=(x, ds, *a, mask, da_parts),
        writes=(da, dx0, da_parts),
        flops=2 * M * K * R * (1 if dx0 is None else 2),
    ).run()  # fmt: skip
