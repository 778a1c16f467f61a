"""The report's pictures: speed-up bars, overhead over tokens, kernels under the roof."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate
from math import log10
from typing import Any

from ..benchmark import Row
from .results import Results
from .tables import case_title, layer_title, shown

__all__ = ["overhead", "roofline", "speedup"]

COLOURS = {
    "frozen": "#5b6470", "eager": "#9aa1ab", "peft": "#9aa1ab", "compile": "#b07aa1", "three-gemm": "#e0a13a",
    "reference": "#c9b79c", "formula": "#c9b79c", "addmm": "#6fae7d", "precise": "#4a9fa5", "thin": "#2e7ebc",
    "split": "#1f4e8c", "single": "#17becf", "auto": "#d1495b", "grouped": "#a3243b", "ours": "#d1495b",
    "inject": "#d1495b", "accelerate": "#e07b39", "lorafusion": "#7f6fc0", "unsloth": "#b5c33a",
}  # fmt: skip
OTHER = "#444444"
OVER_LINES = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # letters stay legible where a line passes
MOST_BARS, MOST_PANELS = 72, 6
FIRST = ("block", "step", "layer")  # what says most about a model comes first
BAR = 0.21  # inches
KERNELS = ("#1f4e8c", "#d1495b", "#6fae7d", "#e0a13a", "#7f6fc0", "#4a9fa5", "#9aa1ab", "#b07aa1", "#b5c33a", "#444444")


def speedup(results: Results) -> bytes | None:
    """Bars of the speed-up over eager PEFT with their 20 to 80 % range, case by case; None where there is none."""
    cases = [bars for rows in shown(results).values() if (bars := _bars(rows))]
    if not cases:
        return None
    cases.sort(key=lambda rows: FIRST.index(rows[0].what) if rows[0].what in FIRST else len(FIRST))
    counts = accumulate(len(rows) for rows in cases)
    some = [rows for rows, count in zip(cases, counts, strict=True) if count <= MOST_BARS] or cases[:1]
    height = 1.1 + sum(BAR * len(rows) + 0.42 for rows in some)
    figure, (axes,) = _figure(1, (9, height))
    y, ticks = 0.0, []
    for rows in some:
        clock = f", {rows[0].clock}" if rows[0].clock not in (None, "wall clock") else ""
        heading = case_title(rows[0]) + clock
        _text(axes, heading, (0.0, y), fontsize=8, fontweight="bold")
        for row in rows:
            y += 1
            _bar(axes, y, row)
            ticks.append((y, row.provider))
        y += 2
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.set_ylim(y - 1, -1)
    axes.axvline(1.0, color="black", linewidth=0.8, zorder=0.5)
    axes.set_xlim(0, 1.12 * max((row.speedup_p80 or row.speedup or 0) for rows in some for row in rows))
    axes.set_xlabel(f"speed-up over eager PEFT, adapters of the same dtype ({_mode(some[0][0])}); whiskers: 20 to 80 %")
    left_out = len(cases) - len(some)
    more = f"\n{len(some)} of {len(cases)} cases, the rest is in rows.csv" if left_out else ""
    axes.set_title(results.device + more, fontsize=10)
    return _png(figure)


def _bars(rows: Sequence[Row]) -> list[Row]:
    """What is drawn of a case: no baseline, which is 1 by definition, and no reference beside what users run."""
    with_ratio = [row for row in rows if row.speedup is not None and row.provider.removesuffix("-fp32") != "eager"]
    return [row for row in with_ratio if row.provider != "reference"] or with_ratio


def _bar(axes: Any, y: float, row: Row) -> None:
    value = row.speedup or 0.0
    axes.barh(y, value, height=0.8, color=_colour(row.provider))
    end = value
    if row.speedup_p20 is not None and row.speedup_p80 is not None:
        # Of a few rounds with repeats the median may lie on the edge of its own range.
        low, high = min(row.speedup_p20, value), max(row.speedup_p80, value)
        axes.plot([low, high], [y, y], color="black", linewidth=1.1)
        end = high
    _text(axes, f"{value:.2f}x", (end, y), fontsize=7)


def _text(axes: Any, text: str, at: tuple[float, float], **style: Any) -> None:
    """A little to the right of a point."""
    axes.annotate(text, at, (4, 0), textcoords="offset points", va="center", bbox=OVER_LINES, **style)


def overhead(results: Results) -> bytes | None:
    """Time over that of the frozen linears against tokens, a panel for each layer; None where there is none."""
    panels: dict[tuple[object, ...], list[Row]] = {}
    for rows in shown(results).values():
        for row in rows:
            if row.overhead is not None and row.provider != "frozen":
                key = (row.what, row.label, row.in_features, row.out_features, row.rank, row.dropout, row.dtype)
                panels.setdefault(key, []).append(row)
    if not panels:
        return None
    # Panels with most numbers of tokens say most.
    some = sorted(panels.values(), key=lambda rows: -len({row.tokens for row in rows}))[:MOST_PANELS]
    columns = min(len(some), 2)
    lines = -(-len(some) // columns)
    figure, all_axes = _figure(len(some), (4.6 * columns + 1.4, 3.1 * lines + 0.4), columns)
    for axes, rows in zip(all_axes, some, strict=True):
        _overhead_panel(axes, rows)
    for axes in all_axes[-columns:]:
        axes.set_xlabel("tokens")
    for axes in all_axes[::columns]:
        axes.set_ylabel("time over frozen linears")
    names = {name: line for axes in all_axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(names.values(), names.keys(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(
        f"{results.device}: what an adapter costs ({_mode(some[0][0])}); at 1 it would be free", fontsize=10
    )
    return _png(figure)


def _overhead_panel(axes: Any, rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(row.provider for row in rows):
        points = sorted((row.tokens, row.overhead) for row in rows if row.provider == name)
        x, y = zip(*points, strict=True)
        style = "--" if name.endswith("-fp32") else "-"
        axes.plot(x, y, style, marker="o", markersize=4, linewidth=1.3, color=_colour(name), label=name)
    tokens = sorted({row.tokens for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.minorticks_off()
    if len(tokens) == 1:
        axes.set_xlim(tokens[0] / 2, tokens[0] * 2)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylim(bottom=min(0.9, *(row.overhead or 1.0 for row in rows)))
    row = rows[0]
    axes.set_title(
        f"{layer_title(row)}, rank {row.rank}, dropout {row.dropout:g}, {row.dtype}",
        fontsize=8,
    )


def roofline(results: Results) -> bytes | None:
    """Arithmetic against intensity of kernels, or of whole layers where kernels were not timed; None for neither."""
    if results.kernels:
        points = [(k.flops / k.bytes, k.tflops, k.kernel) for k in results.kernels if k.bytes and k.flops]
        what = "kernels, by the bytes and FLOPs they declare"
    else:
        every = [row for rows in shown(results).values() for row in rows if row.provider != "frozen"]
        rows = [row for row in every if row.flops and row.bytes and row.ms_p50]
        points = [(r.flops / r.bytes, r.flops / r.ms_p50 * 1e-9, r.provider) for r in rows]  # type: ignore[operator]
        what = "layers and blocks, by the bytes and FLOPs they need"
    if not points:
        return None
    figure, (axes,) = _figure(1, (8.4, 5))
    names = list(dict.fromkeys(name for *_, name in points))
    for index, name in enumerate(names):
        colour = KERNELS[index % len(KERNELS)] if results.kernels else _colour(name)
        x, y = zip(*((x, y) for x, y, n in points if n == name), strict=True)
        axes.scatter(x, y, s=26, color=colour, alpha=0.8, label=name, edgecolors="none")
    _roofs(axes, results, [x for x, *_ in points])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*_decades(axes.get_xlim(), 1.3))
    axes.set_ylim(*_decades(axes.get_ylim(), 1.0))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(_sparse)
        axis.set_tick_params(which="both", labelsize=8)
    axes.set_xlabel("arithmetic intensity [FLOP per byte]")
    axes.set_ylabel("achieved [TFLOP/s]")
    axes.grid(which="both", linewidth=0.3, alpha=0.6)
    axes.set_title(f"{results.device}: {what}", fontsize=10)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return _png(figure)


def _decades(limits: tuple[float, float], least: float) -> tuple[float, float]:
    """Limits of a logarithmic axis, at least so many decades apart, so that some ticks have labels."""
    low, high = limits
    wider = 10 ** (max(0.0, least - log10(high / low)) / 2)
    return low / wider, high * wider


def _sparse(value: float, _: int) -> str:
    """Labels of minor ticks: 2 and 5 of every decade."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _roofs(axes: Any, results: Results, intensities: Sequence[float]) -> None:
    """min(peak, bandwidth · intensity), measured where the file has it, else as expected of this GPU."""
    low, high = min(intensities) / 2, max(intensities) * 2
    roofs = []
    if "copy_gb_per_s" in results.ceilings and "gemm_tflops" in results.ceilings:
        measured = results.ceilings
        roofs.append(("measured", measured["copy_gb_per_s"] * 1e-3, measured["gemm_tflops"], "-"))
    if results.gpu is not None:
        roofs.append(("expected", results.gpu.bandwidth * 1e-12, results.gpu.peak * 1e-12, "--"))
    for name, bandwidth, peak, style in roofs:
        corner = min(max(peak / bandwidth, low), high)
        x = [low, corner, high]
        label = f"{name}: {bandwidth:.2f} TB/s, {peak:.0f} TFLOP/s"
        axes.plot(x, [min(peak, bandwidth * at) for at in x], style, color="black", linewidth=1.0, label=label)


def _mode(row: Row) -> str:
    return {"both": "forward plus backward"}.get(row.mode, row.mode)


def _colour(provider: str) -> str:
    return COLOURS.get(provider.removesuffix("-fp32"), OTHER)


def _figure(count: int, size: tuple[float, float], columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its panels, drawn into a file: no display, and the caller's pyplot is left alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(-(-count // columns), columns, squeeze=False).flatten())
    for unused in panels[count:]:
        unused.remove()
    for axes in panels[:count]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[:count]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
