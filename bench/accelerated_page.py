"""What `bench.accelerated` found as a page, and as tables a person looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lowrank_fused.tools.tables import markdown_table

if TYPE_CHECKING:
    from bench.accelerated import Report, Setting

__all__ = ["SIDES", "call_rows", "markdown", "show", "time_rows"]

GOAL_HEADER = ("what", "measured", "goal", "")
TIME_HEADER = ("forward + backward", "PEFT", "accelerated", "rounds")
CALL_HEADER = ("call of a small layer", "PEFT", "accelerated", "difference")
SIDES = ("theirs", "ours")


def time_rows(report: Report) -> list[tuple[str, ...]]:
    """Cells of the table of times in milliseconds."""
    rows = []
    for what, times in report.times.items():
        both = (times[name] for name in SIDES)
        rows.append((what, *(f"{s.p50:.1f} ({s.p20:.1f} to {s.p80:.1f})" for s in both), str(report.rounds[what])))
    return rows


def call_rows(report: Report) -> list[tuple[str, ...]]:
    """Cells of the table of small calls in microseconds."""
    rows = []
    for what, calls in report.calls.items():
        theirs, ours = (calls[name].p50 for name in SIDES)
        rows.append((what, f"{theirs:.0f} µs", f"{ours:.0f} µs", f"{ours - theirs:+.0f} µs"))
    return rows


def markdown(report: Report, content: dict[str, Any], setting: Setting) -> str:
    """The result as a page."""
    facts = content["environment"]
    return "\n".join(
        [
            "# PEFT's layers and the same layers accelerated, on a CPU",
            "",
            f"{facts['cpu']}, {facts['torch_threads']} threads; torch {facts['torch']}, PEFT {facts['peft']}, "
            f"transformers {facts['transformers']}, Python {facts['python']}; commit {content['commit']}, "
            f"{content['time']}. Load average before and after: "
            f"{' and '.join(f'{load:.1f}' for load in content['load'])}.",
            "",
            f"Command: `{' '.join(content['command'])}`. Layers {setting.size} -> {setting.size} with "
            f"{setting.tokens} tokens, forward and backward with gradients for x and what trains, after a change of "
            "every trained tensor, as an optimiser step makes it. Speed-ups are medians of the ratios within rounds, "
            "20th and 80th percentile in brackets. Where accelerated layers leave their calls to PEFT, since that is "
            "as fast, both sides run the same code and the 80th percentile has to reach the goal; beside it stands "
            "what the same layer gains by a route that is named.",
            "",
            markdown_table(GOAL_HEADER, [goal.cells() for goal in report.goals]),
            "Milliseconds, median and 20th to 80th percentile:",
            "",
            markdown_table(TIME_HEADER, time_rows(report)),
            f"A layer {setting.small_size} -> {setting.small_size} with {setting.small_tokens} tokens, too small to "
            "gain: its calls are PEFT's own, and the difference is what finding that out costs.",
            "",
            markdown_table(CALL_HEADER, call_rows(report)),
            *[f"Wrong: {what}\n" for what in report.wrong],
            *[f"Left out: {what}\n" for what in report.left_out],
        ]
    )


def show(report: Report, console: Console) -> None:
    """Both tables a person looks at, faults below them."""
    goals = [goal.cells() for goal in report.goals]
    for header, rows in ((GOAL_HEADER, goals), (CALL_HEADER, call_rows(report))):
        table = Table(*header)
        for row in rows:
            table.add_row(*row, style="red" if "MISSED" in row else None)
        console.print(table)
    for line in (*(f"[red]wrong:[/red] {what}" for what in report.wrong), *(f"left out: {w}" for w in report.left_out)):
        console.print(line)
