"""Several linears at once, some of which read one input: their operands, and the gate before their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..linear import lowrank_linear_ref
from ..testing import assert_as_accurate_as_torch
from .accuracy import absolute, double, mask_probe, seeded
from .case import Case, Operands

__all__ = ["LinearsOperands", "LinearsProvider", "check_linears"]


@dataclass
class LinearsOperands:
    """Operands of each linear by name; `reads` names the input of each, and those that read one hold the same x."""

    layers: dict[str, Operands]
    reads: Mapping[str, str]

    @classmethod
    def random(
        cls, layers: Mapping[str, Case], reads: Mapping[str, str], adapter_dtype: torch.dtype | None = None
    ) -> LinearsOperands:
        """As `Operands.random` makes them, every linear from a seed of its own."""
        made = {name: Operands.random(case, adapter_dtype, seed) for seed, (name, case) in enumerate(layers.items())}
        return cls(made, reads)._shared()

    def _shared(self) -> LinearsOperands:
        """Every linear with the x of the first that reads its input."""
        inputs: dict[str, Tensor] = {}
        layers = {name: replace(o, x=inputs.setdefault(self.reads[name], o.x)) for name, o in self.layers.items()}
        return LinearsOperands(layers, self.reads)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(iter(self.layers.values())).device

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Every input once, by name: [tokens, features] each."""
        return {self.reads[name]: o.x for name, o in self.layers.items()}

    @property
    def dy(self) -> list[Tensor]:
        """Upstream gradients in the order of the linears."""
        return [o.dy for o in self.layers.values()]

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken for, by name: inputs, then A and B of every linear."""
        factors = {f"{kind} of {name}": getattr(o, kind) for name, o in self.layers.items() for kind in ("a", "b")}
        return {**self.inputs, **factors}

    def parameters(self) -> list[Tensor]:
        """What exists whether or not a backward follows."""
        return [parameter for o in self.layers.values() for parameter in o.parameters()]

    def converted(self, convert: Callable[[Operands], Operands]) -> LinearsOperands:
        """The operands of every linear converted, inputs shared as here."""
        return LinearsOperands({name: convert(o) for name, o in self.layers.items()}, self.reads)._shared()


class LinearsProvider(Protocol):
    """What computes all of them, from operands that it makes for a case."""

    @property
    def has_adapter(self) -> bool: ...

    def operands(self, case: Any) -> LinearsOperands: ...

    def __call__(self, o: LinearsOperands, dropout_p: float) -> Sequence[Tensor]: ...


def check_linears(provider: LinearsProvider, case: Case) -> None:
    """Raise AssertionError unless all outputs and gradients are as accurate as PyTorch's, by the rule of layers.

    The reference sees, linear by linear, the masks that the provider drew. Frozen linears pass.
    """
    if not provider.has_adapter:
        return
    o = provider.operands(case)
    keep = {name: _mask(provider, o, name, case.dropout) if case.dropout else None for name in o.layers}

    def reference(o: LinearsOperands, _: float) -> Sequence[Tensor]:
        return [
            lowrank_linear_ref(
                p.x, p.weight, p.a, p.b, scale=p.scale, bias=p.bias, dropout_p=case.dropout, keep=keep[name]
            )
            for name, p in o.layers.items()
        ]

    ours = _values(provider, o, case.dropout)
    plain = _values(reference, o, case.dropout)
    exact = _values(reference, o.converted(double), case.dropout)
    magnitude = _values(reference, o.converted(absolute), case.dropout)
    for name, got in ours.items():
        assert_as_accurate_as_torch(got, plain[name], exact[name], name, magnitude[name])


def _mask(provider: LinearsProvider, o: LinearsOperands, wanted: str, dropout_p: float) -> Tensor:
    """The mask of one linear, by the gradient that only its own output sends back (see `accuracy.recovered_mask`)."""
    probes = o.converted(mask_probe)
    dys = [torch.full_like(p.dy, float(name == wanted)) for name, p in probes.layers.items()]
    (dx,) = torch.autograd.grad(seeded(provider, probes, dropout_p), probes.layers[wanted].x, dys)
    return dx != 0


def _values(
    forward: Callable[[LinearsOperands, float], Sequence[Tensor]], o: LinearsOperands, dropout_p: float
) -> dict[str, Tensor]:
    """y of every linear and the gradient of every leaf, by name."""
    ys = seeded(forward, o, dropout_p)
    leaves = o.leaves()
    grads = torch.autograd.grad(ys, list(leaves.values()), [dy.to(y.dtype) for y, dy in zip(ys, o.dy, strict=True)])
    outputs = {f"y of {name}": y.detach() for name, y in zip(o.layers, ys, strict=True)}
    return outputs | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
