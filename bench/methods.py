"""What every method costs here and in PEFT or its authors' code: `python -m bench.methods`.

One layer, forward and backward with everything recomputed that an optimiser step changes, in turn within every round;
and the work of both, counted. Exit status: 0 when every goal is met, 1 when one is missed or a layer is wrong.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import lowrank_fused as lf
from bench.goals import Goal, as_dicts, missed
from bench.published import PUBLISHED
from bench.work import Work, count_work
from lowrank_fused import methods
from lowrank_fused.benchmark import Spread, Step, clock_for, document, interleave, paired_ratio, write_json
from lowrank_fused.tools.doctor import environment
from lowrank_fused.tools.tables import markdown_table

__all__ = ["CASES", "MethodCase", "Pair", "main", "run"]

RESULTS = Path(__file__).resolve().parent / "results" / "methods"
HEADER = ("method", "against", "speed-up", "goal", "")
WORK_HEADER = ("method", "by", "operators forward", "backward", "products forward", "backward")


@dataclass(frozen=True)
class MethodCase:
    """A method at the size its source uses, and how much faster than that source it must be."""

    method: str
    rank: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    at_least: float = 1.0

    @property
    def title(self) -> str:
        """Method, rank, options, dropout if any."""
        rank = methods.resolve(self.method, self.rank)[0]
        told = self.options | ({"dropout": self.dropout} if self.dropout else {})
        return f"{self.method} r={rank}" + "".join(f", {key}={value}" for key, value in told.items())


# A length that has two elements of the factors to each of its own, as in a whole model.
_SHORT_VECTOR = {"theta_d_length": 4096}

CASES: tuple[MethodCase, ...] = (
    MethodCase("lora", 16, at_least=1.05),
    MethodCase("peanut", 32, at_least=1.8),
    MethodCase("loldu", 64, at_least=1.3),
    MethodCase("loldu", 256, at_least=1.15),
    MethodCase("loldu", 1024),
    MethodCase("collaborative", 8, {"num_A": 4, "num_B": 10}, at_least=5.0),
    MethodCase("collaborative", 8, {"num_A": 2, "num_B": 3}),
    MethodCase("collaborative", 8, {"num_A": 2, "num_B": 3}, dropout=0.1),
    MethodCase("unilora", 4, _SHORT_VECTOR),
    *(
        MethodCase(name)
        for name in methods.registry()
        if name not in ("lora", "peanut", "loldu", "collaborative", "unilora")
    ),
)


# Operators forward and backward, and products in multiples of the frozen layer's, counted in the authors' own code
# (LoRA, NEAT and VeRA: PEFT's) with 2048 tokens through 1024 -> 1024.
ORIGINAL: dict[str, tuple[int, int, float, float]] = {
    "lora r=16": (5, 7, 1.03, 1.06),
    "peanut r=32": (7, 9, 2.03, 3.05),
    "loldu r=64": (7, 5, 1.06, 2.03),
    "loldu r=256": (7, 5, 1.28, 2.16),
    "loldu r=1024": (7, 5, 2.50, 3.00),
    "collaborative r=8, num_A=4, num_B=10": (161, 307, 1.62, 2.25),
    "collaborative r=8, num_A=2, num_B=3": (25, 44, 1.09, 1.19),
    "collaborative r=8, num_A=2, num_B=3, dropout=0.1": (49, 50, 1.09, 1.19),
    "unilora r=4, theta_d_length=4096": (8, 13, 1.01, 1.02),
    "vera r=256": (6, 10, 1.50, 1.50),
}


@dataclass
class Pair:
    """Our layer and the other, on one x and dy; `leaves` are what gets gradients, x first."""

    x: Tensor
    dy: Tensor
    forwards: dict[str, Callable[[Tensor], Tensor]]
    leaves: dict[str, list[Tensor]]
    against: str

    @classmethod
    def of(cls, case: MethodCase, size: int, tokens: int) -> Pair:
        """PEFT's layer where it has the method, loaded from our file; the authors' algorithm elsewhere."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(size, size, bias=False))
        twin = copy.deepcopy(model)
        settings = {"method": case.method, "rank": case.rank, "dropout": case.dropout, **case.options}
        lf.inject(model, target_modules=["0"], **settings).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter) if parameter.requires_grad else 0.0)
        x, dy = torch.randn(tokens, size, requires_grad=True), torch.randn(tokens, size)
        layer = model[0]
        ours = [getattr(layer, name) for name in layer.trained_names]  # type: ignore[union-attr, arg-type]
        theirs, against = ours, "the published algorithm"
        if methods.peft_format(case.method, case.options) is not None:
            other, against = _in_peft(model, twin), "PEFT's layer"
            theirs = [p for p in other.parameters() if p.requires_grad]
            forward = other.__call__
        else:
            forward = PUBLISHED[case.method](layer)
        return cls(x, dy, {"ours": layer, "theirs": forward}, {"ours": [x, *ours], "theirs": [x, *theirs]}, against)

    def step(self, name: str) -> Step:
        """Forward and backward, as after an optimiser step: no factor from the step before may serve."""
        leaves = self.leaves[name]

        def run() -> Any:
            with torch.no_grad():
                torch._foreach_mul_(leaves[1:], 1.0)
            return torch.autograd.grad(self.forwards[name](self.x), leaves, self.dy, allow_unused=True)

        return Step(lambda _: run())

    def work(self, name: str) -> Work:
        """What a forward and a backward do."""
        return count_work(self.forwards[name], self.x, self.leaves[name], self.dy)

    def difference(self) -> float:
        """Largest difference between the two outputs, relative to their size."""
        with torch.no_grad():
            ours, theirs = (self.forwards[name](self.x) for name in ("ours", "theirs"))
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _in_peft(model: nn.Module, twin: nn.Module) -> nn.Module:
    """PEFT's model of the adapter that `model` wears, over `twin`."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        lf.save_adapter(model, folder)
        return PeftModel.from_pretrained(twin, folder, is_trainable=True).train()


@dataclass
class Report:
    """Rows of both tables, goals, and what computed something else."""

    goals: list[Goal] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    times: dict[str, dict[str, Spread]] = field(default_factory=dict)
    work: dict[str, dict[str, Work]] = field(default_factory=dict)
    frozen: Work | None = None
    wrong: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Everything the same function, and every goal met."""
        return not self.wrong and not missed(self.goals)


def run(cases: Sequence[MethodCase], console: Console, *, size: int, tokens: int, rounds: int) -> Report:
    """Count and time all cases."""
    report = Report()
    linear, x = nn.Linear(size, size, bias=False).requires_grad_(False), torch.randn(tokens, size, requires_grad=True)
    report.frozen = count_work(linear, x, [x], torch.randn(tokens, size))
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("methods", total=len(cases))
        for case in cases:
            progress.update(bar, description=case.title)
            pair = Pair.of(case, size, tokens)
            # Masks differ: with dropout it is the same pair without that has to agree.
            alike = Pair.of(replace(case, dropout=0.0), size, tokens) if case.dropout else pair
            difference = alike.difference()
            if difference > 1e-3:
                report.wrong.append(f"{case.title}: differs from {pair.against} by {difference:.1e}")
            times = interleave(
                {name: pair.step(name) for name in pair.forwards},
                clock_for(x.device),
                min_rounds=rounds,
                max_rounds=rounds,
            )
            ratio = paired_ratio(times["theirs"], times["ours"])
            goal = Goal(case.title, ratio.p50, case.at_least, spread=(ratio.p20, ratio.p80))
            report.goals.append(goal)
            report.against.append(pair.against)
            report.times[case.title] = {name: Spread.of(values) for name, values in times.items()}
            report.work[case.title] = {name: pair.work(name) for name in pair.forwards}
            progress.advance(bar)
    return report


def goal_rows(report: Report) -> list[tuple[str, ...]]:
    """Cells of the table of times."""
    return [
        (what, against, *rest)
        for (what, *rest), against in zip((goal.cells() for goal in report.goals), report.against, strict=True)
    ]


def work_rows(report: Report) -> list[tuple[str, ...]]:
    """Cells of the table of work; products in multiples of the frozen layer's."""
    assert report.frozen is not None
    rows = []
    for title, both in report.work.items():
        for name, work in both.items():
            products = (
                work.forward_flops / report.frozen.forward_flops,
                work.backward_flops / report.frozen.backward_flops,
            )
            rows.append(
                _work_row(
                    title if name == "ours" else "", name, work.forward_operators, work.backward_operators, *products
                )
            )
        if title in ORIGINAL:
            rows.append(_work_row("", "original code", *ORIGINAL[title]))
    return rows


def _work_row(
    title: str, by: str, ahead: int, behind: int, products_ahead: float, products_behind: float
) -> tuple[str, ...]:
    return title, by, str(ahead), str(behind), f"{products_ahead:.2f}x", f"{products_behind:.2f}x"


def markdown(report: Report, content: dict[str, Any], size: int, tokens: int) -> str:
    """The result as a page."""
    facts = content["environment"]
    return "\n".join(
        [
            "# Every method against PEFT's layer or the published algorithm, on a CPU",
            "",
            f"{facts['cpu']}, {facts['torch_threads']} threads; torch {facts['torch']}, PEFT {facts['peft']}, "
            f"Python {facts['python']}; commit {content['commit']}, {content['time']}.",
            "",
            f"Command: `{' '.join(content['command'])}`. One layer {size} -> {size}, {tokens} tokens, fp32, "
            "forward and backward with gradients for x and what trains, run in turn; medians of the ratios "
            "within rounds, 20th and 80th percentile in brackets.",
            "",
            markdown_table(HEADER, goal_rows(report)),
            "Work: operators of PyTorch that compute something, and floating-point operations of products in multiples "
            "of the frozen layer's. What is computed once per optimiser step is not in it; its pull-back, which every "
            "backward does, is. Theirs is PEFT's layer or our rendering of the published algorithm; "
            "original code is what was counted in the authors' own.",
            "",
            markdown_table(WORK_HEADER, work_rows(report)),
            *[f"Wrong: {fault}\n" for fault in report.wrong],
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, show, write; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.methods", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for methods.json and methods.md")
    parser.add_argument("--method", action="append", help="only this one; may be repeated")
    parser.add_argument("--size", type=int, default=1024, help="in and out features (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    console = Console()
    cases = [case for case in CASES if chosen.method is None or case.method in chosen.method]
    report = run(cases, console, size=chosen.size, tokens=chosen.tokens, rounds=chosen.rounds)
    for header, rows in ((HEADER, goal_rows(report)), (WORK_HEADER, work_rows(report))):
        table = Table(*header)
        for row in rows:
            table.add_row(*row, style="red" if "MISSED" in row else None)
        console.print(table)
    for fault in report.wrong:
        console.print(f"[red]wrong:[/red] {fault}")
    given = sys.argv[1:] if arguments is None else arguments
    content = document([], environment(), ["python", "-m", "bench.methods", *given])
    content |= {
        "goals": as_dicts(report.goals),
        "work": {title: {name: asdict(work) for name, work in both.items()} for title, both in report.work.items()},
        "ms": {title: {name: asdict(ms) for name, ms in both.items()} for title, both in report.times.items()},
        "wrong": report.wrong,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_json(chosen.out / "methods.json", content)
    (chosen.out / "methods.md").write_text(markdown(report, content, chosen.size, chosen.tokens), encoding="utf-8")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
