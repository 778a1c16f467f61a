"""Everything that a GPU is needed for, in one command: `python -m bench.gpu_check` (or `make gpu-check`).

Stages run in order of priority, each in a process of its own; every finished case is written to
bench/results/<gpu>/gpu_check.json at once, and a later run goes on where an earlier one stopped. What the stage `tune`
finds is in tuned.json beside it, which all stages read. In the end a report is written there too, and README's table
of what was measured.

Exit status: 0 all done and well, 1 a case failed, 3 no CUDA device here, 4 time ran out (run it again).
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import readme
from bench.gpu_stages import Setting, stages
from bench.stages import ROOT, Stage, Store, run_stage
from lowrank_fused.benchmark.record import commit
from lowrank_fused.kernels.tables import VARIABLE
from lowrank_fused.report import load, write_report
from lowrank_fused.tools.doctor import environment

ALL_WELL, FAILED, NO_GPU, UNFINISHED = 0, 1, 3, 4
NEW_PROCESS = 75  # a stage's own exit status when its device is unusable and it wants to go on afresh
GRACE_SECONDS = 45.0  # how long a stage may overrun inside one case before it is stopped
RESULTS = ROOT / "bench" / "results"


def folder_name(gpu: str) -> str:
    """The GPU's name as a folder: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def healthy(device: torch.device) -> bool:
    """Whether the device still answers; after an illegal access it never does again in this process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return True
    except Exception:
        return False


def run_here(stage: Stage, store: Store, until: float, device: torch.device, *, watchdog: bool = False) -> int:
    """Run a stage in this process; its exit status."""

    def say(line: str) -> None:
        print(line, flush=True)

    went_on = run_stage(stage, store, until, healthy=lambda: healthy(device), say=say, watchdog=watchdog)
    return 0 if went_on else NEW_PROCESS


def run_group(command: Sequence[str], seconds: float) -> int:
    """Exit status of a command; when time is up it is stopped with all its children (pytest, say)."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def run_apart(stage: Stage, store: Store, out: Path, until: float) -> None:
    """Run a stage in other processes: as many as it takes, since a case may kill or hang the one it is in."""
    command = [sys.executable, "-m", "bench.gpu_check", "--stage", stage.name]
    command += ["--out", str(out), "--until", str(until)]
    while (left := len(store.left(stage))) and time.time() < until:
        try:
            status = run_group(command, until - time.time() + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{stage.name}: stopped, a case did not come back", flush=True)
            status = None
        store.reload()
        store.settle(stage.name)
        if status == 0:
            return
        if len(store.left(stage)) == left:
            print(
                f"{stage.name}: exit status {status} before any case; going on with the next stage",
                flush=True,
            )
            return


def machine(store: Store, arguments: Sequence[str]) -> None:
    """Write down where, with what and how this was measured."""
    store.content |= {
        "environment": environment(),
        "commit": commit(),
        "command": ["python", "-m", "bench.gpu_check", *arguments],
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    store.save()


def summary(plan: Sequence[Stage], store: Store, console: Console) -> int:
    """Show what is done, bad and left; the exit status."""
    table = Table("stage", "what", "done", "bad", "left", title=f"results: {store.path}")
    bad, left = 0, 0
    for stage in plan:
        done, failed, missing = len(store.cases(stage.name)), store.bad(stage.name), store.left(stage)
        bad, left = bad + len(failed), left + len(missing)
        table.add_row(stage.name, stage.what, str(done), str(len(failed)), str(len(missing)))
    console.print(table)
    for stage in plan:
        for name in store.bad(stage.name)[:5]:
            error = str(store.cases(stage.name)[name].get("error", ""))
            console.print(f"{stage.name}: {name}: {error[:300]}", style="red", markup=False)
    if bad:
        return FAILED
    return UNFINISHED if left else ALL_WELL


def publish(path: Path, *, in_readme: bool) -> None:
    """Report beside the store, and README's table, as far as there are results."""
    try:
        written = write_report(load([path]), path.parent)
    except ValueError as nothing:
        print(f"no report: {nothing}")
        return
    print(f"report: {written[0]}")
    if in_readme:
        readme.main([])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fresh", action="store_true", help="forget all earlier results of this GPU")
    parser.add_argument("--retry", action="store_true", help="run failed and crashed cases again")
    parser.add_argument("--minutes", type=float, default=20.0, help="time for everything (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for <gpu>/gpu_check.json (default: %(default)s)"
    )
    parser.add_argument("--stage", help="run this stage alone, in this process")
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def check_device(device: torch.device, setting: Setting, given: argparse.Namespace, arguments: Sequence[str]) -> int:
    """All stages on a device that is there."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    store = Store(given.out / folder_name(gpu) / "gpu_check.json", fresh=given.fresh)
    setting = replace(setting, tuned=store.path.with_name("tuned.json"))
    plan = stages(setting)
    chosen = [stage for stage in plan if given.stage in (None, stage.name)]
    if not chosen:
        print(
            f"no stage {given.stage!r}; choose one of {', '.join(stage.name for stage in plan)}",
            file=sys.stderr,
        )
        return 2
    if given.until:  # a child of another gpu_check
        os.environ.setdefault(VARIABLE, str(setting.tuned))
        return run_here(chosen[0], store, given.until, device, watchdog=True)
    if given.fresh:
        setting.tuned.unlink(missing_ok=True)
    machine(store, arguments)
    end = time.time() + 60 * given.minutes
    for stage in chosen:
        if given.retry:
            store.forget_bad(stage.name)
        until = min(time.time() + stage.seconds, end)
        if given.stage:
            run_here(stage, store, until, device)
        else:
            run_apart(stage, store, given.out, until)
        after: dict[str, Any] = store.content.setdefault("gpus_after_stage", {})
        after[stage.name] = environment()["gpus"]
        store.save()
    if not given.stage:
        publish(store.path, in_readme=given.out == RESULTS)
    return summary(chosen, store, Console())


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, look for a GPU, run; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    given = parse(words)
    if not torch.cuda.is_available():
        print(
            "no CUDA device here, so nothing was checked: run this on a machine with an NVIDIA GPU and a "
            f"CUDA build of torch (this one is {torch.__version__})",
            file=sys.stderr,
        )
        return NO_GPU
    device = torch.device("cuda", torch.cuda.current_device())
    return check_device(device, Setting(device=device), given, words)


if __name__ == "__main__":
    raise SystemExit(main())
