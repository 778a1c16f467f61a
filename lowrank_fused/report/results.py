"""What a report is made from: sources, rows of layers, blocks and steps, times of single kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..benchmark import Row
from ..roofline.gpus import GPUS, Gpu

__all__ = ["OURS", "KernelTime", "Results", "Source", "best_clock", "case_key", "same_case"]

# Names under which one of ours may be measured, the one that users get first.
OURS = ("grouped", "accelerate", "auto", "inject", "ours")
# The first that a case was timed with is shown: replays hide the host, a cold cache is what a layer finds in a model.
CLOCKS = ("CUDA graph, cold L2", "CUDA events, cold L2", "CUDA graph, warm L2", "CUDA events, warm L2", "wall clock")


@dataclass(frozen=True)
class Source:
    """A result file: what wrote it, where, when, with what."""

    path: str
    kind: str
    device: str
    environment: dict[str, Any]
    commit: str
    command: str
    time: str


@dataclass(frozen=True)
class KernelTime:
    """One launch of one kernel: time in microseconds, the bytes and FLOPs it declares."""

    layer: str
    route: str
    kernel: str
    us: float
    bytes: float
    flops: float

    @property
    def gb_per_s(self) -> float:
        """Bandwidth achieved."""
        return self.bytes / self.us * 1e-3

    @property
    def tflops(self) -> float:
        """Arithmetic achieved."""
        return self.flops / self.us * 1e-6


@dataclass
class Results:
    """Everything from the files of one device."""

    device: str
    sources: list[Source] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    kernels: list[KernelTime] = field(default_factory=list)
    gemms: list[dict[str, Any]] = field(default_factory=list)  # e and the price of beta = 1, layer by layer
    ceilings: dict[str, float] = field(default_factory=dict)
    goals: list[dict[str, Any]] = field(default_factory=list)  # lines that a command of bench/ holds itself to
    problems: list[str] = field(default_factory=list)

    @property
    def measured(self) -> list[Row]:
        """Rows that have a time."""
        return [row for row in self.rows if row.status == "ok" and row.ms_p50 is not None]

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return any(source.environment.get("gpus") for source in self.sources)

    @property
    def gpu(self) -> Gpu | None:
        """What is known of this GPU, by its name; None for a CPU and for a GPU that is not in the list."""
        plain = self.device.upper().replace(" ", "")
        return next((gpu for name, gpu in GPUS.items() if self.on_gpu and name.replace(" ", "") in plain), None)

    def limit_ms(self, row: Row) -> float | None:
        """The least time that arithmetic and traffic allow, at the rates this GPU reaches; None where unknown.

        The counts are those of a layer with its adapter, so the frozen linear alone has no limit here.
        """
        if self.gpu is None or row.flops is None or row.bytes is None or row.provider == "frozen":
            return None
        return 1e3 * max(row.flops / self.gpu.peak, row.bytes / self.gpu.bandwidth)

    def share_of_limit(self, row: Row) -> float | None:
        """Which part of its time a provider would need if nothing held it up."""
        limit = self.limit_ms(row)
        return None if limit is None or not row.ms_p50 else limit / row.ms_p50


def case_key(row: Row) -> tuple[Any, ...]:
    """What two rows must share to be compared: everything but provider, clock and numbers."""
    return (row.what, row.label, row.in_features, row.out_features, row.tokens, row.rank, row.dropout, row.dtype,
            row.mode)  # fmt: skip


def same_case(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by case, in the order in which cases first appear."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(case_key(row), []).append(row)
    return found


def best_clock(rows: Sequence[Row]) -> list[Row]:
    """Of one case's rows those of the best clock; a clock without a name is the wall's."""
    names = {row.clock or "wall clock" for row in rows}
    best = min(names, key=lambda name: CLOCKS.index(name) if name in CLOCKS else len(CLOCKS))
    return [row for row in rows if (row.clock or "wall clock") == best]
