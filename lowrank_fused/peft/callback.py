"""AccelerateCallback: `accelerate` from inside a Trainer that wraps the model itself, TRL's for one."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .report import Report
from .swap import accelerate, checked_settings, restore

__all__ = ["AccelerateCallback"]


class AccelerateCallback(TrainerCallback):
    """Accelerates the trainer's model when training begins; `report` then says what was done.

        Trainer(..., callbacks=[lf.AccelerateCallback()])

    Args:
        restore_at_end: give the layers their PEFT classes back when training ends; not if an exception ends it.
        strict, groups, settings: those of `accelerate`.

    Raises what `accelerate` does: for settings that do not exist at once, for the model when training begins.
    """

    def __init__(
        self, *, restore_at_end: bool = False, strict: bool = False, groups: bool = True, **settings: Any
    ) -> None:
        checked_settings(**settings)
        self.settings, self.restore_at_end = {"strict": strict, "groups": groups, **settings}, restore_at_end
        self.report: Report | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Accelerate."""
        if model is not None:
            self.report = accelerate(model, **self.settings)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Restore, if asked for."""
        if model is not None and self.restore_at_end:
            restore(model)
