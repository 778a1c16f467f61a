"""pytest-benchmark cases of one layer, forward plus backward, grouped by size: `pytest bench`.

The clock is the wall's; on a GPU a call waits for the device, and the device time by CUDA events stands
beside it in the JSON (`extra_info`). Each case first passes the accuracy gate. `--benchmark-disable` runs
each once, as a test.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from lowrank_fused.benchmark import Case, clock_for, default_names, dtype_name, kept_bytes, providers_for
from lowrank_fused.benchmark.measure import gate, layer_step
from lowrank_fused.tools.doctor import best_device

DEVICE = best_device()
ON_GPU = DEVICE.type == "cuda"
TOKENS = 8192 if ON_GPU else 512
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)) if ON_GPU else ((512, 512), (512, 2048))
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)
CASES = [Case(k, n, TOKENS, 16, p, dtype, DEVICE) for k, n in SHAPES for dtype in DTYPES for p in (0.0, 0.1)]


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case.title()}-{name}") for case in CASES for name in default_names(case)],
)
def test_layer(benchmark: Any, case: Case, name: str) -> None:
    """One provider on one case."""
    (provider,) = providers_for([name], case)
    verdict = gate(provider, case)
    assert verdict == "ok", verdict
    operands = provider.operands(case)
    step = layer_step(provider, operands, case.dropout, "both")

    def run_and_wait() -> None:
        step.run(step.prepare())
        if ON_GPU:
            torch.cuda.synchronize(DEVICE)

    benchmark.group = case.title()
    benchmark.extra_info |= {"provider": name, "dtype": dtype_name(case.dtype), "dropout": case.dropout}
    benchmark.extra_info["kept_bytes_per_token"] = (
        kept_bytes(lambda: provider(operands, case.dropout), operands.parameters()) / case.tokens
    )
    if ON_GPU:
        clock = clock_for(DEVICE)
        benchmark.extra_info["device_ms"] = statistics.median(clock(step) for _ in range(20))
    benchmark.pedantic(run_and_wait, rounds=10, warmup_rounds=2)
