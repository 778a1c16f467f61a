"""One case of pytest-benchmark: what it is goes into `extra_info`, device times on a GPU too."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from lowrank_fused.benchmark import Row, Spread, Step, clock_for
from lowrank_fused.benchmark.graph import captured

__all__ = ["IDENTITY", "record"]

# What tells one case from another; the numbers of a row are the recorder's.
IDENTITY = (
    "what", "label", "in_features", "out_features", "tokens", "rank", "dropout", "dtype", "device", "mode", "provider",
    "routes", "kept_bytes_per_token", "flops", "bytes",
)  # fmt: skip
DEVICE_ROUNDS = 20


def record(benchmark: Any, row: Row, title: str, step: Step, device: torch.device, *, graph: bool = False) -> None:
    """Time a step by the wall clock, as pytest-benchmark does, until the device has finished it.

    On a GPU `device_ms` holds p20, p50 and p80 of CUDA events with a cold and a warm L2 cache, and of the replay of a
    CUDA graph where `graph` says that the step can be captured. With `--benchmark-disable` everything runs once.
    """
    benchmark.group = title
    benchmark.extra_info |= {name: value for name, value in asdict(row).items() if name in IDENTITY}
    on_gpu = device.type == "cuda"
    if on_gpu:
        rounds = 1 if benchmark.disabled else DEVICE_ROUNDS
        benchmark.extra_info["device_ms"] = _device_times(step, device, rounds)
        if graph:
            try:
                replay, _ = captured(lambda: step.run(step.prepare()), device)
            except RuntimeError as failure:  # something that a graph may not hold
                benchmark.extra_info["not_captured"] = str(failure).splitlines()[0]
            else:
                replays = _device_times(replay, device, rounds)
                benchmark.extra_info["device_ms"] |= {f"graph, {name}": ms for name, ms in replays.items()}

    def run_and_wait(state: Any) -> None:
        step.run(state)
        if on_gpu:
            torch.cuda.synchronize(device)

    benchmark.pedantic(run_and_wait, setup=lambda: ((step.prepare(),), {}), rounds=10, warmup_rounds=2)


def _device_times(step: Step, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, flush in (("cold", True), ("warm", False)):
        clock = clock_for(device, flush)
        clock(step)  # learns how long the host takes to enqueue it
        found[name] = asdict(Spread.of([clock(step) for _ in range(rounds)]))
    return found
