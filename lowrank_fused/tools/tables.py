"""What the command line prints: facts, methods, counts and measurements as tables that a person reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

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
    if diagnosis.auto:
        console.print(
            f"route auto, 8192 tokens through 4096 x 4096 in bf16: {diagnosis.auto['forward']} forward, "
            f"{diagnosis.auto['backward']} backward"
        )
    for found in diagnosis.tables:
        rows = f"{found.measured} rows measured, {found.model} of the model, which decide nothing"
        state = f"not used: {found.unused}" if found.unused else rows
        console.print(f"tuned table {found.path}: {state}", markup=False, highlight=False, soft_wrap=True)
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


# The columns of `show_binaries`, and which stand above one another where a console is too narrow for all.
_COLUMNS = [
    ("kernel", "tile"), ("operands",), ("regs", "spills"), ("shared", "tmem"), ("/ SM", "in flight"),
    ("tensor cores",), ("TMA", "cp.async"), ("instr", "a mask"),
]  # fmt: skip
_WIDE = 150


def show_binaries(reports: Sequence[CodeReport], arch: int, console: Console) -> None:
    """What the compiler made of each launch, what its low-rank term costs, and what is wrong with it.

    A narrow console has no room for the operands that tell binaries of one tile apart.
    """
    from .codegen import violations

    wide = console.width >= _WIDE
    cells = [(name,) for names in _COLUMNS for name in names] if wide else [c for c in _COLUMNS if c != ("operands",)]
    table = _dense_table(f"sm_{arch}: {len(reports)} binaries", ["\n".join(names) for names in cells])
    for r, operands in zip(reports, _operands_of(reports), strict=True):
        values = {
            "kernel": f"{r.kernel} {r.dtype}",
            "tile": _tile(r) if wide else f"  {_tile(r)}",
            "operands": operands,
            "regs": str(r.registers),
            "spills": str(r.stack_bytes),
            "shared": _kib(r.shared_bytes),
            "tmem": str(r.tmem_columns or ""),
            "/ SM": str(r.programs_per_sm),
            "in flight": _kib(r.bytes_in_flight * r.programs_per_sm),
            "tensor cores": f"{r.tensor_core} {r.tensor_core_count}" if r.tensor_core else "",
            "TMA": str(r.tma_loads or ""),
            "cp.async": str(r.async_copies or ""),
            "instr": str(r.instructions),
            "a mask": "" if r.mask_instructions is None else f"{r.mask_instructions:.1f}",
        }
        style = "red" if violations(r) else None
        table.add_row(*("\n".join(values[name] for name in names) for names in cells), style=style)
    console.print(table, markup=False)
    console.print(
        "regs: a thread's; spills in bytes, tmem in columns; / SM: programs that a multiprocessor has room for; "
        "in flight: the most that asynchronous loads of all these have on their way; TMA, cp.async, instr: "
        "instructions in the binary; a mask: instructions of a thread for one element of the tile",
        style="dim",
    )
    _show_low_rank(reports, console)
    for r in reports:
        for fault in violations(r):
            console.print(f"{r.kernel} {_tile(r)} {r.dtype} ({', '.join(r.flags)}): {fault}", style="red", markup=False)


def _show_low_rank(reports: Sequence[CodeReport], console: Console) -> None:
    """Registers and shared memory of forward products beside those of the same without a low-rank term."""
    compared = [r for r in reports if r.low_rank_registers is not None and r.low_rank_shared_bytes is not None]
    if not compared:
        return
    wide = console.width >= _WIDE
    names = ["kernel", "tile", *(["operands"] if wide else []), "regs", "than\nplain", "shared", "than\nplain"]
    table = _dense_table("Forward products beside the same without a low-rank term", names)
    for r, operands in zip(compared, _operands_of(compared), strict=True):
        registers, shared = f"{r.low_rank_registers:+}", f"{(r.low_rank_shared_bytes or 0) / 1024:+.0f}K"
        told = [f"{r.kernel} {r.dtype}", _tile(r), *([operands] if wide else [])]
        table.add_row(*told, str(r.registers), registers, _kib(r.shared_bytes), shared)
    console.print(table, markup=False)


def _dense_table(title: str, names: Sequence[str]) -> Table:
    """An empty table of some words and then numbers, with as little space between columns as can be read."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    words = ("kernel", "tile", "operands")
    for name in names:
        justify: Literal["left", "right"] = "left" if name.startswith(words) else "right"
        table.add_column(name, no_wrap=name != "operands", justify=justify)
    return table


def _operands_of(reports: Sequence[CodeReport]) -> list[str]:
    """For each binary the operands that not all of its kernel have, and what else tells it from those of its dtype."""
    optional: dict[str, set[str]] = {}
    common: dict[tuple[str, str], set[str]] = {}
    for r in reports:
        optional.setdefault(r.kernel, set()).update(flag[3:] for flag in r.flags if flag.startswith("no "))
        common[r.kernel, r.dtype] = common.get((r.kernel, r.dtype), set(r.flags)) & set(r.flags)
    texts = []
    for r in reports:
        follows = ("no ", "rank_multiple ")  # from what is mentioned
        special = [f for f in r.flags if not f.startswith(follows) and f not in common[r.kernel, r.dtype]]
        mentioned = {flag.split()[0] for flag in special} | {flag[3:] for flag in r.flags if flag.startswith("no ")}
        texts.append(", ".join([*sorted(optional[r.kernel] - mentioned), *special]))
    return texts


def _tile(report: CodeReport) -> str:
    t = report.tile
    return f"{t.block_m}x{t.block_n}x{t.block_k} r{t.block_r} w{t.num_warps} s{t.num_stages}"


def _kib(size: int) -> str:
    return f"{size / 1024:.{0 if size >= 1024 else 1}f}K" if size else "0"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are aligned to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
