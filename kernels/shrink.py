"""s = drop(x) Aᵀ and v = scale · core(s) in one pass over x, with the dropout mask as packed bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import draw_bits, keep_scale, lane_threshold, spread_bits
from .factor_rows import as_rows, copy_rows, row_arguments, row_pointers, several
from .launch import Launch, Tile, arch_of, cdiv, shared_bytes, sm_count, zeroed_counters
from .measured import Tuned, tuned_tile
from .tables import bucket
from .tile import cast, dot, is_last_to_arrive

__all__ = ["block_of_rank", "choose_split", "choose_tile", "launch_shrink", "shrink", "tiles"]


@triton.jit
def _store_core(
    s, core_ptr, v_ptr, offs_m, offs_r, mask_m, R, RV, scale, stride_vm, stride_b,
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
        # Of several B's each has its own columns of v.
        cols = offs_r if stride_b is None else offs_r // RV * stride_b + offs_r % RV
        tl.store(v_rows + cols[None, :], cast(s * scale, IO), mask=mask_s)


@triton.jit
def _finish(
    s, core_ptr, t_ptr, s_ptr, v_ptr, dcore_parts_ptr, pid_m, offs_m, offs_r, M, R, RV, scale,
    stride_vm, stride_tm, stride_b,
    CORE: tl.constexpr, IO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store whatever of s, dcore_parts and v there is; s fp32 [BLOCK_M, BLOCK_R], complete."""
    mask_m, mask_r = offs_m < M, offs_r < R
    mask_s = mask_m[:, None] & mask_r[None, :]
    if s_ptr is not None:
        tl.store(s_ptr + offs_m[:, None] * R + offs_r[None, :], cast(s, IO), mask=mask_s)
    if t_ptr is not None:
        t = tl.load(t_ptr + offs_m[:, None] * stride_tm + offs_r[None, :], mask=mask_s, other=0.0).to(tl.float32)
        tl.store(dcore_parts_ptr + pid_m * R + offs_r, tl.sum(s * t, axis=0) * scale, mask=mask_r)
    if v_ptr is not None:
        _store_core(
            s, core_ptr, v_ptr, offs_m, offs_r, mask_m, R, RV, scale, stride_vm, stride_b, CORE, BLOCK_M, BLOCK_V
        )


@triton.jit(do_not_specialize=["M", "N", "threshold", "split", "r2", "r3", "n2", "n3"])
def _shrink_kernel(
    x_ptr, a_ptr, a2_ptr, a3_ptr, b_ptr, b2_ptr, b3_ptr, core_ptr, seed_ptr, bits_ptr, t_ptr,
    parts_ptr, counters_ptr, s_ptr, v_ptr, rows_ptr, mask_ptr, dcore_parts_ptr,
    M, N, K, R, RV, r2, r3, n2, n3, chunk_k, split,
    scale, keep_scale, threshold,
    stride_xm, stride_xk,
    stride_ar, stride_ak,
    stride_vm, stride_tm, stride_b,
    CORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """s = keep ∘ x Aᵀ / (1 − p), v = scale · core(s); one program owns BLOCK_M rows and BLOCK_R ranks.

    A may come in up to three pieces, see `row_pointers`.

    With parts [split, M, R], `split` programs share these, each with chunk_k columns of x. They store their parts of s;
    the last one to arrive sums them in the order of the columns and goes on as one program does on its own.
    With t [M, R], also the row block's share of Σ_t scale · s ∘ t (the gradient of a diagonal core, s being dy B).
    With b [N, RV], also a copy of it in rows as far apart as those of v. There may be up to three b's, for RV ranks
    each: their copies follow one another, and v has stride_b columns for each.
    """
    if b_ptr is not None:
        copy_rows(b_ptr, b2_ptr, b3_ptr, n2, n3, rows_ptr, N, RV, stride_vm if stride_b is None else stride_b, 512)
    pid_r = tl.program_id(0)
    pid_m, pid_k = tl.program_id(1).to(tl.int64), tl.program_id(2)
    IO: tl.constexpr = x_ptr.dtype.element_ty
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    first_k, last_k = 0, K
    if parts_ptr is not None:
        first_k = pid_k * chunk_k
        last_k = tl.minimum(first_k + chunk_k, K)
        x_ptr += first_k.to(tl.int64) * stride_xk
        a_ptr += first_k.to(tl.int64) * stride_ak
        if a2_ptr is not None:
            a2_ptr += first_k.to(tl.int64) * stride_ak
        if a3_ptr is not None:
            a3_ptr += first_k.to(tl.int64) * stride_ak
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_r = offs_m < M, offs_r < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    a_ptrs = row_pointers(a_ptr, a2_ptr, a3_ptr, r2, r3, offs_r[None, :], stride_ar) + offs_k[:, None] * stride_ak
    row_bytes = tl.cdiv(K, 8)
    stored_bytes = tl.where(pid_r == 0, row_bytes, 0)  # programs of other ranks draw the same mask
    offs_byte = tl.arange(0, BLOCK_K // 8)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(first_k, last_k, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        if seed_ptr is not None:
            bits = draw_bits(seed, offs_m, offs_byte + k // 8, row_bytes, threshold)
            if mask_ptr is not None:
                mask_bits = mask_m[:, None] & (offs_byte < stored_bytes - k // 8)[None, :]
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
    if parts_ptr is None:
        _finish(
            acc, core_ptr, t_ptr, s_ptr, v_ptr, dcore_parts_ptr, pid_m, offs_m, offs_r, M, R, RV, scale,
            stride_vm, stride_tm, stride_b, CORE, IO, BLOCK_M, BLOCK_V,
        )  # fmt: skip
    else:
        # Short offsets beside one address: as addresses they would take twice the registers.
        own = tl.arange(0, BLOCK_M)[:, None] * R + offs_r[None, :]
        mask_s = mask_m[:, None] & mask_r[None, :]
        size = tl.cast(M, tl.int64) * R
        parts_ptr += pid_m * BLOCK_M * R
        tl.store(parts_ptr + pid_k * size + own, acc, mask=mask_s)
        if is_last_to_arrive(counters_ptr + pid_m * tl.num_programs(0) + pid_r, split):
            acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for _ in tl.range(0, split, loop_unroll_factor=2):
                acc += tl.load(parts_ptr + own, mask=mask_s, other=0.0, cache_modifier=".cg")
                parts_ptr += size
            _finish(
                acc, core_ptr, t_ptr, s_ptr, v_ptr, dcore_parts_ptr, pid_m, offs_m, offs_r, M, R, RV, scale,
                stride_vm, stride_tm, stride_b, CORE, IO, BLOCK_M, BLOCK_V,
            )  # fmt: skip


def block_of_rank(R: int, dtype: torch.dtype) -> int:
    """Ranks that one program serves: all of them up to 128 (64 in fp32, whose products are not on tensor cores)."""
    return min(max(16, triton.next_power_of_2(R)), 64 if dtype == torch.float32 else 128)


def choose_split(M: int, K: int, R: int, tile: Tile, sms: int) -> int:
    """How many programs share the columns of a block of x: one where the blocks alone occupy the GPU.

    Otherwise so many that they make up one and a half times its multiprocessors, but each has four steps to run.
    """
    blocks = max(1, cdiv(M, tile.block_m) * cdiv(R, tile.block_r))
    if _idle(blocks, sms) == 0:
        return 1
    return max(1, min(cdiv(3 * sms, 2 * blocks), K // (4 * tile.block_k)))


def _idle(programs: int, sms: int) -> int:
    """Tenths of a multiprocessor that are missing to nine tenths of them."""
    return max(0, 9 * sms - 10 * programs)


@lru_cache(1024)
def choose_tile(
    M: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    arch: int,
    sms: int,
    *,
    factor_bytes: int = 4,
    short: bool = False,
) -> tuple[Tile, int]:
    """Blocks for x [M, K] and rank R, and how many programs share the columns of each (`choose_split`).

    Of the blocks that leave fewest multiprocessors idle, those with the least traffic beside x: A is read for each
    block of rows, its elements of `factor_bytes`, and the parts of s are written and read. `short` asks for small
    blocks, where rows are not aligned and a mask is applied: elements are then read one by one into registers.
    """

    def cost(choice: Tuned) -> tuple[int, int]:
        blocks = cdiv(M, choice.tile.block_m)
        parts = 8 * choice.split * M * R if choice.split > 1 else 0
        programs = blocks * cdiv(R, choice.tile.block_r) * choice.split
        return _idle(programs, sms), blocks * R * K * factor_bytes + parts

    return min(tiles(M, K, R, dtype, arch, sms, factor_bytes=factor_bytes, short=short), key=cost)


def tiles(
    M: int, K: int, R: int, dtype: torch.dtype, arch: int, sms: int, *, factor_bytes: int = 4, short: bool = False
) -> list[Tuned]:
    """What `choose_tile` chooses among: a block of every height, with as many programs as should share it."""
    block_r = block_of_rank(R, dtype)
    found = [_tile_of(rows, K, block_r, dtype, arch, factor_bytes) for rows in _heights(K, R, dtype, arch)]
    if short:
        rows = 32 if block_r < 64 else 16
        found = [replace(t, block_m=min(t.block_m, rows), block_k=min(t.block_k, 64)) for t in found]

    def split_of(tile: Tile) -> int:
        # Parts of 128 ranks fill the registers: those of few rows do if they are read one by one, or by few warps.
        tallest = 64
        if block_r == 128:
            tallest = 16 if R % 16 else 32 if tile.num_warps == 4 else 64
        elif block_r == 64 and R % 16 and arch >= 120:
            tallest = 16 if K % 16 else 32
        return choose_split(M, K, R, tile, sms) if tile.block_m <= tallest else 1

    splits = [split_of(tile) for tile in found]
    # Left to decide, the assembler spills a few bytes in order to fit more programs than there are; that of sm_120 does
    # so for one block without being asked to share it.
    return [
        Tuned(replace(tile, max_registers=255) if split > 1 or _is_tight(tile, arch) else tile, split)
        for tile, split in zip(found, splits, strict=True)
    ]


def _is_tight(tile: Tile, arch: int) -> bool:
    return arch == 120 and (tile.block_m, tile.block_k) == (32, 64)


def _heights(K: int, R: int, dtype: torch.dtype, arch: int) -> list[int]:
    """Rows that a block may have."""
    block_r = block_of_rank(R, dtype)
    if dtype == torch.float32:
        return [32 if block_r <= 32 else 16]
    if block_r == 128 and K % 16:
        return [16]
    # sm_100 has 64-row products only in tensor memory, and the way there costs more than mma.sync on 32 rows
    # unless all 128 ranks share it. Elsewhere 64 rows of 128 ranks are too many registers, but for wgmma.
    if 100 <= arch < 120:
        return [16, 32] if block_r < 128 else [16, 64] if R % 16 else [64]
    return [16, 32] if block_r == 128 and arch != 90 else [16, 32, 64]


def _tile_of(block_m: int, K: int, block_r: int, dtype: torch.dtype, arch: int, factor_bytes: int) -> Tile:
    """Blocks of so many rows, with 32 KiB of x under way where shared memory allows it."""
    if dtype == torch.float32:
        return Tile(block_m=block_m, block_k=32, block_r=block_r, num_warps=4, num_stages=3)
    in_tensor_memory = 100 <= arch < 120 and block_r == 128 and block_m == 64
    block_k = 128 if block_r <= 32 or in_tensor_memory or (block_r == 64 and block_m == 16) else 64
    if block_r == 128 and (K % 16 or shared_bytes(arch) < 128 * 1024):
        block_k = 32
    stage = block_k * (2 * block_m + factor_bytes * block_r)
    wanted = 1 + cdiv(32 * 1024, 2 * block_m * block_k)
    # Beside the stages there is one more tile of x: where dropout is applied to it.
    affordable = (shared_bytes(arch) - 2 * block_m * block_k) // stage
    return Tile(
        block_m=block_m,
        block_k=block_k,
        block_r=block_r,
        num_warps=8 if in_tensor_memory else 4,
        num_stages=min(wanted, affordable, 6),
    )


def shrink(
    x: Tensor,
    a: Tensor | Sequence[Tensor],
    *,
    scale: float = 1.0,
    core: Tensor | None = None,
    core_kind: str = "none",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bits: Tensor | None = None,
    keep_s: bool = True,
    copy: tuple[Tensor | Sequence[Tensor], Tensor] | None = None,
    tile: Tile | None = None,
    split: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, v, mask): s = drop(x) Aᵀ [M, R], v = scale · core(s) [M, Rv] and the packed mask uint8 [M, ⌈K / 8⌉].

    x [M, K] and a [R, K] may have any strides, a may be fp32 beside 16-bit x. Several a's, [Rᵢ, K] of one dtype, are
    read as the rows of one. `core` is d [R], C [Rv, R] or g [M, E]
    as `core_kind` says (diag, dense, gate). `seed` is an int64 [1] on x's device; given the packed `bits` of a mask,
    nothing is drawn and these come back. s and v have x's dtype, each rounded once; s is empty without `keep_s`, mask
    without dropout. `copy` (b, rows): b [N, Rv] is cast into `rows` by the same launch, and v gets their stride.
    Several b's, one for each a and Rᵢ alike, become the rows of one, and v has the columns of each so far apart.
    Reads x and a once, 2MKR FLOP. `split` programs share the columns of x where a tile is given.
    Sums have an order that the shapes fix.
    """
    factors = as_rows(a)
    (M, K), R = x.shape, sum(factor.shape[0] for factor in factors)
    if tile is None:
        short, width = bool(dropout_p) and K % 16 != 0 and x.element_size() == 2, factors[0].element_size()
        operands: dict[str, Any] = {"factor_bytes": width, "short": short}
        arch, sms = arch_of(x), sm_count(x)
        variant = f"{'masked, ' if dropout_p else ''}{width} bytes a factor"
        tuned = tuned_tile(
            "shrink",
            x,
            arch,
            (0, K, R),
            variant,
            partial(tiles, bucket(max(M, 1)), K, R, x.dtype, arch, sms, **operands),
        )
        tile, split = tuned or choose_tile(M, K, R, x.dtype, arch, sms, **operands)
    RV = R
    if core is not None:
        RV = {"diag": R, "dense": core.shape[0], "gate": R * core.shape[-1]}[core_kind]
    # C meets all ranks of s at once. Beyond one block of them it is a product of its own, on [M, R].
    fused = core_kind != "dense" or max(R, RV) <= tile.block_r
    s = torch.empty((M, R), dtype=x.dtype, device=x.device) if keep_s or not fused else x.new_empty(0)
    v = None
    if fused:
        if copy is None:
            v = torch.empty((M, RV), dtype=x.dtype, device=x.device)
        else:
            pieces, step = len(several(copy[0])), copy[1].stride(0)
            v = torch.empty((M, pieces * step), dtype=x.dtype, device=x.device)
            v = v if pieces > 1 else v[:, :RV]
    mask = x.new_empty(0, dtype=torch.uint8)
    if dropout_p:
        mask = torch.empty((M, cdiv(K, 8)), dtype=torch.uint8, device=x.device) if bits is None else bits
    if M:
        launch_shrink(
            x, factors, s if keep_s or not fused else None, v, scale=scale, core=core, core_kind=core_kind,
            dropout_p=dropout_p, seed=seed, bits=bits, mask=mask, copy=copy if fused else None, tile=tile, split=split,
        )  # fmt: skip
    if v is None:
        assert core is not None
        v = torch.mm(s, core.t().to(s.dtype)).mul_(scale)
        if copy is not None:
            copy[1].copy_(torch.cat(several(copy[0])))
    return s, v, mask


def launch_shrink(
    x: Tensor,
    a: Sequence[Tensor],
    s: Tensor | None,
    v: Tensor | None,
    *,
    scale: float,
    core: Tensor | None,
    core_kind: str,
    tile: Tile,
    split: int = 1,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bits: Tensor | None = None,
    mask: Tensor | None = None,
    t: Tensor | None = None,
    dcore_parts: Tensor | None = None,
    copy: tuple[Tensor | Sequence[Tensor], Tensor] | None = None,
) -> None:
    """One launch that fills those of s, v, mask and (given t [M, R]) dcore_parts [row blocks, R] that are there.

    a as `as_rows` returns it. v and t may be some columns of wider matrices. At most `split` programs share the
    columns of a block of x. `copy` as `shrink` has it, rows with v's stride or, of several b's, a share of it.
    """
    b = () if copy is None else tuple(factor.contiguous() for factor in several(copy[0]))
    rows = None if copy is None else copy[1]
    (M, K), R = x.shape, sum(factor.shape[0] for factor in a)
    row_blocks, rank_blocks = cdiv(M, tile.block_m), cdiv(R, tile.block_r)
    chunk_k = tile.block_k * cdiv(cdiv(K, tile.block_k), split)
    split = cdiv(K, chunk_k)
    parts = torch.empty((split, M, R), dtype=torch.float32, device=x.device) if split > 1 else None
    RV = R if v is None else v.shape[1] if rows is None else rows.shape[1]
    block_v = max(16, triton.next_power_of_2(RV)) if core_kind == "dense" else 16
    drawn = mask if dropout_p and bits is None else None
    Launch(
        _shrink_kernel,
        (rank_blocks, row_blocks, split),
        dict(
            x_ptr=x, **row_arguments(a), **row_arguments(b, "b", "n"),
            core_ptr=None if core is None else core.contiguous(),
            seed_ptr=seed if drawn is not None else None, bits_ptr=bits, t_ptr=t,
            parts_ptr=parts, counters_ptr=None if parts is None else zeroed_counters(x, row_blocks * rank_blocks),
            s_ptr=s, v_ptr=v, rows_ptr=rows, mask_ptr=drawn, dcore_parts_ptr=dcore_parts,
            M=M, N=0 if rows is None else rows.shape[0], K=K, R=R, RV=RV, chunk_k=chunk_k, split=split,
            scale=float(scale), keep_scale=keep_scale(dropout_p), threshold=lane_threshold(dropout_p),
            stride_xm=x.stride(0), stride_xk=x.stride(1), stride_ar=a[0].stride(0), stride_ak=a[0].stride(1),
            stride_vm=0 if v is None else v.stride(0), stride_tm=0 if t is None else t.stride(0),
            stride_b=rows.stride(0) if rows is not None and len(b) > 1 else None,
            CORE=core_kind,
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=tile.block_r, BLOCK_V=block_v,
        ),
        tile,
        reads=(x, *a, *b, core, bits, t, parts),
        writes=(s, v, rows, drawn, dcore_parts, parts),
        flops=2 * M * K * R,
    ).run()  # fmt: skip
