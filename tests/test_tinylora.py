"""TinyLoRA: which layers share a vector, the projections, and the singular vectors they act between."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_fused as lf
from lowrank_fused.methods import Site
from lowrank_fused.methods.tinylora import group_of


def make_model(layers: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = (20, 12) * layers
    return nn.Sequential(*(nn.Linear(sizes[i], sizes[i + 1]) for i in range(layers)))


def adapted(layers: int = 3, **more) -> nn.Module:
    return lf.inject(make_model(layers), method="tinylora", **{"rank": 2, "u": 5, **more})


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("tying", [0.0, 0.2, 0.5, 0.7, 0.95, 1.0])
def test_layers_share_vectors_as_pefts_do(layers, tying):
    peft = pytest.importorskip("peft")
    config = peft.TinyLoraConfig(u=5, weight_tying=tying, target_modules=[str(i) for i in range(layers)])
    theirs = peft.get_peft_model(make_model(layers), config).base_model.model
    expected = [theirs.get_submodule(str(i))._tinylora_v_key["default"] for i in range(layers)]
    paths = [str(i) for i in range(layers)]
    ours = [group_of(Site(i, paths, [(1, 1)] * layers, [2] * layers, {}), tying) for i in range(layers)]
    assert [str(group) for group in ours] == expected


def test_a_tied_vector_is_one_parameter_and_one_key(tmp_path):
    model = adapted(weight_tying=0.5)  # two groups: 0, and 1 with 2
    assert [layer.tinylora_group for layer in model] == [0, 1, 1]
    assert model[1].tinylora_v is model[2].tinylora_v and model[0].tinylora_v is not model[1].tinylora_v
    assert lf.trainable_parameters(model).trainable == 10
    lf.save_adapter(model, tmp_path)
    shared = {
        key for key in load_file(tmp_path / "adapter_model.safetensors") if "model.model" not in key and "v." in key
    }
    assert shared == {"base_model.tinylora_v.0", "base_model.tinylora_v.1"}


def test_a_full_projection_reaches_the_best_low_rank_part():
    """With P_i the i-th unit matrix, v holds R, and R = I adds W's own leading part."""
    layer = adapted(rank=2, u=4)[0]
    with torch.no_grad():
        layer.tinylora_P.copy_(torch.eye(4).view(4, 2, 2))
        layer.tinylora_v.copy_(torch.eye(2).flatten())
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    x = torch.randn(5, 20)
    expected = nn.functional.linear(x, layer.weight + u[:, :2] * s[:2] @ vh[:2], layer.bias)
    torch.testing.assert_close(layer(x), expected)
    sizes = [layer.tinylora_A.norm(dim=1), layer.tinylora_B.norm(dim=0)]
    torch.testing.assert_close(sizes, [s[:2].sqrt()] * 2)


def test_each_layer_has_its_own_projection_from_the_seed():
    first, second, other = adapted(), adapted(), adapted(projection_seed=43)
    assert torch.equal(first[1].tinylora_P, second[1].tinylora_P)
    assert not torch.equal(first[0].tinylora_P, first[1].tinylora_P)
    assert torch.equal(first[1].tinylora_P, other[0].tinylora_P), "seed plus place, as in PEFT"


def test_a_rank_above_the_layers_counts_as_the_layers():
    layer = adapted(rank=64)[0]
    assert layer.tinylora_A.shape == (12, 20) and layer.tinylora_P.shape == (5, 12, 12)


def test_an_unsaved_projection_is_not_in_the_file(tmp_path):
    lf.save_adapter(adapted(save_projection=False), tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert not any("tinylora_P" in key for key in keys) and any("tinylora_A" in key for key in keys)


def test_bad_values_are_refused():
    for settings, text in (
        ({"u": 0}, "u, the length of v, must be at least 1, got 0"),
        ({"weight_tying": 1.5}, "weight_tying must be from 0 to 1, got 1.5"),
        ({"init_weights": "normal"}, "init_weights must be True, False or 'uniform', got 'normal'"),
    ):
        with pytest.raises(ValueError, match=text):
            lf.AdapterConfig("tinylora", **settings)
