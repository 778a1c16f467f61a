"""HydraLoRA: what its gate is made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_fused as lf

K, N = 24, 16


def layer_of(dtype: torch.dtype, **options) -> lf.LowRankLinear:
    torch.manual_seed(0)
    layer = lf.LowRankLinear.from_linear(nn.Linear(K, N, dtype=dtype), method="hydralora", rank=4, **options)
    with torch.no_grad():
        for name in layer.trained_names:
            getattr(layer, name).normal_()
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_softmax_is_that_of_float32_rounded_once(dtype):
    layer = layer_of(dtype)
    x = torch.randn(50, K).to(dtype)
    gate = layer.method.terms(layer, layer.matrix, x).core.g
    scores = x @ layer.lora_route.to(dtype).t()
    assert gate.dtype == dtype and gate.shape == (50, 3)
    assert torch.equal(gate, torch.softmax(scores, -1, dtype=torch.float32).to(dtype))


def test_the_router_sees_x_without_dropout():
    layer = layer_of(torch.float64, dropout=0.5, experts=2)
    with torch.no_grad():  # experts that take back what the other adds: only the gate tells them apart
        layer.lora_B[:, 4:] = -layer.lora_B[:, :4]
        layer.lora_route[1] = layer.lora_route[0]
    x = torch.randn(5, K, dtype=torch.float64)
    torch.testing.assert_close(layer.train()(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("experts", [0, -1, 2.0, True])
def test_the_number_of_experts_is_checked(experts):
    with pytest.raises(ValueError, match="experts must be a positive integer"):
        lf.AdapterConfig("hydralora", experts=experts)
