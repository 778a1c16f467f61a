"""README's table of what was measured on GPUs, from bench/results: `python -m bench.readme` (`--check` only looks).

Between its two marks the README says what the stores of the GPU check hold, GPU by GPU, and that nothing was measured
where there is none. Exit status: 0, or 1 when `--check` finds another text there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.stages import ROOT
from lowrank_fused.benchmark import Row
from lowrank_fused.report import Results, load
from lowrank_fused.report.results import OURS, best_clock, same_case
from lowrank_fused.tools.tables import markdown_table

__all__ = ["main", "measured_text", "updated"]

RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- measured on GPUs: written by python -m bench.readme -->", "<!-- end of what was measured -->"
NOTHING = (
    "On a GPU: not measured yet. **No GPU number is given here, because nothing in this repository has been run on a "
    "GPU yet.**"
)
ORDER = ("block", "layer", "step")


def measured_text(folder: Path) -> str:
    """What stands between the marks, from every gpu_check.json below `folder` that holds times of a GPU."""
    parts = []
    for path in sorted(folder.glob("*/gpu_check.json")):
        try:
            results = load([path])
        except ValueError:  # a check that has measured nothing yet
            continue
        if results.on_gpu and (rows := table_rows(results)):
            parts.append(section(results, rows))
    return "\n".join(parts) or NOTHING + "\n"


def section(results: Results, rows: list[tuple[str, ...]]) -> str:
    """One GPU: what it is, with what, and its table."""
    source = results.sources[0]
    facts = source.environment
    gpu = next(gpu for gpu in facts["gpus"] if gpu["name"] == results.device)
    clock = f", SM clock {gpu['clock_sm_mhz']} of {gpu['clock_sm_max_mhz']} MHz" if gpu.get("clock_sm_mhz") else ""
    header = ("forward + backward", "over PEFT", "over frozen", "over PEFT, dropout 0.1", "over frozen")
    return (
        f"{results.device}{clock}; torch {facts.get('torch')}, Triton {facts.get('triton')}; commit {source.commit}, "
        f"{source.time}. Speed-up over eager PEFT with adapters of the same dtype, and time over that of the frozen "
        f"model:\n\n{markdown_table(header, rows)}"
    )


def table_rows(results: Results) -> list[tuple[str, ...]]:
    """A line for every block, layer and step at its largest number of tokens: ours, without dropout and with 0.1."""
    found: dict[tuple[str, str], dict[float, Row]] = {}
    for rows in same_case(row for row in results.measured if row.mode == "both").values():
        times = {row.provider: row for row in best_clock(rows)}
        for row in (times[name] for name in OURS if name in times):
            same = found.setdefault((row.what, f"{title(row)}, {row.provider}"), {})
            if row.dropout not in same or row.tokens > same[row.dropout].tokens:
                same[row.dropout] = row
            break
    lines = []
    for (_, name), by_dropout in sorted(found.items(), key=lambda item: ORDER.index(item[0][0])):
        pair = [by_dropout.get(p) for p in (0.0, 0.1)]
        if any(row is not None and row.speedup for row in pair):
            largest = max(row.tokens for row in pair if row is not None)
            ratios = [ratio for row in pair for ratio in (row and row.speedup, row and row.overhead)]
            lines.append((f"{name}, {largest} tokens", *("" if not r else f"{r:.2f}x" for r in ratios)))
    return lines


def title(row: Row) -> str:
    """Which linear, block or model."""
    shape = f"{row.in_features} -> {row.out_features}"
    what = row.label if row.what == "step" else f"{row.what} {shape}"
    return f"{what}, rank {row.rank}, {row.dtype}"


def updated(text: str, measured: str) -> str:
    """The README with this text between its marks. Raises ValueError unless it has both, once."""
    between = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(between.findall(text)) != 1:
        raise ValueError(f"the README must have the marks {BEGIN!r} and {END!r} once")
    return between.sub(lambda _: f"{BEGIN}\n{measured}{END}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the README anew, or say whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    given = parser.parse_args(arguments)
    before = given.readme.read_text(encoding="utf-8")
    after = updated(before, measured_text(given.results))
    if given.check:
        if after != before:
            print(f"{given.readme} is out of date: run python -m bench.readme", file=sys.stderr)
        return int(after != before)
    given.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
