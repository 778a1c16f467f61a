"""The operators of torch.library: schema, fake implementation, aliasing and tracing."""

from __future__ import annotations

import pytest
import torch

import lowrank_fused as lf
from lowrank_fused import ops
from lowrank_fused.library import is_watched
from lowrank_fused.testing import Operands

ALL, NONE = [True] * 5, [False] * 5
SOME = [True, False, True, False, False]


def options_of(core: str, p: float, wants: list[bool]) -> dict:
    wants = [w and (core != "none" or i != 3) for i, w in enumerate(wants)]
    return dict(scale=0.5, core_kind=core, dropout_p=p, wants=wants, route="addmm")


@pytest.mark.parametrize("wants", [ALL, NONE, SOME], ids=["all", "none", "some"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("core", ["none", "diag", "dense", "gate"])
def test_opcheck(core, p, wants):
    o = Operands.random(6, 10, 14, 3, core=core, vectors=("bias",)).to(torch.float32)
    x, a, b, bias = (t.detach() for t in (o.x, o.a, o.b, o.bias))
    core_tensor = None if o.core is None else o.core.detach()
    seed = torch.tensor([9]) if p else None
    options = options_of(core, p, wants)
    torch.library.opcheck(ops.forward_op, (x, o.weight, a, b, core_tensor, bias, seed), options)

    _, s, mask = ops.forward_op(x, o.weight, a, b, core_tensor, bias, seed, **options_of(core, p, ALL))
    saved = (x, o.weight, a, b, core_tensor, s, mask if p else None)
    torch.library.opcheck(ops.backward_op, (o.dy, *saved), options)


@pytest.mark.parametrize("rank", [3, 70])
@pytest.mark.parametrize("route", ["addmm", "precise", "reference"])
def test_gradients_are_laid_out_as_the_factors_are(route, rank):
    """By the operator, its fake implementation, and the way around it."""
    o = Operands.random(6, 10, 14, rank).to(torch.float32)
    rows, options = (o.x.detach(), o.a.detach(), o.b.detach()), options_of("none", 0.0, ALL) | {"route": route}
    x, a, b = rows
    for turned in (False, True):
        if turned:
            a, b = (t.t().contiguous().t() for t in (a, b))
        _, s, _ = ops.forward_op(x, o.weight, a, b, None, None, None, **options)
        saved = (o.dy, x, o.weight, a, b, None, s, None)
        torch.library.opcheck(ops.backward_op, saved, options)
        grads = ops.backward_op(*saved, **options)
        assert grads[1].stride() == a.stride() and grads[2].stride() == b.stride()
        leaves = [a.requires_grad_(), b.requires_grad_()]
        y = lf.lowrank_linear(x, o.weight, *leaves, scale=0.5, route=route)
        direct = torch.autograd.grad(y, leaves, o.dy)
        for found, grad, leaf in zip(direct, grads[1:3], leaves, strict=True):
            assert torch.equal(found, grad) and found.stride() == leaf.stride()
            leaf.requires_grad_(False)


def test_forward_computes_only_what_backward_will_need():
    o = Operands.random(6, 10, 14, 3)
    arguments = (o.x.detach(), o.weight, o.a.detach(), o.b.detach(), None, None, torch.tensor([1]))
    only_a = ops.forward_op(*arguments, **options_of("none", 0.5, [False, True, False, False, False]))
    assert only_a[1].numel() == 0 and only_a[2].shape == (6, 2)
    only_b = ops.forward_op(*arguments, **options_of("none", 0.5, [False, False, True, False, False]))
    assert only_b[1].shape == (6, 3) and only_b[2].numel() == 0


def seen_by_profiler(call) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()}


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.name())
        return function(*args, **(kwargs or {}))


def test_operators_are_seen_by_whoever_watches_and_cost_nobody_else_their_dispatch(monkeypatch):
    """Profiles, dispatch modes and traces name the operators; a plain call computes the same without them."""
    o = Operands.random(6, 10, 14, 3).to(torch.float32)

    def step() -> list[torch.Tensor]:
        y = lf.lowrank_linear(o.x, o.weight, o.a, o.b, dropout_p=0.2, seed=torch.tensor([3]))
        y = lf.lowrank_add(y, o.x, o.a, o.b)
        return [y, *torch.autograd.grad(y, [o.x, o.a, o.b], o.dy)]

    names = {f"lowrank_fused::{name}" for name in ("forward", "add_", "backward")}
    with Watch() as watch:
        watched = step()
    assert names <= watch.seen
    assert names <= seen_by_profiler(step)

    def refuse(*_, **__):
        raise AssertionError("a plain call went through the dispatcher")

    for name in ("forward_op", "add_op", "backward_op"):
        monkeypatch.setattr(ops, name, refuse)
    for ours, seen in zip(step(), watched, strict=True):
        assert torch.equal(ours, seen)


def test_no_shortcut_past_the_operator_where_there_is_no_memory():
    plain = torch.zeros(2, 2)
    assert not is_watched(plain, None, torch.nn.Parameter(plain))
    assert is_watched(torch.zeros(2, 2, device="meta"))
    assert is_watched(plain, torch._subclasses.FakeTensorMode().from_tensor(plain))
    assert torch.func.vmap(lambda row: row if is_watched(plain) else 0 * row)(plain + 1).equal(plain + 1)
