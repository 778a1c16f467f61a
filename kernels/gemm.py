"""What the two GEMMs that carry the low-rank term in their accumulator share: access, tiles, products.

Both compute out = x · w + u · f with x [M, inner], w [inner, columns] big and u [M, R], f [R, columns] thin.
Where rows are 16-byte aligned and the GPU has TMA descriptors (sm_90, sm_100), x, w and out go through host
descriptors and the kernel is persistent; elsewhere through pointers, one program a tile. u and f always go
through pointers: any rank, any dtype, no padded copies, and their blocks reuse the main loop's shared memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import spread_bits
from .launch import Tile, cdiv
from .tile import cast, dot

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton 3.4 has it; a build without keeps the pointer path
    TensorDescriptor = None
else:

    class _CheckedDescriptor(TensorDescriptor):
        """A descriptor of an operand that `has_aligned_rows` found fit: Triton would take 3 µs to check it again."""

        def __post_init__(self) -> None:
            pass


__all__ = [
    "Access",
    "access_of",
    "blocks_of",
    "choose_gemm_tile",
    "descriptor",
    "descriptor_product",
    "drop",
    "fastest",
    "gemm_tiles",
    "has_aligned_rows",
    "low_rank_descriptor_product",
    "low_rank_product",
    "pointer_product",
    "rank_multiple",
]

# How a kernel may read matrices: by descriptors, by pointers to 16 bytes, by pointers to single elements.
Access = Literal["descriptors", "vectors", "elements"]

# Tiles (rows, columns, inner) that compile without spills, each with the share of the first one's rate it may
# reach on a full GPU: priors, not measurements.
TILES: dict[Access, list[tuple[Tile, float]]] = {
    "descriptors": [
        (Tile(128, 256, 64, num_warps=8, num_stages=3, use_tma=True), 1.0),
        (Tile(128, 128, 64, num_warps=8, num_stages=4, use_tma=True), 0.9),
        (Tile(64, 128, 64, num_warps=4, num_stages=4, use_tma=True), 0.7),
        (Tile(64, 64, 64, num_warps=4, num_stages=4, use_tma=True), 0.5),
    ],
    "vectors": [
        (Tile(128, 256, 32, num_warps=8, num_stages=3), 1.0),
        (Tile(128, 128, 32, num_warps=4, num_stages=4), 0.95),
        (Tile(64, 128, 32, num_warps=4, num_stages=4), 0.8),
        (Tile(64, 64, 64, num_warps=4, num_stages=4), 0.6),
        (Tile(32, 64, 64, num_warps=4, num_stages=4), 0.35),
        (Tile(16, 64, 64, num_warps=4, num_stages=4), 0.2),
    ],
    "elements": [
        (Tile(64, 64, 32, num_warps=4, num_stages=3), 1.0),
        (Tile(32, 64, 32, num_warps=4, num_stages=3), 0.6),
        (Tile(16, 64, 32, num_warps=4, num_stages=3), 0.35),
    ],
}
# IEEE products run on no tensor core: registers limit the tile, however operands are read.
_FP32_TILES = [
    (Tile(64, 64, 16, num_warps=8, num_stages=3), 1.0),
    (Tile(16, 64, 32, num_warps=4, num_stages=3), 0.35),
]


@lru_cache(1024)
def choose_gemm_tile(rows: int, cols: int, rank: int, dtype: torch.dtype, access: Access, sms: int) -> Tile:
    """The tile expected fastest for an output [rows, cols]; block_n is along its columns."""
    return fastest(gemm_tiles(rank, dtype, access), rows, cols, sms)


@lru_cache(256)
def gemm_tiles(rank: int, dtype: torch.dtype, access: Access) -> list[tuple[Tile, float]]:
    """The tiles for such operands, with their shares of the full rate."""

    def fitted(tile: Tile) -> Tile:
        if rank % 8 and not tile.use_tma and tile.block_m * tile.block_n >= 128 * 128:
            tile = replace(tile, num_warps=8)  # u and f are then read element by element, which takes registers
        # Loads of single elements, or mma.sync's accumulators, leave registers for narrow blocks of u and f.
        wide = tile.use_tma and rank > 16 and rank % 16 == 0
        return replace(tile, block_r=32 if wide else 16)

    return [(fitted(tile), share) for tile, share in (_FP32_TILES if dtype == torch.float32 else TILES[access])]


def fastest(tiles: Iterable[tuple[Tile, float]], rows: int, cols: int, sms: int) -> Tile:
    """The tile whose waves over the GPU should take least time: ⌈blocks / SMs⌉ · area / share of the full rate."""

    def time(candidate: tuple[Tile, float]) -> float:
        tile, share = candidate
        blocks = cdiv(rows, tile.block_m) * cdiv(cols, tile.block_n)
        return cdiv(blocks, sms) * tile.block_m * tile.block_n / share

    return min(tiles, key=time)[0]


def access_of(*matrices: Tensor, arch: int) -> Access:
    """The fastest way in which all of these 2-D operands can be read and written on this GPU."""
    by_descriptor = TensorDescriptor is not None and 90 <= arch < 120
    if by_descriptor and all(m.element_size() == 2 and has_aligned_rows(m, 16) for m in matrices):
        return "descriptors"
    # Triton loads vectors where it can prove that it may: sizes and steps that are multiples of 16 elements.
    if all(has_aligned_rows(m, 16 * m.element_size()) and _row_length(m) % 16 == 0 for m in matrices):
        return "vectors"
    return "elements"


def _row_length(matrix: Tensor) -> int:
    return matrix.shape[1] if matrix.stride(1) == 1 else matrix.shape[0]


def has_aligned_rows(matrix: Tensor, step: int) -> bool:
    """Runs of consecutive elements that start at multiples of `step` bytes and do not overlap."""
    (outer, inner), (_, length) = matrix.stride(), matrix.shape
    if inner != 1:
        inner, outer, length = outer, inner, matrix.shape[0]
    aligned = outer * matrix.element_size() % step == 0 and matrix.data_ptr() % 16 == 0
    return inner == 1 and outer >= length and aligned


def descriptor(matrix: Tensor, block_rows: int, block_cols: int) -> Any:
    """Host descriptor of [block_rows, block_cols] blocks; of their transposes for contiguous columns."""
    if matrix.stride(1) != 1:
        return descriptor(matrix.t(), block_cols, block_rows)
    return _CheckedDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [block_rows, block_cols])


def blocks_of(tile: Tile) -> dict[str, int]:
    """Block sizes as arguments of a kernel."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BLOCK_R": tile.block_r,
    }


def rank_multiple(rank: int, row_step: int) -> int:
    """The largest power of two up to 16 that divides the rank and the step between rows of u.

    That many elements one load may take, if u also starts at 16 bytes, which Triton sees for itself.
    """
    both = rank | row_step
    return min(both & -both, 16) or 16


@triton.jit
def pointer_product(
    acc, x_ptr, w_ptr, rows, cols, M, COLS, INNER,
    stride_xm, stride_xi,
    stride_wi, stride_wc,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """acc + x[rows, :] · w[:, cols] through pointers; rows and cols are int64."""
    offs_i = tl.arange(0, BLOCK_I)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_i[None, :] * stride_xi
    w_ptrs = w_ptr + offs_i[:, None] * stride_wi + cols[None, :] * stride_wc
    mask_m, mask_c = rows[:, None] < M, cols[None, :] < COLS
    for i in range(0, INNER, BLOCK_I):
        x = tl.load(x_ptrs, mask=mask_m & (offs_i[None, :] < INNER - i), other=0.0)  # [BLOCK_M, BLOCK_I]
        w = tl.load(w_ptrs, mask=mask_c & (offs_i[:, None] < INNER - i), other=0.0)  # [BLOCK_I, BLOCK_C]
        acc = dot(x, w, acc)
        x_ptrs += BLOCK_I * stride_xi
        w_ptrs += BLOCK_I * stride_wi
    return acc


@triton.jit
def descriptor_product(acc, x_desc, w_desc, row, col, INNER, W_ALONG_INNER: tl.constexpr, BLOCK_I: tl.constexpr):
    """acc + x[row:, :] · w[:, col:] through descriptors, which read zeros beyond the edges."""
    for i in range(0, INNER, BLOCK_I):
        x = x_desc.load([row, i])
        w = w_desc.load([col, i]).T if W_ALONG_INNER else w_desc.load([i, col])
        acc = dot(x, w, acc)
    return acc


@triton.jit
def low_rank_product(
    acc, u_ptr, f_ptr, rows, cols, M, COLS, R,
    stride_um,
    stride_fr, stride_fc,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + u[rows, :] · f[:, cols] with the ranks of u [M, R] side by side; f is cast to u's type."""
    offs_r = tl.arange(0, BLOCK_R)
    u_ptrs = u_ptr + rows[:, None] * stride_um + offs_r[None, :]
    f_ptrs = f_ptr + offs_r[:, None] * stride_fr + cols[None, :] * stride_fc
    mask_m, mask_c = rows[:, None] < M, cols[None, :] < COLS
    for r in range(0, R, BLOCK_R):
        u = tl.load(u_ptrs + r, mask=mask_m & (offs_r[None, :] < R - r), other=0.0)
        f = tl.load(f_ptrs + r * stride_fr, mask=mask_c & (offs_r[:, None] < R - r), other=0.0)
        acc = dot(u, cast(f, u.dtype), acc)
    return acc


@triton.jit
def low_rank_descriptor_product(
    acc, u_desc, f_desc, row, col, R, IN_ONE_STEP: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """acc + u[row:, :] · f[col:, :]ᵀ through descriptors, which read zeros beyond the edges.

    One step without a loop where a block holds all ranks. Several are not pipelined: the state of a loop, and more so
    of a pipeline, takes registers beside the accumulator.
    """
    if IN_ONE_STEP:
        acc = dot(u_desc.load([row, 0]), f_desc.load([col, 0]).T, acc)
    else:
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            acc = dot(u_desc.load([row, r]), f_desc.load([col, r]).T, acc)
    return acc


@triton.jit
def drop(acc, mask_ptr, rows, pid_c, M, COLS, keep_scale, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """acc · keep_scale where the packed mask [M, ⌈COLS / 8⌉] has a one, else 0."""
    row_bytes = tl.cdiv(COLS, 8)
    offs_byte = pid_c * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    inside = (rows[:, None] < M) & (offs_byte[None, :] < row_bytes)
    bits = tl.load(mask_ptr + rows[:, None] * row_bytes + offs_byte[None, :], mask=inside, other=0)
    return tl.where(spread_bits(bits, BLOCK_M, BLOCK_C), acc * keep_scale, 0.0)
