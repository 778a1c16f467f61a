"""What `accelerate` gains on a model that wears PEFT adapters, on this CPU: `python -m bench.accelerated`.

PEFT's layer and a copy of it that was accelerated, forward and backward in turn within every round; the training step
of an encoder of BERT's size; how long `accelerate` itself takes, and a call of a layer too small to gain anything.
Exit status: 0 when every goal is met, 1 when one is missed or an accelerated model computes something else.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import lowrank_fused as lf
from bench.accelerated_page import markdown, show
from bench.goals import Goal, as_dicts, missed
from bench.methods import Pair
from bench.model_step import TrainingStep
from lowrank_fused.benchmark import Spread, Step, clock_for, document, dtype_name, interleave, paired_ratio, write_json
from lowrank_fused.demo.data import Batch
from lowrank_fused.demo.model import SentimentModel, linear_paths
from lowrank_fused.peft.readers import layer_classes
from lowrank_fused.tools.doctor import environment
from lowrank_fused.tools.model_shapes import build

__all__ = ["CASES", "LayerCase", "Report", "Setting", "main", "run"]

RESULTS = Path(__file__).resolve().parent / "results" / "accelerated"
# A third side, where calls are left to PEFT as being as fast: the same layer made to compute by this route.
NAMED = "addmm"
CPU = torch.device("cpu")
# Largest difference from PEFT, relative to the largest value, that rounding explains.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class LayerCase:
    """A PEFT layer: class and settings of its config, adapters active at once, and how much faster it must be."""

    title: str
    config: str
    settings: Mapping[str, Any]
    adapters: int = 1
    at_least: float = 1.0


CASES: tuple[LayerCase, ...] = (
    LayerCase("lora r=16", "LoraConfig", {"r": 16}),
    LayerCase("lora r=16, dropout 0.1", "LoraConfig", {"r": 16, "lora_dropout": 0.1}, at_least=1.25),
    LayerCase("lora r=8, two adapters active", "LoraConfig", {"r": 8}, adapters=2),
    LayerCase("lora r=8, dropout 0.1, two adapters active", "LoraConfig", {"r": 8, "lora_dropout": 0.1}, adapters=2),
    LayerCase("dora r=16", "LoraConfig", {"r": 16, "use_dora": True}, at_least=1.2),
    LayerCase("adalora r=12", "AdaLoraConfig", {"init_r": 12, "total_step": 1000}),
    LayerCase("vera r=256", "VeraConfig", {"r": 256}),
    LayerCase("vblora r=4", "VBLoRAConfig", {"r": 4}),
    # A length that has two elements of the factors to each of its own, as in a whole model.
    LayerCase("unilora r=4", "UniLoraConfig", {"r": 4, "theta_d_length": 4096}),
    LayerCase("peanut r=32", "PeanutConfig", {"r": 32}, at_least=1.8),
    LayerCase("miss r=64", "MissConfig", {"r": 64}),
    LayerCase("tinylora r=2", "TinyLoraConfig", {"r": 2}),
)

# dtype of the model, and whether its adapters are in fp32, PEFT's default. In 16 bits the goal is not to be slower.
DTYPES = ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False))


@dataclass(frozen=True)
class Setting:
    """How large and how long; tests make it small."""

    size: int = 1024
    tokens: int = 2048
    cases: tuple[LayerCase, ...] = CASES
    encoder: Mapping[str, Any] = field(default_factory=dict)  # fields of its config, to differ from BERT's base size
    batch: int = 8
    length: int = 128
    many_layers: int = 300
    small_size: int = 32
    small_tokens: int = 4
    small_calls: int = 200
    layer_seconds: float = 10.0
    model_seconds: float = 60.0
    rounds: tuple[int, int] = (9, 200)


@dataclass
class Report:
    """Goals and times as they come in."""

    goals: list[Goal] = field(default_factory=list)
    times: dict[str, dict[str, Spread]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    calls: dict[str, dict[str, Spread]] = field(default_factory=dict)  # microseconds
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Everything the same function, and every goal met."""
        return not self.wrong and not missed(self.goals)


def adapted(model: nn.Module, case: LayerCase, targets: Sequence[str], dtype: torch.dtype = torch.float32) -> nn.Module:
    """`model` with PEFT's adapters of this case on `targets`, of this dtype and none of them zero."""
    import peft

    config = getattr(peft, case.config)(target_modules=list(targets), **case.settings)
    names = ["default", *(f"adapter_{i}" for i in range(1, case.adapters))]
    with warnings.catch_warnings():
        # PEFT asks an encoder for an attribute that transformers is renaming.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
        for name in names[1:]:
            wrapped.add_adapter(name, config)
    wrapped.base_model.set_adapter(names if case.adapters > 1 else names[0])
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = (parameter.data + 0.02 * torch.randn_like(parameter)).to(dtype)
    return wrapped.train()


def accelerated_twin(model: nn.Module, route: str = "auto") -> nn.Module:
    """An accelerated copy."""
    twin = copy.deepcopy(model)
    lf.accelerate(twin, route=route)
    return twin


@contextmanager
def torch_masks(model: nn.Module) -> Iterator[None]:
    """Inside, dropout by the very masks that PEFT draws, so that results can be compared; by our own after."""
    route = lf.explain(model).route
    lf.accelerate(model, dropout="torch", route=route)
    try:
        yield
    finally:
        lf.accelerate(model, route=route)


def layer_pair(case: LayerCase, dtype: torch.dtype, fp32_adapters: bool, size: int, tokens: int) -> Pair:
    """PEFT's layer and its accelerated twin on one x and dy."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(size, size, bias=False)).to(dtype)
    theirs = adapted(base, case, ["0"], torch.float32 if fp32_adapters else dtype)
    ours = accelerated_twin(theirs)
    x, dy = torch.randn(tokens, size).to(dtype).requires_grad_(), torch.randn(tokens, size).to(dtype)
    models = {"theirs": theirs, "ours": ours}
    leaves = {name: [x, *(p for p in model.parameters() if p.requires_grad)] for name, model in models.items()}
    return Pair(x, dy, models, leaves, "PEFT's layer")  # type: ignore[arg-type]


def add_named(pair: Pair) -> None:
    """A third side that takes a route by name."""
    twin = accelerated_twin(pair.forwards["theirs"], NAMED)  # type: ignore[arg-type]
    pair.forwards[NAMED] = twin
    pair.leaves[NAMED] = [pair.x, *(p for p in twin.parameters() if p.requires_grad)]


def disagreement(pair: Pair, side: str = "ours") -> float:
    """Largest difference of y and of every gradient under the same dropout masks, relative to its size."""
    found: dict[str, list[Tensor]] = {}
    with torch_masks(pair.forwards[side]):  # type: ignore[arg-type]
        for name in ("theirs", side):
            torch.manual_seed(1)
            y = pair.forwards[name](pair.x)
            found[name] = [y.detach(), *torch.autograd.grad(y, pair.leaves[name], pair.dy)]
    pairs = zip(*found.values(), strict=True)
    return max(((b.float() - a.float()).abs().max() / a.float().abs().max()).item() for a, b in pairs)


def as_fast_reasons() -> set[str]:
    """Why calls may be left to PEFT on purpose."""
    return {cls.as_fast_in_16_bits for cls in layer_classes().values() if cls.as_fast_in_16_bits}


def is_left_on_purpose(model: nn.Module) -> bool:
    """Whether the calls of an accelerated model went to PEFT's own forward, since that is as fast."""
    return {row.reason for row in lf.explain(model).rows} <= as_fast_reasons()


def fault(model: nn.Module, difference: float, dtype: torch.dtype) -> str | None:
    """What makes a timing of an accelerated model, which was run once, meaningless."""
    left = sorted({row.reason for row in lf.explain(model).rows if row.path == "original"} - as_fast_reasons())
    if left:
        return f"left to PEFT: {'; '.join(left)}"
    return f"differs from PEFT by {difference:.1e}" if difference > AGREEMENT[dtype] else None


def layers(setting: Setting, report: Report, progress: Progress) -> None:
    """Every method in fp32, and in bf16 with adapters of fp32 and of bf16, where nothing may be slower.

    Where calls are left to PEFT on purpose, what ours would take is timed beside.
    """
    import peft

    for dtype, fp32_adapters in DTYPES:
        for case in setting.cases:
            what = f"{case.title}, {dtype_name(dtype)}"
            if dtype != torch.float32:
                what += ", adapters fp32" if fp32_adapters else ", adapters bf16"
            if not hasattr(peft, case.config):
                report.left_out.append(f"{what}: PEFT {importlib.metadata.version('peft')} has no {case.config}")
                continue
            pair = layer_pair(case, dtype, fp32_adapters, setting.size, setting.tokens)
            ours: nn.Module = pair.forwards["ours"]  # type: ignore[assignment]
            found = fault(ours, disagreement(pair), dtype)
            if not found and is_left_on_purpose(ours):
                add_named(pair)
                found = fault(pair.forwards[NAMED], disagreement(pair, NAMED), dtype)  # type: ignore[arg-type]
            if found:
                report.wrong.append(f"{what}: {found}")
                continue
            steps = {name: pair.step(name) for name in pair.forwards}
            goal = Goal(what, 0.0, case.at_least if dtype == torch.float32 else 1.0)
            _race(goal, steps, setting.layer_seconds, setting, report, progress)


def model_steps(setting: Setting, dropout: float) -> dict[str, TrainingStep]:
    """Forward, loss, backward and AdamW of an encoder with a classifier, LoRA on all its linears."""
    torch.manual_seed(0)
    model = SentimentModel(build("roberta-base", "cpu", **setting.encoder))
    case = LayerCase("", "LoraConfig", {"r": 8, "lora_alpha": 16, "lora_dropout": dropout})
    model.encoder = adapted(model.encoder, case, linear_paths(model.encoder))
    ids = torch.randint(1000, 30000, (setting.batch, setting.length))
    data = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(setting.batch) % 2)
    models = {"theirs": model, "ours": accelerated_twin(model)}
    return {name: TrainingStep.of(m, lambda m=m: m.loss(data)) for name, m in models.items()}  # type: ignore[misc]


def training_steps(setting: Setting, report: Report, progress: Progress) -> None:
    """The whole step of a model of BERT's size, without dropout in the adapters and with."""
    for dropout in (0.0, 0.1):
        runs = model_steps(setting, dropout)
        what = f"training step of a BERT, LoRA r=8 on all linears, {setting.batch} x {setting.length} tokens, "
        what += f"dropout {dropout:g}, fp32"
        losses = {}
        with torch_masks(runs["ours"].model):
            for name, run in runs.items():
                torch.manual_seed(1)
                losses[name] = run.loss().item()
        difference = abs(losses["ours"] / losses["theirs"] - 1)
        if found := fault(runs["ours"].model, difference, torch.float32):
            report.wrong.append(f"{what}: {found}")
            continue
        steps = {name: run.step() for name, run in runs.items()}
        _race(Goal(what, 0.0, 1.0), steps, setting.model_seconds, setting, report, progress)


def _race(goal: Goal, steps: dict[str, Step], seconds: float, setting: Setting, report: Report, bar: Progress) -> None:
    """Time both in turn; add their times, and the goal with the median of the ratios within rounds."""
    task = bar.add_task(goal.what, total=None)
    times = interleave(
        steps,
        clock_for(CPU),
        budget_s=seconds,
        min_rounds=setting.rounds[0],
        max_rounds=setting.rounds[1],
        on_round=lambda done, planned: bar.update(task, completed=done, total=planned),
    )
    bar.remove_task(task)
    ratio = paired_ratio(times["theirs"], times["ours"])
    if NAMED in times:
        named = paired_ratio(times["theirs"], times[NAMED])
        same = f"left to PEFT; by route {NAMED} {named.p50:.2f} x ({named.p20:.2f} to {named.p80:.2f})"
        goal = replace(goal, same=same)
    report.goals.append(replace(goal, value=ratio.p50, spread=(ratio.p20, ratio.p80)))
    report.times[goal.what] = {name: Spread.of(values) for name, values in times.items()}
    report.rounds[goal.what] = len(times["ours"])


def accelerate_many(setting: Setting, report: Report) -> None:
    """The first `accelerate` of a process, on a model of many layers: under a second."""
    count, size = setting.many_layers, setting.small_size
    case = LayerCase("", "LoraConfig", {"r": 8})
    model = adapted(nn.Sequential(*(nn.Linear(size, size) for _ in range(count))), case, [str(i) for i in range(count)])
    start = time.perf_counter()
    found = lf.accelerate(model)
    elapsed_ms = (time.perf_counter() - start) * 1e3
    if found.of_path("fused") != count:
        report.wrong.append(f"of {count} layers: {found.summary()}")
    report.goals.append(Goal(f"accelerate, a model of {count} layers", elapsed_ms, 1000.0, "ms", at_least=False))


def small_calls(setting: Setting, report: Report) -> None:
    """Microseconds of a call whose arithmetic costs next to nothing: what deciding and dispatching cost."""
    for dropout in (0.0, 0.1):
        case = LayerCase("", "LoraConfig", {"r": 8, "lora_dropout": dropout})
        pair = layer_pair(case, torch.float32, True, setting.small_size, setting.small_tokens)
        for what, backward in (("forward", False), ("forward + backward", True)):
            steps = {name: _calls(pair, name, setting.small_calls, backward) for name in pair.forwards}
            times = interleave(steps, clock_for(CPU), min_rounds=setting.rounds[0], max_rounds=setting.rounds[0])
            scale = 1e3 / setting.small_calls
            report.calls[f"lora r=8, dropout {dropout:g}, {what}"] = {
                name: Spread.of([ms * scale for ms in values]) for name, values in times.items()
            }


def _calls(pair: Pair, name: str, count: int, backward: bool) -> Step:
    forward, leaves = pair.forwards[name], pair.leaves[name]

    def run() -> None:
        with torch.set_grad_enabled(backward):
            for _ in range(count):
                y = forward(pair.x)
                if backward:
                    torch.autograd.grad(y, leaves, pair.dy)

    return Step(lambda _: run())


def run(setting: Setting, console: Console) -> Report:
    """All measurements of one setting; `accelerate` first, because its first call in a process takes longest."""
    report = Report()
    accelerate_many(setting, report)
    with Progress(console=console, transient=True) as progress:
        small_calls(setting, report)
        layers(setting, report, progress)
        training_steps(setting, report, progress)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, show, write; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.accelerated", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for accelerated.json and accelerated.md")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    console, setting, load = Console(), Setting(), [os.getloadavg()[0]]
    report = run(setting, console)
    load.append(os.getloadavg()[0])
    given = sys.argv[1:] if arguments is None else arguments
    content = document([], environment(), ["python", "-m", "bench.accelerated", *given])
    content |= {
        "load": load,
        "goals": as_dicts(report.goals),
        "ms": {what: {name: asdict(ms) for name, ms in both.items()} for what, both in report.times.items()},
        "rounds": report.rounds,
        "call_us": {what: {name: asdict(us) for name, us in both.items()} for what, both in report.calls.items()},
        "wrong": report.wrong,
        "left_out": report.left_out,
    }
    write_json(chosen.out / "accelerated.json", content)
    (chosen.out / "accelerated.md").write_text(markdown(report, content, setting), encoding="utf-8")
    show(report, console)
    console.print(f"written: {chosen.out / 'accelerated.json'}, accelerated.md")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
