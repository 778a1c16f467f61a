"""LoRTA: one tensor over layers, kinds of matrix and heads."""

from __future__ import annotations

import pytest
import torch

import lowrank_fused as lf
from lowrank_fused.tools.model_shapes import build
from lowrank_fused.tools.tiny_models import logits, tiny_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_square_projections_of_a_model_form_one_tensor_of_the_papers_size():
    model = lf.inject(build("llama2-7b"), method="lorta", rank=8, heads=32, target_modules=ATTENTION)
    width, heads, layers, matrices = 4096, 32, 32, 4
    expected = 8 * (width + width // heads + heads + matrices + layers)
    assert lf.trainable_parameters(model).trainable == expected == 34_336


def test_layers_find_their_places_by_their_paths():
    model = lf.inject(tiny_model("bert"), method="lorta", rank=4, heads=4, target_modules=["query", "value"])
    layers = {path: m for path, m in model.named_modules() if isinstance(m, lf.LowRankLinear)}
    assert len(layers) == 4
    for path, layer in layers.items():
        number, kind = int("layer.1" in path), int(path.endswith("value"))
        assert (layer.lorta_layer, layer.lorta_matrix) == (number, kind)
        assert layer.lorta_A is next(iter(layers.values())).lorta_A
        assert layer.lorta_layers.shape == (2, 4) and layer.lorta_matrices.shape == (2, 4)


def test_every_layer_adds_to_the_gradient_of_what_they_share():
    torch.manual_seed(0)
    model = lf.inject(tiny_model("bert").double(), method="lorta", rank=4, heads=4, target_modules=["query", "value"])
    layers = [m for m in model.modules() if isinstance(m, lf.LowRankLinear)]
    with torch.no_grad():
        for tensor in layers[0].adapter_tensors().values():
            tensor.normal_()
    logits(model).square().mean().backward()
    together = layers[0].lorta_B.grad.clone()

    def loss(b: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            layers[0].lorta_B.copy_(b)
            return logits(model).square().mean()

    start, direction = layers[0].lorta_B.detach().clone(), torch.randn_like(together)
    step = 1e-5
    slope = (loss(start + step * direction) - loss(start - step * direction)) / (2 * step)
    torch.testing.assert_close((together * direction).sum(), slope, rtol=1e-5, atol=1e-9)


def test_shapes_of_their_own_have_tensors_of_their_own():
    model = lf.inject(tiny_model("llama"), method="lorta", rank=4, heads=4, target_modules=[*ATTENTION, "up_proj"])
    tensors = {}
    for path, layer in ((p, m) for p, m in model.named_modules() if isinstance(m, lf.LowRankLinear)):
        tensors.setdefault(tuple(layer.weight.shape), set()).add(id(layer.lorta_A))
        assert layer.lorta_layers.shape == (2, 4), path
    assert {shape: len(found) for shape, found in tensors.items()} == {(32, 32): 1, (16, 32): 1, (48, 32): 1}


def test_an_adapter_loads_into_a_model_that_has_one(tmp_path):
    first, second = (
        lf.inject(tiny_model("bert"), method="lorta", rank=4, heads=4, target_modules=["query", "value"])
        for _ in range(2)
    )
    with torch.no_grad():
        next(m for m in first.modules() if isinstance(m, lf.LowRankLinear)).lorta_B.normal_()
    lf.save_adapter(first, tmp_path)
    assert not torch.equal(logits(first), logits(second))
    lf.load_adapter(second, tmp_path)
    assert torch.equal(logits(first), logits(second))


def test_heads_must_divide_every_layer():
    with pytest.raises(ValueError, match=r"q_proj: heads must be an integer that divides out_features = 32, got 5"):
        lf.inject(tiny_model("llama"), method="lorta", heads=5)
