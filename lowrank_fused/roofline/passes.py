"""What a kernel does, counted: bytes it reads and writes, FLOPs, and which rate limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..tools.model_shapes import LinearShape

__all__ = ["Pass", "Setting", "Step", "Tensors"]

ELEMENT = 2  # bytes of a bf16 value

# Library products and PyTorch's own passes; products of Triton, which run at e of the library's rate; thin kernels,
# which run at a share of the bandwidth.
Kind = Literal["library", "product", "thin"]


@dataclass(frozen=True)
class Setting:
    """Tokens, rank of every adapter, dropout probability, and the compute capability that tiles are chosen for."""

    tokens: int = 8192
    rank: int = 16
    dropout: float = 0.0
    arch: int = 90

    def __post_init__(self) -> None:
        for name in ("tokens", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


@dataclass(frozen=True)
class Pass:
    """One kernel launch. Every tensor counts once for reading and once for writing, however often tiles meet it.

    `scratch` are those of the bytes that are partial sums, written and read again by the same launch. `again` is work
    besides the FLOPs that every block of a result does for itself, as FLOPs that take as long. `adds` marks a library
    product that adds to what its output held before (beta = 1).
    """

    name: str
    tensors: str
    bytes_read: int
    bytes_written: int
    flops: int
    kind: Kind = "library"
    scratch: int = 0
    again: int = 0
    adds: bool = False

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written


class Step(NamedTuple):
    """The launches of one forward and one backward pass, in order."""

    forward: Sequence[Pass]
    backward: Sequence[Pass]


@dataclass(frozen=True)
class Tensors:
    """The tensors of one linear layer with an adapter by name, and passes over them.

    x and its like are [M, K], y and its like [M, N], s and ds [M, R]; names that end in 32 are fp32, `keep` is a mask
    of one byte an element.
    """

    m: int
    n: int
    k: int
    r: int
    sizes: dict[str, int] = field(init=False, repr=False, hash=False, compare=False)

    def __post_init__(self) -> None:
        mk, mn, mr = self.m * self.k, self.m * self.n, self.m * self.r
        elements = dict.fromkeys(("x", "dropped", "dx", "dx0", "dxW"), mk)
        elements |= dict.fromkeys(("y", "y0", "u", "su", "dy", "du"), mn)
        elements |= {"s": mr, "ds": mr, "W": self.n * self.k}
        elements |= dict.fromkeys(("A", "dA"), self.r * self.k) | dict.fromkeys(("B", "dB"), self.n * self.r)
        sizes = {name: ELEMENT * count for name, count in elements.items()}
        sizes |= {f"{name}32": 2 * sizes[name] for name in ("x", "dropped", "dx0", "A", "B", "dA", "dB", "ds")}
        object.__setattr__(self, "sizes", {**sizes, "keep": mk})

    @classmethod
    def of(cls, linear: LinearShape, setting: Setting) -> Tensors:
        """Those of this layer."""
        return cls(setting.tokens, linear.out_features, linear.in_features, setting.rank)

    def does(self, name: str, reads: str, writes: str, flops: int = 0) -> Pass:
        """A pass of the library: names of the tensors it reads and writes, with spaces between them."""
        read, written = (sum(self.sizes[tensor] for tensor in names.split()) for names in (reads, writes))
        return Pass(name, f"{reads.replace(' ', ', ')} -> {writes.replace(' ', ', ')}", read, written, flops)

    @property
    def main(self) -> int:
        """FLOPs of x Wᵀ, and of dy W."""
        return 2 * self.m * self.n * self.k

    @property
    def down(self) -> int:
        """FLOPs of a product between x or dx and A."""
        return 2 * self.m * self.k * self.r

    @property
    def up(self) -> int:
        """FLOPs of a product between y or dy and B."""
        return 2 * self.m * self.n * self.r
