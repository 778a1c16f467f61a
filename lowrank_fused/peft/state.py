"""What acceleration adds to a PEFT layer: its settings, factors remembered between steps, and what its calls took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..factors.generated import Generated, evaluated, named

__all__ = ["Settings", "State"]

Factors = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Settings:
    """How calls are computed: `accelerate` explains each."""

    route: str = "auto"
    precision: str = "match"
    dropout: str = "fused"
    methods: tuple[str, ...] | None = None


@dataclass
class State:
    """An attribute of the accelerated layer that no state_dict sees; copies and pickles take it along."""

    path: str
    settings: Settings
    # x and y have that many times the bytes of x, a method that gains later than LoRA counted as having fewer.
    times_x: float
    # (path taken, reason) -> calls since `accelerate`, compiled ones aside
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    generated: dict[str, tuple[Factors, dict[str, Any], Generated]] = field(default_factory=dict)

    def replica(self) -> State:
        """The same settings and counts, with nothing remembered."""
        return State(self.path, self.settings, self.times_x, self.calls)

    def remember(
        self, adapter: str, trains: bool, function: Factors, /, *sources: Tensor, **constants: Any
    ) -> tuple[Tensor, ...]:
        """function(*sources, **constants), evaluated once until a source changes; differentiable.

        Where nothing is trained it is evaluated in every call, as PEFT does: weights are then exchanged through
        `.data` (averages for an evaluation, perturbed weights), which leaves no trace to tell a change by.
        """
        if torch.compiler.is_compiling() or not (trains or torch.is_grad_enabled()):
            if torch.compiler.is_compiling():
                return evaluated(function, *sources, **constants)
            return named(self.path, partial(evaluated, function, **constants), *sources)
        known = self.generated.get(adapter)
        if known is None or known[:2] != (function, constants):
            known = (function, constants, Generated(partial(function, **constants), self.path))
            self.generated[adapter] = known
        return known[2](*sources)
