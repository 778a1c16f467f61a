"""GPUs by name: the rates that a well-fed kernel reaches, which are below those of the data sheet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["GPUS", "Gpu"]


@dataclass(frozen=True)
class Gpu:
    """`peak`: FLOP/s of a library GEMM in bf16 with fp32 sums; `bandwidth`: byte/s of device memory."""

    name: str
    peak: float
    bandwidth: float


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 260e12, 1.75e12),
        Gpu("RTX 4090", 160e12, 0.93e12),
        Gpu("H100", 790e12, 3.0e12),
        Gpu("H200", 760e12, 4.3e12),
        Gpu("B200", 1500e12, 7.0e12),
    )
}
