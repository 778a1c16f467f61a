"""Layers that read the same x (q, k, v; gate, up) as one group: a plan, not a recording.

The engine does not run groups yet. What it would launch is put together here from the launchers themselves, at the
shapes that a group would give them; once there are calls to record, `forward_plan` and `backward_plan` become calls of
`recording`.

forward     one shrink with the summed rank and one dropout mask; a product for each member
backward    dy_factors for each member; one x_factors with the summed rank; products that add into one dx
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from torch import Tensor

from lowrank_fused.kernels.expand import expand
from lowrank_fused.kernels.grad_input import grad_input
from lowrank_fused.kernels.lowrank_forward import lowrank_forward
from lowrank_fused.kernels.shrink import shrink
from lowrank_fused.kernels.x_factors import x_factors

from ..routes.fused import SPLIT
from ..routes.problem import Saved
from ..tools.model_shapes import LinearShape
from .passes import Pass, Setting
from .recorded import Meta, recording

__all__ = ["Members", "backward_plan", "backward_plans", "forward_plan", "forward_plans", "groups", "label"]

Members = tuple[LinearShape, ...]

# Names under which transformers has projections of one input.
SHARING_X = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


def groups(linears: Sequence[LinearShape]) -> list[Members]:
    """These layers, those that share their input together; the order is that of first members."""
    found: dict[object, list[LinearShape]] = {}
    for linear in linears:
        names = next((names for names in SHARING_X if linear.name in names), None)
        key = linear if names is None else (names, linear.in_features, linear.count)
        found.setdefault(key, []).append(linear)
    return [tuple(members) for members in found.values()]


def label(members: Sequence[LinearShape]) -> str:
    """The names of these layers; sizes where there is no name."""
    return " + ".join(member.name or f"{member.in_features} -> {member.out_features}" for member in members)


def forward_plan(members: Members, setting: Setting, carries: Sequence[bool]) -> list[Pass]:
    """`carries` says which products carry the low-rank term themselves; the others add to what expand wrote."""
    meta = Meta(members, setting)

    def call() -> None:
        x = meta.x
        shrink(x, meta.a, scale=2.0, dropout_p=setting.dropout, seed=meta.seed)
        for member, carried in zip(members, carries, strict=True):
            v, b = meta.make(x.shape[0], setting.rank), meta.b(member)
            weight, bias = meta.weight(member), meta.bias(member)
            if carried:
                lowrank_forward(x, weight, v, b, bias=bias)
            else:
                expand(v, b, bias=bias).addmm_(x, weight.t())

    return recording(setting.arch, call)


def forward_plans(members: Members, setting: Setting) -> Iterator[list[Pass]]:
    """Every choice of who carries the low-rank term."""
    for carries in product((True, False), repeat=len(members)):
        yield forward_plan(members, setting, carries)


def backward_plan(members: Members, setting: Setting, carrier: int | None, others_by_library: bool) -> list[Pass]:
    """The product of the `carrier` carries ds A for all members and comes first; without one x_factors writes it.

    The low-rank part of dx is one product, ds [M, sum of ranks] with A [sum of ranks, K], under the shared mask. Each
    further product adds into dx, by the library or by a kernel that reads dx once more.
    """
    meta = Meta(members, setting)
    x, a = meta.x, meta.a
    ds = meta.make(x.shape[0], a.shape[0])
    mask = shrink(x, a, dropout_p=setting.dropout, seed=meta.seed)[2] if setting.dropout else None
    p = setting.dropout

    def factors() -> None:
        for member in members:
            saved = Saved(meta.make(x.shape[0], setting.rank), None)
            SPLIT.backward(meta.dy(member), None, None, a, meta.b(member), None, saved, meta.options("b"))

    def chain() -> Tensor | None:
        dx = x_factors(x, ds, a, mask=mask, dropout_p=p, want_dx0=carrier is None)[1]
        if carrier is not None:
            first = members[carrier]
            dx = grad_input(meta.dy(first), meta.weight(first), ds, a, mask=mask, dropout_p=p)
        return dx

    passes = recording(setting.arch, factors) + recording(setting.arch, chain)
    for place, member in enumerate(members):
        if place != carrier:
            passes += _added(meta, member, others_by_library or carrier is None)
    return passes


def _added(meta: Meta, member: LinearShape, by_library: bool) -> list[Pass]:
    """dx += dy W."""
    dx, dy, weight = meta.x, meta.dy(member), meta.weight(member)
    if by_library:
        return recording(meta.setting.arch, lambda: dx.addmm_(dy, weight))
    passes = recording(meta.setting.arch, lambda: grad_input(dy, weight))
    return [replace(p, name=f"{p.name}, added", bytes_read=p.bytes_read + dx.nbytes) for p in passes]


def backward_plans(members: Members, setting: Setting) -> Iterator[list[Pass]]:
    """All in kernels, all by the library, and one kernel that carries with the others by the library."""
    yield backward_plan(members, setting, 0, False)
    yield backward_plan(members, setting, None, True)
    if len(members) > 1:
        for carrier in range(len(members)):
            yield backward_plan(members, setting, carrier, True)
