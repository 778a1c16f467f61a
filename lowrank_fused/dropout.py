"""Dropout masks of the low-rank input: drawn from a counter, stored as bits.

Columns 2 j and 2 j + 1 of a row share one 32-bit hash, whose lower and upper half are their lanes:

    counter = row · 4 ⌈K / 8⌉ + j          key_low, key_high = halves of splitmix64(seed)
    h = counter · 0x9E3779B1 + key_low
    h = (h ^ h >> 16) · 0x7FEB352D + key_high
    h = (h ^ h >> 15) · 0x846CA68B
    h =  h ^ h >> 16                        (multipliers: Wellons, "lowbias32")

An element is kept iff its lane, read as a signed 16-bit integer, is at least round(65536 p) − 32768. A counter has no
state: the mask depends on seed, row and column alone, so that every route, device and tile shape draws the same one,
checkpointing redraws it, and no generator is touched inside an op. Two 32-bit products serve two elements, about what
seven rounds of Philox cost.

Bits are packed as uint8 [M, ⌈K / 8⌉]; bit j of byte i belongs to column 8 i + j, 1 means kept, bits past K are
arbitrary.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "draw_keep",
    "draw_seed",
    "keep_of",
    "pack",
    "pack_any",
    "rows_at_a_time",
    "threshold",
    "unpack",
    "unpadded",
    "zero_dropped",
]


def _signed(value: int, bits: int) -> int:
    """The signed integer with the same bits as this unsigned one."""
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN, _MIX_1, _MIX_2 = (_signed(c, 32) for c in (0x9E3779B1, 0x7FEB352D, 0x846CA68B))
_SEED_1, _SEED_2 = (_signed(c, 64) for c in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# Moves the lowest bit of byte j to bit 56 + j; the other copies fall outside the top byte.
_GATHER_BITS = 0x0102040810204080
_REPEAT_BYTE = 0x0101010101010101
_BIT_OF_BYTE = _signed(0x8040201008040201, 64)
_SEVEN_BITS = 0x7F7F7F7F7F7F7F7F
_ELEMENTS_AT_A_TIME = 1 << 19
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def threshold(p: float) -> int:
    """Smallest kept lane, as a signed 16-bit integer; p is honoured to 1/65536."""
    return round(p * 65536) - 32768


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 [1] from torch's generator of that device: replayed by checkpointing and CUDA graphs."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def draw_keep(seed: Tensor, m: int, k: int, p: float) -> Tensor:
    """The mask of an [m, k] input as booleans [m, 8 ⌈k / 8⌉]; columns past k are arbitrary."""
    words = 4 * -(-k // 8)
    key = seed.clone()
    _xor_shift_(key, 30).mul_(_SEED_1)
    _xor_shift_(key, 27).mul_(_SEED_2)
    low, high = _xor_shift_(key, 31).view(torch.int32)
    rows = (torch.arange(m, device=seed.device) * words).to(torch.int32).mul_(_GOLDEN).add_(low)
    columns = torch.arange(words, dtype=torch.int32, device=seed.device).mul_(_GOLDEN)
    keep = torch.empty(m, 2 * words, dtype=torch.bool, device=seed.device)
    step = rows_at_a_time(keep)
    for some, kept in zip(rows.split(step), keep.split(step), strict=True):
        h = some[:, None] + columns
        _xor_shift_(h, 16).mul_(_MIX_1).add_(high)
        _xor_shift_(h, 15).mul_(_MIX_2)
        _xor_shift_(h, 16)
        torch.ge(h.view(torch.int16), threshold(p), out=kept)
    return keep


def keep_of(source: Tensor, m: int, k: int, p: float) -> Tensor:
    """The mask of an [m, k] input as booleans, at least k columns: drawn from a seed, or read from packed bits."""
    return unpack(source, k) if source.dtype == torch.uint8 else draw_keep(source, m, k, p)


def rows_at_a_time(t: Tensor) -> int:
    """How many rows to send through several passes: on a CPU what its caches hold, elsewhere all."""
    m, k = t.shape
    return max(1, _ELEMENTS_AT_A_TIME // max(1, k) if t.device.type == "cpu" else m)


def _xor_shift_(h: Tensor, by: int) -> Tensor:
    """h ^= h >> by with zeros shifted in (torch shifts copies of the sign in)."""
    bits = 8 * h.element_size()
    return h.bitwise_xor_((h >> by).bitwise_and_((1 << (bits - by)) - 1))


def pack(keep: Tensor) -> Tensor:
    """Booleans [M, 8 n] -> uint8 [M, n]."""
    return ((keep.view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def pack_any(keep: Tensor) -> Tensor:
    """Booleans [..., K], any strides and any K -> uint8 [M, ⌈K / 8⌉]."""
    rows = keep.reshape(-1, keep.shape[-1])
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 8))
    return pack(rows.contiguous())


def unpack(bits: Tensor, k: int) -> Tensor:
    """uint8 [M, ⌈k / 8⌉] -> booleans [M, k]."""
    words = bits.to(torch.int64).mul_(_REPEAT_BYTE).bitwise_and_(_BIT_OF_BYTE)
    # Every byte is now 0 or a power of two: adding 127 carries any of these into its top bit and no further.
    words = words.add_(_SEVEN_BITS).bitwise_right_shift_(7).bitwise_and_(_REPEAT_BYTE)
    return unpadded(words.view(torch.bool), k)


def unpadded(keep: Tensor, k: int) -> Tensor:
    """The first k columns; the tensor itself when there are no others."""
    return keep if keep.shape[-1] == k else keep[:, :k]


def zero_dropped(x: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
    """x where kept, 0 elsewhere, for x [M, K] and booleans [M, K] or wider; `out` may be x.

    An AND on the bit patterns: a product of float and bool converts element by element and takes six times as long.
    """
    integer = _INTEGER_OF_SIZE[x.element_size()]
    out = torch.empty_like(x) if out is None else out
    keep = unpadded(keep, x.shape[1])
    step = rows_at_a_time(x)
    for some, kept, into in zip(x.split(step), keep.split(step), out.split(step), strict=True):
        ones = kept.view(torch.int8).to(integer).neg_()
        torch.bitwise_and(ones, some.view(integer), out=into.view(integer))
    return out
