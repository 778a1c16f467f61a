"""`lowrank-fused tune`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..benchmark import DTYPES, Case, parse_dtype
from ..errors import UnsupportedError
from ..tools.model_shapes import MODELS, LinearShape, build, build_from_config, linear_shapes, target_modules
from .common import NO_GPU, JsonFlag, TargetsOption, TracebackFlag, err, in_a_sentence, out, parse_shape

if TYPE_CHECKING:
    from ..tuning import Measuring, Outcome, Store

__all__ = ["tune"]


def tune(
    model: Annotated[
        str | None,
        typer.Option("--model", help=f"A model by name ({', '.join(MODELS)}), or the path of a transformers config."),
    ] = None,
    targets: TargetsOption = "all",
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", "-s", help="in x out features, beside a model or instead; may be repeated."),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", "-t", help="Rows of x; may be repeated. Default: 8192.")
    ] = None,
    rank: Annotated[list[int] | None, typer.Option("--rank", "-r", help="May be repeated. Default: 16.")] = None,
    dropout: Annotated[list[float] | None, typer.Option("--dropout", "-p", help="May be repeated. Default: 0.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help=f"{', '.join(DTYPES)}.")] = "bf16",
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Time for each comparison; at least 10 rounds are run.")
    ] = 1.0,
    tiles: Annotated[bool, typer.Option("--tiles/--no-tiles", help="Measure the tiles of the kernels too.")] = True,
    groups: Annotated[
        bool, typer.Option("--groups/--no-groups", help="Measure layers that share x (q, k, v; gate, up) as one too.")
    ] = True,
    table: Annotated[
        Path | None, typer.Option("--table", help="Write this file. Default: the one that layers on this GPU read.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Put aside what the table holds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be measured; needs no GPU.")] = False,
    write_shipped: Annotated[
        Path | None,
        typer.Option(
            "--write-shipped",
            help="Measure nothing: write the tables that ship to this folder, with measured rows of --table if given.",
            metavar="FOLDER",
        ),
    ] = None,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Measure which route, and which tiles of its kernels, are fastest for your layers on this GPU, and remember it.

    For every size of layer and pass, the routes take turns after each has been found as accurate as PyTorch; then the
    tiles of the kernels of the winner do. A winner replaces the model's choice if it is faster by more than 2 %, and
    no route stays that was not faster than addmm. What is found is written at once, so that a run that was stopped goes
    on where it was, and is read by every process that starts afterwards: nothing is tuned at run time.

    Examples:

      lowrank-fused tune --model llama-3-8b --tokens 8192 --dropout 0.1

      lowrank-fused tune --model path/to/config.json --targets qv -t 4096 --json > found.json

      lowrank-fused tune --shape 4096x4096 --shape 4096x1024 -t 8192 -t 1024 -r 16 -r 64 --dry-run

      lowrank-fused tune --write-shipped kernels/tuned --table mine.json
    """
    with in_a_sentence(traceback, unsupported=NO_GPU):
        if write_shipped is not None:
            _write_shipped(write_shipped, table, as_json)
            return
        linears = _layers(model, targets, shape or [])
        device = _device(dry_run)
        from ..tuning import cases_for

        sizes = (tokens or [8192], rank or [16], dropout or [0.0])
        cases = cases_for(linears, *sizes, parse_dtype(dtype), device, groups=groups)
        if dry_run:
            _show_plan(cases, as_json)
            return
        store, measuring = _open(table, device, seconds, fresh)
        outcomes, whole = _measure(cases, store, measuring, tiles)
        _tell(outcomes, store, measuring, whole, as_json)
        if not whole:
            raise typer.Exit(130)


def _layers(model: str | None, targets: str, shapes: Sequence[str]) -> list[LinearShape]:
    """The layers asked for; those of Llama-3-8B if nothing was."""
    layers = [parse_shape(text) for text in shapes]
    if model is not None or not layers:
        name = model or "llama-3-8b"
        built = build_from_config(Path(name)) if name not in MODELS and Path(name).exists() else build(name)
        layers += linear_shapes(built, target_modules(built, targets))
    return layers


def _device(dry_run: bool) -> torch.device:
    """The GPU to be measured; for a plan, one that need not be there."""
    if dry_run:
        return torch.device("cuda")
    if not torch.cuda.is_available():
        raise UnsupportedError("no CUDA device here, so there is nothing to measure; --dry-run lists what would be")
    return torch.device("cuda", torch.cuda.current_device())


def _open(path: Path | None, device: torch.device, seconds: float, fresh: bool) -> tuple[Store, Measuring]:
    """The table to be written, and the clock."""
    from lowrank_fused.kernels.tables import VARIABLE, user_path

    from ..target import target_of
    from ..tuning import Measuring, Store, provenance

    source = provenance(device)
    path = path or user_path(source["gpu"])
    if path is None:
        raise ValueError(f"{VARIABLE}=off turns tuned tables off; unset it, or name a file by --table")
    return Store(path, f"sm_{target_of(device).arch}", source, fresh=fresh), Measuring.on(device, seconds)


def _measure(cases: list[Case], store: Store, measuring: Measuring, tiles: bool) -> tuple[list[Outcome], bool]:
    """What was found, and whether all of it: Ctrl-C ends the run, and leaves what is in the table."""
    from ..tuning import routes_by_direction
    from ..tuning import tune as measured

    outcomes: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        try:
            for case in cases:
                progress.update(task, description=case.title())
                outcomes += measured([case], store, measuring, routes_by_direction(case), tiles=tiles)
                progress.advance(task)
        except KeyboardInterrupt:
            return outcomes, False
    return outcomes, True


def _tell(outcomes: Sequence[Outcome], store: Store, measuring: Measuring, whole: bool, as_json: bool) -> None:
    """Before and after, who got no number, and where the table is."""
    if as_json:
        told = [_as_dict(outcome) for outcome in outcomes]
        document = {"table": str(store.path), "complete": whole, "refused": measuring.refused, "outcomes": told}
        print(json.dumps(document, indent=1))
        return
    out.print(f"{store.source['gpu']}, before and after", style="bold", markup=False, highlight=False)
    for case in dict.fromkeys(outcome.case for outcome in outcomes):
        out.print(case.title(), markup=False, highlight=False, soft_wrap=True)
        out.print(_outcomes([outcome for outcome in outcomes if outcome.case == case]), markup=False)
    if any(outcome.again for outcome in outcomes):
        out.print("* measured by an earlier run")
    for name, reason in measuring.refused.items():
        out.print(f"no number for {name}: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    if not whole:
        out.print("stopped; the same command goes on from here")
    out.print(f"table: {store.path}", markup=False, highlight=False, soft_wrap=True)


def _as_dict(o: Outcome) -> dict[str, Any]:
    case = {
        name: getattr(o.case, name) for name in ("label", "in_features", "out_features", "tokens", "rank", "dropout")
    }
    found = {name: getattr(o, name) for name in ("what", "before", "before_us", "after", "after_us", "again")}
    return {**case, **found, "gain": o.gain}


def _outcomes(outcomes: Sequence[Outcome]) -> Table:
    """What was decided for one layer or group: a row for each pass and for each kernel that has several tiles."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("", "before", "µs", "after", "µs", "gain"):
        words = name in ("before", "after")
        table.add_column(name, justify="right" if name in ("µs", "gain") else "left", no_wrap=not words)
    for o in outcomes:
        before_us = "none" if o.before_us is None else f"{o.before_us:,.1f}"
        gain = "" if o.gain is None or o.before == o.after else f"{o.gain:.2f}x"
        cells = (o.before, before_us, o.after, f"{o.after_us:,.1f}", gain)
        table.add_row(f"{o.what}{' *' if o.again else ''}", *cells, style="green" if gain else None)
    return table


def _show_plan(cases: Sequence[Case], as_json: bool) -> None:
    """What would be measured."""
    from ..tuning.plan import ROUTES

    if as_json:
        names = ("label", "in_features", "out_features", "tokens", "rank", "dropout")
        rows = [{**{name: getattr(case, name) for name in names}, "routes": ROUTES} for case in cases]
        print(json.dumps(rows, indent=1))
        return
    for case in cases:
        out.print(case.title(), markup=False, highlight=False, soft_wrap=True)
    told = "; ".join(f"{direction}: {', '.join(routes)}" for direction, routes in ROUTES.items())
    out.print(
        f"{len(cases)} cases, in each {told}; then the tiles of those of their kernels that have several. "
        "Groups have no route of one launch."
    )


def _write_shipped(folder: Path, table: Path | None, as_json: bool) -> None:
    """One file for every target; rows of `table` go to its own."""
    from lowrank_fused.kernels.tables import read

    from ..tuning import TARGETS, dump, shipped_table

    measured = [] if table is None else [read(table)]
    counts = {}
    for arch in TARGETS:
        found = shipped_table(arch, *(other for other in measured if other.target == f"sm_{arch}"))
        path = folder / f"sm_{arch}.json"
        try:
            path.write_text(dump(found), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"the table could not be written: {error}") from error
        rows = (*found.routes, *found.tiles)
        counts[str(path)] = {"rows": len(rows), "measured": sum(map(found.is_measured, rows))}
    if as_json:
        print(json.dumps(counts, indent=1))
    else:
        for name, count in counts.items():
            out.print(f"wrote {name}: {count['measured']} rows measured, {count['rows']} in all", highlight=False)
