"""Linears that share x, as one thing to measure: q, k, v or gate, up, by one route for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..benchmark import Case, Operands, check, dtype_name, providers_for
from ..benchmark.accuracy import absolute, double, mask_probe, seeded
from ..benchmark.measure import Contestant
from ..branches import Branch, lowrank_group
from ..linear import lowrank_linear_ref
from ..testing import assert_as_accurate_as_torch

__all__ = ["GroupCase", "GroupOperands", "GroupProvider", "check_group", "judge_of", "provider_of"]


@dataclass(frozen=True)
class GroupCase(Case):
    """Linears of one input, each with an adapter of `rank`; out_features is the sum of `members`, those of each."""

    members: tuple[int, ...] = ()
    what: ClassVar[str] = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(self.members) != self.out_features or self.rank > min(self.members):
            raise ValueError(f"members must sum up to {self.out_features} with room for the rank, got {self.members}")

    def title(self) -> str:
        """As for a layer, every member's size told."""
        sizes = f"{self.in_features} -> {' + '.join(map(str, self.members))}"
        return (
            f"{self.label + ' ' if self.label else ''}{sizes}, {self.tokens} tokens, rank {self.rank} each, "
            f"dropout {self.dropout:g}, {dtype_name(self.dtype)}"
        )


@dataclass
class GroupOperands:
    """Operands of each linear, which hold the same x."""

    parts: list[Operands]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.parts[0].device

    @property
    def dy(self) -> list[Tensor]:
        """Upstream gradients of all."""
        return [part.dy for part in self.parts]

    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken for: x, then every a, then every b."""
        return self.parts[0].x, *(part.a for part in self.parts), *(part.b for part in self.parts)

    def converted(self, convert: Callable[[Operands], Operands]) -> GroupOperands:
        """The operands of every linear converted, x still the same one."""
        parts = [convert(part) for part in self.parts]
        return GroupOperands([replace(part, x=parts[0].x) for part in parts])


@dataclass(frozen=True)
class GroupProvider:
    """`lowrank_group` by the route of this name."""

    name: str
    adapter_dtype: torch.dtype | None = None
    has_adapter: bool = True

    def operands(self, case: GroupCase) -> GroupOperands:
        """As `Operands.random` makes them, every linear from a seed of its own."""
        common = (case.tokens, case.rank, case.dropout, case.dtype, case.device, case.bias)
        parts = [Operands.random(Case(case.in_features, n, *common), None, i) for i, n in enumerate(case.members)]
        return GroupOperands([replace(part, x=parts[0].x) for part in parts])

    def chosen_routes(self, o: GroupOperands, dropout_p: float) -> None:
        """The route is given."""

    def leaves(self, o: GroupOperands) -> tuple[Tensor, ...]:
        """The tensors whose gradients are made."""
        return o.leaves()

    def __call__(self, o: GroupOperands, dropout_p: float) -> Sequence[Tensor]:
        branches = [Branch(part.weight, part.a, part.b, part.bias) for part in o.parts]
        first = o.parts[0]
        return lowrank_group(first.x, branches, scale=first.scale, dropout_p=dropout_p, route=self.name)


def check_group(provider: Any, case: GroupCase) -> None:
    """Raise AssertionError unless all outputs and gradients are as accurate as PyTorch's, by the rule of layers."""
    o = provider.operands(case)
    keep = _mask(provider, o, case.dropout) if case.dropout else None

    def reference(o: GroupOperands, _: float) -> Sequence[Tensor]:
        return [
            lowrank_linear_ref(
                p.x, p.weight, p.a, p.b, scale=p.scale, bias=p.bias, dropout_p=case.dropout, keep=keep
            )  # fmt: skip
            for p in o.parts
        ]

    found = [_values(provider, o, case.dropout)]
    found += [_values(reference, each, 0.0) for each in (o, o.converted(double), o.converted(absolute))]
    for name in found[0]:
        got, plain, exact, magnitude = (values[name] for values in found)
        assert_as_accurate_as_torch(got, plain, exact, name, magnitude)


def _mask(provider: Any, o: GroupOperands, dropout_p: float) -> Tensor:
    """The mask that is drawn, by the gradient of x (see `benchmark.accuracy.recovered_mask`)."""
    probes = o.converted(mask_probe)
    (dx,) = torch.autograd.grad(seeded(provider, probes, dropout_p), probes.leaves()[:1], probes.dy)
    return dx != 0


def _values(
    forward: Callable[[GroupOperands, float], Sequence[Tensor]], o: GroupOperands, dropout_p: float
) -> dict[str, Tensor]:
    """y of every linear and the gradient of every leaf, by name."""
    ys = seeded(forward, o, dropout_p)
    grads = torch.autograd.grad(ys, o.leaves(), [dy.to(y.dtype) for y, dy in zip(ys, o.dy, strict=True)])
    count = len(o.parts)
    names = ["dx", *(f"dA {i}" for i in range(count)), *(f"dB {i}" for i in range(count))]
    outputs = {f"y {i}": y.detach() for i, y in enumerate(ys)}
    return outputs | dict(zip(names, grads, strict=True))


def provider_of(route: str, case: Case) -> Contestant:
    """What computes this case by a route."""
    return GroupProvider(route) if isinstance(case, GroupCase) else providers_for([route], case)[0]


def judge_of(case: Case) -> Callable[[Any, Any], None]:
    """What says whether a provider of this case is accurate."""
    return check_group if isinstance(case, GroupCase) else check
