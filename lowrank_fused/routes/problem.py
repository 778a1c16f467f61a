"""What passes between the autograd Function, the ops and the routes, besides the operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = ["NOWHERE", "Grads", "GroupGrads", "GroupOptions", "GroupRoute", "Into", "Options", "Route", "Saved"]


class Options(NamedTuple):
    """The non-tensor side of a call. `wants_*` say which gradients are asked for."""

    scale: float
    core_kind: str
    dropout_p: float
    wants_x: bool
    wants_a: bool
    wants_b: bool
    wants_core: bool
    wants_bias: bool

    @property
    def wants(self) -> tuple[bool, ...]:
        """Which gradients are asked for, in the order x, a, b, core, bias."""
        return self[3:]

    @property
    def keep_scale(self) -> float:
        """What an element that dropout keeps is multiplied by."""
        return 1.0 / (1.0 - self.dropout_p)

    @property
    def keeps_x(self) -> bool:
        """x is needed again only for dA."""
        return self.wants_a

    @property
    def keeps_s(self) -> bool:
        """s is needed again for dB and the core's gradient."""
        return self.wants_b or self.wants_core

    @property
    def keeps_mask(self) -> bool:
        """Bits are needed again for dA and dx."""
        return self.wants_a or self.wants_x


class GroupOptions(NamedTuple):
    """The same for linears that share x; `ranks` are the columns of s that belong to each."""

    scale: float
    dropout_p: float
    ranks: tuple[slice, ...]
    wants_x: bool
    wants_a: tuple[bool, ...]
    wants_b: tuple[bool, ...]
    wants_bias: tuple[bool, ...]

    @property
    def keep_scale(self) -> float:
        """What an element that dropout keeps is multiplied by."""
        return 1.0 / (1.0 - self.dropout_p)

    @property
    def keeps_mask(self) -> bool:
        """Bits are needed again for dA and dx."""
        return bool(self.dropout_p) and (self.wants_x or any(self.wants_a))


class Saved(NamedTuple):
    """What a forward pass computed and its backward needs: s [M, Ra] and the packed mask [M, ⌈K / 8⌉]."""

    s: Tensor | None
    mask: Tensor | None


class Into(NamedTuple):
    """Where gradients of the factors may be written: contiguous tensors in their shapes and dtypes, or None."""

    a: Tensor | None
    b: Tensor | None


NOWHERE = Into(None, None)


@dataclass
class Grads:
    """Gradients of one backward pass; None where not asked for."""

    x: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    core: Tensor | None = None
    bias: Tensor | None = None


@dataclass
class GroupGrads:
    """Gradients of linears that share x: one each for b and bias, one for x, one [ΣR, K] for the A's; see `Grads`."""

    b: list[Tensor | None]
    bias: list[Tensor | None]
    x: Tensor | None = None
    a: Tensor | None = None


class Route(Protocol):
    """Forward and backward of the engine on x [M, K] and dy [M, N]; every route keeps and returns the same."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        core: Tensor | None,
        bias: Tensor | None,
        drop: Tensor | None,
        o: Options,
    ) -> tuple[Tensor, Saved]:
        """y [M, N] and what backward needs; `drop` is the mask's seed, its packed bits, or None without dropout."""

    def add_forward(
        self,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        core: Tensor | None,
        drop: Tensor | None,
        o: Options,
    ) -> Saved:
        """y += scale · core(drop(x) Aᵀ) Bᵀ in place, and what backward needs."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        a: Tensor,
        b: Tensor,
        core: Tensor | None,
        saved: Saved,
        o: Options,
        into: Into = NOWHERE,
    ) -> Grads:
        """The gradients that `o` asks for; x, saved.s and saved.mask are None where `o` does not keep them.

        Without a weight dx is that of the low-rank part alone. A route may leave `into` unused.
        """


class GroupRoute(Protocol):
    """Forward and backward of several linears on one x [M, K], with one of everything else for each."""

    def group_forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        drop: Tensor | None,
        o: GroupOptions,
    ) -> tuple[list[Tensor], Saved]:
        """Every y [M, N], and what backward needs: s [M, ΣR] and one mask."""

    def group_backward(
        self,
        dys: Sequence[Tensor],
        x: Tensor | None,
        weights: Sequence[Tensor],
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        saved: Saved,
        o: GroupOptions,
    ) -> GroupGrads:
        """The gradients that `o` asks for."""
