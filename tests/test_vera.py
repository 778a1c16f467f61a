"""VeRA's shared pair of random matrices: drawn as PEFT draws it, stored once, sliced without a copy."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_fused as lf


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 24))


def adapted(**more) -> nn.Module:
    return lf.inject(make_model(), method="vera", **{"rank": 8, **more})


def test_layers_share_one_pair_as_large_as_the_largest():
    model = adapted()
    a, b = model[0].vera_A, model[0].vera_B
    assert model[2].vera_A is a and model[2].vera_B is b
    assert a.shape == (8, 20) and b.shape == (24, 8) and not a.requires_grad
    report = lf.trainable_parameters(model)
    assert (report.trainable, report.rows[0].frozen) == (2 * 8 + 12 + 24, 8 * 20 + 24 * 8)


def test_a_layer_uses_views_of_it():
    layer = adapted()[2]
    terms = layer.method.terms(layer, layer.matrix, torch.zeros(0, 12))
    assert terms.a.shape == (8, 12) and terms.b.shape == (24, 8)
    for part, whole in ((terms.a, layer.vera_A), (terms.b, layer.vera_B)):
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_the_pair_follows_from_its_key_and_from_nothing_else():
    torch.manual_seed(5)
    first, state = adapted(), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    second, other = adapted(), adapted(projection_prng_key=1)
    assert torch.equal(first[0].vera_A, second[0].vera_A) and torch.equal(first[0].vera_B, second[0].vera_B)
    assert not torch.equal(first[0].vera_A, other[0].vera_A)
    # Kaiming-uniform: within sqrt(6 / fan_in), and filling that.
    for matrix in (first[0].vera_A, first[0].vera_B):
        bound = (6 / matrix.shape[1]) ** 0.5
        assert 0.9 * bound < matrix.abs().max() <= bound


def test_ranks_may_differ_between_layers():
    model = adapted(rank_pattern={"0": 3})
    assert model[0].vera_A is model[2].vera_A and model[2].vera_A.shape == (8, 20)
    assert model[0].vera_lambda_d.shape == (3,) and model[2].vera_lambda_d.shape == (8,)
    layer, x = model[0], torch.randn(5, 20)
    with torch.no_grad():
        layer.vera_lambda_b.fill_(0.5)
    delta = 0.5 * (x @ layer.vera_A[:3].T * 0.1) @ layer.vera_B[:12, :3].T
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) + delta)


@pytest.mark.parametrize("saved", [True, False])
def test_the_file_holds_the_pair_once_or_not_at_all(saved, tmp_path):
    lf.save_adapter(adapted(save_projection=saved), tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    vectors = {f"base_model.model.{path}.vera_lambda_{name}" for path in "02" for name in "bd"}
    assert keys == vectors | ({"base_model.vera_A", "base_model.vera_B"} if saved else set())


def test_a_saved_pair_is_taken_from_the_file(tmp_path):
    """Another machine may draw another pair from the key: what was saved counts."""
    model = adapted()
    with torch.no_grad():
        model[0].vera_A.mul_(2)
        model[0].vera_lambda_b.fill_(1)
    lf.save_adapter(model, tmp_path)
    x = torch.randn(3, 20)
    assert torch.equal(lf.load_adapter(make_model(), tmp_path)(x), model(x))


def test_a_narrow_base_gets_a_narrow_pair_and_wide_vectors():
    layer = lf.inject(make_model().to(torch.bfloat16), method="vera", rank=8)[0]
    assert layer.vera_A.dtype == torch.bfloat16 and layer.vera_lambda_d.dtype == torch.float32
