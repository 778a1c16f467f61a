"""pytest-benchmark cases of a block: the seven linears of Llama-3-8B that share inputs as they do in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.recording import record
from lowrank_fused.benchmark import Row, kept_bytes
from lowrank_fused.benchmark.block import BlockCase, block_names, block_providers
from lowrank_fused.benchmark.linears import check_linears
from lowrank_fused.benchmark.measure import gate, layer_step
from lowrank_fused.tools.doctor import best_device

DEVICE = best_device()
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
SIZES: dict[str, Any] = (
    {"in_features": 4096, "out_features": 14336, "kv_features": 1024, "tokens": 8192, "rank": 16}
    if ON_GPU
    else {"in_features": 128, "out_features": 448, "kv_features": 32, "tokens": 64, "rank": 8}
)
LABEL = "block of llama-3-8b" if ON_GPU else "block, 1/32 of llama-3-8b"
CASES = [BlockCase(**SIZES, dropout=p, dtype=DTYPE, device=DEVICE, label=LABEL) for p in (0.0, 0.1)]
NAMES = [(case, name) for case in CASES for name in block_names(case, with_compile=ON_GPU)]


@pytest.mark.parametrize(("case", "name"), [pytest.param(c, n, id=f"p{c.dropout:g}-{n}") for c, n in NAMES])
def test_block(benchmark: Any, case: BlockCase, name: str) -> None:
    """One provider: every output and gradient against float64, then time."""
    (provider,) = block_providers([name], case)
    verdict = gate(provider, case, check_linears)
    assert verdict == "ok", verdict
    operands = provider.operands(case)
    kept = kept_bytes(lambda: provider(operands, case.dropout), operands.parameters()) / case.tokens
    routes = provider.chosen_routes(operands, case.dropout)
    row = Row.of(case, name, "both", routes=routes, kept_bytes_per_token=kept)
    record(benchmark, row, case.title(), layer_step(provider, operands, case.dropout, "both"), DEVICE, graph=ON_GPU)
