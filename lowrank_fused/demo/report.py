"""The demo's table, pictures and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from ..benchmark import dtype_name
from .model import OURS, PEFT, RANK

if TYPE_CHECKING:
    from .comparison import Result, Section, Settings

__all__ = ["figure_with", "introduction", "show", "table", "write"]

COLOURS = {PEFT: "#8a8f98", OURS: "#d1495b"}
ROUTE_IN_WORDS = {
    "reference": "plain PyTorch",
    "addmm": "library GEMMs, low-rank term added in place",
    "thin": "Triton kernels around one library GEMM",
    "split": "Triton kernels and Triton GEMM",
}


def table(result: Result) -> Table:
    """Accuracy, losses, time and kept bytes of the two models, and how they compare."""
    plain = result.sections[0]
    rows = Table()
    rows.add_column("", no_wrap=True)
    for name in (PEFT, OURS, "compared"):
        rows.add_column(name, justify="right", no_wrap=True)
    for when, index in (("before", 0), ("after", 1)):
        shares = [result.accuracy[name][index] for name in (PEFT, OURS)]
        rows.add_row(f"accuracy {when}", *(f"{share:.1%}" for share in shares), _points(shares[1] - shares[0]))
    last = [f"{plain.courses[name].losses[-1]:.4f}" for name in (PEFT, OURS)]
    rows.add_row("loss at the last step", *last, "")
    rows.add_row("largest loss difference", "", "", f"{plain.largest_loss_difference():.1e}")
    for section in result.sections:
        _add_costs(rows, section)
    return rows


def _add_costs(rows: Table, section: Section) -> None:
    """Time of a step, bytes kept for backward per token in each shape of layer and by the whole model."""
    rows.add_section()
    rows.add_row(f"adapter dropout {section.dropout:g}", "", "", "", style="bold")
    times, ratio = [section.step_ms(name) for name in (PEFT, OURS)], section.speedup()
    rows.add_row("median step", *(f"{t.p50:.0f} ms" for t in times), f"{ratio.p50:.2f}x")
    spread = [f"{t.p20:.0f} to {t.p80:.0f} ms" for t in times]
    rows.add_row("20 % to 80 %", *spread, f"{ratio.p20:.2f} to {ratio.p80:.2f}x")
    for kept in section.kept:
        theirs, ours = (kept.bytes_per_token[name] for name in (PEFT, OURS))
        label = f"kept, {kept.in_features} to {kept.out_features}"
        rows.add_row(label, f"{theirs:,.0f} B/token", f"{ours:,.0f} B/token", _saving(theirs, ours))
    theirs, ours = (section.kept_by_step[name] for name in (PEFT, OURS))
    rows.add_row("kept, whole model", f"{theirs / 1e6:.0f} MB", f"{ours / 1e6:.0f} MB", _saving(theirs, ours))


def _points(difference: float) -> str:
    return "the same" if difference == 0 else f"{100 * difference:+.1f} points"


def _saving(theirs: float, ours: float) -> str:
    if theirs == ours:
        return "the same"
    return f"{1 - ours / theirs:.0%} less" if ours < theirs else f"{ours / theirs - 1:.0%} more"


def introduction(settings: Settings, device: torch.device, dtype: torch.dtype) -> str:
    """What is about to happen, where."""
    where = f"the CPU ({torch.get_num_threads()} of its cores)"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return (
        f"MiniLM (22.7 M parameters) learns the sentiment of {settings.snippets:,} movie-review snippets "
        f"and is judged on {settings.held_out:,} others.\n"
        f"Two copies with LoRA of rank {RANK} on all linears of the encoder train step by step in turn: "
        f"{PEFT} and {OURS}.\n"
        f"Weights in {dtype_name(dtype)}, adapters in fp32, on {where}."
    )


def route_lines(result: Result) -> list[str]:
    """Which route served which layers; one line where one route served them all."""
    uses = [(section.dropout, use) for section in result.sections for use in section.routes]
    routes = sorted({use.route for _, use in uses})
    if len(routes) == 1:
        lines = [f"Route {_named(routes[0])} served every adapted layer, forward and backward."]
    else:
        lines = [
            f"dropout {dropout:g}, {use.direction}, {use.calls} layers {use.in_features} to "
            f"{use.out_features}: route {_named(use.route)}"
            for dropout, use in uses
        ]
    if not {"thin", "split"} & set(routes):
        lines.append("No Triton kernel ran." + ("" if result.device.type == "cuda" else " They need a CUDA device."))
    return lines


def _named(route: str) -> str:
    return f"{route} ({ROUTE_IN_WORDS[route]})"


def show(result: Result, console: Console) -> None:
    """Print the table, and below it what "kept" means and which route ran where."""
    console.print(table(result))
    console.print("kept: until backward, by one layer of that size (in to out) and by the model.")
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
    """Both curves on top of each other; below, the size of their difference."""
    plain = result.sections[0]
    theirs, ours = plain.courses[PEFT].losses, plain.courses[OURS].losses
    steps = range(1, len(ours) + 1)
    figure, (upper, lower) = figure_with(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot(steps, theirs, color=COLOURS[PEFT], linewidth=4, label=PEFT)
    upper.plot(steps, ours, color=COLOURS[OURS], linewidth=1.5, label=OURS)
    upper.set_ylabel("training loss")
    upper.legend(frameon=False)
    figure.suptitle(f"Same start, same batches; losses differ by {plain.largest_loss_difference():.1e} at most")
    lower.bar(steps, [abs(t - o) for t, o in zip(theirs, ours, strict=True)], color=COLOURS[OURS])
    lower.set_ylim(bottom=0)
    lower.set_ylabel("difference")
    lower.set_xlabel("step")
    figure.savefig(path)


def _plot_times(result: Result, path: Path) -> None:
    """Every timed step as a dot, over the size of its batch; a panel for each training."""
    figure, panels = figure_with(1, len(result.sections), sharey=True)
    for axes, section in zip(panels, result.sections, strict=True):
        tokens = section.timed(section.tokens)
        for name in (PEFT, OURS):
            times = section.timed(section.courses[name].step_ms)
            axes.scatter(tokens, times, s=18, color=COLOURS[name], label=name)
        axes.set_title(f"adapter dropout {section.dropout:g}: {section.speedup().p50:.2f}x", fontsize=11)
        axes.set_xlabel("tokens in the batch, padding included")
        axes.set_xlim(left=0)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("time of a training step [ms]")
    panels[0].legend(frameon=False)
    figure.savefig(path)
