"""Reads result files of the three kinds, and refuses what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..benchmark import Case, Row, Spread, parse_dtype
from .results import KernelTime, Results, Source, same_case

__all__ = ["load"]

KINDS = {
    "rows": "lowrank-fused bench --json, and the commands in bench/",
    "benchmarks": "pytest bench --benchmark-json",
    "stages": "the GPU check",
}
_FIELDS = {field.name: field for field in fields(Row)}
_NEEDED = {name for name, field in _FIELDS.items() if field.default is MISSING}
_DEVICE_CLOCKS = {
    "cold": "CUDA events, cold L2",
    "warm": "CUDA events, warm L2",
    "graph, cold": "CUDA graph, cold L2",
    "graph, warm": "CUDA graph, warm L2",
}


def load(paths: Sequence[Path]) -> Results:
    """All results of these files, which must come from one device.

    Raises ValueError for a file that cannot be read, is of another kind or holds no result, and for files from
    several devices: a ratio across devices means nothing.
    """
    if not paths:
        raise ValueError("name at least one result file")
    found = [_load_one(path) for path in paths]
    devices = {results.device: results.sources[0].path for results in found}
    if len(devices) > 1:
        told = "; ".join(f"{path}: {device}" for device, path in devices.items())
        raise ValueError(f"these files come from {len(devices)} devices ({told}); make one report for each")
    whole = Results(found[0].device)
    for results in found:
        for name in ("sources", "rows", "kernels", "gemms", "goals", "problems"):
            getattr(whole, name).extend(getattr(results, name))
        whole.ceilings |= results.ceilings
    if not (whole.measured or whole.kernels or whole.goals):
        raise ValueError(f"nothing was measured in {', '.join(source.path for source in whole.sources)}")
    return whole


def _load_one(path: Path) -> Results:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    readers = {"rows": _bench, "benchmarks": _pytest_benchmark, "stages": _gpu_check}
    kind = next((kind for kind in KINDS if isinstance(content, dict) and kind in content), None)
    if kind is None:
        known = "; ".join(f"{kind!r} ({who})" for kind, who in KINDS.items())
        raise ValueError(f"{path} is not a result file: it has none of {known}")
    return readers[kind](str(path), content)


def _bench(path: str, content: Mapping[str, Any]) -> Results:
    """The document of `lowrank-fused bench --json` and of the commands in bench/."""
    rows = [_row(path, number, values) for number, values in enumerate(content["rows"], 1)]
    if not rows and not content.get("goals"):
        raise ValueError(f"{path} has no rows")
    source = _source(path, KINDS["rows"], content, content.get("environment"), {row.device for row in rows})
    wrong = [f"{path}: {fault}" for fault in content.get("wrong", ())]
    results = Results(source.device, [source], rows, goals=list(content.get("goals", ())), problems=wrong)
    _complete(results)
    return results


def _pytest_benchmark(path: str, content: Mapping[str, Any]) -> Results:
    """pytest-benchmark's document, of the cases in bench/: one row for every clock."""
    rows = []
    for number, entry in enumerate(content["benchmarks"], 1):
        extra = entry.get("extra_info", {})
        if "provider" not in extra:
            raise ValueError(f"{path}: benchmark {number}, {entry.get('name')!r}, was not recorded by this package")
        rows += [_row(path, number, {**extra, **times}) for times in _times(path, number, entry)]
    if not rows:
        raise ValueError(f"{path} has no benchmarks")
    environment = content.get("machine_info", {}).get("lowrank_fused")
    about = {
        "commit": content.get("commit_info", {}).get("id", "unknown")[:12],
        "time": content.get("datetime", ""),
        "command": ["pytest", "bench", "--benchmark-json"],
    }
    source = _source(path, KINDS["benchmarks"], about, environment, {row.device for row in rows})
    results = Results(source.device, [source], rows)
    _complete(results)
    return results


def _times(path: str, number: int, entry: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    device = entry["extra_info"].get("device_ms")
    if device:
        for name, spread in device.items():
            yield {"clock": _DEVICE_CLOCKS.get(name, name), **{f"ms_{q}": spread[q] for q in ("p20", "p50", "p80")}}
        return
    seconds = entry.get("stats", {}).get("data")
    if not seconds:
        raise ValueError(f"{path}: benchmark {number} has no times; was it run with --benchmark-disable?")
    spread = Spread.of(seconds)
    yield {
        "clock": "wall clock",
        "rounds": len(seconds),
        **{f"ms_{q}": 1e3 * getattr(spread, q) for q in ("p20", "p50", "p80")},
    }


def _gpu_check(path: str, content: Mapping[str, Any]) -> Results:
    """The store of the GPU check: rows of every stage that made any, kernels, ceilings, what failed."""
    results = Results("")
    for stage, cases in content["stages"].items():
        for name, case in cases.items():
            if case.get("status") in ("failed", "crashed"):
                results.problems.append(f"{stage}: {name}: {str(case.get('error', 'no message'))[:300]}")
            result = case.get("result")
            if isinstance(result, list):
                results.rows += [_row(path, f"{stage}: {name}", v) for v in result if isinstance(v, dict)]
            elif isinstance(result, dict) and "launches" in result:
                _add_kernels(results, result)
            elif isinstance(result, dict) and "copy_gb_per_s" in result:
                results.ceilings = dict(result)
    if not (results.rows or results.kernels):
        raise ValueError(f"{path} has no rows: no stage of the check that measures has run yet")
    devices = {row.device for row in results.rows} or {"cuda"}
    source = _source(path, KINDS["stages"], content, content.get("environment"), devices)
    results.device, results.sources = source.device, [source]
    _complete(results)
    return results


def _add_kernels(results: Results, result: Mapping[str, Any]) -> None:
    if "in_features" not in result:
        return
    layer = (
        f"{result['in_features']} -> {result['out_features']}, {result['tokens']} tokens, rank {result['rank']}, "
        f"dropout {result['dropout']:g}, {result['dtype']}"
    )
    for launch in result["launches"]:
        results.kernels.append(
            KernelTime(layer, launch["route"], launch["kernel"], launch["us"], launch["bytes"], launch["flops"])
        )
    numbers = ("e_forward", "e_backward", "beta1_cost_forward", "beta1_cost_backward")
    results.gemms.append({"layer": layer, **{name: result.get(name) for name in numbers}})


def _row(path: str, number: int | str, values: Any) -> Row:
    missing = sorted(_NEEDED - values.keys()) if isinstance(values, dict) else sorted(_NEEDED)
    if missing:
        raise ValueError(f"{path}: row {number} has another schema: {', '.join(missing)} missing")
    row = Row(**{name: value for name, value in values.items() if name in _FIELDS})
    if row.flops is None and row.tflops is not None:  # written before rows held both counts
        case = Case(
            row.in_features, row.out_features, row.tokens, row.rank, row.dropout, parse_dtype(row.dtype)
        )  # on a CPU, which changes neither number
        row.flops, row.bytes = case.flops(row.mode), case.bytes(row.mode)
    return row


def _source(path: str, kind: str, about: Mapping[str, Any], environment: Any, devices: set[str]) -> Source:
    """Who made a file, and on what; rows of one file must be of one device."""
    if not isinstance(environment, dict):
        raise ValueError(f"{path} does not say on what machine it was measured")
    if len(devices) > 1:
        raise ValueError(f"{path} mixes devices ({', '.join(sorted(devices))}); a ratio needs both sides from one")
    gpus = environment.get("gpus") or []
    names = sorted({gpu["name"] for gpu in gpus})
    if devices == {"cuda"}:
        if not names:
            raise ValueError(f"{path} has times of a GPU and does not say of which")
        if len(names) > 1:
            raise ValueError(f"{path} was measured beside several GPUs ({', '.join(names)}) and does not say on which")
        device = names[0]
    else:
        threads = environment.get("torch_threads", "?")
        device = f"{environment.get('cpu', 'CPU')}, {threads} thread{'' if threads == 1 else 's'}"
        environment = {**environment, "gpus": []}
    command = about.get("command", "")
    return Source(
        path=path,
        kind=kind,
        device=device,
        environment=environment,
        commit=str(about.get("commit", "unknown")),
        command=command if isinstance(command, str) else " ".join(command),
        time=str(about.get("time", "")),
    )


def _complete(results: Results) -> None:
    """Ratios that the file does not have: of medians within a case and clock; the range is the provider's own."""
    for rows in same_case(results.measured).values():
        for clock in {row.clock for row in rows}:
            times = {row.provider: row for row in rows if row.clock == clock}
            for name, row in times.items():
                suffix = "-fp32" if name.endswith("-fp32") else ""
                baseline, floor = times.get(f"eager{suffix}"), times.get("frozen")
                if row.speedup is None and baseline is not None and name != "frozen":
                    _set_speedup(row, baseline.ms_p50)
                if row.overhead is None and floor is not None and row.ms_p50 and floor.ms_p50:
                    row.overhead = row.ms_p50 / floor.ms_p50


def _set_speedup(row: Row, baseline_ms: float | None) -> None:
    if baseline_ms and row.ms_p20 and row.ms_p50 and row.ms_p80:
        row.speedup = baseline_ms / row.ms_p50
        row.speedup_p20, row.speedup_p80 = baseline_ms / row.ms_p80, baseline_ms / row.ms_p20
