"""One launch for every binary that the kernel routes can ask for, built on the meta device: nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lowrank_fused.kernels.launch import Launch, record, targeting

from .routes.fused import SPLIT, THIN
from .routes.problem import Options, Route

__all__ = ["shipped_launches"]


@dataclass(frozen=True)
class _Case:
    """One layer and one call of it."""

    m: int = 8192
    n: int = 4096
    k: int = 4096
    r: int = 16
    p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype | None = None
    conv1d: bool = False
    core: str = "none"
    bias: bool = True
    frozen: str = ""
    routes: tuple[Route, ...] = (SPLIT, THIN)

    def launch(self) -> None:
        """Forward and backward by both kernel routes, on the meta device."""
        make = partial(torch.empty, dtype=self.dtype, device="meta")
        adapter = partial(torch.empty, dtype=self.adapter or self.dtype, device="meta")
        rb = {"dense": self.r, "gate": 2 * self.r}.get(self.core, self.r)
        shape = {"diag": (self.r,), "dense": (rb, self.r), "gate": (self.m, 2)}.get(self.core)
        core = None if shape is None else adapter(shape)
        weight = make(self.k, self.n).t() if self.conv1d else make(self.n, self.k)
        a, b = adapter(self.r, self.k), adapter(self.n, rb)
        seed = torch.empty(1, dtype=torch.int64, device="meta") if self.p else None
        o = Options(
            2.0, self.core, self.p, wants_x="x" not in self.frozen, wants_a="a" not in self.frozen,
            wants_b="b" not in self.frozen, wants_core=core is not None, wants_bias=False,
        )  # fmt: skip
        for route in self.routes:
            x, bias = make(self.m, self.k), make(self.n) if self.bias else None
            y, saved = route.forward(x, weight, a, b, core, bias, seed, o)
            route.backward(make(y.shape), x if o.keeps_x else None, weight, a, b, core, saved, o)


# (M, N = K) that reach every tile of the big products, from one token to more tiles than any GPU has room for.
_SHAPES = [(8, 4096), (24, 14336), (60, 4096), (400, 1024), (400, 4096), (2000, 4096), (4000, 2048), (8192, 4096)]


def _cases() -> Iterator[_Case]:
    """Calls that reach every tile of every chooser in bf16, and every other variant of a kernel at some tile."""
    for m, n in _SHAPES:
        split = (SPLIT,) if 8 < m < 8192 else (SPLIT, THIN)
        yield _Case(m, n, n, p=0.1, routes=split)
        yield _Case(m, n, n, routes=(SPLIT,))
        yield _Case(m, n, n, p=0.1, r=64, routes=(SPLIT,))
        yield _Case(m, n + 4, n + 4, p=0.1, routes=(SPLIT,))
    yield _Case(p=0.1, dtype=torch.float32)
    yield _Case(8, p=0.1, dtype=torch.float32, routes=(SPLIT,))
    yield _Case(r=64, dtype=torch.float32, routes=(SPLIT,))
    yield _Case(p=0.1, dtype=torch.float16, routes=(SPLIT,))
    yield _Case(r=64)
    yield _Case(r=32, p=0.1)
    yield _Case(r=128, p=0.1)
    yield _Case(8, r=128, routes=(SPLIT,))
    for r in (1, 8, 17):
        yield _Case(r=r, p=0.1, routes=(SPLIT, THIN) if r == 17 else (SPLIT,))
    yield _Case(n=4100, k=4100, routes=(THIN,))
    yield _Case(p=0.1, adapter=torch.float32)
    yield _Case(r=64, adapter=torch.float32, routes=(SPLIT,))
    yield _Case(r=64, conv1d=True, routes=(SPLIT,))
    yield _Case(p=0.1, conv1d=True, routes=(SPLIT,))
    for core in ("diag", "dense", "gate"):
        yield _Case(core=core, p=0.1, routes=(SPLIT,))
        yield _Case(core=core, r=64, routes=(SPLIT,))
    yield _Case(core="diag", frozen="ab", adapter=torch.float32, routes=(SPLIT,))
    yield _Case(bias=False)


def shipped_launches(arch: int) -> list[Launch]:
    """One launch for every binary that the kernel routes can ask for on `arch`, in a fixed order."""
    launches: dict[Any, Launch] = {}
    for case in _cases():
        with targeting(arch), record() as log:
            case.launch()
        for launch in log:
            launches.setdefault((launch.source().hash(), *launch.options.values()), launch)
    return list(launches.values())
