"""What is installed and what can run: the facts of `lowrank-fused doctor` and beside every measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank_fused.kernels.tables import VARIABLE, read, shipped_path, user_path

from .. import __version__
from ..benchmark import Case, check, providers_for
from ..benchmark.record import commit
from ..routes import ROUTES, choose, unavailable
from ..target import Target, interpreting, target_of

__all__ = ["Diagnosis", "RouteReport", "TableReport", "best_device", "diagnose", "environment"]

REQUIRED = {"torch": (2, 8), "transformers": (4, 56), "safetensors": (0, 4)}
OPTIONAL = {"triton": (3, 4), "peft": (0, 18)}
PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "accelerate", "safetensors")
# What nvidia-smi is asked for, and the name under which it is reported.
SMI_FIELDS = {
    "driver_version": "driver",
    "clocks.sm": "clock_sm_mhz",
    "clocks.max.sm": "clock_sm_max_mhz",
    "clocks.mem": "clock_memory_mhz",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
}


def best_device() -> torch.device:
    """The current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def version_of(package: str) -> str | None:
    """The installed version of a distribution, without importing it; None where there is none."""
    if package == "torch":
        return str(torch.__version__)  # with its build, +cu130 say, which not every wheel's metadata tells
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as Linux tells it, else the platform's word for it."""
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text(errors="replace"))):
        return found.group(1)
    return platform.processor() or platform.machine()


def gpu_facts(index: int) -> dict[str, Any]:
    """What torch knows of a GPU, and driver, clocks and power limit from nvidia-smi where there is one."""
    properties = torch.cuda.get_device_properties(index)
    facts: dict[str, Any] = {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": None,
    }
    # nvidia-smi counts all GPUs of the machine; a UUID finds this one whatever CUDA_VISIBLE_DEVICES says.
    uuid = getattr(properties, "uuid", None)
    for name in [f"GPU-{uuid}"] * bool(uuid) + [str(index)]:
        if answer := _ask_nvidia_smi(name):
            return facts | dict(zip(SMI_FIELDS.values(), answer, strict=False))
    return facts


def _ask_nvidia_smi(gpu: str) -> list[str]:
    """The values of SMI_FIELDS; none where nvidia-smi is missing or does not know this GPU."""
    query = [
        "nvidia-smi",
        f"--id={gpu}",
        f"--query-gpu={','.join(SMI_FIELDS)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in answer.splitlines()[0].split(",")] if answer else []


def environment() -> dict[str, Any]:
    """Machine and versions: plain values that JSON can hold, None where something is not installed."""
    cuda = torch.cuda.is_available()
    return {
        "lowrank_fused": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        **{package: version_of(package) for package in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "triton_interpreter": interpreting(),
        "gpus": [gpu_facts(index) for index in range(torch.cuda.device_count())] if cuda else [],
    }


@dataclass
class RouteReport:
    """Whether a route can serve this device, why not, and what its check said (None: it was not run)."""

    name: str
    available: bool
    reason: str | None = None
    check: str | None = None


@dataclass
class TableReport:
    """A tuned table that belongs to this device: how many rows were measured or modelled, or why it is not used."""

    path: str
    measured: int = 0
    model: int = 0
    unused: str | None = None


@dataclass
class Diagnosis:
    """All that `doctor` says. `problems` stop the package from working; `notes` are worth knowing."""

    environment: dict[str, Any]
    device: str
    routes: list[RouteReport]
    auto: dict[str, str]
    tables: list[TableReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """No problem, and every available route passed its check."""
        return not self.problems and all(route.check in (None, "ok") for route in self.routes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"works": self.works}


def diagnose(*, self_check: bool = True) -> Diagnosis:
    """Look at this machine; with `self_check`, compute a small layer by every route against float64 too."""
    device = best_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    facts = environment()
    target = target_of(device)
    shape = (8192, 4096, 4096, 16, torch.bfloat16, False, target)
    tables, broken = _tables(target)
    # A broken table stops every call on this GPU.
    auto = {} if broken else {"forward": choose("forward", *shape), "backward": choose("backward", *shape)}
    return Diagnosis(
        environment=facts,
        device=str(device),
        routes=[_route_report(route, device, dtype, self_check) for route in ROUTES],
        auto=auto,
        tables=tables,
        problems=[*_version_problems(facts, REQUIRED, required=True), *broken],
        notes=[*_version_problems(facts, OPTIONAL, required=False), *_device_notes(device)],
    )


def _tables(target: Target) -> tuple[list[TableReport], list[str]]:
    """The tuned tables of a GPU, the user's first, and what is wrong with them; none of a CPU, where none is read."""
    mine = user_path(target.gpu)
    if not target.has_triton:
        return [], []
    if mine is None:
        return [TableReport(str(shipped_path(target.arch)), unused=f"{VARIABLE}=off")], []
    reports, broken = [], []
    for path, own in ((mine, True), (shipped_path(target.arch), False)):
        report = TableReport(str(path))
        reports.append(report)
        if not path.is_file():
            report.unused = "lowrank-fused tune would write it" if own else "nothing ships for this GPU"
            continue
        try:
            table = read(path)
        except ValueError as error:
            report.unused = "it is broken"
            broken.append(str(error))
            continue
        rows = (*table.routes, *table.tiles)
        report.measured = sum(map(table.is_measured, rows))
        report.model = len(rows) - report.measured
        if own and table.gpu != target.gpu:
            report.unused = f"it is of {table.gpu}"
    return reports, broken


def _route_report(route: str, device: torch.device, dtype: torch.dtype, self_check: bool) -> RouteReport:
    reason = unavailable(route, device, dtype)
    if reason is not None:
        return RouteReport(route, available=False, reason=reason)
    if not self_check:
        return RouteReport(route, available=True)
    # Off every tile size, and small enough for Triton's interpreter.
    case = Case(in_features=72, out_features=40, tokens=19, rank=5, dropout=0.25, dtype=dtype, device=device)
    try:
        check(providers_for([route], case)[0], case)
    except Exception as failure:  # the point of a check is to report whatever goes wrong
        return RouteReport(route, available=True, check=f"{type(failure).__name__}: {failure}")
    return RouteReport(route, available=True, check="ok")


def _version_problems(facts: dict[str, Any], minimums: dict[str, tuple[int, int]], *, required: bool) -> list[str]:
    found = []
    for package, minimum in minimums.items():
        wanted = f"{package} {'.'.join(map(str, minimum))} or newer"
        have = facts[package]
        if have is None and required:
            found.append(f"{wanted} is needed and not installed: pip install '{package}>={minimum[0]}.{minimum[1]}'")
        elif have is not None and tuple(int(part) for part in re.findall(r"\d+", have)[:2]) < minimum:
            found.append(f"{wanted} is needed, {have} is installed")
    return found


def _device_notes(device: torch.device) -> list[str]:
    """Why the kernels rest, and what would wake them."""
    if device.type == "cuda":
        return []
    if torch.version.cuda is None:
        return ["no CUDA: this is a CPU build of torch, so layers run on the route addmm"]
    return [f"torch is built for CUDA {torch.version.cuda} but finds no usable GPU or driver; layers run on addmm"]
