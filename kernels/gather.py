"""Factors gathered from one vector and their gradient summed back into it: P θ and Pᵀ g, P with one entry a row.

Which entry belongs to which element comes from a stored index, or from a permutation π of [0, D) that is computed on
the way, entry = π(element) mod d: the Feistel network of lowrank_fused/factors/projection.py, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import GOLDEN, MIX_1, MIX_2
from .launch import Launch, Tile, cdiv
from .tile import cast

__all__ = ["Permutation", "choose_segment_tile", "gather", "scatter_add", "segment_sum"]

_GATHER_TILE = Tile(block_m=1024, num_warps=4, num_stages=1)
_SCATTER_TILE = Tile(block_m=512, num_warps=4, num_stages=1)
_NUMBERS = ["first", "total", "length", "rows", "columns", "key_low", "key_high"]


class Permutation(NamedTuple):
    """π of [0, total): rows · columns ≥ total cells, keys as signed 32-bit integers."""

    total: int
    rows: int
    columns: int
    key_low: int
    key_high: int


@triton.jit
def _hash(v, ROUND: tl.constexpr, size, key_low, key_high):
    """A number below `size`, uint32."""
    h = (v * 8 + ROUND) * GOLDEN + key_low
    h = (h ^ (h >> 16)) * MIX_1 + key_high
    h = (h ^ (h >> 15)) * MIX_2
    return tl.umulhi(h ^ (h >> 16), tl.zeros_like(h) + size)


@triton.jit
def _add(x, y, size):
    """(x + y) mod size for x, y below size."""
    x += y
    return tl.where(x >= size, x - size, x)


@triton.jit
def _cross(x, rows, columns, key_low, key_high, BACK: tl.constexpr):
    """One pass through the network, uint32; `BACK` undoes it."""
    row = x // columns
    column = x - row * columns
    if BACK:
        for i in tl.static_range(4, -1, -2):
            column = _add(column, columns - _hash(row, i + 1, columns, key_low, key_high), columns)
            row = _add(row, rows - _hash(column, i, rows, key_low, key_high), rows)
    else:
        for i in tl.static_range(0, 6, 2):
            row = _add(row, _hash(column, i, rows, key_low, key_high), rows)
            column = _add(column, _hash(row, i + 1, columns, key_low, key_high), columns)
    return row * columns + column


@triton.jit
def _permute(x, total, rows, columns, key_low, key_high, BACK: tl.constexpr):
    """π(x), or π⁻¹(x), as int32 for 0 ≤ x < total: through the network until the result is below total."""
    total, rows, columns = tl.cast(total, tl.uint32), tl.cast(rows, tl.uint32), tl.cast(columns, tl.uint32)
    key_low, key_high = tl.cast(key_low, tl.uint32), tl.cast(key_high, tl.uint32)
    x = _cross(x.to(tl.uint32), rows, columns, key_low, key_high, BACK)
    # A few in a thousand leave [0, total), and a block that has none of them is done after one pass.
    while tl.max((x >= total).to(tl.int32), axis=None) > 0:
        x = tl.where(x >= total, _cross(x, rows, columns, key_low, key_high, BACK), x)
    return x.to(tl.int32)


@triton.jit
def _entries(index_ptr, offs, mask, first, total, length, rows, columns, key_low, key_high):
    """Entries of the elements first + offs: read from the index, which begins at `first`, or computed."""
    if index_ptr is not None:
        return tl.load(index_ptr + offs, mask=mask, other=0).to(tl.int32)
    else:
        x = tl.where(mask, first + offs, 0)
        x = _permute(x, total, rows, columns, key_low, key_high, False)
        return (x.to(tl.uint32) % tl.cast(length, tl.uint32)).to(tl.int32)


@triton.jit(do_not_specialize=_NUMBERS)
def _gather_kernel(
    theta_ptr, scale_ptr, index_ptr, out_ptr,
    count,
    first, total, length, rows, columns, key_low, key_high,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[p] = (scale ∘ θ)[entry of first + p] for p < count; θ stays in L2, out is written once."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    entries = _entries(index_ptr, offs, mask, first, total, length, rows, columns, key_low, key_high)
    values = tl.load(theta_ptr + entries, mask=mask, other=0.0)
    values = values.to(tl.float32) * tl.load(scale_ptr + entries, mask=mask, other=0.0)
    tl.store(out_ptr + offs, cast(values, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_NUMBERS)
def _scatter_add_kernel(
    grad_ptr, index_ptr, out_ptr,
    count,
    first, total, length, rows, columns, key_low, key_high,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[entry of first + p] += grad[p] for p < count, atomically: the order of a sum differs from run to run."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    entries = _entries(index_ptr, offs, mask, first, total, length, rows, columns, key_low, key_high)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(out_ptr + entries, grad, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=[*_NUMBERS, "longest"])
def _segment_sum_kernel(
    grad_ptr, order_ptr, starts_ptr, scale_ptr, out_ptr,
    longest,
    total, length, rows, columns, key_low, key_high,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[j] = scale[j] · Σ_c grad[element c of entry j], in an order that the sizes fix.

    The elements of an entry are order[starts[j] … starts[j + 1]], or π⁻¹(j), π⁻¹(j + d), π⁻¹(j + 2 d), … below D.
    One program owns BLOCK_D entries and reads BLOCK_C elements of each at a time.
    """
    entries = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_c = tl.arange(0, BLOCK_C)
    mask_d = entries < length
    if order_ptr is not None:
        starts = tl.load(starts_ptr + entries, mask=mask_d, other=0)
        counts = tl.load(starts_ptr + entries + 1, mask=mask_d, other=0) - starts
    else:
        counts = tl.where(mask_d, total // length + (entries < total % length).to(tl.int32), 0)
    acc = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    for c in range(0, longest, BLOCK_C):
        mask = (c + offs_c)[None, :] < counts[:, None]
        if order_ptr is not None:
            elements = tl.load(order_ptr + starts[:, None] + (c + offs_c)[None, :], mask=mask, other=0)
        else:
            # Widened, because a masked one may pass 2^31.
            images = entries.to(tl.int64)[:, None] + (c + offs_c).to(tl.int64)[None, :] * length
            elements = _permute(tl.where(mask, images, 0), total, rows, columns, key_low, key_high, True)
        acc += tl.load(grad_ptr + elements, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + entries, mask=mask_d, other=0.0)
    tl.store(out_ptr + entries, tl.sum(acc, axis=1) * scale, mask=mask_d)


def _numbers(index: Tensor | Permutation | None) -> dict[str, int]:
    """The arguments that stand for a permutation; a stored index has none."""
    return (index if isinstance(index, Permutation) else Permutation(0, 0, 0, 0, 0))._asdict()


def gather(
    theta: Tensor,
    index: Tensor | Permutation,
    scale: Tensor,
    *,
    first: int = 0,
    count: int | None = None,
    tile: Tile = _GATHER_TILE,
) -> Tensor:
    """(scale ∘ θ)[index[first : first + count]] in θ's dtype, multiplied in fp32; all of the index by default.

    theta [d] and scale fp32 [d] are contiguous; index [D] is uint16 or int32, or the permutation that stands for it.
    Writes `count` elements; reads 2 or 4 bytes of index for each, or nothing.
    """
    size = index.numel() if isinstance(index, Tensor) else index.total
    count = size - first if count is None else count
    out = torch.empty(count, dtype=theta.dtype, device=theta.device)
    if count:
        some = index[first : first + count] if isinstance(index, Tensor) else None
        Launch(
            _gather_kernel,
            (cdiv(count, tile.block_m),),
            dict(
                theta_ptr=theta, scale_ptr=scale, index_ptr=some, out_ptr=out, count=count,
                first=first, length=theta.numel(), **_numbers(index), BLOCK=tile.block_m,
            ),
            tile,
            reads=(theta, scale, some),
            writes=(out,),
        ).run()  # fmt: skip
    return out


def scatter_add(
    grad: Tensor,
    index: Tensor | Permutation,
    length: int,
    *,
    first: int = 0,
    tile: Tile = _SCATTER_TILE,
) -> Tensor:
    """Σ of grad [count] over the elements of each entry, fp32 [length], by atomic additions.

    Not deterministic; needs the index alone, where `segment_sum` needs its inverse. grad may have any dtype.
    """
    out = torch.zeros(length, dtype=torch.float32, device=grad.device)
    count = grad.numel()
    if count:
        some = index[first : first + count] if isinstance(index, Tensor) else None
        Launch(
            _scatter_add_kernel,
            (cdiv(count, tile.block_m),),
            dict(
                grad_ptr=grad, index_ptr=some, out_ptr=out, count=count, first=first, length=length,
                **_numbers(index), BLOCK=tile.block_m,
            ),
            tile,
            reads=(grad, out, some),
            writes=(out,),
            flops=count,
        ).run()  # fmt: skip
    return out


def choose_segment_tile(total: int, length: int) -> Tile:
    """1024 elements a step: all of an entry's if they are few, so that short segments share a program."""
    block_c = min(max(4, triton.next_power_of_2(cdiv(total, length))), 1024)
    return Tile(block_m=1024 // block_c, block_k=block_c, num_warps=4, num_stages=2)


def segment_sum(
    grad: Tensor,
    index: tuple[Tensor, Tensor] | Permutation,
    scale: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """scale ∘ Σ of grad [D] over the elements of each entry, fp32 [d]; the same bits in every run.

    index: int32 positions [D] ordered by entry with their starts [d + 1], or the permutation that stands for them.
    Every entry has ⌊D/d⌋ elements or one more. grad may have any dtype and is read once, in 32-byte sectors for single
    elements; scale [d] fp32.
    """
    total, length = grad.numel(), scale.numel()
    permutation = index if isinstance(index, Permutation) else None
    order, starts = (None, None) if isinstance(index, Permutation) else index
    if tile is None:
        tile = choose_segment_tile(total, length)
    out = torch.empty(length, dtype=torch.float32, device=grad.device)
    Launch(
        _segment_sum_kernel,
        (cdiv(length, tile.block_m),),
        dict(
            grad_ptr=grad, order_ptr=order, starts_ptr=starts, scale_ptr=scale, out_ptr=out,
            longest=cdiv(total, length), length=length, **_numbers(permutation),
            BLOCK_D=tile.block_m, BLOCK_C=tile.block_k,
        ),
        tile,
        reads=(grad, scale, order, starts),
        writes=(out,),
        flops=total,
    ).run()  # fmt: skip
    return out
