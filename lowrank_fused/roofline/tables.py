"""Predictions and passes as tables that a person reads, and as rows of a file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .groups import Members, label
from .model import Assumptions, Prediction, fastest
from .passes import Setting
from .providers import GROUPED

__all__ = ["PassRow", "pass_rows", "show_passes", "show_predictions", "write_csv"]


def show_predictions(predictions: Sequence[Prediction], assumptions: Assumptions, console: Console) -> None:
    """A table for every layer, group and block, provider by provider; the model in one line."""
    for (tokens, scope), rows in groupby(predictions, lambda p: (p.tokens, p.scope)):
        shown = list(rows)
        if scope == "model":
            times = ", ".join(f"{p.provider} {p.us / 1000:,.1f}" for p in shown)
            console.print(f"model, {tokens} tokens, ms: {times}", highlight=False)
        else:
            console.print(_table(f"{scope}, {shown[0].count} in the model, {tokens} tokens", shown), markup=False)
    console.print(f"A model, not a measurement: {assumptions}.", highlight=False)
    if any(p.provider in (*GROUPED, "auto") for p in predictions):
        console.print(
            "Grouped rows and auto run layers that share an input as one lowrank_group, all others one by one.",
            highlight=False,
        )


def _table(title: str, rows: Sequence[Prediction]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("provider", no_wrap=True)
    for name in ("launches", "MiB", "GFLOP", "µs", "/ frozen", "speed-up", "of limit"):
        table.add_column(name, justify="right", no_wrap=True)
    for p in rows:
        if p.layers == 1 and p.provider in GROUPED and rows[0].provider not in GROUPED:
            continue  # a layer by itself has nothing to share: these repeat split, thin, or the faster of them
        table.add_row(
            p.provider, f"{p.forward_launches}+{p.backward_launches}", f"{p.bytes / 2**20:,.0f}",
            f"{p.flops / 1e9:,.0f}", f"{p.us:,.0f}", f"{p.over_frozen:.3f}", f"{p.speedup:.2f}x",
            f"{100 * p.share_of_limit:.0f} %",
        )  # fmt: skip
    return table


@dataclass(frozen=True)
class PassRow:
    """One launch of one provider for one layer or group; `scratch` and `again` as in `Pass`."""

    scope: str
    tokens: int
    provider: str
    direction: str
    launch: str
    tensors: str
    bytes_read: int
    bytes_written: int
    scratch: int
    flops: int
    again: int
    us: float


def pass_rows(
    parts: Sequence[Members], names: Sequence[str], setting: Setting, assumptions: Assumptions
) -> list[PassRow]:
    """Every launch of these providers in order, for every part."""
    return [
        PassRow(
            label(members), setting.tokens, name, direction, p.name, p.tensors,
            p.bytes_read, p.bytes_written, p.scratch, p.flops, p.again, assumptions.microseconds(p),
        )
        for members in parts
        for name in names
        for direction, passes in fastest(name, members, setting, assumptions)._asdict().items()
        for p in passes
    ]  # fmt: skip


def show_passes(rows: Sequence[PassRow], console: Console) -> None:
    """One table for every provider of every part: what each launch moves and computes, and its time."""
    for (tokens, scope, provider), group in groupby(rows, lambda row: (row.tokens, row.scope, row.provider)):
        title = f"{scope}, {provider}, {tokens} tokens"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("", no_wrap=True)
        table.add_column("launch", no_wrap=True)
        table.add_column("tensors", overflow="fold")
        for name in ("read MiB", "written", "scratch", "GFLOP", "again", "µs"):
            table.add_column(name, justify="right", no_wrap=True)
        for direction, launches in groupby(group, lambda row: row.direction):
            for place, row in enumerate(launches):
                moved = (f"{count / 2**20:,.1f}" for count in (row.bytes_read, row.bytes_written, row.scratch))
                first = "" if place else direction
                worked = (f"{count / 1e9:,.1f}" for count in (row.flops, row.again))
                table.add_row(first, row.launch, row.tensors, *moved, *worked, f"{row.us:,.1f}")
            table.add_section()
        console.print(table, markup=False)
    console.print("scratch: those of the bytes that are partial sums, written and read again by the same launch")
    if any(row.again for row in rows):
        console.print(
            "again: what every block of a result does for itself besides the FLOPs, as FLOPs that take as long"
        )


def write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    """One line per prediction under a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Prediction)])
        writer.writeheader()
        writer.writerows(asdict(p) for p in predictions)
