"""What LaMDA (arXiv 2406.12832) adds to a training loop: freezing the columns of B one after the other.

freezer = ColumnFreezer(model, total_steps=1000)
for batch in batches:
    model(**batch).loss.backward()
    optimizer.step()
    freezer.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..inject import adapted_layers
from ..layers import LowRankLinear

__all__ = ["ColumnFreezer"]


class ColumnFreezer:
    """Freezes the columns of every layer's B in order, at an even pace over the first `fraction` of the steps.

    After n steps the first ⌊r · n / (fraction · total_steps)⌋ columns stand still, under a spectral start those of the
    largest singular values; once all r do, B requires no gradient and its share of backward is no longer computed.
    A column is held at its value, so that neither momentum nor weight decay moves it. (The published code zeroes
    gradients, which an optimiser with momentum steps over, and lacks the factor r: it freezes one column after
    30 % of the steps, the second after 60 %.)

    Args:
        model: a model with adapters of method "lamda".
        total_steps: optimiser steps of the whole training.
        fraction: share of them after which B is frozen.

    Raises ValueError for another method, or a value out of range.
    """

    def __init__(self, model: nn.Module, total_steps: int, *, fraction: float = 0.3) -> None:
        if total_steps < 1 or not 0 < fraction <= 1:
            raise ValueError(
                f"total_steps must be at least 1 and fraction above 0 and at most 1, got {total_steps} and {fraction}"
            )
        self.layers = {path: layer for path, layer in adapted_layers(model).items() if layer.method.name == "lamda"}
        if not self.layers:
            raise ValueError("the model's adapters are not of method 'lamda'")
        self.total_steps, self.fraction = total_steps, fraction
        self.steps = 0
        self._held: dict[str, Tensor] = {}

    def columns(self, rank: int) -> int:
        """How many of `rank` columns are frozen after the steps taken so far."""
        return min(rank, int(rank * self.steps / (self.fraction * self.total_steps) + 1e-9))

    @torch.no_grad()
    def step(self) -> None:
        """Call after each step of the optimiser: puts frozen columns back and freezes those whose time has come."""
        self.steps += 1
        for path, layer in self.layers.items():
            self._freeze(path, layer)

    def _freeze(self, path: str, layer: LowRankLinear) -> None:
        b: Tensor = layer.adapter_tensors()["lamda_B"]
        if not b.requires_grad:
            return
        if path in self._held:
            held = self._held[path]
            b[:, : held.shape[1]] = held
        count = self.columns(layer.rank)
        if count == layer.rank:
            self._held.pop(path, None)
            b.requires_grad_(False)
            b.grad = None
        elif count:
            self._held[path] = b[:, :count].clone()
