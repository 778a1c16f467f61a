"""What the models of the demo do inside: which route serves which layer, and what is kept for backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..benchmark import kept_bytes
from .data import Batch
from .model import SentimentModel, layers_with_adapter

__all__ = ["Kept", "RouteUse", "kept_by_step", "kept_for_backward", "routes_of"]

TOKENS = 2048  # in the input on which a layer's kept bytes are counted: more than what is left to eager


@dataclass(frozen=True)
class Kept:
    """Bytes kept for backward per token by one adapted layer of this shape, for each model."""

    in_features: int
    out_features: int
    layers: int
    bytes_per_token: dict[str, float]


@dataclass(frozen=True)
class RouteUse:
    """`calls` layers of this shape were served by `route` in one pass in this direction."""

    direction: str
    in_features: int
    out_features: int
    route: str
    calls: int


class RouteLog(TorchDispatchMode):
    """Collects (direction, in_features, out_features, route) from every call of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lowrank_fused":
            values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            out_features, in_features = values["weight"].shape
            self.calls.append((func._opname, in_features, out_features, values["route"]))
        return func(*args, **(kwargs or {}))


def routes_of(model: SentimentModel, batch: Batch) -> list[RouteUse]:
    """The routes of one forward and backward pass: read from the operators' own calls, not predicted."""
    model.train()
    with RouteLog() as log:
        model.loss(batch).backward()
    model.zero_grad(set_to_none=True)
    return [
        RouteUse(direction, in_features, out_features, route, log.calls.count(call))
        for call in sorted(set(log.calls))
        for direction, in_features, out_features, route in [call]
    ]


def kept_for_backward(models: Mapping[str, SentimentModel]) -> list[Kept]:
    """Per shape of adapted layer, what each model's layer alone keeps of an input that needs a gradient."""
    counts: dict[tuple[int, int], int] = {}
    kept: dict[tuple[int, int], dict[str, float]] = {}
    for name, model in models.items():
        model.train()
        layers = layers_with_adapter(model)
        shapes = [(layer.in_features, layer.out_features) for layer in layers]
        for shape, layer in dict(zip(shapes, layers, strict=True)).items():
            counts[shape] = shapes.count(shape)
            kept.setdefault(shape, {})[name] = _kept_per_token(layer)
    return [Kept(*shape, layers=counts[shape], bytes_per_token=kept[shape]) for shape in sorted(kept)]


def _kept_per_token(layer: Any) -> float:
    parameter = layer.weight
    x = torch.randn(TOKENS, layer.in_features, device=parameter.device, dtype=parameter.dtype, requires_grad=True)
    return kept_bytes(lambda: layer(x), layer.parameters()) / TOKENS


def kept_by_step(model: SentimentModel, batch: Batch) -> int:
    """Bytes that the whole model keeps between forward and backward of this batch."""
    model.train()
    return kept_bytes(lambda: model.loss(batch), model.parameters())
