"""What was measured, as rows for machines: CSV and JSON, with everything needed to repeat it beside them."""

from __future__ import annotations

import csv
import datetime
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .case import Case, dtype_name

__all__ = ["Row", "commit", "document", "write_csv", "write_json"]


@dataclass
class Row:
    """One provider in one mode of one case. Times in milliseconds; None where there is no number.

    `speedup` is PEFT's eager arithmetic (adapters of the same dtype) over this provider, `overhead` this
    provider over the frozen linear, both the median of the ratios within rounds. `routes` are those that
    "auto" chose, forward and backward. `status` is "ok", or why there is no number. `what` is a layer, a block
    or a training step, `clock` what the times were taken with. `flops` and `bytes` are what the mathematics needs,
    every operand read and every result written once.
    """

    label: str
    in_features: int
    out_features: int
    tokens: int
    rank: int
    dropout: float
    dtype: str
    device: str
    mode: str
    provider: str
    routes: str | None = None
    status: str = "ok"
    rounds: int = 0
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    speedup: float | None = None
    speedup_p20: float | None = None
    speedup_p80: float | None = None
    overhead: float | None = None
    tflops: float | None = None
    kept_bytes_per_token: float | None = None
    peak_mib: float | None = None
    what: str = "layer"
    clock: str | None = None
    flops: int | None = None
    bytes: int | None = None

    @classmethod
    def of(cls, case: Case, provider: str, mode: str, **numbers: Any) -> Row:
        """A row of this case; numbers may follow later."""
        return cls(
            label=case.label,
            in_features=case.in_features,
            out_features=case.out_features,
            tokens=case.tokens,
            rank=case.rank,
            dropout=case.dropout,
            dtype=dtype_name(case.dtype),
            device=case.device.type,
            mode=mode,
            provider=provider,
            what=case.what,
            flops=case.flops(mode),
            bytes=case.bytes(mode),
            **numbers,
        )


def commit(folder: Path | None = None) -> str:
    """The commit that this folder is checked out at, with a "+" if there are changes; else "unknown"."""
    at = folder or Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(at), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository, whose commit says nothing.
        git("ls-files", "--error-unmatch", "--", str(at))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def document(
    rows: Sequence[Row], environment: Mapping[str, Any], command: Sequence[str], **more: Any
) -> dict[str, Any]:
    """The JSON document of one run: machine and versions, commit, command, time (UTC), rows."""
    return {
        "environment": dict(environment),
        "commit": commit(),
        "command": list(command),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **more,
        "rows": [_rounded(row) for row in rows],
    }


def _rounded(row: Row) -> dict[str, Any]:
    """Six digits: more is noise that makes differences between files hard to read."""
    values = asdict(row)
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    scratch.replace(path)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write one line per row under a header; numbers that do not exist stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(_rounded(row) for row in rows)
