"""Dropout masks inside kernels, bit for bit those of lowrank_fused/dropout.py.

Two 16-bit lanes come from one 32-bit hash of a counter that depends on row and column alone, so the mask depends on no
tile shape and on no route. Four hashes make the eight columns of one byte of packed mask, all in one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B1)
GOLDEN_2 = tl.constexpr(2 * 0x9E3779B1 % 2**32)
GOLDEN_3 = tl.constexpr(3 * 0x9E3779B1 % 2**32)
GOLDEN_4 = tl.constexpr(4 * 0x9E3779B1 % 2**32)
MIX_1 = tl.constexpr(0x7FEB352D)
MIX_2 = tl.constexpr(0x846CA68B)
SEED_1 = tl.constexpr(0xBF58476D1CE4E5B9)
SEED_2 = tl.constexpr(0x94D049BB133111EB)


def lane_threshold(p: float) -> int:
    """Smallest kept lane, as a signed 16-bit integer in the upper half of 32 bits; p is honoured to 1/65536."""
    return (round(p * 65536) - 32768) << 16


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by."""
    return 1.0 / (1.0 - p)


@triton.jit
def draw_bits(seed, offs_m, offs_byte, row_bytes, threshold):
    """Packed mask, int32 [BLOCK_M, BLOCK_K / 8], of rows offs_m and columns 8 · offs_byte … + 7 (bit 0 first)."""
    key = seed.to(tl.uint64)
    key = (key ^ (key >> 30)) * SEED_1
    key = (key ^ (key >> 27)) * SEED_2
    key ^= key >> 31
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    rows = offs_m.to(tl.uint32) * tl.cast(row_bytes, tl.uint32) * GOLDEN_4 + low
    first = rows[:, None] + (offs_byte.to(tl.uint32) * GOLDEN_4)[None, :]
    bits = two_lanes(first, high, threshold)
    bits |= two_lanes(first + GOLDEN, high, threshold) << 2
    bits |= two_lanes(first + GOLDEN_2, high, threshold) << 4
    return bits | (two_lanes(first + GOLDEN_3, high, threshold) << 6)


@triton.jit
def two_lanes(x, key, threshold):
    """Hash the counter x and compare both 16-bit lanes with the threshold: bits 0 and 1 of an int32."""
    x = (x ^ (x >> 16)) * MIX_1 + key
    x = (x ^ (x >> 15)) * MIX_2
    x = (x ^ (x >> 16)).to(tl.int32, bitcast=True)
    # A lane in the upper half compares like the lane itself, whatever is below it.
    return ((x << 16) >= threshold).to(tl.int32) | ((x >= threshold).to(tl.int32) << 1)


@triton.jit
def spread_bits(bits, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Packed mask [BLOCK_M, BLOCK_K / 8] -> booleans [BLOCK_M, BLOCK_K]."""
    each = bits.to(tl.int32)[:, :, None] & (1 << tl.arange(0, 8))[None, None, :]
    return tl.reshape(each, (BLOCK_M, BLOCK_K)) != 0
