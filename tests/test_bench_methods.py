"""The benchmark of every method: what it compares computes the same, and what it finds is told."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from bench import methods as bench
from bench.published import PUBLISHED
from lowrank_fused import methods

SIZE, TOKENS = 96, 24
SMALL = {"vblora": {"vector_length": 32, "num_vectors": 8}, "unilora": {"theta_d_length": 100}}


def small(case: bench.MethodCase) -> bench.MethodCase:
    options = {**case.options, **SMALL.get(case.method, {})}
    return bench.MethodCase(case.method, min(methods.resolve(case.method, case.rank)[0], 8), options)


def test_every_method_is_measured_against_something():
    assert {case.method for case in bench.CASES} == methods.registry().keys()
    without = [n for n in methods.registry() if methods.peft_format(n) is None and n not in PUBLISHED]
    assert not without


@pytest.mark.parametrize("case", [small(case) for case in bench.CASES], ids=lambda case: case.title)
def test_both_sides_compute_the_same_function_and_gradients(case):
    pytest.importorskip("peft")
    pair = bench.Pair.of(case, SIZE, TOKENS)
    assert pair.difference() < 1e-4
    grads = {}
    for name, forward in pair.forwards.items():
        found = torch.autograd.grad(forward(pair.x), pair.leaves[name], pair.dy, allow_unused=True)
        assert found[0] is not None and any(grad is not None for grad in found[1:])
        grads[name] = found[0]
    torch.testing.assert_close(grads["ours"], grads["theirs"], rtol=1e-3, atol=1e-4)


def test_a_step_uses_no_factor_of_the_step_before():
    pair = bench.Pair.of(small(bench.MethodCase("peanut")), SIZE, TOKENS)
    step = pair.step("ours")
    layer = pair.forwards["ours"]
    before = layer._generated.evaluations
    for _ in range(3):
        step.run(None)
    assert layer._generated.evaluations == before + 3


def test_the_page_has_times_and_work(tmp_path):
    status = bench.main(["--out", str(tmp_path), "--method", "lora", "--size", "32", "--tokens", "16", "--rounds", "1"])
    assert status in (0, 1)
    page = (tmp_path / "methods.md").read_text()
    assert "lora r=16" in page and "PEFT's layer" in page and "| ours |" in page.replace("  ", " ")
    content = json.loads((tmp_path / "methods.json").read_text())
    assert content["goals"][0]["bound"] == 1.05 and "lora r=16" in content["work"]


def test_another_function_is_told_and_fails(monkeypatch):
    monkeypatch.setitem(PUBLISHED, "raclora", lambda layer: lambda x: 2 * layer(x))
    report = bench.run([bench.MethodCase("raclora")], Console(quiet=True), size=32, tokens=16, rounds=1)
    assert not report.passed and "differs from the published algorithm" in report.wrong[0]
