"""`lowrank-fused report`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .common import JsonFlag, TracebackFlag, in_a_sentence, out

__all__ = ["report"]


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files, all of one device.", show_default=False)],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Write report.html, pictures and CSV to this folder.")
    ] = None,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Turn results into tables, CSV, pictures and one HTML page that needs no network.

    Reads what `lowrank-fused bench --json` and the commands in bench/ write, the JSON of `pytest bench
    --benchmark-json`, and the store of the GPU check. Shows the speed-up over eager PEFT, the overhead over the
    frozen linears, on a known GPU the part of the physical limit, and its goal lines: must, aim, stretch and ceiling
    beside what was measured, "not measured" where nothing was.

    Examples:

      lowrank-fused report bench.json --out report/

      lowrank-fused report bench/results/cpu/cpu.json

      lowrank-fused report bench/results/nvidia-h100-80gb-hbm3/gpu_check.json suite.json --out report/
    """
    with in_a_sentence(traceback):
        from ..report import load, tables, write_report

        found = load(results)
        if as_json:
            print(json.dumps([asdict(table) for table in tables(found)], indent=1))
        else:
            wide = out if sys.stdout.isatty() else Console(width=200)
            for table in tables(found):
                _show(table.title, table.header, table.rows, table.note, wide)
        if folder is not None:
            written = write_report(found, folder)
            if not as_json:
                out.print(f"wrote {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


def _show(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]], note: str, console: Console) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index and len(header) > 3 else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)
    if note:
        console.print(note, markup=False, highlight=False)
    console.print()
