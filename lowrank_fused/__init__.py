"""Fused Triton kernels and drop-in layers for fine-tuning with LoRA-family adapters."""

from __future__ import annotations

from typing import Any

from .add import lowrank_add
from .branches import Branch, lowrank_group
from .checkpoint import load_adapter, save_adapter
from .config import AdapterConfig
from .errors import (
    CheckpointError,
    LaunchError,
    LowRankFusedError,
    NotAcceleratedError,
    SingularPivotError,
    UnsupportedError,
)
from .grouping import group, ungroup
from .inject import disable, inject, merge, remove, unmerge
from .layers import LowRankLinear
from .linear import lowrank_linear, lowrank_linear_ref
from .parameters import trainable_parameters
from .peft import Report, accelerate, accelerated, explain, restore
from .terms import Gate, Terms
from .training import hold_gradients, parameter_groups
from .training.eva import initialize_eva


def __getattr__(name: str) -> Any:
    """`AccelerateCallback` needs transformers, which the package otherwise does not."""
    if name == "AccelerateCallback":
        from .peft.callback import AccelerateCallback

        return AccelerateCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "AccelerateCallback",
    "AdapterConfig",
    "Branch",
    "CheckpointError",
    "Gate",
    "LaunchError",
    "LowRankFusedError",
    "LowRankLinear",
    "NotAcceleratedError",
    "Report",
    "SingularPivotError",
    "Terms",
    "UnsupportedError",
    "accelerate",
    "accelerated",
    "disable",
    "explain",
    "group",
    "hold_gradients",
    "initialize_eva",
    "inject",
    "load_adapter",
    "lowrank_add",
    "lowrank_group",
    "lowrank_linear",
    "lowrank_linear_ref",
    "merge",
    "parameter_groups",
    "remove",
    "restore",
    "save_adapter",
    "trainable_parameters",
    "ungroup",
    "unmerge",
]
