"""The report's tables as plain text cells, for a terminal, a page and Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..benchmark import Row
from .judged import judge, reached
from .results import Results, best_clock, same_case

__all__ = ["Table", "tables"]

TITLES = {"layer": "Layers", "block": "Blocks", "step": "Training steps"}
GPU_FACTS = {
    "compute_capability": "compute capability",
    "memory_gib": "memory [GiB]",
    "multiprocessors": "multiprocessors",
    "driver": "driver",
    "clock_sm_mhz": "SM clock when written [MHz]",
    "clock_sm_max_mhz": "highest SM clock [MHz]",
    "clock_memory_mhz": "memory clock [MHz]",
    "power_limit_w": "power limit [W]",
    "temperature_c": "temperature [°C]",
}
VERSIONS = ("lowrank_fused", "torch", "triton", "peft", "transformers", "python", "torch_cuda")


@dataclass(frozen=True)
class Table:
    """A title, a header, rows of cells, and what must be known to read it."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def tables(results: Results) -> list[Table]:
    """All tables that these results fill, machine first; goal lines also where nothing fills them."""
    found = [_machine(results)]
    by_what: dict[str, list[Row]] = {}
    for row in results.measured:
        by_what.setdefault(row.what, []).append(row)
    found += [_rows(results, TITLES.get(what, what), rows) for what, rows in by_what.items()]
    found += [_goal_lines(results), _kernels(results), _gemms(results), _own_goals(results), _problems(results)]
    return [table for table in found if table.rows]


def _machine(results: Results) -> Table:
    """What was measured on, with what, when."""
    rows = [("device", results.device)]
    for source in results.sources:
        facts = source.environment
        rows += [
            ("file", f"{source.path} ({source.kind})"),
            ("commit, time", f"{source.commit}, {source.time or 'time unknown'}"),
            ("versions", ", ".join(f"{name} {facts[name]}" for name in VERSIONS if facts.get(name))),
        ]
        for gpu in facts.get("gpus", []):
            if gpu["name"] == results.device:
                rows += [(name, str(gpu[key])) for key, name in GPU_FACTS.items() if gpu.get(key) is not None]
        if source.command:
            rows.append(("command", source.command))
    if results.ceilings:
        copy, gemm = results.ceilings.get("copy_gb_per_s"), results.ceilings.get("gemm_tflops")
        rows.append(("measured ceilings", ", ".join(
            text for text in (copy and f"copy {copy:,.0f} GB/s", gemm and f"bf16 GEMM {gemm:,.0f} TFLOP/s",
                              copy and gemm and f"{1e3 * gemm / copy:.0f} FLOP per byte") if text
        )))  # fmt: skip
    if results.gpu is not None:
        gpu = results.gpu
        rows.append(
            (
                "rates for limits",
                f"{gpu.peak * 1e-12:g} TFLOP/s, {gpu.bandwidth * 1e-12:g} TB/s (expected of {gpu.name})",
            )
        )
    return Table("Measured on", ("what", "found"), list(dict.fromkeys(rows)))


def layer_title(row: Row) -> str:
    """Label and sizes."""
    shape = f"{row.in_features} -> {row.out_features}"
    return shape if row.label in ("", shape.replace(" -> ", "x")) else f"{row.label}, {shape}"


def case_title(row: Row) -> str:
    """One line for a person."""
    return f"{layer_title(row)}, {row.tokens} tokens, rank {row.rank}, dropout {row.dropout:g}, {row.dtype}"


def _rows(results: Results, title: str, rows: Sequence[Row]) -> Table:
    """A line for every provider in every case, mode and clock."""
    limits = any(results.limit_ms(row) is not None for row in rows)
    peaks = any(row.peak_mib is not None for row in rows)
    header = ["case", "mode", "clock", "provider", "ms", "20 to 80 %", "over eager", "20 to 80 %", "over frozen"]
    header += ["of the limit"] * limits + ["kept B/token"] + ["peak MiB"] * peaks
    lines, last = [], None
    for case, of_case in same_case(rows).items():
        for row in of_case:
            cells = [
                "" if case == last else case_title(row),
                row.mode,
                row.clock or "",
                row.provider + (f" ({row.routes})" if row.routes else ""),
                _number(row.ms_p50, ".3f"),
                _range(row.ms_p20, row.ms_p80, ".3f"),
                _number(row.speedup, ".2f", "x"),
                _range(row.speedup_p20, row.speedup_p80, ".2f"),
                _number(row.overhead, ".2f", "x"),
            ]
            share = results.share_of_limit(row)
            cells += [_number(None if share is None else 100 * share, ".0f", " %")] * limits
            cells += [_number(row.kept_bytes_per_token, ",.0f")] + [_number(row.peak_mib, ",.0f")] * peaks
            lines.append(tuple(cells))
            last = case
    note = (
        "Medians. Over eager: PEFT's time over this one, above 1 is faster; over frozen: this time over that of the "
        "frozen linears alone, the price of an adapter."
    )
    if limits:
        note += " Of the limit: the least time that arithmetic and traffic allow at this GPU's rates, over this one."
    return Table(title, tuple(header), lines, note)


def _goal_lines(results: Results) -> Table:
    """Must, aim, stretch and ceiling beside what was measured."""
    judgements = judge(results)
    rows = []
    for j in judgements:
        lines = j.goal.lines(j.dropout > 0)
        rows.append(
            (
                j.against,
                j.goal.scope,
                str(j.tokens),
                f"{j.dropout:g}",
                *(_number(lines.get(name), "g", "x") for name in ("must", "aim", "stretch", "ceiling")),
                j.standing if j.measured is None else f"{j.measured:.3f}x ({j.provider})",
                "" if j.measured is None else j.standing,
            )
        )
    header = ("against", "linears", "tokens", "dropout", "must", "aim", "stretch", "ceiling", "measured", "reaches")
    note = (
        "bf16, rank 16, forward plus backward. Against frozen: our time over the frozen linears', lower is better; "
        "against others: speed-up. Lines were set beforehand from a traffic model of the GPU; "
        + reached(judgements)
        + "."
    )
    return Table("Goal lines", header, rows, note)


def _kernels(results: Results) -> Table:
    """Every launch with its bandwidth and arithmetic."""
    copy = results.ceilings.get("copy_gb_per_s")
    rows, last = [], ""
    for k in results.kernels:
        rows.append(
            (
                "" if k.layer == last else k.layer,
                k.route,
                k.kernel,
                f"{k.us:.1f}",
                f"{k.gb_per_s:,.0f}",
                f"{100 * k.gb_per_s / copy:.0f} %" if copy else "",
                f"{k.tflops:.1f}",
            )
        )
        last = k.layer
    header = ("layer", "route", "kernel", "µs", "GB/s", "of a copy", "TFLOP/s")
    note = "Bytes and FLOPs are those that each launch declares: every operand once, no re-reads."
    return Table("Kernels", header, rows, note)


def _gemms(results: Results) -> Table:
    """e and the price of beta = 1: what decides between the routes `split` and `thin`."""
    rows: list[tuple[str, ...]] = [
        (
            found["layer"],
            *(_number(found.get(f"e_{way}"), ".3f") for way in ("forward", "backward")),
            *(
                _number(None if found.get(key) is None else 100 * found[key], "+.1f", " %")
                for key in ("beta1_cost_forward", "beta1_cost_backward")
            ),
        )
        for found in results.gemms
    ]
    header = ("layer", "e forward", "e backward", "beta = 1 costs, forward", "backward")
    note = "e: the library's GEMM time over that of Triton's GEMM with the low-rank term in its accumulator."
    return Table("Main GEMMs", header, rows, note)


def _own_goals(results: Results) -> Table:
    """Lines that a command of bench/ held itself to when it ran."""
    rows = []
    for goal in results.goals:
        spread, unit = goal.get("spread"), goal.get("unit", "x")
        digits = ".2f" if unit == "x" else ",.1f"
        rows.append(
            (
                goal["what"],
                f"{goal['value']:{digits}} {unit}",
                _range(spread[0], spread[1], digits) if spread else "",
                f"{'at least' if goal.get('at_least', True) else 'at most'} {goal['bound']:{digits}} {unit}",
                "met" if goal.get("met") else "MISSED",
            )
        )
    return Table("Goals of the run itself", ("what", "measured", "20 to 80 %", "goal", ""), rows)


def _problems(results: Results) -> Table:
    """What has no number, and why."""
    rows = [(f"{case_title(row)}, {row.mode}", row.provider, row.status) for row in results.rows if row.status != "ok"]
    return Table("Without a number", ("what", "provider", "why"), [*rows, *(("", "", p) for p in results.problems)])


def shown(results: Results) -> dict[tuple[object, ...], list[Row]]:
    """What the pictures show: forward plus backward where it was measured, of each case the rows of its best clock."""
    both = [row for row in results.measured if row.mode == "both"] or results.measured
    return {case: best_clock(rows) for case, rows in same_case(both).items()}


def _number(value: float | None, digits: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{digits}}{unit}"


def _range(low: float | None, high: float | None, digits: str) -> str:
    return "" if low is None or high is None else f"{low:{digits}} to {high:{digits}}"
