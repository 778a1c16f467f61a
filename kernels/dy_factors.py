"""What a pass over dy yields: ds, dB and the gradient of a diagonal core."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Tile, arch_of, cdiv, sm_count, with_adjacent_ranks, zeroed_counters
from .measured import Tuned, tuned_tile
from .shrink import choose_tile as choose_row_tile
from .shrink import launch_shrink
from .tile import cast, dot, is_last_to_arrive, reduce_parts

__all__ = ["DyFactors", "choose_tile", "dy_factors", "one_pass_max_rank", "rows_per_chunk", "tiles"]


class DyFactors(NamedTuple):
    """ds [M, R] in dy's dtype, dB [N, R] in b's, dcore fp32 [R]; None where not asked for."""

    ds: Tensor
    db: Tensor | None
    dcore: Tensor | None


@triton.jit(do_not_specialize=["M", "chunk_rows", "chunks"])
def _dy_factors_kernel(
    dy_ptr, b_ptr, s_ptr, core_ptr,
    ds_parts_ptr, db_parts_ptr, dcore_parts_ptr, counters_ptr,
    ds_ptr, db_ptr, dcore_ptr,
    M, N, R, chunk_rows, chunks,
    scale,
    stride_dym, stride_dyn,
    stride_bn, stride_br,
    stride_sm, stride_dsm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program reads a strip of BLOCK_N columns of dy [M, N] over a chunk of its rows; with f = scale · d it adds

        (dy B) ∘ f                to ds [chunk, R], over strips
        (dyᵀ s) ∘ f               to dB [strip, R], over chunks
        scale · Σ_n (dyᵀ s ∘ B)   to dcore [R], over both: Σ_t s ∘ gv, reordered

    dyᵀ s grows in registers and dy is read once. Every program stores its parts; the last one to arrive at a chunk,
    at a strip and at all sums them, in an order that the shapes fix. Nobody waits and nothing is added atomically.
    """
    strip, chunk = tl.program_id(0), tl.program_id(1)
    IO: tl.constexpr = dy_ptr.dtype.element_ty
    offs_n = strip.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    first_row = chunk.to(tl.int64) * chunk_rows
    last_row = tl.minimum(first_row + chunk_rows, M)

    mask_b = mask_n[:, None] & mask_r[None, :]
    b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
    b = cast(tl.load(b_ptrs, mask=mask_b, other=0.0), IO)
    factor = tl.full((BLOCK_R,), 1.0, tl.float32) * scale
    if core_ptr is not None:
        factor *= tl.load(core_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    ds_base = ds_parts_ptr + strip.to(tl.int64) * M * R
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for row in range(first_row, last_row, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last_row
        mask_s = mask_m[:, None] & mask_r[None, :]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :]
        s = tl.load(s_ptrs, mask=mask_s, other=0.0)  # [BLOCK_M, BLOCK_R]
        acc = dot(tl.trans(s), dy, acc)
        # Always true. In one region Triton 3.7 gives both products the warp layout of the first, and every warp
        # then computes the whole of the other.
        if row < last_row:
            gv = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
            tl.store(ds_base + offs_m[:, None] * R + offs_r[None, :], gv * factor[None, :], mask=mask_s)
    acc = tl.trans(acc)  # [BLOCK_N, BLOCK_R]
    # The number of chunks is an argument all the same: read here too, it costs ten registers on sm_100 (Triton 3.7).
    strips = tl.num_programs(0)
    size = tl.cast(N, tl.int64) * R
    tl.store(db_parts_ptr + chunk * size + offs_n[:, None] * R + offs_r[None, :], acc * factor[None, :], mask=mask_b)
    if dcore_parts_ptr is not None:
        dcore_ptrs = dcore_parts_ptr + (chunk.to(tl.int64) * strips + strip) * R + offs_r
        tl.store(dcore_ptrs, tl.sum(acc * b.to(tl.float32), axis=0) * scale, mask=mask_r)

    if is_last_to_arrive(counters_ptr + chunk, strips):
        ds_parts_ptr += first_row * R
        ds_ptr += first_row * (R if stride_dsm is None else stride_dsm)
        length = (last_row - first_row).to(tl.int32) * R
        reduce_parts(ds_parts_ptr, ds_ptr, strips, tl.cast(M, tl.int64) * R, length, R, stride_dsm, 8, BLOCK)
    if is_last_to_arrive(counters_ptr + chunks + strip, chunks):
        first = strip.to(tl.int64) * BLOCK_N * R
        length = tl.minimum(BLOCK_N, N - strip * BLOCK_N) * R
        reduce_parts(db_parts_ptr + first, db_ptr + first, chunks, size, length, R, None, 8, BLOCK)
    if dcore_parts_ptr is not None:
        if is_last_to_arrive(counters_ptr + chunks + strips, chunks * strips):
            reduce_parts(dcore_parts_ptr, dcore_ptr, chunks * strips, R, R, R, None, 128, BLOCK_R)


def one_pass_max_rank(dtype: torch.dtype, arch: int) -> int:
    """Largest rank at which one pass over dy, with its parts of ds, is expected to move less than two without.

    A model, not a measurement: the parts of ds are 2R / BLOCK_N of dy, written and read again, mostly in L2. In fp32
    registers set the limit.
    """
    if dtype == torch.float32:
        return 16
    return 64 if arch in (90, 100) else 32


@lru_cache(1024)
def choose_tile(N: int, R: int, dtype: torch.dtype, arch: int) -> Tile:
    """A strip wide enough that the parts of ds stay small, narrow enough that dyᵀ s stays in registers."""
    block_r = max(16, triton.next_power_of_2(R))
    if dtype == torch.float32:
        return Tile(block_m=32, block_n=32, block_r=block_r, num_warps=4, num_stages=3)
    if N % 16 or R % 8:  # elements are read one by one, and each takes a register
        block_m = 64 if block_r == 16 else 32
        return Tile(block_m=block_m, block_n=128, block_r=block_r, num_warps=8, num_stages=3, max_registers=255)
    # 512 columns beside a core's gradient spill where products read their operands from registers (sm_80, 86, 89).
    wide = N >= 2048 and _may_be_wide(block_r, arch)
    # On sm_100 64 rows of 64 ranks would be products in tensor memory, and the way there spills.
    block_m = 32 if block_r == 64 and arch == 100 else 64
    return Tile(block_m=block_m, block_n=512 if wide else 256, block_r=block_r, num_warps=8, num_stages=3)


def _may_be_wide(block_r: int, arch: int) -> bool:
    return block_r == 16 and arch in (90, 100)


def tiles(N: int, R: int, dtype: torch.dtype, arch: int) -> list[Tuned]:
    """What `choose_tile` may return for such operands: strips of both widths where there are two."""
    tile = choose_tile(N, R, dtype, arch)
    widths = (512, 256) if tile.block_n in (256, 512) and _may_be_wide(tile.block_r, arch) else (tile.block_n,)
    return [Tuned(replace(tile, block_n=width)) for width in widths]


def rows_per_chunk(M: int, columns: int, block_m: int, programs: int) -> int:
    """Rows of a chunk such that `columns` programs beside one another make up about `programs` in all.

    A multiple of block_m, and at least two blocks: every chunk costs a part of the factor's gradient.
    """
    chunks = max(1, programs // columns)
    return block_m * max(2, cdiv(cdiv(M, chunks), block_m))


def dy_factors(
    dy: Tensor,
    b: Tensor,
    s: Tensor | None,
    *,
    scale: float = 1.0,
    core: Tensor | None = None,
    want_db: bool = True,
    want_dcore: bool = False,
    out: Tensor | None = None,
    into: Tensor | None = None,
    tile: Tile | None = None,
    chunk_rows: int | None = None,
) -> DyFactors:
    """ds = scale · d ∘ (dy B), dB = dyᵀ (scale · s ∘ d) and dd = Σ_t s ∘ (scale · dy B) from one pass over dy [M, N].

    b [N, R] and `core` d [R] may be fp32 beside 16-bit dy, dy and b may have any strides; s [M, R] in dy's dtype is
    needed for dB and dd. ds is written to `out` [M, R] if given. Both may be some columns of wider matrices. dB is
    written to `into` [N, R] if given, contiguous in b's dtype. Without dB any rank will do, with it
    R ≤ `one_pass_max_rank`.
    Reads dy once, 2MNR FLOP for each of ds and dB.
    """
    (M, N), R = dy.shape, b.shape[1]
    ds = torch.empty((M, R), dtype=dy.dtype, device=dy.device) if out is None else out
    assert ds.shape == (M, R) and (ds.stride(1) == 1 or R == 1), f"out must be rows [{M}, {R}], got {list(ds.shape)}"
    assert s is not None or not (want_db or want_dcore), "dB and the gradient of the core need s [M, R]"
    s = None if s is None else with_adjacent_ranks(s)
    if not want_db:
        return _without_db(dy, b, s, ds, scale, core, want_dcore, tile)
    assert s is not None
    if tile is None:
        arch = arch_of(dy)
        tuned = tuned_tile("dy_factors", dy, arch, (N, 0, R), "", partial(tiles, N, R, dy.dtype, arch))
        tile = tuned.tile if tuned else choose_tile(N, R, dy.dtype, arch)
    assert tile.block_r >= R, f"one pass over dy holds all ranks: {R} exceed the tile's {tile.block_r}"
    strips = cdiv(N, tile.block_n)
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(M, strips, tile.block_m, sm_count(dy) * (8 // tile.num_warps))
    chunks = cdiv(M, chunk_rows)

    def parts(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=dy.device)

    db = torch.empty((N, R), dtype=b.dtype, device=dy.device) if into is None else into
    assert db.shape == (N, R) and db.dtype == b.dtype and db.is_contiguous(), "into must be a contiguous [N, R] like b"
    ds_parts, db_parts = parts(strips, M, R), parts(chunks, N, R)
    dcore, dcore_parts = (parts(R), parts(chunks * strips, R)) if want_dcore else (None, None)
    Launch(
        _dy_factors_kernel,
        (strips, chunks),
        dict(
            dy_ptr=dy, b_ptr=b, s_ptr=s, core_ptr=core,
            ds_parts_ptr=ds_parts, db_parts_ptr=db_parts, dcore_parts_ptr=dcore_parts,
            counters_ptr=zeroed_counters(dy, chunks + strips + 1),
            ds_ptr=ds, db_ptr=db, dcore_ptr=dcore,
            M=M, N=N, R=R, chunk_rows=chunk_rows, chunks=chunks, scale=float(scale),
            stride_dym=dy.stride(0), stride_dyn=dy.stride(1), stride_bn=b.stride(0), stride_br=b.stride(1),
            stride_sm=s.stride(0), stride_dsm=None if ds.is_contiguous() else ds.stride(0),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=tile.block_r, BLOCK=128 * tile.num_warps,
        ),
        tile,
        reads=(dy, b, s, core, ds_parts, db_parts, dcore_parts),
        writes=(ds_parts, db_parts, dcore_parts, ds, db, dcore),
        flops=4 * M * N * R,
    ).run()  # fmt: skip
    return DyFactors(ds, db, dcore)


def _without_db(
    dy: Tensor,
    b: Tensor,
    s: Tensor | None,
    ds: Tensor,
    scale: float,
    core: Tensor | None,
    want_dcore: bool,
    tile: Tile | None,
) -> DyFactors:
    """Without dB a program owns rows, not columns: ds needs no second stage, and each row block adds up its dd."""
    (M, N), R, split = dy.shape, b.shape[1], 1
    if tile is None:
        tile, split = choose_row_tile(M, N, R, dy.dtype, arch_of(dy), sm_count(dy), factor_bytes=b.element_size())
    dcore_parts = None
    if want_dcore:
        dcore_parts = torch.empty((cdiv(M, tile.block_m), R), dtype=torch.float32, device=dy.device)
    launch_shrink(
        dy, (b.t(),), None, ds, scale=scale, core=core, core_kind="none" if core is None else "diag",
        t=s if want_dcore else None, dcore_parts=dcore_parts, tile=tile, split=split,
    )  # fmt: skip
    return DyFactors(ds, None, None if dcore_parts is None else dcore_parts.sum(0))
