"""BeamLoRA: the weights that ranks compete for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_fused as lf


def test_weights_start_at_one_and_keep_their_sum():
    torch.manual_seed(0)
    layer = lf.LowRankLinear.from_linear(nn.Linear(24, 16), method="beamlora", rank=6)

    def weights() -> torch.Tensor:
        return layer.method.terms(layer, layer.matrix, torch.zeros(0, 24)).core

    assert torch.equal(weights(), torch.ones(6))
    with torch.no_grad():
        layer.lora_gate.copy_(0.05 * torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.0]))
    now = weights()
    torch.testing.assert_close(now.sum(), torch.tensor(6.0))
    torch.testing.assert_close(now[:-1] / now[1:], torch.full((5,), 1.0).exp())


def test_temperature_is_checked():
    with pytest.raises(ValueError, match="temperature must be positive"):
        lf.AdapterConfig("beamlora", temperature=0.0)
