"""y0 = v Bᵀ + bias, the low-rank term on its own: what a library GEMM then adds into."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_scale, spread_bits
from .factor_rows import as_rows, row_arguments, row_pointers
from .launch import Launch, Tile, cdiv
from .tile import cast, dot

__all__ = ["choose_tile", "expand"]


@triton.jit(do_not_specialize=["M", "r2", "r3"])
def _expand_kernel(
    v_ptr, b_ptr, b2_ptr, b3_ptr, bias_ptr, mask_ptr, y_ptr,
    M, N, R, r2, r3,
    keep_scale,
    stride_vm, stride_vr,
    stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y [M, N] = v Bᵀ + bias; with a packed mask, keep ∘ (v Bᵀ) / (1 − p). One program writes one block of y.

    B may come in up to three pieces of its columns, see `row_pointers`.
    """
    pid_n, pid_m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
        mask_r = offs_r < R - r
        v_ptrs = v_ptr + offs_m[:, None] * stride_vm + (r + offs_r)[None, :] * stride_vr
        if b2_ptr is None:
            b_ptrs = b_ptr + offs_n[None, :] * stride_bn + (r + offs_r)[:, None] * stride_br
        else:
            ranks = row_pointers(b_ptr, b2_ptr, b3_ptr, r2, r3, (r + offs_r)[:, None], stride_br)
            b_ptrs = ranks + offs_n[None, :] * stride_bn
        v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = dot(v, cast(b, v.dtype), acc)
    if mask_ptr is not None:
        row_bytes = tl.cdiv(N, 8)
        offs_byte = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        bit_ptrs = mask_ptr + offs_m[:, None] * row_bytes + offs_byte[None, :]
        bits = tl.load(bit_ptrs, mask=mask_m[:, None] & (offs_byte < row_bytes)[None, :], other=0)
        acc = tl.where(spread_bits(bits, BLOCK_M, BLOCK_N), acc * keep_scale, 0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@lru_cache(1024)
def choose_tile(R: int, dtype: torch.dtype, pieces: int = 1) -> Tile:
    """Blocks of y whose stores hide the reads of v and B, which come from L2; a B in pieces takes more registers."""
    block_r = min(max(16, triton.next_power_of_2(R)), 64 if pieces == 1 else 32)
    if dtype == torch.float32:
        return Tile(block_m=32, block_n=64, block_r=min(block_r, 32), num_warps=4, num_stages=2)
    return Tile(block_m=64, block_n=128, block_r=block_r, num_warps=4, num_stages=3)


def expand(
    v: Tensor,
    b: Tensor | Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """y0 = v Bᵀ + bias [M, N]; given packed mask bits [M, ⌈N / 8⌉], keep ∘ (v Bᵀ) / (1 − p) + bias.

    v [M, R] and b [N, R] may have any strides and b any dtype: it is cast to v's. Several b's, [N, Rᵢ] of one dtype,
    are read as the columns of one. Products are summed in fp32 and
    rounded once, to `dtype` (v's by default). Writes y0 once; dx0 of an adapter is expand(ds, a.t(), mask=mask, …).
    """
    factors = as_rows(b.t() if isinstance(b, Tensor) else [piece.t() for piece in b])
    (M, R), N = v.shape, factors[0].shape[1]
    if tile is None:
        tile = choose_tile(R, v.dtype, len(factors))
    y = torch.empty((M, N), dtype=dtype or v.dtype, device=v.device)
    if y.numel():
        Launch(
            _expand_kernel,
            (cdiv(N, tile.block_n), cdiv(M, tile.block_m)),
            dict(
                v_ptr=v, **row_arguments(factors, "b"), bias_ptr=bias, mask_ptr=mask, y_ptr=y,
                M=M, N=N, R=R, keep_scale=keep_scale(dropout_p),
                stride_vm=v.stride(0), stride_vr=v.stride(1),
                stride_bn=factors[0].stride(1), stride_br=factors[0].stride(0),
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=tile.block_r,
            ),
            tile,
            reads=(v, *factors, bias, mask),
            writes=(y,),
            flops=2 * M * N * R,
        ).run()  # fmt: skip
    return y
