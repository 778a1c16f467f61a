"""Bytes kept for backward, by saved-tensor hooks on distinct storages, against eager PEFT and against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_fused import LowRankLinear, lowrank_linear
from lowrank_fused.benchmark import kept_bytes
from lowrank_fused.testing import Operands

M, N, K, R = 48, 96, 256, 16
ROUTES = ["reference", "addmm", *(pytest.param(r, marks=pytest.mark.triton) for r in ("thin", "split", "single"))]


def kept(o: Operands, route: str, p: float) -> int:
    def forward():
        return lowrank_linear(o.x, o.weight, o.a, o.b, core=o.core, dropout_p=p, route=route)

    return kept_bytes(forward, [o.weight, o.a, o.b, *([] if o.core is None else [o.core])])


def kept_by_eager(o: Operands, p: float) -> int:
    def forward():
        # What nn.Dropout calls on a GPU: it keeps a boolean mask, where the CPU's own keeps one in x's dtype.
        dropped = torch.native_dropout(o.x, p, True)[0] if p else o.x
        low_rank = nn.functional.linear(nn.functional.linear(dropped, o.a), o.b)
        return nn.functional.linear(o.x, o.weight) + low_rank * 2.0

    return kept_bytes(forward, [o.weight, o.a, o.b])


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_lora_keeps_x_and_the_skinny_activation(route, dtype, device):
    o = Operands.random(M, N, K, R, dtype=dtype, device=device)
    assert kept(o, route, 0.0) == M * (K + R) * dtype.itemsize
    assert kept(o, route, 0.0) <= kept_by_eager(o, 0.0)


@pytest.mark.parametrize("route", ROUTES)
def test_dropout_adds_one_bit_an_element(route, device):
    o = Operands.random(M, N, K, R, dtype=torch.bfloat16, device=device)
    assert kept(o, route, 0.1) == M * (2 * K + 2 * R + K // 8)
    assert kept(o, route, 0.1) <= 0.72 * kept_by_eager(o, 0.1)


def test_bytes_a_token_at_4096():
    o = Operands.random(32, 64, 4096, 16, dtype=torch.bfloat16)
    assert kept(o, "addmm", 0.1) == 32 * 8736
    assert kept_by_eager(o, 0.1) == 32 * 12320


@pytest.mark.parametrize("route", ROUTES)
def test_a_frozen_a_keeps_no_x(route, device):
    o = Operands.random(M, N, K, R, core="diag", dtype=torch.bfloat16, device=device)
    o.a.requires_grad_(False)
    o.b.requires_grad_(False)
    assert kept(o, route, 0.0) == M * R * 2


def test_loldu_keeps_rank_values_a_token():
    layer = LowRankLinear.from_linear(nn.Linear(K, N, bias=False, dtype=torch.bfloat16), method="loldu", rank=R)
    x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
    few, many = (kept_bytes(lambda t=t: layer(t), layer.parameters()) for t in (x[: M // 2], x))
    assert many - few == M // 2 * R * 2


def test_projections_of_one_x_keep_it_once():
    o = Operands.random(M, N, K, R, dtype=torch.bfloat16)
    q, k, v = (Operands.random(M, N, K, R, dtype=torch.bfloat16, seed=i) for i in range(3))

    def forward():
        return [lowrank_linear(o.x, p.weight, p.a, p.b, dropout_p=0.1) for p in (q, k, v)]

    parameters = [t for p in (q, k, v) for t in (p.weight, p.a, p.b)]
    assert kept_bytes(forward, parameters) == M * (2 * K + 3 * (2 * R + K // 8))


def test_an_x_that_is_not_contiguous_is_kept_as_it_is():
    o = Operands.random(M, N, K, R)
    wide = torch.randn(4, K, M // 4, requires_grad=True)
    x = wide.transpose(1, 2)
    expected = wide.untyped_storage().nbytes() + M * R * 4
    assert kept_bytes(lambda: lowrank_linear(x, o.weight, o.a, o.b), [o.weight, o.a, o.b]) == expected


def test_nothing_is_kept_without_gradients():
    o = Operands.random(M, N, K, R)
    with torch.no_grad():
        assert kept_bytes(lambda: lowrank_linear(o.x, o.weight, o.a, o.b, dropout_p=0.1)) == 0
