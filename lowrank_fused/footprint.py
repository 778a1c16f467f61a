"""What a method costs: parameters that train in a model, and bytes kept for backward. Counted, not quoted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import methods
from .benchmark import kept_bytes
from .config import AdapterConfig
from .inject import inject
from .layers import LowRankLinear
from .model_shapes import build, target_modules
from .parameters import trainable_parameters

__all__ = ["KeptBytes", "MethodFacts", "ModelCount", "count_in_model", "kept_per_token", "method_facts"]

# Sizes that cannot be mistaken for one another when they turn up in a shape.
IN, OUT, RANK = 64, 40, 8


@dataclass(frozen=True)
class KeptBytes:
    """Bytes a layer keeps per token: per_in · in_features + per_rank · rank."""

    per_in: float
    per_rank: float

    def at(self, in_features: int, rank: int) -> float:
        """Bytes per token of a layer of this size."""
        return self.per_in * in_features + self.per_rank * rank

    def __str__(self) -> str:
        parts = [f"{factor:g}·{what}" for factor, what in ((self.per_in, "in"), (self.per_rank, "r")) if factor]
        return " + ".join(parts) or "0"


@dataclass(frozen=True)
class MethodFacts:
    """A row of `lowrank-fused methods`. `kept` and `kept_with_dropout` are of a 16-bit layer."""

    name: str
    formula: str
    trained: dict[str, str]
    default_rank: int
    options: dict[str, Any]
    kept: KeptBytes
    kept_with_dropout: KeptBytes


@dataclass(frozen=True)
class ModelCount:
    """Parameters that train when a method sits on some linears of a model."""

    method: str
    model: str
    targets: str
    rank: int
    layers: int
    trainable: int
    base: int


def count_in_model(
    model: str, method: str, targets: str = "all", rank: int | None = None, **options: Any
) -> ModelCount:
    """Inject the method into the named model, built on the meta device, and count what trains.

    `targets` as in `model_shapes.target_modules`; `rank` None is the method's default. Raises ValueError or
    TypeError for an unknown model, method, target or option.
    """
    built = build(model)
    chosen, _ = methods.resolve(method, rank)
    config = AdapterConfig(method=method, r=chosen, target_modules=target_modules(built, targets), **options)
    report = trainable_parameters(inject(built, config))
    return ModelCount(method, model, targets, chosen, report.rows[0].layers, report.trainable, report.base)


def method_facts(name: str) -> MethodFacts:
    """Formula, trained tensors and kept bytes of a method, the latter two read off a small layer."""
    method = methods.get(name)
    layer = _layer(name, IN, RANK, 0.0, torch.float32)
    letters = {IN: "in", OUT: "out", RANK: "r"}
    shapes = {
        tensor: f"[{', '.join(letters.get(size, str(size)) for size in getattr(layer, tensor).shape)}]"
        for tensor in layer.trained_names
    }
    return MethodFacts(
        name=name,
        formula=method.formula,
        trained=shapes,
        default_rank=methods.resolve(name)[0],
        options=methods.options(name),
        kept=kept_per_token(name),
        kept_with_dropout=kept_per_token(name, dropout=0.1),
    )


def kept_per_token(name: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> KeptBytes:
    """Measure small layers of one method and solve for the two factors.

    Differences between token counts leave out what does not grow with them, such as a seed.
    """
    small = _kept_more(name, IN, RANK, dropout, dtype)
    wider = _kept_more(name, 2 * IN, RANK, dropout, dtype)
    higher = _kept_more(name, IN, 2 * RANK, dropout, dtype)
    found = KeptBytes((wider - small) / IN, (higher - small) / RANK)
    if found.at(IN, RANK) != small:
        raise RuntimeError(f"{name} keeps {small} bytes per token at in={IN}, r={RANK}: not {found}")
    return found


def _kept_more(name: str, in_features: int, rank: int, dropout: float, dtype: torch.dtype) -> float:
    """Bytes that one more token keeps."""
    layer = _layer(name, in_features, rank, dropout, dtype)
    few, many = 16, 48
    kept = []
    for tokens in (few, many):
        x = torch.ones(tokens, in_features, dtype=dtype, requires_grad=True)
        kept.append(kept_bytes(lambda x=x: layer(x), layer.parameters()))  # type: ignore[misc]
    return (kept[1] - kept[0]) / (many - few)


def _layer(name: str, in_features: int, rank: int, dropout: float, dtype: torch.dtype) -> LowRankLinear:
    """A small layer of a method in training mode; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(in_features, OUT, bias=False, dtype=dtype)
        return LowRankLinear.from_linear(linear, method=name, rank=rank, dropout=dropout).train()
