"""Fused Triton kernels and drop-in layers for fine-tuning with LoRA-family adapters."""

from __future__ import annotations

from .add import lowrank_add
from .checkpoint import load_adapter, save_adapter
from .config import AdapterConfig
from .errors import CheckpointError, LaunchError, LowRankFusedError, SingularPivotError, UnsupportedError
from .inject import disable, inject, merge, remove, unmerge
from .layers import LowRankLinear
from .linear import lowrank_linear, lowrank_linear_ref
from .parameters import trainable_parameters
from .terms import Gate, Terms
from .training import hold_gradients, parameter_groups
from .training.eva import initialize_eva

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "CheckpointError",
    "Gate",
    "LaunchError",
    "LowRankFusedError",
    "LowRankLinear",
    "SingularPivotError",
    "Terms",
    "UnsupportedError",
    "disable",
    "hold_gradients",
    "initialize_eva",
    "inject",
    "load_adapter",
    "lowrank_add",
    "lowrank_linear",
    "lowrank_linear_ref",
    "merge",
    "parameter_groups",
    "remove",
    "save_adapter",
    "trainable_parameters",
    "unmerge",
]
