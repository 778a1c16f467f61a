"""What the CPU route gains over PEFT, against goal lines: `python -m bench.cpu` (or `make bench-cpu`).

One layer forward and backward, the training step of a small encoder, and the bytes kept for backward, PEFT's
own layers and ours in turn within every round. Exit status: 0 when every goal is met, 1 when one is missed or
a layer is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.goals import Goal, as_dicts, missed
from bench.layers import LAYERS, BenchLayer
from bench.model_step import TrainingStep, demo_steps
from lowrank_fused.benchmark import (
    Case,
    Operands,
    Row,
    Spread,
    Step,
    check,
    clock_for,
    document,
    interleave,
    kept_bytes,
    paired_ratio,
    write_json,
)
from lowrank_fused.demo.model import RANK as DEMO_RANK
from lowrank_fused.routes.small import without_eager
from lowrank_fused.tools.doctor import environment
from lowrank_fused.tools.tables import markdown_table

RESULTS = Path(__file__).resolve().parent / "results" / "cpu"
DTYPES = (torch.float32, torch.bfloat16)
DROPOUTS = (0.0, 0.1)
LAYER_SHAPES = ((1024, 1024), (1024, 4096), (4096, 1024))  # in, out
GATE_TOKENS = 256
WIDTH = 384  # of the demo's encoder
HEADER = ("what", "measured", "goal", "")


@dataclass(frozen=True)
class Setting:
    """How large and how long; tests make it small."""

    shapes: tuple[tuple[int, int], ...] = LAYER_SHAPES
    tokens: int = 2048
    small: tuple[tuple[int, int], ...] = ((64, 16), (256, 64), (512, 128), (512, 256))  # in and out, tokens
    rank: int = 16
    batch: int = 32
    length: int = 32  # close to the demo's snippets
    kept_shape: tuple[int, int] = (4096, 4096)
    kept_tokens: int = 64
    layer_seconds: float = 12.0
    small_seconds: float = 3.0
    model_seconds: float = 45.0
    rounds: tuple[int, int] = (9, 200)


@dataclass
class Report:
    """Rows and goals as they come in."""

    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Everything correct and every goal met."""
        return not self.wrong and not missed(self.goals)


def layer_goals(setting: Setting, report: Report, progress: Progress) -> None:
    """One layer, forward plus backward: at least 1.05x without dropout, 1.25x with 0.1; a small one never slower."""
    for dtype in DTYPES:
        for k, n in setting.shapes:
            for p in DROPOUTS:
                case = Case(k, n, setting.tokens, setting.rank, p, dtype, label="layer")
                _layer_goal(case, 1.25 if p else 1.05, setting.layer_seconds, setting, report, progress)
    for dtype in DTYPES:
        for size, tokens in setting.small:
            for p in DROPOUTS:
                case = Case(size, size, tokens, setting.rank, p, dtype, label="small layer")
                _layer_goal(case, 1.0, setting.small_seconds, setting, report, progress)


def _layer_goal(
    case: Case, at_least: float, seconds: float, setting: Setting, report: Report, progress: Progress
) -> None:
    layers = {name: make(case) for name, make in LAYERS.items()}
    if not _correct(case, report):
        return
    steps = {name: layer.step() for name, layer in layers.items()}
    kept = {
        name: kept_bytes(lambda layer=layer: layer.module(layer.operands.x), layer.parameters()) / case.tokens
        for name, layer in layers.items()
    }
    _race(case, steps, kept, Goal(case.title(), 0.0, at_least), seconds, setting.rounds, report, progress)


def _correct(case: Case, report: Report) -> bool:
    """Both layers against float64, on fewer tokens and then by the same route where there are many."""
    few = case.with_tokens(min(case.tokens, GATE_TOKENS))
    for name, make in LAYERS.items():
        layer = make(few)
        try:
            with without_eager() if few.tokens < case.tokens else nullcontext():
                check(layer.provider(name), few, layer.operands)
        except AssertionError as fault:
            report.wrong.append(f"{name}, {few.title()}: {fault}")
            return False
    return True


def model_goals(setting: Setting, report: Report, progress: Progress) -> None:
    """The demo's training step, all linears adapted: never slower, at least 1.05x with dropout 0.1."""
    tokens = setting.batch * setting.length
    for p in DROPOUTS:
        runs, weights = demo_steps(p, setting.batch, setting.length)
        case = Case(WIDTH, WIDTH, tokens, DEMO_RANK, p, label=f"demo training step, {weights} weights")
        if not _same_losses(runs, report):
            continue
        steps = {name: run.step() for name, run in runs.items()}
        kept = {name: kept_bytes(run.loss, run.model.parameters()) / tokens for name, run in runs.items()}
        goal = Goal(f"{case.label}, {tokens} tokens, dropout {p:g}, fp32", 0.0, 1.05 if p else 1.0)
        _race(case, steps, kept, goal, setting.model_seconds, setting.rounds, report, progress)


def _same_losses(runs: dict[str, TrainingStep], report: Report) -> bool:
    """Without any dropout both must see the same loss: they hold the same weights and factors."""
    losses = {}
    for name, run in runs.items():
        run.model.eval()
        with torch.no_grad():
            losses[name] = run.loss().item()
        run.model.train()
    difference = abs(losses["peft"] - losses["ours"])
    if difference <= 1e-4 * abs(losses["peft"]):
        return True
    report.wrong.append(f"the training step starts from different losses: {losses}")
    return False


def _race(
    case: Case,
    steps: dict[str, Step],
    kept: dict[str, float],
    goal: Goal,
    seconds: float,
    rounds: tuple[int, int],
    report: Report,
    progress: Progress,
) -> None:
    """Time both in turn; add their rows, and the goal with the measured speed-up."""
    task = progress.add_task(goal.what, total=None)
    times = interleave(
        steps,
        clock_for(case.device),
        budget_s=seconds,
        min_rounds=rounds[0],
        max_rounds=rounds[1],
        on_round=lambda done, planned: progress.update(task, completed=done, total=planned),
    )
    progress.remove_task(task)
    speedup = paired_ratio(times["peft"], times["ours"])
    for name, values in times.items():
        spread = Spread.of(values)
        numbers = {"rounds": len(values), "ms_p20": spread.p20, "ms_p50": spread.p50, "ms_p80": spread.p80}
        if name == "ours":
            numbers |= {"speedup": speedup.p50, "speedup_p20": speedup.p20, "speedup_p80": speedup.p80}
        report.rows.append(Row.of(case, name, "both", kept_bytes_per_token=kept[name], **numbers))
    report.goals.append(replace(goal, value=speedup.p50, spread=(speedup.p20, speedup.p80)))


def kept_goals(setting: Setting, report: Report) -> None:
    """Bytes a token keeps: at most PEFT's, at least 28 % fewer with dropout in bf16, a shared x once."""
    k, n = setting.kept_shape
    for dtype in DTYPES:
        for p in DROPOUTS:
            case = Case(k, n, setting.kept_tokens, setting.rank, p, dtype)
            layers = {name: make(case) for name, make in LAYERS.items()}
            kept = {name: _kept_by([layer]) / case.tokens for name, layer in layers.items()}
            bound = kept["peft"]
            if p and dtype == torch.bfloat16:
                # PyTorch's dropout keeps its mask in x's dtype on a CPU, as bytes on a GPU: the less counts.
                bound = 0.72 * min(bound, 2 * k + k + 2 * setting.rank)
            what = f"kept per token, {case.title()}"
            report.goals.append(Goal(what, kept["ours"], bound, "B", at_least=False))
    for p in DROPOUTS:
        case = Case(k, n, setting.kept_tokens, setting.rank, p, torch.bfloat16)
        x = Operands.random(case)
        layers = [LAYERS["ours"](case, x) for _ in range(3)]
        alone = _kept_by(layers[:1]) / case.tokens
        bound = alone * 3 - 2 * 2 * k
        what = f"kept per token by q, k, v that are given one x, {case.title()}"
        report.goals.append(Goal(what, _kept_by(layers) / case.tokens, bound, "B", at_least=False))


def _kept_by(layers: Sequence[BenchLayer]) -> int:
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    with without_eager():
        return kept_bytes(lambda: [layer.module(layer.operands.x) for layer in layers], parameters)


def run(setting: Setting, console: Console) -> Report:
    """All measurements of one setting."""
    report = Report()
    with Progress(console=console, transient=True) as progress:
        kept_goals(setting, report)
        layer_goals(setting, report, progress)
        model_goals(setting, report, progress)
    return report


def markdown(report: Report, content: dict[str, Any]) -> str:
    """The result as a page: machine, command, goals, times."""
    facts = content["environment"]
    times = [
        (
            f"{row.label} {row.in_features} -> {row.out_features}, dropout {row.dropout:g}, {row.dtype}",
            row.provider,
            f"{row.ms_p50:.3g} ({row.ms_p20:.3g} to {row.ms_p80:.3g})",
            f"{row.kept_bytes_per_token:,.0f}",
            str(row.rounds),
        )
        for row in report.rows
    ]
    return "\n".join(
        [
            "# CPU: PEFT's eager layers and ours, in turn",
            "",
            f"{facts['cpu']}, {facts['torch_threads']} threads; torch {facts['torch']}, "
            f"PEFT {facts['peft']}, transformers {facts['transformers']}, Python {facts['python']}; "
            f"commit {content['commit']}, {content['time']}.",
            "",
            f"Command: `{' '.join(content['command'])}`. Numbers in brackets are the 20th and 80th "
            "percentile; speed-ups are medians of the ratios within rounds.",
            "",
            markdown_table(HEADER, [goal.cells() for goal in report.goals]),
            markdown_table(("forward + backward", "by", "ms", "kept B/token", "rounds"), times),
            *[f"Wrong: {fault}\n" for fault in report.wrong],
        ]
    )


def show(report: Report, console: Console) -> None:
    """Goals as a table, faults below it."""
    table = Table(*HEADER, title="PEFT (eager) against ours, in turn")
    for goal in report.goals:
        table.add_row(*goal.cells(), style=None if goal.met else "red")
    console.print(table)
    for fault in report.wrong:
        console.print(f"[red]wrong:[/red] {fault}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, show, write; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for cpu.json and cpu.md (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="two rounds of everything; nothing is written, times are not judged"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    console = Console()
    report = run(replace(Setting(), rounds=(2, 2)) if given.quick else Setting(), console)
    if given.quick:
        show(report, console)
        console.print("Two rounds say nothing about times: what was judged is correctness and the bytes kept.")
        return 1 if report.wrong or any(goal.unit == "B" for goal in missed(report.goals)) else 0
    command = ["python", "-m", "bench.cpu", *(sys.argv[1:] if arguments is None else arguments)]
    content = document(report.rows, environment(), command, goals=as_dicts(report.goals), wrong=report.wrong)
    write_json(given.out / "cpu.json", content)
    (given.out / "cpu.md").write_text(markdown(report, content), encoding="utf-8")
    show(report, console)
    console.print(f"written: {given.out / 'cpu.json'}, cpu.md")
    return 0 if report.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
