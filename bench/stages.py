"""Stages of a long check, case by case, so that it can be stopped, killed and resumed at any point.

A stage is a list of named cases in order of priority. Every finished case is written down at once. A case
that is found "running" when nothing runs took its process with it: it is marked as crashed and the stage goes
on behind it.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_fused.benchmark import write_json

__all__ = ["Case", "PartlyFailed", "Stage", "Store", "fingerprint", "run_stage"]

ROOT = Path(__file__).resolve().parents[1]
BAD = ("failed", "crashed")


class PartlyFailed(Exception):
    """A failure beside which there are results that are worth keeping."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Case:
    """A name that is unique in its stage, and what to do: returns plain values for JSON, or raises."""

    name: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class Stage:
    """Cases in order of priority, the seconds that one run may spend on them and that one case may take."""

    name: str
    what: str
    cases: Sequence[Case]
    seconds: float = 230.0
    case_seconds: float = 90.0


def fingerprint() -> str:
    """A hash of all code that is measured: results of one fingerprint belong together, whatever git says."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "lowrank_fused").rglob("*.py"), *(ROOT / "kernels").rglob("*")]):
        if path.suffix in (".py", ".json"):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Store:
    """The JSON file of one GPU. Results of other code than today's are dropped when it is opened."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        empty: dict[str, Any] = {"fingerprint": fingerprint(), "stages": {}}
        self.content = empty
        if path.is_file() and not fresh:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("fingerprint") == empty["fingerprint"]:
                self.content = found

    def reload(self) -> None:
        """Take over what another process wrote."""
        self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def save(self) -> None:
        """Write everything."""
        write_json(self.path, self.content)

    def cases(self, stage: str) -> dict[str, dict[str, Any]]:
        """Results of a stage by case, empty at first."""
        return self.content["stages"].setdefault(stage, {})

    def put(self, stage: str, case: str, **result: Any) -> None:
        """Record one case and save."""
        self.cases(stage)[case] = result
        self.save()

    def settle(self, stage: str) -> None:
        """Call what still counts as running crashed; for use when no process runs."""
        for case, result in self.cases(stage).items():
            if result["status"] == "running":
                self.put(stage, case, status="crashed", error="the process ended or was stopped during this case")

    def forget_bad(self, stage: str) -> None:
        """Failed and crashed cases are to be run again."""
        kept = {name: result for name, result in self.cases(stage).items() if result["status"] not in BAD}
        self.content["stages"][stage] = kept
        self.save()

    def left(self, stage: Stage) -> list[Case]:
        """Cases without a result, in order."""
        return [case for case in stage.cases if case.name not in self.cases(stage.name)]

    def bad(self, stage: str) -> list[str]:
        """Names of failed and crashed cases."""
        return [name for name, result in self.cases(stage).items() if result["status"] in BAD]


def run_stage(
    stage: Stage,
    store: Store,
    until: float,
    *,
    healthy: Callable[[], bool] = lambda: True,
    say: Callable[[str], None] = lambda line: None,
    watchdog: bool = False,
) -> bool:
    """Run cases until all have a result or time (`time.time()`) is past `until`; False once the device is
    unusable.

    An exception is a result: it fails the case. A CUDA error, though, may poison the process; `healthy` asks
    the device afterwards, and when it is not, the caller goes on in a new process.
    """
    store.settle(stage.name)
    todo = store.left(stage)
    for index, case in enumerate(todo):
        if time.time() > until:
            say(f"{stage.name}: out of time, {len(todo) - index} of {len(stage.cases)} cases left")
            return True
        store.put(stage.name, case.name, status="running")
        begun = time.perf_counter()
        if watchdog:
            faulthandler.dump_traceback_later(stage.case_seconds, exit=True)
        try:
            result: dict[str, Any] = {"status": "ok", "result": case.run()}
        except Exception as failure:
            result = {"status": "failed", "error": f"{type(failure).__name__}: {failure}"[:4000]}
            if isinstance(failure, PartlyFailed):
                result["result"] = failure.result
        finally:
            if watchdog:
                faulthandler.cancel_dump_traceback_later()
        seconds = round(time.perf_counter() - begun, 2)
        store.put(stage.name, case.name, seconds=seconds, **result)
        error = result.get("error", "")
        say(f"{stage.name}: {case.name}: {result['status']} in {seconds:.1f} s" + (f"; {error[:300]}" if error else ""))
        if error and not healthy():
            say(f"{stage.name}: the device is unusable after this failure; going on in a new process")
            return False
    return True
