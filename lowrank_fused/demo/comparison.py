"""The demo from beginning to end."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..benchmark import Spread, dtype_name, paired_ratio
from ..errors import UnsupportedError
from ..tools.doctor import best_device, environment
from . import report
from .data import Batch, batches, fetch_reviews, model_folder, split
from .model import FUSED, PEFT, SentimentModel, adapted_models, load_base, load_tokenizer
from .observe import Kept, RouteUse, kept_by_step, kept_for_backward, routes_of
from .race import Course, accuracy, race

__all__ = ["Result", "Section", "Settings", "run"]

T = TypeVar("T")

UNTIMED_STEPS = 2  # allocations and compilation happen in the first steps

# A wrong gradient shows as 1e-2 within a few steps; rounding, which training amplifies, is this far below it.
LOSS_AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Settings:
    """What to run, where, and where to leave the results.

    Without adapter dropout all models go through the same arithmetic, so their losses can be compared; the
    second, shorter training with `dropout` is there for its time and memory. `device` and `dtype` None mean
    the CUDA device and bfloat16 weights if there is one, else the CPU and float32; adapters are float32,
    where PEFT puts them.
    """

    snippets: int = 1344
    held_out: int = 800
    batch_size: int = 32
    epochs: int = 1
    dropout: float = 0.1
    dropout_steps: int = 10
    learning_rate: float = 2e-3
    seed: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    out: Path = Path("out/demo")
    cache: Path = Path(".cache/demo")

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "dropout_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.dropout < 1.0:
            raise ValueError(f"dropout must be between 0 and 1, got {self.dropout}")
        if self.dtype is not None and self.dtype not in LOSS_AGREEMENT:
            raise ValueError(f"the demo trains in fp32 or bf16, got {dtype_name(self.dtype)}")


@dataclass
class Section:
    """One training of the models: without dropout the whole one, with dropout a short one.

    `tokens` is the size of every step's batch, padding included; `routes` those of the models that run by ours, in
    the largest batch.
    """

    dropout: float
    tokens: list[int]
    courses: dict[str, Course]
    kept: list[Kept]
    kept_by_step: dict[str, int]
    routes: dict[str, list[RouteUse]]

    def step_ms(self, name: str) -> Spread:
        """Wall time of a step."""
        return Spread.of(self.timed(self.courses[name].step_ms))

    def speedup(self, name: str) -> Spread:
        """PEFT's time over this model's, step by step."""
        return paired_ratio(*(self.timed(self.courses[who].step_ms) for who in (PEFT, name)))

    def loss_differences(self, name: str) -> list[float]:
        """Between this model and PEFT's, in every step."""
        losses = (self.courses[who].losses for who in (PEFT, name))
        return [abs(theirs - others) for theirs, others in zip(*losses, strict=True)]

    @staticmethod
    def timed(values: list[T]) -> list[T]:
        """The values of those steps that count for the time: all but the first ones."""
        return values[UNTIMED_STEPS:] or values


@dataclass
class Result:
    """Everything the demo found out. `accuracy` is name -> (before, after)."""

    settings: Settings
    device: torch.device
    dtype: torch.dtype
    accuracy: dict[str, tuple[float, float]]
    sections: list[Section]
    environment: dict[str, Any] = field(default_factory=environment)

    @property
    def agrees(self) -> bool:
        """Whether all losses stayed within what rounding explains, at every step without dropout."""
        return all(max(self.sections[0].loss_differences(name)) <= LOSS_AGREEMENT[self.dtype] for name in FUSED)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the derived numbers beside the measured ones."""
        plain = asdict(self)
        for values, section in zip(plain["sections"], self.sections, strict=True):
            values["median_step_ms"] = {name: section.step_ms(name).p50 for name in section.courses}
            values["speedup"] = {name: asdict(section.speedup(name)) for name in FUSED}
            values["largest_loss_difference"] = {name: max(section.loss_differences(name)) for name in FUSED}
        return plain


def run(settings: Settings | None = None, console: Console | None = None) -> Result:
    """Train, measure, print the table, write `loss.png`, `timing.png` and `demo.json` into `settings.out`.

    Raises UnsupportedError if a package or the text cannot be had, ValueError on settings that do not fit.
    """
    _require("peft", "matplotlib")
    settings, console = settings or Settings(), console or Console()
    device = settings.device or best_device()
    dtype = settings.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    console.print(report.introduction(settings, device, dtype), highlight=False)
    folder = model_folder()
    train, held_out = split(fetch_reviews(settings.cache), settings.snippets, settings.held_out)
    tokenizer = load_tokenizer(folder)
    # Head and A are drawn on the host, so that they are the same on every machine.
    torch.manual_seed(settings.seed)
    base = load_base(folder, device, dtype)
    steps = [
        batch.to(device)
        for epoch in range(settings.epochs)
        for batch in batches(tokenizer, train, settings.batch_size, seed=settings.seed + epoch)
    ]
    judged = [batch.to(device) for batch in batches(tokenizer, held_out, settings.batch_size, seed=0)]
    with _progress(console) as progress:
        models = adapted_models(base, 0.0)
        before = _judge(models, judged, progress, "accuracy before")
        plain = _train(models, 0.0, steps, settings, progress)
        after = _judge(models, judged, progress, "accuracy after")
        short = steps[: settings.dropout_steps]
        dropped = _train(adapted_models(base, settings.dropout), settings.dropout, short, settings, progress)
    accuracies = {name: (before[name], after[name]) for name in models}
    result = Result(settings, device, dtype, accuracies, [plain, dropped])
    report.show(result, console)
    report.write(result, console)
    return result


def _require(*packages: str) -> None:
    """Ask at the start for what is imported later: a training must not be lost for want of a plot."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UnsupportedError(f"the demo needs {' and '.join(missing)}; run `pip install 'lowrank-fused[demo]'`")


def _judge(models: dict[str, SentimentModel], judged: list[Batch], progress: Progress, title: str) -> dict[str, float]:
    task = progress.add_task(title, total=len(models) * len(judged))

    def counted() -> Any:
        for batch in judged:
            yield batch
            progress.advance(task)

    return {name: accuracy(model, counted()) for name, model in models.items()}


def _train(
    models: dict[str, SentimentModel],
    dropout: float,
    steps: list[Batch],
    settings: Settings,
    progress: Progress,
) -> Section:
    """Look at the models first, then train them side by side."""
    kept = kept_for_backward(models)
    by_step = {name: kept_by_step(model, steps[0]) for name, model in models.items()}
    tokens = [batch.inputs["input_ids"].numel() for batch in steps]
    largest = steps[tokens.index(max(tokens))]
    routes = {name: routes_of(models[name], largest) for name in FUSED}
    task = progress.add_task(f"training all, dropout {dropout:g}", total=len(steps))
    courses = race(models, steps, settings.learning_rate, lambda: progress.advance(task))
    return Section(dropout, tokens, courses, kept, by_step, routes)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)
