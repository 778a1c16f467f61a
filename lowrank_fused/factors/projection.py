"""Uni-LoRA's projection P [D, d]: which entry of one short vector fills each of the D elements of all factors.

Row p of P has a single element, n_j^(-1/2) at column j = index[p], where n_j counts the rows that chose j. The index is
balanced, every n_j is ⌊D/d⌋ or one more, and so PᵀP = I for d ≤ D. Two recipes make it from a seed:

`table`      PEFT's: every j ⌊D/d⌋ times, D mod d drawn ones once more, and one shuffle, by NumPy's default generator.
             NumPy does not promise that this stream stays the same, so before the first table is made two short ones
             are compared with known values: another stream raises and is never taken for the old one.
`bijection`  index[p] = π(p) mod d, with a permutation π of [0, D) that is computed wherever it is needed and never
             stored: a Feistel network over ⌈D/C⌉ rows of C = ⌈√D⌉ columns that is applied again to what leaves [0, D)
             (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains"). With x = row · C + column, round i adds
             to the row a hash of the column (i even), or to the column a hash of the row (i odd), modulo their number:

    h = (8 v + i) · 0x9E3779B1 + key_low          key_low, key_high = halves of splitmix64(seed)
    h = (h ^ h >> 16) · 0x7FEB352D + key_high
    h = (h ^ h >> 15) · 0x846CA68B
    h = (h ^ h >> 16) · size >> 32                (multipliers: Wellons, "lowbias32")
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..errors import UnsupportedError

__all__ = ["INDICES", "MAX_TOTAL", "Permutation", "Projection", "projection"]

INDICES = ("table", "bijection")
# Positions are 32-bit integers wherever they are stored.
MAX_TOTAL = 2**31 - 1

_ROUNDS = 6
_LOW = 0xFFFFFFFF
# (D, d, seed) -> CRC-32 of PEFT's index as 32-bit integers; of these d NumPy draws the extra entries in different ways.
_KNOWN_TABLES = {(1000, 37, 42): 0xE3DB3B29, (30011, 20003, 3): 0x4D996621}


class Permutation(NamedTuple):
    """The numbers that make π: a Feistel network over rows · columns ≥ total cells; keys are signed 32-bit integers."""

    total: int
    rows: int
    columns: int
    key_low: int
    key_high: int

    @classmethod
    def seeded(cls, total: int, seed: int) -> Permutation:
        """π of [0, total) for a seed from 0 to 2^64 - 1."""
        columns = math.isqrt(max(total - 1, 0)) + 1
        key = _splitmix64(seed)
        return cls(total, -(-total // columns), columns, _signed(key & _LOW), _signed(key >> 32))

    def __call__(self, x: Tensor) -> Tensor:
        """π(x) for int64 x in [0, total)."""
        return self._walk(x, self._cross)

    def inverse(self, x: Tensor) -> Tensor:
        """π⁻¹(x) for int64 x in [0, total)."""
        return self._walk(x, self._cross_back)

    def _walk(self, x: Tensor, cross: Callable[[Tensor], Tensor]) -> Tensor:
        x = cross(x)
        while (outside := x >= self.total).any():
            x[outside] = cross(x[outside])
        return x

    def _cross(self, x: Tensor) -> Tensor:
        row, column = x // self.columns, x % self.columns
        for i in range(0, _ROUNDS, 2):
            row = (row + self._hash(column, i, self.rows)) % self.rows
            column = (column + self._hash(row, i + 1, self.columns)) % self.columns
        return row * self.columns + column

    def _cross_back(self, x: Tensor) -> Tensor:
        row, column = x // self.columns, x % self.columns
        for i in range(_ROUNDS - 2, -1, -2):
            column = (column - self._hash(row, i + 1, self.columns)) % self.columns
            row = (row - self._hash(column, i, self.rows)) % self.rows
        return row * self.columns + column

    def _hash(self, v: Tensor, i: int, size: int) -> Tensor:
        """A number below `size`; products overflow 64 bits, and their lower half is what it should be."""
        h = ((8 * v + i) * 0x9E3779B1 + self.key_low) & _LOW
        h = ((h ^ (h >> 16)) * 0x7FEB352D + self.key_high) & _LOW
        h = ((h ^ (h >> 15)) * 0x846CA68B) & _LOW
        return ((h ^ (h >> 16)) * size) >> 32


class Projection:
    """P for D = `total` elements and d = `length` entries; made by `projection`, one object for equal numbers.

    What is derived from the numbers is made when first asked for and kept for every device that asked. Copies and
    pickles hold the numbers alone.
    """

    def __init__(self, total: int, length: int, seed: int, index: str) -> None:
        self.total, self.length, self.seed, self.index = total, length, seed, index
        self._made: dict[tuple, Any] = {}

    def __reduce__(self) -> tuple:
        return projection, (self.total, self.length, self.seed, self.index)

    def __deepcopy__(self, memo: dict[int, Any]) -> Projection:
        return self

    def __repr__(self) -> str:
        return f"P[{self.total}, {self.length}] by {self.index}, seed {self.seed}"

    @property
    def permutation(self) -> Permutation:
        """π of the bijection."""
        return self._once(("permutation",), lambda: Permutation.seeded(self.total, self.seed))

    def table(self, device: torch.device) -> Tensor:
        """The stored index [D]: uint16 for d ≤ 65536, else int32."""
        return self._once(("table", device), lambda: _peft_index(self.total, self.length, self.seed).to(device))

    def entries(self, first: int, count: int, device: torch.device) -> Tensor:
        """index[first : first + count] as int32 (table) or int64 (bijection)."""
        if self.index == "table":
            return self.table(device)[first : first + count].to(torch.int32)
        positions = torch.arange(first, first + count, device=device)
        return torch.cat([self.permutation(some) for some in positions.split(2**18)] or [positions]) % self.length

    def counts(self, device: torch.device) -> Tensor:
        """n [d], int64: how often each entry is used."""
        base, rest = divmod(self.total, self.length)
        if self.index == "bijection" or not rest:
            return base + (torch.arange(self.length, device=device) < rest).long()
        return torch.bincount(self.table(device).to(torch.int32), minlength=self.length)

    def scale(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """n^(-1/2) [d] in `dtype`, 0 where an entry is not used (d > D)."""

        def make() -> Tensor:
            counts = self.counts(device)
            return torch.where(counts > 0, counts.double().rsqrt(), 0.0).to(dtype)

        return self._once(("scale", device, dtype), make)

    def segments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The table inverted, as int32: positions [D] ordered by their entry, and where each entry's start [d + 1]."""

        def make() -> tuple[Tensor, Tensor]:
            order = self.table(device).to(torch.int32).argsort(stable=True).to(torch.int32)
            starts = torch.zeros(self.length + 1, dtype=torch.int32, device=device)
            starts[1:] = self.counts(device).cumsum(0)
            return order, starts

        return self._once(("segments", device), make)

    def kept_bytes(self) -> int:
        """Bytes of everything that is kept at the moment."""
        kept = [one for value in self._made.values() for one in (value if type(value) is tuple else (value,))]
        return sum(tensor.nbytes for tensor in kept if isinstance(tensor, Tensor))

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if self.total > MAX_TOTAL:
            raise ValueError(f"all factors have {self.total:,} elements, {MAX_TOTAL:,} are possible: adapt less")
        if key not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = make()
        return self._made[key]


_PROJECTIONS: WeakValueDictionary[tuple, Projection] = WeakValueDictionary()


def projection(total: int, length: int, seed: int, index: str) -> Projection:
    """The projection of these numbers. While somebody holds it, everybody gets the same one with what it has made.

    Raises ValueError for a recipe that is not known; more than `MAX_TOTAL` elements are refused where P is used.
    """
    if index not in INDICES:
        raise ValueError(f"index must be one of {', '.join(INDICES)}, got {index!r}")
    key = (total, length, seed, index)
    found = _PROJECTIONS.get(key)
    if found is None:
        found = _PROJECTIONS[key] = Projection(*key)
    return found


def _peft_index(total: int, length: int, seed: int) -> Tensor:
    _check_stream()
    index = _shuffled(total, length, seed)
    return torch.from_numpy(index)


def _shuffled(total: int, length: int, seed: int) -> Any:
    """PEFT's index as a NumPy array; what the generator draws does not depend on the integers' width."""
    import numpy as np

    draw = np.random.default_rng(seed)
    dtype = np.uint16 if length <= 65536 else np.int32
    base, rest = divmod(total, length)
    index = np.repeat(np.arange(length, dtype=dtype), base)
    if rest:
        index = np.concatenate([index, draw.choice(length, size=rest, replace=False).astype(dtype)])
    draw.shuffle(index)
    return index


@cache
def _check_stream() -> None:
    """UnsupportedError if this NumPy draws other indices than PEFT's files were trained with."""
    import numpy as np

    for numbers, known in _KNOWN_TABLES.items():
        if zlib.crc32(_shuffled(*numbers).astype("<i4").tobytes()) != known:
            raise UnsupportedError(
                f"NumPy {np.__version__} shuffles differently from the versions that Uni-LoRA's indices are known for "
                "(1.26 to 2.4): adapters would be read with wrong indices; install one of these, or use "
                "index='bijection' for a new adapter"
            )


def _splitmix64(seed: int) -> int:
    z = (seed + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def _signed(value: int) -> int:
    """The signed 32-bit integer with the same bits."""
    return value - 2**32 if value >= 2**31 else value
