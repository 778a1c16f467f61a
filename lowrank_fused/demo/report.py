"""The demo's table, pictures and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from ..benchmark import dtype_name
from ..routes.small import is_small
from .model import ACCELERATED, FUSED, MODELS, OURS, PEFT, RANK

if TYPE_CHECKING:
    from .comparison import Result, Section, Settings

__all__ = ["figure_with", "introduction", "show", "table", "write"]

COLOURS = {PEFT: "#8a8f98", ACCELERATED: "#2e7ebc", OURS: "#d1495b"}
ROUTE_IN_WORDS = {
    "reference": "plain PyTorch",
    "addmm": "library GEMMs, low-rank term added in place",
    "precise": "library GEMMs, fp32 adapters multiplied as they are",
    "thin": "Triton kernels around one library GEMM",
    "split": "Triton kernels and Triton GEMM",
}


def table(result: Result) -> Table:
    """Accuracy, losses, time and kept bytes of the models, and how the others compare with eager PEFT."""
    plain = result.sections[0]
    rows = Table()
    rows.add_column("", no_wrap=True)
    for name in MODELS:
        rows.add_column(name, justify="right", no_wrap=True)
    for when, index in (("before", 0), ("after", 1)):
        rows.add_row(f"accuracy {when}", *(f"{result.accuracy[name][index]:.1%}" for name in MODELS))
    rows.add_row("loss at the last step", *(f"{plain.courses[name].losses[-1]:.4f}" for name in MODELS))
    _add_comparison(rows, "largest loss difference", lambda name: f"{max(plain.loss_differences(name)):.1e}")
    for section in result.sections:
        _add_costs(rows, section)
    return rows


def _add_comparison(rows: Table, what: str, with_peft: Callable[[str], str]) -> None:
    """A row that compares: nothing stands under PEFT itself."""
    rows.add_row(what, *("" if name == PEFT else with_peft(name) for name in MODELS))


def _add_costs(rows: Table, section: Section) -> None:
    """Time of a step, bytes kept for backward per token in each shape of layer and by the whole model."""
    rows.add_section()
    rows.add_row(f"adapter dropout {section.dropout:g}", style="bold")
    times = {name: section.step_ms(name) for name in MODELS}
    rows.add_row("median step", *(f"{t.p50:.0f} ms" for t in times.values()))
    rows.add_row("20 % to 80 %", *(f"{t.p20:.0f} to {t.p80:.0f} ms" for t in times.values()))
    ratios = {name: section.speedup(name) for name in MODELS}
    _add_comparison(rows, "speed-up", lambda name: f"{ratios[name].p50:.2f}x")
    _add_comparison(rows, "20 % to 80 %", lambda name: f"{ratios[name].p20:.2f} to {ratios[name].p80:.2f}x")
    for kept in section.kept:
        label = f"kept, {kept.in_features} to {kept.out_features}"
        rows.add_row(label, *_kept_cells(kept.bytes_per_token, 1, "B"))
    rows.add_row("kept, whole model", *_kept_cells(section.kept_by_step, 1e6, "MB"))


def _kept_cells(kept: Mapping[str, float], divisor: float, unit: str) -> Iterator[str]:
    """What each model keeps, and how much less or more that is than what PEFT's does."""
    for name in MODELS:
        change = kept[name] / kept[PEFT] - 1
        yield f"{kept[name] / divisor:,.0f} {unit}" + (f" ({change:+.0%})" if abs(change) >= 0.005 else "")


def introduction(settings: Settings, device: torch.device, dtype: torch.dtype) -> str:
    """What is about to happen, where."""
    where = f"the CPU ({torch.get_num_threads()} of its cores)"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return (
        f"MiniLM (22.7 M parameters) learns the sentiment of {settings.snippets:,} movie-review snippets "
        f"and is judged on {settings.held_out:,} others.\n"
        f"Three copies with LoRA of rank {RANK} on all linears of the encoder train step by step in turn:\n"
        f"{PEFT}, {ACCELERATED} (after `accelerate`) and {OURS} (by `inject`).\n"
        f"Weights in {dtype_name(dtype)}, adapters in fp32, on {where}."
    )


def route_lines(result: Result) -> list[str]:
    """Which route served which layers; one line where one route served them all."""
    uses = [
        (name, section.dropout, use)
        for section in result.sections
        for name, of_model in section.routes.items()
        for use in of_model
    ]
    routes = sorted({use.route for *_, use in uses})
    if len(routes) == 1:
        who = " and of ".join(result.sections[0].routes)
        lines = [
            f"Route {_named(routes[0])} served every adapted layer of {who} in the largest batch, forward and backward."
        ]
    else:
        lines = [
            f"{name}, dropout {dropout:g}, {use.direction}, {use.calls} layers {use.in_features} to "
            f"{use.out_features}: route {_named(use.route)}"
            for name, dropout, use in uses
        ]
    if not {"thin", "split"} & set(routes):
        lines.append("No Triton kernel ran." + ("" if result.device.type == "cuda" else " They need a CUDA device."))
    return lines + list(_small_lines(result))


def _small_lines(result: Result) -> Iterator[str]:
    """Which layers were left to eager PyTorch in small batches."""
    element = torch.empty(1, 1, device=result.device, dtype=result.dtype)
    for section in result.sections:
        for kept in section.kept:
            inputs = [element.expand(tokens, kept.in_features) for tokens in section.tokens]
            count = sum(is_small(x, kept.out_features, section.dropout > 0) for x in inputs)
            if count:
                yield (
                    f"Dropout {section.dropout:g}: in {count} of {len(inputs)} batches layers {kept.in_features} to "
                    f"{kept.out_features}, but for those that share their input, were too small for a CPU to gain, and "
                    "left to eager PyTorch."
                )


def _named(route: str) -> str:
    return f"{route} ({ROUTE_IN_WORDS[route]})"


def show(result: Result, console: Console) -> None:
    """Print the table, and below it what "kept" means and which route ran where."""
    console.print(table(result))
    console.print("kept: until backward, per token by one layer of that size (in to out), and by the whole model.")
    for line in route_lines(result):
        console.print(line, highlight=False, soft_wrap=True)


def write(result: Result, console: Console) -> None:
    """Write loss.png, timing.png and demo.json, and say where they are."""
    out = result.settings.out
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "loss.png", out / "timing.png", out / "demo.json"]
    _plot_losses(result, paths[0])
    _plot_times(result, paths[1])
    paths[2].write_text(json.dumps(result.as_dict(), indent=1, default=str) + "\n", encoding="utf-8")
    console.print(f"wrote {', '.join(str(path) for path in paths)}", highlight=False, soft_wrap=True)


def figure_with(rows: int, columns: int, **options: Any) -> Any:
    """A figure and its panels, drawn into a file: no display, and the caller's pyplot is left alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _plot_losses(result: Result, path: Path) -> None:
    """All curves on top of each other, the first one widest; below, how far the others are from PEFT's."""
    plain = result.sections[0]
    steps = range(1, len(plain.tokens) + 1)
    figure, (upper, lower) = figure_with(2, 1, sharex=True, height_ratios=(3, 1))
    for name, width in zip(MODELS, (7, 3.5, 1.2), strict=True):
        upper.plot(steps, plain.courses[name].losses, color=COLOURS[name], linewidth=width, label=name)
    upper.set_ylabel("training loss")
    upper.legend(frameon=False)
    largest = max(max(differences) for differences in map(plain.loss_differences, FUSED))
    figure.suptitle(f"Same start, same batches; losses differ from PEFT's by {largest:.1e} at most")
    for name, aside in zip(FUSED, (-0.2, 0.2), strict=True):
        places = [step + aside for step in steps]
        lower.bar(places, plain.loss_differences(name), width=0.4, color=COLOURS[name])
    lower.set_ylim(bottom=0)
    lower.set_ylabel("difference")
    lower.set_xlabel("step")
    figure.savefig(path)


def _plot_times(result: Result, path: Path) -> None:
    """Every timed step as a dot, over the size of its batch; a panel for each training."""
    figure, panels = figure_with(1, len(result.sections), sharey=True)
    for axes, section in zip(panels, result.sections, strict=True):
        tokens = section.timed(section.tokens)
        for name in MODELS:
            times = section.timed(section.courses[name].step_ms)
            axes.scatter(tokens, times, s=18, color=COLOURS[name], label=name)
        gains = ", ".join(f"{name} {section.speedup(name).p50:.2f}x" for name in FUSED)
        axes.set_title(f"adapter dropout {section.dropout:g}\n{gains}", fontsize=10)
        axes.set_xlabel("tokens in the batch, padding included")
        axes.set_xlim(left=0)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("time of a training step [ms]")
    panels[0].legend(frameon=False)
    figure.savefig(path)
