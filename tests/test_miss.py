"""MiSS: shards that do not fill the input, the mini form, the tiled identity, and the form that is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_fused as lf
from lowrank_fused import tiled
from lowrank_fused.routes import precise


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 20), nn.Linear(20, 12))


def adapted(**more) -> nn.Module:
    model = lf.inject(make_model(), method="miss", target_modules=["0", "2", "3"], **more)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("rank", [1, 3, 4, 7, 12])
@pytest.mark.parametrize("mini_r", [None, 2])
def test_peft_computes_and_merges_the_same_for_every_rank(rank, mini_r, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(rank=rank, **({} if mini_r is None else {"init_weights": "mini", "mini_r": mini_r}))
    lf.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    x = torch.randn(5, 20)
    torch.testing.assert_close(theirs(x), model(x))
    merged, ours = theirs.merge_and_unload(), lf.merge(model, unload=True)
    torch.testing.assert_close(merged[0].weight, ours[0].weight)
    torch.testing.assert_close(merged[2].weight, ours[2].weight)


@pytest.mark.parametrize("rank", [3, 4])
def test_the_factor_is_a_tiled_identity(rank):
    layer = adapted(rank=rank)[0]
    expected = torch.tensor([[float(column % rank == row) for column in range(20)] for row in range(rank)])
    assert torch.equal(layer.miss_A, expected) and not layer.miss_A.requires_grad


def test_layers_of_one_width_share_it_and_no_file_holds_it(tmp_path):
    model = adapted(rank=4)
    assert model[0].miss_A is model[3].miss_A and model[0].miss_A is not model[2].miss_A
    lf.save_adapter(model, tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {f"base_model.model.{path}.miss_block" for path in "023"}
    loaded = lf.load_adapter(make_model(), tmp_path)
    assert loaded[0].miss_A is loaded[3].miss_A and torch.equal(loaded[0].miss_A, model[0].miss_A)


def test_mini_repeats_its_block_along_the_outputs():
    layer, x = adapted(rank=4, init_weights="mini", mini_r=2)[0], torch.randn(5, 20)
    assert layer.miss_block.shape == (4, 2)
    shards = x.view(5, 5, 4).sum(1)
    low = torch.cat([shards @ layer.miss_block] * 6, dim=1)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) + low)


def test_bat_and_what_does_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'bat' updates the weight by W_block D . D, a change of full rank"):
        lf.AdapterConfig("miss", rank=4, init_weights="bat")
    with pytest.raises(ValueError, match="init_weights must be True, False or 'mini', got 'midi'"):
        lf.AdapterConfig("miss", init_weights="midi")
    with pytest.raises(ValueError, match="0: mini_r must divide out_features = 12, got 5"):
        lf.inject(make_model(), method="miss", rank=4, init_weights="mini", mini_r=5)
    with pytest.raises(ValueError, match="2: rank 16 is more than in_features = 12"):
        lf.inject(make_model(), method="miss", rank=16)
    peft = pytest.importorskip("peft")
    config = peft.MissConfig(r=4, init_weights="bat", target_modules=["0", "2"])
    peft.get_peft_model(make_model(), config).save_pretrained(tmp_path)
    with pytest.raises(lf.CheckpointError, match="'bat' updates the weight"):
        lf.load_adapter(make_model(), tmp_path)


@pytest.mark.parametrize("route", ["auto", "reference"])
def test_accelerated_layers_of_one_width_share_a_tiled_identity_and_sum_by_it(route, monkeypatch):
    """It outlives changes of the blocks; fp32 adapters on a bf16 base."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model().bfloat16(), peft.MissConfig(r=4, target_modules=["0", "2", "3"]))
    lf.accelerate(model, route=route, precision="fast" if route == "reference" else "match")
    repeated, summed = [], []
    make, cut = tiled.repeated_identity, tiled.shards
    monkeypatch.setattr(tiled, "repeated_identity", lambda *given: repeated.append(given) or make(*given))
    monkeypatch.setattr(precise, "shards", lambda *given: summed.append(given) or cut(*given))
    x = torch.randn(6, 20, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(3):
        model(x).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
    assert [given[:2] for given in repeated] == [(4, 20), (4, 12)]
    # Three layers, forward and backward.
    assert len(summed) == (0 if route == "reference" else 3 * 3 * 2)
