"""The command `lowrank-fused`: doctor, methods, bench, demo, reproduce."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import benchmark, methods
from .benchmark import DTYPES, MODES, Case, Row
from .demo.__main__ import main as demo
from .errors import LowRankFusedError, UnsupportedError
from .registry import did_you_mean
from .reproduce import REPRODUCTIONS
from .tools.doctor import best_device, diagnose, environment
from .tools.footprint import count_in_model, method_facts
from .tools.model_shapes import MODELS, LinearShape, build, linear_shapes, target_modules
from .tools.tables import show_counts, show_diagnosis, show_methods, show_rows

__all__ = ["app", "main"]

OK, CHECK_FAILED, USAGE, NO_GPU = 0, 1, 2, 3
EXIT_CODES = (
    "Exit status: 0 all well; 1 a check failed (a provider is not accurate, the installation does not work, "
    "the demo cannot run); 2 a mistake in the command; 3 a GPU is needed and none is there."
)

app = typer.Typer(
    name="lowrank-fused",
    help="Kernels for fine-tuning with LoRA-family adapters: look at this machine, at the methods, measure.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out, err = Console(), Console(stderr=True)

ModelOption = Annotated[str | None, typer.Option("--model", help=f"A model by name: {', '.join(MODELS)}.")]
TargetsOption = Annotated[
    str,
    typer.Option("--targets", help="Linears to adapt: all, qv, or module names with commas, as q_proj,v_proj."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
TracebackFlag = Annotated[bool, typer.Option("--traceback", help="On an error, show where in the code it came from.")]


@contextlib.contextmanager
def in_a_sentence(traceback: bool, unsupported: int = USAGE) -> Iterator[None]:
    """Turn the package's errors into one line on stderr and an exit status."""
    try:
        yield
    except (ValueError, TypeError, LowRankFusedError, ImportError) as error:
        if traceback:
            raise
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(unsupported if isinstance(error, UnsupportedError) else USAGE) from None


@app.command(epilog=EXIT_CODES)
def doctor(
    as_json: JsonFlag = False,
    check: Annotated[bool, typer.Option(help="Compute a small layer by every route, against float64.")] = True,
    need_gpu: Annotated[bool, typer.Option("--need-gpu", help="Exit with 3 where the kernels cannot run.")] = False,
    traceback: TracebackFlag = False,
) -> None:
    """What is installed here, which routes can run, and why the others cannot.

    Examples:

      lowrank-fused doctor

      lowrank-fused doctor --json > machine.json

      lowrank-fused doctor --need-gpu && python train.py
    """
    with in_a_sentence(traceback), err.status("looking around"):
        diagnosis = diagnose(self_check=check)
    if as_json:
        print(json.dumps(diagnosis.as_dict(), indent=1))
    else:
        show_diagnosis(diagnosis, out)
    if not diagnosis.works:
        raise typer.Exit(CHECK_FAILED)
    if need_gpu and not diagnosis.environment["gpus"]:
        err.print("no CUDA device here", style="red")
        raise typer.Exit(NO_GPU)


@app.command("methods", epilog=EXIT_CODES)
def methods_command(
    model: ModelOption = None,
    targets: TargetsOption = "all",
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank; each method has its own default.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="Only this one; may be repeated.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="A method's own option as name=value; may be repeated."),
    ] = None,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """The methods: formula, what trains, bytes kept for backward; with --model how many parameters train in
    it.

    Counts come from the model class itself, built without weights.

    Examples:

      lowrank-fused methods

      lowrank-fused methods --model llama-3.1-8b --rank 16

      lowrank-fused methods --model roberta-base --targets qv --method loldu --rank 768
    """
    with in_a_sentence(traceback), err.status("counting"):
        names = method or list(methods.registry())
        facts = [method_facts(name) for name in names]
        chosen = _options(option)
        counts = [count_in_model(model, name, targets, rank, **chosen) for name in names] if model else []
    if as_json:
        content = {"methods": [asdict(fact) for fact in facts], "counts": [asdict(count) for count in counts]}
        print(json.dumps(content, indent=1, default=str))
    elif counts:
        show_counts(counts, out)
    else:
        show_methods(facts, out)


def _options(texts: list[str] | None) -> dict[str, Any]:
    """name=value pairs; a value is JSON where it can be (true, 0.5), else text."""
    found: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option must be name=value, got {text!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


@app.command(epilog=EXIT_CODES)
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
    layers = [_parse_shape(text) for text in shapes]
    if model is not None:
        built = build(model)
        by_size: dict[tuple[int, int, bool], list[LinearShape]] = {}
        for linear in linear_shapes(built, target_modules(built, targets)):
            by_size.setdefault((linear.in_features, linear.out_features, linear.bias), []).append(linear)
        for size, group in by_size.items():
            names = ", ".join(dict.fromkeys(linear.name for linear in group))
            layers.append(LinearShape(f"{model} {names}", *size, count=sum(linear.count for linear in group)))
    return layers or [_parse_shape("4096x4096" if on_gpu else "1024x1024")]


def _parse_shape(text: str) -> LinearShape:
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"--shape must be in x out features such as 1024x4096, got {text!r}")
    return LinearShape("", int(sizes[0]), int(sizes[1]), bias=False, count=1)


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


app.command("demo", epilog=EXIT_CODES)(demo)


@app.command("reproduce", epilog=EXIT_CODES)
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


def main() -> None:
    """Entry point of `lowrank-fused`."""
    app()


if __name__ == "__main__":
    main()
