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


_GOLDEN = 0x9E3779B1
_SEED_1, _SEED_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ELEMENTS_AT_A_TIME = 1 << 19
_FEW_ELEMENTS = 1 << 14
# Counters of a block are made by an `arange` of 32 bits.
_MOST_COUNTERS = 1 << 30
# Moves the lowest bit of byte j to bit 56 + j; the other copies fall outside the top byte.
_GATHER_BITS = 0x0102040810204080
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _constant(value: int, bits: int) -> Tensor:
    """A number as a tensor, which every device takes as one: a Python number would be made into one at every call."""
    return torch.tensor(_signed(value, bits), dtype=_INTEGER_OF_SIZE[bits // 8], device="cpu")


_STEP, _MIX_1, _MIX_2 = (_constant(c, 32) for c in (_GOLDEN, 0x7FEB352D, 0x846CA68B))
# Shifts, each with what to keep of the result: torch shifts copies of the sign in.
_BY_16, _LOWER_16, _BY_15, _LOWER_17 = (_constant(c, 32) for c in (16, 0xFFFF, 15, 0x1FFFF))
_REPEAT_BYTE, _BIT_OF_BYTE = (_constant(c, 64) for c in (0x0101010101010101, 0x8040201008040201))


def threshold(p: float) -> int:
    """Smallest kept lane, as a signed 16-bit integer; p is honoured to 1/65536."""
    return round(p * 65536) - 32768


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 [1] from torch's generator of that device: replayed by checkpointing and CUDA graphs."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def draw_keep(seed: Tensor, m: int, k: int, p: float) -> Tensor:
    """The mask of an [m, k] input as booleans [m, 8 ⌈k / 8⌉]; columns past k are arbitrary."""
    words = 4 * -(-k // 8)
    total = m * words
    block = min(total, _ELEMENTS_AT_A_TIME // 2 if seed.device.type == "cpu" else _MOST_COUNTERS)
    low, high = _key(seed)
    h = torch.arange(block, dtype=torch.int32, device=seed.device).mul_(_STEP).add_(low)
    if block == total:
        return _kept_lanes_(h, high, p).to(torch.bool).view(m, 2 * words)
    keep = torch.empty(2 * total, dtype=torch.bool, device=seed.device)
    for first in range(0, total, block):
        kept = keep[2 * first : 2 * (first + block)]
        later = h[: kept.shape[0] // 2] + _signed(first * _GOLDEN % 2**32, 32)
        kept.copy_(_kept_lanes_(later, high, p))
    return keep.view(m, 2 * words)


def _key(seed: Tensor) -> tuple[Tensor, ...]:
    """The lower and the upper half of splitmix64(seed), int32; of a seed on a CPU outside of torch, which is faster."""
    if seed.device.type != "cpu" or type(seed) is not Tensor or torch.compiler.is_compiling():
        key = seed.clone()
        _xor_shift_64_(key, 30).mul_(_signed(_SEED_1, 64))
        _xor_shift_64_(key, 27).mul_(_signed(_SEED_2, 64))
        return _xor_shift_64_(key, 31).view(torch.int32).unbind()
    z = int(seed) % 2**64
    z = (z ^ z >> 30) * _SEED_1 % 2**64
    z = (z ^ z >> 27) * _SEED_2 % 2**64
    z ^= z >> 31
    return tuple(torch.full((), _signed(half, 32), dtype=torch.int32, device="cpu") for half in (z % 2**32, z >> 32))


def _xor_shift_64_(h: Tensor, by: int) -> Tensor:
    """h ^= h >> by with zeros shifted in (torch shifts copies of the sign in)."""
    return h.bitwise_xor_((h >> by).bitwise_and_((1 << (64 - by)) - 1))


def _kept_lanes_(h: Tensor, high: Tensor, p: float) -> Tensor:
    """The lanes of h = counter · 0x9E3779B1 + key_low, overwritten with 1 where they are kept and 0 elsewhere."""
    h.bitwise_xor_((h >> _BY_16).bitwise_and_(_LOWER_16)).mul_(_MIX_1).add_(high)
    h.bitwise_xor_((h >> _BY_15).bitwise_and_(_LOWER_17)).mul_(_MIX_2)
    h.bitwise_xor_((h >> _BY_16).bitwise_and_(_LOWER_16))
    # In place: a comparison that writes booleans takes four times as long.
    return h.view(torch.int16).ge_(threshold(p))


def keep_of(source: Tensor, m: int, k: int, p: float) -> Tensor:
    """The mask of an [m, k] input as booleans, at least k columns: drawn from a seed, or read from packed bits."""
    return unpack(source, k) if source.dtype == torch.uint8 else draw_keep(source, m, k, p)


def rows_at_a_time(t: Tensor) -> int:
    """How many rows to send through several passes: on a CPU what its caches hold, elsewhere all."""
    m, k = t.shape
    return max(1, _ELEMENTS_AT_A_TIME // max(1, k) if t.device.type == "cpu" else m)


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
    return unpadded(words.view(torch.uint8).to(torch.bool), k)


def unpadded(keep: Tensor, k: int) -> Tensor:
    """The first k columns; the tensor itself when there are no others."""
    return keep if keep.shape[-1] == k else keep[:, :k]


def zero_dropped(x: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
    """x where kept, 0 elsewhere, for x [M, K] and booleans [M, K] or wider; `out` may be x.

    An AND on the bit patterns, except for so few elements that the number of operations decides: a product of float and
    bool converts element by element and takes six times as long, a choice four times.
    """
    out = torch.empty_like(x) if out is None else out
    keep = unpadded(keep, x.shape[1])
    if x.numel() <= _FEW_ELEMENTS:
        return torch.where(keep, x, x.new_zeros(()), out=out)
    integer = _INTEGER_OF_SIZE[x.element_size()]
    step = rows_at_a_time(x)
    for some, kept, into in zip(x.split(step), keep.split(step), out.split(step), strict=True):
        ones = kept.view(torch.int8).to(integer).neg_()
        torch.bitwise_and(ones, some.view(integer), out=into.view(integer))
    return out
