"""Training equal models side by side, one step each in turn, so that machine noise hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .data import Batch
from .model import SentimentModel

__all__ = ["Course", "accuracy", "race"]

WARMUP = 0.1  # of all steps; the learning rate rises during them and falls to zero afterwards


@dataclass
class Course:
    """What one model went through: the loss and the wall time of every step."""

    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)


def race(
    models: Mapping[str, SentimentModel],
    batches: Sequence[Batch],
    learning_rate: float,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Course]:
    """Train every model on the same batches with AdamW; every step runs each once, in an order that rotates.

    torch's generator is set to the same state before each model's step, so that the encoder's own dropout is
    the same in all of them. The time of a step is forward, backward, optimiser, and the wait for the device.
    """
    names = list(models)
    courses = {name: Course() for name in names}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
        for name, model in models.items()
    }
    for model in models.values():
        model.train()
    for i, batch in enumerate(batches):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            optimizers[name].param_groups[0]["lr"] = learning_rate * schedule(i, len(batches))
            torch.manual_seed(i)
            elapsed_ms, loss = _timed_step(models[name], optimizers[name], batch)
            courses[name].losses.append(loss)
            courses[name].step_ms.append(elapsed_ms)
        on_step()
    return courses


def schedule(step: int, steps: int) -> float:
    """Learning rate of a step relative to the highest: linear up, then linear down."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def _timed_step(model: SentimentModel, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[float, float]:
    _wait(batch.labels.device)
    start = time.perf_counter()
    loss = model.loss(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _wait(batch.labels.device)
    return (time.perf_counter() - start) * 1e3, loss.item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def accuracy(model: SentimentModel, batches: Iterator[Batch]) -> float:
    """Share of snippets that the model puts on the right side."""
    model.eval()
    right = total = 0
    for batch in batches:
        right += int((model(batch.inputs).argmax(-1) == batch.labels).sum())
        total += len(batch.labels)
    return right / total
