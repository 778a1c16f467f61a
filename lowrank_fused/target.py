"""What machine is this: facts that decide routes. Importing this touches no GPU and does not import Triton.

torch.compile traces what is here, so that nothing is cached by decorators, which it warns of and looks through.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

__all__ = ["CPU", "HAS_TRITON", "Target", "interpreting", "target_of"]

# Whether Triton is installed.
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Target:
    """`arch` is the compute capability (80, 90, …; 0 for a CPU), `gpu` the name, for which tables are measured.

    `has_triton` says whether kernels can run there.
    """

    arch: int
    has_triton: bool
    gpu: str = ""


CPU = Target(arch=0, has_triton=False)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU and slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and HAS_TRITON


_targets: dict[int, Target] = {}


def _cuda_target(index: int) -> Target:
    known = _targets.get(index)
    if known is None:
        major, minor = torch.cuda.get_device_capability(index)
        # Tensor-core products of 16-bit operands, which every kernel here is built on, start with Ampere.
        usable = major >= 8 and HAS_TRITON and torch.version.hip is None
        known = _targets[index] = Target(10 * major + minor, usable, torch.cuda.get_device_name(index))
    return known


def target_of(device: torch.device) -> Target:
    """The facts about this device. The interpreter counts as no target: routes are forced there, never chosen."""
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    return CPU
