"""Who is measured: the frozen linear alone, PEFT's arithmetic, torch.compile of it, the form with three products that
other trainers run, our routes, and published kernels where they are installed.

PEFT's arithmetic is written out here, so that the benchmark needs PEFT neither installed nor in a given
version:

    y = x Wᵀ + bias;   y = y + (drop(x.to(A.dtype)) Aᵀ) Bᵀ · scale;   y.to(dtype of x Wᵀ)

As shipped, PEFT keeps A and B in fp32 beside a 16-bit base and trains under autocast; `-fp32` names those
variants, of PEFT's arithmetic as of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UnsupportedError
from ..linear import lowrank_linear
from ..operands import routes_for
from ..routes import ROUTES, unavailable
from .case import Case, Operands
from .published import PUBLISHED, published_forward
from .three_gemm import three_gemm

__all__ = ["FP32", "PROVIDERS", "Forward", "Provider", "default_names", "providers_for"]

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", float, float], Tensor]
FP32 = "-fp32"
PROVIDERS = ("frozen", "eager", "compile", "three-gemm", "auto", *ROUTES, *PUBLISHED)


@dataclass(frozen=True)
class Provider:
    """A way to compute the layer: forward(x, weight, a, b, bias, scale, dropout_p) -> y.

    `adapter_dtype` is None where A and B share x's dtype; otherwise the layer runs under autocast, as PEFT's
    does.
    """

    name: str
    forward: Forward
    adapter_dtype: torch.dtype | None = None

    @property
    def has_adapter(self) -> bool:
        """False for the frozen linear alone, which has neither A nor B to train."""
        return self.name != "frozen"

    def operands(self, case: Case) -> Operands:
        """Random operands of this case in the adapter's dtype."""
        return Operands.random(case, self.adapter_dtype)

    def __call__(self, o: Operands, dropout_p: float) -> Tensor:
        mixed = o.a.dtype != o.x.dtype
        with torch.autocast(o.x.device.type, dtype=o.x.dtype if mixed else torch.bfloat16, enabled=mixed):
            return self.forward(o.x, o.weight, o.a, o.b, o.bias, o.scale, dropout_p)

    def chosen_routes(self, o: Operands, dropout_p: float) -> str | None:
        """What "auto" stands for here, forward / backward; None for every other provider."""
        if self.name.removesuffix(FP32) != "auto":
            return None
        return " / ".join(routes_for(o.x, (o.weight.shape[0], o.weight.shape[1]), o.a, o.b, dropout_p))

    def leaves(self, o: Operands) -> tuple[Tensor, ...]:
        """The tensors whose gradients this provider makes."""
        return o.leaves() if self.has_adapter else (o.x,)


def frozen(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float) -> Tensor:
    """x Wᵀ + bias: the floor that no adapter can go below."""
    return F.linear(x, weight, bias)


def eager(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float) -> Tensor:
    """What PEFT's LoRA layer computes, operation by operation."""
    result = F.linear(x, weight, bias)
    dropped = x.to(a.dtype)
    if p:
        dropped = F.dropout(dropped, p)
    return (result + F.linear(F.linear(dropped, a), b) * scale).to(result.dtype)


def routed(route: str) -> Forward:
    """lowrank_linear by a route of this name, or by the one it chooses ("auto")."""

    def forward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float) -> Tensor:
        return lowrank_linear(x, weight, a, b, scale=scale, bias=bias, dropout_p=p, route=route)

    return forward


def default_names(case: Case, *, with_compile: bool = False) -> list[str]:
    """Every provider that can run this case here; the fp32-adapter pair only beside a 16-bit base."""
    # Triton's interpreter can serve the kernels' routes on a CPU, but its speed says nothing.
    routes = ROUTES if case.device.type == "cuda" else ("reference", "addmm")
    able = [route for route in routes if unavailable(route, case.device, case.dtype) is None]
    chosen = ["auto"] if case.device.type == "cuda" else []  # on a CPU it is addmm, already there
    names = ["frozen", "eager", *(["compile"] if with_compile else []), "three-gemm", *able, *chosen]
    return names if case.dtype == torch.float32 else [*names, "eager" + FP32, "auto" + FP32]


def providers_for(names: Iterable[str], case: Case) -> list[Provider]:
    """Providers by name, each name once; `-fp32` appended to a name keeps its adapters in fp32.

    Raises ValueError for an unknown name and UnsupportedError for a route that cannot run on the case's
    device.
    """
    return [_provider(name, case) for name in dict.fromkeys(names)]


def _provider(name: str, case: Case) -> Provider:
    base = name.removesuffix(FP32)
    if base not in PROVIDERS or name == "frozen" + FP32:
        known = ", ".join(PROVIDERS)
        raise ValueError(f"provider must be one of {known} ({FP32} may follow all but frozen), got {name!r}")
    if base in ROUTES and (reason := unavailable(base, case.device, case.dtype)):
        raise UnsupportedError(f"route {base!r} cannot run here: {reason}")
    if base == "compile":
        # One cache of compiled code for all cases would stop compiling at dynamo's limit of recompilations.
        torch.compiler.reset()
        forward: Forward = torch.compile(eager, dynamic=False)
    elif base in PUBLISHED:
        forward = published_forward(base, case.device, case.dropout, case.bias)
    else:
        forward = {"frozen": frozen, "eager": eager, "three-gemm": three_gemm}.get(base) or routed(base)
    mixed = name.endswith(FP32) and case.dtype != torch.float32
    return Provider(name, forward, torch.float32 if mixed else None)
