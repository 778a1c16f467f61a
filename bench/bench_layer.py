"""pytest-benchmark cases of one layer, forward plus backward, grouped by size: `pytest bench`.

The clock is the wall's; on a GPU a call waits for the device, and the device time by CUDA events and by graph
replay stands beside it in the JSON (`extra_info`). Each case first passes the accuracy gate. `--benchmark-disable`
runs each once, as a test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.recording import record
from lowrank_fused.benchmark import Case, Row, default_names, kept_bytes, providers_for
from lowrank_fused.benchmark.measure import gate, layer_step
from lowrank_fused.benchmark.published import PUBLISHED, why_not
from lowrank_fused.tools.doctor import best_device

DEVICE = best_device()
ON_GPU = DEVICE.type == "cuda"
TOKENS = 8192 if ON_GPU else 128
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)) if ON_GPU else ((256, 256), (256, 1024))
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)
# Beside the defaults (the first shape, 16, TOKENS), one axis at a time.
RANKS = (8, 64, 128) if ON_GPU else (4, 64)
FEWER_TOKENS = (4096, 1024, 256) if ON_GPU else (64,)


def swept() -> list[Case]:
    """Every shape with and without dropout; then other ranks and other numbers of tokens on the first."""
    shapes = [Case(k, n, TOKENS, 16, p, dtype, DEVICE) for k, n in SHAPES for dtype in DTYPES for p in (0.0, 0.1)]
    first = SHAPES[0]
    ranks = [Case(*first, TOKENS, rank, 0.1, DTYPES[-1], DEVICE) for rank in RANKS]
    return [*shapes, *ranks, *(Case(*first, tokens, 16, 0.1, DTYPES[-1], DEVICE) for tokens in FEWER_TOKENS)]


CASES = [(case, name) for case in swept() for name in default_names(case, with_compile=ON_GPU)]


def run_layer(benchmark: Any, case: Case, name: str) -> None:
    """Gate, then time one provider on one case."""
    (provider,) = providers_for([name], case)
    verdict = gate(provider, case)
    assert verdict == "ok", verdict
    operands = provider.operands(case)
    kept = kept_bytes(lambda: provider(operands, case.dropout), operands.parameters()) / case.tokens
    routes = provider.chosen_routes(operands, case.dropout)
    row = Row.of(case, name, "both", routes=routes, kept_bytes_per_token=kept)
    step = layer_step(provider, operands, case.dropout, "both")
    record(benchmark, row, case.title(), step, DEVICE, graph=ON_GPU and name not in PUBLISHED)


@pytest.mark.parametrize(("case", "name"), [pytest.param(c, n, id=f"{c.title()}-{n}") for c, n in CASES])
def test_layer(benchmark: Any, case: Case, name: str) -> None:
    """One provider that is always here."""
    run_layer(benchmark, case, name)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_published(benchmark: Any, dropout: float, name: str) -> None:
    """Others' kernels, where a user has installed them: after everything else, since one of them patches torch."""
    case = Case(*SHAPES[0], TOKENS, 16, dropout, DTYPES[-1], DEVICE)
    if reason := why_not(name, DEVICE, dropout, case.bias):
        pytest.skip(reason)
    run_layer(benchmark, case, name)
