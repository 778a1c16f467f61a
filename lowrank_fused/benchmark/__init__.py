"""Measuring a linear layer with a low-rank term: correct first, then interleaved, then told as a ratio.

    case = Case(in_features=1024, out_features=4096, tokens=2048, rank=16)
    rows = measure(case, providers_for(["frozen", "eager", "addmm"], case))

A provider that fails the accuracy rule of `lowrank_fused.testing` gets no number.
"""

from __future__ import annotations

from .accuracy import check
from .case import DTYPES, Case, Operands, dtype_name, parse_dtype
from .measure import MODES, measure
from .memory import kept_bytes, peak_bytes
from .providers import PROVIDERS, Provider, default_names, providers_for
from .record import Row, document, write_csv, write_json
from .timing import Spread, Step, clock_for, clock_name, interleave, paired_ratio

__all__ = [
    "DTYPES",
    "MODES",
    "PROVIDERS",
    "Case",
    "Operands",
    "Provider",
    "Row",
    "Spread",
    "Step",
    "check",
    "clock_for",
    "clock_name",
    "default_names",
    "document",
    "dtype_name",
    "interleave",
    "kept_bytes",
    "measure",
    "paired_ratio",
    "parse_dtype",
    "peak_bytes",
    "providers_for",
    "write_csv",
    "write_json",
]
