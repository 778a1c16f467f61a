"""Every method on one task: what it trains, what it reaches, what its step costs beside plain LoRA's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from .. import methods
from ..benchmark import Spread, Step, clock_for, interleave, paired_ratio
from ..demo.model import SentimentModel
from ..tools.tables import markdown_table
from .page import mean_and_deviation, write_page
from .store import RunStore
from .training import Task, Training

__all__ = ["FamilySettings", "reproduce_family"]

# Options without which a method does not fit MiniLM's widths of 384 and 1536.
OPTIONS: dict[str, dict[str, Any]] = {"vblora": {"vector_length": 128}}


@dataclass(frozen=True)
class FamilySettings:
    """Each method at its default rank; its rate is the best found on held-out snippets that are not reported.

    `rates` are tried first; while the best is at an end, four times as much or a quarter is tried there, until
    `most_rates` have been.
    """

    rates: tuple[float, ...] = (1e-3, 4e-3)
    most_rates: int = 4
    seeds: int = 3
    training: Training = Training(snippets=272, judged=240)
    timing_rounds: int = 5


def reproduce_family(
    out: Path,
    cache: Path,
    progress: Progress,
    *,
    seeds: int | None = None,
    snippets: int | None = None,
    names: Sequence[str] | None = None,
) -> Path:
    """Train and time what is not finished yet, then write methods.md and methods.json."""
    settings = FamilySettings()
    settings = replace(settings, seeds=seeds or settings.seeds, training=settings.training.with_snippets(snippets))
    store, task = RunStore(out / "methods.jsonl"), Task(settings.training, cache)
    names = list(names or methods.registry())
    bar = progress.add_task("every method", total=len(names))
    rows: list[dict[str, Any]] = []
    for name in names:
        config = {"method": name, **OPTIONS.get(name, {})}

        def run(rate: float, seed: int, config: dict[str, Any] = config) -> dict[str, Any]:
            key = {**config, "rate": rate, "seed": seed, **vars(settings.training)}
            found = store.get(key)
            if found is None:
                found = task.run(config, rate, seed)
                store.add(key, found)
            return found

        progress.update(bar, description=name)
        tried = {rate: run(rate, 0) for rate in settings.rates}
        while len(tried) < settings.most_rates and (further := _beyond(tried)):
            tried[further] = run(further, 0)
        best = _best(tried)
        results = [tried[best], *(run(best, seed) for seed in range(1, settings.seeds))]
        rows.append({"method": name, "rate": best, "rank": methods.resolve(name)[0], "runs": results})
        rows[-1]["step"] = _step_time(settings, task, store, config)
        progress.advance(bar)
    return _write(settings, rows, out)


def _best(tried: dict[float, dict[str, Any]]) -> float:
    """The rate with the highest accuracy on the snippets to choose by; of equal ones the lowest."""
    return max(sorted(tried), key=lambda rate: tried[rate]["choose"])


def _beyond(tried: dict[float, dict[str, Any]]) -> float | None:
    """The next rate on the side where the best one stands at the end; None where it stands between others."""
    best = _best(tried)
    return best / 4 if best == min(tried) else best * 4 if best == max(tried) else None


def _step_time(settings: FamilySettings, task: Task, store: RunStore, config: dict[str, Any]) -> dict[str, float]:
    """Time of this method's training step over plain LoRA's, measured in turn on the same batches."""
    key = {**config, "timing_rounds": settings.timing_rounds, "batch_size": settings.training.batch_size}
    found = store.get(key)
    if found is None:
        steps = {label: _step(task, c) for label, c in (("lora", {"method": "lora"}), ("this", config))}
        rounds = settings.timing_rounds
        times = interleave(steps, clock_for(torch.device("cpu")), min_rounds=rounds, max_rounds=rounds)
        ratio = paired_ratio(times["this"], times["lora"])
        found = {"ms": Spread.of(times["this"]).p50, "p20": ratio.p20, "p50": ratio.p50, "p80": ratio.p80}
        store.add(key, found)
    return found


def _step(task: Task, config: dict[str, Any]) -> Step:
    """One training step: forward, backward, optimiser, on a batch of middling length."""
    model = task.adapted(config, seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = sorted(task.some_batches(16), key=lambda b: b.inputs["input_ids"].shape[1])[8]

    def run(model: SentimentModel = model) -> None:
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Step(lambda _: run())


def _write(settings: FamilySettings, rows: list[dict[str, Any]], out: Path) -> Path:
    table = []
    for row in sorted(rows, key=lambda row: -mean_and_deviation([run["accuracy"] for run in row["runs"]])[0]):
        mean, deviation = mean_and_deviation([run["accuracy"] for run in row["runs"]])
        step = row["step"]
        table.append(
            (
                row["method"],
                str(row["rank"]),
                f"{row['runs'][0]['trained']:,}",
                f"{row['rate']:g}",
                f"{mean:.1%} ± {deviation:.1%}",
                f"{step['p50']:.2f}x ({step['p20']:.2f} to {step['p80']:.2f})",
            )
        )
    header = ("method", "rank", "trained", "learning rate", "accuracy", "step over plain LoRA's")
    others = settings.training.judged // 2
    parts = [
        f"On every linear of MiniLM at each method's default rank, {settings.training.snippets:,} movie-review "
        f"snippets in steps of {settings.training.batch_size}, {settings.seeds} seeds; accuracy on {others:,} others, "
        f"mean and standard deviation over seeds. The learning rate is the best on {others:,} further snippets of "
        f"{' and '.join(f'{rate:g}' for rate in settings.rates)} and, beyond the better end, steps of a factor of 4.",
        markdown_table(header, table),
        "Trained: elements of the adapters, without the classifier's head. Step: forward, backward and AdamW, run in "
        "turn with plain LoRA of rank 8; median of the ratios, 20th and 80th percentile. One short training each, at "
        "default ranks that differ by a factor of 256: this compares costs and shows that every method learns; it "
        "does not rank them.",
    ]
    return write_page(out, "methods", "Every method on one task", parts, {"rows": rows})
