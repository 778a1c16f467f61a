"""A low-rank factor made from the frozen weight, h = act(A W), and the gradient of its A: skinny products over W."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dy_factors import rows_per_chunk
from .launch import Launch, Tile, arch_of, cdiv, shared_bytes, sm_count, zeroed_counters
from .shrink import block_of_rank
from .tile import cast, dot, is_last_to_arrive, sum_of_parts

__all__ = ["ACTIVATIONS", "choose_tile", "keeps_slope", "weight_factor", "weight_factor_grad"]

# What the kernel applies itself. The slope of relu is known from h, that of linear is 1; the others keep theirs.
ACTIVATIONS = ("gelu", "linear", "relu", "silu", "sin")


@triton.jit
def _sine(z, QUARTER_TURNS: tl.constexpr):
    """sin(z + QUARTER_TURNS · π/2) to 1.2e-7, for |z| up to 3e4.

    Triton's own serves arguments of any size with a table in local memory, which every program would then carry. Beyond
    3e4, where products of the parts of π begin to be rounded, fp32 holds z itself to 1e-3 at best.
    """
    shift = 0.5 * QUARTER_TURNS
    half_turns = tl.floor(z * 0.3183098861837907 + (shift + 0.5))
    n = half_turns - shift
    # π in three parts: products of the first two with n are exact.
    r = ((z - n * 3.140625) - n * 0.0009670257568359375) - n * 6.278329465203569e-07
    u = r * r
    # Odd polynomial of least relative error on |r| ≤ π/2.
    p = -0.00019809474179055542 + u * 2.605481540740584e-06
    p = -0.16666659712791443 + u * (0.008333064615726471 + u * p)
    odd = half_turns - 2.0 * tl.floor(0.5 * half_turns)
    return (1.0 - 2.0 * odd) * (r + r * u * p)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """act(z) in fp32."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)  # a NaN stays one
    elif ACTIVATION == "sin":
        z = _sine(z, 0)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    """act'(z) in fp32, of those activations that keep it."""
    if ACTIVATION == "sin":
        z = _sine(z, 1)
    elif ACTIVATION == "gelu":
        bell = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        z = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * bell
    elif ACTIVATION == "silu":
        gate = tl.sigmoid(z)
        z = gate * (1.0 + z * (1.0 - gate))
    return z


@triton.jit
def _product(
    w_ptr, f_ptr, kept_ptr,
    first_r, first_k, first_row, last_row, N, K, R, stride_wn, stride_wk,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """f W over some rows of W, f times the slope if that was kept; fp32 [BLOCK_R, BLOCK_K]."""
    IO: tl.constexpr = w_ptr.dtype.element_ty
    offs_n, offs_k, offs_r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K - first_k, offs_r < R - first_r
    # 64-bit arithmetic on one base per block, 32 bits inside the block: that is what fits into registers.
    w_ptr += first_row * stride_wn + first_k * stride_wk
    f_base = first_r * N + first_row
    offs_w = offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
    offs_f = offs_r[:, None] * N + offs_n[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for row in range(first_row, last_row, BLOCK_N):
        mask_n = offs_n < last_row - row
        mask_f = mask_r[:, None] & mask_n[None, :]
        f = tl.load(f_ptr + f_base + offs_f, mask=mask_f, other=0.0)  # [BLOCK_R, BLOCK_N]
        if kept_ptr is not None:
            kept = tl.load(kept_ptr + f_base + offs_f, mask=mask_f, other=0.0).to(tl.float32)
            f = tl.where(kept > 0.0, f.to(tl.float32), 0.0) if ACTIVATION == "relu" else f.to(tl.float32) * kept
        w = tl.load(w_ptr + offs_w, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = dot(cast(f, IO), w, acc)
        w_ptr += BLOCK_N * stride_wn
        f_base += BLOCK_N
    return acc


@triton.jit
def _store(z, h_ptr, slope_ptr, offs, mask, ACTIVATION: tl.constexpr):
    """h = act(z), and act'(z) where it is kept."""
    tl.store(h_ptr + offs, cast(_activate(z, ACTIVATION), h_ptr.dtype.element_ty), mask=mask)
    if slope_ptr is not None:
        tl.store(slope_ptr + offs, cast(_slope(z, ACTIVATION), slope_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(
    parts_ptr, h_ptr, slope_ptr, first_r, offs_k, chunks, K, R, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr
):
    """The same for z = Σ_c parts[c], 16 ranks at a time."""
    for r in range(0, BLOCK_R, 16):
        offs_r = first_r + r + tl.arange(0, 16)
        offs = offs_r[:, None] * K + offs_k[None, :]
        mask = (offs_r < R)[:, None] & (offs_k < K)[None, :]
        z = sum_of_parts(parts_ptr + offs, mask, chunks, tl.cast(R, tl.int64) * K)
        _store(z, h_ptr, slope_ptr, offs, mask, ACTIVATION)


@triton.jit(do_not_specialize=["chunk_blocks", "chunks"])
def _weight_factor_kernel(
    w_ptr, f_ptr, kept_ptr,
    parts_ptr, counters_ptr, h_ptr, slope_ptr,
    N, K, R, chunk_blocks, chunks,
    stride_wn, stride_wk,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h = act(f W) [R, K] and its slope, for f [R, N] and W [N, K]; given what such a launch kept, h = (f ∘ slope) W.

    A program owns a strip of W's columns, a block of ranks and a chunk of rows. It stores its part of the product; the
    last one to arrive at a strip sums the parts in the order of the chunks and applies act once.
    """
    strip, chunk, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    FINISH: tl.constexpr = ACTIVATION if kept_ptr is None else "linear"
    first_k, first_r = strip.to(tl.int64) * BLOCK_K, pid_r.to(tl.int64) * BLOCK_R
    # A multiple of BLOCK_N that the compiler knows of: rows of f and columns of W are then read in vectors.
    chunk_rows = chunk_blocks * BLOCK_N
    first_row = chunk.to(tl.int64) * chunk_rows
    acc = _product(
        w_ptr, f_ptr, kept_ptr, first_r, first_k, first_row, tl.minimum(first_row + chunk_rows, N), N, K, R,
        stride_wn, stride_wk, ACTIVATION, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    offs_k, offs_r = first_k + tl.arange(0, BLOCK_K), first_r + tl.arange(0, BLOCK_R)
    offs = offs_r[:, None] * K + offs_k[None, :]
    mask = (offs_r < R)[:, None] & (offs_k < K)[None, :]
    if parts_ptr is None:
        _store(acc, h_ptr, slope_ptr, offs, mask, FINISH)
    else:
        tl.store(parts_ptr + chunk.to(tl.int64) * R * K + offs, acc, mask=mask)
        if is_last_to_arrive(counters_ptr + pid_r * tl.num_programs(0) + strip, chunks):
            _store_sums(parts_ptr, h_ptr, slope_ptr, first_r, offs_k, chunks, K, R, FINISH, BLOCK_R)


def keeps_slope(activation: str) -> bool:
    """Whether backward needs act'(z): not for linear, nor for relu, where h says it."""
    return activation not in ("linear", "relu")


def choose_tile(N: int, K: int, R: int, dtype: torch.dtype, arch: int) -> Tile:
    """Blocks of W wide enough that the factor, which every strip reads, costs little beside them."""
    block_r = block_of_rank(R, dtype)
    if dtype == torch.float32:
        return Tile(block_n=16, block_k=64, block_r=block_r, num_warps=4, num_stages=3, max_registers=255)
    # Rows that are not aligned are read element by element, and each of these takes a register; so does each element of
    # the sum, unless wgmma or tensor memory makes it.
    aligned = N % 16 == 0 and K % 16 == 0
    block_n, block_k = 32, 128 if aligned and (block_r < 128 or arch in (90, 100)) else 64
    # Room for W, and for f and its slope in fp32; twice on a multiprocessor where the accumulator leaves it.
    stage, programs = block_n * (2 * block_k + 8 * block_r), 1 if block_r == 128 else 2
    return Tile(
        block_n=block_n,
        block_k=block_k,
        block_r=block_r,
        num_warps=8 if block_r == 128 or (block_r == 64 and not aligned) else 4,
        num_stages=max(2, min(6, shared_bytes(arch) // programs // stage)),
        max_registers=255,
    )


def weight_factor(
    a: Tensor,
    w: Tensor,
    *,
    activation: str = "relu",
    tile: Tile | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(h, slope) in a's dtype: h = act(A W) [R, K], and act'(A W) for activations that keep it, else empty.

    a [R, N] in W's dtype or fp32, contiguous, is rounded to W's dtype; w [N, K] may have any strides. `activation` is
    one of `ACTIVATIONS`. Reads W once per block of ranks, 2NKR FLOP. Sums in fp32, in an order that the shapes fix.
    """
    h = torch.empty((a.shape[0], w.shape[1]), dtype=a.dtype, device=w.device)
    slope = torch.empty(h.shape if keeps_slope(activation) else (0,), dtype=a.dtype, device=w.device)
    _launch(a, None, w, h, slope if keeps_slope(activation) else None, activation, tile, chunk_rows)
    return h, slope


def weight_factor_grad(
    dh: Tensor,
    kept: Tensor,
    w: Tensor,
    *,
    activation: str = "relu",
    tile: Tile | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """da = (dh ∘ act'(A W)) Wᵀ [R, N] in dh's dtype; kept is the slope of `weight_factor`, or its h for relu.

    dh and kept [R, K] contiguous, w [N, K] of any strides. Cost and order of sums as there.
    """
    da = torch.empty((dh.shape[0], w.shape[0]), dtype=dh.dtype, device=w.device)
    how = "slope" if keeps_slope(activation) else activation
    _launch(dh, None if activation == "linear" else kept, w.t(), da, None, how, tile, chunk_rows)
    return da


def _launch(
    f: Tensor,
    kept: Tensor | None,
    w: Tensor,
    h: Tensor,
    slope: Tensor | None,
    how: str,
    tile: Tile | None,
    chunk_rows: int | None,
) -> None:
    """One launch that fills h, and slope if it is there. `how` is an activation, or "slope" for kept slopes."""
    assert how in (*ACTIVATIONS, "slope"), f"no kernel for the activation {how!r}"
    (R, N), K = f.shape, w.shape[1]
    if tile is None:
        tile = choose_tile(N, K, R, w.dtype, arch_of(w))
    strips, rank_blocks = cdiv(K, tile.block_k), cdiv(R, tile.block_r)
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(N, strips * rank_blocks, tile.block_n, 2 * sm_count(w))
    assert chunk_rows % tile.block_n == 0, f"{chunk_rows} rows are no multiple of the tile's {tile.block_n}"
    chunks = cdiv(N, chunk_rows)
    parts = torch.empty((chunks, R, K), dtype=torch.float32, device=w.device) if chunks > 1 else None
    Launch(
        _weight_factor_kernel,
        (strips, chunks, rank_blocks),
        dict(
            w_ptr=w, f_ptr=f, kept_ptr=kept,
            parts_ptr=parts, counters_ptr=None if parts is None else zeroed_counters(w, strips * rank_blocks),
            h_ptr=h, slope_ptr=slope,
            N=N, K=K, R=R, chunk_blocks=chunk_rows // tile.block_n, chunks=chunks,
            stride_wn=w.stride(0), stride_wk=w.stride(1), ACTIVATION=how,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r,
        ),
        tile,
        reads=(f, kept, w, parts),
        writes=(h, slope, parts),
        flops=2 * N * K * R,
    ).run()  # fmt: skip
