"""A whole training step (forward, loss, backward, AdamW) of a model, with PEFT and with this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_fused.benchmark import Step
from lowrank_fused.demo.data import Batch, model_folder
from lowrank_fused.demo.model import OURS, PEFT, SentimentModel, adapted_models, load_base
from lowrank_fused.errors import UnsupportedError
from lowrank_fused.tools.model_shapes import build

__all__ = ["TrainingStep", "demo_steps"]


@dataclass
class TrainingStep:
    """A model in training mode, the loss of its one batch, and its optimiser (None: nothing in it trains)."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None

    @classmethod
    def of(cls, model: nn.Module, loss: Callable[[], Tensor], *, capturable: bool = False) -> TrainingStep:
        """AdamW over whatever trains; capturable: a CUDA graph may be made of its steps."""
        trained = [p for p in model.train().parameters() if p.requires_grad]
        return cls(model, loss, torch.optim.AdamW(trained, lr=1e-4, capturable=capturable) if trained else None)

    def run(self) -> Tensor:
        """Forward, backward, optimiser; the loss, detached."""
        loss = self.loss()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def step(self) -> Step:
        """For `interleave`."""
        return Step(lambda _: self.run())


def demo_steps(dropout: float, batch: int, length: int) -> tuple[dict[str, TrainingStep], str]:
    """The demo's classifier with all linears adapted, "peft" and "ours", and which weights it has.

    They are the pretrained ones if their package is installed, else random: time and memory are the same.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            base, weights = load_base(model_folder(), torch.device("cpu"), torch.float32), "pretrained"
        except UnsupportedError:
            base, weights = SentimentModel(build("minilm-l6", "cpu")), "random"
        ids = torch.randint(1000, 30000, (batch, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        data = Batch(inputs, torch.arange(batch) % 2)
        models = adapted_models(base, dropout)
    names = {"peft": PEFT, "ours": OURS}
    chosen = {key: models[name] for key, name in names.items()}
    return {key: TrainingStep.of(m, lambda m=m: m.loss(data)) for key, m in chosen.items()}, weights  # type: ignore[misc]
