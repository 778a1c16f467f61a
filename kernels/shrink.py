"""s = drop(x) Aᵀ and v = scale · core(s) in one pass over x, with the dropout mask as packed bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import draw_bits, spread_bits
from .launch import Launch, Tile, arch_of, cdiv
from .tile import dot

__all__ = ["MAX_BLOCK_R", "choose_tile", "shrink"]

# A larger rank takes one more program per row block, and x is read again (from L2, in the main).
MAX_BLOCK_R = 128


@triton.jit
def _store_core(s, offs_m, offs_r, mask_m, core_ptr, v_ptr, R, RV, scale, IO: tl.constexpr, CORE: tl.constexpr,
                BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """Store v = scale · core(s); s fp32 [BLOCK_M, BLOCK_R], v [M, RV]."""
    mask_r = offs_r < R
    v_rows = v_ptr + offs_m[:, None] * RV
    mask_s = mask_m[:, None] & mask_r[None, :]
    if CORE == "gate":
        for e in range(RV // R):
            g = tl.load(core_ptr + offs_m * (RV // R) + e, mask=mask_m, other=0.0).to(tl.float32)
            tl.store(v_rows + (e * R + offs_r)[None, :], (s * (g * scale)[:, None]).to(IO), mask=mask_s)
    elif CORE == "dense":
        offs_v = tl.arange(0, BLOCK_V)
        mask_c = mask_r[:, None] & (offs_v < RV)[None, :]
        c = tl.load(core_ptr + offs_v[None, :] * R + offs_r[:, None], mask=mask_c, other=0.0).to(IO)
        v = dot(s.to(IO), c, tl.zeros((s.shape[0], BLOCK_V), tl.float32)) * scale
        tl.store(v_rows + offs_v[None, :], v.to(IO), mask=mask_m[:, None] & (offs_v < RV)[None, :])
    else:
        if CORE == "diag":
            s *= tl.load(core_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
        tl.store(v_rows + offs_r[None, :], (s * scale).to(IO), mask=mask_s)


@triton.jit(do_not_specialize=["M", "threshold"])
def _shrink_kernel(
    x_ptr, a_ptr, core_ptr, seed_ptr, t_ptr,
    s_ptr, v_ptr, mask_ptr, dcore_parts_ptr,
    M, K, R, RV,
    scale, keep_scale, threshold,
    stride_xm, stride_xk,
    stride_ar, stride_ak,
    CORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """s = keep ∘ x Aᵀ / (1 − p), v = scale · core(s); one program owns BLOCK_M rows and BLOCK_R ranks.

    With t [M, R], also the row block's share of Σ_t scale · s ∘ t (the gradient of a diagonal core, s being dy B).
    """
    pid_r = tl.program_id(0)
    pid_m = tl.program_id(1).to(tl.int64)
    IO: tl.constexpr = x_ptr.dtype.element_ty
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_r = offs_m < M, offs_r < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    a_ptrs = a_ptr + offs_r[None, :] * stride_ar + offs_k[:, None] * stride_ak
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        row_bytes = tl.cdiv(K, 8)
        offs_byte = tl.arange(0, BLOCK_K // 8)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        if seed_ptr is not None:
            bits = draw_bits(seed, offs_m, offs_byte + k // 8, K, threshold)
            if mask_ptr is not None:
                mask_bits = mask_m[:, None] & (offs_byte < row_bytes - k // 8)[None, :] & (pid_r == 0)
                bit_ptrs = mask_ptr + offs_m[:, None] * row_bytes + (offs_byte + k // 8)[None, :]
                tl.store(bit_ptrs, bits.to(tl.uint8), mask=mask_bits)
            x = tl.where(spread_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
        acc = dot(x, a.to(IO), acc)
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K * stride_ak
    if seed_ptr is not None:
        acc *= keep_scale
    mask_s = mask_m[:, None] & mask_r[None, :]
    if s_ptr is not None:
        tl.store(s_ptr + offs_m[:, None] * R + offs_r[None, :], acc.to(IO), mask=mask_s)
    if t_ptr is not None:
        t = tl.load(t_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_s, other=0.0).to(tl.float32)
        tl.store(dcore_parts_ptr + pid_m * R + offs_r, tl.sum(acc * t, axis=0) * scale, mask=mask_r)
    if v_ptr is not None:
        _store_core(acc, offs_m, offs_r, mask_m, core_ptr, v_ptr, R, RV, scale, IO, CORE, BLOCK_R, BLOCK_V)


def choose_tile(m: int, r: int, dtype: torch.dtype, dropout: bool, arch: int) -> Tile:
    """Block sizes for x [m, ·] and rank r."""
    block_r = min(max(16, triton.next_power_of_2(r)), MAX_BLOCK_R)
    return Tile(block_m=64, block_k=128, block_r=block_r)


def shrink(
    x: Tensor,
    a: Tensor,
    *,
    scale: float = 1.0,
    core: Tensor | None = None,
    core_kind: str = "none",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    keep_s: bool = True,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, v, mask) for x [M, K] and a [R, K]: s = drop(x) Aᵀ [M, R], v = scale · core(s), packed mask bits.

    `core` is d [R], C [Rv, R] or g [M, E] by `core_kind` (diag, dense, gate). s and v have x's dtype; s is empty
    without `keep_s`, mask without dropout. `seed` is an int64 [1] on x's device.
    """
    r, k = a.shape
    m = x.shape[0]
    tile = tile or choose_tile(m, r, x.dtype, dropout_p > 0, arch_of(x))
    rv = r if core is None or core_kind == "diag" else core.shape[0] if core_kind == "dense" else r * core.shape[1]
    # C needs all of s at once; beyond one tile of ranks it is a product on [M, R].
    fused = core_kind != "dense" or max(r, rv) <= tile.block_r
    mask = torch.empty(m, cdiv(k, 8), dtype=torch.uint8, device=x.device) if dropout_p else x.new_empty(0, dtype=torch.uint8)
    s = torch.empty(m, r, dtype=x.dtype, device=x.device) if keep_s or not fused else x.new_empty(0)
    v = torch.empty(m, rv, dtype=x.dtype, device=x.device) if fused else x.new_empty(0)
    core = None if core is None else core.contiguous()
    launch_shrink(x, a, core, core_kind, scale, dropout_p, seed, s if s.numel() else None, v if fused else None, mask if dropout_p else None, tile)
    if not fused:
        v = torch.mm(s, core.t().to(s.dtype)) * scale
    return s, v, mask


def launch_shrink(x, a, core, core_kind, scale, dropout_p, seed, s, v, mask, tile, t=None, dcore_parts=None) -> None:
    r, k = a.shape
    m = x.shape[0]
    rv = v.shape[1] if v is not None else r
    Launch(
        _shrink_kernel,
        (cdiv(r, tile.block_r), cdiv(m, tile.block_m)),
        dict(
            x_ptr=x, a_ptr=a, core_ptr=core, seed_ptr=seed if dropout_p else None, t_ptr=t, s_ptr=s, v_ptr=v, mask_ptr=mask, dcore_parts_ptr=dcore_parts,
            M=m, K=k, R=r, RV=rv, scale=scale, keep_scale=1.0 / (1.0 - dropout_p), threshold=min(round(dropout_p * 65536), 65535) - 32768,
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_ar=a.stride(0), stride_ak=a.stride(1),
            CORE=core_kind, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r, BLOCK_V=max(16, triton.next_power_of_2(rv)),
        ),
        tile,
    ).run()
