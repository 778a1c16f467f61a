"""Factors as kernels read them: up to three as the rows of one, [A; A2; A3], or copied into aligned rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import cast

__all__ = ["MOST", "as_rows", "copy_rows", "row_arguments", "row_pointers", "several"]

# Factors that `row_pointers` joins.
MOST = 3


@triton.jit
def row_pointers(a_ptr, a2_ptr, a3_ptr, r2, r3, offs_r, stride_ar):
    """Where rows offs_r of [A; A2; A3] begin, in the shape of offs_r; A2 begins at row r2, A3 at row r3."""
    rows = a_ptr + offs_r * stride_ar
    if a2_ptr is not None:
        rows = tl.where(offs_r < r2, rows, a2_ptr + (offs_r - r2) * stride_ar)
    if a3_ptr is not None:
        rows = tl.where(offs_r < r3, rows, a3_ptr + (offs_r - r3) * stride_ar)
    return rows


@triton.jit
def copy_rows(b_ptr, b2_ptr, b3_ptr, n2, n3, rows_ptr, N, RV, stride, BLOCK: tl.constexpr):
    """rows [N, RV] = [b; b2; b3], whose rows of RV follow one another, cast; in `rows` they are `stride` apart.

    All programs of the launch share the work.
    """
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    for start in range(program * BLOCK, N * stride, programs * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        row, rank = offs // stride, offs % stride
        mask = (row < N) & (rank < RV)
        b = tl.load(row_pointers(b_ptr, b2_ptr, b3_ptr, n2, n3, row, RV) + rank, mask=mask, other=0.0)
        tl.store(rows_ptr + offs, cast(b, rows_ptr.dtype.element_ty), mask=mask)


def several(a: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each of them, also if it is one alone."""
    return (a,) if isinstance(a, Tensor) else tuple(a)


def as_rows(a: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The factors [Rᵢ, K], of one dtype, as kernels can read them: joined by a copy if there are too many, or if their
    elements lie in different steps.
    """
    factors = several(a)
    if len(factors) <= MOST and len({factor.stride() for factor in factors}) == 1:
        return factors
    return (torch.cat(factors),)


def row_arguments(factors: Sequence[Tensor], name: str = "a", bound: str = "r") -> dict[str, Any]:
    """What a kernel with parameters <name>_ptr, <name>2_ptr, <name>3_ptr and <bound>2, <bound>3 is told of factors
    that `row_pointers` joins; None where there is none.
    """
    found: dict[str, Any] = dict.fromkeys((f"{name}_ptr", f"{name}2_ptr", f"{name}3_ptr", f"{bound}2", f"{bound}3"))
    starts = accumulate((factor.shape[0] for factor in factors), initial=0)
    for i, (factor, start) in enumerate(zip(factors, starts, strict=False), 1):
        found |= {f"{name}_ptr": factor} if i == 1 else {f"{name}{i}_ptr": factor, f"{bound}{i}": start}
    return found
