"""The CPU benchmark against PEFT runs on small layers, finds wrong ones, and fails on a missed goal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("peft")

from bench import cpu, layers
from bench.goals import Goal, as_dicts, missed
from lowrank_fused.benchmark import Case, Row, check
from lowrank_fused.tools.tables import markdown_table

TINY = cpu.Setting(
    shapes=((32, 48),),
    tokens=24,
    small=((16, 8),),
    rank=4,
    batch=2,
    length=4,
    kept_shape=(64, 48),
    kept_tokens=8,
    layer_seconds=0.0,
    small_seconds=0.0,
    model_seconds=0.0,
    rounds=(2, 2),
)


@pytest.fixture(scope="module")
def report() -> cpu.Report:
    return cpu.run(TINY, Console(quiet=True))


def test_everything_is_correct_and_timed(report: cpu.Report) -> None:
    assert report.wrong == []
    timed = {(row.label, row.dtype, row.dropout, row.provider): row for row in report.rows}
    assert len(timed) == 2 * (2 * 2 * 2 + 2), "two layers in two dtypes and the model, each with and without dropout"
    assert all(row.rounds == 2 and row.ms_p50 > 0 for row in report.rows)
    assert all((row.speedup is not None) == (row.provider == "ours") for row in report.rows)
    assert len(report.goals) == 4 + 2 + 4 + 4 + 2


def test_kept_bytes_goals_hold_whatever_the_clock_says(report: cpu.Report) -> None:
    kept = [goal for goal in report.goals if goal.what.startswith("kept")]
    assert len(kept) == 6 and not missed(kept)
    k, r = 64, 4
    ours = {goal.what.partition(",")[0]: goal.value for goal in kept}
    with_dropout = next(g for g in kept if "dropout 0.1, bf16" in g.what and "q, k, v" not in g.what)
    assert with_dropout.value == 2 * k + 2 * r + k / 8
    assert with_dropout.bound == pytest.approx(0.72 * (3 * k + 2 * r))
    shared = [g.value for g in kept if "q, k, v" in g.what]
    assert shared == [2 * k + 3 * 2 * r, 2 * k + 3 * (2 * r + k / 8)]
    assert ours


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case, operands: layers.Operands | None = None) -> layers.BenchLayer:
        layer = layers.peft_layer(case, operands)
        layer.module.register_forward_hook(lambda module, given, y: y * 1.01)
        return layer

    monkeypatch.setitem(layers.LAYERS, "ours", wrong)
    found = cpu.Report()
    with cpu.Progress(console=Console(quiet=True)) as progress:
        cpu.layer_goals(TINY, found, progress)
    assert len(found.wrong) == 8 and "ours max" in found.wrong[0]
    assert found.rows == found.goals == [] and not found.passed


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", layers.LAYERS)
def test_layers_are_what_they_say(name: str, dropout: float) -> None:
    case = Case(32, 48, 24, 4, dropout, torch.float32)
    layer = layers.LAYERS[name](case)
    check(layer.provider(name), case, layer.operands)
    assert layer.module.get_parameter(layer.b).abs().sum() > 0
    assert [g.shape for g in layer.step().run(None)] == [(24, 32), (4, 32), (48, 4)]


def test_goals() -> None:
    fast, small = (
        Goal("speed", 1.1, 1.05),
        Goal("bytes", 900.0, 800.0, "B", at_least=False, spread=(890.0, 910.0)),
    )
    assert fast.met and not small.met and missed([fast, small]) == [small]
    assert small.cells() == ("bytes", "900.0 B (890.0 to 910.0)", "at most 800.0 B", "MISSED")
    assert [entry["met"] for entry in as_dicts([fast, small])] == [True, False]
    assert markdown_table(("a", "b"), [("1", "2")]) == "| a | b |\n| :-- | --: |\n| 1 | 2 |\n"


@pytest.mark.parametrize(("value", "wrong", "status"), [(1.2, [], 0), (1.0, [], 1), (1.2, ["ours: y"], 1)])
def test_exit_status_and_files(
    value: float, wrong: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(32, 48, 24, 4, label="layer")
    row = Row.of(case, "ours", "both", rounds=3, ms_p20=1.0, ms_p50=2.0, ms_p80=3.0, kept_bytes_per_token=8.0)
    crafted = cpu.Report([row], [Goal("layer", value, 1.05)], wrong)
    monkeypatch.setattr(cpu, "run", lambda setting, console: crafted)
    threads = torch.get_num_threads()
    try:
        assert cpu.main(["--out", str(tmp_path), "--threads", "1"]) == status
    finally:
        torch.set_num_threads(threads)
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert content["goals"][0]["met"] == (value >= 1.05) and content["wrong"] == wrong
    assert content["command"][:3] == ["python", "-m", "bench.cpu"] and content["rows"][0]["ms_p50"] == 2.0
    page = (tmp_path / "cpu.md").read_text()
    assert "at least 1.05 x" in page and ("MISSED" in page) == (value < 1.05)
    assert content["environment"]["cpu"] in page and content["commit"] in page


@pytest.mark.parametrize(
    ("goals", "wrong", "status"),
    [
        ([Goal("layer", 0.5, 1.05)], [], 0),
        ([Goal("kept", 900.0, 800.0, "B", at_least=False)], [], 1),
        ([Goal("layer", 1.2, 1.05)], ["ours: y"], 1),
    ],
)
def test_a_quick_run_judges_no_times(
    goals: list[Goal], wrong: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[cpu.Setting] = []

    def run(setting: cpu.Setting, console: Console) -> cpu.Report:
        asked.append(setting)
        return cpu.Report([], goals, wrong)

    monkeypatch.setattr(cpu, "run", run)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert cpu.main(["--quick", "--out", str(tmp_path)]) == status
    assert asked[0].rounds == (2, 2) and asked[0].shapes == cpu.Setting().shapes
    assert not list(tmp_path.iterdir())
