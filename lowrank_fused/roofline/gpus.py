"""GPUs by name: the rates that a well-fed kernel reaches, which are below those of the data sheet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..registry import did_you_mean

__all__ = ["GPUS", "Gpu", "gpu_named"]


@dataclass(frozen=True)
class Gpu:
    """A GPU as the model sees it.

    `peak` is FLOP/s of a library GEMM in bf16 with fp32 sums, `bandwidth` byte/s of device memory, `efficiency` the
    prior for e: the speed of Triton's GEMM over the library's. `source` says where the rates come from.
    """

    name: str
    arch: int
    peak: float
    bandwidth: float
    efficiency: float
    source: str

    @property
    def balance(self) -> float:
        """FLOP that take as long as one byte: what a kernel needs in order to be bound by arithmetic."""
        return self.peak / self.bandwidth


_OF_THE_SHEET = "expected of a GEMM and of a copy; the data sheet says {} TFLOP/s dense bf16 and {} TB/s"

GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 260e12, 1.75e12, 0.90, _OF_THE_SHEET.format(312, "2.04 (SXM, 80 GB)")),
        Gpu("RTX 4090", 89, 160e12, 0.93e12, 0.90, _OF_THE_SHEET.format(165, 1.01)),
        Gpu("H100", 90, 790e12, 3.0e12, 0.96, _OF_THE_SHEET.format(989, "3.35 (SXM)")),
        Gpu("H200", 90, 760e12, 4.3e12, 0.96, _OF_THE_SHEET.format(989, 4.8)),
        Gpu("B200", 100, 1500e12, 7.0e12, 0.85, _OF_THE_SHEET.format(2250, 8.0)),
        Gpu("RTX 5090", 120, 203e12, 1.65e12, 0.85, _OF_THE_SHEET.format(209.5, 1.79)),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU of that name, in whatever case and with or without the space. Raises ValueError for an unknown one."""
    plain = {known.replace(" ", "").lower(): gpu for known, gpu in GPUS.items()}
    found = plain.get(name.replace(" ", "").replace("-", "").lower())
    if found is None:
        raise ValueError(
            f"unknown GPU {name!r}; {did_you_mean(name.upper(), GPUS)}. "
            "Any other: its rates by --peak (TFLOP/s) and --bandwidth (TB/s)"
        )
    return found
