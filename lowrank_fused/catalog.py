"""What can be said of a method without a weight: read off its `init` and `terms` on the meta device."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from . import methods
from .terms import core_kind

__all__ = ["MethodCard", "count_parameters", "describe"]


@dataclass(frozen=True)
class MethodCard:
    """One method with its default options, for tables.

    `summary` is the first line of its documentation, `trained` and `frozen` its tensors with their shapes in
    letters, `core` the kind of core the engine is given. `keeps_input`: whether backward needs x, that is
    whether A is trained; if not, s [tokens, r] is all that is kept of it.
    """

    name: str
    summary: str
    formula: str
    trained: dict[str, str]
    frozen: dict[str, str]
    options: dict[str, Any]
    core: str
    keeps_input: bool
    mergeable: bool


def count_parameters(
    name: str,
    in_features: int,
    out_features: int,
    rank: int | None = None,
    alpha: float | None = None,
    **options: Any,
) -> int:
    """Trained elements that a method adds to one linear layer standing alone."""
    weight = torch.empty(out_features, in_features, device="meta")
    start = methods.init(name, weight, *methods.resolve(name, rank, alpha), **options)
    return sum(tensor.numel() for tensor in start.parameters.values())


def describe(name: str, **options: Any) -> MethodCard:
    """The card of a method, with options other than the defaults if any are given."""
    letters = {6: "r", 1009: "in", 2003: "out"}
    weight = torch.empty(2003, 1009, device="meta")
    start = methods.init(name, weight, *methods.resolve(name, 6), **options)
    leaves = {key: torch.nn.Parameter(value) for key, value in start.parameters.items()}
    p = SimpleNamespace(**leaves, **start.frozen, **start.constants)
    terms = methods.get(name).terms(p, weight, weight.new_empty(0, 1009))

    def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        return {k: "[" + ", ".join(letters.get(n, str(n)) for n in t.shape) + "]" for k, t in tensors.items()}

    kind = core_kind(terms.core)
    return MethodCard(
        name=name,
        summary=(sys.modules[methods.get(name).__module__].__doc__ or name).strip().splitlines()[0],
        formula=methods.get(name).formula,
        trained=shapes(start.parameters),
        frozen=shapes(start.frozen),
        options=methods.options(name) | options,
        core=kind,
        keeps_input=terms.a.requires_grad,
        mergeable=kind != "gate",
    )
