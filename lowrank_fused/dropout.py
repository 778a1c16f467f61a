"""Dropout masks of the low-rank input: drawn from a counter, stored as bits.

Element (row, column) is kept iff its 16-bit lane of

    mix(seed + golden · (row · words + column // 4)),   words = 2 ⌈K / 8⌉ per row,

read as a signed integer, is at least round(65536 p) − 32768, where `mix` is the finaliser of SplitMix64 (Steele, Lea
and Flood, 2014; constants of Stafford's variant 13). A counter has no state: the mask depends on seed, row and column
alone, so that every route, device and tile shape draws the same one, checkpointing redraws it, and no generator is
touched inside an op. Four lanes come from one word: two 64-bit products for four elements.

Bits are packed as uint8 [M, ⌈K / 8⌉]; bit j of byte i belongs to column 8 i + j, 1 means kept, bits past K are
arbitrary.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_keep", "draw_seed", "pack", "threshold", "unpack", "unpadded"]


def _signed(value: int) -> int:
    """The int64 with the bits of this unsigned 64-bit integer."""
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
# Moves the lowest bit of byte j to bit 56 + j; the other copies fall outside the top byte.
_GATHER_BITS = 0x0102040810204080
_REPEAT_BYTE = 0x0101010101010101
_BIT_OF_BYTE = _signed(0x8040201008040201)


def threshold(p: float) -> int:
    """Smallest kept lane, as a signed 16-bit integer; p is honoured to 1/65536."""
    return round(p * 65536) - 32768


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 [1] from torch's generator of that device: replayed by checkpointing and CUDA graphs."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def draw_keep(seed: Tensor, m: int, k: int, p: float) -> Tensor:
    """The mask of an [m, k] input as booleans [m, 8 ⌈k / 8⌉]; columns past k are arbitrary."""
    words = torch.arange(m * 2 * -(-k // 8), dtype=torch.int64, device=seed.device)
    words.mul_(_signed(GOLDEN)).add_(seed)
    _xor_shift_(words, 30).mul_(_signed(MIX_1))
    _xor_shift_(words, 27).mul_(_signed(MIX_2))
    _xor_shift_(words, 31)
    return (words.view(torch.int16) >= threshold(p)).view(m, -1)


def _xor_shift_(words: Tensor, bits: int) -> Tensor:
    """words ^= words >> bits with zeros shifted in (torch shifts copies of the sign in)."""
    return words.bitwise_xor_((words >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def pack(keep: Tensor) -> Tensor:
    """Booleans [M, 8 n] -> uint8 [M, n]."""
    return ((keep.view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def unpack(bits: Tensor, k: int) -> Tensor:
    """uint8 [M, ⌈k / 8⌉] -> booleans [M, k]."""
    spread = bits.to(torch.int64).mul_(_REPEAT_BYTE).bitwise_and_(_BIT_OF_BYTE)
    return unpadded(spread.view(torch.uint8).ne(0), k)


def unpadded(keep: Tensor, k: int) -> Tensor:
    """The first k columns; the tensor itself when there are no others."""
    return keep if keep.shape[-1] == k else keep[:, :k]
