"""`lowrank-fused roofline`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..roofline.gpus import GPUS, Gpu, gpu_named
from ..tools.model_shapes import LinearShape, build, linear_shapes, target_modules
from .common import (
    CHECK_FAILED,
    JsonFlag,
    ModelOption,
    TargetsOption,
    TracebackFlag,
    in_a_sentence,
    out,
    parse_shape,
)

__all__ = ["roofline"]


def roofline(
    model: ModelOption = None,
    targets: TargetsOption = "all",
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", "-s", help="in x out features, instead of a model; may be repeated."),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", "-t", help="Rows of x; may be repeated. Default: 8192.")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", "-r")] = 16,
    dropout: Annotated[float, typer.Option("--dropout", "-p")] = 0.0,
    gpu: Annotated[str, typer.Option(help=f"{', '.join(GPUS)}: whose rates, and whose tiles.")] = "H100",
    peak: Annotated[float | None, typer.Option(help="TFLOP/s of a library GEMM, instead of that GPU's.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="TB/s of device memory, instead of that GPU's.")] = None,
    efficiency: Annotated[
        float | None,
        typer.Option("--efficiency", "-e", help="Speed of Triton's GEMM over the library's. Default: a prior."),
    ] = None,
    thin_share: Annotated[float, typer.Option(help="Share of the bandwidth that thin kernels reach.")] = 1.0,
    beta_cost: Annotated[float, typer.Option(help="What adding to its output costs a library GEMM, a share.")] = 0.0,
    launch_us: Annotated[float, typer.Option(help="Microseconds that each launch costs besides its work.")] = 0.0,
    scratch_share: Annotated[
        float, typer.Option(help="Share of the kernels' own partial sums that goes through memory, not cache.")
    ] = 1.0,
    provider: Annotated[list[str] | None, typer.Option("--provider", help="May be repeated. Default: all.")] = None,
    passes: Annotated[bool, typer.Option("--passes", help="List every launch: tensors, bytes, FLOPs, time.")] = False,
    at_most: Annotated[
        float | None,
        typer.Option(help="Say which of our routes stay at or below this multiple of frozen; status 1 if none does."),
    ] = None,
    as_json: JsonFlag = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the predictions to this file.")] = None,
    png_file: Annotated[
        Path | None,
        typer.Option("--png", help="Draw times by provider, or the price against tokens if there are several."),
    ] = None,
    traceback: TracebackFlag = False,
) -> None:
    """Predict what an adapter costs on a GPU that need not be here: bytes, FLOPs, time, and what could be gained.

    Each launch takes as long as its arithmetic or its traffic, the longer; bytes and FLOPs of our routes are those that
    their launchers declare. "/ frozen" is the price over the layers without an adapter, "speed-up" is over PEFT's eager
    arithmetic, "of limit" what part of the time remains if every operand is read and every result written once.
    Layers, then groups that share an input, then the block that the model repeats.

    Examples:

      lowrank-fused roofline --model llama-3-8b --dropout 0.1 --efficiency 0.97 --at-most 1.08

      lowrank-fused roofline --shape 4096x1024 --provider eager --provider split --passes

      lowrank-fused roofline --model qwen2.5-7b --gpu "RTX 4090" -t 1024 -t 4096 -t 16384 --png price.png

      lowrank-fused roofline --peak 660 --bandwidth 2.8 --json
    """
    with in_a_sentence(traceback):
        from ..roofline.figure import draw
        from ..roofline.groups import groups
        from ..roofline.model import Assumptions, predict
        from ..roofline.passes import Setting
        from ..roofline.providers import providers
        from ..roofline.tables import pass_rows, show_passes, show_predictions, write_csv

        on = _gpu(gpu, peak, bandwidth)
        assumptions = Assumptions(
            on, on.efficiency if efficiency is None else efficiency, thin_share, beta_cost, launch_us, scratch_share
        )
        names = providers(provider)
        settings = [Setting(count, rank, dropout, on.arch) for count in dict.fromkeys(tokens or [8192])]
        title, linears = _layers(model, targets, shape or [], rank)
        predictions = [p for setting in settings for p in predict(linears, names, setting, assumptions)]
        parts = groups(linears)
        launches = [r for setting in settings for r in pass_rows(parts, names, setting, assumptions)] if passes else []
        widest = [p for p in predictions if p.scope == ("block" if len(linears) > 1 else predictions[0].scope)]
        verdicts = [] if at_most is None else _verdicts(widest, at_most)
        about = f"{title}, {widest[0].scope}, rank {rank}, dropout {dropout:g}, predicted for {on.name}"
        if len(settings) == 1:
            about += f", {settings[0].tokens:,} tokens"
        try:
            if csv_file is not None:
                write_csv(csv_file, predictions)
            if png_file is not None:
                draw(png_file, widest, about, str(assumptions))
        except OSError as error:
            raise ValueError(f"the results could not be written: {error}") from error
    if as_json:
        document = {
            "model": "a prediction by a traffic model, not a measurement",
            "layers": title, "rank": rank, "dropout": dropout, "assumptions": asdict(assumptions),
            "predictions": [_rounded(p) for p in predictions],
            "passes": [_rounded(row) for row in launches],
            "verdicts": verdicts,
        }  # fmt: skip
        print(json.dumps(document, indent=1))
    else:
        out.print(f"{title}, rank {rank}, dropout {dropout:g}, bf16, forward and backward", style="bold")
        if launches:
            show_passes(launches, out if sys.stdout.isatty() else Console(width=120))
        show_predictions(predictions, assumptions, out)
        for verdict in verdicts:
            out.print(verdict["text"], highlight=False)
    if verdicts and not any(verdict["holds"] for verdict in verdicts):
        raise typer.Exit(CHECK_FAILED)


def _gpu(name: str, peak: float | None, bandwidth: float | None) -> Gpu:
    """The GPU of that name, with one's own rates instead of its own where they are given."""
    found = gpu_named(name)
    for option, value in (("--peak", peak), ("--bandwidth", bandwidth)):
        if value is not None and value <= 0:
            raise ValueError(f"{option} must be above 0, got {value:g}")
    if peak is None and bandwidth is None:
        return found
    return replace(
        found,
        name=f"a GPU like {found.name}",
        peak=found.peak if peak is None else 1e12 * peak,
        bandwidth=found.bandwidth if bandwidth is None else 1e12 * bandwidth,
        source="rates given by the user",
    )


def _layers(model: str | None, targets: str, shapes: Sequence[str], rank: int) -> tuple[str, list[LinearShape]]:
    """What to call them, and the layers asked for; those of Llama-3-8B if nothing was."""
    if model is not None and shapes:
        raise ValueError("give either --model or --shape, not both")
    if shapes:
        title, linears = ", ".join(shapes), [parse_shape(text) for text in shapes]
    else:
        title = model or "llama-3-8b"
        built = build(title)
        linears = linear_shapes(built, target_modules(built, targets))
    for linear in linears:
        if rank > (widest := min(linear.in_features, linear.out_features)):
            raise ValueError(f"rank must be at most min(in, out) = {widest} of the narrowest layer, got {rank}")
    return title, linears


def _verdicts(predictions: Sequence[Any], bound: float) -> list[dict[str, Any]]:
    """For each of our providers whether its predicted time is at most `bound` of the frozen layers'."""
    from ..roofline.providers import OURS

    verdicts = []
    for p in predictions:
        if p.provider in OURS:
            holds = p.over_frozen <= bound
            text = (
                f"{p.scope}, {p.tokens} tokens: at most {bound:g} of frozen: {p.provider} {p.over_frozen:.4f}, "
                f"{'holds' if holds else f'misses it by {p.over_frozen - bound:.4f}'}"
            )
            verdicts.append({"provider": p.provider, "tokens": p.tokens, "bound": bound, "holds": holds, "text": text})
    return verdicts


def _rounded(row: Any) -> dict[str, Any]:
    """Six digits: more would only look exact."""
    return {n: float(f"{v:.6g}") if isinstance(v, float) else v for n, v in asdict(row).items()}
