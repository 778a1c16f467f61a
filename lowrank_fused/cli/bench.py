"""`lowrank-fused bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import benchmark
from ..benchmark import DTYPES, MODES, Case, Row
from ..errors import UnsupportedError
from ..tools.doctor import best_device, environment
from ..tools.model_shapes import LinearShape, build, linear_shapes, target_modules
from ..tools.tables import show_rows
from .common import (
    CHECK_FAILED,
    NO_GPU,
    ModelOption,
    TargetsOption,
    TracebackFlag,
    err,
    in_a_sentence,
    out,
    parse_shape,
)

__all__ = ["bench"]


def bench(
    model: ModelOption = None,
    targets: TargetsOption = "all",
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", "-s", help="in x out features, as 1024x4096; may be repeated."),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option("--tokens", "-t", help="Rows of x; may be repeated. Default: 2048 on a CPU, 8192 on a GPU."),
    ] = None,
    rank: Annotated[list[int] | None, typer.Option("--rank", "-r", help="May be repeated. Default: 16.")] = None,
    dropout: Annotated[list[float] | None, typer.Option("--dropout", "-p", help="May be repeated. Default: 0.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help=f"{', '.join(DTYPES)}. Default: fp32 on a CPU, bf16 on a GPU."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option("--mode", help=f"{', '.join(MODES)}; may be repeated. Default: both."),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider",
            help=f"{', '.join(benchmark.PROVIDERS)}, -fp32 appended for fp32 adapters; may be repeated.",
        ),
    ] = None,
    with_compile: Annotated[
        bool, typer.Option("--compile", help="Measure torch.compile of PEFT's arithmetic too.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Time for each case and mode; at least 5 rounds are run.")
    ] = 5.0,
    flush_l2: Annotated[bool, typer.Option(help="On a GPU, overwrite its L2 cache before each call.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write rows, machine and versions to this file.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write rows to this file.")] = None,
    traceback: TracebackFlag = False,
) -> None:
    """Measure a linear layer with LoRA: the frozen linear alone, PEFT's arithmetic, and the routes of this
    package.

    Providers take turns in every round. Times are medians with the 20th and 80th percentile. "speed-up" is over
    PEFT's eager arithmetic with adapters of the same dtype, "/ frozen" the price of having an adapter at all,
    "B/token" what is kept for backward, "MiB" the peak of a step. Before a provider gets a number, its output and
    gradients must be as accurate as PyTorch's against float64.

    Examples:

      lowrank-fused bench --shape 1024x4096 --tokens 2048 --dropout 0 --dropout 0.1

      lowrank-fused bench --model llama-3-8b --mode forward --mode both --json bench.json

      lowrank-fused bench --model llama-3-8b --targets k_proj --provider eager --provider thin --provider
      split
    """
    with in_a_sentence(traceback, unsupported=NO_GPU):
        where = _device(device)
        on_gpu = where.type == "cuda"
        number_type = benchmark.parse_dtype(dtype or ("bf16" if on_gpu else "fp32"))
        cases = [
            Case(layer.in_features, layer.out_features, m, r, p, number_type, where, layer.bias, layer.name)
            for layer in _layers(model, targets, shape or [], on_gpu)
            for m in tokens or [8192 if on_gpu else 2048]
            for r in rank or [16]
            for p in dropout or [0.0]
        ]
        modes = _modes(mode)
        plans = [(case, provider or benchmark.default_names(case, with_compile=with_compile)) for case in cases]
        for case, names in plans:
            benchmark.providers_for(names, case)  # a wrong name is told before minutes have gone into the others
        rows = _measure(plans, modes, seconds, flush_l2)
        _write(rows, json_file, csv_file)
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(CHECK_FAILED)


def _device(name: str | None) -> torch.device:
    if name is None:
        return best_device()
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("no CUDA device here; leave --device out to use the CPU")
    return best_device() if name == "cuda" else torch.device("cpu")


def _modes(names: list[str] | None) -> list[str]:
    for name in names or []:
        if name not in MODES:
            raise ValueError(f"--mode must be one of {', '.join(MODES)}, got {name!r}")
    return names or ["both"]


def _layers(model: str | None, targets: str, shapes: list[str], on_gpu: bool) -> list[LinearShape]:
    """The layers asked for; those of one size in a model are measured once, under all their names."""
    layers = [parse_shape(text) for text in shapes]
    if model is not None:
        built = build(model)
        by_size: dict[tuple[int, int, bool], list[LinearShape]] = {}
        for linear in linear_shapes(built, target_modules(built, targets)):
            by_size.setdefault((linear.in_features, linear.out_features, linear.bias), []).append(linear)
        for size, group in by_size.items():
            names = ", ".join(dict.fromkeys(linear.name for linear in group))
            layers.append(LinearShape(f"{model} {names}", *size, count=sum(linear.count for linear in group)))
    return layers or [parse_shape("4096x4096" if on_gpu else "1024x1024")]


def _measure(plans: list[tuple[Case, list[str]]], modes: list[str], seconds: float, flush_l2: bool) -> list[Row]:
    """Measure case by case and show each as soon as it is there."""
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        for number, (case, names) in enumerate(plans, 1):
            task = progress.add_task(f"case {number} of {len(plans)}", total=None)

            def on_round(done: int, rounds: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=rounds)

            found = benchmark.measure(
                case,
                benchmark.providers_for(names, case),
                modes,
                budget_s=seconds,
                flush_l2=flush_l2,
                on_round=on_round,
            )
            progress.remove_task(task)
            show_rows(case, found, out)
            rows += found
    return rows


def _write(rows: list[Row], json_file: Path | None, csv_file: Path | None) -> None:
    try:
        if json_file is not None:
            command = ["lowrank-fused", *sys.argv[1:]]
            benchmark.write_json(json_file, benchmark.document(rows, environment(), command))
        if csv_file is not None:
            benchmark.write_csv(csv_file, rows)
    except OSError as error:
        raise ValueError(f"the results could not be written: {error}") from error
