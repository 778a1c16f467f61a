"""Gradients of factors that lie in one buffer: written in place where they can be, right where they cannot."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_fused as lf
from lowrank_fused.flat_gradient import FlatGradient, hand_over, place_of
from lowrank_fused.inject import adapted_layers

SHAPES = [(2, 3), (4, 1), (1, 5)]


def tensors() -> list[Tensor]:
    return [torch.zeros(shape) for shape in SHAPES]


def filled(i: int) -> Tensor:
    return torch.arange(float(torch.Size(SHAPES[i]).numel())).view(SHAPES[i]) + 10 * i


def copied(gradient: FlatGradient, grads: list[Tensor | None]) -> tuple[Tensor, int]:
    """What `take` returns, and how many gradients it copied."""
    with patch.object(torch, "_foreach_copy_", wraps=torch._foreach_copy_) as copy_all:
        flat = gradient.take(grads)
    return flat, sum(len(call.args[0]) for call in copy_all.call_args_list)


def put(gradient: FlatGradient, i: int) -> Tensor:
    """The i-th gradient written to where it belongs."""
    part = gradient.part(i)
    assert part is not None
    return part.copy_(filled(i))


EXPECTED = torch.cat([filled(i).flatten() for i in range(3)])


def test_what_is_in_its_place_is_not_copied():
    gradient = FlatGradient(tensors())
    for _ in range(2):
        flat, count = copied(gradient, [put(gradient, i) for i in (0, 1, 2)])
        assert torch.equal(flat, EXPECTED) and count == 0


def test_a_part_is_given_away_once():
    gradient = FlatGradient(tensors())
    assert gradient.part(1) is not None
    assert gradient.part(1) is None
    gradient.take([None, None, None])
    assert gradient.part(1) is not None


def test_others_are_copied_and_absent_ones_are_zero():
    gradient = FlatGradient(tensors())
    flat, count = copied(gradient, [put(gradient, 0), None, filled(2)])
    assert torch.equal(flat, torch.cat([filled(0).flatten(), torch.zeros(4), filled(2).flatten()])) and count == 1
    flat, count = copied(gradient, [filled(0).t().contiguous().t(), filled(1), filled(2)])
    assert torch.equal(flat, EXPECTED) and count == 3


@pytest.mark.parametrize("instead", [None, torch.ones(SHAPES[0])], ids=["nothing", "another"])
def test_a_part_that_did_not_come_back_is_left_alone(instead):
    """Whoever asked for that gradient alone may still hold it."""
    gradient = FlatGradient(tensors())
    mine, others = put(gradient, 0), [put(gradient, i) for i in (1, 2)]
    flat, _ = copied(gradient, [instead, *others])
    assert torch.equal(mine, filled(0))
    assert torch.equal(flat[:6], torch.zeros(6) if instead is None else torch.ones(6)) and torch.equal(
        flat[6:], EXPECTED[6:]
    )


def test_a_tensor_knows_where_its_gradient_belongs():
    factors, plain = tensors(), torch.zeros(2, 3)
    gradient = FlatGradient(factors)
    assert [place_of(factor) for factor in factors] == [(gradient, i) for i in range(3)]
    assert place_of(plain) is None
    hand_over(factors[2], plain)
    assert place_of(plain) == (gradient, 2)


# In a model.


def make_model(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 48), nn.Linear(48, 16)).to(dtype)
    options = {"theta_d_length": 64, "init_theta_d_bound": 0.5, "rank": 8} | options
    return lf.inject(model, method="unilora", **options)


def theta_of(model: nn.Module) -> nn.Parameter:
    return next(iter(adapted_layers(model).values())).unilora_theta_d


def plain_gradient(run, model: nn.Module, *inputs: Tensor) -> Tensor:
    """The gradient of the vector where no factor knows of a place."""
    model = copy.deepcopy(model)
    with patch("lowrank_fused.operands.place_of", lambda tensor: None):
        run(model, *inputs).backward()
    return theta_of(model).grad


def gradient_and_copies(run, model: nn.Module, *inputs: Tensor) -> tuple[Tensor, int]:
    """The gradient of the vector, and how many factors' gradients were copied on the way."""
    theta_of(model).grad = None
    with patch.object(torch, "_foreach_copy_", wraps=torch._foreach_copy_) as copy_all:
        run(model, *inputs).backward()
    return theta_of(model).grad, sum(len(call.args[0]) for call in copy_all.call_args_list)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def twice(model: nn.Module, x: Tensor) -> Tensor:
    """The last layer reads two inputs: its factors have two gradients, which autograd adds."""
    h = model[:3](x)
    return (model[3](h) * model[3](h.sin())).sum()


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False).square().sum()


ROUTES = ["addmm", "precise", *(pytest.param(route, marks=pytest.mark.triton) for route in ("thin", "split", "single"))]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("route", ROUTES)
def test_no_gradient_of_a_factor_is_copied(route, dropout, poisoned, device, monkeypatch):
    monkeypatch.setattr("lowrank_fused.operands.choose", lambda *_: route)
    model = make_model(dropout=dropout).to(device)
    x = torch.randn(20, 32, device=device)
    for _ in range(2):
        torch.manual_seed(1)
        expected = plain_gradient(loss, model, x)
        torch.manual_seed(1)
        found, copies = gradient_and_copies(loss, model, x)
        assert torch.equal(found, expected) and copies == 0


@pytest.mark.parametrize(("run", "copies"), [(twice, 6), (checkpointed, 0)])
def test_other_ways_through_a_model(run, copies):
    model, x = make_model(torch.float64), torch.randn(5, 32, dtype=torch.float64)
    expected = plain_gradient(run, model, x)
    for _ in range(2):
        found, count = gradient_and_copies(run, model, x)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        assert count == copies


def test_gradients_that_are_held_stay_what_they_are():
    model, xs = make_model(torch.float64), torch.randn(3, 5, 32, dtype=torch.float64)
    expected = sum(plain_gradient(loss, model, x) for x in xs)
    with lf.hold_gradients(model):
        for x in xs:
            loss(model, x).backward()
    torch.testing.assert_close(theta_of(model).grad, expected, rtol=1e-13, atol=1e-13)


def test_a_backward_that_broke_off_leaves_nothing_behind():
    model, x = make_model(torch.float64), torch.randn(5, 32, dtype=torch.float64)
    expected = plain_gradient(loss, model, x)
    y = loss(model, x)
    handle = model[0].register_full_backward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        loss(model, x.clone().requires_grad_()).backward()
    handle.remove()
    found = torch.autograd.grad(y, theta_of(model))[0]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_a_gradient_asked_for_alone_is_never_overwritten():
    model, x = make_model(torch.float64), torch.randn(5, 32, dtype=torch.float64)
    layer = next(iter(adapted_layers(model).values()))
    y = loss(model, x)
    a, _ = layer.unilora_factors.of_layer(theta_of(model), layer.unilora_first, layer.unilora_rank, layer.matrix)
    (mine,) = torch.autograd.grad(y, a, retain_graph=True)
    before = mine.clone()
    y.backward()
    assert torch.equal(mine, before)
    torch.testing.assert_close(theta_of(model).grad, plain_gradient(loss, model, x), rtol=1e-13, atol=1e-13)
