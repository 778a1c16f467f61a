"""Files of tuned tables: the route that serves a layer, the tile that a kernel takes, row by row with provenance.

`tuned/sm_90.json` and its like ship with the package. The user's own, by `lowrank-fused tune`, lies in the cache folder
of the platform, one file for each name of a GPU; the variable LOWRANK_FUSED_TUNED gives another path, and "off" turns
all tables off. What they decide is told in `measured.py`. Needs no Triton.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "DTYPES",
    "FORMAT",
    "ROUTES",
    "VARIABLE",
    "Row",
    "Table",
    "bucket",
    "parse",
    "read",
    "shipped_path",
    "user_path",
]

FORMAT = "lowrank-fused tuned table, version 1"
VARIABLE = "LOWRANK_FUSED_TUNED"
ROUTES = ("reference", "addmm", "precise", "thin", "split", "single")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_SIZES = {"tokens": int, "n": int, "k": int, "rank": int, "dtype": str}
_ROUTE_FIELDS = {"direction": str, **_SIZES, "dropout": bool, "route": str, "by": int}
_TILE_FIELDS = {"kernel": str, **_SIZES, "variant": str, "tile": dict, "by": int}
_PROVENANCE = {
    "measured": ("gpu", "date", "torch", "triton", "driver", "lowrank_fused", "commit"),
    "model": ("assumptions",),
}

Row = dict[str, Any]


def bucket(tokens: int) -> int:
    """The power of two that is nearest in ratio: what was measured with so many tokens serves all of its bucket."""
    below = 1 << (tokens.bit_length() - 1)
    return below if tokens * tokens <= 2 * below * below else 2 * below


@dataclass(frozen=True)
class Table:
    """The content of a file. A row's `by` is the index of its provenance."""

    target: str
    gpu: str | None = None
    provenance: list[dict[str, Any]] = field(default_factory=list)
    routes: list[Row] = field(default_factory=list)
    tiles: list[Row] = field(default_factory=list)

    def is_measured(self, row: Row) -> bool:
        """Whether a clock stands behind this row."""
        return self.provenance[row["by"]]["kind"] == "measured"

    def measured(self) -> Table:
        """The same without rows that a model made."""
        routes, tiles = ([row for row in rows if self.is_measured(row)] for rows in (self.routes, self.tiles))
        return replace(self, routes=routes, tiles=tiles)


def read(path: Path) -> Table:
    """The table in a file. Raises ValueError, naming the file, for one that is none."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tuned table {path} cannot be used: {error}; delete it, write it anew with `lowrank-fused tune`, "
            f"or set {VARIABLE}=off"
        ) from error


def parse(content: Any) -> Table:
    """A table from what its JSON holds. Raises ValueError that says which part is wrong."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"its format must be {FORMAT!r}, got {found!r}")
    target, gpu = content.get("target"), content.get("gpu")
    if not isinstance(target, str) or not re.fullmatch(r"sm_\d+", target):
        raise ValueError(f"its target must be as sm_90, got {target!r}")
    if gpu is not None and not isinstance(gpu, str):
        raise ValueError(f"its gpu must be a name or null, got {gpu!r}")
    lists: dict[str, list[dict[str, Any]]] = {}
    for name in ("provenance", "routes", "tiles"):
        entries: Any = content.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{name} must be a list of objects")
        lists[name] = entries
    table = Table(target, gpu, **lists)
    for place, entry in enumerate(table.provenance):
        missing = [key for key in _PROVENANCE.get(entry.get("kind", ""), ("kind",)) if key not in entry]
        if missing:
            raise ValueError(f"provenance {place} must be measured or model and say {', '.join(missing)}")
    for name, fields in (("routes", _ROUTE_FIELDS), ("tiles", _TILE_FIELDS)):
        for place, row in enumerate(getattr(table, name)):
            if fault := _fault_of(row, fields, len(table.provenance)):
                raise ValueError(f"row {place} of {name} is malformed: {fault}")
    return table


def _fault_of(row: Row, fields: Mapping[str, type], sources: int) -> str | None:
    """What is wrong with a row, or None."""
    for name, kind in fields.items():
        value: Any = row.get(name)
        # The linears of a group have an n and a rank each.
        several = "direction" in fields and name in ("n", "rank") and isinstance(value, list)
        for each in (value or [None]) if several else [value]:
            if not isinstance(each, kind) or (kind is int and isinstance(each, bool)):
                return f"{name} must be {kind.__name__}, got {each!r}"
    if row["tokens"] < 1 or bucket(row["tokens"]) != row["tokens"]:
        return f"tokens must be a power of two, got {row['tokens']}"
    if not 0 <= row["by"] < sources:
        return f"by must be the index of a provenance, got {row['by']}"
    known: dict[str, Iterable[str]] = {"dtype": DTYPES, "direction": ("forward", "backward"), "route": ROUTES}
    for name, values in known.items():
        if name in row and row[name] not in values:
            return f"{name} must be one of {', '.join(values)}, got {row[name]!r}"
    return None


def shipped_path(arch: int) -> Path:
    """The file that ships for a compute capability, there or not."""
    return Path(__file__).resolve().parent / "tuned" / f"sm_{arch}.json"


def user_path(gpu: str) -> Path | None:
    """The user's own file for the GPU of this name, there or not; None where tables are off."""
    asked = os.environ.get(VARIABLE, "")
    if asked == "off":
        return None
    if asked:
        return Path(asked).expanduser()
    folder = os.environ.get("XDG_CACHE_HOME") or {
        "darwin": "~/Library/Caches",
        "win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local"),
    }.get(sys.platform, "~/.cache")
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return Path(folder).expanduser() / "lowrank-fused" / "tuned" / f"{slug}.json"
