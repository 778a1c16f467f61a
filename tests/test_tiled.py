"""A tiled identity is made once and known again, and sums in its place give what products with it do."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lowrank_fused import lowrank_add, lowrank_linear, tiled
from lowrank_fused.routes import addmm, precise
from lowrank_fused.tiled import is_tiled, tiled_identity

CPU = torch.device("cpu")
M, N, K, R = 37, 18, 24, 6


def made(rank: int = R, columns: int = K, dtype: torch.dtype = torch.float32) -> Tensor:
    return tiled_identity(rank, columns, dtype, CPU)


@pytest.mark.parametrize("rank", [1, 4, 7, 20, 24])
def test_values(rank):
    expected = torch.tensor([[float(column % rank == row) for column in range(20)] for row in range(rank)])
    a = made(rank, 20)
    assert torch.equal(a, expected) and a.is_contiguous()


def test_it_is_one_while_somebody_keeps_it():
    a = made(3, 9)
    assert made(3, 9) is a
    assert made(3, 9, torch.float64) is not a and made(3, 12) is not a
    key = (3, 9, torch.float32, CPU)
    assert key in tiled._made
    del a
    gc.collect()
    assert key not in tiled._made


def test_what_modes_make_is_theirs_alone():
    with FakeTensorMode():
        fake = made(2, 8)
    with torch.inference_mode():
        a = made(2, 8)
    assert a is not fake and type(a) is Tensor and not a.is_inference()
    with FakeTensorMode():
        assert type(made(2, 8)) is not Tensor


def test_only_its_own_objects_untouched_are_known_again():
    a = made()
    half, bf16, uneven = made(dtype=torch.float16), made(dtype=torch.bfloat16), made(5)
    assert is_tiled(a) and is_tiled(half) and not is_tiled(bf16) and not is_tiled(uneven)
    assert not is_tiled(a.clone()) and not is_tiled(a[:3]) and not is_tiled(a.t())
    a.mul_(2)
    assert not is_tiled(a) and torch.equal(made().sum(0), torch.ones(K))


def step(a: Tensor, dtype: torch.dtype, route: str, p: float, shape: tuple[int, ...], beside: bool) -> list[Tensor]:
    """y and the gradients of x and b."""
    torch.manual_seed(0)
    x, w = torch.randn(*shape, K).to(dtype).requires_grad_(), torch.randn(N, K).to(dtype)
    b = torch.randn(N, R, dtype=a.dtype, requires_grad=True)
    more = {"scale": 0.5, "dropout_p": p, "route": route, "precision": "match", "seed": torch.tensor([7])}
    y = lowrank_add(x @ w.t(), x, a, b, **more) if beside else lowrank_linear(x, w, a, b, **more)
    dy = torch.randn(y.shape).to(dtype)
    return [y, *torch.autograd.grad(y, [x, b], dy)]


@pytest.mark.parametrize("beside", [False, True], ids=["whole", "beside"])
@pytest.mark.parametrize("shape", [(M,), (3, 5), (0,)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    ("route", "dtype", "of_a"),
    [
        ("addmm", torch.float32, torch.float32),
        ("addmm", torch.float16, torch.float16),
        ("precise", torch.bfloat16, torch.float32),
        ("precise", torch.float64, torch.float64),
    ],
    ids=str,
)
def test_sums_give_what_products_do(route, dtype, of_a, p, shape, beside, monkeypatch):
    summed = []
    for module in (addmm, precise):
        monkeypatch.setattr(module, "shards", lambda *given: summed.append(given) or tiled.shards(*given))
    a = made(dtype=of_a)
    by_product = step(a.clone(), dtype, route, p, shape, beside)
    assert not summed
    by_sum = step(a, dtype, route, p, shape, beside)
    # Forward; and backward where nothing is dropped, to add to the gradient of a product, with blocks of any row.
    tokens = shape != (0,) or route == "addmm"
    expected = 1 + (not p and (route == "precise" or not beside)) if tokens else 0
    assert len(summed) == expected
    eps = torch.finfo(dtype).eps
    for got, product in zip(by_sum, by_product, strict=True):
        assert got.dtype == product.dtype
        torch.testing.assert_close(got, product, rtol=2 * eps, atol=8 * eps)
