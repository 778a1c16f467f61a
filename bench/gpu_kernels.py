"""Every kernel by itself on a GPU: microseconds, bandwidth, e, and what a library GEMM pays for adding (beta = 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lowrank_fused.benchmark import Case as LayerCase
from lowrank_fused.benchmark import (
    Operands,
    Spread,
    Step,
    clock_for,
    dtype_name,
    interleave,
    paired_ratio,
    providers_for,
)

__all__ = ["GEMMS", "ceilings", "time_kernels"]

GEMMS = {"forward": "lowrank_forward", "backward": "grad_input"}  # names of Triton's, with or without TMA


def ceilings(device: torch.device, budget_s: float) -> dict[str, float]:
    """What this device does at best: GB/s of a large copy (bytes read plus bytes written), TFLOP/s of a large bf16 GEMM
    on random values, and their quotient, FLOP per byte, which bounds what fusion can gain."""
    on_gpu = device.type == "cuda"
    size, width = (1 << 30, 8192) if on_gpu else (1 << 22, 256)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b, c = (torch.randn(width, width, device=device).to(torch.bfloat16) for _ in range(3))
    steps = {"copy": Step(lambda _: target.copy_(source)), "gemm": Step(lambda _: torch.mm(a, b, out=c))}
    times = interleave(steps, clock_for(device), budget_s=budget_s)
    copy = 2 * size / Spread.of(times["copy"]).p20 * 1e-6
    gemm = 2 * width**3 / Spread.of(times["gemm"]).p20 * 1e-9
    return {"copy_gb_per_s": copy, "gemm_tflops": gemm, "flop_per_byte": 1e3 * gemm / copy}


def time_kernels(layer: LayerCase, routes: Sequence[str], budget_s: float, min_rounds: int = 5) -> dict[str, Any]:
    """Microseconds, GB/s and TFLOP/s of every launch; e and the cost of beta = 1 from the same interleaved
    run.

    e is the library's GEMM time over that of Triton's GEMM with the low-rank term in its accumulator: 1 means
    that the term came for free.
    """
    launches = {f"{route}:{way}": found for route in routes for way, found in recorded(route, layer).items()}
    steps = library_gemms(layer)
    for key, found in launches.items():
        for index, launch in enumerate(found):
            steps[f"{key}:{index}:{launch.name}"] = Step(lambda _, launch=launch: launch.run())
    times = interleave(steps, clock_for(layer.device), budget_s=budget_s, min_rounds=min_rounds)
    result: dict[str, Any] = {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "tokens": layer.tokens,
        "rank": layer.rank,
        "dropout": layer.dropout,
        "dtype": dtype_name(layer.dtype),
        "library_us": {k: 1e3 * Spread.of(times[k]).p50 for k in library_gemms_names()},
    }
    for way in ("forward", "backward"):
        result[f"beta1_cost_{way}"] = paired_ratio(times[f"addmm:{way}"], times[f"mm:{way}"]).p50 - 1
    result["launches"] = [
        described(key, index, launch, Spread.of(times[f"{key}:{index}:{launch.name}"]).p50)
        for key, found in launches.items()
        for index, launch in enumerate(found)
    ]
    for way, gemm in GEMMS.items():
        for key in steps:
            if key.startswith(f"split:{way}:") and key.rpartition(":")[2].startswith(gemm):
                result[f"e_{way}"] = paired_ratio(times[f"mm:{way}"], times[key]).p50
    return result


def recorded(route: str, layer: LayerCase) -> dict[str, list[Any]]:
    """The launches that one forward and one backward make, arguments and all, ready to be run again."""
    from lowrank_fused.kernels.launch import record

    provider = providers_for([route], layer)[0]
    o = provider.operands(layer)
    with record() as forward:
        y = provider(o, layer.dropout)
    # Launches are recorded in the thread that asks for it; autograd would use one of its own on a GPU.
    with torch.autograd.set_multithreading_enabled(False), record() as backward:
        torch.autograd.grad(y, provider.leaves(o), o.dy)
    if route in ("thin", "split") and not (forward and backward):
        raise RuntimeError(f"route {route} made launches that were not recorded: {forward=}, {backward=}")
    return {"forward": forward, "backward": backward}


def library_gemms_names() -> tuple[str, ...]:
    """x Wᵀ and dy W, written anew or added to what is there."""
    return ("mm:forward", "addmm:forward", "mm:backward", "addmm:backward")


def library_gemms(layer: LayerCase) -> dict[str, Step]:
    """The frozen GEMMs of the layer by the library, with beta = 0 and beta = 1."""
    o = Operands.random(layer)
    x, w, dy = o.x.detach(), o.weight, o.dy
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    return {
        "mm:forward": Step(lambda _: torch.mm(x, w.t(), out=y)),
        "addmm:forward": Step(lambda _: y.addmm_(x, w.t())),
        "mm:backward": Step(lambda _: torch.mm(dy, w, out=dx)),
        "addmm:backward": Step(lambda _: dx.addmm_(dy, w)),
    }


def described(key: str, index: int, launch: Any, ms: float) -> dict[str, Any]:
    """One launch as a row: what it is, its tile, its time, and what its declared bytes and FLOPs come to."""
    moved = launch.bytes_read + launch.bytes_written
    return {
        "route": key,
        "index": index,
        "kernel": launch.name,
        "tile": asdict(launch.tile),
        "us": 1e3 * ms,
        "bytes": moved,
        "flops": launch.flops,
        "gb_per_s": moved / ms * 1e-6,
        "tflops": launch.flops / ms * 1e-9,
    }
