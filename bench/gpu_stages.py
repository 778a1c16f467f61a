"""What a GPU is asked, in order of priority: tests, correctness, times of kernels, layers, models; memory."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from bench.model_step import CausalCase, causal_steps
from bench.stages import ROOT, Case, PartlyFailed, Stage
from lowrank_fused.benchmark import (
    Case as LayerCase,
)
from lowrank_fused.benchmark import (
    Operands,
    Provider,
    Spread,
    Step,
    check,
    clock_for,
    default_names,
    dtype_name,
    interleave,
    kept_bytes,
    measure,
    paired_ratio,
    peak_bytes,
    providers_for,
)

__all__ = ["Setting", "stages"]

# Each keyword of the kernel tests is a case of its own: a hanging kernel costs one of them, not all.
KERNEL_TESTS = (
    "shrink",
    "expand",
    "factors",
    "lowrank_forward",
    "grad_input",
    "linear",
    "test_add",
    "gather",
    "stacked",
    "weight_factor",
    "as_accurate_as_its_reference",
)
PYTEST_SECONDS = 200
GEMMS = {"forward": "lowrank_forward", "backward": "grad_input"}  # names of Triton's, with or without TMA
OTHERS = ("frozen", "eager", "eager-fp32", "compile")  # providers whose failure is not ours


def _llama(**more: Any) -> CausalCase:
    """Two layers of Llama-3-8B with a small vocabulary, all linears adapted, bf16."""
    settings = {"num_hidden_layers": 2, "vocab_size": 32000}
    return CausalCase("llama-3-8b", settings=tuple(settings.items()), **more)


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
    routes: tuple[str, ...] = ("split", "thin")
    timed_tokens: tuple[int, ...] = (8192, 1024)
    timed_ranks: tuple[int, ...] = (16, 64)
    step: CausalCase = field(default_factory=lambda: _llama(batch=2, length=2048))
    memory: CausalCase = field(default_factory=lambda: _llama(batch=4, length=2048))
    budget_s: float = 2.0

    def layer(self, shape: tuple[int, int], tokens: int, rank: int, p: float, dtype: torch.dtype) -> LayerCase:
        """A layer on this device."""
        return LayerCase(*shape, tokens, rank, p, dtype, self.device, label=f"{shape[0]}x{shape[1]}")


def stages(setting: Setting) -> list[Stage]:
    """All stages, most important first."""
    tests = [Case(keyword, partial(run_tests, keyword)) for keyword in KERNEL_TESTS]
    correct, kernels = list(correctness_cases(setting)), list(kernel_cases(setting))
    layers, models, memory = (
        list(layer_cases(setting)),
        list(model_cases(setting)),
        list(memory_cases(setting)),
    )
    return [
        Stage("tests", "kernel tests on this device", tests, case_seconds=PYTEST_SECONDS + 20),
        Stage("correct", "y and gradients at real sizes against float64", correct),
        Stage("kernels", "kernels against library GEMMs and memory bandwidth", kernels),
        Stage("layers", "a layer against eager PEFT, torch.compile, the frozen linear", layers, case_seconds=150),
        Stage("model", "a training step of two Llama-shaped layers", models),
        Stage("memory", "peak memory and bytes kept of that step", memory),
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


def ceilings(device: torch.device, budget_s: float) -> dict[str, float]:
    """What the memory does at best here: GB/s of a large copy, bytes read plus bytes written."""
    size = 1 << (30 if device.type == "cuda" else 22)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": Step(lambda _: target.copy_(source))}, clock_for(device), budget_s=budget_s)
    return {"copy_gb_per_s": 2 * size / Spread.of(times["copy"]).p20 * 1e-6}


def time_kernels(layer: LayerCase, routes: Sequence[str], budget_s: float, min_rounds: int = 5) -> dict[str, Any]:
    """Microseconds, GB/s and TFLOP/s of every launch; e and the cost of beta = 1 from the same interleaved
    run.

    e is the library's GEMM time over that of Triton's GEMM with the low-rank term in its accumulator: 1 means
    that the term came for free.
    """
    launches = {f"{route}:{way}": found for route in routes for way, found in recorded(route, layer).items()}
    steps = library_gemms(layer)
    for key, found in launches.items():
        for index, launch in enumerate(found):
            steps[f"{key}:{index}:{launch.name}"] = Step(lambda _, launch=launch: launch.run())
    times = interleave(steps, clock_for(layer.device), budget_s=budget_s, min_rounds=min_rounds)
    result: dict[str, Any] = {"library_us": {k: 1e3 * Spread.of(times[k]).p50 for k in library_gemms_names()}}
    for way in ("forward", "backward"):
        result[f"beta1_cost_{way}"] = paired_ratio(times[f"addmm:{way}"], times[f"mm:{way}"]).p50 - 1
    result["launches"] = [
        described(key, index, launch, Spread.of(times[f"{key}:{index}:{launch.name}"]).p50)
        for key, found in launches.items()
        for index, launch in enumerate(found)
    ]
    for way, gemm in GEMMS.items():
        for key in steps:
            if key.startswith(f"split:{way}:") and key.rpartition(":")[2].startswith(gemm):
                result[f"e_{way}"] = paired_ratio(times[f"mm:{way}"], times[key]).p50
    return result


def recorded(route: str, layer: LayerCase) -> dict[str, list[Any]]:
    """The launches that one forward and one backward make, arguments and all, ready to be run again."""
    from lowrank_fused.kernels.launch import record

    provider = providers_for([route], layer)[0]
    o = provider.operands(layer)
    with record() as forward:
        y = provider(o, layer.dropout)
    # Launches are recorded in the thread that asks for it; autograd would use one of its own on a GPU.
    with torch.autograd.set_multithreading_enabled(False), record() as backward:
        torch.autograd.grad(y, provider.leaves(o), o.dy)
    if route in ("thin", "split") and not (forward and backward):
        raise RuntimeError(f"route {route} made launches that were not recorded: {forward=}, {backward=}")
    return {"forward": forward, "backward": backward}


def library_gemms_names() -> tuple[str, ...]:
    """x Wᵀ and dy W, written anew or added to what is there."""
    return ("mm:forward", "addmm:forward", "mm:backward", "addmm:backward")


def library_gemms(layer: LayerCase) -> dict[str, Step]:
    """The frozen GEMMs of the layer by the library, with beta = 0 and beta = 1."""
    o = Operands.random(layer)
    x, w, dy = o.x.detach(), o.weight, o.dy
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    return {
        "mm:forward": Step(lambda _: torch.mm(x, w.t(), out=y)),
        "addmm:forward": Step(lambda _: y.addmm_(x, w.t())),
        "mm:backward": Step(lambda _: torch.mm(dy, w, out=dx)),
        "addmm:backward": Step(lambda _: dx.addmm_(dy, w)),
    }


def described(key: str, index: int, launch: Any, ms: float) -> dict[str, Any]:
    """One launch as a row: what it is, its tile, its time, and what its declared bytes and FLOPs come to."""
    moved = launch.bytes_read + launch.bytes_written
    return {
        "route": key,
        "index": index,
        "kernel": launch.name,
        "tile": asdict(launch.tile),
        "us": 1e3 * ms,
        "gb_per_s": moved / ms * 1e-6,
        "tflops": launch.flops / ms * 1e-9,
    }


def layer_cases(setting: Setting) -> Iterator[Case]:
    """Rows of the benchmark; torch.compile comes last, its compile time would keep the others waiting."""
    axes = (setting.timed_tokens, setting.dropouts, setting.shapes)
    points = [
        (setting.layer(shape, tokens, setting.ranks[0], p, setting.dtypes[0]), f"M{tokens} p{p:g}")
        for tokens, p, shape in by_priority(*axes)
    ]
    for layer, size in points:
        yield Case(f"{layer.label} {size}", partial(bench_layer, layer, None, setting.budget_s))
    for layer, size in points[: len(setting.shapes) * len(setting.dropouts)]:
        names = ("frozen", "eager", "compile", "auto")
        yield Case(f"compile {layer.label} {size}", partial(bench_layer, layer, names, setting.budget_s))


def bench_layer(layer: LayerCase, names: Sequence[str] | None, budget_s: float) -> list[dict[str, Any]]:
    """Rows for forward and for forward plus backward; a route of ours without a number is a failure."""
    providers: list[Provider] = providers_for(names or default_names(layer), layer)
    rows = measure(layer, providers, ("both", "forward"), budget_s=budget_s)
    result = [asdict(row) for row in rows]
    faults = {row.provider: row.status for row in rows if row.status != "ok" and row.provider not in OTHERS}
    if faults:
        raise PartlyFailed(f"no numbers for {faults}", result)
    return result


def model_cases(setting: Setting) -> Iterator[Case]:
    """One case per dropout."""
    for p in setting.dropouts:
        yield Case(
            f"p{p:g}",
            partial(time_model, replace(setting.step, dropout=p, device=setting.device), setting.budget_s),
        )


def time_model(case: CausalCase, budget_s: float) -> dict[str, Any]:
    """Milliseconds of PEFT's step and ours in turn, and their ratio."""
    runs = {name: make() for name, make in causal_steps(case).items()}
    first_loss = {name: run.run().item() for name, run in runs.items()}
    steps = {name: run.step() for name, run in runs.items()}
    times = interleave(steps, clock_for(case.device), budget_s=4 * budget_s, min_rounds=5)
    return {
        "first_loss": first_loss,
        "tokens": case.batch * case.length,
        "ms": {name: asdict(Spread.of(values)) for name, values in times.items()},
        "speedup": asdict(paired_ratio(times["peft"], times["ours"])),
    }


def memory_cases(setting: Setting) -> Iterator[Case]:
    """One case per dropout."""
    for p in setting.dropouts:
        yield Case(f"p{p:g}", partial(model_memory, replace(setting.memory, dropout=p, device=setting.device)))


def model_memory(case: CausalCase) -> dict[str, Any]:
    """Peak MiB of a step over what was allocated before, and bytes kept per token; one model at a time."""
    found: dict[str, Any] = {}
    for name, make in causal_steps(case).items():
        run = make()
        run.run()  # optimiser states exist from here on
        peak = peak_bytes(run.run, case.device)
        kept = kept_bytes(run.loss, run.model.parameters())
        found[name] = {
            "peak_mib": None if peak is None else peak / 2**20,
            "kept_bytes_per_token": kept / (case.batch * case.length),
        }
        del run
    return found
