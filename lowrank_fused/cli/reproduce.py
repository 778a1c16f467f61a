"""`lowrank-fused reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..registry import did_you_mean
from ..reproduce import REPRODUCTIONS
from .common import CHECK_FAILED, TracebackFlag, err, in_a_sentence, out

__all__ = ["reproduce_command"]


def reproduce_command(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(REPRODUCTIONS)}.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for pages, numbers and pictures.")] = Path(
        "out/reproduce"
    ),
    cache: Annotated[Path, typer.Option(help="Folder for the downloaded text.")] = Path(".cache/demo"),
    seeds: Annotated[int | None, typer.Option(help="Seeds of each training.")] = None,
    snippets: Annotated[int | None, typer.Option(help="Snippets to learn from in each training.")] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Only this one, with `methods`; may be repeated.")
    ] = None,
    traceback: TracebackFlag = False,
) -> None:
    """Do findings of the papers again, and write a page about them.

    counts: parameter counts that papers print, against counts in the models (a minute). initialization:
    Init[A] against Init[B] over a sweep of learning rates, MiniLM on movie reviews (some 20 minutes on two
    cores). methods: every method on that task (likewise). An interrupted command goes on where it stopped.

    Examples:

      lowrank-fused reproduce counts

      lowrank-fused reproduce initialization --seeds 2

      lowrank-fused reproduce methods -m lora -m dora
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with in_a_sentence(traceback, CHECK_FAILED), Progress(*columns, console=err) as progress:
        if what not in REPRODUCTIONS:
            raise ValueError(f"there is nothing called {what!r} to reproduce; {did_you_mean(what, REPRODUCTIONS)}")
        page = REPRODUCTIONS[what](folder, cache, progress, seeds=seeds, snippets=snippets, names=method)
    out.print(f"wrote {page}", highlight=False, soft_wrap=True)
