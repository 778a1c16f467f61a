"""What the command line prints: facts, methods, counts and measurements as tables that a person reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from ..benchmark import Case, Row
from .doctor import Diagnosis
from .footprint import MethodFacts, ModelCount

if TYPE_CHECKING:
    from .codegen import CodeReport  # which imports Triton

__all__ = ["markdown_table", "show_binaries", "show_counts", "show_diagnosis", "show_methods", "show_rows"]

_GPU_UNITS = {
    "memory_gib": "GiB",
    "clock_sm_mhz": "MHz",
    "clock_sm_max_mhz": "MHz",
    "clock_memory_mhz": "MHz",
}


def show_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Machine and versions, routes with their reasons, problems and notes."""
    facts = Table("what", "found", title="Machine and versions", title_justify="left")
    for name, value in diagnosis.environment.items():
        if name == "gpus":
            continue
        facts.add_row(name, _text(value))
    for index, gpu in enumerate(diagnosis.environment["gpus"]):
        for name, value in gpu.items():
            facts.add_row(f"gpu {index}: {name}", f"{_text(value)} {_GPU_UNITS.get(name, '')}".strip())
    if not diagnosis.environment["gpus"]:
        facts.add_row("gpu", "none that torch can use")
    console.print(facts)
    routes = Table(
        "route",
        "available",
        "why not, or its check",
        title=f"Routes on {diagnosis.device}",
        title_justify="left",
    )
    for route in diagnosis.routes:
        check = {None: "not checked", "ok": "as accurate as PyTorch on a small layer"}.get(route.check, route.check)
        routes.add_row(route.name, "yes" if route.available else "no", route.reason or check)
    console.print(routes)
    console.print(
        f"route auto, 8192 tokens through 4096 x 4096 in bf16: {diagnosis.auto['forward']} forward, "
        f"{diagnosis.auto['backward']} backward"
    )
    for problem in diagnosis.problems:
        console.print(f"problem: {problem}", style="red", markup=False)
    for note in diagnosis.notes:
        console.print(f"note: {note}", markup=False)
    console.print("lowrank_fused works here" if diagnosis.works else "lowrank_fused does not work here", style="bold")


def _text(value: object) -> str:
    if value is None:
        return "none"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def show_methods(methods: Iterable[MethodFacts], console: Console) -> None:
    """The registry as a table."""
    table = Table(
        "method",
        "formula",
        "trained",
        "kept, bytes a token",
        "with dropout",
        "options",
        title="Methods",
        title_justify="left",
    )
    for method in methods:
        trained = "\n".join(f"{name} {shape}" for name, shape in method.trained.items())
        options = "\n".join(f"{name}={value!r}" for name, value in method.options.items())
        table.add_row(method.name, method.formula, trained, str(method.kept), str(method.kept_with_dropout), options)
    console.print(table, markup=False)
    console.print(
        "kept: for backward, in a 16-bit layer with `in` input features and rank r, measured on a small layer"
    )


def show_counts(counts: Sequence[ModelCount], console: Console) -> None:
    """Trained parameters of methods in a model."""
    title = f"{counts[0].model}, targets {counts[0].targets}"
    table = Table("method", "rank", "layers", "trained", "of the model", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for count in counts:
        share = f"{100 * count.trainable / count.base:.5f} %"
        table.add_row(count.method, str(count.rank), str(count.layers), f"{count.trainable:,}", share)
    console.print(table)


def show_rows(case: Case, rows: Sequence[Row], console: Console) -> None:
    """The rows of one case: time, speed-up over PEFT, price over the frozen layer, bytes kept, peak memory."""
    on_gpu = case.device.type == "cuda"
    header = ["provider", "mode", "ms", "p20 - p80", "speed-up", "/ frozen", "B/token"]
    table = Table(*header, *(["MiB"] if on_gpu else []), title=case.title(), title_justify="left")
    table.box, table.pad_edge, table.collapse_padding = box.SIMPLE_HEAD, False, True  # fits into 80 columns
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        if row.status != "ok":
            table.add_row(row.provider, row.mode, "no number", style="red")
            continue
        cells = [
            row.provider,
            row.mode,
            f"{row.ms_p50:.3f}",
            f"{row.ms_p20:.3f} - {row.ms_p80:.3f}",
            _ratio(row.speedup),
            _ratio(row.overhead),
            "" if row.kept_bytes_per_token is None else f"{row.kept_bytes_per_token:,.0f}",
        ]
        table.add_row(*cells, *(["" if row.peak_mib is None else f"{row.peak_mib:,.0f}"] if on_gpu else []))
    console.print(table)
    for provider, routes in {row.provider: row.routes for row in rows if row.routes}.items():
        console.print(f"{provider}: {routes} (forward / backward)", markup=False)
    for row in rows:
        if row.status != "ok":
            console.print(f"{row.provider}, {row.mode}: {row.status}", style="red", markup=False)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def show_binaries(reports: Sequence[CodeReport], arch: int, console: Console) -> None:
    """What the compiler made of each launch, and what is wrong with it."""
    from .codegen import violations

    title = f"sm_{arch}: {len(reports)} binaries"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("kernel", "tile", "dtype"):
        table.add_column(name, no_wrap=True)
    table.add_column("flags", max_width=48)
    numbers = ("regs", "spilled", "shared", "tmem", "a SM", "tensor cores", "TMA", "async", "instr", "mask/elem")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for r in reports:
        t, wrong = r.tile, violations(r)
        tile = f"{t.block_m}x{t.block_n}x{t.block_k} r{t.block_r} w{t.num_warps} s{t.num_stages}"
        table.add_row(
            r.kernel, tile, r.dtype, r.flags, str(r.registers), str(r.stack_bytes), f"{r.shared_bytes / 1024:.0f}K",
            str(r.tmem_columns), str(r.programs_per_sm), f"{r.tensor_core} {r.tensor_core_count or ''}".strip(),
            str(r.tma_loads), str(r.async_copies), str(r.instructions),
            "" if r.mask_instructions is None else f"{r.mask_instructions:.1f}",
            "; ".join(wrong) or "ok", style="red" if wrong else None,
        )  # fmt: skip
    console.print(table, markup=False)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are aligned to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
