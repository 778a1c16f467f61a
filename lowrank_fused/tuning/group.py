"""Linears that share x, as one thing to measure: q, k, v or gate, up, by one route for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..benchmark import Case, check, dtype_name, providers_for
from ..benchmark.linears import LinearsOperands, check_linears
from ..benchmark.measure import Contestant
from ..branches import Branch, lowrank_group

__all__ = ["GroupCase", "GroupProvider", "judge_of", "provider_of"]


@dataclass(frozen=True)
class GroupCase(Case):
    """Linears of one input, each with an adapter of `rank`; out_features is the sum of `members`, those of each."""

    members: tuple[int, ...] = ()
    what: ClassVar[str] = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(self.members) != self.out_features or self.rank > min(self.members):
            raise ValueError(f"members must sum up to {self.out_features} with room for the rank, got {self.members}")

    def layers(self) -> dict[str, Case]:
        """Each linear, by its number."""
        common = (self.tokens, self.rank, self.dropout, self.dtype, self.device, self.bias)
        return {str(i): Case(self.in_features, n, *common) for i, n in enumerate(self.members)}

    def title(self) -> str:
        """As for a layer, every member's size told."""
        sizes = f"{self.in_features} -> {' + '.join(map(str, self.members))}"
        return (
            f"{self.label + ' ' if self.label else ''}{sizes}, {self.tokens} tokens, rank {self.rank} each, "
            f"dropout {self.dropout:g}, {dtype_name(self.dtype)}"
        )


@dataclass(frozen=True)
class GroupProvider:
    """`lowrank_group` by the route of this name."""

    name: str
    adapter_dtype: torch.dtype | None = None
    has_adapter: bool = True

    def operands(self, case: GroupCase) -> LinearsOperands:
        """Random operands of this case."""
        layers = case.layers()
        return LinearsOperands.random(layers, dict.fromkeys(layers, "x"))

    def chosen_routes(self, o: LinearsOperands, dropout_p: float) -> None:
        """The route is given."""

    def leaves(self, o: LinearsOperands) -> tuple[Tensor, ...]:
        """The tensors whose gradients are made."""
        return tuple(o.leaves().values())

    def __call__(self, o: LinearsOperands, dropout_p: float) -> Sequence[Tensor]:
        first, *_ = parts = list(o.layers.values())
        branches = [Branch(part.weight, part.a, part.b, part.bias) for part in parts]
        return lowrank_group(first.x, branches, scale=first.scale, dropout_p=dropout_p, route=self.name)


def provider_of(route: str, case: Case) -> Contestant:
    """What computes this case by a route."""
    return GroupProvider(route) if isinstance(case, GroupCase) else providers_for([route], case)[0]


def judge_of(case: Case) -> Callable[[Any, Any], None]:
    """What says whether a provider of this case is accurate."""
    return check_linears if isinstance(case, GroupCase) else check
