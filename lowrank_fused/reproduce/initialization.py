"""Init[A] against Init[B] (Hayou et al., 2024, arXiv 2406.08447): which start bears the higher learning rate.

Init[A] draws A and starts B at zero, Init[B] the reverse; both start as the base model. The paper finds that Init[A]
reaches its best at a higher rate, and stays stable up to a higher one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..demo.report import figure_with
from ..tools.tables import markdown_table
from .page import mean_and_deviation, write_page
from .store import RunStore
from .training import Task, Training

__all__ = ["InitializationSettings", "reproduce_initialization"]

STARTS = {"init_a": "Init[A]", "init_b": "Init[B]"}
COLOURS = {"init_a": "#d1495b", "init_b": "#30638e"}


@dataclass(frozen=True)
class InitializationSettings:
    """The sweep: LoRA on every linear of MiniLM, AdamW, one pass over the snippets for every point."""

    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    seeds: int = 3
    rank: int = 8
    training: Training = Training()


def reproduce_initialization(
    out: Path, cache: Path, progress: Progress, *, seeds: int | None = None, snippets: int | None = None, **_: Any
) -> Path:
    """Train every point that is not finished yet, then write initialization.md, .json and .png."""
    settings = InitializationSettings()
    settings = replace(settings, seeds=seeds or settings.seeds, training=settings.training.with_snippets(snippets))
    store, task = RunStore(out / "initialization.jsonl"), Task(settings.training, cache)
    points = list(_points(settings))
    bar = progress.add_task("Init[A] against Init[B]", total=len(points))
    for start, rate, seed in points:
        key = _key(settings, start, rate, seed)
        if store.get(key) is None:
            config = {"method": "lora", "rank": settings.rank, "alpha": settings.rank, "init_lora_weights": start}
            store.add(key, task.run(config, rate, seed))
        progress.advance(bar)
    results = {(s, r): [store.get(_key(settings, s, r, seed)) for seed in range(settings.seeds)] for s, r, _ in points}
    return _write(settings, results, out)


def _points(settings: InitializationSettings) -> Iterator[tuple[str, float, int]]:
    for seed in range(settings.seeds):
        for rate in settings.rates:
            for start in STARTS:
                yield start, rate, seed


def _key(settings: InitializationSettings, start: str, rate: float, seed: int) -> dict[str, Any]:
    return {"start": start, "rate": rate, "seed": seed, "rank": settings.rank, **vars(settings.training)}


def _stable(runs: list[Any]) -> bool:
    """Every seed ends below the loss of a coin."""
    return all(not run["diverged"] and run["loss"] < math.log(2) for run in runs)


def _write(settings: InitializationSettings, results: dict[tuple[str, float], list[Any]], out: Path) -> Path:
    rows, best, stable = [], {}, {}
    for start, name in STARTS.items():
        means = {rate: mean_and_deviation([run["accuracy"] for run in results[start, rate]]) for rate in settings.rates}
        best[start] = max(settings.rates, key=lambda rate, means=means: means[rate][0])  # type: ignore[misc]
        stable[start] = max((rate for rate in settings.rates if _stable(results[start, rate])), default=0.0)
        rows += [_row(name, rate, means[rate], results[start, rate]) for rate in settings.rates]
    holds = {
        "the best rate of Init[A] is higher": best["init_a"] > best["init_b"],
        "the largest stable rate of Init[A] is higher": stable["init_a"] > stable["init_b"],
    }
    picture = out / "initialization.png"
    parts = [
        f"LoRA of rank {settings.rank} on every linear of MiniLM, {settings.training.snippets:,} movie-review "
        f"snippets in steps of {settings.training.batch_size}, {settings.seeds} seeds; accuracy on "
        f"{settings.training.judged // 2:,} others, mean and standard deviation over seeds.",
        markdown_table(("start", "learning rate", "accuracy", "training loss", "stable"), rows),
        "Stable: with every seed the mean training loss of the last quarter is below ln 2, that of a coin.",
        "\n".join(
            f"- {claim}: {'yes' if true else 'no'} ({STARTS['init_a']} {values['init_a']:g}, "
            f"{STARTS['init_b']} {values['init_b']:g})"
            for (claim, true), values in zip(holds.items(), (best, stable), strict=True)
        ),
        f"![accuracy over learning rate]({picture.name})",
    ]
    _plot(settings, results, picture)
    content = {"best_rate": best, "largest_stable_rate": stable, "holds": holds}
    return write_page(out, "initialization", "Where LoRA may start: Init[A] against Init[B]", parts, content)


def _row(name: str, rate: float, accuracy: tuple[float, float], runs: list[Any]) -> tuple[str, ...]:
    losses = [run["loss"] for run in runs if not run["diverged"]]
    loss = "diverged" if len(losses) < len(runs) else f"{mean_and_deviation(losses)[0]:.3f}"
    return name, f"{rate:g}", f"{accuracy[0]:.1%} ± {accuracy[1]:.1%}", loss, "yes" if _stable(runs) else "no"


def _plot(settings: InitializationSettings, results: dict[tuple[str, float], list[Any]], path: Path) -> None:
    figure, (axes,) = figure_with(1, 1)
    for start, name in STARTS.items():
        spread = [
            mean_and_deviation([100 * run["accuracy"] for run in results[start, rate]]) for rate in settings.rates
        ]
        axes.plot(settings.rates, [mean for mean, _ in spread], "-", color=COLOURS[start], label=name)
        low, high = ([m + sign * d for m, d in spread] for sign in (-1, 1))
        axes.fill_between(settings.rates, low, high, color=COLOURS[start], alpha=0.15)
    axes.set(xscale="log", xlabel="learning rate", ylabel="accuracy [%]")
    axes.legend(frameon=False)
    figure.savefig(path)
