"""Device helpers that several kernels share: products, program order, dropout bits.

Conventions of all kernels: program ids are widened to int64 before they meet a stride, every dimension that can
overrun is masked (other=0.0 where the value enters a sum), accumulators are fp32, values are cast once on store.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter keeps bf16 as raw 16-bit integers and computes garbage with it, so operands are widened there.
INTERPRETING = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32: IEEE precision for fp32 operands, tensor cores for 16-bit ones."""
    if INTERPRETING:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def grouped_order(pid, num_pid_m, num_pid_n, GROUP_M: tl.constexpr = 8):
    """Tile coordinates in an order that keeps GROUP_M row blocks together, so that W is read from L2."""
    num_pid_in_group = GROUP_M * num_pid_n
    group = pid // num_pid_in_group
    first_m = group * GROUP_M
    group_rows = min(num_pid_m - first_m, GROUP_M)
    pid_m = first_m + (pid % num_pid_in_group) % group_rows
    pid_n = (pid % num_pid_in_group) // group_rows
    return pid_m, pid_n


@triton.jit
def reduce_slice(parts_ptr, out_ptr, count, size, pid, programs, BLOCK: tl.constexpr):
    """out[i] = Σ_c parts[c, i], c ascending, for the blocks of i that are program `pid`'s of `programs`.

    parts fp32 [count, size]; out takes the cast. Nobody else writes these blocks, so no second stage and no atomics.
    """
    for start in range(pid * BLOCK, size, programs * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        part_ptrs = parts_ptr + offs
        acc = tl.zeros((BLOCK,), tl.float32)
        for _ in tl.range(0, count, loop_unroll_factor=4):
            acc += tl.load(part_ptrs, mask=offs < size, other=0.0)
            part_ptrs += size
        tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < size)
