"""What has been finished: one line of JSON for each run, found again by its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["RunStore"]


class RunStore:
    """Results by settings, in a file to which each finished run adds a line.

    A last line that was cut off by an interruption is dropped. Raises ValueError for a file that holds anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results: dict[str, dict[str, Any]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self._results[_key(entry["settings"])] = entry["result"]
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):
                    text = f"{path}, line {number}, is not a finished run; delete the file to start anew"
                    raise ValueError(text) from error
                path.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")

    def __len__(self) -> int:
        return len(self._results)

    def get(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a run with exactly these settings, None if there is none yet."""
        return self._results.get(_key(settings))

    def add(self, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep a finished run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"settings": settings, "result": result}, sort_keys=True) + "\n")
        self._results[_key(settings)] = result


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
