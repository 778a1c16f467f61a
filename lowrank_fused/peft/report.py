"""What `accelerate` did to a model: a table that a person reads, and the same as JSON."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import asdict, dataclass

__all__ = ["Report", "Row"]


@dataclass(frozen=True)
class Row:
    """Layers that are alike: their PEFT class, adapter and method, how many, which path they take and why.

    path: "fused" (base product and adapter in one), "tail" (the base layer is called as it is, the adapter fused
    behind it) or "original" (PEFT's forward). calls: how often that path was taken, None in the report of
    `accelerate`, which says what calls would do.
    """

    layer: str
    adapter: str
    method: str
    count: int
    path: str
    reason: str = ""
    calls: int | None = None


@dataclass(frozen=True)
class Report:
    """`rows`, what they were found with, and `notes` in words; `print(report)` shows a table."""

    rows: tuple[Row, ...]
    versions: dict[str, str]
    device: str
    route: str
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """Adapters in layers, each counted once."""
        return sum(row.count for row in self.rows)

    def of_path(self, path: str) -> int:
        """How many take that path."""
        return sum(row.count for row in self.rows if row.path == path)

    def summary(self) -> str:
        """One line for a log: of adapter layers, or of calls where these were counted."""
        if not self.rows:
            return self.notes[0] if self.notes else "no adapters in the PEFT layers"
        called = any(row.calls is not None for row in self.rows)
        counts = Counter[str]()
        for row in self.rows:
            counts[row.path] += (row.calls or 0) if called else row.count
        ours, total = counts["fused"] + counts["tail"], counts.total()
        beside = f", {counts['tail']:,} of them beside a base layer that computes itself" if counts["tail"] else ""
        return (
            f"{ours:,} of {total:,} {'calls' if called else 'adapter layers'} accelerated "
            f"({100 * ours / max(total, 1):.1f} %){beside}, {counts['original']:,} left to PEFT"
        )

    def to_json(self) -> str:
        """Everything in the report, as a JSON object."""
        return json.dumps({**asdict(self), "summary": self.summary()}, indent=1)

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        called = any(row.calls is not None for row in self.rows)
        header = ["layer", "adapter", "method", "count", "path", *(["calls"] if called else []), "why"]
        table = Table(*header, box=box.SIMPLE_HEAD)
        table.columns[3].justify = "right"
        for row in self.rows:
            calls = [f"{row.calls:,}" if row.calls is not None else ""] if called else []
            table.add_row(row.layer, row.adapter, row.method, str(row.count), row.path, *calls, row.reason)
        text = io.StringIO()
        console = Console(file=text, width=120, highlight=False, markup=False)
        versions = "  ".join(f"{name} {version}" for name, version in self.versions.items())
        console.print(f"{versions}  on {self.device}, route {self.route}")
        if self.rows:
            console.print(table)
        for line in dict.fromkeys((self.summary(), *self.notes)):
            console.print(line)
        return text.getvalue().rstrip()
