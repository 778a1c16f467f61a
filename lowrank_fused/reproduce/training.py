"""One fine-tuning of the demo's model on the demo's text, judged on snippets it has not seen."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import AdapterConfig
from ..demo.data import Batch, batches, fetch_reviews, model_folder, split
from ..demo.model import SentimentModel, linear_paths, load_base, load_tokenizer
from ..demo.race import accuracy, schedule
from ..inject import inject
from ..parameters import trainable_parameters

__all__ = ["Task", "Training"]


@dataclass(frozen=True)
class Training:
    """Sizes of one training: snippets to learn from (once) and to judge by, snippets in a step.

    `judged` is split in two halves: one to choose a learning rate by, one to report.
    """

    snippets: int = 1024
    judged: int = 1000
    batch_size: int = 16

    def with_snippets(self, snippets: int | None) -> Training:
        """The same with another number of snippets to learn from; None leaves it."""
        return self if snippets is None else replace(self, snippets=snippets)


class Task:
    """MiniLM, the snippets and batches of them, loaded once for many trainings."""

    def __init__(self, training: Training, cache: Path) -> None:
        folder = model_folder()
        self.training = training
        self.tokenizer = load_tokenizer(folder)
        self.base = load_base(folder, torch.device("cpu"), torch.float32)
        train, held_out = split(fetch_reviews(cache), training.snippets, training.judged)
        self.train = train
        half = len(held_out) // 2
        self.choose_by, self.report_by = (
            list(batches(self.tokenizer, part, 64, seed=0)) for part in (held_out[:half], held_out[half:])
        )

    def adapted(self, config: dict[str, Any], seed: int) -> SentimentModel:
        """A copy of the model with a new head and adapters on every linear of the encoder; both follow the seed."""
        torch.manual_seed(seed)
        model = copy.deepcopy(self.base)
        model.head = nn.Linear(model.head.in_features, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject(model.encoder, AdapterConfig(target_modules=linear_paths(model.encoder), **config))
        return model

    def run(self, config: dict[str, Any], learning_rate: float, seed: int) -> dict[str, Any]:
        """Train with AdamW and judge; a training whose loss is no longer finite ends there.

        Returns accuracy on both halves of the held-out snippets, the mean loss of the last quarter of the steps, the
        number of trained adapter elements and whether it diverged.
        """
        model = self.adapted(config, seed)
        losses = self._train(model, learning_rate, seed)
        diverged = not math.isfinite(losses[-1])
        last = losses[-max(1, len(losses) // 4) :]
        return {
            "trained": trainable_parameters(model.encoder).trainable,
            "diverged": diverged,
            "loss": None if diverged else sum(last) / len(last),
            "choose": 0.5 if diverged else accuracy(model, iter(self.choose_by)),
            "accuracy": 0.5 if diverged else accuracy(model, iter(self.report_by)),
        }

    def _train(self, model: SentimentModel, learning_rate: float, seed: int) -> list[float]:
        order = list(batches(self.tokenizer, self.train, self.training.batch_size, seed=seed))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
        model.train()
        losses: list[float] = []
        for step, batch in enumerate(order):
            optimizer.param_groups[0]["lr"] = learning_rate * schedule(step, len(order))
            loss = model.loss(batch)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses

    def some_batches(self, count: int) -> Sequence[Batch]:
        """A few batches, for timing."""
        return list(batches(self.tokenizer, self.train, self.training.batch_size, seed=0))[:count]
