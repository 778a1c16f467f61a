"""What a GPU is asked, in order of priority: correctness, kernels, tuning, blocks, layers, models, memory, graphs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.causal import CausalCase, causal_steps, step_verdicts, warmed
from bench.causal import default_names as default_steps
from bench.gpu_graph import Capture, replayed_masks, replayed_step, time_replays, timed_row
from bench.gpu_kernels import ceilings, time_kernels
from bench.stages import ROOT, Case, PartlyFailed, Stage
from lowrank_fused.benchmark import Case as LayerCase
from lowrank_fused.benchmark import (
    Row,
    check,
    clock_for,
    clock_name,
    default_names,
    dtype_name,
    interleave,
    kept_bytes,
    measure,
    peak_bytes,
    providers_for,
)
from lowrank_fused.benchmark.block import GROUPED, BlockCase, block_names, block_providers
from lowrank_fused.benchmark.graph import captured
from lowrank_fused.benchmark.linears import check_linears
from lowrank_fused.benchmark.published import PUBLISHED, why_not
from lowrank_fused.kernels.measured import forget
from lowrank_fused.routes import GROUP_ROUTES
from lowrank_fused.target import target_of
from lowrank_fused.tuning import GroupCase, Measuring, provenance, tune
from lowrank_fused.tuning import Store as TableStore

__all__ = ["Setting", "stages"]

# Each keyword of the kernel tests is a case of its own: a hanging kernel costs one of them, not all.
KERNEL_TESTS = (
    "shrink",
    "expand",
    "factors",
    "lowrank_forward",
    "single_forward",
    "grad_input",
    "linear",
    "test_add",
    "test_branches",
    "gather",
    "stacked",
    "weight_factor",
    "as_accurate_as_its_reference",
)
PYTEST_SECONDS = 200
SANITIZER_SECONDS = 80
OTHERS = ("frozen", "eager", "eager-fp32", "compile", "three-gemm", *PUBLISHED)  # providers whose failure is not ours


def few_layers(model: str, **more: Any) -> CausalCase:
    """Two layers of a model with a small vocabulary, all linears adapted, bf16."""
    settings = {"num_hidden_layers": 2, "vocab_size": 32000}
    return CausalCase(model, settings=tuple(settings.items()), **more)


@dataclass(frozen=True)
class Setting:
    """Sizes of all stages, most important values first; tests make them small and put them on the CPU."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    shapes: tuple[tuple[int, int], ...] = (
        (4096, 4096),
        (4096, 14336),
        (14336, 4096),
        (4096, 1024),
    )  # in, out
    tokens: tuple[int, ...] = (8192, 1024, 1)
    ranks: tuple[int, ...] = (16, 64, 8, 128, 4)
    dropouts: tuple[float, ...] = (0.0, 0.1)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    routes: tuple[str, ...] = ("split", "thin", "single")
    timed_tokens: tuple[int, ...] = (8192, 1024)
    # Widths of square layers, and tokens, that others publish figures of their kernels for.
    published: Mapping[str, tuple[Sequence[int], Sequence[int]]] = field(
        default_factory=lambda: {"lorafusion": ((4096, 5120, 8192), (8192, 2048))}
    )
    timed_ranks: tuple[int, ...] = (16, 64)
    block: tuple[int, int, int] = (4096, 14336, 1024)  # hidden size, that of the MLP, that of k and v
    steps: tuple[CausalCase, ...] = field(
        default_factory=lambda: (
            few_layers("llama-3-8b", batch=2, length=2048),
            few_layers("qwen2.5-7b", batch=2, length=2048),
        )
    )
    memory: CausalCase = field(default_factory=lambda: few_layers("llama-3-8b", batch=4, length=2048))
    tuned: Path = ROOT / "bench" / "results" / "tuned.json"
    budget_s: float = 2.0
    capture: Capture = captured

    def layer(self, shape: tuple[int, int], tokens: int, rank: int, p: float, dtype: torch.dtype) -> LayerCase:
        """A layer on this device."""
        return LayerCase(*shape, tokens, rank, p, dtype, self.device, label=f"{shape[0]}x{shape[1]}")

    def block_of(self, tokens: int, p: float) -> BlockCase:
        """A block on this device, of the first rank and dtype."""
        hidden, inner, kv = self.block
        common = (tokens, self.ranks[0], p, self.dtypes[0], self.device)
        return BlockCase(hidden, inner, *common, label="block", kv_features=kv)


def stages(setting: Setting) -> list[Stage]:
    """All stages, most important first; together they may take just under 20 minutes."""
    tests = [Case(keyword, partial(run_tests, keyword)) for keyword in KERNEL_TESTS]
    return [
        Stage("tests", "kernel tests on this device", tests, 200, case_seconds=PYTEST_SECONDS + 20),
        Stage("correct", "y and gradients at real sizes against float64", list(correctness_cases(setting)), 160),
        Stage("sanitizer", "a small layer under compute-sanitizer", list(sanitizer_cases(setting)), 90),
        Stage("kernels", "e, the price of beta = 1, bandwidth of thin kernels", list(kernel_cases(setting)), 120),
        Stage("tune", "routes and tiles against the model's, into a table", list(tune_cases(setting)), 120, 120),
        Stage("block", "the seven linears of a decoder layer", list(block_cases(setting)), 130, case_seconds=120),
        Stage("layers", "a layer, over sizes, tokens, ranks, dropout", list(layer_cases(setting)), 140, 140),
        Stage("model", "a training step of a few layers", list(model_cases(setting)), 110),
        Stage("memory", "peak memory and bytes kept of that step", list(memory_cases(setting)), 50),
        Stage("graph", "CUDA graphs: a new mask per replay, times without launches", list(graph_cases(setting)), 70),
    ]


def by_priority(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The product of axes that are sorted by importance; first what strays least from their first values."""
    indexed = product(*(list(enumerate(axis)) for axis in axes))
    ordered = sorted(indexed, key=lambda point: sum(index for index, _ in point))
    return [tuple(value for _, value in point) for point in ordered]


def run_tests(keyword: str) -> dict[str, Any]:
    """pytest on the tests of one kernel; a failure carries the end of its output."""
    others = KERNEL_TESTS[: KERNEL_TESTS.index(keyword)]
    expression = f"{keyword} and not ({' or '.join(others)})" if others else keyword
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-m", "not slow", "-k", expression]
    command += ["-p", "no:cacheprovider", "--maxfail=20", "--tb=short", "--continue-on-collection-errors"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PYTEST_SECONDS)
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        raise RuntimeError(f"pytest took more than {PYTEST_SECONDS} s; it had said: {output[-2000:]}") from None
    counts = {
        what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout[-400:])
    }
    if done.returncode != 0 or not counts.get("passed"):
        raise RuntimeError(f"pytest exit {done.returncode}, {counts}: {(done.stdout + done.stderr)[-3500:]}")
    return counts


def correctness_cases(setting: Setting) -> Iterator[Case]:
    """Every route at every size, rank, dropout and dtype: finite and as accurate as PyTorch."""
    axes = (setting.dtypes, setting.ranks, setting.tokens, setting.shapes, setting.dropouts, setting.routes)
    for dtype, rank, tokens, shape, p, route in by_priority(*axes):
        layer = setting.layer(shape, tokens, rank, p, dtype)
        name = f"{route} {dtype_name(dtype)} {layer.label} M{tokens} r{rank} p{p:g}"
        yield Case(name, partial(check_route, route, layer))


def check_route(route: str, layer: LayerCase) -> None:
    """Raise unless the route is as accurate as PyTorch here."""
    check(providers_for([route], layer)[0], layer)


def kernel_cases(setting: Setting) -> Iterator[Case]:
    """First the ceilings of the device, then every kernel of every route beside the library's GEMMs."""
    yield Case("ceilings", partial(ceilings, setting.device, setting.budget_s))
    axes = (setting.timed_tokens, setting.timed_ranks, setting.dropouts, setting.shapes)
    for tokens, rank, p, shape in by_priority(*axes):
        layer = setting.layer(shape, tokens, rank, p, setting.dtypes[0])
        name = f"{dtype_name(layer.dtype)} {layer.label} M{tokens} r{rank} p{p:g}"
        yield Case(name, partial(time_kernels, layer, setting.routes, setting.budget_s))


def tune_cases(setting: Setting) -> Iterator[Case]:
    """The layers of a decoder, and those of them that share x, of the first rank and number of tokens."""
    tokens, rank, dtype = setting.timed_tokens[0], setting.timed_ranks[0], setting.dtypes[0]
    hidden, inner, kv = setting.block
    for p in setting.dropouts:
        layers: list[LayerCase] = [setting.layer(shape, tokens, rank, p, dtype) for shape in setting.shapes]
        for members in ((hidden, kv, kv), (inner, inner)):
            label = f"{hidden}x{'+'.join(map(str, members))}"
            common = (hidden, sum(members), tokens, rank, p, dtype, setting.device)
            layers.append(GroupCase(*common, label=label, members=members))
        for layer in layers:
            yield Case(titled(layer), partial(tune_layer, layer, setting))


def tune_layer(layer: LayerCase, setting: Setting) -> dict[str, Any]:
    """Before and after, and the table with them; raises where a route or a tile got no number."""
    contestants = ("addmm", *(route for route in setting.routes if route != "addmm"))
    if isinstance(layer, GroupCase):
        contestants = tuple(route for route in contestants if route in GROUP_ROUTES)
    backward = tuple(route for route in contestants if route != "single")  # which is `split` there
    table = TableStore(setting.tuned, f"sm_{target_of(layer.device).arch}", provenance(layer.device))
    measuring = Measuring.on(layer.device, min(setting.budget_s, 0.5))
    outcomes = list(tune([layer], table, measuring, {"forward": contestants, "backward": backward}))
    forget()
    names = ("what", "before", "before_us", "after", "after_us", "gain")
    told = [{name: getattr(outcome, name) for name in names} for outcome in outcomes]
    result = {"table": setting.tuned.name, "outcomes": told, "refused": measuring.refused}
    if measuring.refused:
        raise PartlyFailed(f"no numbers for {measuring.refused}", result)
    return result


def block_cases(setting: Setting) -> Iterator[Case]:
    """Rows of the block; torch.compile comes last, its compile time would keep the others waiting."""
    axes = (setting.timed_tokens, setting.dropouts)
    blocks = [setting.block_of(tokens, p) for tokens, p in by_priority(*axes)]
    for block in blocks:
        yield Case(f"M{block.tokens} p{block.dropout:g}", partial(bench_block, block, None, setting.budget_s))
    for block in blocks[: len(setting.dropouts)]:
        names = ("frozen", "eager", "compile", GROUPED)
        title = f"compile M{block.tokens} p{block.dropout:g}"
        yield Case(title, partial(bench_block, block, names, setting.budget_s))


def bench_block(block: BlockCase, names: Sequence[str] | None, budget_s: float) -> list[dict[str, Any]]:
    """Rows of a block for forward and for forward plus backward."""
    providers = block_providers(names or block_names(block), block)
    return told(measure(block, providers, ("both", "forward"), judge=check_linears, budget_s=budget_s))


def layer_cases(setting: Setting) -> Iterator[Case]:
    """Rows of layers: sizes, tokens and dropout, then ranks; last what compiles or patches for a long time."""
    first, dtype = setting.ranks[0], setting.dtypes[0]
    points = [
        setting.layer(shape, tokens, first, p, dtype)
        for tokens, p, shape in by_priority(setting.timed_tokens, setting.dropouts, setting.shapes)
    ]
    square = (setting.shapes[0], setting.timed_tokens[0])
    ranks = [setting.layer(*square, rank, p, dtype) for rank in setting.ranks[1:] for p in setting.dropouts[-1:]]
    for layer in [*points, *ranks]:
        yield Case(titled(layer), partial(bench_layer, layer, None, setting.budget_s))
    for layer in points[: len(setting.shapes) * len(setting.dropouts)]:
        names = ("frozen", "eager", "compile", "auto")
        yield Case(f"compile {titled(layer)}", partial(bench_layer, layer, names, setting.budget_s))
    for name in PUBLISHED:
        widths, tokens_of = setting.published.get(name, ((), ()))
        theirs = [((width, width), tokens) for tokens, width in product(tokens_of, widths)]
        for (shape, tokens), p in product(dict.fromkeys([square, *theirs]), setting.dropouts):
            layer = setting.layer(shape, tokens, first, p, dtype)
            yield Case(f"{name} {titled(layer)}", partial(bench_published, layer, name, setting.budget_s))


def titled(layer: LayerCase) -> str:
    """A case's name in its stage."""
    return f"{layer.label} M{layer.tokens} r{layer.rank} p{layer.dropout:g}"


def bench_layer(layer: LayerCase, names: Sequence[str] | None, budget_s: float) -> list[dict[str, Any]]:
    """Rows of a layer for forward and for forward plus backward."""
    providers = providers_for(names or default_names(layer), layer)
    return told(measure(layer, providers, ("both", "forward"), budget_s=budget_s))


def bench_published(layer: LayerCase, name: str, budget_s: float) -> Any:
    """Rows of others' kernels beside ours, or why there are none."""
    if reason := why_not(name, layer.device, layer.dropout, layer.bias):
        return {"skipped": reason}
    return bench_layer(layer, ("frozen", "eager", "auto", name), budget_s)


def told(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain values; raises, rows and all, where one of ours has no number."""
    result = [asdict(row) for row in rows]
    faults = {row.provider: row.status for row in rows if row.status != "ok" and row.provider not in OTHERS}
    if faults:
        raise PartlyFailed(f"no numbers for {faults}", result)
    return result


def model_cases(setting: Setting) -> Iterator[Case]:
    """Every model with every dropout, then the first one compiled."""
    for p, step in by_priority(setting.dropouts, setting.steps):
        case = replace(step, dropout=p, device=setting.device)
        yield Case(f"{case.model} p{p:g}", partial(time_model, case, None, setting.budget_s))
    case = replace(setting.steps[0], dropout=setting.dropouts[0], device=setting.device)
    names = ("frozen", "eager", "compile", "grouped")
    yield Case(f"compile {case.model} p{case.dropout:g}", partial(time_model, case, names, setting.budget_s))


def time_model(case: CausalCase, names: Sequence[str] | None, budget_s: float) -> list[dict[str, Any]]:
    """Rows of the steps of all providers that compute what PEFT does, in turn."""
    verdicts = step_verdicts(case, names or default_steps(case))
    rows = [case.row(name, status=verdict) for name, verdict in verdicts.items() if verdict != "ok"]
    able = [name for name, verdict in verdicts.items() if verdict == "ok"]
    runs = {name: make().step() for name, make in causal_steps(case, able).items()}
    times = interleave(runs, clock_for(case.device), budget_s=4 * budget_s, min_rounds=5)
    return told([*rows, *(timed_row(case.row(name, clock=clock_name(case.device)), times) for name in times)])


def memory_cases(setting: Setting) -> Iterator[Case]:
    """One case per dropout."""
    for p in setting.dropouts:
        yield Case(f"p{p:g}", partial(model_memory, replace(setting.memory, dropout=p, device=setting.device)))


def model_memory(case: CausalCase) -> dict[str, Any]:
    """Peak MiB of a step over what was allocated before, and bytes kept per token; one model at a time."""
    found: dict[str, Any] = {}
    for name, make in causal_steps(case).items():
        run = warmed(make())  # with the states of its optimiser
        peak = peak_bytes(run.run, case.device)
        kept = kept_bytes(run.loss, run.model.parameters())
        found[name] = {
            "peak_mib": None if peak is None else peak / 2**20,
            "kept_bytes_per_token": kept / case.tokens,
        }
        del run
    return found


def graph_cases(setting: Setting) -> Iterator[Case]:
    """Masks first, then a whole step, then times of what is bound by launches without a graph."""
    p, dtype = setting.dropouts[-1], setting.dtypes[0]
    for route in setting.routes:
        layer = setting.layer(setting.shapes[0], setting.timed_tokens[-1], setting.ranks[0], p, dtype)
        yield Case(f"masks {route} {titled(layer)}", partial(replayed_masks, route, layer, setting.capture))
    step = replace(setting.steps[0], dropout=p, device=setting.device)
    yield Case(f"step {step.model} p{p:g}", partial(replayed_step, step, setting.capture, setting.budget_s))
    for tokens, p in by_priority(setting.timed_tokens[::-1], setting.dropouts):
        block = setting.block_of(tokens, p)
        name = f"block M{tokens} p{block.dropout:g}"
        yield Case(name, partial(bench_replays, block, setting.capture, setting.budget_s))


def bench_replays(block: BlockCase, capture: Capture, budget_s: float) -> list[dict[str, Any]]:
    """Rows of the block under replay."""
    return told(time_replays(block, block_providers(block_names(block), block), capture, budget_s))


def sanitizer_cases(setting: Setting) -> Iterator[Case]:
    """Every route under memcheck, then under racecheck."""
    for tool, route in product(("memcheck", "racecheck"), setting.routes):
        yield Case(f"{tool} {route}", partial(sanitize, tool, route, setting.device.type))


def sanitize(tool: str, route: str, device: str) -> dict[str, Any]:
    """A small forward and backward under compute-sanitizer, where there is one; its report is the error."""
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if found is None:
        return {"skipped": "compute-sanitizer is not installed"}
    command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench.sanitized", route, device]
    # A caching allocator hands out parts of large blocks, beyond whose ends nothing looks wrong.
    apart = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=apart, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        return {"skipped": f"{tool} took more than {SANITIZER_SECONDS} s"}
    if done.returncode != 0:
        raise RuntimeError(f"{tool} exit {done.returncode}: {(done.stdout + done.stderr)[-3500:]}")
    return {"report": done.stdout.strip().splitlines()[-1:]}
