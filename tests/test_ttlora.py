"""TT-LoRA: how dimensions are split, and what the train of cores stands for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import lowrank_fused as lf


def layer_of(**options) -> lf.LowRankLinear:
    torch.manual_seed(0)
    linear = nn.Linear(12, 20, dtype=torch.float64)
    return lf.LowRankLinear.from_linear(linear, method="ttlora", rank=3, init_cores="gaussian", **options)


@pytest.mark.parametrize(
    ("size", "order", "split"),
    [(4096, 3, [16, 16, 16]), (14336, 3, [16, 28, 32]), (768, 2, [24, 32]), (13, 3, [1, 1, 13]), (768, 1, [768])],
)
def test_dimensions_are_split_into_factors_as_equal_as_they_get(size, order, split):
    layer = lf.LowRankLinear.from_linear(nn.Linear(size, 2, device="meta"), method="ttlora", rank=3, order=order)
    found = [getattr(layer, f"ttlora_in_{i}").shape[1] for i in range(order)]
    assert found == split and math.prod(found) == size


def test_an_element_of_the_update_is_the_product_of_its_slices():
    layer = layer_of(factors={12: [3, 4], 20: [2, 5, 2]})
    inputs = [layer.ttlora_in_0, layer.ttlora_in_1]
    outputs = [layer.ttlora_out_0, layer.ttlora_out_1, layer.ttlora_out_2]
    a, b = layer.generated
    assert a.shape == (3, 12) and b.shape == (20, 3)
    for row, (o, p, q) in enumerate(itertools.product(range(2), range(5), range(2))):
        for column, (i, j) in enumerate(itertools.product(range(3), range(4))):
            places = [i, j, o, p, q]
            slices = [core[:, place] for core, place in zip(inputs + outputs, places, strict=True)]
            product = torch.linalg.multi_dot(slices).squeeze()
            torch.testing.assert_close((b @ a)[row, column], product)


def test_alpha_is_the_scale_itself():
    assert layer_of(alpha=6).scaling == 6.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": {12: [3, 5]}}, "factors of 12 must multiply to it, got"),
        ({"order": 0}, "order must be a positive integer"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**options)


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="init_cores must be 'zero' or 'gaussian'"):
        lf.AdapterConfig("ttlora", init_cores="svd")
