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
def cast(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest even. The interpreter cuts fp32 off at bf16 instead of rounding it."""
    if INTERPRETING and x.dtype == tl.float32 and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


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
def reduce_parts(
    parts_ptr, out_ptr, count, size, length, columns, stride, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[i] = Σ_c parts[c · size + i] for i < length, fp32, in an order that the shapes fix.

    out has rows of `columns` elements, `stride` apart; None where they follow one another. BLOCK_C parts are in flight
    at a time. They may have been written by other programs of the same launch, so the loads bypass L1.
    """
    offs_c = tl.arange(0, BLOCK_C)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), tl.float32)
        for c in range(0, count, BLOCK_C):
            mask = (offs_c < count - c)[:, None] & (offs < length)[None, :]
            part_ptrs = parts_ptr + (c + offs_c).to(tl.int64)[:, None] * size + offs[None, :]
            acc += tl.sum(tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
        if stride is not None:
            out_ptrs = out_ptr + (offs // columns).to(tl.int64) * stride + offs % columns
        else:
            out_ptrs = out_ptr + offs
        tl.store(out_ptrs, cast(acc, out_ptr.dtype.element_ty), mask=offs < length)


@triton.jit
def sum_of_parts(part_ptrs, mask, count, size):
    """Σ_c part_ptrs[c · size] in the order of c, fp32, two parts in flight; see `reduce_parts` for the loads."""
    total = tl.zeros(part_ptrs.shape, tl.float32)
    for _ in tl.range(0, count, loop_unroll_factor=2):
        total += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        part_ptrs += size
    return total


@triton.jit
def is_last_to_arrive(counter_ptr, count):
    """Whether this program is the last of `count` to come here; it then sees what all of them stored before.

    The counter must be zero before the first arrives and is zero again after the last.
    """
    tl.debug_barrier()  # every thread's stores come before the program's arrival
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == count - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last
