"""What DoRA with dynamic rank (arXiv 2405.17357) adds to a training loop: a penalty on the loss, and pruning.

pruner = RankPruner(model, total_steps=10_000, target_rank=4)
for batch in batches:
    loss = model(**batch).loss + 0.1 * variance_penalty(model)
    loss.backward()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..inject import adapted_layers
from ..layers import LowRankLinear

__all__ = ["RankPruner", "importance", "variance_penalty"]


def importance(layer: LowRankLinear) -> Tensor:
    """‖B_k c_k A_k‖ / ‖B diag(c) A‖ of every rank-one term [r], Frobenius norms; zero where the update is zero.

    From the Gram matrices of A and B, without forming either product.
    """
    a, b, c = _factors(layer)
    products = torch.outer(c, c) * (a @ a.t()) * (b.t() @ b)
    total = products.sum().clamp_min(0.0).sqrt()
    return products.diagonal().sqrt() / (total + torch.finfo(c.dtype).tiny)


def variance_penalty(model: nn.Module) -> Tensor:
    """Mean variance of the rows of every A and the columns of every B, as a differentiable scalar.

    It keeps terms from piling their norm onto few entries, which would make them look important to pruning.
    """
    found = []
    for layer in _layers(model).values():
        a, b, _ = _factors(layer)
        found += [a.var(dim=1), b.var(dim=0)]
    return torch.cat([variances.to(found[0].device) for variances in found]).mean()


class RankPruner:
    """Holds the weights c of the least important terms at zero, over all layers together.

    The pruned share grows from none at `start` to 1 − target_rank / r at `end`, with the cube of the progress in
    between: slowly at first. Terms are chosen every `interval` steps by importance smoothed over steps (`beta`). Until
    `end` a pruned term may come back by the gradient of its c, from then on the choice is fixed.

    Args:
        model: a model with adapters of method "dynamic_rank".
        total_steps: optimiser steps of the whole training.
        target_rank: mean rank of a layer at the end.
        start, end: shares of the steps between which terms are pruned.

    Raises ValueError for another method, or a value out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        target_rank: float,
        *,
        start: float = 0.1,
        end: float = 0.5,
        interval: int = 10,
        beta: float = 0.9,
    ) -> None:
        self.layers = _layers(model)
        self.terms = sum(layer.rank for layer in self.layers.values())
        self.target = round(target_rank * len(self.layers))
        if not 0 < self.target <= self.terms:
            raise ValueError(f"target_rank {target_rank} is not above 0 and at most the mean rank of the layers")
        if not 0 <= start < end <= 1 or total_steps < 1 or interval < 1 or not 0 <= beta < 1:
            raise ValueError(
                "expected 0 <= start < end <= 1, total_steps and interval of at least 1 and 0 <= beta < 1, got "
                f"start={start}, end={end}, total_steps={total_steps}, interval={interval}, beta={beta}"
            )
        self.first, self.last = int(start * total_steps), max(1, int(end * total_steps))
        self.interval, self.beta = interval, beta
        self.steps = 0
        self.kept: dict[str, Tensor] = {}
        self._smoothed: dict[str, Tensor] = {}

    def pruned(self) -> int:
        """How many terms are to be pruned after the steps taken so far."""
        progress = (self.steps - self.first) / max(1, self.last - self.first)
        return int((self.terms - self.target) * min(1.0, max(0.0, progress)) ** 3)

    @torch.no_grad()
    def step(self) -> None:
        """Call after each step of the optimiser and before gradients are cleared or the model is used again."""
        self.steps += 1
        if self.steps <= self.last:
            for path, layer in self.layers.items():
                now = importance(layer)
                mean = self._smoothed.setdefault(path, torch.zeros_like(now))
                mean.mul_(self.beta).add_(now, alpha=1 - self.beta)
            due = self.steps > self.first and (self.steps - self.first) % self.interval == 0
            if due or self.steps == self.last:
                self._choose()
                self._mask()
        else:
            self._mask()

    @property
    def ranks(self) -> dict[str, int]:
        """Path -> terms that the layer keeps."""
        return {p: int(self.kept[p].sum()) if p in self.kept else layer.rank for p, layer in self.layers.items()}

    def _choose(self) -> None:
        everyone = torch.cat([scores.cpu() for scores in self._smoothed.values()])
        kept = torch.ones(len(everyone), dtype=torch.bool)
        kept[everyone.argsort(stable=True)[: self.pruned()]] = False
        parts = kept.split([len(scores) for scores in self._smoothed.values()])
        self.kept = dict(zip(self._smoothed, parts, strict=True))

    def _mask(self) -> None:
        for path, kept in self.kept.items():
            c = _factors(self.layers[path])[2]
            c.masked_fill_(~kept.to(c.device), 0.0)


def _layers(model: nn.Module) -> dict[str, LowRankLinear]:
    layers = {path: layer for path, layer in adapted_layers(model).items() if layer.method.name == "dynamic_rank"}
    if not layers:
        raise ValueError("the model's adapters are not of method 'dynamic_rank'")
    return layers


def _factors(layer: LowRankLinear) -> tuple[Tensor, Tensor, Tensor]:
    """A [r, in], B [out, r] and c [r] of a layer."""
    tensors = layer.adapter_tensors()
    return tensors["lora_A"], tensors["lora_B"], tensors["lora_c"]
