"""A whole training step (forward, loss, backward, AdamW) of a model, with PEFT and with this package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_fused as lf
from lowrank_fused.benchmark import Step
from lowrank_fused.demo.data import Batch, model_folder
from lowrank_fused.demo.model import OURS, PEFT, SentimentModel, adapted_models, load_base
from lowrank_fused.errors import UnsupportedError
from lowrank_fused.tools.model_shapes import build

__all__ = ["CausalCase", "TrainingStep", "causal_steps", "demo_steps"]


@dataclass
class TrainingStep:
    """A model in training mode, the loss of its one batch, and its optimiser."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, model: nn.Module, loss: Callable[[], Tensor]) -> TrainingStep:
        """AdamW over whatever trains."""
        trained = [p for p in model.train().parameters() if p.requires_grad]
        return cls(model, loss, torch.optim.AdamW(trained, lr=1e-4))

    def run(self) -> Tensor:
        """Forward, backward, optimiser; the loss, detached."""
        loss = self.loss()
        loss.backward()
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


@dataclass(frozen=True)
class CausalCase:
    """A model of `model_shapes`, config fields to override, the size of its input, the adapter."""

    model: str
    batch: int
    length: int
    rank: int = 16
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    settings: tuple[tuple[str, Any], ...] = ()


def causal_steps(case: CausalCase) -> dict[str, Callable[[], TrainingStep]]:
    """Makers of the "peft" and the "ours" step over one random base model, adapters in its dtype on all its
    linears.

    Makers, so that memory can be measured with one of them alive.
    """
    with torch.random.fork_rng(devices=[case.device] if case.device.type == "cuda" else []):
        torch.manual_seed(0)
        base = build(case.model, case.device, **dict(case.settings)).to(case.dtype)
        ids = torch.randint(base.config.vocab_size, (case.batch, case.length), device=case.device)
    shared = {id(p): p for p in base.parameters()}
    paths = [p for p, m in base.named_modules() if isinstance(m, nn.Linear) and not p.endswith("lm_head")]

    def maker(adapt: Callable[[nn.Module, CausalCase, list[str]], nn.Module]) -> Callable[[], TrainingStep]:
        def make() -> TrainingStep:
            # The copy shares the frozen weights: the base is in memory once, however many steps there are.
            model = adapt(copy.deepcopy(base, dict(shared)), case, paths)
            return TrainingStep.of(model, lambda: model(input_ids=ids, labels=ids).loss)

        return make

    return {"peft": maker(_with_peft), "ours": maker(_with_ours)}


def _with_peft(model: nn.Module, case: CausalCase, paths: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout, target_modules=paths)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _with_ours(model: nn.Module, case: CausalCase, paths: list[str]) -> nn.Module:
    return lf.inject(
        model,
        method="lora",
        rank=case.rank,
        alpha=2 * case.rank,
        dropout=case.dropout,
        target_modules=paths,
        autocast_adapter_dtype=False,
    )
