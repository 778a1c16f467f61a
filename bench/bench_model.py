"""pytest-benchmark cases of a training step: a few layers of Llama and Qwen, LoRA on all their linears."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.causal import CausalCase, causal_steps, default_names, step_verdicts, warmed
from bench.recording import record
from lowrank_fused.benchmark import kept_bytes
from lowrank_fused.tools.doctor import best_device

DEVICE = best_device()
ON_GPU = DEVICE.type == "cuda"
NARROW = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
}
SETTINGS = {"num_hidden_layers": 2, "vocab_size": 32000} if ON_GPU else NARROW
SIZES: dict[str, Any] = {"batch": 2, "length": 2048} if ON_GPU else {"batch": 2, "length": 32, "rank": 4}
CASES = [
    CausalCase(
        model,
        **SIZES,
        dropout=p,
        dtype=torch.bfloat16 if ON_GPU else torch.float32,
        device=DEVICE,
        settings=tuple(SETTINGS.items()),
    )
    for model in ("llama-3-8b", "qwen2.5-7b")
    for p in (0.0, 0.1)
]
NAMES = [(case, name) for case in CASES for name in default_names(case, with_compile=ON_GPU)]


@pytest.mark.parametrize(("case", "name"), [pytest.param(c, n, id=f"{c.model}-p{c.dropout:g}-{n}") for c, n in NAMES])
def test_step(benchmark: Any, case: CausalCase, name: str) -> None:
    """One provider: loss and gradients first, then forward, loss, backward and AdamW."""
    verdict = step_verdicts(case, [name])[name]
    assert verdict == "ok", verdict
    run = warmed(causal_steps(case, [name])[name]())
    kept = None if name == "compile" else kept_bytes(run.loss, run.model.parameters()) / case.tokens
    record(benchmark, case.row(name, kept_bytes_per_token=kept), case.title(), run.step(), DEVICE)
