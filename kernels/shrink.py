"""s = drop(x) Aᵀ and v = scale · core(s) in one pass over x, with the dropout mask as packed bits."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import draw_bits, keep_scale, lane_threshold, spread_bits
from .launch import Launch, Tile, arch_of, cdiv, shared_bytes, sm_count
from .tile import cast, dot

__all__ = ["block_of_rank", "choose_tile", "launch_shrink", "shrink"]


@triton.jit
def _store_core(
    s, core_ptr, v_ptr, offs_m, offs_r, mask_m, R, RV, scale, stride_vm,
    CORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store v = scale · core(s); s fp32 [BLOCK_M, BLOCK_R], v [M, RV]."""
    IO: tl.constexpr = v_ptr.dtype.element_ty
    mask_r = offs_r < R
    v_rows = v_ptr + offs_m[:, None] * stride_vm
    mask_s = mask_m[:, None] & mask_r[None, :]
    if CORE == "gate":
        for e in range(RV // R):
            g = tl.load(core_ptr + offs_m * (RV // R) + e, mask=mask_m, other=0.0).to(tl.float32)
            tl.store(v_rows + (e * R + offs_r)[None, :], cast(s * (g * scale)[:, None], IO), mask=mask_s)
    elif CORE == "dense":
        offs_v = tl.arange(0, BLOCK_V)
        mask_c = mask_r[:, None] & (offs_v < RV)[None, :]
        c = tl.load(core_ptr + offs_v[None, :] * R + offs_r[:, None], mask=mask_c, other=0.0)
        v = dot(cast(s, IO), cast(c, IO), tl.zeros((BLOCK_M, BLOCK_V), tl.float32)) * scale
        tl.store(v_rows + offs_v[None, :], cast(v, IO), mask=mask_m[:, None] & (offs_v < RV)[None, :])
    else:
        if CORE == "diag":
            s *= tl.load(core_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
        tl.store(v_rows + offs_r[None, :], cast(s * scale, IO), mask=mask_s)


@triton.jit(do_not_specialize=["M", "threshold"])
def _shrink_kernel(
    x_ptr, a_ptr, core_ptr, seed_ptr, bits_ptr, t_ptr,
    s_ptr, v_ptr, mask_ptr, dcore_parts_ptr,
    M, K, R, RV,
    scale, keep_scale, threshold,
    stride_xm, stride_xk,
    stride_ar, stride_ak,
    stride_vm, stride_tm,
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
    row_bytes = tl.cdiv(K, 8)
    offs_byte = tl.arange(0, BLOCK_K // 8)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        if seed_ptr is not None:
            bits = draw_bits(seed, offs_m, offs_byte + k // 8, row_bytes, threshold)
            if mask_ptr is not None:
                mask_bits = mask_m[:, None] & (offs_byte < row_bytes - k // 8)[None, :] & (pid_r == 0)
                bit_ptrs = mask_ptr + offs_m[:, None] * row_bytes + (offs_byte + k // 8)[None, :]
                tl.store(bit_ptrs, bits.to(tl.uint8), mask=mask_bits)
            x = tl.where(spread_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
        elif bits_ptr is not None:
            mask_bits = mask_m[:, None] & (offs_byte < row_bytes - k // 8)[None, :]
            bit_ptrs = bits_ptr + offs_m[:, None] * row_bytes + (offs_byte + k // 8)[None, :]
            bits = tl.load(bit_ptrs, mask=mask_bits, other=0)
            x = tl.where(spread_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
        acc = dot(x, cast(a, IO), acc)
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K * stride_ak
    if seed_ptr is not None or bits_ptr is not None:
        acc *= keep_scale
    mask_s = mask_m[:, None] & mask_r[None, :]
    if s_ptr is not None:
        tl.store(s_ptr + offs_m[:, None] * R + offs_r[None, :], cast(acc, IO), mask=mask_s)
    if t_ptr is not None:
        t = tl.load(t_ptr + offs_m[:, None] * stride_tm + offs_r[None, :], mask=mask_s, other=0.0).to(tl.float32)
        tl.store(dcore_parts_ptr + pid_m * R + offs_r, tl.sum(acc * t, axis=0) * scale, mask=mask_r)
    if v_ptr is not None:
        _store_core(acc, core_ptr, v_ptr, offs_m, offs_r, mask_m, R, RV, scale, stride_vm, CORE, BLOCK_M, BLOCK_V)


def block_of_rank(R: int, dtype: torch.dtype) -> int:
    """Ranks that one program serves: all of them up to 128 (64 in fp32, whose products are not on tensor cores)."""
    return min(max(16, triton.next_power_of_2(R)), 64 if dtype == torch.float32 else 128)


def choose_tile(M: int, R: int, dtype: torch.dtype, arch: int, sms: int, factor_bytes: int = 4) -> Tile:
    """Blocks for x [M, ·] and rank R, the elements of A being of `factor_bytes`.

    As many rows as still occupy every multiprocessor, and 32 KiB of x under way where shared memory allows it.
    """
    block_r = block_of_rank(R, dtype)
    if dtype == torch.float32:
        return Tile(block_m=32 if block_r <= 32 else 16, block_k=32, block_r=block_r, num_warps=4, num_stages=3)
    # sm_100 has 64-row products only in tensor memory, and the way there costs more than mma.sync on 32 rows
    # unless all 128 ranks share it. Elsewhere 64 rows of 128 ranks are too many registers, but for wgmma.
    in_tensor_memory = 100 <= arch < 120 and block_r == 128
    tallest = 32 if 100 <= arch < 120 or (block_r == 128 and arch != 90) else 64
    fitting = (rows for rows in (64, 32) if rows <= tallest and cdiv(M, rows) * cdiv(R, block_r) >= 0.9 * sms)
    block_m = 64 if in_tensor_memory else next(fitting, 16)
    block_k = 128 if block_r <= 32 or in_tensor_memory or (block_r == 64 and block_m == 16) else 64
    if block_r == 128 and shared_bytes(arch) < 128 * 1024:
        block_k = 32
    stage = block_k * (2 * block_m + factor_bytes * block_r)
    wanted = 1 + cdiv(32 * 1024, 2 * block_m * block_k)
    # Beside the stages there is one more tile of x: where dropout is applied to it.
    affordable = (shared_bytes(arch) - 2 * block_m * block_k) // stage
    stages = min(wanted, affordable, 6)
    return Tile(
        block_m=block_m,
        block_k=block_k,
        block_r=block_r,
        num_warps=8 if in_tensor_memory else 4,
        num_stages=stages,
    )


def shrink(
    x: Tensor,
    a: Tensor,
    *,
    scale: float = 1.0,
    core: Tensor | None = None,
    core_kind: str = "none",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bits: Tensor | None = None,
    keep_s: bool = True,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, v, mask): s = drop(x) Aᵀ [M, R], v = scale · core(s) [M, Rv] and the packed mask uint8 [M, ⌈K / 8⌉].

    x [M, K] and a [R, K] may have any strides, a may be fp32 beside 16-bit x. `core` is d [R], C [Rv, R] or g [M, E]
    as `core_kind` says (diag, dense, gate). `seed` is an int64 [1] on x's device; given the packed `bits` of a mask,
    nothing is drawn and these come back. s and v have x's dtype, each rounded once; s is empty without `keep_s`, mask
    without dropout. Reads x and a once, 2MKR FLOP.
    """
    (M, K), R = x.shape, a.shape[0]
    if tile is None:
        tile = choose_tile(M, R, x.dtype, arch_of(x), sm_count(x), a.element_size())
        if dropout_p and K % 16 and x.element_size() == 2:
            # Rows that are not aligned are read element by element, and each of these takes a register.
            tile = replace(tile, block_m=min(tile.block_m, 32), block_k=min(tile.block_k, 64))
    RV = R
    if core is not None:
        RV = {"diag": R, "dense": core.shape[0], "gate": R * core.shape[-1]}[core_kind]
    # C meets all ranks of s at once. Beyond one block of them it is a product of its own, on [M, R].
    fused = core_kind != "dense" or max(R, RV) <= tile.block_r
    s = torch.empty((M, R), dtype=x.dtype, device=x.device) if keep_s or not fused else x.new_empty(0)
    v = torch.empty((M, RV), dtype=x.dtype, device=x.device) if fused else None
    mask = x.new_empty(0, dtype=torch.uint8)
    if dropout_p:
        mask = torch.empty((M, cdiv(K, 8)), dtype=torch.uint8, device=x.device) if bits is None else bits
    if M:
        launch_shrink(
            x, a, s if keep_s or not fused else None, v, scale=scale, core=core, core_kind=core_kind,
            dropout_p=dropout_p, seed=seed, bits=bits, mask=mask, tile=tile,
        )  # fmt: skip
    if v is None:
        assert core is not None
        v = torch.mm(s, core.t().to(s.dtype)).mul_(scale)
    return s, v, mask


def launch_shrink(
    x: Tensor,
    a: Tensor,
    s: Tensor | None,
    v: Tensor | None,
    *,
    scale: float,
    core: Tensor | None,
    core_kind: str,
    tile: Tile,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bits: Tensor | None = None,
    mask: Tensor | None = None,
    t: Tensor | None = None,
    dcore_parts: Tensor | None = None,
) -> None:
    """One launch that fills those of s, v, mask and (given t [M, R]) dcore_parts [row blocks, R] that are there.

    v and t may be some columns of wider matrices.
    """
    (M, K), R = x.shape, a.shape[0]
    RV = R if v is None else v.shape[1]
    block_v = max(16, triton.next_power_of_2(RV)) if core_kind == "dense" else 16
    drawn = mask if dropout_p and bits is None else None
    outputs = [out for out in (s, v, drawn, dcore_parts) if out is not None]
    Launch(
        _shrink_kernel,
        (cdiv(R, tile.block_r), cdiv(M, tile.block_m)),
        dict(
            x_ptr=x, a_ptr=a, core_ptr=None if core is None else core.contiguous(),
            seed_ptr=seed if drawn is not None else None, bits_ptr=bits, t_ptr=t,
            s_ptr=s, v_ptr=v, mask_ptr=drawn, dcore_parts_ptr=dcore_parts,
            M=M, K=K, R=R, RV=RV,
            scale=float(scale), keep_scale=keep_scale(dropout_p), threshold=lane_threshold(dropout_p),
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_ar=a.stride(0), stride_ak=a.stride(1),
            stride_vm=0 if v is None else v.stride(0), stride_tm=0 if t is None else t.stride(0),
            CORE=core_kind,
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r, BLOCK_V=block_v,
        ),
        tile,
        bytes_read=sum(i.nbytes for i in (x, a, core, bits, t) if i is not None),
        bytes_written=sum(out.nbytes for out in outputs),
        flops=2 * M * K * R,
    ).run()  # fmt: skip
