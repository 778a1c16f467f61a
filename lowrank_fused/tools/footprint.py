"""What a method costs: parameters that train in a model, and bytes kept for backward. Counted, not quoted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from .. import methods
from ..benchmark import kept_bytes
from ..config import AdapterConfig
from ..inject import inject, injection_of, remove
from ..layers import LowRankLinear
from ..parameters import trainable_parameters
from .model_shapes import build, target_modules

__all__ = [
    "KeptBytes",
    "MethodFacts",
    "ModelCount",
    "count_in_model",
    "kept_by_a_token",
    "kept_per_token",
    "method_facts",
    "small_layer",
]

# Sizes that cannot be mistaken for one another when they turn up in a shape.
IN, OUT, RANK = 64, 40, 8


@dataclass(frozen=True)
class KeptBytes:
    """Bytes a layer keeps per token: per_in · in_features + per_out · out_features + per_rank · rank + fixed."""

    per_in: float
    per_out: float
    per_rank: float
    fixed: float = 0.0

    def at(self, in_features: int, out_features: int, rank: int) -> float:
        """Bytes per token of a layer of this size."""
        return self.per_in * in_features + self.per_out * out_features + self.per_rank * rank + self.fixed

    def __str__(self) -> str:
        named = ((self.per_in, "·in"), (self.per_out, "·out"), (self.per_rank, "·r"), (self.fixed, ""))
        return " + ".join(f"{factor:g}{what}" for factor, what in named if factor) or "0"


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
    built = _built(model)
    chosen, _ = methods.resolve(method, rank)
    config = AdapterConfig(method=method, r=chosen, target_modules=target_modules(built, targets), **options)
    try:
        report = trainable_parameters(inject(built, config))
    finally:
        if injection_of(built) is not None:
            remove(built)
    return ModelCount(method, model, targets, chosen, report.rows[0].layers, report.trainable, report.base)


@cache
def _built(model: str) -> nn.Module:
    """The model on the meta device: seconds to build, nothing to keep."""
    return build(model)


def method_facts(name: str) -> MethodFacts:
    """Formula, trained tensors and kept bytes of a method, the latter two read off a small layer."""
    method = methods.get(name)
    layer = small_layer(name, IN, OUT, RANK, 0.0, torch.float32)
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
    """Measure small layers of one method and solve for the factors.

    Differences between token counts leave out what does not grow with them, such as a seed.
    """

    def kept(in_features: int, out_features: int, rank: int) -> float:
        return kept_by_a_token(small_layer(name, in_features, out_features, rank, dropout, dtype))

    small = kept(IN, OUT, RANK)
    per_in = (kept(2 * IN, OUT, RANK) - small) / IN
    per_out = (kept(IN, 2 * OUT, RANK) - small) / OUT
    per_rank = (kept(IN, OUT, 2 * RANK) - small) / RANK
    return KeptBytes(per_in, per_out, per_rank, small - per_in * IN - per_out * OUT - per_rank * RANK)


def kept_by_a_token(layer: LowRankLinear) -> float:
    """Bytes that one more token keeps in this layer; x is a leaf that requires a gradient."""
    few, many = 16, 48
    kept = []
    for tokens in (few, many):
        x = torch.ones(tokens, layer.in_features, dtype=layer.weight.dtype, requires_grad=True)
        kept.append(kept_bytes(lambda x=x: layer(x), layer.parameters()))  # type: ignore[misc]
    return (kept[1] - kept[0]) / (many - few)


def small_layer(
    name: str, in_features: int, out_features: int, rank: int, dropout: float, dtype: torch.dtype
) -> LowRankLinear:
    """A small layer of a method in training mode; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
        settings = {**methods.small_options(name), "rank": rank, "dropout": dropout}
        return LowRankLinear.from_linear(linear, method=name, **settings).train()
