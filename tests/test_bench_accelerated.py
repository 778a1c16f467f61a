"""The benchmark of accelerated PEFT layers covers every method, compares before it times, and fails where it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

pytest.importorskip("peft")

from bench import accelerated as bench
from bench.goals import Goal
from lowrank_fused.benchmark import Spread
from lowrank_fused.peft import explain, readers

SMALL = {"VBLoRAConfig": {"vector_length": 16, "num_vectors": 8}, "UniLoraConfig": {"theta_d_length": 100}}
TINY = bench.Setting(
    size=48,
    tokens=24,
    cases=tuple(
        bench.LayerCase(
            c.title,
            c.config,
            {**c.settings, **{k: 4 for k in ("r", "init_r") if k in c.settings}, **SMALL.get(c.config, {})},
            c.adapters,
            c.at_least,
        )
        for c in bench.CASES
    ),
    encoder={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30000,
    },
    batch=2,
    length=6,
    many_layers=3,
    small_calls=1,
    layer_seconds=0.0,
    model_seconds=0.0,
    rounds=(2, 2),
)


@pytest.fixture(scope="module")
def report() -> bench.Report:
    return bench.run(TINY, Console(quiet=True))


def test_everything_is_compared_and_timed(report: bench.Report) -> None:
    assert report.wrong == []
    assert len(report.goals) == 1 + 3 * len(bench.CASES) + 2 - len(report.left_out)
    assert len(report.times) == len(report.goals) - 1 and set(report.rounds.values()) == {2}
    assert all(times["theirs"].p50 > 0 and times["ours"].p50 > 0 for times in report.times.values())
    assert len(report.calls) == 4
    assert "accelerate, a model of 3 layers" in report.goals[0].what


def test_the_goals_are_those_that_were_promised(report: bench.Report) -> None:
    more_than_one = {goal.what: goal.bound for goal in report.goals[1:] if goal.bound != 1.0}
    promised = {"lora r=16, dropout 0.1, fp32": 1.25, "dora r=16, fp32": 1.2, "peanut r=32, fp32": 1.8}
    missing = {what.partition(":")[0] for what in report.left_out}
    assert more_than_one == {what: bound for what, bound in promised.items() if what not in missing}
    assert (report.goals[0].bound, report.goals[0].unit, report.goals[0].at_least) == (1000.0, "ms", False)


def test_every_method_that_has_a_reader_is_measured() -> None:
    import peft

    measured = set()
    for case in TINY.cases:
        if hasattr(peft, case.config):
            pair = bench.layer_pair(case, torch.float32, True, TINY.size, TINY.tokens)
            pair.forwards["ours"](pair.x)
            measured |= {row.method for row in explain(pair.forwards["ours"]).rows}
    known = {m for cls in readers.layer_classes().values() for m in cls.methods}
    assert measured == known


@pytest.mark.parametrize(("fp32_adapters", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_adapters_have_the_dtype_that_the_row_says(fp32_adapters: bool, dtype: torch.dtype) -> None:
    pair = bench.layer_pair(TINY.cases[2], torch.bfloat16, fp32_adapters, TINY.size, TINY.tokens)
    x, *trained = pair.leaves["ours"]
    assert x.dtype == torch.bfloat16 and len(trained) == 4
    assert {p.dtype for p in trained} == {dtype}
    assert not {id(p) for p in trained} & {id(p) for p in pair.leaves["theirs"][1:]}


def only(*titles: str) -> bench.Setting:
    return bench.replace(TINY, cases=tuple(case for case in TINY.cases if case.title in titles))


def spoil(monkeypatch: pytest.MonkeyPatch, spoils: Callable[[str], bool]) -> None:
    """Have accelerated models of such routes compute something else."""
    accelerated = bench.accelerated_twin

    def wrong(model: nn.Module, route: str = "auto") -> nn.Module:
        twin = accelerated(model, route)
        if spoils(route):
            twin.register_forward_hook(lambda module, given, y: y * 1.1)
        return twin

    monkeypatch.setattr(bench, "accelerated_twin", wrong)


def test_another_function_is_told_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda route: True)
    found = bench.Report()
    with bench.Progress(console=Console(quiet=True)) as progress:
        bench.layers(only("lora r=16, dropout 0.1"), found, progress)
    assert len(found.wrong) == 3 and "differs from PEFT by" in found.wrong[0]
    assert not found.goals and not found.passed


def test_layers_that_are_left_to_peft_are_told_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_FUSED_ROUTE", "off")
    found = bench.Report()
    bench.accelerate_many(TINY, found)
    with bench.Progress(console=Console(quiet=True)) as progress:
        bench.layers(only("lora r=16"), found, progress)
        bench.training_steps(TINY, found, progress)
    assert len(found.wrong) == 1 + 3 + 2 and all("left to PEFT" in what for what in found.wrong)
    assert [goal.unit for goal in found.goals] == ["ms"] and not found.passed


def test_what_peft_computes_as_fast_is_told_beside_ours() -> None:
    found = bench.Report()
    with bench.Progress(console=Console(quiet=True)) as progress:
        bench.layers(only("vera r=256", "tinylora r=2"), found, progress)
    assert not found.wrong
    left = {goal.what: goal for goal in found.goals if goal.same}
    assert list(left) == ["vera r=256, bf16, adapters fp32", "vera r=256, bf16, adapters bf16"]
    for goal in left.values():
        assert goal.same.startswith("left to PEFT; by route addmm ") and goal.spread is not None
        assert goal.cells()[-1] == (goal.same if goal.spread[1] >= 1.0 else "MISSED")
    assert {what for what, times in found.times.items() if "addmm" in times} == set(left)


def test_our_own_is_compared_too_where_calls_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda route: route != "auto")
    found = bench.Report()
    with bench.Progress(console=Console(quiet=True)) as progress:
        bench.layers(only("vera r=256"), found, progress)
    of_adapters = [
        "vera r=256, bf16, adapters fp32: differs from PEFT by",
        "vera r=256, bf16, adapters bf16: differs from",
    ]
    assert [what[: len(start)] for what, start in zip(found.wrong, of_adapters, strict=True)] == of_adapters
    assert len(found.goals) == 1


def test_sides_that_run_the_same_code_are_met_within_chance() -> None:
    goal = Goal("left", 0.99, 1.0, spread=(0.95, 1.01), same="left to PEFT")
    assert goal.met and goal.cells()[-1] == "left to PEFT"
    slower = bench.replace(goal, spread=(0.95, 0.99))
    assert not slower.met and slower.cells()[-1] == "MISSED"
    assert not bench.replace(goal, same="").met


@pytest.mark.parametrize(("value", "wrong", "status"), [(1.3, [], 0), (1.2, [], 1), (1.3, ["lora: differs"], 1)])
def test_exit_status_and_files(
    value: float, wrong: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = Spread(1.0, 2.0, 3.0)
    crafted = bench.Report(
        [Goal("lora", value, 1.25)],
        {"lora": {"theirs": spread, "ours": spread}},
        {"lora": 9},
        {"small": {"theirs": spread, "ours": Spread(4.0, 5.0, 6.0)}},
        wrong,
    )
    monkeypatch.setattr(bench, "run", lambda setting, console: crafted)
    threads = torch.get_num_threads()
    try:
        assert bench.main(["--out", str(tmp_path), "--threads", "1"]) == status
    finally:
        torch.set_num_threads(threads)
    content = json.loads((tmp_path / "accelerated.json").read_text())
    assert content["goals"][0]["met"] == (value >= 1.25) and content["wrong"] == wrong
    assert content["ms"]["lora"]["ours"]["p50"] == 2.0 and len(content["load"]) == 2
    page = (tmp_path / "accelerated.md").read_text()
    assert "2.0 (1.0 to 3.0)" in page and "+3 µs" in page and ("MISSED" in page) == (value < 1.25)
    assert content["environment"]["cpu"] in page and content["commit"] in page
