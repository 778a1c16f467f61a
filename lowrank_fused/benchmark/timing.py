"""Interleaved timing: in every round each contestant runs once, so that drift and neighbours hit all alike.

Times are medians with the 20th and 80th percentile; a speed-up is the median of the ratios within rounds.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["Clock", "Spread", "Step", "clock_for", "clock_name", "interleave", "paired_ratio"]

WARMUP_CALLS = 2
LONGEST_SLEEP_MS = 20.0
SLEEP_CYCLES_PER_MS = 2_000_000  # a GPU below 2 GHz sleeps a little longer, which does no harm


@dataclass
class Step:
    """What is timed: `run` on what the untimed `prepare` made (the forward pass of a backward, say)."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles by linear interpolation; all equal for a single value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(values), fifths[3])


class Clock(Protocol):
    """Milliseconds that one step takes on its device."""

    def __call__(self, step: Step) -> float: ...


def cpu_clock(step: Step) -> float:
    """Wall time of the call; its results are freed after the clock has stopped."""
    state = step.prepare()
    start = time.perf_counter_ns()
    result = step.run(state)
    elapsed = time.perf_counter_ns() - start
    del result
    return elapsed * 1e-6


class CudaClock:
    """Device time between two CUDA events.

    Before the first event the L2 cache is overwritten (unless `flush_l2` is False), then the GPU sleeps for
    as long as the host took to enqueue the step the last time: launch latency is hidden, as it is in a busy
    training loop.
    """

    def __init__(self, device: torch.device, flush_l2: bool = True) -> None:
        self.device = device
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 64 << 20)
        self.cold = torch.empty(size, dtype=torch.uint8, device=device) if flush_l2 else None
        self.enqueue_ms: dict[int, float] = {}

    def __call__(self, step: Step) -> float:
        """Milliseconds of `step.run` on the device."""
        state = step.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            if self.cold is not None:
                self.cold.zero_()
            sleep_ms = min(1.5 * self.enqueue_ms.get(id(step), 0.0), LONGEST_SLEEP_MS)
            torch.cuda._sleep(int(sleep_ms * SLEEP_CYCLES_PER_MS))
            begun = time.perf_counter()
            start.record()
            result = step.run(state)
            end.record()
            self.enqueue_ms[id(step)] = (time.perf_counter() - begun) * 1e3
            end.synchronize()
        del result
        return start.elapsed_time(end)


def clock_for(device: torch.device, flush_l2: bool = True) -> Clock:
    """CUDA events on a GPU, the wall clock elsewhere."""
    return CudaClock(device, flush_l2) if device.type == "cuda" else cpu_clock


def clock_name(device: torch.device, flush_l2: bool = True) -> str:
    """In words what `clock_for` measures with."""
    if device.type != "cuda":
        return "wall clock"
    return f"CUDA events, {'cold' if flush_l2 else 'warm'} L2"


def interleave(
    steps: Mapping[str, Step],
    clock: Clock,
    *,
    budget_s: float = 5.0,
    min_rounds: int = 5,
    max_rounds: int = 100,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every step in every round; as many rounds as fit into the budget, within the two
    limits.

    The order rotates from round to round, so that nobody always follows the same neighbour. `on_round(done,
    rounds)` is for a progress bar.
    """
    names = list(steps)
    with _no_collection():
        begun = time.perf_counter()
        for step in steps.values():
            for _ in range(WARMUP_CALLS - 1):
                clock(step)
        warm = time.perf_counter()
        for step in steps.values():
            clock(step)
        finished = time.perf_counter()
        left = budget_s - (finished - begun)
        rounds = min(max(int(left / max(finished - warm, 1e-9)), min_rounds), max_rounds)
        times: dict[str, list[float]] = {name: [] for name in names}
        for done in range(rounds):
            for name in names[done % len(names) :] + names[: done % len(names)]:
                times[name].append(clock(steps[name]))
            if on_round is not None:
                on_round(done + 1, rounds)
    return times


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """slow / fast, taken round by round: above 1 where `fast` deserves its name."""
    return Spread.of([s / f for s, f in zip(slow, fast, strict=True)])


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector at rest, as it was afterwards."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
