"""One launch for every binary that the kernel routes can ask for, built on the meta device: nothing runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lowrank_fused.kernels.dy_factors import dy_factors, one_pass_max_rank
from lowrank_fused.kernels.expand import expand
from lowrank_fused.kernels.gather import Permutation, gather, scatter_add, segment_sum
from lowrank_fused.kernels.grad_input import grad_input
from lowrank_fused.kernels.launch import Launch, arch_of, record, targeting
from lowrank_fused.kernels.lowrank_forward import aligned_rows, lowrank_forward
from lowrank_fused.kernels.measured import Tuned, probing
from lowrank_fused.kernels.shrink import shrink
from lowrank_fused.kernels.single_forward import single_forward
from lowrank_fused.kernels.stacked import Stack, repeat_blocks, sum_blocks
from lowrank_fused.kernels.weight_factor import ACTIVATIONS, weight_factor, weight_factor_grad
from lowrank_fused.kernels.x_factors import x_factors

from ..routes.fused import SPLIT, THIN
from ..routes.problem import Options, Route
from .variants import binary_of, is_masked

__all__ = ["CallCase", "launches_of", "shipped_cases", "shipped_launches"]


@dataclass(frozen=True)
class CallCase:
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
    given_mask: bool = False
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
        drop = torch.empty(1, dtype=torch.int64, device="meta") if self.p else None
        if self.given_mask:
            drop = torch.empty(self.m, -(-self.k // 8), dtype=torch.uint8, device="meta")
        o = Options(
            2.0, self.core, self.p, wants_x="x" not in self.frozen, wants_a="a" not in self.frozen,
            wants_b="b" not in self.frozen, wants_core=core is not None, wants_bias=False,
        )  # fmt: skip
        for route in self.routes:
            x, bias = make(self.m, self.k), make(self.n) if self.bias else None
            y, saved = route.forward(x, weight, a, b, core, bias, drop, o)
            route.backward(make(y.shape), x if o.keeps_x else None, weight, a, b, core, saved, o)


# (M, N = K) that reach every tile of the big products, from one token to more tiles than any GPU has room for.
_SHAPES = [(8, 4096), (24, 14336), (60, 4096), (400, 1024), (400, 4096), (2000, 4096), (4000, 2048), (8192, 4096)]


def _cases() -> Iterator[CallCase]:
    """Calls that reach every tile of every chooser in bf16, and every other variant of a kernel at some tile."""
    for m, n in _SHAPES:
        split = (SPLIT,) if 8 < m < 8192 else (SPLIT, THIN)
        yield CallCase(m, n, n, p=0.1, routes=split)
        yield CallCase(m, n, n, routes=(SPLIT,))
        yield CallCase(m, n, n, p=0.1, r=64, routes=(SPLIT,))
        yield CallCase(m, n, n, r=128, routes=(SPLIT,))
        yield CallCase(m, n + 4, n + 4, p=0.1, routes=(SPLIT,))
        for r in (16, 64, 128):  # every block of ranks beside a weight [K, N], forward alone
            yield CallCase(m, n, n, r=r, conv1d=True, frozen="xab", routes=(SPLIT,))
    yield CallCase(p=0.1, dtype=torch.float32)
    yield CallCase(8, p=0.1, dtype=torch.float32, routes=(SPLIT,))
    yield CallCase(r=64, dtype=torch.float32, routes=(SPLIT,))
    yield CallCase(p=0.1, dtype=torch.float16, routes=(SPLIT,))
    yield CallCase(r=64)
    yield CallCase(r=32, p=0.1)
    yield CallCase(r=64, p=0.1)
    yield CallCase(r=128, p=0.1)
    for r in (1, 8, 17):
        yield CallCase(r=r, p=0.1, routes=(SPLIT, THIN) if r == 17 else (SPLIT,))
    yield CallCase(n=4100, k=4100, routes=(THIN,))
    yield CallCase(p=0.1, adapter=torch.float32)
    yield CallCase(r=64, adapter=torch.float32, routes=(SPLIT,))
    yield CallCase(r=64, conv1d=True, routes=(SPLIT,))
    yield CallCase(p=0.1, conv1d=True, routes=(SPLIT,))
    for core in ("diag", "dense", "gate"):
        yield CallCase(core=core, p=0.1, routes=(SPLIT,))
        yield CallCase(core=core, r=64, routes=(SPLIT,))
    yield CallCase(core="diag", frozen="ab", adapter=torch.float32, routes=(SPLIT,))
    yield CallCase(bias=False)
    for m in (8, 2000, 8192):
        yield CallCase(m, p=0.1, given_mask=True, routes=(SPLIT,))
        yield CallCase(m, p=0.1, r=128, given_mask=True, routes=(SPLIT,))
    yield CallCase(n=4100, k=4100, p=0.1, given_mask=True, routes=(SPLIT,))
    yield CallCase(p=0.1, dtype=torch.float32, given_mask=True, routes=(SPLIT,))


@dataclass(frozen=True)
class _GroupCase:
    """Projections of one x: factors A in pieces, thin operands that are columns of wider matrices, one dx for all."""

    m: int = 8192
    k: int = 4096
    r: int = 16
    p: float = 0.0
    members: int = 3
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.bfloat16
    conv1d: bool = False

    def launch(self) -> None:
        """What differs from a projection on its own, on the meta device."""
        make = partial(torch.empty, dtype=self.dtype, device="meta")
        adapter = partial(torch.empty, dtype=self.adapter, device="meta")
        v, ds = make(self.m, self.members * self.r), make(self.m, self.members * self.r)
        mask = torch.empty(self.m, -(-self.k // 8), dtype=torch.uint8, device="meta") if self.p else None
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        x, b = make(self.m, self.k), adapter(self.k, self.r)
        a = [adapter(self.r, self.k) for _ in range(self.members)]
        shrink(x, a, dropout_p=self.p, seed=seed)
        x_factors(x, ds, a, mask=mask, dropout_p=self.p, want_dx0=True)
        expand(ds, [factor.t() for factor in a], mask=mask, dropout_p=self.p)
        weight = make(self.k, self.k).t() if self.conv1d else make(self.k, self.k)
        for first in (0, self.r):
            own = slice(first, first + self.r)
            y = lowrank_forward(x, weight, v[:, own], b)
            dy_factors(y, b, v[:, own], want_db=self.r <= one_pass_max_rank(self.dtype, arch_of(y)), out=ds[:, own])
        rows = aligned_rows([b] * self.members, x, [weight] * self.members)
        if rows is not None:
            _, v, _ = shrink(x, a, dropout_p=self.p, seed=seed, copy=([b] * self.members, rows))
            lowrank_forward(x, weight, v[:, : self.r], rows[: self.k])
        dx = grad_input(y, weight)
        grad_input(y, weight, add=dx)
        grad_input(y, weight, ds, a, mask=mask, dropout_p=self.p, add=dx)


def _group_cases() -> Iterator[_GroupCase]:
    """Every tile of dx, added to, with and without a mask; ranks that are aligned, in half and not at all; every block
    of ranks of the passes over x.
    """
    for m, k in _SHAPES:
        yield _GroupCase(m, k)
        yield _GroupCase(m, k, p=0.1)
        yield _GroupCase(m, k + 4, p=0.1)
        yield _GroupCase(m, k, p=0.1, r=64, members=2)
        yield _GroupCase(m, k + 4, p=0.1, r=42)
    for r in (4, 8, 11, 64):
        yield _GroupCase(r=r, p=0.1)
        yield _GroupCase(r=r, adapter=torch.float32)
    yield _GroupCase(400, 1028, p=0.1, r=11)
    for r in (8, 32):
        yield _GroupCase(r=r, p=0.1, members=2)
        yield _GroupCase(r=r, members=2, adapter=torch.float32)
        yield _GroupCase(r=r, p=0.1, adapter=torch.float32)
    for m in (8, 250, 1000):
        yield _GroupCase(m, p=0.1, r=32)
    yield _GroupCase(p=0.1, conv1d=True)
    yield _GroupCase(p=0.1, dtype=torch.float16, adapter=torch.float16)
    for m in (8, 8192):
        yield _GroupCase(m, p=0.1, dtype=torch.float32, adapter=torch.float32)


@dataclass(frozen=True)
class _SingleCase:
    """A forward pass in one launch."""

    m: int = 8192
    n: int = 1024
    k: int = 4096
    r: int = 16
    p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.bfloat16
    conv1d: bool = False
    more: bool = True

    def launch(self) -> None:
        """With a seed or bits for the mask; with `more`, a core, a bias and s, on the meta device."""
        make = partial(torch.empty, dtype=self.dtype, device="meta")
        adapter = partial(torch.empty, dtype=self.adapter, device="meta")
        weight = make(self.k, self.n).t() if self.conv1d else make(self.n, self.k)
        given = torch.empty(self.m, -(-self.k // 8), dtype=torch.uint8, device="meta")
        core, bias = (adapter(self.r), make(self.n)) if self.more else (None, None)
        for bits in (None, given) if self.p else (None,):
            single_forward(
                make(self.m, self.k), weight, adapter(self.r, self.k), adapter(self.n, self.r), core=core, bias=bias,
                dropout_p=self.p, seed=torch.empty(1, dtype=torch.int64, device="meta"), bits=bits, keep_s=self.more,
            )  # fmt: skip


_SINGLE_SHAPES = [(8, 1024), (24, 14336), (350, 1024), (400, 256), (400, 4096)]
_SINGLE_SHAPES += [(1000, 1024), (2000, 1024), (4000, 1024), (8192, 4096)]


def _single_cases() -> Iterator[_SingleCase]:
    """Every tile, with every block of ranks that it holds; every other variant at some tile."""
    for m, n in _SINGLE_SHAPES:
        for r in (16, 32, 64):
            yield _SingleCase(m, n, r=r)
            yield _SingleCase(m, n, r=r, p=0.1)
            yield _SingleCase(m, n + 4, 4100, r=r, p=0.1)
    for m in (8, 8192):
        yield _SingleCase(m, p=0.1, dtype=torch.float32, adapter=torch.float32)
        yield _SingleCase(m, n=1020, k=4100, p=0.1, dtype=torch.float32, adapter=torch.float32)
        yield _SingleCase(m, more=False)
        yield _SingleCase(m, p=0.1, conv1d=True)
        yield _SingleCase(m, p=0.1, r=32, adapter=torch.float32)
        for r in (1, 8, 17):
            yield _SingleCase(m, p=0.1, r=r)
    yield _SingleCase(p=0.1, dtype=torch.float16, adapter=torch.float16)


@dataclass(frozen=True)
class _FewTokensCase:
    """Passes over x and dy whose columns several programs share."""

    m: int = 1000
    k: int = 4096
    r: int = 16
    p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.bfloat16
    core: str = "none"

    def launch(self) -> None:
        """s and v, and ds alone, on the meta device."""
        make = partial(torch.empty, dtype=self.dtype, device="meta")
        adapter = partial(torch.empty, dtype=self.adapter, device="meta")
        shape = {"diag": (self.r,), "dense": (self.r, self.r), "gate": (self.m, 2)}.get(self.core)
        core = None if shape is None else adapter(shape)
        x, a = make(self.m, self.k), adapter(self.r, self.k)
        given = torch.empty(self.m, -(-self.k // 8), dtype=torch.uint8, device="meta")
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        s, _, _ = shrink(x, a, core=core, core_kind=self.core, dropout_p=self.p, seed=seed)
        shrink(x, a, core=core, core_kind=self.core, dropout_p=self.p, seed=seed, bits=given, keep_s=False)
        if self.core in ("none", "diag"):
            dy_factors(x, a.t(), s, core=core, want_db=False, want_dcore=core is not None)


def _few_tokens_cases() -> Iterator[_FewTokensCase]:
    """Every height of a block of x, with every core, kind of mask, dtype and alignment."""
    for r in (16, 64, 128):
        for m in (8, 250, 1000):
            yield _FewTokensCase(m, r=r, p=0.1)
        for core in ("none", "diag", "dense", "gate"):
            yield _FewTokensCase(r=r, core=core)
        yield _FewTokensCase(k=4100, r=r, p=0.1)
        yield _FewTokensCase(8192, k=4100, r=r, p=0.1)
        for m in (8, 1000, 8192):
            yield _FewTokensCase(m, r=r, p=0.1, adapter=torch.float32)
        yield _FewTokensCase(8, r=r, adapter=torch.float32)
        yield _FewTokensCase(r=r, p=0.1, dtype=torch.float32, adapter=torch.float32, core="diag")
    yield _FewTokensCase(p=0.1, dtype=torch.float16, adapter=torch.float16)
    for r in (8, 17, 200):
        yield _FewTokensCase(r=r, p=0.1, core="diag")
    yield _FewTokensCase(8192, r=33, p=0.1)


@dataclass(frozen=True)
class _GatherCase:
    """Factors made from one vector: d entries for D elements, by a stored index or a permutation."""

    total: int = 2**20
    length: int = 2**16
    stored: bool = True
    dtype: torch.dtype = torch.float32

    def launch(self) -> None:
        """Gather, and both ways of summing back, on the meta device."""
        make = partial(torch.empty, device="meta")
        theta, grad = make(self.length, dtype=self.dtype), make(self.total, dtype=self.dtype)
        scale = make(self.length)
        permutation = Permutation(self.total, 1025, 1025, 2**30 + 1, -(2**30) + 1)
        table = make(self.total, dtype=torch.uint16 if self.length <= 65536 else torch.int32)
        positions = (make(self.total, dtype=torch.int32), make(self.length + 1, dtype=torch.int32))
        gather(theta, table if self.stored else permutation, scale)
        scatter_add(grad, table if self.stored else permutation, self.length)
        segment_sum(grad, positions if self.stored else permutation, scale)


def _gather_cases() -> Iterator[_GatherCase]:
    """Every tile of the segmented sum, and every kind of index, dtype and alignment."""
    for stored in (True, False):
        for elements in range(2, 11):
            yield _GatherCase(length=2 ** (20 - elements), stored=stored)
        yield _GatherCase(2**20 + 5, 2**18, stored)
        yield _GatherCase(2**20 + 5, 2**14 + 3, stored)
        yield _GatherCase(stored=stored, dtype=torch.bfloat16)
        yield _GatherCase(stored=stored, dtype=torch.float16)


@dataclass(frozen=True)
class _WeightFactorCase:
    """A factor act(A W) and its gradient; `rows` for products over the rows of a Linear's weight."""

    n: int = 4096
    k: int = 14336
    r: int = 32
    activation: str = "relu"
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32
    rows: bool = False

    def launch(self) -> None:
        """Forward and backward, on the meta device."""
        make = partial(torch.empty, device="meta")
        w = make(self.k, self.n, dtype=self.dtype).t() if self.rows else make(self.n, self.k, dtype=self.dtype)
        h, slope = weight_factor(make(self.r, self.n, dtype=self.adapter), w, activation=self.activation)
        weight_factor_grad(torch.empty_like(h), slope if slope.numel() else h, w, activation=self.activation)


def _weight_factor_cases() -> Iterator[_WeightFactorCase]:
    """Every tile in both layouts, with one chunk of rows and several; every activation, dtype and alignment."""
    for rows in (False, True):
        for r in (8, 32, 64, 128):
            yield _WeightFactorCase(r=r, rows=rows)
            yield _WeightFactorCase(4100, 4100, r=r, rows=rows)
        yield _WeightFactorCase(4096, 131072, rows=rows)
        yield _WeightFactorCase(131072, 4096, rows=rows, activation="sin")
        yield _WeightFactorCase(adapter=torch.bfloat16, rows=rows)
    for activation in ACTIVATIONS:
        yield _WeightFactorCase(activation=activation)
        yield _WeightFactorCase(activation=activation, r=128)
    yield _WeightFactorCase(adapter=torch.float16, dtype=torch.float16, activation="gelu")
    yield _WeightFactorCase(dtype=torch.float16)
    yield _WeightFactorCase(dtype=torch.float32, r=8)
    yield _WeightFactorCase(dtype=torch.float32, r=64, activation="gelu", rows=True)


@dataclass(frozen=True)
class _StackCase:
    """Sums of stacked factors and their gradient."""

    dtype: torch.dtype = torch.float32
    rank: int = 8
    size: int = 4096

    def launch(self) -> None:
        """Forward and backward, on the meta device."""
        make = partial(torch.empty, dtype=self.dtype, device="meta")
        a, b = make(2 * self.rank, self.size), make(self.size, 3 * self.rank)
        of_a, of_b = Stack(1, 2, a.numel() // 2), Stack(self.size, 3, self.rank)
        repeat_blocks(*sum_blocks(a, b, of_a, of_b), of_a, of_b)


def _stack_cases() -> Iterator[_StackCase]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield _StackCase(dtype)
        yield _StackCase(dtype, rank=16)
        yield _StackCase(dtype, rank=1, size=4099)


_Tunable = CallCase | _GroupCase | _SingleCase | _FewTokensCase


@dataclass(frozen=True)
class _TunedCase:
    """A case in which one kernel has a tile that only a tuned table gives it."""

    case: _Tunable
    arch: int
    kernel: str
    tuned: Tuned

    def launch(self) -> None:
        """As the case, with that tile."""
        with probing(self.arch, "", {self.kernel: self.tuned.fields()}):
            self.case.launch()


def _tuned_cases(arch: int) -> Iterator[_TunedCase]:
    """Every tile that a table may name, with and without a mask, where no other case reaches it."""
    reached: set[tuple[Any, ...]] = set()
    wanted: dict[tuple[Any, ...], _TunedCase] = {}
    cases: tuple[_Tunable, ...] = (*_cases(), *_group_cases(), *_single_cases(), *_few_tokens_cases())
    for case in cases:
        with targeting(arch), record() as log, probing(arch, "") as probe:
            case.launch()
        reached |= {(launch.name.removesuffix("_tma"), is_masked(launch), launch.tile) for launch in log}
        for key, candidates in probe.seen.items():
            kernel, variant = str(key[0]), str(key[-1])
            for tuned in candidates:
                found = _TunedCase(case, arch, kernel, tuned)
                wanted.setdefault((kernel, "masked" in variant, tuned.tile), found)
    yield from (case for key, case in wanted.items() if key not in reached)


AnyCase = _Tunable | _TunedCase | _GatherCase | _WeightFactorCase | _StackCase


def shipped_cases(arch: int) -> Iterator[AnyCase]:
    """Calls that reach every binary on `arch`, in a fixed order."""
    calls = (_cases, _group_cases, _single_cases, _few_tokens_cases, _gather_cases, _weight_factor_cases, _stack_cases)
    for cases in calls:
        yield from cases()
    yield from _tuned_cases(arch)


def launches_of(arch: int, cases: Iterable[AnyCase]) -> list[Launch]:
    """One launch for every binary that these ask for on `arch`, in a fixed order."""
    launches: dict[Any, Launch] = {}
    for case in cases:
        with targeting(arch), record() as log:
            case.launch()
        for launch in log:
            launches.setdefault(binary_of(launch), launch)
    return list(launches.values())


def shipped_launches(arch: int) -> list[Launch]:
    """One launch for every binary that the kernel routes can ask for on `arch`, by model or table, in a fixed order."""
    return launches_of(arch, shipped_cases(arch))
