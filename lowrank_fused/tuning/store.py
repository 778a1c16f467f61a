"""The table that a tuner writes: read once, written after every measurement, never half a file."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank_fused.kernels.tables import FORMAT, Row, Table, read

from .. import __version__
from ..benchmark.record import commit
from ..tools.doctor import cpu_name, gpu_facts, version_of

__all__ = ["Store", "dump", "key_of", "provenance"]

_FOUND = {"us", "model", "model_us"}  # what the tuner says in every row, besides what the row is about
_DECIDED = _FOUND | {"addmm_us", "route", "tile", "by"}
_ORDER = ("kernel", "k", "n", "rank", "dtype", "dropout", "variant", "tokens", "direction")


def provenance(device: torch.device) -> dict[str, Any]:
    """Where, when and with what something is measured now."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    facts = gpu_facts(index or 0) if device.type == "cuda" else {"name": cpu_name(), "driver": None}
    return {
        "kind": "measured",
        "gpu": facts["name"],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "driver": facts["driver"],
        "lowrank_fused": __version__,
        "commit": commit(),
    }


def key_of(row: Row) -> str:
    """What a row is about: equal for rows of which one replaces the other."""
    return json.dumps({name: value for name, value in row.items() if name not in _DECIDED}, sort_keys=True)


def dump(table: Table) -> str:
    """A table as JSON: a row a line, in an order of its own, only the provenances that rows refer to."""
    used = sorted({row["by"] for row in (*table.routes, *table.tiles)})
    number = {by: new for new, by in enumerate(used)}

    def place(row: Row) -> list[str]:
        values = (row.get(name, "") for name in _ORDER)
        return [f"{value:012}" if isinstance(value, int) else str(value) for value in values]

    def lines(rows: Sequence[Row]) -> str:
        told = [json.dumps({**row, "by": number[row["by"]]}, ensure_ascii=False) for row in sorted(rows, key=place)]
        return "[\n" + ",\n".join("  " + line for line in told) + "\n ]" if told else "[]"

    head = {"format": FORMAT, "target": table.target, "gpu": table.gpu}
    parts = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    sources = [json.dumps(table.provenance[by], ensure_ascii=False) for by in used]
    parts.append(' "provenance": ' + ("[\n" + ",\n".join("  " + s for s in sources) + "\n ]" if sources else "[]"))
    parts += [f' "routes": {lines(table.routes)}', f' "tiles": {lines(table.tiles)}']
    return "{\n" + ",\n".join(parts) + "\n}\n"


class Store:
    """The table in a file. What was measured here before with the same versions and code is not measured again."""

    def __init__(self, path: Path, target: str, source: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Raises ValueError for a file that is no table, or one of another GPU; with `fresh` it is put aside."""
        self.path, self.source = path, dict(source)
        self.table = Table(target, self.source["gpu"])
        if path.is_file() and not fresh:
            self.table = read(path)
            if (self.table.target, self.table.gpu) != (target, self.source["gpu"]):
                raise ValueError(
                    f"the tuned table {path} is of {self.table.gpu}, {self.table.target}, and this is "
                    f"{self.source['gpu']}, {target}; give another path by --table, or --fresh to replace it"
                )

    def find(self, what: Mapping[str, Any]) -> Row | None:
        """The row about this that was measured in the same surroundings, on whatever day."""
        key = key_of(dict(what))
        rows = (row for row in (*self.table.routes, *self.table.tiles) if key_of(row) == key and row.keys() >= _FOUND)
        return next((row for row in rows if self._is_ours(self.table.provenance[row["by"]])), None)

    def put(self, row: Row) -> Row:
        """Write a row in place of any that is about the same; the row as it was written."""
        if self.source not in self.table.provenance:
            self.table.provenance.append(self.source)
        row = {**row, "by": self.table.provenance.index(self.source)}
        rows = self.table.routes if "direction" in row else self.table.tiles
        rows[:] = [*(other for other in rows if key_of(other) != key_of(row)), row]
        self._write()
        return row

    def _is_ours(self, source: Mapping[str, Any]) -> bool:
        return {**source, "date": None} == {**self.source, "date": None}

    def _write(self) -> None:
        """A reader, and a process that is stopped, never sees half a file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".partial")
        scratch.write_text(dump(self.table), encoding="utf-8")
        scratch.replace(self.path)
