"""Which implementation serves a call: a pure function of shape, dtype and target.

| route       | what                                                                        |
|-------------|-----------------------------------------------------------------------------|
| `reference` | the formula in plain PyTorch, any dtype                                      |
| `addmm`     | library GEMMs, the low-rank term added in place; CPU default, floor on a GPU  |
| `precise`   | library GEMMs that do not round fp32 factors beside 16-bit x; by request       |
| `thin`      | Triton thin kernels around one library GEMM that adds into their output       |
| `split`     | thin kernels and Triton GEMMs that carry the low-rank term in the accumulator |
| `single`    | `split` with a forward pass of one launch, s being made beside y              |

Calls too small for a CPU to gain are left to eager PyTorch (`small`), before any of these is asked.

Nothing is tuned at run time. `choose` takes what was measured (the user's table by `lowrank-fused tune`, then the one
that ships), else compares closed forms of what each route costs: memory traffic, which grows with the tokens, and
launches, which do not and decide where tokens are few. Between `thin` and `split` one number decides for which there is
a prior: e, the speed of Triton's GEMM over the library's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..target import Target, interpreting, target_of
from . import addmm, precise, reference
from .problem import GroupRoute, Route

__all__ = [
    "GROUP_ROUTES",
    "MASK_COLUMNS",
    "MAX_THIN_RANK",
    "ROUTES",
    "SECOND_ACCUMULATOR",
    "by_model",
    "choose",
    "choose_for_group",
    "implementation",
    "priors",
    "unavailable",
]

ROUTES = ("reference", "addmm", "precise", "thin", "split", "single")
# Those that serve several linears that share x.
GROUP_ROUTES = ("addmm", "precise", "thin", "split")
_LIBRARY = {"reference": reference, "addmm": addmm, "precise": precise}

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Above this rank the thin kernels read x once per rank block, and library GEMMs are at full speed anyway.
MAX_THIN_RANK = 128

# Above it s does not fit beside a tile of y.
_MAX_SINGLE_RANK = 64

# What s beside y is taken to cost a GEMM in rate, beyond its own products; and how many columns of y take as long as to
# draw the dropout mask again, which every block of columns does. Both are priors.
SECOND_ACCUMULATOR = 0.02
MASK_COLUMNS = 154
# Columns of a block where a mask may be drawn for each: where tokens are few.
_NARROW_BLOCK = 64

# (Peak bf16 FLOP/s) / (memory byte/s), the peak, and e: priors from data sheets and published figures, not measured.
_BALANCE = {80: 149, 86: 90, 89: 172, 90: 263, 100: 214, 120: 123}
_PEAK = {80: 260e12, 86: 70e12, 89: 160e12, 90: 790e12, 100: 1500e12, 120: 203e12}
_GEMM_EFFICIENCY = {80: 0.90, 86: 0.90, 89: 0.90, 90: 0.96, 100: 0.85, 120: 0.85}

# Seconds that a launch costs besides its work: a prior for the gap between one kernel and the next that needs its
# result, as it is in a CUDA graph. Python takes longer, but while the GPU is busy nobody waits for it.
_LAUNCH = 2e-6


def choose(
    direction: Literal["forward", "backward"],
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    dropout: bool,
    target: Target,
    among: Sequence[str] = ROUTES,
    members: Sequence[tuple[int, int]] = (),
) -> str:
    """The route of these that was measured fastest for x [m, k], W [n, k], rank r, or else is expected to be.

    For linears that share x, n and r are sums over their (N, R), which are `members`.
    """
    if target.has_triton and dtype in _KERNEL_DTYPES and m != 0:
        from lowrank_fused.kernels.measured import measured_route

        all_n = tuple(each for each, _ in members) if members else n
        all_r = tuple(each for _, each in members) if members else r
        measured = measured_route(direction, m, all_n, k, all_r, dtype, dropout, target.arch, target.gpu)
        if measured is not None and measured in among:
            return measured
    return by_model(direction, m, n, k, r, dtype, dropout, target, among, len(members) or 1)


def by_model(
    direction: str,
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    dropout: bool,
    target: Target,
    among: Sequence[str] = ROUTES,
    layers: int = 1,
) -> str:
    """The route of these expected fastest, whatever was measured; sums over `layers` of them that share x.

    Costs are times, in units of what one token's part of the frozen GEMM takes where arithmetic bounds it. Reading W
    takes ρ of them, ρ being the balance of the GPU in FLOP per byte; launches take the same for any m.
    """
    if not target.has_triton or dtype not in (torch.bfloat16, torch.float16) or r > MAX_THIN_RANK or m == 0:
        return "addmm"
    costs_of = _forward_costs if direction == "forward" else _backward_costs
    costs = costs_of(n, k, r, dropout, target.arch, layers)
    rho = _nearest(_BALANCE, target.arch)
    launch = _LAUNCH * _nearest(_PEAK, target.arch) / (2 * n * k)
    traffic = rho + (rho / n + rho / k) * m

    def time(route: str) -> float:
        cost = costs[route]
        return max(cost.product * m, traffic) + cost.passes * m + cost.launches * launch

    return min((route for route in costs if route in among), key=time)


class _Cost(NamedTuple):
    """What a route costs: time of its product and of other passes, both for a token, and the number of launches."""

    product: float
    passes: float
    launches: int


def _forward_costs(n: int, k: int, r: int, dropout: bool, arch: int, layers: int) -> dict[str, _Cost]:
    """Forward: a pass over an [m, n] tensor of 16-bit values takes ρ/k, over [m, k] ρ/n.

    s made again by every c columns takes r/c.
    """
    over_n, over_k, triton = _shares(n, k, arch)
    costs = {
        "split": _Cost(triton, over_n, 1 + layers),
        "thin": _Cost(1.0, over_k + over_n, 1 + 2 * layers),
        "addmm": _Cost(1.0, 2 * over_k + (1 + 2.5 * dropout) * over_n, 2 + 2 * layers + 35 * dropout),
    }
    if r <= _MAX_SINGLE_RANK:
        columns = 256 if arch == 90 and r <= 16 else 128  # in the widest block that holds s beside y
        beside = max(r, 16) / columns + SECOND_ACCUMULATOR + MASK_COLUMNS / _NARROW_BLOCK * dropout
        costs["single"] = _Cost(triton * (1 + beside), 0.0, layers)
    return costs


def _backward_costs(n: int, k: int, r: int, dropout: bool, arch: int, layers: int) -> dict[str, _Cost]:
    """The same of the backward pass."""
    over_n, over_k, triton = _shares(n, k, arch)
    return {
        "split": _Cost(triton, over_k + over_n, 1 + 2 * layers),
        "thin": _Cost(1.0, over_k + 2 * over_n, 1 + 2 * layers),
        "addmm": _Cost(1.0, 2 * over_k + (4 + 2.5 * dropout) * over_n, 4 + 4 * layers + 10 * dropout),
    }


def _shares(n: int, k: int, arch: int) -> tuple[float, float, float]:
    """What a pass over [m, k] takes, and one over [m, n], and Triton's GEMM, relative to the library's."""
    rho = _nearest(_BALANCE, arch)
    return rho / n, rho / k, 1 / _nearest(_GEMM_EFFICIENCY, arch)


def choose_for_group(
    route: str,
    m: int,
    k: int,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    dropout: bool,
    device: torch.device,
) -> tuple[str, str]:
    """Routes forward and backward for linears of `shapes` (N, R) that share x [m, k]; a named one works or raises."""
    if route != "auto":
        if route not in GROUP_ROUTES:
            raise ValueError(f"route {route!r} serves single linears; for several use {', '.join(GROUP_ROUTES)}")
        if reason := unavailable(route, device, dtype):
            raise UnsupportedError(f"route {route!r} cannot run: {reason}")
        return route, route
    sizes = (m, sum(n for n, _ in shapes), k, sum(r for _, r in shapes), dtype, dropout, target_of(device))
    forward = choose("forward", *sizes, among=GROUP_ROUTES, members=shapes)
    return forward, choose("backward", *sizes, among=GROUP_ROUTES, members=shapes)


def priors(arch: int) -> dict[str, float]:
    """What the model assumes of a GPU: FLOP that take as long as a byte, its rate, e, and the price of a launch."""
    return {
        "flop_per_byte": _nearest(_BALANCE, arch),
        "tflops": _nearest(_PEAK, arch) / 1e12,
        "e": _nearest(_GEMM_EFFICIENCY, arch),
        "launch_us": 1e6 * _LAUNCH,
    }


def _nearest(table: Mapping[int, float], arch: int) -> float:
    """The entry of the newest architecture that is not newer than this one."""
    return table[max((known for known in table if known <= arch), default=min(table))]


def unavailable(route: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this route cannot serve such a call, or None when it can."""
    if route not in ROUTES:
        return f"unknown route {route!r}; choose auto or one of {', '.join(ROUTES)}"
    if route in _LIBRARY:
        return None
    if dtype not in _KERNEL_DTYPES:
        return f"kernels take bfloat16, float16 and float32, not {dtype}"
    if device.type == "cpu":
        return None if interpreting() else "Triton kernels need a CUDA device; this tensor is on the CPU"
    if device.type == "cuda" and target_of(device).has_triton:
        return None
    return f"no Triton kernels for {device.type}: they need Triton and an NVIDIA GPU of compute capability 8.0 or newer"


def implementation(route: str, like: Tensor) -> Route:
    """What has the forward() and backward() of a route; kernels are imported on first use."""
    if reason := unavailable(route, like.device, like.dtype):
        raise UnsupportedError(f"route {route!r} cannot run: {reason}")
    if route in _LIBRARY:
        return _LIBRARY[route]
    if like.shape[0] == 0:
        return addmm
    from .fused import SPLIT, THIN
    from .single import SINGLE

    return {"split": SPLIT, "thin": THIN, "single": SINGLE}[route]


def group_implementation(route: str, like: Tensor) -> GroupRoute:
    """What has the group_forward() and group_backward() of one of `GROUP_ROUTES`."""
    return cast(GroupRoute, implementation(route, like))
