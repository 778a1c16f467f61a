"""What AdaLoRA (arXiv 2303.10512) adds to a training loop: a penalty on the loss, and pruning to a budget of ranks.

    allocator = RankAllocator(model)
    for step, batch in enumerate(batches):
        loss = model(**batch).loss + orthogonality_penalty(model)
        loss.backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()

Settings are those of the model's AdapterConfig, under PEFT's names. The sequence above is PEFT's, except that PEFT
adds the penalty to the loss by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..inject import adapted_layers, injection_of, unwrap
from ..layers import LowRankLinear

__all__ = ["BudgetSchedule", "RankAllocator", "orthogonality_penalty"]


def orthogonality_penalty(model: nn.Module, weight: float | None = None, *, form: str = "mean") -> Tensor:
    """How far the rows of every A and the columns of every B are from orthonormal, as a differentiable scalar.

        "mean":  weight / (2 L) · Σ_layers ( ‖A Aᵀ − I‖ + ‖Bᵀ B − I‖ )
        "sum":   weight · Σ_layers ( ‖A Aᵀ − I‖² + ‖Bᵀ B − I‖² )         Frobenius norms, L layers

    "sum" is the paper's equation, "mean" what its published code and PEFT compute, and what the weights that both
    recommend (0.1 to 0.5) belong to.

    Args:
        model: a model with adapters of method "adalora".
        weight: None takes orth_reg_weight of the model's AdapterConfig.
        form: see above.
    """
    if form not in ("mean", "sum"):
        raise ValueError(f"form must be 'mean' or 'sum', got {form!r}")
    terms = []
    for layer in _layers(model).values():
        a, _, b = _triplets(layer)
        with torch.autocast(a.device.type, enabled=False):
            for gram in (a @ a.t(), b.t() @ b):
                off = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                terms.append(torch.linalg.matrix_norm(off) if form == "mean" else off.square().sum())
    device = terms[0].device
    total = torch.stack([term.to(device) for term in terms]).sum()
    factor = float(_settings(model)["orth_reg_weight"] if weight is None else weight)
    return total * (factor / len(terms) if form == "mean" else factor)


@dataclass(frozen=True)
class BudgetSchedule:
    """How many triplets (a row of A, an element of E, a column of B) the model may keep at which step.

    All of `initial` up to step `tinit`, then `target` + (`initial` − `target`) · (1 − progress)³, and `target` from
    step `total_step` − `tfinal` on. Raises ValueError if there is no step in between or nothing to prune.
    """

    initial: int
    target: int
    total_step: int
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.tinit < self.last:
            raise ValueError(
                f"there is no step to prune in between tinit = {self.tinit} and total_step - tfinal = {self.last}"
            )
        if not 0 < self.target <= self.initial:
            raise ValueError(f"a budget of {self.target} triplets is not from 1 to the {self.initial} there are")

    @property
    def last(self) -> int:
        """The step that brings the budget to its target."""
        return self.total_step - self.tfinal

    def budget(self, step: int) -> int:
        """Triplets to keep at a step."""
        if step <= self.tinit:
            return self.initial
        if step >= self.last:
            return self.target
        remaining = 1 - (step - self.tinit) / (self.last - self.tinit)
        return int((self.initial - self.target) * remaining**3 + self.target)

    def prunes(self, step: int) -> bool:
        """Whether triplets are chosen anew at a step: every `deltaT` steps, and at the last."""
        return self.tinit < step <= self.last and (step % self.deltaT == 0 or step == self.last)


class RankAllocator:
    """Sets the least important elements of E to zero, over all layers together, so that a budget is kept.

    The sensitivity |p · ∂loss/∂p| of every trained number is smoothed (beta1), and so is its distance from that mean
    (beta2); their product is the number's score. A triplet's score is that of its element of E plus the mean over its
    row of A plus the mean over its column of B. Until the schedule's last step a pruned element of E may come back
    by its gradient; from then on the choice is fixed.

    Under DistributedDataParallel every process comes to the same choice, since gradients are the same.
    """

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        """Take the settings from the model's AdapterConfig, or from keywords of the same names.

        Raises ValueError without `total_step`, or if the schedule or the budget makes no sense.
        """
        self.layers = _layers(model)
        chosen = {**_settings(model), **settings}
        if chosen["total_step"] is None:
            raise ValueError("RankAllocator needs total_step, the number of training steps; set it in AdapterConfig")
        self.beta1, self.beta2 = chosen["beta1"], chosen["beta2"]
        self.schedule = BudgetSchedule(
            initial=sum(layer.rank for layer in self.layers.values()),
            target=chosen["target_r"] * len(self.layers),
            **{name: chosen[name] for name in ("total_step", "tinit", "tfinal", "deltaT")},
        )
        self.kept: dict[str, Tensor] = {}
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}

    @torch.no_grad()
    def update_and_allocate(self, global_step: int) -> int:
        """Call after the optimiser's step and before gradients are cleared; returns the budget of this step.

        Steps may count from 0 or from 1. What prunes to the target is the step total_step − tfinal, which a loop
        that counts from 0 never reaches if tfinal is 0.
        """
        schedule = self.schedule
        if global_step < schedule.last:
            self._observe()
        if schedule.prunes(global_step):
            self._choose(schedule.budget(global_step))
            self._mask()
        elif global_step > schedule.last:
            self._mask()
        return schedule.budget(global_step)

    @property
    def ranks(self) -> dict[str, int]:
        """Path -> triplets that the layer keeps."""
        return {
            path: int(self.kept[path].sum()) if path in self.kept else layer.rank for path, layer in self.layers.items()
        }

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What a later run needs to go on from here."""
        return {"kept": self.kept, "sensitivity": self._sensitivity, "uncertainty": self._uncertainty}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Go on from where `state_dict` was taken."""
        self.kept, self._sensitivity, self._uncertainty = (
            {key: value.clone() for key, value in state[name].items()}
            for name in ("kept", "sensitivity", "uncertainty")
        )

    def _observe(self) -> None:
        for path, layer in self.layers.items():
            for name in layer.trained_names:
                p, key = getattr(layer, name), f"{path}.{name}"
                if p.grad is None:  # not used in this step
                    continue
                now = (p * p.grad).abs()
                mean = self._sensitivity.setdefault(key, torch.zeros_like(now))
                mean.mul_(self.beta1).add_(now, alpha=1 - self.beta1)
                spread = self._uncertainty.setdefault(key, torch.zeros_like(now))
                spread.mul_(self.beta2).add_((now - mean).abs(), alpha=1 - self.beta2)

    def _scores(self, path: str, layer: LowRankLinear) -> Tensor:
        """[rank], zero for a layer that never had a gradient."""
        total = torch.zeros_like(_triplets(layer)[1][:, 0])
        for name, dim in (("lora_A", 1), ("lora_E", 1), ("lora_B", 0)):
            key = f"{path}.{name}"
            if key in self._sensitivity:
                total += (self._sensitivity[key] * self._uncertainty[key]).mean(dim)
        return total

    def _choose(self, budget: int) -> None:
        scores = {path: self._scores(path, layer) for path, layer in self.layers.items()}
        everyone = torch.cat([score.cpu() for score in scores.values()])
        pruned = self.schedule.initial - budget
        threshold = everyone.kthvalue(pruned).values.item() if pruned else -torch.inf
        self.kept = {path: score > threshold for path, score in scores.items()}

    def _mask(self) -> None:
        for path, kept in self.kept.items():
            e = _triplets(self.layers[path])[1]
            e.masked_fill_(~kept.to(e.device)[:, None], 0.0)


def _layers(model: nn.Module) -> dict[str, LowRankLinear]:
    layers = {path: layer for path, layer in adapted_layers(model).items() if layer.method.name == "adalora"}
    if not layers:
        raise ValueError("the model's adapters are not of method 'adalora'")
    return layers


def _triplets(layer: LowRankLinear) -> tuple[Tensor, Tensor, Tensor]:
    """A [r, in], E [r, 1] and B [out, r] of a layer."""
    tensors = layer.adapter_tensors()
    return tensors["lora_A"], tensors["lora_E"], tensors["lora_B"]


def _settings(model: nn.Module) -> dict[str, Any]:
    record = injection_of(unwrap(model))
    return {**methods.options("adalora"), **(record.config.options if record is not None else {})}
