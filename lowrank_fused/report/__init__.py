"""From result files to tables, CSV, pictures and one HTML page.

    results = load([Path("bench.json"), Path("bench/results/nvidia-h100/gpu_check.json")])
    write_report(results, Path("report"))

Three kinds of file are read: what `lowrank-fused bench --json` and the commands in bench/ write, pytest-benchmark's
JSON of this repository's `pytest bench`, and the store of the GPU check. A ratio is only ever taken between times of
one file.
"""

from __future__ import annotations

from .load import load
from .results import KernelTime, Results, Source
from .tables import Table, tables
from .write import write_report

__all__ = ["KernelTime", "Results", "Source", "Table", "load", "tables", "write_report"]
