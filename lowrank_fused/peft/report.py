"""What `accelerate` did to a model: a table that a person reads, and the same as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass

__all__ = ["Report", "Row"]


@dataclass(frozen=True)
class Row:
    """Layers that are alike: their PEFT class, adapter and method, how many, which path they take and why.

    path: "fused" (base product and adapter in one), "tail" (the base layer is called as it is, the adapter fused
    behind it) or "original" (PEFT's forward). calls: how often that path was taken, None before a model was run.
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
    """`rows` and what they were found with; `print(report)` shows a table."""

    rows: tuple[Row, ...]
    versions: dict[str, str]
    device: str
    route: str

    @property
    def layers(self) -> int:
        """Adapters in layers, each counted once."""
        return sum(row.count for row in self.rows)

    def of_path(self, path: str) -> int:
        """How many take that path."""
        return sum(row.count for row in self.rows if row.path == path)

    def summary(self) -> str:
        """One line for a log."""
        fused, tail, left = (self.of_path(path) for path in ("fused", "tail", "original"))
        share = f" ({100 * (fused + tail) / self.layers:.1f} %)" if self.layers else ""
        beside = f", {tail} of them beside a base layer that computes itself" if tail else ""
        return f"{fused + tail} of {self.layers} adapter layers accelerated{share}{beside}, {left} left to PEFT"

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
        console.print(table)
        console.print(self.summary())
        return text.getvalue().rstrip()
