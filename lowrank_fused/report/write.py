"""Writes a report's folder: report.html, the pictures, rows.csv and kernels.csv."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path

from ..benchmark import write_csv
from . import pictures
from .page import page
from .results import Results
from .tables import tables

__all__ = ["write_report"]

PICTURES = {
    "speedup": ("Speed-up", "Over eager PEFT with adapters of the same dtype; longer is better."),
    "overhead": ("Overhead", "Time over that of the frozen linears alone; 1 would be an adapter for nothing."),
    "roofline": ("Roofline", "Achieved arithmetic over arithmetic intensity; on the slope bandwidth is the limit."),
}


def write_report(results: Results, out: Path) -> list[Path]:
    """Write everything these results fill into the folder; the paths written. Raises ValueError if that fails."""
    drawn = {name: getattr(pictures, name)(results) for name in PICTURES}
    shown = {PICTURES[name][0]: (PICTURES[name][1], png) for name, png in drawn.items() if png is not None}
    missing = [name for name, png in drawn.items() if png is None]
    introduction = (
        "Every provider was held to an accuracy rule before it was timed; what failed it has no number. Ratios are "
        "taken between times of one file and one clock."
    )
    if missing:
        introduction += f" Nothing here fills the picture{'s' * (len(missing) > 1)} {' and '.join(missing)}."
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = [out / "report.html"]
        title = f"lowrank_fused on {results.device}"
        written[0].write_text(page(title, introduction, tables(results), shown), encoding="utf-8")
        for name, png in drawn.items():
            if png is not None:
                written.append(out / f"{name}.png")
                written[-1].write_bytes(png)
        return [*written, *_write_numbers(results, out)]
    except OSError as error:
        raise ValueError(f"the report could not be written: {error}") from error


def _write_numbers(results: Results, out: Path) -> list[Path]:
    written = []
    if results.rows:
        written.append(out / "rows.csv")
        write_csv(written[-1], results.rows)
    if results.kernels:
        written.append(out / "kernels.csv")
        with written[-1].open("w", newline="", encoding="utf-8") as file:
            lines = [asdict(k) | {"gb_per_s": k.gb_per_s, "tflops": k.tflops} for k in results.kernels]
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    return written
