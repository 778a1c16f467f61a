"""LoRA²: the engine works at the inner width, whatever the rank is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_fused as lf


def test_no_factor_of_the_outer_rank_is_formed():
    torch.manual_seed(0)
    layer = lf.LowRankLinear.from_linear(nn.Linear(24, 16), method="lora_squared", rank=64, inner=3)
    terms = layer.method.terms(layer, layer.matrix, torch.zeros(0, 24))
    assert terms.a.shape == (3, 24) and terms.core.shape == (3, 3) and terms.b.shape == (16, 3)
    assert layer.lora2_E.shape == (64,)


def test_inner_is_checked():
    with pytest.raises(ValueError, match="inner must be a positive integer"):
        lf.AdapterConfig("lora_squared", inner=0)
