"""y = x Wᵀ + scale · core(drop(x) Aᵀ) Bᵀ + bias in one launch: s grows beside y in the main loop.

Every tile of y makes its own rows of s, so the work on s is repeated for each block of columns: this pays where these
are few, or where a launch costs more than the work.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import draw_bits, keep_scale, lane_threshold, spread_bits
from .gemm import Access, access_of, blocks_of, descriptor, fastest
from .launch import Launch, Tile, arch_of, cdiv, sm_count
from .measured import Tuned, tuned_tile
from .tile import cast, dot, grouped_order

__all__ = ["TILES", "choose_tile", "max_rank", "single_forward", "tiles"]

# Tiles whose block_r is the largest that compiles without spills, with and without dropout, each with the share of the
# first one's rate it may reach: priors, not measurements.
TILES: dict[Access, list[tuple[Tile, float]]] = {
    "descriptors": [
        (Tile(128, 256, 64, 16, num_warps=8, num_stages=3, use_tma=True), 1.0),
        (Tile(128, 128, 64, 64, num_warps=8, num_stages=4, use_tma=True), 0.9),
        (Tile(64, 128, 64, 64, num_warps=4, num_stages=4, use_tma=True), 0.7),
        (Tile(64, 64, 64, 64, num_warps=4, num_stages=4, use_tma=True), 0.5),
    ],
    "vectors": [
        (Tile(128, 128, 32, 64, num_warps=8, num_stages=4), 1.0),
        (Tile(64, 128, 32, 16, num_warps=4, num_stages=4), 0.85),
        (Tile(64, 64, 64, 16, num_warps=4, num_stages=4), 0.65),
        (Tile(32, 64, 64, 64, num_warps=4, num_stages=4), 0.35),
        (Tile(16, 64, 64, 64, num_warps=4, num_stages=4), 0.2),
    ],
    "elements": [
        (Tile(64, 64, 32, 16, num_warps=4, num_stages=3), 1.0),
        (Tile(32, 64, 32, 64, num_warps=8, num_stages=3), 0.6),
        (Tile(16, 64, 32, 64, num_warps=4, num_stages=3), 0.35),
    ],
}
_FP32_TILES = [
    (Tile(64, 64, 16, 16, num_warps=8, num_stages=3), 1.0),
    (Tile(16, 64, 16, 16, num_warps=4, num_stages=3), 0.35),
]


@triton.jit
def _kept(
    x, seed, seed_ptr, bits_ptr, mask_ptr, rows, k, writes, M, K, threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of x from column k on, zero where dropout drops it; stores the bits that it draws if it `writes`."""
    if seed_ptr is not None or bits_ptr is not None:
        row_bytes = tl.cdiv(K, 8)
        offs_byte = k // 8 + tl.arange(0, BLOCK_K // 8)
        inside = (rows < M)[:, None] & (offs_byte < row_bytes)[None, :]
        offs = rows[:, None] * row_bytes + offs_byte[None, :]
        if seed_ptr is not None:
            bits = draw_bits(seed, rows, offs_byte, row_bytes, threshold)
            if mask_ptr is not None:
                stored = tl.where(writes, inside, False)
                tl.store(mask_ptr + offs, bits.to(tl.uint8), mask=stored)
        else:
            bits = tl.load(bits_ptr + offs, mask=inside, other=0)
        x = tl.where(spread_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
    return x


@triton.jit
def _finish(
    acc, s, b_ptr, core_ptr, bias_ptr, s_ptr, rows, cols, writes, M, N, R, scale,
    IO: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + scale · (s ∘ d) Bᵀ + bias for complete s; stores s if it `writes`."""
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = rows < M, cols < N, offs_r < R
    if s_ptr is not None:
        mask_s = mask_m[:, None] & (offs_r < tl.where(writes, R, 0))[None, :]
        tl.store(s_ptr + rows[:, None] * R + offs_r[None, :], cast(s, IO), mask=mask_s)
    if core_ptr is not None:
        s *= tl.load(core_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    b_ptrs = b_ptr + offs_r[:, None] + cols[None, :] * R
    b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
    acc = dot(cast(s * scale, IO), cast(b, IO), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def _single_forward_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, core_ptr, bias_ptr, seed_ptr, bits_ptr,
    y_ptr, s_ptr, mask_ptr,
    M, N, K, R,
    scale, keep_scale, threshold,
    stride_xm, stride_xk,
    stride_wn, stride_wk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of y [M, N]; those of the first columns also store s [M, R] and the mask that they drew."""
    IO: tl.constexpr = x_ptr.dtype.element_ty
    pid_m, pid_n = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + cols[None, :] * stride_wn
    a_ptrs = a_ptr + offs_r[None, :] * K + offs_k[:, None]
    mask_m, mask_n, mask_r = rows[:, None] < M, cols[None, :] < N, offs_r[None, :] < R
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc, s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=mask_m & (offs_k[None, :] < K - k), other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs, mask=mask_n & (offs_k[:, None] < K - k), other=0.0)  # [BLOCK_K, BLOCK_N]
        a = tl.load(a_ptrs, mask=mask_r & (offs_k[:, None] < K - k), other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = dot(x, w, acc)
        x = _kept(x, seed, seed_ptr, bits_ptr, mask_ptr, rows, k, pid_n == 0, M, K, threshold, BLOCK_M, BLOCK_K)
        s = dot(x, cast(a, IO), s)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
        a_ptrs += BLOCK_K
    s *= keep_scale
    acc = _finish(acc, s, b_ptr, core_ptr, bias_ptr, s_ptr, rows, cols, pid_n == 0, M, N, R, scale, IO, BLOCK_R)
    y_ptrs = y_ptr + rows[:, None] * N + cols[None, :]
    tl.store(y_ptrs, cast(acc, IO), mask=mask_m & mask_n)


@triton.jit(do_not_specialize=["M", "threshold"])
def _single_forward_tma_kernel(
    x_desc, w_desc, a_ptr, b_ptr, core_ptr, bias_ptr, seed_ptr, bits_ptr,
    y_desc, s_ptr, mask_ptr,
    M, N, K, R,
    scale, keep_scale, threshold,
    W_ALONG_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same through descriptors of x, W and y, with as many programs as SMs taking tiles in turn."""
    IO: tl.constexpr = x_desc.dtype
    num_pid_m, num_pid_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_r = offs_r[None, :] < R
    seed = 0
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for tile in range(tl.program_id(0), num_pid_m * num_pid_n, tl.num_programs(0)):
        pid_m, pid_n = grouped_order(tile, num_pid_m, num_pid_n)
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        cols = col.to(tl.int64) + tl.arange(0, BLOCK_N)
        acc, s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([row, k])
            w = w_desc.load([col, k]).T if W_ALONG_K else w_desc.load([k, col])
            a_ptrs = a_ptr + k + offs_r[None, :] * K + offs_k[:, None]
            a = tl.load(a_ptrs, mask=mask_r & (offs_k[:, None] < K - k), other=0.0)  # [BLOCK_K, BLOCK_R]
            acc = dot(x, w, acc)
            x = _kept(x, seed, seed_ptr, bits_ptr, mask_ptr, rows, k, pid_n == 0, M, K, threshold, BLOCK_M, BLOCK_K)
            s = dot(x, cast(a, IO), s)
        s *= keep_scale
        acc = _finish(acc, s, b_ptr, core_ptr, bias_ptr, s_ptr, rows, cols, pid_n == 0, M, N, R, scale, IO, BLOCK_R)
        y_desc.store([row, col], cast(acc, IO))


def max_rank(dtype: torch.dtype, adapter: torch.dtype) -> int:
    """Largest rank whose s fits beside a tile of y; factors wider than x take registers on their way."""
    if dtype == torch.float32:
        return 16
    return 32 if adapter == torch.float32 else 64


@lru_cache(1024)
def choose_tile(M: int, N: int, R: int, dtype: torch.dtype, access: Access, arch: int, sms: int) -> Tile:
    """Block sizes for y [M, N]: tiles as for `lowrank_forward`, fewer and smaller where s needs room beside them."""
    return fastest(_fitting(R, dtype, access, arch), M, N, sms)


@lru_cache(256)
def _fitting(R: int, dtype: torch.dtype, access: Access, arch: int) -> list[tuple[Tile, float]]:
    """The tiles that have room for s, with their shares of the full rate."""
    block_r = max(16, triton.next_power_of_2(R))
    found = TILES[access]
    if dtype == torch.float32:
        found = _FP32_TILES[access == "elements" :]  # the large one has no registers for single elements
    fitting = [(tile, share) for tile, share in found if block_r <= tile.block_r]
    if access == "descriptors" and arch != 90:
        # Two accumulators of this tile do not fit into the tensor memory of sm_100.
        fitting = [(tile, share) for tile, share in fitting if tile.block_n < 256]
    # Left to decide, the assembler spills a few bytes in order to fit one more program.
    return [(replace(tile, block_r=block_r, max_registers=255), share) for tile, share in fitting]


def tiles(R: int, dtype: torch.dtype, access: Access, arch: int) -> list[Tuned]:
    """All that `choose_tile` may return for such operands."""
    return [Tuned(tile) for tile, _ in _fitting(R, dtype, access, arch)]


def single_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    core: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bits: Tensor | None = None,
    keep_s: bool = True,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, mask): y = x Wᵀ + scale · (s ∘ d) Bᵀ + bias [M, N], s = drop(x) Aᵀ [M, R], the packed mask [M, ⌈K / 8⌉].

    x [M, K] and w [N, K] share a dtype and may have any strides; a [R, K], b [N, R], `core` d [R] and bias [N] may be
    fp32 beside them; R ≤ `max_rank`. seed, bits, keep_s and what comes back empty are as in `shrink`. Reads every
    operand once and writes every result once; 2MK(N + R) + 2MNR FLOP, those on s once for each block of columns.
    """
    (M, K), N, R = x.shape, w.shape[0], a.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    s = torch.empty((M, R), dtype=x.dtype, device=x.device) if keep_s else x.new_empty(0)
    mask = x.new_empty(0, dtype=torch.uint8)
    if dropout_p:
        mask = torch.empty((M, cdiv(K, 8)), dtype=torch.uint8, device=x.device) if bits is None else bits
    if M == 0:
        return y, s, mask
    drawn = mask if dropout_p and bits is None else None
    if tile is None:
        access = access_of(x, w, y, arch=arch_of(x))
        variant = f"{access}, masked" if dropout_p else access
        among = partial(tiles, R, x.dtype, access, arch_of(x))
        tuned = tuned_tile("single_forward", x, arch_of(x), (N, K, R), variant, among)
        tile = tuned.tile if tuned else choose_tile(M, N, R, x.dtype, access, arch_of(x), sm_count(x))
    assert tile.block_r >= R, f"one launch holds all ranks: {R} exceed the tile's {tile.block_r}"
    a, b = a.contiguous(), b.contiguous()
    args: dict[str, Any] = {
        "a_ptr": a,
        "b_ptr": b,
        "core_ptr": None if core is None else core.contiguous(),
        **blocks_of(tile),
    }
    args |= {"bias_ptr": None if bias is None else bias.contiguous(), "bits_ptr": bits if dropout_p else None}
    args |= {"seed_ptr": None if drawn is None else seed, "s_ptr": s if keep_s else None, "mask_ptr": drawn}
    args |= {"M": M, "N": N, "K": K, "R": R, "scale": float(scale), "keep_scale": keep_scale(dropout_p)}
    args["threshold"] = lane_threshold(dropout_p)
    programs = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    if tile.use_tma:
        kernel, grid = _single_forward_tma_kernel, min(programs, sm_count(x))
        args["x_desc"] = descriptor(x, tile.block_m, tile.block_k)
        args["w_desc"] = descriptor(w, tile.block_n, tile.block_k)
        args["y_desc"] = descriptor(y, tile.block_m, tile.block_n)
        args["W_ALONG_K"] = w.stride(1) == 1
    else:
        kernel, grid = _single_forward_kernel, programs
        args |= {"x_ptr": x, "stride_xm": x.stride(0), "stride_xk": x.stride(1)}
        args |= {"w_ptr": w, "stride_wn": w.stride(0), "stride_wk": w.stride(1), "y_ptr": y}
    reads, writes = (x, w, a, b, core, bias, args["bits_ptr"]), (y, args["s_ptr"], drawn)
    Launch(kernel, (grid,), args, tile, reads, writes, 2 * M * K * (N + R) + 2 * M * N * R).run()
    return y, s, mask
