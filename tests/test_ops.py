"""The operators of torch.library: schema, fake implementation, aliasing and tracing."""

from __future__ import annotations

import pytest
import torch

from lowrank_fused import ops
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
    torch.library.opcheck(ops.forward, (x, o.weight, a, b, core_tensor, bias, seed), options)

    _, s, mask = ops.forward(x, o.weight, a, b, core_tensor, bias, seed, **options_of(core, p, ALL))
    saved = (x, o.weight, a, b, core_tensor, s, mask if p else None)
    torch.library.opcheck(ops.backward, (o.dy, *saved), options)


def test_forward_computes_only_what_backward_will_need():
    o = Operands.random(6, 10, 14, 3)
    arguments = (o.x.detach(), o.weight, o.a.detach(), o.b.detach(), None, None, torch.tensor([1]))
    only_a = ops.forward(*arguments, **options_of("none", 0.5, [False, True, False, False, False]))
    assert only_a[1].numel() == 0 and only_a[2].shape == (6, 2)
    only_b = ops.forward(*arguments, **options_of("none", 0.5, [False, False, True, False, False]))
    assert only_b[1].shape == (6, 3) and only_b[2].numel() == 0
