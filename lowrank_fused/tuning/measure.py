"""Times of routes, and of the tiles of their kernels: correct first, then interleaved on one clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lowrank_fused.kernels.measured import Tuned, gpu_name, probing

from ..benchmark import Case, Step, clock_for, interleave
from ..benchmark.measure import Contestant, gate, layer_step
from ..benchmark.timing import Clock
from .group import judge_of, provider_of

__all__ = ["Launched", "Measuring"]

Key = tuple[Any, ...]  # kernel, tokens, n, k, rank, dtype, variant


@dataclass(frozen=True)
class Launched:
    """A kernel of a pass over a layer: what its tile is looked up by, the tiles it may take, the model's among them."""

    key: Key
    candidates: list[Tuned]
    model: Tuned

    @property
    def kernel(self) -> str:
        """Its name."""
        return str(self.key[0])


@dataclass
class Measuring:
    """A device, the clock that stands beside it, and how long to look at it."""

    device: torch.device
    clock: Clock
    budget_s: float = 1.0
    min_rounds: int = 10
    verdict_of: Callable[[Contestant, Case], str] = field(
        default=lambda provider, case: gate(provider, case, judge_of(case))
    )
    refused: dict[str, str] = field(default_factory=dict)  # who got no number, and why

    @classmethod
    def on(cls, device: torch.device, budget_s: float = 1.0) -> Measuring:
        """By the clock of this device."""
        return cls(device, clock_for(device), budget_s)

    def tables_aside(self, forced: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
        """The tables of this device put aside: what runs inside has the model's tiles, or those forced on kernels."""
        arch = 0
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            arch = 10 * major + minor
        return probing(arch, gpu_name(self.device), forced)

    def routes(self, case: Case, routes: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, list[float]]]:
        """Milliseconds by direction and route, of those that are as accurate as PyTorch."""
        with self.tables_aside():
            able = {}
            for route in dict.fromkeys(route for several in routes.values() for route in several):
                provider = provider_of(route, case)
                if self._passes(provider, case, f"{route}, {case.title()}"):
                    able[route] = provider
            o = next(iter(able.values())).operands(case) if able else None
            found = {}
            for direction, several in routes.items():
                steps = {r: layer_step(able[r], o, case.dropout, direction) for r in several if r in able}
                found[direction] = self._time(steps)
            return found

    def launches(self, case: Case, route: str, direction: str) -> list[Launched]:
        """The kernels of one pass by a route that may take one of several tiles."""
        with self.tables_aside() as probe:
            log = _record(case, route)[direction]
        found = []
        for key, candidates in probe.seen.items():
            tiles = [_blocks(launch.tile) for launch in log if _is_about(key, launch)]
            model = next((c for c in candidates if _blocks(c.tile) in tiles), None)
            if model is not None and len(candidates) > 1:
                found.append(Launched(key, candidates, model))
        return found

    def tiles(self, case: Case, route: str, direction: str, launched: Launched) -> dict[str, list[float]]:
        """Milliseconds of a kernel by the position of its tile among the candidates."""
        steps: dict[str, Step] = {}
        provider = provider_of(route, case)
        o = provider.operands(case)
        for place, candidate in enumerate(launched.candidates):
            name = f"{launched.kernel} {candidate.tile}"
            try:
                with self.tables_aside({launched.kernel: candidate.fields()}):
                    log = _record(case, route, o)[direction]
            except Exception as failure:  # a compiler or driver may raise anything; the other tiles go on
                self.refused[name] = f"failed: {type(failure).__name__}: {failure}".splitlines()[0]
                continue
            launch = next(found for found in log if _is_about(launched.key, found))
            if _blocks(launch.tile) == _blocks(candidate.tile):
                steps[str(place)] = Step(partial(_run, launch))
        return self._time(steps)

    def accurate(self, case: Case, route: str, launched: Launched, tile: Tuned) -> bool:
        """Whether the layer is as accurate as PyTorch with this tile."""
        provider = provider_of(route, case)
        with self.tables_aside({launched.kernel: tile.fields()}):
            return self._passes(provider, case, f"{launched.kernel} {tile.tile}")

    def _passes(self, provider: Contestant, case: Case, name: str) -> bool:
        verdict = self.verdict_of(provider, case)
        if verdict != "ok":
            self.refused[name] = verdict
        return verdict == "ok"

    def _time(self, steps: Mapping[str, Step]) -> dict[str, list[float]]:
        if not steps:
            return {}
        return interleave(steps, self.clock, budget_s=self.budget_s, min_rounds=self.min_rounds)


def _record(case: Case, route: str, operands: Any = None) -> dict[str, list[Any]]:
    """The launches of a forward and a backward pass, arguments and all, ready to be run again."""
    from lowrank_fused.kernels.launch import record

    provider = provider_of(route, case)
    o = operands or provider.operands(case)
    with record() as forward:
        y = provider(o, case.dropout)
    # Launches are recorded in the thread that asks for it; autograd would use one of its own on a GPU.
    with torch.autograd.set_multithreading_enabled(False), record() as backward:
        torch.autograd.grad(y, provider.leaves(o), o.dy)
    return {"forward": forward, "backward": backward}


def _is_about(key: Key, launch: Any) -> bool:
    """Whether a launch is of this kernel and of these sizes: the linears of a group have launches of their own."""
    sizes = {axis: size for axis, size in zip("NKR", key[2:5], strict=True) if size}
    return launch.name.removesuffix("_tma") == key[0] and all(launch.args[a] == size for a, size in sizes.items())


def _blocks(tile: Any) -> Any:
    """A tile without its limit of registers, which a launcher may add."""
    return replace(tile, max_registers=None)


def _run(launch: Any, _: Any) -> None:
    launch.run()
