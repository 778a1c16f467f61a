"""The pages that reproductions leave: Markdown for people, JSON for machines."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..tools.doctor import environment

__all__ = ["command_line", "mean_and_deviation", "write_page"]


def command_line() -> str:
    """The command that is running, as a user types it."""
    return " ".join(["lowrank-fused", *sys.argv[1:]])


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def write_page(folder: Path, name: str, title: str, parts: Iterable[str], content: dict[str, Any]) -> Path:
    """Write <name>.md and <name>.json, which both say the command and the versions; returns the page's path."""
    facts = environment()
    said = (
        f"Command: `{command_line()}`. {facts['cpu']}, {facts['torch_threads']} threads; "
        f"torch {facts['torch']}, transformers {facts['transformers']}, Python {facts['python']}."
    )
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([f"# {title}", said, *(part.strip() for part in parts)]) + "\n"
    page = folder / f"{name}.md"
    page.write_text(text, encoding="utf-8")
    document = {"command": command_line(), "environment": facts, **content}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    return page
