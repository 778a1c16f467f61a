"""Predicted times: launches one after another, each taking as long as its arithmetic or its traffic, the longer.

    time = Σ max(FLOP / peak, bytes / bandwidth) + launches · launch cost

Nothing stays in a cache from one launch to the next, inside a launch every tensor moves once, no wave is partial. It is
a model, not a measurement: good for what cannot be beaten and for comparing designs, not for what a clock will say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd

from ..tools.model_shapes import LinearShape
from .gpus import Gpu
from .groups import Members, groups, label
from .passes import Pass, Setting, Step
from .providers import candidates

__all__ = ["Assumptions", "Prediction", "Scope", "fastest", "predict", "scopes"]

_REFERENCE_POINTS = ("frozen", "eager", "limit")


@dataclass(frozen=True)
class Assumptions:
    """The GPU, and what is not known before something has run on it.

    `efficiency` is e, the speed of Triton's GEMMs over the library's; `thin_share` of the bandwidth is what our thin
    kernels reach; `beta_cost` is what adding to its output costs a library GEMM, as a share of its time; `launch_us` is
    what every launch costs besides its work; `scratch_share` of the partial sums that a launch writes and reads again
    goes through memory, the rest stays in cache.
    """

    gpu: Gpu
    efficiency: float
    thin_share: float = 1.0
    beta_cost: float = 0.0
    launch_us: float = 0.0
    scratch_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("efficiency", "thin_share"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("beta_cost", "launch_us", "scratch_share"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def microseconds(self, p: Pass) -> float:
        """The time of one launch."""
        peak = self.gpu.peak * (self.efficiency if p.kind == "product" else 1.0)
        bandwidth = self.gpu.bandwidth * (self.thin_share if p.kind == "thin" else 1.0)
        slower = 1 + self.beta_cost * p.adds
        moved = p.bytes - (1 - self.scratch_share) * p.scratch
        return 1e6 * slower * max((p.flops + p.again) / peak, moved / bandwidth) + self.launch_us

    def total(self, passes: Iterable[Pass]) -> float:
        """The time of several, in microseconds."""
        return sum(map(self.microseconds, passes))

    def __str__(self) -> str:
        gpu = self.gpu
        return (
            f"{gpu.name} at {gpu.peak / 1e12:g} TFLOP/s and {gpu.bandwidth / 1e12:g} TB/s, e = {self.efficiency:g}, "
            f"thin kernels at {100 * self.thin_share:g} % of bandwidth, beta = 1 costs {100 * self.beta_cost:g} %, "
            f"a launch {self.launch_us:g} µs, {100 * self.scratch_share:g} % of partial sums go through memory, "
            "no reuse in cache between launches"
        )


@dataclass(frozen=True)
class Prediction:
    """One provider in one scope, forward and backward.

    `scope` is a layer, a group of layers that share their input ("q_proj + k_proj + v_proj"), the "block" that a model
    repeats, or the "model"; it has so many `layers`, and a model has `count` of it. `over_frozen` is its time over the
    frozen layers', `speedup` eager PEFT's over its, `share_of_limit` what part of its time the limit takes.
    """

    scope: str
    layers: int
    count: int
    tokens: int
    provider: str
    forward_launches: int
    backward_launches: int
    bytes: int
    flops: int
    forward_us: float
    backward_us: float
    us: float
    over_frozen: float
    speedup: float
    share_of_limit: float


Scope = tuple[str, int, Sequence[tuple[Members, int]]]  # name, how many a model has, groups of layers and how often


def scopes(linears: Sequence[LinearShape]) -> list[Scope]:
    """Every distinct layer alone, every group, a block (what repeats throughout the model), the model."""
    by_size: dict[tuple[int, int, bool], list[LinearShape]] = {}
    for linear in linears:
        by_size.setdefault((linear.in_features, linear.out_features, linear.bias), []).append(linear)
    found: list[Scope] = []
    for (k, n, _), same in by_size.items():
        names = ", ".join(dict.fromkeys(linear.name for linear in same))
        found.append((f"{names} {k} -> {n}".strip(), sum(linear.count for linear in same), [((same[0],), 1)]))
    parts = groups(linears)
    found += [(label(members), members[0].count, [(members, 1)]) for members in parts if len(members) > 1]
    blocks = gcd(*(linear.count for linear in linears))
    if len(linears) > 1:
        found.append(("block", blocks, [(members, members[0].count // blocks) for members in parts]))
    if blocks > 1:
        found.append(("model", 1, [(members, members[0].count) for members in parts]))
    return found


def fastest(provider: str, members: Members, setting: Setting, a: Assumptions) -> Step:
    """The launches forward and backward that take this provider least time."""
    forward, backward = candidates(provider, members, setting)
    return Step(min(forward, key=a.total), min(backward, key=a.total))


def _totals(provider: str, scope: Scope, setting: Setting, a: Assumptions) -> dict[str, float]:
    """What adds up over the parts of a scope, by the names that a prediction has for it."""
    steps = [(fastest(provider, members, setting, a), times) for members, times in scope[2]]
    totals: dict[str, float] = {}
    for direction in ("forward", "backward"):
        parts = [(getattr(step, direction), times) for step, times in steps]
        totals[f"{direction}_launches"] = sum(times * len(passes) for passes, times in parts)
        totals[f"{direction}_us"] = sum(times * a.total(passes) for passes, times in parts)
    every = [(p, times) for step, times in steps for passes in step for p in passes]
    totals["bytes"] = sum(times * p.bytes for p, times in every)
    totals["flops"] = sum(times * p.flops for p, times in every)
    totals["us"] = totals["forward_us"] + totals["backward_us"]
    return totals


def predict(
    linears: Sequence[LinearShape], names: Sequence[str], setting: Setting, assumptions: Assumptions
) -> list[Prediction]:
    """A prediction for every scope of these layers and every provider named, in that order."""
    predictions = []
    for scope in scopes(linears):
        found = {
            name: _totals(name, scope, setting, assumptions) for name in dict.fromkeys((*names, *_REFERENCE_POINTS))
        }
        frozen, eager, limit = (found[name]["us"] for name in _REFERENCE_POINTS)
        for name in names:
            us = found[name]["us"]
            ratios = {"over_frozen": us / frozen, "speedup": eager / us, "share_of_limit": limit / us}
            layers = sum(times * len(members) for members, times in scope[2])
            predictions.append(
                Prediction(scope[0], layers, scope[1], setting.tokens, name, **found[name], **ratios)  # type: ignore[arg-type]
            )
    return predictions
