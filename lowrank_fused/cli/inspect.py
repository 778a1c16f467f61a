"""`lowrank-fused inspect`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from .. import benchmark
from ..benchmark import DTYPES
from ..registry import did_you_mean
from ..tools.tables import show_binaries
from .common import CHECK_FAILED, NO_GPU, JsonFlag, TracebackFlag, err, in_a_sentence, out, parse_shape

__all__ = ["inspect"]


def inspect(
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120; may be repeated. Default: sm_90."),
    ] = None,
    all_tiles: Annotated[
        bool,
        typer.Option("--all-tiles", help="Not one layer, but every tile and every kind of operand of a kernel."),
    ] = False,
    all_variants: Annotated[
        bool, typer.Option("--all-variants", help="The same in more combinations: about three times as many binaries.")
    ] = False,
    shape: Annotated[str, typer.Option("--shape", "-s", help="in x out features of the layer.")] = "4096x4096",
    tokens: Annotated[int, typer.Option("--tokens", "-t", min=1, help="Rows of x.")] = 8192,
    rank: Annotated[int, typer.Option("--rank", "-r", min=1)] = 16,
    dropout: Annotated[float, typer.Option("--dropout", "-p")] = 0.1,
    dtype: Annotated[str, typer.Option("--dtype", help=f"{', '.join(DTYPES)}.")] = "bf16",
    masks: Annotated[
        bool, typer.Option("--masks/--no-masks", help="Compile without dropout too, for what a mask costs an element.")
    ] = True,
    workers: Annotated[int, typer.Option(min=1, help="Processes that compile.")] = 2,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Compile the kernels for a GPU that need not be here, and say what the compiler made of them.

    One row for every binary: registers, spilled bytes, shared and tensor memory of a program, how many programs
    a multiprocessor has room for, bytes that loads of all of these have on their way, instructions of tensor cores,
    TMA and cp.async, all instructions, and how many of them a dropout mask costs an element; then what the low-rank
    term adds to the forward product. Exit status 1 if a binary spills, exceeds a limit, leaves tensor cores or TMA
    unused, or waits for its loads.

    Examples:

      lowrank-fused inspect --target sm_90 --shape 4096x14336 --rank 64

      lowrank-fused inspect --target sm_80 --target sm_100 --all-tiles --json > binaries.json
    """
    with in_a_sentence(traceback, unsupported=NO_GPU):
        from ..tools.codegen import ARCHS, Request, compile_all, compile_tools, reports_of, violations
        from ..tools.shipped import CallCase

        known = {f"sm_{arch}": arch for arch in ARCHS}
        for name in target or []:
            if name not in known:
                raise ValueError(f"unknown target {name!r}; {did_you_mean(name, known)}")
        compile_tools()
        layer = parse_shape(shape)
        number_type = benchmark.parse_dtype(dtype)
        call = CallCase(tokens, layer.out_features, layer.in_features, rank, dropout, number_type)
        calls = () if all_tiles or all_variants else (call,)
        found = []
        wide = out if sys.stdout.isatty() else Console(width=200)
        for name in target or ["sm_90"]:
            request = Request(known[name], calls, all_variants, masks)
            work = compile_all(request, workers)
            binaries = list(track(work, f"compiling for {name}", request.count(), console=err))
            reports = reports_of(request, binaries)
            if not as_json:
                show_binaries(reports, request.arch, wide)
            found += reports
    if as_json:
        print(json.dumps([{**asdict(report), "violations": violations(report)} for report in found], indent=1))
    if any(violations(report) for report in found):
        raise typer.Exit(CHECK_FAILED)
