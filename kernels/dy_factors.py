"""Everything that one pass over dy yields: ds = core(scale · dy B), and the partial sums of dB and of a diagonal core."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Tile, arch_of, cdiv
from .tile import dot

COUNTERS = 1024

@triton.jit(do_not_specialize=["M", "chunk_rows"])
def _dy_factors_kernel(
    dy_ptr, b_ptr, s_ptr, core_ptr,
    ds_ptr, db_parts_ptr, dcore_parts_ptr, counters_ptr,
    M, N, R, chunk_rows,
    scale,
    stride_dym, stride_dyn,
    stride_bn, stride_br,
    COUNTERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program owns a strip of BLOCK_N columns of dy [M, N] over a chunk of its rows."""
    strip, chunk = tl.program_id(0), tl.program_id(1)
    IO: tl.constexpr = dy_ptr.dtype.element_ty
    offs_n = strip.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    first_row = chunk.to(tl.int64) * chunk_rows
    last_row = tl.minimum(first_row + chunk_rows, M)
    if strip + chunk == 0:
        tl.store(counters_ptr + tl.arange(0, COUNTERS), tl.zeros((COUNTERS,), tl.int32))

    mask_b = mask_n[:, None] & mask_r[None, :]
    b = tl.load(b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br, mask=mask_b, other=0.0).to(IO)
    factor = tl.full((BLOCK_R,), 1.0, tl.float32) * scale
    if core_ptr is not None:
        factor *= tl.load(core_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    ds_base = ds_ptr + strip.to(tl.int64) * M * R
    for row in range(first_row, last_row, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last_row
        mask_s = mask_m[:, None] & mask_r[None, :]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        s = tl.load(s_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_s, other=0.0)  # [BLOCK_M, BLOCK_R]
        acc = dot(tl.trans(dy), s, acc)
        gv = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
        ds = (gv * factor[None, :]).to(ds_ptr.dtype.element_ty)
        tl.store(ds_base + offs_m[:, None] * R + offs_r[None, :], ds, mask=mask_s)
    db_ptrs = db_parts_ptr + chunk.to(tl.int64) * N * R + offs_n[:, None] * R + offs_r[None, :]
    tl.store(db_ptrs, acc * factor[None, :], mask=mask_b)
    if dcore_parts_ptr is not None:
        part = chunk * tl.num_programs(0) + strip
        dcore = tl.sum(acc * b.to(tl.float32), axis=0) * scale
        tl.store(dcore_parts_ptr + part * R + offs_r, dcore, mask=mask_r)


def launch(dy, b, s, scale, core, tile, chunk_rows, want_dcore=False):
    m, n = dy.shape; r = b.shape[1]
    strips=cdiv(n,tile.block_n); chunks=cdiv(m,chunk_rows)
    dev=dy.device
    ds=torch.empty(strips,m,r,dtype=torch.float32 if strips>1 else dy.dtype,device=dev)
    dbp=torch.empty(chunks,n,r,dtype=torch.float32,device=dev)
    dcp=torch.empty(chunks*strips,r,dtype=torch.float32,device=dev) if want_dcore else None
    cnt=torch.empty(COUNTERS,dtype=torch.int32,device=dev)
    Launch(_dy_factors_kernel,(strips,chunks),dict(dy_ptr=dy,b_ptr=b,s_ptr=s,core_ptr=core,ds_ptr=ds,db_parts_ptr=dbp,dcore_parts_ptr=dcp,counters_ptr=cnt,
      M=m,N=n,R=r,chunk_rows=chunk_rows,scale=scale,stride_dym=dy.stride(0),stride_dyn=dy.stride(1),stride_bn=b.stride(0),stride_br=b.stride(1),
      COUNTERS=COUNTERS,BLOCK_M=tile.block_m,BLOCK_N=tile.block_n,BLOCK_R=tile.block_r),tile).run()
