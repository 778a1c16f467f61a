"""What machine is this: facts that decide routes, asked when needed and never at import."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["CPU", "Target", "has_triton", "interpreting", "target_of"]


@dataclass(frozen=True)
class Target:
    """`arch` is the compute capability (80, 90, …; 0 for a CPU); `has_triton` whether kernels can run there."""

    arch: int
    has_triton: bool


CPU = Target(arch=0, has_triton=False)


@cache
def has_triton() -> bool:
    """Whether Triton is installed. Does not import it."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU and slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and has_triton()


@cache
def _cuda_target(index: int) -> Target:
    major, minor = torch.cuda.get_device_capability(index)
    # Tensor-core products of 16-bit operands, which every kernel here is built on, start with Ampere.
    usable = major >= 8 and has_triton() and torch.version.hip is None
    return Target(arch=10 * major + minor, has_triton=usable)


def target_of(device: torch.device) -> Target:
    """The facts about this device. The interpreter counts as no target: routes are forced there, never chosen."""
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    return CPU
