"""The suite under `pytest bench`: what it records can be reported, and a wrong training step gets no time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import causal, recording
from bench.causal import CausalCase, causal_steps, factors_of, step_verdicts, warmed
from bench.stages import ROOT
from lowrank_fused.benchmark import Case, Row, Step
from lowrank_fused.benchmark.graph import captured
from lowrank_fused.errors import UnsupportedError
from lowrank_fused.grouping import group_of
from lowrank_fused.report import load

NARROW = {
    "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 200,
}  # fmt: skip
SMALL = CausalCase("llama-3-8b", 2, 16, rank=4, dtype=torch.float32, settings=tuple(NARROW.items()))


def test_what_the_suite_records_can_be_reported(tmp_path: Path) -> None:
    """One run of the block's cases with the clock on."""
    out = tmp_path / "suite.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_block.py", "-q", "-k", "p0-", f"--benchmark-json={out}"]
    # Workers of a parallel run tell the benchmarks to leave the clock off.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:]
    results = load([out])
    rows = {row.provider: row for row in results.rows}
    assert {"frozen", "eager", "three-gemm", "addmm"} <= set(rows)
    assert {row.what for row in rows.values()} == {"block"}
    assert rows["addmm"].rounds == 10 and rows["addmm"].speedup and rows["addmm"].kept_bytes_per_token
    assert rows["eager"].overhead == pytest.approx(rows["eager"].ms_p50 / rows["frozen"].ms_p50)
    assert re.fullmatch("[0-9a-f]{12}", results.sources[0].commit) or results.sources[0].commit == "unknown"


@pytest.mark.parametrize("model", ["llama-3-8b", "qwen2.5-7b"])
def test_training_steps_compute_what_peft_does(model: str) -> None:
    names = ["frozen", "eager", "accelerate", "inject", "grouped"]
    assert step_verdicts(replace(SMALL, model=model), names) == dict.fromkeys(names, "ok")


def test_groups_have_formed_when_a_step_is_judged() -> None:
    for name, make in causal_steps(SMALL, ["accelerate", "grouped", "inject"]).items():
        step = make()
        before = [factor.clone() for factor in factors_of(step.model).values()]
        warmed(step)
        states = {found.state() for m in step.model.modules() if (found := group_of(m))}
        shared = {"share x: q_proj, k_proj, v_proj", "share x: gate_proj, up_proj"}
        assert states == (set() if name == "inject" else shared), name
        assert all(torch.equal(a, b) for a, b in zip(before, factors_of(step.model).values(), strict=True))


def test_a_wrong_training_step_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    good = causal._with_ours

    def wrong_scale(*given):
        model = good(*given)
        model.model.layers[0].self_attn.k_proj.scaling *= 1.02
        return model

    monkeypatch.setattr(causal, "_with_ours", wrong_scale)
    verdict = step_verdicts(SMALL, ["inject"])["inject"]
    assert re.match(r"wrong: .* is off by \S+ .*, allowed", verdict), verdict

    def one_frozen(*given):
        model = good(*given)
        model.model.layers[0].mlp.up_proj.lora_A.requires_grad_(False)
        return model

    monkeypatch.setattr(causal, "_with_ours", one_frozen)
    verdict = step_verdicts(SMALL, ["inject"])["inject"]
    assert re.match(r"wrong: trains \[.*up_proj A'\] or does not", verdict), verdict


def test_steps_start_from_the_same_factors_and_share_frozen_weights() -> None:
    steps = {name: make() for name, make in causal_steps(SMALL).items()}
    assert set(steps) == {"frozen", "eager", "accelerate", "inject", "grouped"}
    assert steps["frozen"].optimizer is None and not factors_of(steps["frozen"].model)
    eager, ours = factors_of(steps["eager"].model), factors_of(steps["inject"].model)
    assert len(eager) == 14 and all(torch.equal(eager[key], ours[key]) for key in eager)
    weights = {steps[name].model.get_input_embeddings().weight.data_ptr() for name in steps}
    assert len(weights) == 1
    losses = {name: [step.run().item() for _ in range(2)] for name, step in steps.items()}
    assert losses["frozen"][0] == losses["frozen"][1]
    for name in ("accelerate", "inject", "grouped"):
        assert losses[name] == pytest.approx(losses["eager"], rel=1e-5) and losses[name][0] != losses[name][1]
    with pytest.raises(ValueError, match="must be one of frozen, eager, .* got 'peft'"):
        causal_steps(SMALL, ["peft"])


def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match="needs a CUDA device, got cpu"):
        captured(lambda: None, torch.device("cpu"))


@pytest.mark.parametrize("holds", [True, False])
def test_the_recorder_on_a_gpu(holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device times by events with a cold and a warm cache, and of replays where the step could be captured."""
    flushed: list[bool] = []

    def clock_for(device: object, flush_l2: bool) -> object:
        return lambda step: flushed.append(flush_l2) or step.run(step.prepare())

    def capture(run: object, device: object) -> tuple[Step, None]:
        if not holds:
            raise RuntimeError("not permitted when stream is capturing\nmore")
        return Step(lambda _: 0.5), None

    class Fixture:
        disabled, group = False, None

        def __init__(self) -> None:
            self.extra_info: dict[str, object] = {}

        def pedantic(self, run, setup, rounds, warmup_rounds) -> None:
            given, named = setup()
            run(*given, **named)

    waited: list[object] = []
    monkeypatch.setattr(recording, "clock_for", clock_for)
    monkeypatch.setattr(recording, "captured", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    fixture, gpu = Fixture(), torch.device("cuda")
    case = Case(8, 6, 4, 2)
    recording.record(fixture, Row.of(case, "auto", "both"), "title", Step(lambda _: 2.0), gpu, graph=True)
    found = fixture.extra_info
    assert waited == [gpu] and fixture.group == "title" and found["provider"] == "auto" and found["flops"]
    times = {name: spread["p50"] for name, spread in found["device_ms"].items()}
    replays = {"graph, cold": 0.5, "graph, warm": 0.5} if holds else {}
    assert times == {"cold": 2.0, "warm": 2.0, **replays} and {True, False} == set(flushed)
    assert found.get("not_captured") == (None if holds else "not permitted when stream is capturing")
