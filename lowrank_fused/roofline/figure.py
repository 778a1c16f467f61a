"""Predictions as a picture: bars of one setting, or curves over the number of tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .model import Prediction
from .providers import OURS

__all__ = ["draw"]

_COLOURS = {"frozen": "0.75", "limit": "0.25"}
_OTHERS, _OURS = "#d9a441", "#1a5fb4"
_MARKERS = "osD^vP*Xhd<>pH"
# Those of Matplotlib, and darker ones for what comes after ten.
_CURVES = (*(f"C{place}" for place in range(10)), "darkblue", "saddlebrown", "darkgreen", "darkred")


def draw(path: Path, predictions: Sequence[Prediction], title: str, assumptions: str) -> None:
    """Write a PNG of one scope: times by provider; against tokens, where there are several counts of them, the price
    over the frozen layers.

    Raises ImportError where Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs Matplotlib: pip install 'matplotlib>=3.8'") from error
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    over_tokens = len({p.tokens for p in predictions}) > 1
    (_curves if over_tokens else _bars)(axes, predictions)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    note = f"A model, not a measurement: {assumptions}."
    figure.supxlabel(textwrap.fill(note, 150), x=0.01, ha="left", fontsize=7, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _colour(provider: str) -> str:
    return _COLOURS.get(provider, _OURS if provider in OURS else _OTHERS)


def _bars(axes: Any, predictions: Sequence[Prediction]) -> None:
    """One bar a provider, with its price and its gain; lines at the limit and at the frozen layers."""
    names = [p.provider for p in predictions]
    times = [p.us / 1000 for p in predictions]
    axes.barh(names, times, color=[_colour(name) for name in names], height=0.7)
    axes.invert_yaxis()
    for place, p in enumerate(predictions):
        text = f" {p.us / 1000:.2f} ms   {p.over_frozen:.3f} of frozen   {p.speedup:.2f}x over eager"
        axes.text(p.us / 1000, place, text, va="center", fontsize=8)
    limit = predictions[0].us * predictions[0].share_of_limit / 1000
    axes.axvline(limit, color=_COLOURS["limit"], linestyle="--", linewidth=1)
    axes.text(limit, -0.65, "limit ", ha="right", va="center", fontsize=8)
    axes.set_xlim(0, 1.55 * max(times))
    axes.set_xlabel("predicted time, forward and backward [ms]")


def _curves(axes: Any, predictions: Sequence[Prediction]) -> None:
    """Price over the frozen layers against tokens."""
    by_provider = sorted(predictions, key=lambda p: p.provider)
    curves = {name: sorted(group, key=lambda p: p.tokens) for name, group in groupby(by_provider, lambda p: p.provider)}
    order = [name for name in dict.fromkeys(p.provider for p in predictions) if name != "frozen"]
    for marker, colour, name in zip(_MARKERS, _CURVES, order, strict=False):
        tokens, prices = [p.tokens for p in curves[name]], [100 * (p.over_frozen - 1) for p in curves[name]]
        style = {"linestyle": "--", "color": _COLOURS["limit"]} if name == "limit" else {"color": colour}
        axes.plot(tokens, prices, marker=marker, markersize=5, linewidth=1.4, label=name, **style)
    axes.axhline(0, color=_COLOURS["frozen"], linewidth=1)
    counts = sorted({p.tokens for p in predictions})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_xlabel("tokens")
    axes.set_ylabel("predicted time over the frozen layers [%]")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
